"""Benchmarks: what a model achieves on your data, in one tidy table with what it has to be compared with."""

from __future__ import annotations

from ._cells import cells, summary
from ._enhancement import enhancement
from ._thinning import thin_counts

__all__ = ["cells", "enhancement", "summary", "thin_counts"]
