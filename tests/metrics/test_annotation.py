"""Scores of predicted cell types against scikit-learn, the CellFM reference and cases with a known answer."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from scfm.metrics import annotation_scores, class_scores, confusion_matrix

TRUE = ["a", "a", "a", "b", "b", "c"]
GUESS = ["a", "a", "b", "b", None, "a"]


def test_golden_cellfm(golden):
    case = golden("cellfm", "metrics")
    labels, predicted = case.input["label"], case.input["logits"].argmax(1)
    classes = range(case.input["logits"].shape[1])
    assert len(classes) > len(set(labels) | set(predicted))  # one class occurs nowhere
    scores = annotation_scores(labels, predicted, average="cellfm", classes=classes)
    for name in ("accuracy", "macro f1", "weighted f1", "macro recall", "macro precision"):
        expected = case.expected[f"annotation/{name}"]
        np.testing.assert_allclose(scores[name.replace("f1", "F1")], expected, rtol=case.case["tolerance"]["rtol"])


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("bcde")), min_size=1, max_size=40))
def test_as_scikit_learn(pairs):
    labels, predicted = zip(*pairs, strict=True)
    scores = annotation_scores(labels, predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macro = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
        expected = {
            "accuracy": sk.accuracy_score(labels, predicted),
            "balanced accuracy": sk.balanced_accuracy_score(labels, predicted),
            **dict(zip(("macro precision", "macro recall", "macro F1"), macro, strict=True)),
            "weighted F1": sk.f1_score(labels, predicted, average="weighted", zero_division=0),
            "rejected": 0,
        }
    assert scores == pytest.approx(expected)


def test_rejected_cells_count_in_recall_and_not_in_precision():
    table = class_scores(TRUE, GUESS)
    assert table.loc["a"].to_dict() == {
        "precision": 2 / 3,
        "recall": 2 / 3,
        "F1": 2 / 3,
        "support": 3,
        "predicted": 3,
        "rejected": 0,
    }
    assert table.loc["b", ["precision", "recall", "rejected"]].tolist() == [0.5, 0.5, 1]
    assert np.isnan(table.loc["c", "precision"])
    assert table.loc["c", "recall"] == 0
    scores = annotation_scores(TRUE, GUESS)
    assert scores["accuracy"] == 0.5
    assert scores["rejected"] == pytest.approx(1 / 6)
    assert scores["balanced accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert scores["macro precision"] == pytest.approx((2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
@pytest.mark.parametrize("kind", [list, pd.Series, pd.Categorical])
def test_missing_and_named_rejections_are_alike(missing, kind):
    scores = annotation_scores(kind(TRUE), kind([missing if value is None else value for value in GUESS]))
    named = annotation_scores(TRUE, ["?" if value is None else value for value in GUESS], unknown="?")
    both = annotation_scores([*TRUE, "a", "b"], [*GUESS, "?", "b"], unknown="?")
    assert scores == named == annotation_scores(TRUE, GUESS)
    assert both["rejected"] == 0.25


def test_all_cells_rejected():
    scores = annotation_scores(["a", "b"], [None, None])
    assert scores == dict.fromkeys(scores, 0) | {"rejected": 1}


def test_numbers_beside_missing_values_keep_their_names():
    assert annotation_scores([0, 1, 2], [0.0, 1.0, np.nan])["accuracy"] == pytest.approx(2 / 3)
    assert annotation_scores(pd.Categorical([0, 1]), np.array([0.0, 1.0]))["accuracy"] == 1


def test_confusion_matrix():
    table = confusion_matrix(TRUE, GUESS, classes=["c", "b", "a", "d"])
    assert list(table.index) == ["c", "b", "a", "d"]
    assert list(table.columns) == ["c", "b", "a", "d", "rejected"]
    assert table.loc["a", "b"] == 1
    assert table.loc["c", "a"] == 1
    assert table.loc["b", "rejected"] == 1
    assert table.to_numpy().sum() == len(TRUE)
    rows = confusion_matrix(TRUE, GUESS, normalize="rows", classes=["a", "b", "c", "d"])
    np.testing.assert_allclose(rows.sum(1), [1, 1, 1, 0])
    columns = confusion_matrix(TRUE, GUESS, normalize="columns")
    np.testing.assert_allclose(columns.sum(0), [1, 1, 0, 1])
    assert "rejected" not in confusion_matrix(TRUE, TRUE)


def test_order_of_cells_changes_nothing():
    order = np.random.default_rng(0).permutation(len(TRUE))
    shuffled = np.array(TRUE)[order], np.array(GUESS, dtype=object)[order]
    assert annotation_scores(*shuffled) == annotation_scores(TRUE, GUESS)
    pd.testing.assert_frame_equal(confusion_matrix(*shuffled), confusion_matrix(TRUE, GUESS))


@pytest.mark.parametrize(
    ("labels", "predicted", "options", "message"),
    [
        (["a", None], ["a", "a"], {}, "1 of 2 labels are missing"),
        (["a"], ["a", "b"], {}, "1 labels for 2 cells"),
        ([], [], {}, "no cells"),
        (["a", "?"], ["a", "a"], {"unknown": "?"}, "labelled '\\?'"),
        (["a", "b"], ["a", "z"], {"classes": ["a", "b"]}, "'z', which classes does not"),
        (["a", "b"], ["a", "b"], {"classes": ["a", "b", "a"]}, "twice"),
        (["a", "b"], ["a", "b"], {"average": "micro"}, "'sklearn' or 'cellfm'"),
        ([["a"], ["b"]], ["a", "b"], {}, "one value per cell"),
    ],
)
def test_bad_input(labels, predicted, options, message):
    with pytest.raises(ValueError, match=message):
        annotation_scores(labels, predicted, **options)


def test_confusion_of_a_class_named_like_the_rejected():
    with pytest.raises(ValueError, match="unknown="):
        confusion_matrix(["rejected", "a"], [None, "a"])
    table = confusion_matrix(["rejected", "a"], ["?", "a"], unknown="?")
    assert table.loc["rejected", "?"] == 1
    with pytest.raises(ValueError, match="'rows', 'columns'"):
        confusion_matrix(TRUE, GUESS, normalize="all")


@pytest.mark.parametrize("labels", [[0, 1, 1], [0.0, 1.0, 1.0], ["0", "1", "1"], pd.Categorical([0.0, 1.0, 1.0])])
@pytest.mark.parametrize("predicted", [[0, 1, 1], ["0.0", "1.0", "1.0"], pd.Series([0.0, 1.0, 1.0])])
def test_whole_numbers_are_alike_in_every_type(labels, predicted):
    if isinstance(labels, list) and isinstance(labels[0], str) and isinstance(predicted, list):
        predicted = [float(value) for value in predicted]
    assert annotation_scores(labels, predicted)["accuracy"] == 1


def test_text_that_looks_like_a_number_is_text_among_text():
    assert annotation_scores(["1", "1.0"], ["1.0", "1.0"])["accuracy"] == 0.5
    assert annotation_scores([1, 1.5, None][:2], [1.0, 1.5])["accuracy"] == 1
