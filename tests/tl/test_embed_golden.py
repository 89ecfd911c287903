"""``tl.embed`` on official folders gives what the reference implementation gives."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

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
