"""Scores of integration: definitions, and what they say of mixed and of separate batches."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import silhouette_score

from scfm._errors import MissingExtraError
from scfm.metrics import (
    batch_silhouette,
    clustering_agreement,
    graph_connectivity,
    integration_scores,
    leiden_clusters,
    neighbor_graph,
)

LABELS = np.repeat(["a", "b"], 60)
BATCHES = np.tile(np.repeat(["x", "y", "z"], 20), 2)


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(0)
    return rng.normal(size=(120, 4)) + 10 * (LABELS == "b")[:, None] * np.eye(1, 4)


@pytest.fixture(scope="module")
def apart(mixed):
    return mixed + 30 * (BATCHES == "y")[:, None] * np.eye(1, 4, 1) + 30 * (BATCHES == "z")[:, None] * np.eye(1, 4, 2)


@pytest.fixture(scope="module")
def scib():
    return pytest.importorskip("scib_metrics")


@pytest.fixture(scope="module")
def scores(scib, mixed, apart):
    return integration_scores(mixed, LABELS, BATCHES, unintegrated=apart)


def test_mixed_batches_score_high(scores, mixed, apart):
    worse = integration_scores(apart, LABELS, BATCHES, unintegrated=apart)
    assert scores["NMI"] == pytest.approx(1)
    assert scores["graph connectivity"] == 1
    assert scores["ASW batch"] > 0.9
    assert worse["ASW batch"] < 0.3
    assert worse["graph connectivity"] == pytest.approx(1 / 3)
    assert scores["PCR comparison"] > 0.9
    assert worse["PCR comparison"] == pytest.approx(0, abs=1e-5)
    assert scores["Overall"] > worse["Overall"] + 0.3


def test_averages_are_those_of_scgpt(scores):
    bio = (scores["NMI"] + scores["ARI"] + scores["ASW label"]) / 3
    batch = (scores["ASW batch"] + scores["graph connectivity"]) / 2
    assert scores["AvgBIO"] == pytest.approx(bio)
    assert scores["AvgBATCH"] == pytest.approx(batch)
    assert scores["Overall"] == pytest.approx(0.6 * bio + 0.4 * batch)


def test_label_silhouette_is_scaled(scores, mixed):
    assert scores["ASW label"] == pytest.approx((silhouette_score(mixed, LABELS) + 1) / 2)


def test_best_resolution_of_the_sweep_is_taken():
    rng = np.random.default_rng(3)
    groups = np.repeat(range(4), 40)
    embedding = rng.normal(size=(160, 3)) + 2 * np.eye(4, 3)[groups]
    scores = integration_scores(embedding, groups)
    graph = neighbor_graph(embedding)
    sweep = [clustering_agreement(groups, leiden_clusters(graph, step / 10)) for step in range(1, 21)]
    nmi = [entry["NMI"] for entry in sweep]
    assert np.ptp(nmi) > 0.05
    assert scores["NMI"] == max(nmi)
    assert scores["ARI"] == sweep[int(np.argmax(nmi))]["ARI"]


def test_batch_silhouette_as_scib_metrics(scib, mixed):
    labels = LABELS.astype(object)
    labels[:20] = "one batch only"  # of batch x; left out
    labels[20] = "one cell"
    codes, batches = (np.unique(values.astype(str), return_inverse=True)[1] for values in (labels, BATCHES))
    expected = scib.silhouette_batch(mixed.astype(np.float32), codes, batches)
    assert batch_silhouette(mixed, labels, BATCHES) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batches", [None, np.repeat("x", 120), np.where(LABELS == "a", "x", "y")])
def test_nothing_to_mix_is_nan(scib, mixed, batches):
    scores = integration_scores(mixed, LABELS, batches, unintegrated=mixed)
    assert np.isnan([scores["ASW batch"], scores["AvgBATCH"], scores["Overall"]]).all()
    assert np.isfinite([scores["NMI"], scores["ASW label"], scores["AvgBIO"], scores["graph connectivity"]]).all()
    assert np.isnan(scores["PCR comparison"]) == (batches is None or len(set(batches)) == 1)
    assert "PCR comparison" not in integration_scores(mixed, LABELS, batches)


def test_connectivity_counts_the_largest_part():
    # label a: 0-1-2 and 3 joined only through a cell of label b; label b: one cell
    i, j = np.array([(0, 1), (1, 2), (2, 4), (4, 3)]).T
    graph = csr_matrix((np.full(8, 0.5), (np.r_[i, j], np.r_[j, i])), shape=(5, 5))
    assert graph_connectivity(graph, list("aaaab")) == pytest.approx((3 / 4 + 1) / 2)
    graph[0, 1] = graph[1, 0] = 0  # a stored zero is no edge
    assert graph.nnz == 8
    assert graph_connectivity(graph, list("aaaab")) == pytest.approx((2 / 4 + 1) / 2)


def test_order_of_cells_hardly_matters(scores, mixed, apart):
    order = np.random.default_rng(1).permutation(120)
    again = integration_scores(mixed[order], LABELS[order], BATCHES[order], unintegrated=apart[order])
    assert again == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "batches", "message"),
    [
        (np.repeat("a", 120), BATCHES, "at least 2 different labels"),
        (LABELS[:5], BATCHES, "5 labels for 120 cells"),
        (LABELS, BATCHES[:5], "5 batches for 120 cells"),
        (np.where(np.arange(120) < 3, None, LABELS), BATCHES, "3 of 120 labels are missing"),
    ],
)
def test_bad_input(mixed, labels, batches, message):
    with pytest.raises(ValueError, match=message):
        integration_scores(mixed, labels, batches)


def test_only_the_pcr_comparison_needs_scib_metrics(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    assert np.isfinite(list(integration_scores(mixed, LABELS, BATCHES).values())).all()
    with pytest.raises(MissingExtraError, match=r"scfm\[benchmark\]"):
        integration_scores(mixed, LABELS, BATCHES, unintegrated=mixed)


def test_missing_embeddings_are_refused(mixed):
    broken = mixed.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="1 of 120 cells is not finite"):
        integration_scores(broken, LABELS, BATCHES)
    pytest.importorskip("scib_metrics")
    with pytest.raises(ValueError, match="unintegrated has 4 cells"):
        integration_scores(mixed, LABELS, BATCHES, unintegrated=np.eye(4))
