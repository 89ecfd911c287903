"""Scores of predicted responses against the CellFM reference and scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix
from scipy.stats import pearsonr
from sklearn.metrics import r2_score

from scfm.metrics import condition_means, de_quantiles, perturbation_scores

CELLFM = {
    "MSE": "MSE",
    "PCC1": "Pearson",
    "PCC2": "Pearson paired delta",
    "PCC3": "Pearson delta",
    "R2": "R2",
}


def test_golden_cellfm(golden):
    case = golden("cellfm", "metrics")
    names = {tuple(map(int, key.strip("()").split(","))): name for key, name in case.case["pert_names"].items()}
    conditions = [names[tuple(pair)] for pair in case.input["pert_id"].tolist()]
    order = sorted(names.values())
    observed, predicted, paired = (
        condition_means(case.input[name], conditions, names=order) for name in ("target", "pred", "source")
    )
    scores = perturbation_scores(
        observed,
        predicted,
        case.input["ctrl"].mean(0),
        paired_control=paired,
        de_genes=[case.input[f"de/{name}"] for name in order],
    )
    assert list(scores.index) == order
    for theirs, ours in CELLFM.items():
        for their_prefix, our_prefix in {"": "", "de_": "DE "}.items():
            expected = case.expected[f"perturbation/{their_prefix}{theirs}"]
            found = scores[our_prefix + ours].mean()
            np.testing.assert_allclose(found, expected, rtol=case.case["tolerance"]["rtol"], err_msg=theirs)


@given(seed=st.integers(0, 2**32 - 1), n_de=st.integers(2, 9))
@settings(max_examples=25)
def test_each_condition_as_scipy_and_scikit_learn(seed, n_de):
    rng = np.random.default_rng(seed)
    observed, predicted, control = rng.normal(3, 1, (4, 9)), rng.normal(3, 1, (4, 9)), rng.normal(3, 1, 9)
    genes = [rng.choice(9, n, replace=False) for n in (n_de, 9, 2, n_de)]
    scores = perturbation_scores(observed, predicted, control, de_genes=genes)
    for i, chosen in enumerate(genes):
        truth, guess, base = observed[i, chosen], predicted[i, chosen], control[chosen]
        expected = {
            "DE MSE": np.mean((truth - guess) ** 2),
            "DE Pearson": pearsonr(truth, guess)[0],
            "DE Pearson delta": pearsonr(truth - base, guess - base)[0],
            "DE R2": r2_score(truth, guess),
        }
        assert scores.loc[i, list(expected)].to_dict() == pytest.approx(expected)


def test_no_change_has_no_direction():
    observed, control = np.array([[1.0, 2, 3]]), np.array([0.1, 0.7, 0.3])
    scores = perturbation_scores(observed, control[None], control)
    assert np.isnan(scores.loc[0, "Pearson delta"])
    assert scores.loc[0, "R2"] < 0
    flat = perturbation_scores(np.full((1, 3), 0.1), observed, control)
    assert np.isnan(flat.loc[0, ["Pearson", "R2"]]).all()
    assert np.isfinite(flat.loc[0, "Pearson delta"])
    assert "Pearson paired delta" not in flat
    assert "DE MSE" not in flat


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix, csc_matrix])
def test_means_of_conditions(kind):
    expression = np.array([[1.0, 0, 2], [3, 0, 0], [5, 6, 0], [0, 0, 8]])
    table = condition_means(kind(expression), ["b", "a", "b", "c"])
    assert list(table.index) == ["a", "b", "c"]
    np.testing.assert_array_equal(table, [[3, 0, 0], [3, 3, 1], [0, 0, 8]])
    assert list(condition_means(kind(expression), ["b", "a", "b", "c"], names=["c", "a"]).index) == ["c", "a"]


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix, csc_matrix])
def test_share_of_changed_genes_near_the_median(kind):
    rng = np.random.default_rng(0)
    expression, labels = np.maximum(rng.normal(1, 1, (60, 9)), 0), np.array(["b", "a", "b"] * 20)
    genes = [np.array([8, 0, 3]), np.array([1, 2])]
    low, high = de_quantiles(kind(expression), labels, genes, names=["b", "a"])
    assert list(low.index) == ["b", "a"]
    for name, chosen in zip(("b", "a"), genes, strict=True):
        block = expression[labels == name][:, chosen]
        np.testing.assert_allclose(low.loc[name, chosen], np.quantile(block, 0.45, axis=0))
        np.testing.assert_allclose(high.loc[name, chosen], np.quantile(block, 0.55, axis=0))
        assert low.loc[name].notna().sum() == len(chosen)
    truth = condition_means(expression, labels, names=["b", "a"]).to_numpy()
    guess = truth.copy()
    # one of three between the limits, one on a limit; both genes of the other beyond them
    guess[0, 8], guess[0, 0], guess[0, 3] = (low.loc["b", 8] + high.loc["b", 8]) / 2, high.loc["b", 0], 99
    guess[1, 1:3] = -1
    scores = perturbation_scores(truth, guess, truth[0], de_genes=genes, quantiles=(low, high))
    assert scores["DE within quantiles"].tolist() == pytest.approx([2 / 3, 0])
    with pytest.raises(ValueError, match="those of de_genes"):
        perturbation_scores(truth, guess, truth[0], quantiles=(low, high))
    with pytest.raises(ValueError, match="quantiles holds values that are missing"):
        perturbation_scores(truth, guess, truth[0], de_genes=genes[::-1], quantiles=(low, high))


def test_changed_genes_without_dropouts_have_scores_of_their_own():
    rng = np.random.default_rng(1)
    truth, guess, control = rng.random((2, 6)), rng.random((2, 6)), rng.random(6)
    usual, other = [[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [0, 4, 5]]
    both = perturbation_scores(truth, guess, control, de_genes=usual, non_dropout_de_genes=other)
    alone = perturbation_scores(truth, guess, control, de_genes=other).filter(like="DE ")
    assert set(both.columns) >= {f"non-dropout {name}" for name in alone}
    np.testing.assert_allclose(both[[f"non-dropout {name}" for name in alone]], alone)
    with pytest.raises(ValueError, match="no non_dropout_de_genes"):
        perturbation_scores(truth, guess, control, non_dropout_de_genes=[[0], []])


def test_means_bad_input():
    with pytest.raises(ValueError, match="no cells have the condition 'd'"):
        condition_means(np.eye(3), list("abc"), names=["a", "d"])
    with pytest.raises(ValueError, match="1 of 3 conditions are missing"):
        condition_means(np.eye(3), ["a", None, "c"])
    with pytest.raises(ValueError, match="2 conditions for 3 cells"):
        condition_means(np.eye(3), ["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": np.ones((2, 4))}, "predicted has the shape"),
        ({"control": np.ones(4)}, "control has the shape"),
        ({"paired_control": np.ones(3)}, "paired_control has the shape"),
        ({"predicted": np.full((2, 3), np.nan)}, "predicted holds values that are missing"),
        ({"observed": np.full((2, 3), np.inf)}, "observed holds values that are missing"),
        ({"de_genes": [[0, 1]]}, "genes for 1 conditions"),
        ({"de_genes": [[0, 1], []]}, "no de_genes"),
        ({"de_genes": [[0, 1], [3]]}, "positions of genes, from 0 to 2"),
        ({"de_genes": [[True, False, True]] * 2}, "positions of genes"),
        ({"de_genes": [["g1"], ["g2"]]}, "positions of genes"),
    ],
)
def test_bad_input(change, message):
    given_values = {"observed": np.eye(2, 3), "predicted": np.eye(2, 3), "control": np.ones(3)} | change
    with pytest.raises(ValueError, match=message):
        perturbation_scores(**given_values)


def test_tables_must_have_the_same_conditions():
    observed = pd.DataFrame(np.eye(2, 3), index=["a", "b"])
    with pytest.raises(ValueError, match="reindex"):
        perturbation_scores(observed, observed.loc[["b", "a"]], np.ones(3))


def test_golden_gears(golden):
    case = golden("scfoundation", "gears_utils")
    expected = json.loads((case.path / "expected.json").read_text())
    names = np.unique(case.input["metric_cat"])
    observed, predicted = (
        condition_means(case.input[f"metric_{what}"], case.input["metric_cat"]) for what in ("truth", "pred")
    )
    # the first 20 genes count as the most changed ones in this case
    scores = perturbation_scores(
        observed, predicted, np.zeros(observed.shape[1]), de_genes=[np.arange(20)] * len(names)
    )
    ours = {"mse": "MSE", "pearson": "Pearson", "mse_de": "DE MSE", "pearson_de": "DE Pearson"}
    for name in names:
        for theirs, column in ours.items():
            if name != "ctrl" or not theirs.endswith("_de"):  # GEARS counts 0 there
                wanted = expected["metrics_pert"][name][theirs]
                np.testing.assert_allclose(scores.loc[name, column], wanted, rtol=1e-5, err_msg=f"{name} {theirs}")
    for theirs in ("mse", "pearson"):
        np.testing.assert_allclose(scores[ours[theirs]].mean(), expected["metrics"][theirs], rtol=1e-5)


def test_golden_scgpt(golden):
    case = golden("scgpt", "perturbation")
    names, genes = case.input["m_conds"], pd.Index(case.input["m_genes"])
    truth, guess = (
        condition_means(case.input[f"m_{what}"], case.input["m_pert_cat"], names=names) for what in ("truth", "pred")
    )
    # as theirs, with float32 sums, which differ by 1e-8
    control = np.asarray(csr_matrix(case.input["m_ctrl"]).mean(0)).ravel()
    ours = {"pearson": "Pearson", "pearson_de": "DE Pearson", "pearson_delta": "Pearson delta", "pearson_de_delta": "DE Pearson delta"}  # fmt: skip
    de = [genes.get_indexer(row[:20]) for row in case.input["m_de"]]
    scores = perturbation_scores(truth, guess, control, de_genes=de)
    rows = []
    for row, name in enumerate(names):
        # their option non_zero_genes: genes that the perturbed cells express
        kept = np.flatnonzero(truth.loc[name])
        place = pd.Index(kept).get_indexer(genes.get_indexer(case.input["m_nondropout"][row]))
        parts = [table.loc[[name]].iloc[:, kept] for table in (truth, guess)]
        rows.append(perturbation_scores(*parts, control[kept], de_genes=[place[place >= 0]]))
    for option, table in ((0, scores), (1, pd.concat(rows))):
        for theirs, column in ours.items():
            expected = case.expected[f"metrics__nz{option}__raw1__{theirs}"]
            found = table[column].sort_index()  # the authors sort them
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=f"{option} {theirs}")
            mean = case.expected[f"metrics__nz{option}__raw0__{theirs}"]
            np.testing.assert_allclose(table[column].mean(), mean, rtol=1e-9)
