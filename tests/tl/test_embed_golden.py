"""``tl.embed`` on official folders gives what the reference implementation gives."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scfm import load
from scfm.backbones.scgpt import TokenDraws
from scfm.tl import embed


@pytest.mark.shared
@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("run", ["full", "sampled"])
def test_scgpt(shared, run, block_size):
    folder = shared("golden", "scgpt", "embed_cells")
    expected = np.load(folder / "expected.npz")
    max_length = {"full": 1200, "sampled": 103}[run]
    parts = [expected[f"{run}__{name}"] for name in ("uniform", "uniform_len", "randperm", "randperm_len")]
    adata = ad.read_h5ad(folder / "input.h5ad")
    embed(
        adata,
        folder / "checkpoint",
        gene_symbols="feature_name",
        duplicates="keep",
        max_length=max_length,
        draws=TokenDraws.from_flat(*parts, max_length=max_length),
        block_size=block_size,
        device="cpu",
        precision="float32",
    )
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected[f"{run}__X_scGPT"], atol=2e-5)


SCFOUNDATION_RUNS = (
    "ce_all_t4",
    "ce_max_t4",
    "rde_all_f1",
    "rde_all_f2.5",
    "rde_all_a5",
    "rde_all_t4.5",
    "ce_all_t4_prenormT",
    "bulkF_all",
    "bulkT_max",
)


@pytest.mark.shared
@pytest.mark.parametrize("name", SCFOUNDATION_RUNS)
def test_scfoundation(shared, name):
    folder = shared("golden", "scfoundation", "embed_cell_cli")
    genes = shared("data", "vocab", "scfoundation", "OS_scRNA_gene_index.19264.tsv")
    runs = {run["name"]: run for run in json.loads((folder / "case.json").read_text())["runs"]}
    flags = dict(zip(runs[name]["args"][::2], runs[name]["args"][1::2], strict=True))
    data, matrix = np.load(folder / "input.npz"), runs[name]["input"]
    parts = [data[f"{matrix}_{part}"] for part in ("data", "indices", "indptr")]
    adata = ad.AnnData(sparse.csr_matrix(tuple(parts), shape=data[f"{matrix}_shape"]))
    adata.var_names = data["gene_names"]
    model = load(
        folder / "checkpoint" / "models",
        weights={"ce": "cell", "rde": "rde"}[flags["--version"]],
        genes=genes,
        device="cpu",
        precision="float32",
    )
    embed(
        adata,
        model,
        pooling=flags["--pool_type"],
        input_type=flags.get("--input_type", "singlecell"),
        pre_normalized=flags["--pre_normalized"],
        target=flags["--tgthighres"],
        block_size=3,
    )
    expected = np.load(folder / "expected.npz")[f"emb_{name}"]
    np.testing.assert_allclose(adata.obsm["X_scfoundation"], expected, rtol=1e-4, atol=2e-5)
