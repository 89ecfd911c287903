"""The Harmony baseline."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scfm import _errors
from scfm.baselines import harmony, hvg_pca


@pytest.fixture
def adata():
    """Two types in two batches, with a strong effect of the batch."""
    rng = np.random.default_rng(0)
    kind, batch = np.repeat([0, 1], 200), np.tile([0, 1], 200)
    rate = np.full((400, 60), 2.0)
    rate[kind == 1, :15] *= 8
    rate[batch == 1, 20:45] *= 2.5
    obs = pd.DataFrame({"type": kind, "batch": pd.Categorical(np.array(["x", "y"])[batch])}, index=map(str, range(400)))
    return AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs)


def distance(embedding, groups):
    groups = np.asarray(groups)
    first, second = (embedding[groups == value] for value in np.unique(groups))
    return np.linalg.norm(first.mean(0) - second.mean(0)) / embedding.std()


def test_batches_meet_and_types_stay_apart(adata):
    pytest.importorskip("harmonypy")
    before = adata.X.copy()
    plain, corrected = hvg_pca(adata, n_comps=10), harmony(adata, "batch", n_comps=10)
    assert corrected.shape == plain.shape
    assert corrected.dtype == np.float32
    assert distance(corrected, adata.obs["batch"]) < 0.4 * distance(plain, adata.obs["batch"])
    assert distance(corrected, adata.obs["type"]) > 0.9 * distance(plain, adata.obs["type"])
    assert (before != adata.X).nnz == 0


def test_seeded_and_global_state_untouched(adata):
    pytest.importorskip("harmonypy")
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (harmony(adata, "batch", n_comps=8, random_state=4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_few_cells(adata):
    pytest.importorskip("harmonypy")
    assert np.isfinite(harmony(adata[195:205].copy(), "batch", n_comps=4)).all()


def test_bad_input(adata, monkeypatch):
    with pytest.raises(KeyError, match="no column 'donor'; there are type, batch"):
        harmony(adata, "donor")
    with pytest.raises(ValueError, match="one batch only"):
        harmony(adata[adata.obs["batch"] == "x"].copy(), "batch")
    adata.obs.loc[adata.obs_names[:3], "batch"] = None
    with pytest.raises(ValueError, match="missing for 3 of 400 cells"):
        harmony(adata, "batch")
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    with pytest.raises(_errors.MissingExtraError, match=r"scfm\[harmony\]"):
        harmony(adata[3:].copy(), "batch")
