"""Plots of what ``scfm.tl`` wrote."""

from __future__ import annotations

from ._annotation import annotation
from ._benchmark import benchmark
from ._compare_embeddings import compare_embeddings
from ._training import training_curve

__all__ = ["annotation", "benchmark", "compare_embeddings", "training_curve"]
