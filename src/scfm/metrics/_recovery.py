"""Expression that was recovered from shallow counts, beside the expression at full depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_VALUES = 2**22


class Rows(Protocol):
    """Anything with a shape that gives rows by a slice: arrays, sparse matrices, HDF5 data sets, predictors."""

    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> np.ndarray | sparse.spmatrix: ...


def recovery_scores(
    reference: np.ndarray | sparse.spmatrix | Rows,
    predicted: np.ndarray | sparse.spmatrix | Rows,
    *,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Errors and correlation over the entries of the reference that are not zero, as the scFoundation paper takes them.

    Parameters
    ----------
    reference
        Expression at full depth, ``(cells, genes)``, never negative, for example log-normalised counts.
    predicted
        Prediction on the same scale: an array, a sparse matrix, or anything else that gives rows by a slice, such as
        :func:`scfm.baselines.knn_smoothing`.
    chunk_size
        Cells read at a time; by default as many as make four million values.

    Returns
    -------
    ``MAE``
        Mean absolute error.
    ``MRE``
        Mean of the squared error divided by the reference value (the paper prints the square).
    ``Pearson``
        Correlation over all entries.
    ``Pearson per cell``
        Mean over cells of the correlation within the cell; cells where it is undefined are left out.
    ``entries``
        Number of entries.

    Raises
    ------
    ValueError
        If shapes differ, the reference has no entries or negative ones, or values are missing.

    References
    ----------
    Hao et al., scFoundation, Nature Methods 21, 1481 (2024).
    """
    if tuple(reference.shape) != tuple(predicted.shape):
        msg = f"reference and prediction have the shapes {tuple(reference.shape)} and {tuple(predicted.shape)}"
        raise ValueError(msg)
    total, within = _Pairs(), []
    absolute = relative = 0.0
    for cells, truth, guess in _entries(reference, predicted, chunk_size):
        error = truth - guess
        absolute += np.abs(error).sum()
        relative += (error * error / truth).sum()
        total.add(truth, guess)
        within.append(_per_cell(cells, truth, guess))
    if not total.n:
        msg = "the reference has no values other than zero"
        raise ValueError(msg)
    per_cell = np.concatenate(within)
    defined = per_cell[np.isfinite(per_cell)]
    return {
        "MAE": float(absolute / total.n),
        "MRE": float(relative / total.n),
        "Pearson": total.correlation(),
        "Pearson per cell": float(defined.mean()) if len(defined) else np.nan,
        "entries": total.n,
    }


def _entries(
    reference: np.ndarray | sparse.spmatrix | Rows,
    predicted: np.ndarray | sparse.spmatrix | Rows,
    chunk_size: int | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cell, true and predicted value of the entries, some cells at a time."""
    # rows of these formats cannot be taken, or only slowly
    reference, predicted = (x.tocsr() if sparse.issparse(x) else x for x in (reference, predicted))
    n_cells, n_genes = reference.shape
    step = chunk_size or max(1, _CHUNK_VALUES // max(n_genes, 1))
    for start in range(0, n_cells, step):
        rows = slice(start, min(start + step, n_cells))
        block = reference[rows]
        block = block.tocoo() if sparse.issparse(block) else sparse.coo_matrix(np.asarray(block))
        truth, present = block.data.astype(np.float64), block.data != 0
        cells, genes, truth = block.row[present], block.col[present], truth[present]
        if not len(truth):
            continue
        guess = predicted[rows]
        guess = sparse.csr_matrix(guess)[cells, genes] if sparse.issparse(guess) else np.asarray(guess)[cells, genes]
        guess = np.asarray(guess, dtype=np.float64).ravel()
        for what, values in {"reference": truth, "prediction": guess}.items():
            if missing := int((~np.isfinite(values)).sum()):
                msg = f"{missing:,} values of the {what} for cells {rows.start:,} to {rows.stop - 1:,} are not finite; leave such cells out"
                raise ValueError(msg)
        if (truth < 0).any():
            msg = "the reference holds negative values; relative errors need expression that is zero or more"
            raise ValueError(msg)
        yield cells, truth, guess


def _per_cell(cells: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Correlation within each cell that has entries; the entries of a cell stand together."""
    if not len(cells):
        return np.empty(0)
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    lengths = np.diff(starts, append=len(cells))
    centred, spread = [], []
    for values in (truth, guess):
        centred.append(values - np.repeat(np.add.reduceat(values, starts) / lengths, lengths))
        squares = np.add.reduceat(centred[-1] ** 2, starts)
        constant = np.minimum.reduceat(values, starts) == np.maximum.reduceat(values, starts)
        spread.append(np.where(constant, np.nan, squares))
    return np.add.reduceat(centred[0] * centred[1], starts) / np.sqrt(spread[0] * spread[1])


class _Pairs:
    """Running sums of squares of two variables, around their means."""

    def __init__(self) -> None:
        self.n = 0
        self._mean = np.zeros(2)
        self._squares = np.zeros((2, 2))
        self._low, self._high = np.full(2, np.inf), np.full(2, -np.inf)

    def add(self, *values: np.ndarray) -> None:
        """Add observations, by the update of Chan et al. (1979)."""
        if not (n := len(values[0])):
            return
        block = np.stack(values)
        mean = block.mean(1)
        centred = block - mean[:, None]
        shift, total = mean - self._mean, self.n + n
        self._squares += centred @ centred.T + np.outer(shift, shift) * (self.n * n / total)
        self._mean += shift * (n / total)
        self._low, self._high = np.minimum(self._low, block.min(1)), np.maximum(self._high, block.max(1))
        self.n = total

    def correlation(self) -> float:
        """Pearson correlation, NaN for a constant variable."""
        if (self._low == self._high).any():
            return np.nan
        return float(self._squares[0, 1] / np.sqrt(self._squares[0, 0] * self._squares[1, 1]))
