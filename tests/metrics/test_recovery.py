"""Scores of recovered expression."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import pearsonr

from scfm.metrics import recovery_scores


def data(seed, n_cells=9, n_genes=7):
    rng = np.random.default_rng(seed)
    reference = rng.gamma(2, size=(n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.4)
    reference[2] = 0  # a cell without entries
    reference[3] = 0
    reference[3, 1] = 2.5  # and one with a single entry
    return reference, rng.gamma(2, size=(n_cells, n_genes)) + reference


def test_by_hand():
    scores = recovery_scores(np.array([[2.0, 0, 4], [1, 0, 0]]), np.array([[1.0, 9, 4], [3, 9, 9]]))
    assert scores["entries"] == 3
    assert scores["MAE"] == pytest.approx((1 + 0 + 2) / 3)
    assert scores["MRE"] == pytest.approx((1 / 2 + 0 + 4 / 1) / 3)
    assert scores["Pearson"] == pytest.approx(pearsonr([2, 4, 1], [1, 4, 3])[0])
    assert scores["Pearson per cell"] == pytest.approx(1)  # the second cell has one entry


@given(
    seed=st.integers(0, 10_000),
    kinds=st.tuples(*2 * [st.sampled_from(["dense", "csr", "csc", "csr_array"])]),
    chunk=st.sampled_from([None, 1, 2, 5, 100]),
)
@settings(max_examples=40, deadline=None)
def test_formats_and_chunks_change_nothing(seed, kinds, chunk):
    reference, predicted = data(seed)
    make = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array}
    scores = recovery_scores(make[kinds[0]](reference), make[kinds[1]](predicted), chunk_size=chunk)
    present = reference != 0
    truth, guess = reference[present], predicted[present]
    assert scores["entries"] == len(truth)
    assert scores["MAE"] == pytest.approx(np.abs(truth - guess).mean())
    assert scores["MRE"] == pytest.approx(((truth - guess) ** 2 / truth).mean())
    assert scores["Pearson"] == pytest.approx(pearsonr(truth, guess)[0])
    cells = [pearsonr(r[p], g[p])[0] for r, g, p in zip(reference, predicted, present, strict=True) if p.sum() > 1]
    assert scores["Pearson per cell"] == pytest.approx(np.mean(cells))


def test_stored_zeros_are_no_entries():
    reference = sparse.csr_matrix(np.array([[1.0, 2.0], [3.0, 1.0]]))
    reference.data[1] = 0
    assert recovery_scores(reference, np.ones((2, 2)))["entries"] == 3


def test_large_offset_does_not_spoil_the_correlation():
    rng = np.random.default_rng(0)
    truth = rng.random((50, 4)) + 1e7
    guess = truth + rng.random((50, 4))
    expected = pearsonr(truth.ravel(), guess.ravel())[0]
    assert recovery_scores(truth, guess, chunk_size=3)["Pearson"] == pytest.approx(expected, rel=1e-6)


def test_constant_prediction_has_no_correlation():
    reference, _ = data(1)
    scores = recovery_scores(reference, np.full(reference.shape, 0.1), chunk_size=2)
    assert np.isnan(scores["Pearson"])
    assert np.isnan(scores["Pearson per cell"])
    assert scores["MAE"] > 0


def test_only_rows_are_asked_for():
    reference, predicted = data(3)

    class Rows:
        shape = predicted.shape
        asked = []

        def __getitem__(self, rows):
            self.asked.append((rows.start, rows.stop))
            return predicted[rows]

    lazy = Rows()
    scores = recovery_scores(sparse.csr_matrix(reference), lazy, chunk_size=4)
    assert scores == pytest.approx(recovery_scores(reference, predicted))
    assert lazy.asked == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize(
    ("reference", "predicted", "message"),
    [
        (np.eye(3), np.eye(4), "have the shapes"),
        (np.zeros((2, 2)), np.ones((2, 2)), "no values other than zero"),
        (-np.eye(2), np.ones((2, 2)), "negative"),
        (np.eye(2), np.full((2, 2), np.nan), "2 values of the prediction"),
        (np.array([[np.nan, 1]]), np.ones((1, 2)), "1 values of the reference"),
    ],
)
def test_bad_input(reference, predicted, message):
    with pytest.raises(ValueError, match=message):
        recovery_scores(reference, predicted)
