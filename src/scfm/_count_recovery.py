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
# with a rough scale, only counts that are certain by this much refine it
_CERTAIN = 0.4
# a value whose error may be more than half a count fits any scale; a cell may have few such values
_VAGUE = 0.5
_LARGEST_VAGUE_SHARE = 0.01
_ENOUGH_FOR_ONE_VAGUE = 4
_MOST_DECIMALS = 6
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


def _relative_error(stored: np.ndarray, linear: np.ndarray, base: float | None, decimals: int | None) -> np.ndarray:
    """Bound of the relative error of the linear values that comes from how the values were stored.

    float64 arrays count as single precision too, because most were float32 once. The logarithm is allowed to have
    been taken as ``log(1 + x)``, which loses digits of small ``x``, and normalisation to have rounded a few times.
    """
    precision = _precision(stored)
    error = np.full(len(linear), 4 * precision)
    slope = 1.0 / linear if base is None else np.log(base) * (1.0 + linear) / linear
    if base is not None:
        error += precision * np.maximum(1.0, stored * np.log(base)) * (1.0 + linear) / linear
    if decimals is not None:
        error += 0.51 * 10.0**-decimals * slope
    return error


def _precision(stored: np.ndarray) -> float:
    return float(np.finfo(np.float16 if stored.dtype == np.float16 else np.float32).eps)


def count_decimals(stored: np.ndarray) -> int | None:
    """Number of decimals that all values were rounded to; ``None`` if they were not."""
    for decimals in range(1, _MOST_DECIMALS + 1):
        shifted = stored.astype(np.float64) * 10.0**decimals
        tolerance = 2 * _precision(stored) * shifted
        if not len(shifted) or np.median(tolerance) > 0.1:
            return None
        if (np.abs(shifted - np.rint(shifted)) <= tolerance).all():
            return decimals
    return None


def recover_block(
    block: csr_matrix,
    base: float | None,
    *,
    decimals: int | None = None,
    scale: np.ndarray | None = None,
    scale_error: float = 1e-6,
) -> Recovered:
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
    decimals
        Number of decimals that the values were rounded to; ``None`` if they were not.
    scale
        Known scale of each cell, shape ``(cells,)``; nothing is searched then, only checked.
    scale_error
        Relative error of ``scale``.
    """
    stored, lengths = block.data, np.diff(block.indptr)
    positive = stored > 0
    if not positive.all():
        row = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(row[positive], minlength=len(lengths))
        stored = stored[positive]
    linear = undo_log(stored, base)
    error = _relative_error(stored, linear, base, decimals)

    n_cells = len(lengths)
    found, deviation = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
    counts, totals, n_uncertain = np.zeros(len(linear)), np.zeros(n_cells), 0
    ends = np.cumsum(lengths)
    filled = np.flatnonzero(lengths)
    if len(filled):
        first = (ends - lengths)[filled]
        totals[filled] = np.add.reduceat(linear, first)
        smallest, its_error = np.zeros(n_cells), np.zeros(n_cells)
        smallest[filled] = np.minimum.reduceat(linear, first)
        its_error[filled] = np.maximum.reduceat(error, first)  # the smallest value has the largest error

    pending = filled
    for minimum in range(1, _LARGEST_MINIMUM + 1 if scale is None else 2):
        if not len(pending):
            break
        # values of the pending cells, side by side
        n = lengths[pending]
        starts = np.cumsum(n) - n
        where = np.repeat(ends[pending] - n - starts, n) + np.arange(n.sum())
        values, bound = linear[where], error[where]
        if scale is None:
            rough = _Scale(smallest[pending] / minimum, its_error[pending])
        else:
            rough = _Scale(scale[pending], np.full(len(pending), scale_error))
        # the better the scale, the more counts are certain, and the better the scale
        exact = rough.refine(values, bound, starts, n).refine(values, bound, starts, n)
        ratio = values / np.repeat(exact.value, n)
        whole = np.rint(ratio)
        off = np.abs(ratio - whole)
        allowed = whole * (bound + np.repeat(exact.error, n))
        fits = np.logical_and.reduceat((off <= allowed) & (whole > 0), starts)
        vague = np.add.reduceat(allowed > _VAGUE, starts)
        fits &= vague <= np.maximum(n >= _ENOUGH_FOR_ONE_VAGUE, _LARGEST_VAGUE_SHARE * n)
        n_uncertain += int(vague[fits].sum())
        done, kept = pending[fits], np.repeat(fits, n)
        found[done] = exact.value[fits]
        deviation[done] = np.maximum.reduceat(off, starts)[fits]
        counts[where[kept]] = whole[kept]
        pending = pending[~fits]

    failed = np.zeros(n_cells, dtype=bool)
    failed[pending] = True
    if not positive.all():
        counts, part = np.zeros(len(positive)), counts
        counts[positive] = part
    return Recovered(counts, found, totals, deviation, failed, n_uncertain)


@dataclass(frozen=True)
class _Scale:
    """Value of one count in some cells, and its relative error, each of shape ``(cells,)``."""

    value: np.ndarray
    error: np.ndarray

    def refine(self, values: np.ndarray, bound: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> _Scale:
        """Intersect the intervals in which the values, being whole numbers of counts, allow the scale to be.

        Cells whose values contradict each other get the scale NaN.
        """
        whole = np.rint(values / np.repeat(self.value, lengths))
        certain = whole * (bound + np.repeat(self.error, lengths)) < _CERTAIN
        whole = np.maximum(whole, 1.0)
        one = values / whole
        low = np.maximum.reduceat(np.where(certain, one * (1 - bound), 0.0), starts)
        high = np.minimum.reduceat(np.where(certain, one * (1 + bound), np.inf), starts)
        possible = (low <= high) & np.isfinite(high)
        value = np.where(possible, (low + high) / 2, np.nan)
        return _Scale(value, (high - low) / 2 / value)


@dataclass(frozen=True)
class Transform:
    """How values were made from counts.

    Parameters
    ----------
    base
        Base of the logarithm of ``1 + value``, ``None`` for none.
    decimals
        Number of decimals that the values were rounded to, ``None`` if they were not.
    share
        Share of the inspected cells whose values are whole multiples of one number when the logarithm is undone.
    target_sum
        Sum of a cell's values without logarithm, if it is the same in all cells.
    """

    base: float | None
    decimals: int | None
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
    decimals = count_decimals(values)
    best = Transform(None, decimals, 0.0, None)
    for base in bases:
        result = recover_block(sample, base, decimals=decimals)
        share = float((informative & ~result.failed).sum() / max(1, informative.sum()))
        target = common_total(result.totals)
        # equal totals are evidence by themselves, where the values are no multiples of anything (imputed)
        if (share, target is not None) > (best.share, best.target_sum is not None):
            best = Transform(base, decimals, share, target)
        if best.share > 0.99:
            break
    return best


def common_total(totals: np.ndarray) -> float | None:
    """The sum that all non-empty cells share to three digits, or ``None``."""
    totals = totals[totals > 0]
    if len(totals) < 2:
        return None
    middle = float(np.median(totals))
    if np.abs(totals - middle).max() > 1e-3 * middle:
        return None
    return float(f"{middle:.5g}")
