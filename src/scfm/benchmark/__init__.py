"""Benchmarks: what a model achieves on your data, in one tidy table with what it has to be compared with."""

from __future__ import annotations

from ._cells import cells, summary
from ._enhancement import enhancement
from ._gene_function import gene_function
from ._networks import networks
from ._perturbation import perturbation, perturbation_baseline
from ._thinning import thin_counts

__all__ = [
    "cells",
    "enhancement",
    "gene_function",
    "networks",
    "perturbation",
    "perturbation_baseline",
    "summary",
    "thin_counts",
]
