"""The standard Scanpy embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import scanpy as sc
from anndata import AnnData

if TYPE_CHECKING:
    import numpy as np


def hvg_pca(
    adata: AnnData, *, layer: str | None = None, n_top_genes: int = 2000, n_comps: int = 50, random_state: int = 0
) -> np.ndarray:
    """PCA of log-normalised highly variable genes, the baseline of every embedding.

    Parameters
    ----------
    adata
        Annotated data; it is not changed.
    layer
        Layer with raw counts; by default ``X``.
    n_top_genes
        Highly variable genes (all genes if there are fewer).
    n_comps
        Principal components (fewer if the data are smaller).
    random_state
        Seed of the solver.

    Returns
    -------
    Array ``(n_obs, n_comps)`` of float32.
    """
    work = AnnData((adata.X if layer is None else adata.layers[layer]).copy(), var=adata.var[[]].copy())
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    if work.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(work, n_top_genes=n_top_genes)
        work = work[:, work.var["highly_variable"]].copy()
    sc.pp.pca(work, n_comps=min(n_comps, work.n_obs - 1, work.n_vars - 1), random_state=random_state)
    return work.obsm["X_pca"].astype("float32")
