"""Neighbours are exact whatever the numbers look like, and votes are what counting by hand gives."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import KNeighborsClassifier

from scfm import MissingExtraError
from scfm.tasks.neighbors import Neighbors, find_neighbors, vote

examples = settings(max_examples=60, deadline=None)


def by_hand(reference, query, k, metric="euclidean"):
    """All distances, sorted; rows with missing values are nobody's neighbour."""
    reference, query = reference.astype(float), query.astype(float)
    if metric == "cosine":
        reference, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, query))
    distances = ((query[:, None] - reference[None]) ** 2).sum(-1) / (2 if metric == "cosine" else 1)
    distances[:, np.isnan(reference).any(1)] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def random_rows(seed, n, dim, *, kind="normal"):
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    if kind == "whole":  # many ties
        rows = rows.round()
    elif kind == "offset":
        rows += 3e3
    elif kind == "huge":
        rows *= 1e30
    elif kind == "small":
        rows *= 1e-30
    return rows.astype(np.float32)


@pytest.fixture(params=["exact", "faiss"])
def index(request):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return request.param


# -- search ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "whole", "offset", "huge", "small"])
@pytest.mark.parametrize("dim", [1, 3, 40])
def test_search_is_exact(index, kind, dim):
    reference, query = random_rows(0, 300, dim, kind=kind), random_rows(1, 50, dim, kind=kind)
    found = find_neighbors(reference, query, 12, index=index)
    distances, indices = by_hand(reference, query, 12)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


@examples
@given(
    st.integers(0, 1000),
    st.sampled_from(["normal", "whole", "offset"]),
    st.integers(1, 2**16),
    st.integers(1, 30),
    st.sampled_from(["euclidean", "cosine"]),
)
def test_size_of_blocks(seed, kind, block_bytes, k, metric):
    reference, query = random_rows(seed, 60, 3, kind=kind), random_rows(seed + 1, 15, 3, kind=kind)
    whole = find_neighbors(reference, query, k, metric=metric)
    parts = find_neighbors(reference, query, k, metric=metric, block_bytes=block_bytes)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_array_equal(parts.distances, whole.distances)


@examples
@given(st.permutations(range(40)), st.permutations(range(9)), st.sampled_from(["normal", "whole"]))
def test_order_of_rows(rows, queries, kind):
    reference, query = random_rows(3, 40, 4, kind=kind), random_rows(4, 9, 4, kind=kind)
    straight = find_neighbors(reference, query, 5)
    moved = find_neighbors(reference[rows], query[queries], 5)
    np.testing.assert_array_equal(moved.distances, straight.distances[queries])
    if kind == "normal":  # no ties
        np.testing.assert_array_equal(np.asarray(rows)[moved.indices], straight.indices[queries])
    # of equally distant rows, the first one in either order is nearer
    ties = moved.distances[:, 1:] == moved.distances[:, :-1]
    assert (np.diff(moved.indices, axis=1)[ties] > 0).all()
    assert ties.any() == (kind == "whole")


@examples
@given(
    hnp.arrays(np.float32, (12, 2), elements=st.sampled_from([0.0, 1.0, 1.5, -2.0, np.nan, np.inf])),
    hnp.arrays(np.float32, (5, 2), elements=st.sampled_from([0.0, 1.0, -2.0, np.nan])),
    st.sampled_from(["euclidean", "cosine"]),
)
def test_rows_without_values(reference, query, metric):
    good = np.isfinite(reference).all(1) & ((metric == "euclidean") | (reference != 0).any(1))
    asked = np.isfinite(query).all(1) & ((metric == "euclidean") | (query != 0).any(1))
    if good.sum() < 3:
        with pytest.raises(ValueError, match="choose a smaller k"):
            find_neighbors(reference, query, 3, metric=metric)
        return
    found = find_neighbors(reference, query, 3, metric=metric)
    assert (found.indices[~asked] == -1).all()
    assert np.isnan(found.distances[~asked]).all()
    assert good[found.indices[asked]].all()
    without = find_neighbors(reference[good], query[asked], 3, metric=metric)
    np.testing.assert_array_equal(found.distances[asked], without.distances)
    np.testing.assert_array_equal(found.indices[asked], np.flatnonzero(good)[without.indices])


def test_cosine(index):
    reference, query = random_rows(0, 200, 10), random_rows(1, 30, 10)
    found = find_neighbors(reference, query, 7, metric="cosine", index=index)
    distances, indices = by_hand(reference, query, 7, "cosine")
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, atol=1e-12)
    scaled = find_neighbors(reference * 1e-30, query * 1e25, 7, metric="cosine", index=index)
    np.testing.assert_array_equal(scaled.indices, indices)


def test_duplicates_come_in_order(index):
    reference = np.repeat(random_rows(0, 3, 5), 100, axis=0)
    reference = reference[np.random.default_rng(1).permutation(300)]
    query = reference[:4] + 0.01
    found = find_neighbors(reference, query, 50, index=index, block_bytes=5000)
    for i in range(4):
        np.testing.assert_array_equal(found.indices[i], np.flatnonzero((reference == reference[i]).all(1))[:50])


def test_a_query_that_is_very_far_away(index):
    reference = random_rows(0, 60, 4)
    query = np.full((1, 4), 1e25, dtype=np.float32)
    found = find_neighbors(reference.astype(np.float64) * 1e-20, query, 5, index=index)
    assert len(set(found.indices[0])) == 5
    assert (found.indices >= 0).all()
    assert (found.distances > 1e50).all()


def test_all_rows_are_the_same(index):
    reference = np.ones((30, 3))
    found = find_neighbors(reference, reference[:2], 4, index=index)
    np.testing.assert_array_equal(found.indices, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(found.distances, 0)


def test_no_queries():
    found = find_neighbors(np.ones((3, 2)), np.ones((0, 2)), 2)
    assert found.indices.shape == found.distances.shape == (0, 2)
    assert vote(found, [0, 1, 1], 2).probabilities.shape == (0, 2)


def test_wrong_input():
    rows = np.ones((4, 2))
    with pytest.raises(ValueError, match="4 rows with values .4 in all.; choose a smaller k"):
        find_neighbors(rows, rows, 5)
    with pytest.raises(ValueError, match="the reference has 2 columns and the query 3"):
        find_neighbors(rows, np.ones((4, 3)), 1)
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match="k must be a positive whole number"):
            find_neighbors(rows, rows, k)
    with pytest.raises(ValueError, match="metric must be one of euclidean, cosine; got 'l1'"):
        find_neighbors(rows, rows, 1, metric="l1")
    with pytest.raises(ValueError, match="index must be one of exact, faiss"):
        find_neighbors(rows, rows, 1, index="hnsw")
    with pytest.raises(ValueError, match=r"the query must be a numeric array of shape \(rows, dim\)"):
        find_neighbors(rows, rows[0], 1)


def test_faiss_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"scfm\[faiss\]"):
        find_neighbors(np.ones((3, 2)), np.ones((3, 2)), 1, index="faiss")


# -- votes -----------------------------------------------------------------------------------------------------------------

labels_and_neighbors = st.integers(0, 10_000).map(
    lambda seed: (
        np.random.default_rng(seed).integers(0, 4, 20),
        find_neighbors(random_rows(seed, 20, 2, kind="whole"), random_rows(seed + 1, 12, 2), 6),
    )
)


@examples
@given(labels_and_neighbors, st.sampled_from([1, 2**20]))
def test_majority(given_, block_bytes):
    codes, neighbors = given_
    votes = vote(neighbors, codes, 4, block_bytes=block_bytes)
    for i in range(12):
        counts = Counter(codes[neighbors.indices[i]].tolist())
        np.testing.assert_allclose(votes.probabilities[i], [counts[label] / 6 for label in range(4)], rtol=1e-6)
        most = max(counts.values())
        assert votes.confidence[i] == most / 6
        nearest = {
            label: min(
                d for d, n in zip(neighbors.distances[i], neighbors.indices[i], strict=True) if codes[n] == label
            )
            for label, count in counts.items()
            if count == most
        }
        assert votes.codes[i] == min(nearest, key=lambda label: (nearest[label], label))


@examples
@given(labels_and_neighbors)
def test_proportions(given_):
    codes, neighbors = given_
    votes = vote(neighbors, codes, 4, weights="proportion")
    share = [np.mean(codes == label) for label in range(4)]
    for i in range(12):
        counts = Counter(codes[neighbors.indices[i]].tolist())
        weighted = [max(counts[label] - 0.06, 0) / (share[label] or 1) for label in range(4)]
        np.testing.assert_allclose(votes.probabilities[i], np.divide(weighted, sum(weighted)), rtol=1e-6)
        assert votes.confidence[i] == pytest.approx(max(weighted) / sum(weighted))
        assert weighted[votes.codes[i]] == pytest.approx(max(weighted))


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_like_scikit_learn(weights):
    reference, query = random_rows(0, 150, 3), random_rows(1, 40, 3)
    query[:5] = reference[:5]  # at distance zero
    codes = np.random.default_rng(2).integers(0, 5, 150)
    votes = vote(find_neighbors(reference, query, 9), codes, 5, weights=weights)
    other = KNeighborsClassifier(9, weights=weights, algorithm="brute").fit(reference.astype(float), codes)
    expected = other.predict_proba(query.astype(float))
    np.testing.assert_allclose(votes.probabilities, expected, atol=1e-6)
    clear = np.sort(expected, axis=1)[:, -1] > np.sort(expected, axis=1)[:, -2] + 1e-9
    np.testing.assert_array_equal(votes.codes[clear], other.predict(query.astype(float))[clear])


def test_distance_of_the_cosine_is_not_squared():
    neighbors = Neighbors(np.array([[0.1, 0.4]]), np.array([[0, 1]]), "cosine")
    np.testing.assert_allclose(vote(neighbors, [0, 1], 2, weights="distance").probabilities, [[0.8, 0.2]], rtol=1e-6)
    neighbors = Neighbors(neighbors.distances**2, neighbors.indices)
    np.testing.assert_allclose(vote(neighbors, [0, 1], 2, weights="distance").probabilities, [[0.8, 0.2]], rtol=1e-6)


def test_ties():
    distances = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 2.0, 3.0]])
    indices = np.array([[3, 1, 2, 0], [3, 1, 2, 0], [4, 3, 1, 2]])
    votes = vote(Neighbors(distances, indices), [0, 0, 1, 1, 2], 3)
    # the nearest neighbour has label 1; both have one at distance 1; label 1 is ahead by votes
    np.testing.assert_array_equal(votes.codes, [1, 0, 1])
    np.testing.assert_allclose(votes.confidence, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("weights", ["uniform", "distance", "proportion"])
def test_cells_and_neighbors_without_labels(weights):
    distances = np.array([[np.nan, np.nan], [1.0, np.nan], [1.0, 1.0], [0.0, 4.0]])
    indices = np.array([[-1, -1], [0, -1], [1, 2], [0, 1]])
    votes = vote(Neighbors(distances, indices), [0, 1, -1], 2, weights=weights)
    np.testing.assert_array_equal(votes.codes[:3], [-1, 0, 1])
    np.testing.assert_array_equal(votes.confidence[:3], [np.nan, 1, 1])
    assert np.isnan(votes.probabilities[0]).all()
    assert votes.codes[3] == 0
    assert votes.confidence[3] == (1.0 if weights == "distance" else 0.5)


def test_nothing_is_left_of_single_votes_among_very_many():
    neighbors = Neighbors(np.ones((1, 100)), np.arange(100)[None])
    votes = vote(neighbors, np.arange(100), 100, weights="proportion")
    assert votes.codes[0] == -1
    assert np.isnan(votes.confidence[0])
    assert vote(neighbors, np.arange(100), 100).codes[0] == 0


def test_given_proportions():
    neighbors = Neighbors(np.ones((1, 3)), np.array([[0, 1, 2]]))
    votes = vote(neighbors, [0, 0, 1], 2, weights="proportion", proportions=[0.9, 0.1])
    assert votes.codes[0] == 1
    assert votes.confidence[0] == pytest.approx(9.7 / (9.7 + 1.97 / 0.9))


def test_wrong_votes():
    neighbors = Neighbors(np.ones((1, 2)), np.array([[0, 3]]))
    with pytest.raises(ValueError, match="there are 2 labels, but a neighbour has number 3"):
        vote(neighbors, [0, 1], 2)
    with pytest.raises(ValueError, match="codes must be whole numbers from 0 to 1"):
        vote(neighbors, [0, 1, 2, 0], 2)
    with pytest.raises(ValueError, match="codes must be whole numbers"):
        vote(neighbors, [0.0, 1.0, 1.0, 0.0], 2)
    with pytest.raises(ValueError, match="at least one label"):
        vote(neighbors, [-1] * 4, 0)
    with pytest.raises(ValueError, match="weights must be one of uniform, distance, proportion"):
        vote(neighbors, [0] * 4, 1, weights="majority")
    with pytest.raises(ValueError, match="one entry for each of the 2 labels"):
        vote(neighbors, [0, 1, 1, 0], 2, weights="proportion", proportions=[1.0])


# -- what the authors' code gives --------------------------------------------------------------------------------------------


def test_golden(golden, index):
    case = golden("scgpt", "reference_mapping")
    names, codes = np.unique(case.input["ref_labels"], return_inverse=True)
    neighbors = find_neighbors(case.input["reference"], case.input["query"], case.case["config"]["k"], index=index)
    np.testing.assert_array_equal(neighbors.indices, case.expected["neighbours"])
    np.testing.assert_allclose(neighbors.distances, case.expected["distances_sq"], atol=1e-5)

    order = [list(names).index(name) for name in ("Bcell", "Mono", "NK", "Tcell")]
    counts = case.expected["counts"]
    majority = vote(neighbors, codes, len(names))
    np.testing.assert_allclose(majority.probabilities[:, order] * counts.sum(1, keepdims=True), counts, atol=1e-5)
    np.testing.assert_allclose(majority.confidence, case.expected["vote_prob"], atol=1e-5)
    unique = (counts == counts.max(1, keepdims=True)).sum(1) == 1
    assert unique.sum() >= 4
    for upstream in ("pred_value_counts", "vote_first"):
        np.testing.assert_array_equal(names[majority.codes][unique], case.expected[upstream][unique])

    weighted = vote(neighbors, codes, len(names), weights="proportion")
    np.testing.assert_allclose(weighted.confidence, case.expected["wvote_prob"], atol=1e-5)
    winners = (weighted.probabilities == weighted.probabilities.max(1, keepdims=True)).sum(1) == 1
    assert winners.sum() >= 4
    np.testing.assert_array_equal(names[weighted.codes][winners], case.expected["wvote_first"][winners])
