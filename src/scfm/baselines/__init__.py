"""What every result of a foundation model is compared with."""

from __future__ import annotations

from ._classify import LabelPrediction, knn_labels, logistic_labels
from ._coexpression import gene_correlation
from ._controls import majority_labels, shuffled_labels
from ._expression import ExpressionPredictor
from ._gene_vectors import coexpression_vectors, expression_statistics, random_gene_vectors
from ._harmony import harmony
from ._networks import correlation_matrix, correlation_network, grnboost2_network, shuffled_network
from ._pca import hvg_pca
from ._perturbation import (
    PerturbationBaseline,
    ShiftedCells,
    additive,
    half_split,
    matching_mean,
    no_change,
    perturbed_mean,
    ridge_linear,
)
from ._scvi import scvi_expression, scvi_latent
from ._signatures import mean_signatures, neighbor_signatures, ridge_signatures
from ._smoothing import gene_mean, knn_smoothing

__all__ = [
    "ExpressionPredictor",
    "LabelPrediction",
    "PerturbationBaseline",
    "ShiftedCells",
    "additive",
    "coexpression_vectors",
    "correlation_matrix",
    "correlation_network",
    "expression_statistics",
    "gene_correlation",
    "gene_mean",
    "grnboost2_network",
    "half_split",
    "harmony",
    "hvg_pca",
    "knn_labels",
    "knn_smoothing",
    "logistic_labels",
    "majority_labels",
    "matching_mean",
    "mean_signatures",
    "neighbor_signatures",
    "no_change",
    "perturbed_mean",
    "random_gene_vectors",
    "ridge_linear",
    "ridge_signatures",
    "scvi_expression",
    "scvi_latent",
    "shuffled_labels",
    "shuffled_network",
]
