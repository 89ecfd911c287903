"""From counts to scGPT tokens: quantile bins of the expressed genes of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from .._random_keys import content_keys
from .._tokens import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

    from .config import SCGPTConfig

TieBreak = Literal["random", "left"]

_BIN_STREAM, _SAMPLE_STREAM = 1, 2


@dataclass(frozen=True)
class TokenDraws:
    """Random numbers to use instead of scfm's own, for runs that must repeat another program number by number.

    Parameters
    ----------
    uniform
        For each cell, one number in [0, 1) for each non-zero value, in column order.
    permutation
        For each cell, a permutation of its expressed genes of which the first ``max_length - 1`` are kept, or
        ``None`` for cells that are short enough.
    """

    uniform: Sequence[np.ndarray] | None = None
    permutation: Sequence[np.ndarray | None] | None = None

    @classmethod
    def from_flat(
        cls,
        uniform: np.ndarray,
        uniform_lengths: np.ndarray,
        permutation: np.ndarray | None = None,
        permutation_lengths: np.ndarray | None = None,
        *,
        max_length: int | None = None,
    ) -> TokenDraws:
        """Cut concatenated draws into cells; permutations belong to the cells longer than ``max_length`` tokens."""
        per_cell = np.split(np.asarray(uniform, dtype=np.float64), np.cumsum(uniform_lengths)[:-1])
        if permutation is None or max_length is None:
            return cls(per_cell)
        parts = iter(np.split(np.asarray(permutation, dtype=np.int64), np.cumsum(permutation_lengths)[:-1]))
        return cls(per_cell, [next(parts) if len(u) + 1 > max_length else None for u in per_cell])

    def __len__(self) -> int:
        return len(self.uniform if self.uniform is not None else self.permutation or ())

    def __getitem__(self, cells: slice) -> TokenDraws:
        cut = [None if part is None else part[cells] for part in (self.uniform, self.permutation)]
        return TokenDraws(*cut)


def bin_uniforms(ids: np.ndarray, values: np.ndarray, offsets: np.ndarray, seed: int) -> np.ndarray:
    """The numbers in [0, 1) that spread tied values over bins, one for each gene of each cell."""
    keys = content_keys(ids, values, offsets, seed, _BIN_STREAM)
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


# -- binning -------------------------------------------------------------------------------------------------------------


def quantile_edges(values: np.ndarray, offsets: np.ndarray, n_bins: int) -> np.ndarray:
    """Linear-interpolation quantiles of each cell's values, with the arithmetic of :func:`numpy.quantile`.

    Parameters
    ----------
    values
        Positive values of all cells, shape ``(values,)``.
    offsets
        Cell ``i`` owns ``values[offsets[i]:offsets[i + 1]]``; no cell may be empty.
    n_bins
        Number of bins, zero bin included.

    Returns
    -------
    Array ``(cells, n_bins - 1)`` of float64, from the minimum to the maximum of each cell.
    """
    lengths = np.diff(offsets)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    if values.dtype == np.float32:
        # positive floats order like their bit patterns, so one integer sort orders all cells at once
        keys = np.sort((cell.astype(np.uint64) << np.uint64(32)) | values.view(np.uint32))
        ordered = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    else:
        ordered = values[np.lexsort((values, cell))]
    position = (lengths[:, None] - 1) * np.linspace(0, 1, n_bins - 1)[None]
    below = np.floor(position)
    fraction = position - below
    below = below.astype(np.int64)
    start = offsets[:-1, None]
    low = ordered[start + below]
    high = ordered[start + np.minimum(below + 1, lengths[:, None] - 1)]
    difference = high - low
    forward = low + difference * fraction
    return np.where(fraction >= 0.5, high - difference * (1 - fraction), forward)


def _count_edges(values: np.ndarray, cell: np.ndarray, edges: np.ndarray, *, inclusive: bool) -> np.ndarray:
    """Number of edges of the value's cell that are ``<= value`` (or ``< value``), by bisection for all at once."""
    n_edges = edges.shape[1]
    flat, row = edges.ravel(), cell * n_edges
    count = np.zeros(len(values), dtype=np.int64)
    step = 1 << (n_edges.bit_length() - 1)
    while step:
        trial = count + step
        edge = flat[row + np.minimum(trial, n_edges) - 1]
        fits = (trial <= n_edges) & ((edge <= values) if inclusive else (edge < values))
        count = np.where(fits, trial, count)
        step >>= 1
    return count


def bin_values(
    values: np.ndarray, offsets: np.ndarray, n_bins: int, uniform: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bins ``1 .. n_bins - 1`` of the non-zero values of each cell (Cui et al. 2024, value binning).

    Parameters
    ----------
    values, offsets
        Positive values of all cells, cell after cell; no cell may be empty.
    n_bins
        Number of bins, zero bin included.
    uniform
        One number in [0, 1) for each value, to spread values that equal several edges over their bins; ``None`` puts
        them into the highest bin.

    Returns
    -------
    Bins ``(values,)`` as int64, and the edges ``(cells, n_bins - 1)``.
    """
    edges = quantile_edges(values, offsets, n_bins)
    cell = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    left = _count_edges(values, cell, edges, inclusive=True)
    if uniform is None:
        return left, edges
    right = _count_edges(values, cell, edges, inclusive=False)
    return np.ceil(uniform * (right - left) + left).astype(np.int64), edges


# -- tokens --------------------------------------------------------------------------------------------------------------


def tokenize(
    counts: csr_matrix,
    ids: np.ndarray,
    config: SCGPTConfig,
    *,
    pad_id: int,
    cls_id: int | None,
    n_bins: int | None,
    max_length: int,
    cls_value: float,
    include_zeros: bool,
    tie_break: TieBreak,
    truncate: Literal["sample", "first"],
    seed: int,
    draws: TokenDraws | None,
    groups: np.ndarray | None = None,
) -> TokenBatch:
    """Tokens of all cells of a CSR block whose columns have vocabulary ids ``ids`` (see ``SCGPTBackbone.tokenize``).

    Values of columns that differ in ``groups``, a number for each column, are binned apart, and zeros become tokens only
    where the cell has a value in a column of the same group.
    """
    n_cells = counts.shape[0]
    data, columns, offsets = _entries(counts, include_zeros=include_zeros, groups=groups)
    if len(data) and not data.min() >= 0:
        msg = "scGPT bins counts or other non-negative values; the matrix holds negative numbers or NaN"
        raise ValueError(msg)
    token_ids, lengths = ids[columns], np.diff(offsets)
    expressed = data != 0
    has_values = _segment_any(expressed, offsets)
    bins = data.astype(np.float32)
    keep = np.ones(len(data), dtype=bool)

    if n_bins is not None and len(data):
        values, value_offsets = data[expressed], _suboffsets(expressed, offsets)
        uniform = None
        if tie_break == "random":
            if draws is not None and draws.uniform is not None:
                uniform = np.concatenate(draws.uniform) if len(draws) else np.empty(0)
                _check_draws(uniform, len(values), "uniform numbers", "non-zero values")
            else:
                uniform = bin_uniforms(token_ids[expressed], values, value_offsets, seed)
        if groups is None:
            filled = np.diff(value_offsets) > 0
            bins[expressed], _ = bin_values(values, np.concatenate([[0], value_offsets[1:][filled]]), n_bins, uniform)
        else:
            bins[expressed] = _bin_groups(values, value_offsets, groups[columns[expressed]], n_bins, uniform)

    room = max_length - (cls_id is not None)
    long = lengths > room
    order = None
    if long.any():
        if truncate == "first":
            keep = _position(offsets) < room
        elif draws is not None and draws.permutation is not None:
            order = _injected_order(draws.permutation, offsets, room)
        else:
            keep = _sampled(token_ids, data, offsets, room, long, seed)
    if order is None:
        order = np.flatnonzero(keep)
    lengths = np.minimum(lengths, room)
    token_ids, bins = token_ids[order], bins[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    if cls_id is not None:
        token_ids = np.insert(token_ids, offsets[:-1], cls_id)
        bins = np.insert(bins, offsets[:-1], cls_value)
        offsets = offsets + np.arange(n_cells + 1)
    return TokenBatch(
        torch.from_numpy(token_ids.astype(np.int64, copy=False)),
        torch.from_numpy(bins.astype(np.float32, copy=False)),
        torch.from_numpy(offsets.astype(np.int64, copy=False)),
        pad_id,
        config.pad_value,
        valid=torch.from_numpy(has_values),
    )


def _bin_groups(
    values: np.ndarray, offsets: np.ndarray, groups: np.ndarray, n_bins: int, uniform: np.ndarray | None
) -> np.ndarray:
    """Bins of the values of each cell, those of each group by themselves."""
    cell = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((groups, cell))
    part = (cell * (groups.max(initial=0) + 1) + groups)[order]
    ends = np.flatnonzero(np.diff(part, append=-1)) + 1
    bins = np.empty(len(values), dtype=np.int64)
    bins[order], _ = bin_values(
        values[order], np.concatenate([[0], ends]), n_bins, None if uniform is None else uniform[order]
    )
    return bins


def _entries(
    counts: csr_matrix, *, include_zeros: bool, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, columns and offsets of the entries that become tokens; explicit zeros are not entries."""
    n_cells, n_columns = counts.shape
    data = counts.data if counts.data.dtype in (np.float32, np.float64) else counts.data.astype(np.float64)
    if include_zeros:
        columns, offsets = np.tile(np.arange(n_columns), n_cells), np.arange(n_cells + 1) * n_columns
        values = counts.toarray().astype(data.dtype, copy=False).ravel()
        if groups is None:
            return values, columns, offsets
        # zeros of a modality of which nothing was seen in a cell are no measurements
        seen = np.zeros((n_cells, groups.max(initial=-1) + 1), dtype=bool)
        cells, where = np.nonzero(values.reshape(n_cells, n_columns))
        seen[cells, groups[where]] = True
        kept = seen[:, groups].ravel()
        return values[kept], columns[kept], _suboffsets(kept, offsets)
    expressed = data != 0
    offsets = counts.indptr.astype(np.int64)
    if expressed.all():
        return data, counts.indices, offsets
    return data[expressed], counts.indices[expressed], _suboffsets(expressed, offsets)


def _suboffsets(keep: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(keep)])[offsets]


def _segment_any(flag: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(_suboffsets(flag, offsets)) > 0


def _position(offsets: np.ndarray) -> np.ndarray:
    """Position of each entry inside its cell."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def _sampled(
    ids: np.ndarray, data: np.ndarray, offsets: np.ndarray, room: int, long: np.ndarray, seed: int
) -> np.ndarray:
    """Mark, in cells that are too long, the ``room`` entries with the smallest content keys."""
    lengths = np.diff(offsets)
    member = np.repeat(long, lengths)
    sub_offsets = np.concatenate([[0], np.cumsum(lengths[long])])
    keys = content_keys(ids[member], data[member], sub_offsets, seed, _SAMPLE_STREAM)
    cell = np.repeat(np.arange(len(sub_offsets) - 1), lengths[long])
    by_key = np.lexsort((keys, cell))
    chosen = np.empty(len(keys), dtype=bool)
    chosen[by_key] = _position(sub_offsets) < room
    keep = np.ones(len(data), dtype=bool)
    keep[member] = chosen
    return keep


def _injected_order(permutations: Sequence[np.ndarray | None], offsets: np.ndarray, room: int) -> np.ndarray:
    """Entries in the order of injected permutations (short cells keep theirs)."""
    lengths = np.diff(offsets)
    _check_draws(permutations, len(lengths), "permutations", "cells")
    picks = []
    for start, length, permutation in zip(offsets[:-1], lengths, permutations, strict=True):
        if length > room:
            if permutation is None or len(permutation) < room:
                msg = f"draws.permutation has no permutation for a cell with {length} expressed genes"
                raise ValueError(msg)
            picks.append(start + np.asarray(permutation)[:room])
        else:
            picks.append(np.arange(start, start + length))
    return np.concatenate(picks) if picks else np.empty(0, dtype=np.int64)


def _check_draws(draws: Sequence, expected: int, what: str, unit: str) -> None:
    if len(draws) != expected:
        msg = f"draws hold {len(draws)} {what} but the batch has {expected} {unit}"
        raise ValueError(msg)
