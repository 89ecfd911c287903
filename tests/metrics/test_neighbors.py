"""Clusters of neighbour graphs, and the number of them that is wanted."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scfm.metrics import (
    clustering_agreement,
    clusters_by_bisection,
    leiden_clusters,
    matched_clustering_scores,
    neighbor_graph,
)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    groups = np.repeat(range(6), 30)
    return rng.normal(size=(180, 8)) + 12 * np.eye(6, 8)[groups], groups


@pytest.mark.parametrize("wanted", [2, 6, 9])
def test_bisection_finds_the_number(blobs, wanted):
    embedding, groups = blobs
    graph = neighbor_graph(embedding)
    clusters, resolution = clusters_by_bisection(graph, wanted, high=4)
    np.testing.assert_array_equal(clusters, leiden_clusters(graph, resolution))
    if wanted >= 6:
        assert len(np.unique(clusters)) == wanted
    else:  # groups that are not connected are never merged
        assert len(np.unique(clusters)) == 6
    if wanted == 6:
        assert clustering_agreement(groups, clusters)["ARI"] == 1


def test_closest_number_wins_when_steps_run_out(blobs):
    graph = neighbor_graph(blobs[0])
    clusters, resolution = clusters_by_bisection(graph, 180, low=1, high=1.5, max_steps=3)
    tried = {value: len(np.unique(leiden_clusters(graph, value))) for value in (1.25, 1.375, 1.4375)}
    assert len(np.unique(clusters)) == max(tried.values())
    assert tried[resolution] == max(tried.values())


@pytest.mark.parametrize(("n", "steps"), [(0, 5), (181, 5), (3, 0)])
def test_bisection_refuses_the_impossible(blobs, n, steps):
    with pytest.raises(ValueError, match="cannot make"):
        clusters_by_bisection(neighbor_graph(blobs[0]), n, max_steps=steps)


def test_seeded_and_global_state_untouched(blobs):
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    noise = np.random.default_rng(1).normal(size=(150, 5))
    first, second = (leiden_clusters(neighbor_graph(noise), 1.0, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


def test_few_cells():
    graph = neighbor_graph(np.eye(4))
    assert graph.shape == (4, 4)
    assert len(leiden_clusters(graph)) == 4


def test_matched_clusters_of_separated_groups(blobs):
    embedding, groups = blobs
    scores = matched_clustering_scores(embedding * [1, 1e3, 1, 1, 1, 1, 1, 1], groups)  # scaling undoes the unit
    assert scores["NMI"] == pytest.approx(1)
    assert scores["ARI"] == pytest.approx(1)
    assert scores["clusters"] == 6
    assert 0 < scores["resolution"] < 2
    assert scores["SIL"] > 0.5


def test_silhouette_in_the_reference_is_that_of_the_clusters(blobs):
    embedding, groups = blobs
    rng = np.random.default_rng(2)
    wrong_labels = rng.permutation(groups)
    own = matched_clustering_scores(embedding, wrong_labels)
    other = matched_clustering_scores(embedding, wrong_labels, reference=embedding)
    assert own["SIL"] < 0.1  # labels are wrong
    assert other["SIL"] > 0.5  # clusters are right
    assert own["ARI"] == other["ARI"] < 0.1


def test_matched_clusters_bad_input(blobs):
    embedding, groups = blobs
    with pytest.raises(ValueError, match="at least 2 different labels"):
        matched_clustering_scores(embedding, np.zeros(180))
    with pytest.raises(ValueError, match="reference has 3 cells"):
        matched_clustering_scores(embedding, groups, reference=np.eye(3))
    embedding = embedding.copy()
    embedding[4] = np.nan
    with pytest.raises(ValueError, match="1 of 180 cells is not finite"):
        matched_clustering_scores(embedding, groups)
