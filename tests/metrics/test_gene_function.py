"""Scores of gene function: by hand (the CellFM reference is in the tests of the task)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.metrics import gene_function_scores


def test_perfect_and_useless_predictions():
    labels = np.array([1, 1, 0, 0])
    assert gene_function_scores(labels, np.array([0.9, 0.8, 0.2, 0.1])) == {"AUPR": 1.0, "AUROC": 1.0, "Fmax": 1.0}
    same = gene_function_scores(labels, np.full(4, 0.5))
    assert same["AUROC"] == 0.5
    assert same["Fmax"] == pytest.approx(1 / 3)  # F1 2/3 of one answer, 0 of the other


def f1(known, predicted):
    return 2 * (known & predicted).sum() / max(known.sum() + predicted.sum(), 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.booleans())
def test_fmax_is_the_largest_macro_f1(seed, several):
    rng = np.random.default_rng(seed)
    shape = (12, 3) if several else (20,)
    labels = rng.integers(0, 2, shape)
    labels.flat[:2] = 0, 1
    probabilities = np.round(rng.random(shape), 2)
    yes = labels.ravel() == 1
    expected = max(
        np.mean([f1(yes, chosen), f1(~yes, ~chosen)])
        for chosen in (probabilities.ravel() > threshold for threshold in np.arange(100) / 100)
    )
    assert gene_function_scores(labels, probabilities)["Fmax"] == pytest.approx(expected)


def test_one_answer_only():
    scores = gene_function_scores(np.zeros(3), np.array([0.1, 0.2, 0.3]))
    assert np.isnan([scores["AUPR"], scores["AUROC"]]).all()


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.5], "shape"),
        ([], [], "shape"),
        ([0, 2], [0.5, 0.5], "0 or 1"),
        ([0, 1], [0.5, np.nan], "finite"),
    ],
)
def test_wrong_input(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        gene_function_scores(np.array(labels), np.array(probabilities))
