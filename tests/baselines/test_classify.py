"""The two standard classifiers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scfm.baselines import knn_labels, logistic_labels

GENES = [f"g{i}" for i in range(60)]
CLASSIFIERS = pytest.mark.parametrize("classify", [knn_labels, logistic_labels])


def cells(n, seed, genes=GENES):
    """Three types, each with ten marker genes."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 3, n)
    rate = np.full((n, len(GENES)), 0.5)
    for kind in range(3):
        rate[types == kind, 10 * kind : 10 * kind + 10] = 6
    counts = pd.DataFrame(rng.poisson(rate), columns=GENES)[genes].to_numpy(dtype=np.float32)
    obs = pd.DataFrame(
        {"type": pd.Categorical(np.array(["T", "B", "NK"])[types])}, index=[f"s{seed}_{i}" for i in range(n)]
    )
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))


@CLASSIFIERS
def test_separated_types_are_found(classify):
    reference, query = cells(90, 0), cells(40, 1)
    before = reference.X.copy(), query.X.copy()
    labels, probabilities = classify(reference, query, "type", n_top_genes=30)
    assert (labels == query.obs["type"].astype(str)).mean() > 0.97
    assert list(labels.index) == list(probabilities.index) == list(query.obs_names)
    assert list(probabilities.columns) == ["B", "NK", "T"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert (probabilities.idxmax(axis=1) == labels).all()
    for was, adata in zip(before, (reference, query), strict=True):
        assert (was != adata.X).nnz == 0


@CLASSIFIERS
def test_genes_are_matched_by_name(classify):
    reference, query = cells(90, 0), cells(40, 1)
    order = np.random.default_rng(5).permutation(60)
    shuffled = query[:, order].copy()
    smaller = cells(40, 1, GENES[5:55])
    strangers = AnnData(sparse.csr_matrix((40, 3), dtype=np.float32), var=pd.DataFrame(index=["x", "y", "z"]))
    larger = AnnData(sparse.hstack([shuffled.X, strangers.X + 0], format="csr"), obs=shuffled.obs)
    larger.var_names = [*shuffled.var_names, "x", "y", "z"]
    expected = classify(reference, query, "type").probabilities
    for same in (shuffled, larger):
        pd.testing.assert_frame_equal(classify(reference, same, "type").probabilities, expected, rtol=1e-3, atol=1e-3)
    fewer = classify(reference, smaller, "type").labels
    pd.testing.assert_series_equal(fewer, classify(reference[:, 5:55].copy(), smaller, "type").labels)


@CLASSIFIERS
def test_query_does_not_choose_the_genes_nor_change_another_cell(classify):
    reference, query = cells(90, 0), cells(40, 1)
    everything = classify(reference, query, "type", n_top_genes=20).probabilities
    alone = classify(reference, query[3:4].copy(), "type", n_top_genes=20).probabilities
    pd.testing.assert_frame_equal(alone, everything.iloc[3:4], rtol=1e-4)


@CLASSIFIERS
def test_unlabelled_reference_cells_are_left_out(classify):
    reference, query = cells(90, 0), cells(40, 1)
    partly = reference.copy()
    partly.obs.loc[partly.obs_names[:30], "type"] = None
    expected = classify(reference[30:].copy(), query, "type").probabilities
    pd.testing.assert_frame_equal(classify(partly, query, "type").probabilities, expected)


@CLASSIFIERS
def test_layers_dense_values_and_depth(classify):
    reference, query = cells(90, 0), cells(40, 1)
    expected = classify(reference, query, "type")
    for adata in (reference, query):
        adata.layers["counts"] = adata.X.toarray()
        adata.X = adata.X * 0
    pd.testing.assert_frame_equal(
        classify(reference, query, "type", layer="counts").probabilities, expected.probabilities, rtol=1e-3, atol=1e-4
    )
    reference.layers["counts"] = reference.layers["counts"] * 7  # totals are normalised away
    deep = classify(reference, query, "type", layer="counts")
    pd.testing.assert_series_equal(deep.labels, expected.labels)


def test_neighbours_vote():
    reference, query = cells(90, 0), cells(10, 1)
    shares = knn_labels(reference, query, "type", n_neighbors=4).probabilities * 4
    np.testing.assert_allclose(shares, shares.round(), atol=1e-6)
    everybody = knn_labels(reference, query, "type", n_neighbors=10_000).probabilities
    frequency = reference.obs["type"].value_counts(normalize=True)
    np.testing.assert_allclose(everybody["B"], frequency["B"])


def test_penalty_makes_probabilities_modest():
    reference, query = cells(90, 0), cells(40, 1)
    strong, weak = (logistic_labels(reference, query, "type", C=C).probabilities.max(1).mean() for C in (1e-4, 1))
    assert strong < weak


@CLASSIFIERS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r, q: r.obs.drop(columns="type", inplace=True), KeyError, "no column 'type'"),
        (lambda r, q: r.obs.__setitem__("type", "T"), ValueError, "has 1 label"),
        (lambda r, q: r.obs.__setitem__("type", None), ValueError, "has 0 label"),
        (lambda r, q: setattr(q, "var_names", [f"h{i}" for i in range(60)]), ValueError, "share no gene names: g0"),
        (lambda r, q: setattr(q, "var_names", ["g0", *GENES[:-1]]), ValueError, "the query has gene names"),
        (lambda r, q: setattr(q, "X", q.X * -1), ValueError, "X of the query holds .* negative values"),
        (lambda r, q: setattr(r, "X", r.X.log1p()), ValueError, "log-normalised"),
    ],
)
def test_bad_input(classify, change, error, message):
    reference, query = cells(60, 0), cells(10, 1)
    change(reference, query)
    with pytest.raises(error, match=message):
        classify(reference, query, "type")


def test_unknown_layer():
    with pytest.raises(KeyError, match="the reference has no layer 'raw'"):
        knn_labels(cells(60, 0), cells(10, 1), "type", layer="raw")
