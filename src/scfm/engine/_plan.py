"""Which cells go into one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_WASTE = 0.04
_SMALLEST_SHARE = 4


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one forward pass; ``None`` means no bound.

    Parameters
    ----------
    tokens
        Padded tokens: cells times the length of the longest.
    cells
        Number of cells.
    """

    tokens: int | None = None
    cells: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens_per_batch", self.tokens), ("batch_size", self.cells)):
            if value is not None and value < 1:
                msg = f"{name} must be a positive whole number; got {value!r}"
                raise ValueError(msg)

    def at_most(self, longest: int) -> int | None:
        """How many cells of length ``longest`` are allowed together; at least one."""
        by_tokens = None if self.tokens is None else max(1, self.tokens // max(1, longest))
        bounds = [bound for bound in (by_tokens, self.cells) if bound is not None]
        return min(bounds) if bounds else None

    def after_failure(self, n_cells: int, longest: int) -> Limits:
        """Half of a batch that did not fit into memory."""
        return replace(self, tokens=max(1, n_cells * longest // 2))


def plan_batches(lengths: NDArray[np.integer], limits: Limits) -> list[NDArray[np.intp]]:
    """Group cells of similar length.

    Cells are sorted by length, longest first, so that a batch that is too large for the memory shows itself at once.
    A batch ends at the limits, or earlier where more than 4 % of it would be padding, but it is not cut below a
    quarter of what the limits allow: very small batches cost more than padding.

    Parameters
    ----------
    lengths
        Number of tokens per cell.
    limits
        Bounds of a batch.

    Returns
    -------
    Index arrays that together hold every cell once.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = np.maximum(lengths[order].astype(np.int64), 1)
    summed = np.concatenate([[0], np.cumsum(ordered)])
    batches = []
    first = 0
    while first < len(order):
        longest = int(ordered[first])
        left = len(order) - first
        allowed = limits.at_most(longest) or left
        n = min(allowed, left)
        padded = longest * np.arange(1, n + 1)
        waste = 1 - (summed[first + 1 : first + n + 1] - summed[first]) / padded
        tight = int(np.searchsorted(waste, _MAX_WASTE, side="right"))
        n = max(tight, min(n, -(-allowed // _SMALLEST_SHARE)))
        batches.append(order[first : first + n])
        first += n
    return batches
