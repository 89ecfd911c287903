"""From counts to scLong tokens: the values of the expressed genes; all other positions are zero and implied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from .._tokens import TokenBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from ...genes import GeneMatch

Normalization = Literal["log1p_1e4_max10", "log1p_1e4", "paper_literal", "as_is"]
"""What becomes of the numbers of a matrix."""
Duplicates = Literal["sum", "last", "error"]
"""What becomes of columns that are the same gene."""

_SCALE = 1e4
_MAXIMUM = 10.0


def check_normalization(normalization: str) -> None:
    """Raise ``ValueError`` unless ``normalization`` is known."""
    if normalization not in get_args(Normalization):
        msg = f"normalization must be one of {', '.join(get_args(Normalization))}; got {normalization!r}"
        raise ValueError(msg)


def normalized(counts: csr_matrix, normalization: Normalization) -> csr_matrix:
    """Values that the model gets, float64, for all genes of the data.

    Parameters
    ----------
    counts
        All genes of the data, known or not: the total and the maximum of a cell are taken over all of them.
    normalization
        With ``y = log1p(10,000 x / total)``, ``"log1p_1e4"`` is ``y``. ``"log1p_1e4_max10"`` cuts ``y`` at 10, or
        stretches it such that the largest value of the cell is 10. ``"paper_literal"`` does the same with
        ``log1p(x / 10,000)``, as the paper writes. ``"as_is"`` changes nothing.
    """
    check_normalization(normalization)
    lengths = np.diff(counts.indptr)
    values = counts.data.astype(np.float64)
    if normalization == "paper_literal":
        values = np.log1p(values / _SCALE)
    elif normalization != "as_is":
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        values = np.log1p(
            values * np.repeat(np.divide(_SCALE, totals, out=np.zeros_like(totals), where=totals > 0), lengths)
        )
    out = type(counts)((values, counts.indices, counts.indptr), shape=counts.shape)
    if normalization in ("log1p_1e4_max10", "paper_literal"):
        largest = out.max(axis=1).toarray().ravel() if out.shape[1] else np.zeros(out.shape[0])
        stretch = np.divide(_MAXIMUM, largest, out=np.ones_like(largest), where=(largest > 0) & (largest < _MAXIMUM))
        out.data = np.minimum(out.data * np.repeat(stretch, lengths), _MAXIMUM)
    return out


def tokenize(
    counts: csr_matrix,
    match: GeneMatch,
    *,
    normalization: Normalization,
    duplicates: Duplicates,
    pad_id: int,
) -> TokenBatch:
    """Tokens of a CSR block of all genes of the data; see ``SCLongBackbone.tokenize``."""
    if not np.isfinite(counts.data).all():
        msg = "the matrix holds NaN or infinite values; scLong needs a number for each gene"
        raise ValueError(msg)
    if len(counts.data) and counts.data.min() < 0:
        msg = (
            "values cannot be negative: scLong takes -1 and less for masked genes; give counts or log-normalised values"
        )
        raise ValueError(msg)
    columns = np.arange(len(match))
    targets = match.ids.copy()
    known = targets >= 0
    if duplicates == "error":
        match.column_map("error")
    elif duplicates == "last":
        kept = np.full(len(match.vocab), -1)
        kept[targets[known]] = columns[known]  # of equal ids the last one stays
        dropped = known.copy()
        dropped[kept[kept >= 0]] = False
        keep = np.flatnonzero(~dropped)
        counts, targets = counts[:, keep], targets[keep]
    elif duplicates != "sum":
        msg = f"duplicates must be one of {', '.join(get_args(Duplicates))}; got {duplicates!r}"
        raise ValueError(msg)
    # unknown genes stay until the totals are taken, behind all entries of the vocabulary
    n_known = len(match.vocab)
    unknown = targets < 0
    targets[unknown] = n_known + np.arange(unknown.sum())
    placed = type(counts)(
        (counts.data.astype(np.float64), targets[counts.indices], counts.indptr.copy()),
        shape=(counts.shape[0], n_known + int(unknown.sum())),
    )
    placed.sum_duplicates()
    values = normalized(placed, normalization)
    return tokens_of(values[:, :n_known], pad_id)


def tokens_of(values: csr_matrix, pad_id: int) -> TokenBatch:
    """Tokens of a CSR block of model values; cells without any have no token and are not valid."""
    values = values.astype(np.float32)
    values.eliminate_zeros()
    offsets = torch.from_numpy(values.indptr.astype(np.int64))
    return TokenBatch(
        torch.from_numpy(values.indices.astype(np.int64)),
        torch.from_numpy(values.data),
        offsets,
        pad_id,
        0.0,
        valid=torch.diff(offsets) > 0,
    )


def tokens_of_rows(rows: NDArray[np.floating], n_positions: int, pad_id: int, threshold: float) -> TokenBatch:
    """Tokens of dense model rows of shape ``(cells, n_positions)``, or without PAD at the end; type of the values kept.

    Values are positive, zero, or at most ``threshold``, which stands for "masked". Cells without values are kept valid.
    """
    if rows.ndim != 2 or rows.shape[1] not in (n_positions, n_positions - 1):
        msg = f"model rows have {n_positions} columns, or {n_positions - 1} without PAD; got shape {rows.shape}"
        raise ValueError(msg)
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all() or ((rows < 0) & (rows > threshold)).any():
        msg = f"model values are zero, positive, or at most {threshold} where they are masked; other numbers were given"
        raise ValueError(msg)
    cells, positions = np.nonzero(rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(rows)))])
    arrays = positions, rows[cells, positions], offsets.astype(np.int64)
    return TokenBatch(*map(torch.from_numpy, arrays), pad_id, 0.0)
