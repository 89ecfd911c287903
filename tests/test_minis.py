"""The bundled models: small, trained, better than their own network with random weights on cells they have not seen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import scfm
from scfm.backbones import random_copy

MINIS = ("scgpt-mini", "scfoundation-mini", "cellfm-mini", "sclong-mini")


@pytest.fixture(scope="module")
def cells():
    adata = sc.datasets.pbmc68k_reduced()
    scfm.pp.recover_counts(adata, use_raw=True)
    return adata[::2].copy()


def test_these_are_all_that_are_bundled():
    table = scfm.checkpoints.list()
    assert {*table.loc[table["status"] == "bundled", "name"]} == {*MINIS}


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_is_small_and_its_loss_fell(name):
    folder = scfm.checkpoints.fetch(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * 2**20
    assert {"README.md", "recipe.yaml", "history.csv"} <= {path.name for path in folder.iterdir()}
    loss = pd.read_csv(folder / "history.csv")["validation_loss"].dropna()
    assert len(loss) >= 5
    assert loss.iloc[-1] < 0.7 * loss.iloc[0]
    assert loss.iloc[-1] <= 1.02 * loss.min()


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_beats_its_random_copies_on_unseen_cells(name, cells):
    backbone = scfm.load(name, device="cpu")
    labels = cells.obs["bulk_labels"].astype(str).to_numpy()

    def scores(model):
        scfm.tl.embed(cells, model=model, layer="counts", key_added="X", progress=False)
        found = KMeans(len(np.unique(labels)), n_init=5, random_state=0).fit_predict(cells.obsm["X"])
        neighbours = cross_val_score(KNeighborsClassifier(15), cells.obsm["X"], labels, cv=5).mean()
        return np.array([normalized_mutual_info_score(labels, found), neighbours])

    trained, random = scores(backbone), np.max([scores(random_copy(backbone, seed=seed)) for seed in range(2)], axis=0)
    assert (trained > random + [0.15, 0.1]).all(), (trained, random)
