"""Expression recovered from shallow counts without a model of their distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from sklearn.neighbors import kneighbors_graph

from ._expression import ExpressionPredictor
from ._pca import hvg_pca

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def gene_mean(adata: AnnData, *, layer: str | None = None) -> ExpressionPredictor:
    """Predict the same for every cell: the mean counts per 10,000 of each gene, as ``log1p``.

    The mean is taken before the logarithm, where it does not depend on the read depth.

    Parameters
    ----------
    adata
        Annotated data with the shallow counts; it is not changed. Empty cells do not count.
    layer
        Layer with raw counts; by default ``X``.
    """
    counts = _counts(adata, layer)
    totals = np.asarray(counts.sum(1)).ravel()
    weights = np.divide(1, totals, out=np.zeros(len(totals)), where=totals > 0) / max(np.count_nonzero(totals), 1)
    return _GeneMean(counts.T @ weights, adata.n_obs, adata.var_names)


def knn_smoothing(
    adata: AnnData,
    *,
    layer: str | None = None,
    n_neighbors: int = 15,
    n_top_genes: int = 2000,
    n_comps: int = 50,
    random_state: int = 0,
) -> ExpressionPredictor:
    """Predict from the summed counts of a cell and its nearest neighbours in HVG + PCA (Wagner et al., bioRxiv 2018).

    This is one step of smoothing with a fixed number of neighbours. The sum is normalised to 10,000 and ``log1p`` is taken.

    Parameters
    ----------
    adata
        Annotated data with the shallow counts; it is not changed.
    layer
        Layer with raw counts; by default ``X``.
    n_neighbors
        Cells that are summed, the cell itself included (all if there are fewer).
    n_top_genes, n_comps, random_state
        As in :func:`hvg_pca`.
    """
    if n_neighbors < 1:
        msg = f"n_neighbors counts the cell itself, so it is at least 1, not {n_neighbors}"
        raise ValueError(msg)
    counts = _counts(adata, layer)
    others = min(n_neighbors, adata.n_obs) - 1
    weights = sparse.eye_array(adata.n_obs, format="csr")
    if others:
        embedding = hvg_pca(adata, layer=layer, n_top_genes=n_top_genes, n_comps=n_comps, random_state=random_state)
        weights = weights + kneighbors_graph(embedding, others, include_self=False)
    return _Smoothed(counts, sparse.csr_matrix(weights), adata.var_names)


class _GeneMean(ExpressionPredictor):
    def __init__(self, mean: np.ndarray, n_cells: int, var_names: pd.Index) -> None:
        super().__init__(n_cells, var_names)
        self._mean = mean

    def _shares(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self._mean[genes], (len(cells), len(genes)))


class _Smoothed(ExpressionPredictor):
    def __init__(self, counts: sparse.csr_matrix, weights: sparse.csr_matrix, var_names: pd.Index) -> None:
        super().__init__(counts.shape[0], var_names)
        self._counts, self._weights = counts, weights
        self._totals = weights @ np.asarray(counts.sum(1)).ravel()

    def _shares(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        summed = self._weights[cells] @ self._counts
        totals = np.maximum(self._totals[cells, None], np.finfo(float).tiny)  # an empty sum stays zero
        return summed[:, genes].toarray() / totals


def _counts(adata: AnnData, layer: str | None) -> sparse.csr_matrix:
    counts = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float64)
    if len(counts.data) and not (np.isfinite(counts.data).all() and counts.data.min() >= 0):
        msg = f"{'X' if layer is None else f'layer {layer!r}'} holds negative or missing values; name the layer with counts"
        raise ValueError(msg)
    return counts
