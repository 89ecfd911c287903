"""From counts to CellFM tokens: log-normalised values of the expressed genes, at most so many of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from .._random_keys import content_keys
from .._tokens import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

Sampling = Literal["largest", "weighted"]

PAD_ID = 0
_SCALE = 1e4
_MAX_TOTAL = np.float32(1e5)
_SAMPLE_STREAM = 3


@dataclass(frozen=True)
class TokenDraws:
    """Genes to keep in cells that are too long, for runs that must repeat another program number by number.

    Parameters
    ----------
    kept
        For each cell the vocabulary ids of the genes to keep, or ``None`` for cells that are short enough.
    """

    kept: Sequence[np.ndarray | None]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, cells: slice) -> TokenDraws:
        return TokenDraws(self.kept[cells])


@dataclass(frozen=True)
class TokenRules:
    """How a matrix becomes tokens; see ``CellFMBackbone.tokenize``."""

    max_length: int | None
    sampling: Sampling = "largest"
    pre_normalized: bool = False
    include_zeros: bool = False
    with_unexpressed: bool = False
    seed: int = 0
    draws: TokenDraws | None = None

    def __post_init__(self) -> None:
        if self.sampling not in get_args(Sampling):
            msg = f"sampling must be 'largest' or 'weighted'; got {self.sampling!r}"
            raise ValueError(msg)
        if self.max_length is not None and self.max_length < 1:
            msg = f"max_length must be None or at least 1; got {self.max_length}"
            raise ValueError(msg)


def cap_depth(counts: csr_matrix) -> csr_matrix:
    """Scale cells above 100,000 counts down to that, in float32, and round; what becomes 0 is no longer stored.

    Parameters
    ----------
    counts
        All genes of the data, known to the model or not, ``(cells, n_vars)``.
    """
    _check_values(counts)
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.maximum(np.float32(1), totals.astype(np.float32) / _MAX_TOTAL)
    data = counts.data.astype(np.float64)
    if (scale > 1).any():
        factor = np.repeat(np.float32(1) / scale, np.diff(counts.indptr))
        # cells below the limit keep what they have, whole numbers or not
        capped = np.rint(counts.data.astype(np.float32) * factor).astype(np.float64)
        data = np.where(factor < 1, capped, data)
    out = type(counts)((data, counts.indices, counts.indptr), shape=counts.shape, copy=True)
    out.eliminate_zeros()
    return out


def tokenize(counts: csr_matrix, ids: NDArray[np.int64], rules: TokenRules) -> TokenBatch:
    """Tokens of a CSR block of known genes.

    Parameters
    ----------
    counts
        Capped counts, or log-normalised values, in float64.
    ids
        Vocabulary id of each column.
    rules
        What to do with them.

    Returns
    -------
    Tokens in the order of their ids, or of the columns if zeros are included; ``per_cell["total"]`` are the counts over
    known genes. Cells without any expressed gene are not ``valid``.
    """
    _check_values(counts)
    columns = np.argsort(ids, kind="stable")
    places = np.empty_like(columns)
    places[columns] = np.arange(len(columns))
    genes = type(counts)((counts.data, places[counts.indices], counts.indptr), shape=counts.shape, copy=True)
    genes.sum_duplicates()
    genes.eliminate_zeros()
    ids = ids[columns]

    offsets = genes.indptr.astype(np.int64)
    lengths = np.diff(offsets)
    total = np.asarray(genes.sum(axis=1)).ravel()
    values = genes.data
    if not rules.pre_normalized:
        values = np.log1p(values / np.repeat(total, lengths) * _SCALE)
    tokens, values = ids[genes.indices], values.astype(np.float32)
    parts = {
        "per_cell": {"total": torch.from_numpy(total)},
        "valid": torch.from_numpy(lengths > 0),
    }
    if rules.with_unexpressed:
        parts["queries"] = _unexpressed(genes, ids)
    if rules.include_zeros:
        dense = np.zeros(genes.shape, dtype=np.float32)
        dense[np.repeat(np.arange(len(lengths)), lengths), genes.indices] = values
        n_cells, width = dense.shape
        parts["per_cell"]["panel"] = torch.ones(n_cells, dtype=torch.bool)
        # a panel keeps the order of its columns
        return _batch(np.tile(ids[places], n_cells), dense[:, places].ravel(), np.arange(n_cells + 1) * width, parts)
    if rules.max_length is not None and (lengths > rules.max_length).any():
        keep = _kept(tokens, values, genes.data, offsets, rules)
        tokens, values = tokens[keep], values[keep]
        offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
    return _batch(tokens, values, offsets, parts)


def _batch(ids: np.ndarray, values: np.ndarray, offsets: np.ndarray, parts: dict[str, object]) -> TokenBatch:
    arrays = ids.astype(np.int64, copy=False), values, offsets.astype(np.int64, copy=False)
    return TokenBatch(*map(torch.from_numpy, arrays), PAD_ID, 0.0, **parts)


def _kept(
    ids: np.ndarray, values: np.ndarray, raw: np.ndarray, offsets: np.ndarray, rules: TokenRules
) -> NDArray[np.bool_]:
    """True at the entries that stay when no cell may have more than ``max_length``."""
    lengths = np.diff(offsets)
    long = lengths > rules.max_length
    member = np.repeat(long, lengths)
    inside = np.concatenate([[0], np.cumsum(lengths[long])])
    if rules.draws is not None:
        chosen = _injected(ids[member], inside, [rules.draws.kept[cell] for cell in np.flatnonzero(long)])
    elif rules.sampling == "largest":
        chosen = _largest(values[member], inside, rules.max_length)
    else:
        # the largest of w / -log(u) are a draw without replacement with probabilities proportional to w
        keys = content_keys(ids[member], raw[member], inside, rules.seed, _SAMPLE_STREAM)
        uniform = ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        weight = raw[member] if rules.pre_normalized else np.log1p(raw[member])
        chosen = _largest((weight / -np.log(uniform)).astype(np.float32), inside, rules.max_length)
    keep = np.ones(len(ids), dtype=bool)
    keep[member] = chosen
    return keep


def _largest(scores: NDArray[np.float32], offsets: NDArray[np.int64], limit: int) -> NDArray[np.bool_]:
    """True at the ``limit`` largest scores of each cell, the first of equal ones; all cells are longer than that."""
    lengths = np.diff(offsets)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    # positive floats order like their bit patterns, so one integer sort orders all cells at once
    falling = np.uint64(0xFFFFFFFF) - scores.view(np.uint32)
    ordered = np.sort((cell.astype(np.uint64) << np.uint64(32)) | falling)
    last = (ordered[offsets[:-1] + limit - 1] & np.uint64(0xFFFFFFFF))[cell]
    above, equal = falling < last, falling == last
    n_above, n_equal = (np.concatenate([[0], np.cumsum(part)]) for part in (above, equal))
    room = limit - np.diff(n_above[offsets])
    return above | (equal & (n_equal[:-1] - n_equal[offsets[:-1]][cell] < room[cell]))


def _injected(ids: np.ndarray, offsets: np.ndarray, kept: Sequence[np.ndarray | None]) -> NDArray[np.bool_]:
    if any(chosen is None for chosen in kept):
        msg = "the draws have no genes for a cell that is longer than max_length"
        raise ValueError(msg)
    width = int(ids.max()) + 1
    cell = np.repeat(np.arange(len(kept)), np.diff(offsets))
    wanted = np.concatenate([np.asarray(chosen) + width * i for i, chosen in enumerate(kept)])
    return np.isin(ids + width * cell, wanted)


def _unexpressed(genes: csr_matrix, ids: np.ndarray) -> TokenBatch:
    """Known genes that a cell does not express, as a ragged set."""
    n_cells, width = genes.shape
    there = np.zeros((n_cells, width), dtype=bool)
    there[np.repeat(np.arange(n_cells), np.diff(genes.indptr)), genes.indices] = True
    cells, columns = np.nonzero(~there)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=n_cells))])
    return _batch(ids[columns], np.zeros(len(columns), dtype=np.float32), offsets, {})


def _check_values(counts: csr_matrix) -> None:
    if not np.isfinite(counts.data).all():
        msg = "the matrix holds NaN or infinite values; CellFM needs a number for each expressed gene"
        raise ValueError(msg)
    if len(counts.data) and counts.data.min() < 0:
        msg = "CellFM takes counts or log-normalised values; the matrix holds negative numbers"
        raise ValueError(msg)
