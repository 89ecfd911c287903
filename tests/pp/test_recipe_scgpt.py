"""The fine-tuning preparation of scGPT against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

import scfm
from scfm.backbones.scgpt import TokenDraws


@pytest.mark.parametrize("setting", ["raw_nohvg", "raw_hvg_seurat_v3", "lognormed_hvg_cell_ranger", "no_norm_bin_only"])
def test_recipe(golden, setting):
    import scanpy as sc

    data = golden("scgpt", "preprocessor")
    args = data.case["settings"][setting]["args"]
    adata = AnnData(sparse.csr_matrix(data.input["X"]))
    adata.var_names = data.input["genes"]
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.obs["str_batch"] = data.input["batch"]
    if setting.startswith("lognormed"):
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if setting == "no_norm_bin_only":
        adata = adata[2:].copy()
    uniform = TokenDraws.from_flat(data.expected[f"{setting}__uniform"], data.expected[f"{setting}__uniform_len"])
    scfm.pp.recipe_scgpt(
        adata,
        min_counts_genes=args["filter_gene_by_counts"] or None,
        target_sum=args["normalize_total"] or None,
        log1p=args["log1p"],
        n_top_genes=args["subset_hvg"] or None,
        flavor=args.get("hvg_flavor", "seurat_v3"),
        batch_key=data.case["settings"][setting]["batch_key"],
        n_bins=args["binning"],
        draws=uniform,
        compat=True,
    )
    np.testing.assert_array_equal(adata.var_names, data.expected[f"{setting}__genes"])
    for layer in ("X_normed", "X_log1p"):
        if f"{setting}__{layer}" in data.expected.files:
            np.testing.assert_allclose(
                adata.layers[layer].toarray(), data.expected[f"{setting}__{layer}"], rtol=1e-6, err_msg=layer
            )
    np.testing.assert_array_equal(adata.layers["X_binned"].toarray(), data.expected[f"{setting}__X_binned"])
    np.testing.assert_allclose(adata.obsm["bin_edges"], data.expected[f"{setting}__bin_edges"], rtol=1e-6)


def test_bins_do_not_depend_on_the_order_of_genes():
    rng = np.random.default_rng(0)
    adata = AnnData(sparse.csr_matrix(rng.poisson(1, (20, 30)).astype(np.float32)))
    other = adata[:, rng.permutation(30)].copy()
    for each in (adata, other):
        scfm.pp.recipe_scgpt(each, min_counts_genes=None)
    np.testing.assert_array_equal(
        adata.layers["X_binned"].toarray(), other[:, adata.var_names].layers["X_binned"].toarray()
    )
    assert adata.layers["X_binned"].max() == 50


def test_normalised_values_are_kept_beside_their_logarithm():
    adata = AnnData(sparse.csr_matrix(np.random.default_rng(0).poisson(2, (6, 9)).astype(np.float32)))
    scfm.pp.recipe_scgpt(adata, min_counts_genes=None)
    np.testing.assert_allclose(adata.layers["X_normed"].sum(1), 1e4, rtol=1e-5)
    np.testing.assert_allclose(
        adata.layers["X_log1p"].toarray(), np.log1p(adata.layers["X_normed"].toarray()), rtol=1e-6
    )


def test_a_view_is_refused():
    adata = AnnData(sparse.csr_matrix(np.ones((4, 3), dtype=np.float32)))
    with pytest.raises(ValueError, match=r"copy\(\)"):
        scfm.pp.recipe_scgpt(adata[:2])
    assert scfm.pp.recipe_scgpt(adata[:2], min_counts_genes=None, copy=True).n_obs == 2
