"""Benchmarks: what a model achieves on your data, in one tidy table with what it has to be compared with."""

from __future__ import annotations

from ._enhancement import enhancement
from ._thinning import thin_counts

__all__ = ["enhancement", "thin_counts"]
