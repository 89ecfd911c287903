"""Simple ways to guess the expression of cells that were sequenced too shallowly, at the genes that are asked for."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .. import baselines

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    # shallow counts of all cells, the cells to predict, their genes to predict (stored entries), seed
    Imputation = Callable[[AnnData, NDArray[np.intp], sparse.csr_matrix, int], NDArray[np.floating]]

_CELLS_AT_ONCE = 256


def log_normalised(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """``log1p`` of counts per 10,000; cells without counts stay empty."""
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
    out = counts.astype(np.float64)
    out.data = np.log1p(out.data * np.repeat(factors, np.diff(out.indptr)))
    return out


def observed(shallow: AnnData, cells: NDArray[np.intp], where: sparse.csr_matrix, seed: int) -> NDArray[np.floating]:
    """What was counted, normalised."""
    rows = np.repeat(np.arange(where.shape[0]), np.diff(where.indptr))
    return np.asarray(log_normalised(shallow.X[cells])[rows, where.indices]).ravel()


def gene_mean(shallow: AnnData, cells: NDArray[np.intp], where: sparse.csr_matrix, seed: int) -> NDArray[np.floating]:
    """Mean of the gene over all cells that have counts."""
    return _at(baselines.gene_mean(shallow), cells, where)


def knn(shallow: AnnData, cells: NDArray[np.intp], where: sparse.csr_matrix, seed: int) -> NDArray[np.floating]:
    """Counts of the cell and its nearest neighbours together."""
    with warnings.catch_warnings():
        # thinning leaves some cells without counts, as is to be expected
        warnings.filterwarnings("ignore", message="Some cells have zero counts")
        predictor = baselines.knn_smoothing(shallow, random_state=seed)
    return _at(predictor, cells, where)


def scvi(shallow: AnnData, cells: NDArray[np.intp], where: sparse.csr_matrix, seed: int) -> NDArray[np.floating]:
    """ScVI's mean; NaN for cells without counts, from which it cannot learn."""
    filled = np.flatnonzero(np.diff(shallow.X.indptr))
    predictor = baselines.scvi_expression(shallow[filled].copy(), random_state=seed)
    place = np.full(shallow.n_obs, -1)
    place[filled] = np.arange(len(filled))
    return _at(predictor, place[cells], where)


IMPUTATIONS: dict[str, Imputation] = {"observed": observed, "gene_mean": gene_mean, "knn": knn, "scvi": scvi}


def _at(
    predictor: baselines.ExpressionPredictor, cells: NDArray[np.intp], where: sparse.csr_matrix
) -> NDArray[np.floating]:
    """Predictions at the stored entries of ``where``, whose rows are ``cells``; NaN for cells with -1."""
    parts = [np.zeros(0)]
    for start in range(0, len(cells), _CELLS_AT_ONCE):
        some, part = cells[start : start + _CELLS_AT_ONCE], where[start : start + _CELLS_AT_ONCE]
        values = np.full(part.shape, np.nan)
        values[some >= 0] = predictor.predict(some[some >= 0])
        parts.append(values[np.repeat(np.arange(len(some)), np.diff(part.indptr)), part.indices])
    return np.concatenate(parts)
