"""Column maps against the sparse product they replace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.genes import ColumnMap


@st.composite
def blocks(draw):
    n_cells, n_vars = draw(st.integers(0, 5)), draw(st.integers(1, 8))
    ids = np.array(draw(st.lists(st.integers(-1, 4), min_size=n_vars, max_size=n_vars)), dtype=np.int64)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    block = sparse.random(n_cells, n_vars, 0.5, format="csr", dtype=np.float32, random_state=rng)
    block.data = rng.integers(0, 5, block.nnz).astype(np.float32)  # with explicit zeros
    # entries of a row in any order, as the 10x reader may leave them
    for i in range(n_cells):
        part = slice(block.indptr[i], block.indptr[i + 1])
        order = rng.permutation(part.stop - part.start)
        block.data[part], block.indices[part] = block.data[part][order], block.indices[part][order]
    block.has_sorted_indices = False
    return ids, block


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_sum_is_the_indicator_product(given_):
    ids, block = given_
    columns = ColumnMap.from_ids(ids)
    before = block.copy()
    out = columns.apply(block)
    indicator = (ids[:, None] == columns.ids) & (ids >= 0)[:, None]
    np.testing.assert_array_equal(out.toarray(), block.toarray() @ indicator)
    first_seen = list(dict.fromkeys(ids[ids >= 0].tolist()))
    assert columns.ids.tolist() == first_seen
    assert columns.sums == (len(first_seen) < (ids >= 0).sum())
    np.testing.assert_array_equal(block.data, before.data)
    np.testing.assert_array_equal(block.indices, before.indices)


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_keep_drops_unknown_columns_and_nothing_else(given_):
    ids, block = given_
    columns = ColumnMap.from_ids(ids, duplicates="keep")
    out = columns.apply(block)
    known = np.flatnonzero(ids >= 0)
    np.testing.assert_array_equal(columns.ids, ids[known])
    for i in range(block.shape[0]):
        part, kept = slice(*block.indptr[i : i + 2]), slice(*out.indptr[i : i + 2])
        stays = np.isin(block.indices[part], known)
        np.testing.assert_array_equal(known[out.indices[kept]], block.indices[part][stays])
        np.testing.assert_array_equal(out.data[kept], block.data[part][stays])


def test_nothing_is_copied_when_every_column_stays():
    block = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    out = ColumnMap.from_ids(np.array([2, 0, 1])).apply(block)
    assert np.shares_memory(out.data, block.data)


def test_integers_stay_integers():
    block = sparse.csr_matrix(np.array([[1, 2]], dtype=np.int64))
    out = ColumnMap.from_ids(np.array([0, 0])).apply(block)
    assert out.dtype == np.int64
    assert out.toarray().tolist() == [[3]]


def test_other_data_is_refused():
    with pytest.raises(ValueError, match="has 2 genes, but 3 were matched"):
        ColumnMap.from_ids(np.arange(3)).apply(sparse.csr_matrix((1, 2)))
