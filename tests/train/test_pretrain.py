"""The training loop, on a few steps of a tiny network."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

import scfm
from scfm.train import Recipe, frequent_genes, pretrain


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.3, 4.0, size=(3, 40))
    for number in range(2):
        adata = AnnData(sparse.csr_matrix(rng.poisson(programs[rng.integers(3, size=80)]).astype(np.float32)))
        adata.var_names = [f"G{i + 5 * number}" for i in range(40)]
        adata.write_h5ad(tmp_path / f"{number}.h5ad")
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\nkind: scgpt\nsources: [0.h5ad, 1.h5ad]\nn_genes: 35\nmax_steps: 60\nbatch_size: 16\n"
        "learning_rate: 0.01\nwarmup_steps: 5\nvalidation_share: 0.2\n"
        "config: {dim: 16, n_heads: 2, ffn_dim: 16, n_layers: 2, dropout: 0.0}\n"
    )
    return Recipe.read(tmp_path / "recipe.yaml")


def test_loss_of_held_out_cells_falls_and_the_model_embeds(recipe, tmp_path):
    result = pretrain(recipe)
    assert (result.n_cells, result.n_validation) == (128, 32)
    first, last = result.history["validation_loss"].iloc[[0, -1]]
    assert last < 0.5 * first
    assert len(result.backbone.vocab) == 35 + 3
    loaded = scfm.load(result.backbone.save(tmp_path / "model"))
    adata = AnnData(sparse.csr_matrix(np.ones((3, 40), dtype=np.float32)))
    adata.var_names = [f"G{i}" for i in range(40)]
    scfm.tl.embed(adata, loaded)
    assert np.isfinite(adata.obsm["X_tiny"]).all()


def test_same_seed_gives_the_same_model(recipe):
    from dataclasses import replace

    short = replace(recipe, max_steps=3)
    one, two = (pretrain(short).history["loss"].iloc[-1] for _ in range(2))
    assert one == two
    assert pretrain(replace(short, seed=1)).history["loss"].iloc[-1] != one


def test_frequent_genes_are_those_seen_in_most_cells(tmp_path):
    counts = np.zeros((10, 4), dtype=np.float32)
    counts[:9, 2], counts[:5, 0], counts[:1, 3] = 1, 2, 50
    adata = AnnData(sparse.csr_matrix(counts))
    adata.var_names = ["half", "never", "most", "rare"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert frequent_genes([tmp_path / "a.h5ad"], 2) == ["half", "most"]


def test_unknown_fields_are_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a\nkind: scgpt\nsources: []\nepochs: 3\n")
    with pytest.raises(ValueError, match="epochs"):
        Recipe.read(tmp_path / "recipe.yaml")
