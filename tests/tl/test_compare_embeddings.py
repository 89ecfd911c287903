"""Comparison of embeddings and its plot."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy.sparse import csr_matrix

import scfm
from scfm.backbones import from_config, random_copy
from scfm.baselines import hvg_pca, scvi_latent
from scfm.genes import GeneVocab


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 40)
    good = rng.normal(size=(120, 5)).astype(np.float32) + 8 * np.eye(3, 5, dtype=np.float32)[np.repeat(range(3), 40)]
    adata = AnnData(obs=pd.DataFrame({"label": pd.Categorical(labels)}, index=[f"c{i}" for i in range(120)]))
    adata.obsm["X_good"] = good
    adata.obsm["X_noise"] = rng.normal(size=(120, 5)).astype(np.float32)
    return adata


def test_separated_labels_score_higher_than_noise(adata):
    scores = scfm.tl.compare_embeddings(adata, ["X_good", "X_noise"], "label", umap=False)
    assert list(scores.index) == ["good", "noise", "shuffled"]
    assert scores.loc["good", "ARI"] == pytest.approx(1)
    assert scores.loc["good", "clusters"] == 3
    assert scores.loc["good", "silhouette"] > 0.5
    assert scores.loc[["noise", "shuffled"], "ARI"].max() < 0.2
    assert "leiden_good" in adata.obs
    assert "X_umap_good" not in adata.obsm


def test_results_round_trip_and_plot(adata, tmp_path):
    scfm.tl.compare_embeddings(adata, {"the good one": "X_good"}, "label")
    adata.write_h5ad(tmp_path / "a.h5ad")
    stored = read_h5ad(tmp_path / "a.h5ad")
    axes = scfm.pl.compare_embeddings(stored, show=False, save=tmp_path / "a.png")
    assert [ax.get_title() for ax in axes] == ["the good one", "shuffled", "agreement with labels"]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_cells_without_embedding_or_label_are_left_out(adata):
    adata.obsm["X_good"][:5] = np.nan
    adata.obs.loc[adata.obs_names[10:15], "label"] = np.nan
    scores = scfm.tl.compare_embeddings(adata, ["X_good"], "label", shuffled=False)
    assert scores.loc["good", "ARI"] == pytest.approx(1)
    assert adata.obs["leiden_good"].isna().sum() == 5
    assert np.isnan(adata.obsm["X_umap_good"][:5]).all()
    assert np.isfinite(adata.obsm["X_umap_good"][5:]).all()


@pytest.mark.parametrize(
    ("keys", "label", "error", "text"),
    [
        (["X_nothing"], "label", KeyError, "X_good"),
        (["X_good"], "nothing", KeyError, "label"),
        (["X_good"], "one", ValueError, "fewer than two labels"),
    ],
)
def test_wrong_input_is_named(adata, keys, label, error, text):
    adata.obs["one"] = "same"
    with pytest.raises(error, match=text):
        scfm.tl.compare_embeddings(adata, keys, label)


def test_plot_without_comparison_says_what_to_run(adata):
    with pytest.raises(KeyError, match="compare_embeddings first"):
        scfm.pl.compare_embeddings(adata)
    scfm.tl.compare_embeddings(adata, ["X_good"], "label", umap=False)
    with pytest.raises(KeyError, match="umap=True"):
        scfm.pl.compare_embeddings(adata)


# -- baselines, random weights, integration scores ---------------------------------------------------------------------------


@pytest.fixture
def cells():
    """Three kinds of cells in two batches, with counts."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(0.5, 2.0, size=(3, 60))
    kinds = np.tile([0, 1, 2], 40)
    adata = AnnData(csr_matrix(rng.poisson(rates[kinds]).astype(np.float32)))
    adata.var_names = [f"GENE{i}" for i in range(60)]
    adata.obs_names = [f"c{i}" for i in range(120)]
    adata.obs["label"] = pd.Categorical(np.array(["a", "b", "c"])[kinds])
    adata.obs["batch"] = pd.Categorical(np.repeat(["x", "y"], 60))
    return adata


def tiny_model(name: str = "tiny"):
    config = {"dim": 16, "n_heads": 2, "ffn_dim": 16, "n_layers": 2, "max_length": 80}
    specials = ["<pad>", "<cls>", "<eoc>"]
    vocab = GeneVocab([f"GENE{i}" for i in range(60)] + specials, specials=specials)
    return from_config("scgpt", config, vocab, name=name, device="cpu", precision="float32")


def test_hvg_pca_stands_beside_unless_it_is_declined(cells):
    scfm.tl.embed(cells, tiny_model(), progress=False)
    scores = scfm.tl.compare_embeddings(cells, ["tiny"], "label", umap=False)
    assert list(scores.index) == ["tiny", "HVG + PCA", "shuffled"]
    np.testing.assert_allclose(cells.obsm["X_hvg_pca"], hvg_pca(cells), atol=1e-5)
    alone = scfm.tl.compare_embeddings(cells, ["tiny"], "label", umap=False, baselines=(), shuffled=False)
    assert list(alone.index) == ["tiny"]


def test_a_baseline_that_is_asked_for_needs_counts(cells):
    cells.obsm["X_any"] = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    cells.X = cells.X * 0.3
    assert "HVG + PCA" not in scfm.tl.compare_embeddings(cells, ["X_any"], "label", umap=False).index
    with pytest.raises(ValueError, match="layer="):
        scfm.tl.compare_embeddings(cells, ["X_any"], "label", umap=False, baselines=["hvg_pca"])
    with pytest.raises(ValueError, match="choose among hvg_pca, scvi"):
        scfm.tl.compare_embeddings(cells, ["X_any"], "label", umap=False, baselines=["magic"])


def test_random_weights_are_a_row_of_their_own(cells):
    model = tiny_model()
    scfm.tl.embed(cells, model, progress=False)
    scores = scfm.tl.compare_embeddings(cells, ["tiny"], "label", random_weights=[model], umap=False)
    assert list(scores.index) == ["tiny", "tiny-random", "HVG + PCA", "shuffled"]
    expected = random_copy(model).embed(model.tokenize(cells.X, cells.var_names.to_numpy())).numpy()
    np.testing.assert_allclose(cells.obsm["X_tiny-random"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="no checkpoint"):  # a model that was never saved cannot be found by its name
        scfm.tl.compare_embeddings(cells, ["tiny"], "label", random_weights=True, umap=False)


def test_models_with_records_are_loaded_again_for_their_random_copies(cells):
    scfm.tl.embed(cells, tiny_model(), progress=False)
    vocab = scfm.backbones.load_vocab("scgpt-mini")
    cells.var_names = vocab.genes[:60]
    scfm.tl.embed(cells, "scgpt-mini", progress=False)
    scores = scfm.tl.compare_embeddings(cells, ["scgpt-mini"], "label", random_weights=True, umap=False)
    assert list(scores.index) == ["scgpt-mini", "scgpt-mini-random", "HVG + PCA", "shuffled"]


def test_integration_scores_tell_mixed_batches_from_separate_ones(cells):
    pytest.importorskip("scib_metrics")
    rng = np.random.default_rng(0)
    kinds, batches = cells.obs["label"].cat.codes.to_numpy(), cells.obs["batch"].cat.codes.to_numpy()
    mixed = rng.normal(size=(120, 4)) + 9 * np.eye(3, 4)[kinds]
    cells.obsm["X_mixed"] = mixed.astype(np.float32)
    cells.obsm["X_apart"] = (mixed + 30 * batches[:, None]).astype(np.float32)
    scores = scfm.tl.compare_embeddings(
        cells, ["X_mixed", "X_apart"], "label", batch_key="batch", baselines=(), shuffled=False
    )
    assert scores.loc["mixed", "iLISI"] > scores.loc["apart", "iLISI"] + 0.3
    assert scores.loc["mixed", "batch silhouette"] > scores.loc["apart", "batch silhouette"] + 0.3
    assert scores.loc["mixed", "graph connectivity"] == pytest.approx(1)
    assert scores.loc["mixed", "cLISI"] > 0.9
    axes = scfm.pl.compare_embeddings(cells, show=False)
    assert [label.get_text() for label in axes[-1].get_xticklabels()][-1] == "graph connectivity"


@pytest.mark.slow
def test_scvi_as_a_baseline(cells, monkeypatch):
    monkeypatch.setattr("scfm.tl._controls.scvi_latent", partial(scvi_latent, max_epochs=2, n_latent=4))
    cells.obsm["X_any"] = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    before = torch.get_rng_state()
    scores = scfm.tl.compare_embeddings(
        cells, ["X_any"], "label", baselines=["scvi"], batch_key="batch", umap=False, scib=False
    )
    assert list(scores.index) == ["any", "scVI", "shuffled"]
    assert cells.obsm["X_scvi"].shape == (120, 4)
    assert torch.equal(before, torch.get_rng_state())
