"""Counts behind normalised values: within a cell, all values are whole multiples of one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LOG_BASES = {"natural": np.e, "base 2": 2.0, "base 10": 10.0}

# smallest count of a cell that is still found without size factors
_LARGEST_MINIMUM = 20
# deviation from a whole number that is accepted beside the rounding of the stored values
_SLACK = 1e-3
# values whose rounding is a larger part of a count than this fit any scale; a cell may have few of them
_VAGUE = 0.25
_LARGEST_VAGUE_SHARE = 0.01
# log1p of a count never gets near this, so that larger values cannot be logarithms
_LARGEST_LOG = 50.0


@dataclass(frozen=True)
class Recovered:
    """Counts of a block of cells.

    Parameters
    ----------
    counts
        Whole numbers (float64) in the order of the values of the block, shape ``(values,)``.
    scale
        Value that stands for one count in each cell, NaN for cells without values and cells that failed, shape
        ``(cells,)``.
    totals
        Sum of each cell's values without logarithm, shape ``(cells,)``.
    deviation
        Largest distance from a whole number in each recovered cell, NaN elsewhere, shape ``(cells,)``.
    failed
        Cells for which no scale was found, shape ``(cells,)``.
    n_uncertain
        Number of values so large that the precision of the input does not determine the last digit of the count.
    """

    counts: np.ndarray
    scale: np.ndarray
    totals: np.ndarray
    deviation: np.ndarray
    failed: np.ndarray
    n_uncertain: int


def undo_log(values: np.ndarray, base: float | None) -> np.ndarray:
    """Invert ``log(1 + x) / log(base)`` in float64; ``None`` leaves the values as they are."""
    values = values.astype(np.float64)
    return values if base is None else np.expm1(values * np.log(base))


def _relative_error(stored: np.ndarray, linear: np.ndarray, base: float | None) -> np.ndarray:
    """Bound of the relative error that single precision leaves in the linear values.

    float64 arrays count as single precision too, because most were float32 once. The logarithm is allowed to have
    been taken as ``log(1 + x)``, which loses digits of small ``x``, and normalisation to have rounded twice.
    """
    precision = np.finfo(stored.dtype).eps if stored.dtype == np.float16 else np.finfo(np.float32).eps
    error = np.full(len(linear), 2.0)
    if base is not None:
        error += np.maximum(1.0, stored * np.log(base)) * (1.0 + linear) / linear
    return precision * error


def recover_block(block: csr_matrix, base: float | None, *, scale: np.ndarray | None = None) -> Recovered:
    """Find the counts of a block of cells.

    A cell's values are ``scale * counts``. The smallest value is tried as one count, then as two, and so on; the first
    scale that makes all values of the cell whole numbers, to the precision of the input, is taken. Counts are thus
    found up to a common divisor of all counts of the cell, which nothing in the cell itself could reveal.

    Parameters
    ----------
    block
        Non-negative values, shape ``(cells, genes)``.
    base
        Base of the logarithm that was taken of ``1 + value``; ``None`` for none.
    scale
        Known scale of each cell, shape ``(cells,)``; nothing is searched then, only checked.
    """
    stored, lengths = block.data, np.diff(block.indptr)
    positive = stored > 0
    if not positive.all():
        row = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(row[positive], minlength=len(lengths))
        stored = stored[positive]
    linear = undo_log(stored, base)
    error = _relative_error(stored, linear, base)

    n_cells = len(lengths)
    found, deviation = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
    counts, totals = np.zeros(len(linear)), np.zeros(n_cells)
    ends = np.cumsum(lengths)
    filled = np.flatnonzero(lengths)
    if len(filled):
        totals[filled] = np.add.reduceat(linear, (ends - lengths)[filled])
        smallest = np.zeros(n_cells)
        smallest[filled] = np.minimum.reduceat(linear, (ends - lengths)[filled])

    pending = filled
    for minimum in range(1, _LARGEST_MINIMUM + 1 if scale is None else 2):
        if not len(pending):
            break
        # values of the pending cells, side by side
        n = lengths[pending]
        starts = np.cumsum(n) - n
        where = np.repeat(ends[pending] - n - starts, n) + np.arange(n.sum())
        values, precision = linear[where], error[where]
        guess = smallest[pending] / minimum if scale is None else scale[pending]
        whole = np.maximum(np.rint(values / np.repeat(guess, n)), 1.0)
        if scale is None:  # one value gives a rough scale, all values a fine one
            weight = precision**-2
            guess = np.add.reduceat(values / whole * weight, starts) / np.add.reduceat(weight, starts)
        ratio = values / np.repeat(guess, n)
        whole = np.rint(ratio)
        off = np.abs(ratio - whole)
        fits = np.logical_and.reduceat((off <= _SLACK + whole * precision) & (whole > 0), starts)
        fits &= np.add.reduceat(whole * precision > _VAGUE, starts) <= _LARGEST_VAGUE_SHARE * n
        done, kept = pending[fits], np.repeat(fits, n)
        found[done] = guess[fits]
        deviation[done] = np.maximum.reduceat(off, starts)[fits]
        counts[where[kept]] = whole[kept]
        pending = pending[~fits]

    failed = np.zeros(n_cells, dtype=bool)
    failed[pending] = True
    n_uncertain = int((counts * error > _VAGUE).sum())
    if not positive.all():
        counts, part = np.zeros(len(positive)), counts
        counts[positive] = part
    return Recovered(counts, found, totals, deviation, failed, n_uncertain)


@dataclass(frozen=True)
class Transform:
    """How values were made from counts.

    Parameters
    ----------
    base
        Base of the logarithm of ``1 + value``, ``None`` for none.
    share
        Share of the inspected cells whose values are whole multiples of one number when the logarithm is undone.
    target_sum
        Sum of a cell's values without logarithm, if it is the same in all cells.
    """

    base: float | None
    share: float
    target_sum: float | None

    @property
    def kind(self) -> str:
        """``"normalized"`` or ``"log-normalized"``."""
        return "normalized" if self.base is None else "log-normalized"


def guess_transform(sample: csr_matrix) -> Transform:
    """Try no logarithm and logarithms of base e, 2 and 10 on some cells; the one that explains most cells wins."""
    values, lengths = sample.data, np.diff(sample.indptr)
    informative = lengths > 2 if (lengths > 2).any() else lengths > 0
    bases = [None, *LOG_BASES.values()] if values.size and values.max() < _LARGEST_LOG else [None]
    best = Transform(None, 0.0, None)
    for base in bases:
        result = recover_block(sample, base)
        fits = informative & ~result.failed
        share = float(fits.sum() / max(1, informative.sum()))
        if _are_decimals(result.scale[fits]):
            share = 0.0
        target = common_total(result.totals)
        # equal totals are evidence by themselves, where the values are no multiples of anything (rounded, imputed)
        if (share, target is not None) > (best.share, best.target_sum is not None):
            best = Transform(base, share, target)
        if best.share > 0.99:
            break
    return best


def _are_decimals(scale: np.ndarray) -> bool:
    """Whether values are multiples of 0.1, 0.01 or 0.001 because they were written with so many decimals."""
    scale = scale[scale < 0.999] * 1000
    return len(scale) > 0 and bool(np.mean((scale > 0.5) & (np.abs(scale - np.rint(scale)) < 1e-3)) > 0.9)


def common_total(totals: np.ndarray) -> float | None:
    """The sum that all non-empty cells share to three digits, or ``None``."""
    totals = totals[totals > 0]
    if len(totals) < 2:
        return None
    middle = float(np.median(totals))
    if np.abs(totals - middle).max() > 1e-3 * middle:
        return None
    return float(f"{middle:.5g}")
