"""Correlation networks against pandas, GRNBoost2 where it is installed, and shuffled networks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.baselines import correlation_matrix, correlation_network, grnboost2_network, shuffled_network


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["pearson", "spearman"]), st.booleans())
def test_correlations_are_those_of_pandas(seed, method, negative):
    rng = np.random.default_rng(seed)
    table = rng.poisson(0.7, (30, 7)).astype(float) - negative * rng.integers(0, 2, (30, 7))
    table[:, 2], table[:, 3] = 0, 2
    expected = pd.DataFrame(table).corr(method).fillna(0).to_numpy()
    np.testing.assert_allclose(correlation_matrix(sparse.csr_matrix(table), method), expected, atol=1e-12)
    np.testing.assert_allclose(correlation_matrix(table, method), expected, atol=1e-12)


def cells(n=80):
    rng = np.random.default_rng(0)
    tf = rng.poisson(3, n)
    table = np.column_stack([tf, 10 - np.minimum(tf, 10), *rng.poisson(3, (3, n))]).astype(np.float32)
    return AnnData(sparse.csr_matrix(table), var=pd.DataFrame(index=["TF", "DOWN", "A", "B", "C"]))


def test_edges_come_from_the_named_genes():
    adata = cells()
    before = adata.X.copy()
    edges = correlation_network(adata, tfs=["TF", "A", "not measured"])
    assert set(edges["source"]) == {"TF", "A"}
    assert (edges["source"] != edges["target"]).all()
    assert edges.loc[0, ["source", "target"]].tolist() == ["TF", "DOWN"]
    assert edges["weight"].between(0, 1).all()
    assert edges["weight"].is_monotonic_decreasing
    assert (before != adata.X).nnz == 0
    adata.layers["other"] = np.random.default_rng(1).random(adata.shape)
    assert not edges.equals(correlation_network(adata, layer="other", tfs=["TF", "A"]))


def test_wrong_input():
    adata = cells()
    with pytest.raises(KeyError, match="no layer 'x'"):
        correlation_network(adata, layer="x")
    with pytest.raises(ValueError, match="'spearman'"):
        correlation_network(adata, method="kendall")
    with pytest.raises(ValueError, match="two cells"):
        correlation_network(adata[:1])
    adata.X.data[0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        correlation_network(adata)


def test_grnboost2():
    pytest.importorskip("arboreto.core")
    edges = grnboost2_network(cells(), tfs=["TF", "A"])
    assert edges.loc[0, ["source", "target"]].tolist() == ["TF", "DOWN"]
    pd.testing.assert_frame_equal(edges, grnboost2_network(cells(), tfs=["TF", "A"]))
    with pytest.raises(ValueError, match="tfs="):
        grnboost2_network(cells(), tfs=["x"])


def random_network(seed, n_sources, n_targets, share):
    rng = np.random.default_rng(seed)
    source, target = np.nonzero(rng.random((n_sources, n_targets)) < share)
    return pd.DataFrame({"source": source.astype(str), "target": target.astype(str), "weight": rng.random(len(source))})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 30), st.floats(0.05, 1))
def test_shuffled_networks_keep_degrees_and_have_no_edge_twice(seed, n_sources, n_targets, share):
    edges = random_network(seed, n_sources, n_targets, share)
    before = edges.copy()
    other = shuffled_network(edges, random_state=1)
    pd.testing.assert_frame_equal(edges, before)
    assert list(other.columns) == list(edges.columns)
    for end in ("source", "target"):
        pd.testing.assert_series_equal(
            other[end].value_counts(sort=False).sort_index(), edges[end].value_counts(sort=False).sort_index()
        )
    assert not other.duplicated(["source", "target"]).any()
    own = lambda table: int((table["source"] == table["target"]).sum())
    assert own(other) <= own(edges)
    pd.testing.assert_series_equal(other["source"], edges["source"])
    pd.testing.assert_frame_equal(other, shuffled_network(edges, random_state=1))


def test_shuffling_moves_edges():
    edges = random_network(0, 10, 200, 0.1)
    other = shuffled_network(edges)
    kept = len(edges.merge(other, on=["source", "target"]))
    assert kept < 0.3 * len(edges), "a tenth of the pairs are edges, so about as many stay by chance"
    assert not other.equals(shuffled_network(edges, random_state=1))


def test_networks_that_cannot_be_shuffled(capsys):
    whole = random_network(0, 3, 3, 1.0)
    whole = whole[whole["source"] != whole["target"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(shuffled_network(whole), whole)
    assert "the same as before" in capsys.readouterr().err
    assert shuffled_network(whole.head(0)).empty
    with pytest.raises(ValueError, match="twice"):
        shuffled_network(pd.concat([whole, whole]))
    with pytest.raises(ValueError, match="lacks the column target"):
        shuffled_network(whole[["source"]])
