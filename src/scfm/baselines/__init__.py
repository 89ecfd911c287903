"""What every result of a foundation model is compared with."""

from __future__ import annotations

from ._classify import LabelPrediction, knn_labels, logistic_labels
from ._controls import majority_labels, shuffled_labels
from ._expression import ExpressionPredictor
from ._harmony import harmony
from ._pca import hvg_pca
from ._scvi import scvi_expression, scvi_latent
from ._smoothing import gene_mean, knn_smoothing

__all__ = [
    "ExpressionPredictor",
    "LabelPrediction",
    "gene_mean",
    "harmony",
    "hvg_pca",
    "knn_labels",
    "knn_smoothing",
    "logistic_labels",
    "majority_labels",
    "scvi_expression",
    "scvi_latent",
    "shuffled_labels",
]
