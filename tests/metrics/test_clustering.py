"""Clustering metrics on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.metrics import clustering_agreement, label_silhouette


def test_agreement_ignores_names_of_clusters():
    assert clustering_agreement(list("aabb"), [1, 1, 0, 0]) == {"ARI": 1.0, "NMI": 1.0}


def test_one_cluster_tells_nothing():
    scores = clustering_agreement(list("aabb"), [0, 0, 0, 0])
    assert scores["ARI"] == 0
    assert scores["NMI"] == 0


def test_silhouette_of_two_far_points():
    embedding = np.array([[0, 0], [0, 0.01], [9, 9], [9, 9.01]])
    assert label_silhouette(embedding, list("aabb")) > 0.99
    assert label_silhouette(embedding, list("abab")) < 0


@pytest.mark.parametrize("labels", [list("aaaa"), list("abcd")])
def test_silhouette_needs_labels(labels):
    with pytest.raises(ValueError, match="at least two labels"):
        label_silhouette(np.eye(4), labels)
