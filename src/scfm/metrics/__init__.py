"""Evaluation on arrays."""

from __future__ import annotations

from ._clustering import clustering_agreement, label_silhouette

__all__ = ["clustering_agreement", "label_silhouette"]
