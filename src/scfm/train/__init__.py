"""Training of backbones with their papers' objectives."""

from __future__ import annotations

from ._pretrain import TrainingResult, pretrain
from ._recipe import Recipe, frequent_genes

__all__ = ["Recipe", "TrainingResult", "frequent_genes", "pretrain"]
