"""Evaluation on arrays."""

from __future__ import annotations

from ._clustering import clustering_agreement, label_silhouette
from ._scib import has_scib, scib_scores

__all__ = ["clustering_agreement", "has_scib", "label_silhouette", "scib_scores"]
