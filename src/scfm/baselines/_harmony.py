"""The standard linear integration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._optional import require
from ._pca import hvg_pca

if TYPE_CHECKING:
    from anndata import AnnData

# harmonypy's own rule, which gives none for a handful of cells
_CELLS_PER_CLUSTER, _MAX_CLUSTERS = 30, 100


def harmony(
    adata: AnnData,
    batch_key: str,
    *,
    layer: str | None = None,
    n_top_genes: int = 2000,
    n_comps: int = 50,
    random_state: int = 0,
) -> np.ndarray:
    """HVG + PCA with the batches corrected by Harmony (Korsunsky et al., Nature Methods 2019).

    Parameters
    ----------
    adata
        Annotated data; it is not changed.
    batch_key
        Column of ``obs`` with the batches.
    layer
        Layer with raw counts; by default ``X``.
    n_top_genes, n_comps
        Highly variable genes and principal components, see :func:`hvg_pca`.
    random_state
        Seed of PCA and Harmony.

    Returns
    -------
    Array ``(n_obs, n_comps)`` of float32.

    Raises
    ------
    KeyError
        If the column does not exist.
    MissingExtraError
        If harmonypy is not installed.
    ValueError
        If there are fewer than two batches, or cells without one.
    """
    if batch_key not in adata.obs:
        msg = f"obs has no column {batch_key!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise KeyError(msg)
    batches = adata.obs[batch_key]
    if missing := int(batches.isna().sum()):
        msg = f"obs[{batch_key!r}] is missing for {missing:,} of {adata.n_obs:,} cells"
        raise ValueError(msg)
    if batches.nunique() < 2:
        msg = f"obs[{batch_key!r}] has one batch only, so there is nothing to correct; use scfm.baselines.hvg_pca"
        raise ValueError(msg)
    harmonypy = require("harmonypy", purpose="the Harmony baseline")
    pca = hvg_pca(adata, layer=layer, n_top_genes=n_top_genes, n_comps=n_comps, random_state=random_state)
    n_clusters = min(max(round(len(pca) / _CELLS_PER_CLUSTER), 1), _MAX_CLUSTERS)
    meta = batches.astype(str).to_frame(name="batch")
    result = harmonypy.run_harmony(pca.T, meta, "batch", nclust=n_clusters, random_state=random_state, verbose=False)
    return np.ascontiguousarray(result.Z_corr, dtype=np.float32)
