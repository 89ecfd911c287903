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
from ._scvi import scvi_expression, scvi_latent
from ._smoothing import gene_mean, knn_smoothing

__all__ = [
    "ExpressionPredictor",
    "LabelPrediction",
    "coexpression_vectors",
    "correlation_matrix",
    "correlation_network",
    "expression_statistics",
    "gene_correlation",
    "gene_mean",
    "grnboost2_network",
    "harmony",
    "hvg_pca",
    "knn_labels",
    "knn_smoothing",
    "logistic_labels",
    "majority_labels",
    "random_gene_vectors",
    "scvi_expression",
    "scvi_latent",
    "shuffled_labels",
    "shuffled_network",
]
