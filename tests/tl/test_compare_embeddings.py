"""Comparison of embeddings and its plot."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad

import scfm


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
