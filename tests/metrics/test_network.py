"""Regulatory networks: the scLong reference, and small networks with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm.metrics import _network, cosine_adjacency, edges_from_matrix, network_scores, similarity_adjacency


@pytest.fixture
def case(golden):
    return golden("sclong", "downstream_metrics")


def table(*edges):
    return pd.DataFrame([edge + (1.0,) * (3 - len(edge)) for edge in edges], columns=["source", "target", "weight"])


def test_golden_scores(case):
    expected = json.loads((case.path / "expected.json").read_text())
    known = pd.read_csv(case.path / "label.csv").set_axis(["source", "target"], axis=1)
    edges = pd.read_csv(case.path / "GRN_inference_result.tsv", sep="\t").set_axis(
        ["source", "target", "weight"], axis=1
    )
    scores = network_scores(known, edges)
    rtol = case.case["tolerance"]["rtol"]
    np.testing.assert_allclose(scores["AUPR ratio"], expected["grn_aupr"], rtol=rtol)
    np.testing.assert_allclose(scores["EPR"], expected["grn_epr"], rtol=rtol)
    assert scores["early hits"] == expected["deepsem_evaluate"][0]


def test_golden_edges(case):
    adjacency = case.input["adj_A"]
    tfs = pd.read_csv(case.path / "label.csv")["Gene1"].unique()
    edges = edges_from_matrix(adjacency, [f"g{i}" for i in range(len(adjacency))], sources=[*tfs, "not measured"])
    expected = pd.read_csv(case.path / "GRN_inference_result.tsv", sep="\t").set_axis(edges.columns, axis=1)
    assert edges["weight"].abs().is_monotonic_decreasing
    edges, expected = (frame.set_index(["source", "target"])["weight"].sort_index() for frame in (edges, expected))
    pd.testing.assert_series_equal(edges, expected, rtol=case.case["tolerance"]["rtol"])


@pytest.mark.parametrize("half", [True, False])
def test_golden_adjacency(case, half, monkeypatch):
    states, expected = case.input["gene_rep"], case.expected["getadj"].astype(float)
    rtol = case.case["tolerance"]["getadj"]["rtol"]
    whole = similarity_adjacency(states, half_precision=half)
    # relative to the largest weight; small ones hold the rounding of half precision
    assert np.abs(whole - expected).max() <= rtol * np.abs(expected).max()
    if half:
        large = np.abs(expected) > 1e-3
        np.testing.assert_allclose(whole[large], expected[large], rtol=rtol)
        np.testing.assert_array_equal(whole == 0, expected == 0)
    monkeypatch.setattr(_network, "_CHUNK_VALUES", 70)
    np.testing.assert_allclose(
        similarity_adjacency(states, half_precision=half), whole, atol=1e-4 * np.abs(whole).max()
    )


def test_adjacency_of_genes_without_states(case):
    states = case.input["gene_rep"]
    empty = np.flatnonzero(~states.any((1, 2)))
    assert len(empty) == 1
    zero, uniform = similarity_adjacency(states), similarity_adjacency(states, uniform_if_empty=True)
    assert not zero[empty].any()
    assert uniform[empty[0], empty[0]] == 0
    np.testing.assert_allclose(np.abs(uniform).sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(uniform, empty, 0), np.delete(zero, empty, 0))


def test_adjacency_by_hand():
    # rows become [.25, .75, .5] (the zero by the median of .25 and .75), [.5, .5, .5] and [-.5, .5, .5];
    # products: first with second .75, first with third .5, second with third .25
    states = np.array([[1.0, 3, 0], [2, 2, 0], [-2, 2, 0]])
    expected = [[0, 0.75 / 1.25, 0.5 / 1.25], [0.75, 0, 0.25], [0.5 / 0.75, 0.25 / 0.75, 0]]
    np.testing.assert_allclose(similarity_adjacency(states), expected, rtol=1e-6)
    np.testing.assert_allclose(similarity_adjacency(states.reshape(3, 3, 1)), expected, rtol=1e-6)


def test_scores_by_hand():
    known = table(("a", "b"), ("a", "c"))  # pairs: a with a, b, c
    perfect = network_scores(known, table(("a", "b", -5), ("a", "c", 3), ("a", "z", 9), ("b", "a", 9)))
    assert perfect == pytest.approx({"AUPR": 1, "AUPR ratio": 1.5, "early hits": 2, "EPR": 1})
    known = table(("a", "b"), ("d", "c"))
    # pairs without a gene itself: a-b, a-c, a-d, d-a, d-b, d-c; the two strongest hold one of two known
    scores = network_scores(known, table(("a", "b", 0.9), ("d", "b", -0.8), ("d", "c", 0.1)))
    assert scores["early hits"] == 1
    assert scores["EPR"] == pytest.approx(1 / (2 * 2 / 6))
    assert scores["AUPR"] == pytest.approx((1 + 2 / 3) / 2)


def test_stronger_of_repeated_edges_and_edges_of_a_gene_to_itself():
    known = table(("a", "b"), ("a", "c"))
    scores = network_scores(known, table(("a", "b", 0.1), ("a", "b", -3), ("a", "a", 2), ("a", "c", 1)))
    assert scores["early hits"] == 1  # the edge of a to itself is the second
    assert scores["EPR"] == pytest.approx(1 / (2 * 2 / (1 * 3 - 1)))
    assert scores["AUPR"] == pytest.approx((1 + 2 / 3) / 2)
    # a known edge of a gene to itself is one of the K
    known = table(("a", "b"), ("a", "a"), ("d", "c"))
    scores = network_scores(known, table(("a", "b", 3), ("d", "b", 2), ("d", "c", 1)))
    assert scores["early hits"] == 2
    assert scores["EPR"] == pytest.approx(2 / (3 * 3 / (2 * 4 - 2)))


def test_ties_at_the_boundary_count_on_average():
    known = table(("a", "b"))
    edges = table(("a", "b"), ("a", "c"), ("a", "d"))
    known = pd.concat([known, table(("d", "c"))])
    assert network_scores(known, edges)["early hits"] == pytest.approx(2 / 3)


@given(st.randoms(use_true_random=False), st.integers(0, 10_000))
def test_order_of_edges_changes_nothing(random, seed):
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in "abc" for b in "abcdefg"]
    known = table(*(pairs[i] for i in rng.choice(len(pairs), 6, replace=False)))
    edges = table(*((*pairs[i], float(rng.integers(-3, 4))) for i in rng.choice(len(pairs), 14, replace=False)))
    order = list(range(14))
    random.shuffle(order)
    assert network_scores(known, edges.iloc[order]) == pytest.approx(network_scores(known, edges))


def test_no_predicted_edges():
    scores = network_scores(table(("a", "b"), ("a", "c")), table())
    assert scores["early hits"] == scores["EPR"] == 0
    assert scores["AUPR ratio"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("known", "edges", "message"),
    [
        (table(("a", "b")).drop(columns="source"), table(("a", "b")), "known lacks the column source"),
        (table(("a", "b")), table(("a", "b")).drop(columns="weight"), "edges lacks the column weight"),
        (table(), table(("a", "b")), "no edges"),
        (table(("a", "b")), table(("a", "b", np.nan)), "not finite"),
    ],
)
def test_scores_bad_input(known, edges, message):
    with pytest.raises(ValueError, match=message):
        network_scores(known, edges)


def test_matrix_bad_input():
    with pytest.raises(ValueError, match="there are 2 genes"):
        edges_from_matrix(np.eye(3), ["a", "b"])
    with pytest.raises(ValueError, match="at least two genes"):
        similarity_adjacency(np.ones((1, 4)))
    with pytest.raises(ValueError, match="not finite"):
        similarity_adjacency(np.array([[1, np.nan], [1, 2]]))


def test_cosine_adjacency_by_hand():
    vectors = np.array([[1.0, 0], [1, 1], [0, 0], [np.nan, 1], [-2, 0]])
    expected = np.array([[0, 1, 0, 0, -np.sqrt(2)], [1, 0, 0, 0, -1], *np.zeros((2, 5)), [-np.sqrt(2), -1, 0, 0, 0]])
    expected /= np.sqrt(2)
    np.testing.assert_allclose(cosine_adjacency(vectors, uniform_if_empty=False), expected, atol=1e-6)
    expected[[2, 3]] = 0.25
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(cosine_adjacency(vectors), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [(np.zeros((1, 3)), "two genes"), (np.zeros(3), "two genes"), (np.full((2, 2), np.inf), "infinite")],
)
def test_cosine_adjacency_of_wrong_vectors(vectors, message):
    with pytest.raises(ValueError, match=message):
        cosine_adjacency(vectors)
