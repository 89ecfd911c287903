"""Scores that ask whether a prediction is that of its own perturbation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist

from scfm.metrics import de_overlap, discrimination_scores, e_distance, perturbation_scores


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 7))
def test_discrimination_by_counting(seed, n):
    rng = np.random.default_rng(seed)
    truth, guess = rng.normal(size=(2, n, 5))
    scores = discrimination_scores(truth, guess)
    distances = cdist(guess, truth)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        farther = np.mean([distances[i, j] > distances[i, i] for j in others])
        nearer = np.mean([distances[j, i] < distances[i, i] for j in others])
        assert scores.loc[i].tolist() == pytest.approx([farther, nearer])


def test_a_perfect_prediction_and_one_that_is_the_same_for_all():
    truth = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 4)), index=list("abcdef"))
    perfect = discrimination_scores(truth, truth)
    assert perfect.index.tolist() == list("abcdef")
    assert (perfect["centroid accuracy"] == 1).all()
    assert (perfect["rank"] == 0).all()
    collapsed = discrimination_scores(truth, np.tile(truth.mean(), (6, 1)))
    np.testing.assert_allclose(collapsed["rank"], 0.5)
    assert collapsed["centroid accuracy"].mean() == pytest.approx(0.5)


def test_changes_from_the_centroid_take_away_what_all_share():
    rng = np.random.default_rng(1)
    control, shared, own = rng.normal(size=30), 3 * rng.normal(size=30), rng.normal(size=(4, 30))
    truth = control + shared + own
    centroid = truth.mean(0)
    scores = perturbation_scores(truth, control + shared + rng.normal(size=(4, 30)), control, centroid=centroid)
    assert (scores["Pearson delta"] > 0.75).all()
    assert (scores["Pearson centroid delta"].abs() < 0.6).all()
    expected = [np.corrcoef(t - centroid, g - centroid)[0, 1] for t, g in zip(truth, truth + 1, strict=True)]
    found = perturbation_scores(truth, truth + 1, control, centroid=centroid, de_genes=[[0, 1, 2]] * 4)
    np.testing.assert_allclose(found["Pearson centroid delta"], expected)
    assert "DE Pearson centroid delta" in found
    with pytest.raises(ValueError, match="centroid has the shape"):
        perturbation_scores(truth, truth, control, centroid=np.zeros(3))


def test_overlap_of_changed_genes():
    control = np.zeros(6)
    truth = np.array([[5.0, -4, 3, 0.1, 0, 0], [5, -4, 3, 0.1, 0, 0], [5, -4, 3, 0.1, 0, 0]])
    guess = np.array([[2.0, -9, 0.5, 1, 0, 0], [0, 0, 0, 0, 0, 0], [-1, 1, 1, 0, 0, 0]])
    scores = de_overlap(truth, guess, control, [[0, 1, 2]] * 3)
    assert scores["DE overlap"].tolist() == pytest.approx([2 / 3, 0.5, 1])  # of equal changes, three of six by chance
    assert scores["DE direction"].tolist() == pytest.approx([1, 0, 1 / 3])
    assert scores["DE opposite direction"].tolist() == pytest.approx([0, 0, 2 / 3])
    with pytest.raises(ValueError, match="genes for 1 conditions"):
        de_overlap(truth, guess, control, [[0]])


def test_energy_distance():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(40, 3)), rng.normal(size=(31, 3)) + [2, 0, 0]
    off = lambda cells: cdist(cells, cells)[~np.eye(len(cells), dtype=bool)].mean()
    expected = 2 * cdist(first, second).mean() - off(first) - off(second)
    assert e_distance(first, second) == pytest.approx(expected)
    assert e_distance(csr_matrix(first), second) == pytest.approx(expected)
    same = [e_distance(*rng.normal(size=(2, 30, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 0.01 < expected


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (discrimination_scores, (np.eye(3), np.eye(2, 3)), "must be the same"),
        (discrimination_scores, (np.eye(1, 3), np.eye(1, 3)), "at least two"),
        (discrimination_scores, (np.eye(3), np.full((3, 3), np.nan)), "missing"),
        (e_distance, (np.eye(3), np.eye(4)), "same features"),
        (e_distance, (np.eye(1, 3), np.eye(3)), "two cells"),
    ],
)
def test_bad_input(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
