"""The preparation of fine-tuning data in the scGPT paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from .. import _logging
from ..backbones.scgpt import tokenizer

if TYPE_CHECKING:
    from anndata import AnnData


def recipe_scgpt(
    adata: AnnData,
    *,
    layer: str | None = None,
    min_counts_genes: int | None = 3,
    min_counts_cells: int | None = None,
    target_sum: float | Literal["median"] | None = 1e4,
    log1p: bool = True,
    n_top_genes: int | None = None,
    flavor: Literal["seurat_v3", "cell_ranger", "seurat"] = "seurat_v3",
    batch_key: str | None = None,
    n_bins: int | None = 51,
    tie_break: Literal["random", "left"] = "random",
    rng: int = 0,
    draws: tokenizer.TokenDraws | None = None,
    compat: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Filter, normalise, select genes and bin as the fine-tuning scripts of scGPT do (Cui et al. 2024).

    The embedding of pre-trained models needs none of this: :func:`scfm.tl.embed` takes raw counts.

    Parameters
    ----------
    adata
        Annotated data with raw counts; filtered in place.
    layer
        Layer to start from; by default ``X``.
    min_counts_genes, min_counts_cells
        Least total counts of a gene and of a cell to keep.
    target_sum
        Total to which cells are normalised, ``"median"``, or ``None`` for no normalisation.
    log1p
        Whether to take ``log(1 + x)`` after normalisation.
    n_top_genes
        Keep this many highly variable genes, chosen on the unchanged matrix.
    flavor, batch_key
        Passed to :func:`scanpy.pp.highly_variable_genes`; ``"seurat_v3"`` needs raw counts.
    n_bins
        Bins, zero included; ``None`` for no binning.
    tie_break, rng, draws
        As in the tokenizer of scGPT.
    compat
        In the original program both layers are one array, so ``X_normed`` holds logarithms too; repeat that.
    copy
        Return a changed copy.

    Returns
    -------
    ``None``, or the copy. Set are:

    ``.layers["X_normed"]``, ``.layers["X_log1p"]``
        Normalised values, and their logarithm.
    ``.layers["X_binned"]``
        Bins, sparse int64.
    ``.obsm["bin_edges"]``
        0 and the quantile edges of each cell, ``(n_obs, n_bins)``; zeros for cells without any count.
    """
    if adata.is_view and not copy:
        msg = "recipe_scgpt filters in place, which a view does not allow; pass adata.copy() or copy=True"
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    start = _logging.info("preparing data as scGPT's fine-tuning does")
    values = (adata.X if layer is None else adata.layers[layer]).copy()
    if min_counts_genes:
        keep, _ = sc.pp.filter_genes(values, min_counts=min_counts_genes)
        adata._inplace_subset_var(keep)
        values = values[:, keep]
    if min_counts_cells:
        keep, _ = sc.pp.filter_cells(values, min_counts=min_counts_cells)
        adata._inplace_subset_obs(keep)
        values = values[keep]
    if target_sum is not None:
        values = sc.pp.normalize_total(
            adata, target_sum=None if target_sum == "median" else target_sum, layer=layer, inplace=False
        )["X"]
        adata.layers["X_normed"] = values
    if log1p:
        values = sc.pp.log1p(values, copy=True)
        adata.layers["X_log1p"] = values
        if compat and target_sum is not None:
            adata.layers["X_normed"] = values
    if n_top_genes:
        table = sc.pp.highly_variable_genes(
            adata, layer=layer, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
        )
        keep = table["highly_variable"].to_numpy()
        adata._inplace_subset_var(keep)
        values = values[:, keep]
    if n_bins is not None:
        _bin(adata, sparse.csr_matrix(values), n_bins, tie_break, rng, draws)
    _logging.info("    finished", time=start)
    return adata if copy else None


def _bin(
    adata: AnnData,
    values: sparse.csr_matrix,
    n_bins: int,
    tie_break: str,
    rng: int,
    draws: tokenizer.TokenDraws | None,
) -> None:
    values.eliminate_zeros()
    values.sort_indices()
    offsets = values.indptr.astype(np.int64)
    filled = np.diff(offsets) > 0
    uniform = None
    if tie_break == "random":
        uniform = np.concatenate(draws.uniform) if draws is not None and draws.uniform is not None else None
        if uniform is None:
            genes = pd.util.hash_array(adata.var_names.to_numpy(dtype=object))
            uniform = tokenizer.bin_uniforms(genes[values.indices], values.data, offsets, rng)
    bins, edges = tokenizer.bin_values(values.data, np.concatenate([[0], offsets[1:][filled]]), n_bins, uniform)
    adata.layers["X_binned"] = sparse.csr_matrix((bins, values.indices, values.indptr), shape=values.shape)
    table = np.zeros((adata.n_obs, n_bins))
    table[filled, 1:] = edges
    adata.obsm["bin_edges"] = table
    if not filled.all():
        _logging.warning(f"{(~filled).sum()} cells have no expressed gene; their bins are 0")
