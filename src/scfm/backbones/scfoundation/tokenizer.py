"""From expression to scFoundation tokens: log-normalised values of the expressed genes, and two read depths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from .._tokens import TokenBatch

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from scipy.sparse import csr_matrix

    from ..._depth import DepthTarget
    from .config import SCFoundationConfig

InputType = Literal["singlecell", "bulk"]
_SCALE = 1e4
_SHORT_FORMS = {"F": False, "T": True, "A": "A"}


@dataclass(frozen=True)
class InputMode:
    """What the numbers of a matrix are, checked.

    Parameters
    ----------
    input_type
        ``"singlecell"`` or ``"bulk"``.
    pre_normalized
        False for counts, True for log-normalised values, ``"A"`` for log-normalised values with the total count of
        each cell given apart; also as ``"F"``, ``"T"``, ``"A"``.
    """

    input_type: InputType = "singlecell"
    pre_normalized: bool | str = False

    def __post_init__(self) -> None:
        if self.input_type not in get_args(InputType):
            msg = f"input_type must be 'singlecell' or 'bulk'; got {self.input_type!r}"
            raise ValueError(msg)
        pre_normalized = _SHORT_FORMS.get(self.pre_normalized, self.pre_normalized)
        if pre_normalized not in (False, True, "A"):
            msg = f"pre_normalized must be False, True or 'A'; got {self.pre_normalized!r}"
            raise ValueError(msg)
        if pre_normalized == "A" and self.input_type == "bulk":
            msg = "pre_normalized='A' is a single-cell mode; use True or False with input_type='bulk'"
            raise ValueError(msg)
        object.__setattr__(self, "pre_normalized", pre_normalized)

    @property
    def needs_median(self) -> bool:
        """Whether cells are scaled to the median of the data set."""
        return self.input_type == "bulk" and self.pre_normalized is False

    @property
    def needs_totals(self) -> bool:
        """Whether total counts are given apart from the matrix."""
        return self.pre_normalized == "A"


def row_sums(counts: csr_matrix) -> NDArray[np.float64]:
    """Sum of each row in float64."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def median_of_positive(sums: NDArray[np.float64]) -> float:
    """Median of the sums above zero; 1 if there is none, so that nothing is scaled."""
    sums = sums[sums > 0]
    return float(np.median(sums)) if len(sums) else 1.0


def model_values(
    genes: csr_matrix,
    mode: InputMode,
    target: DepthTarget,
    total: NDArray[np.float64],
    median_total: float | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Values of all entries of a CSR block, and S and T of its rows; 0, which makes no token, where there is no depth.

    Parameters
    ----------
    genes
        Block in float64.
    mode
        What its numbers are.
    target
        Wanted read depth.
    total
        Sum of each row, or its total count where that is given apart.
    median_total
        Sum to scale bulk counts to; by default the median over the block.
    """
    values, lengths = genes.data, np.diff(genes.indptr)
    with np.errstate(divide="ignore", invalid="ignore"):
        if mode.pre_normalized is False:
            scale = _SCALE
            if mode.needs_median:
                scale = median_of_positive(total) if median_total is None else median_total
            values = np.log1p(values / np.repeat(total, lengths) * scale)
        if mode.input_type == "singlecell":
            source, wanted = np.log10(total), target.apply(total)
        elif mode.pre_normalized:
            source = wanted = total
        else:
            logs = type(genes)((values, genes.indices, genes.indptr), shape=genes.shape)
            source = wanted = np.log10(row_sums(logs))
    return values, np.where(np.isfinite(source), source, 0.0), np.where(np.isfinite(wanted), wanted, 0.0)


def tokenize(
    counts: csr_matrix,
    ids: NDArray[np.int64],
    config: SCFoundationConfig,
    *,
    mode: InputMode,
    target: DepthTarget,
    totals: NDArray[np.float64] | None = None,
    median_total: float | None = None,
    depth_tokens: bool = True,
) -> TokenBatch:
    """Tokens of a CSR block whose columns have vocabulary ids ``ids``; see ``SCFoundationBackbone.tokenize``."""
    _check_values(counts, mode)
    genes = type(counts)(
        (counts.data.astype(np.float64), ids[counts.indices], counts.indptr.copy()),
        shape=(counts.shape[0], config.n_genes),
    )
    genes.sum_duplicates()
    total = row_sums(genes) if totals is None else totals
    values, source, wanted = model_values(genes, mode, target, total, median_total)
    has_gene = np.diff(_running_count(values > 0)[genes.indptr]) > 0
    n_cells = genes.shape[0]
    valid = has_gene & (source > 0) & (wanted > 0)
    if not depth_tokens:
        # positions whose value is zero become no tokens
        source, wanted, valid = np.zeros(n_cells), np.zeros(n_cells), has_gene
    ends = np.repeat(genes.indptr[1:], 2)
    positions = np.insert(genes.indices.astype(np.int64), ends, np.tile([config.target_id, config.source_id], n_cells))
    values = np.insert(values, ends, np.stack([wanted, source], 1).ravel()).astype(np.float32)
    # numbers of the data must not be taken for the marks of masked and padded positions
    marked = np.isin(values, (config.mask_value, config.pad_value))
    values[marked] = np.nextafter(values[marked], np.float32(0))
    return tokens_of(
        positions,
        values,
        genes.indptr + 2 * np.arange(n_cells + 1),
        config,
        per_cell={"total": torch.from_numpy(total)},
        valid=torch.from_numpy(valid),
    )


def split_totals(
    counts: csr_matrix, n_genes: int, mode: InputMode, totals: ArrayLike | None
) -> tuple[csr_matrix, NDArray[np.float64] | None]:
    """Matrix without, and array with, total counts that may stand in an extra last column.

    Parameters
    ----------
    counts
        Matrix of ``n_genes`` columns, or one more.
    n_genes
        Number of named columns.
    mode
        What the numbers are; totals belong to mode A only.
    totals
        Total counts, shape ``(cells,)``.
    """
    if not mode.needs_totals:
        if totals is not None:
            msg = "total_counts belong to pre_normalized='A'; other modes sum the matrix"
            raise ValueError(msg)
        return counts, None
    if totals is None and counts.shape[1] == n_genes + 1:
        return counts[:, :n_genes], counts[:, [n_genes]].toarray().ravel().astype(np.float64)
    if totals is None:
        msg = "pre_normalized='A' needs the total count of each cell: total_counts=, or one more column in the matrix"
        raise ValueError(msg)
    totals = np.asarray(totals, dtype=np.float64)
    if totals.shape != (counts.shape[0],):
        msg = f"total_counts must have one entry for each of {counts.shape[0]} cells; got shape {totals.shape}"
        raise ValueError(msg)
    return counts, totals


def tokens_of(
    positions: NDArray[np.int64],
    values: NDArray[np.floating],
    offsets: NDArray[np.integer],
    config: SCFoundationConfig,
    **parts: object,
) -> TokenBatch:
    """Divide entries of model rows into what the encoder sees and what only the decoder sees (``queries``).

    Parameters
    ----------
    positions, values
        Entries of all cells, cell after cell; the type of the values is kept.
    offsets
        Cell ``i`` owns entries ``offsets[i]:offsets[i + 1]``.
    config
        Hyper-parameters.
    parts
        Further parts of the token batch.
    """
    seen = (values > 0) & (values != config.mask_value) & (values != config.pad_value)

    def take(keep: NDArray[np.bool_], **parts: object) -> TokenBatch:
        arrays = positions[keep], values[keep], _running_count(keep)[offsets]
        return TokenBatch(*map(torch.from_numpy, arrays), config.pad_id, config.pad_value, **parts)

    unseen = ~seen & (values != 0)
    return take(seen, queries=take(unseen) if unseen.any() else None, **parts)


def _running_count(keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of kept entries before each entry, and in total."""
    return np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)


def tokens_of_rows(rows: NDArray[np.floating], config: SCFoundationConfig) -> TokenBatch:
    """Tokens of dense model rows ``(cells, n_genes + 2)``: genes, T, S; or ``(cells, n_genes)`` without depths."""
    if rows.ndim != 2 or rows.shape[1] not in (config.n_genes, config.n_positions):
        msg = f"model rows have {config.n_positions} columns (genes, T, S) or {config.n_genes}; got shape {rows.shape}"
        raise ValueError(msg)
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float32)
    cells, positions = np.nonzero(rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(rows)))])
    tokens = tokens_of(positions, rows[cells, positions], offsets, config)
    return tokens if bool(tokens.lengths.all()) else replace(tokens, valid=tokens.lengths > 0)


def checked_ids(tokens: TokenBatch, config: SCFoundationConfig) -> TokenBatch:
    """Return the batch if all ids are positions and none occurs twice in a cell."""
    ids = tokens.flat_ids
    if ids.numel() and (ids.min() < 0 or ids.max() >= config.n_positions):
        msg = f"position ids must lie between 0 and {config.n_positions - 1}; leave padding out with padding="
        raise ValueError(msg)
    cells = torch.repeat_interleave(torch.arange(len(tokens), device=ids.device), tokens.lengths)
    if len(torch.unique(cells * config.n_positions + ids)) < len(ids):
        msg = "a position occurs twice in the same cell"
        raise ValueError(msg)
    return tokens


def _check_values(counts: csr_matrix, mode: InputMode) -> None:
    if not np.isfinite(counts.data).all():
        msg = "the matrix holds NaN or infinite values; scFoundation needs a number for each expressed gene"
        raise ValueError(msg)
    if mode.pre_normalized is False and len(counts.data) and counts.data.min() < 0:
        msg = "counts cannot be negative; for values that are normalised already use pre_normalized=True"
        raise ValueError(msg)
