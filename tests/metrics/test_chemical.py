"""Scores of drug signatures: the scLong reference, and cases with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from scfm.metrics import signature_scores


def test_golden_sclong(golden):
    case = golden("sclong", "downstream_metrics")
    expected = json.loads((case.path / "expected.json").read_text())["deepce"]
    scores = signature_scores(case.input["deepce_label"], case.input["deepce_pred"])
    rtol = case.case["tolerance"]["rtol"]
    for theirs, ours in {"rmse": "RMSE", "pearson": "Pearson", "spearman": "Spearman"}.items():
        np.testing.assert_allclose(scores[ours], expected[theirs], rtol=rtol)
    for k, (negative, positive) in expected["precision_neg_pos"].items():
        np.testing.assert_allclose(scores[f"negative precision@{k}"], negative, rtol=rtol)
        np.testing.assert_allclose(scores[f"positive precision@{k}"], positive, rtol=rtol)


def test_top_and_bottom_genes_are_told_apart():
    observed = np.arange(8.0)[None]
    predicted = np.array([[7.0, 1, 2, 3, 4, 5, 6, 7.5]])  # the smallest is taken for one of the largest
    scores = signature_scores(observed, predicted, ks=[1, 2], n_true=2)
    assert scores["positive precision@1"] == 1
    assert scores["positive precision@2"] == 0.5
    assert scores["negative precision@1"] == 1  # gene 1
    assert scores["negative precision@2"] == 0.5  # genes 1 and 2


def test_ranks_with_ties_and_constant_samples():
    observed = np.array([[1.0, 1, 2, 3], [0, 1, 2, 3]])
    predicted = np.array([[3.0, 1, 1, 4], [5, 5, 5, 5]])
    scores = signature_scores(observed, predicted, ks=[2], n_true=2)
    assert scores["Spearman"] == pytest.approx(spearmanr(observed[0], predicted[0])[0])
    assert np.isnan(signature_scores(observed[1:], predicted[1:], ks=[2], n_true=2)["Pearson"])


@pytest.mark.parametrize(
    ("observed", "predicted", "options", "message"),
    [
        (np.eye(3), np.eye(4), {}, "one shape"),
        (np.eye(3), np.eye(3), {}, "number of genes, 3"),
        (np.eye(3), np.eye(3), {"ks": [0], "n_true": 2}, "between 1"),
        (np.eye(3), np.full((3, 3), np.nan), {"ks": [1], "n_true": 1}, "missing"),
    ],
)
def test_bad_input(observed, predicted, options, message):
    with pytest.raises(ValueError, match=message):
        signature_scores(observed, predicted, **options)
