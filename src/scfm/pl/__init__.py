"""Plots of what ``scfm.tl`` wrote."""

from __future__ import annotations

from ._annotation import annotation
from ._benchmark import benchmark
from ._compare_embeddings import compare_embeddings
from ._enrichment import enrichment
from ._gene_network import gene_network
from ._gene_programs import gene_programs
from ._gene_similarity import gene_similarity
from ._perturbation import perturbation
from ._perturbation_atlas import perturbation_atlas
from ._tf_specificity import tf_specificity
from ._training import training_curve

__all__ = [
    "annotation",
    "benchmark",
    "compare_embeddings",
    "enrichment",
    "gene_network",
    "gene_programs",
    "gene_similarity",
    "perturbation",
    "perturbation_atlas",
    "tf_specificity",
    "training_curve",
]
