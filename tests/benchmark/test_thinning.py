"""Binomial thinning: right on average and in spread, and the same for a cell wherever it stands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats

from scfm.benchmark import thin_counts

MATRICES = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 30) | st.integers(0, 3000)
)


def cells_with(n: int, n_cells: int = 4000) -> np.ndarray:
    """Cells that have ``n`` counts of the first gene and tell themselves apart by the second."""
    return np.column_stack([np.full(n_cells, n), np.arange(1, n_cells + 1)])


@pytest.mark.parametrize("n", [1, 2, 9, 1000, 1001, 5000])
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
def test_draws_are_binomial(n, rate):
    kept = thin_counts(cells_with(n), rate, seed=3).toarray()[:, 0]
    # a handful of classes with enough expected cells each
    edges = np.unique(stats.binom.ppf([0.2, 0.4, 0.6, 0.8], n, rate))
    expected = np.diff(stats.binom.cdf(np.concatenate([[-1], edges, [n]]), n, rate)) * len(kept)
    seen = np.histogram(kept, np.concatenate([[-0.5], edges + 0.5, [n + 0.5]]))[0]
    usable = expected > 5
    assert stats.chisquare(seen[usable], expected[usable] * seen[usable].sum() / expected[usable].sum()).pvalue > 1e-4
    assert kept.mean() == pytest.approx(n * rate, abs=5 * np.sqrt(n * rate * (1 - rate) / len(kept)))


def test_genes_of_a_cell_are_drawn_apart():
    rng = np.random.default_rng(0)
    counts = np.full((3000, 2), 20)
    counts = np.column_stack([counts, rng.integers(0, 10**6, 3000)])
    kept = thin_counts(counts, 0.5).toarray()
    assert abs(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1]) < 0.1


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.floats(0, 1), st.integers(0, 2**31))
def test_reads_are_only_taken_away(counts, rate, seed):
    kept = thin_counts(counts, rate, seed=seed)
    assert sparse.isspmatrix_csr(kept)
    assert kept.dtype == counts.dtype
    assert kept.has_canonical_format
    assert kept.data.all()
    assert (kept.toarray() <= counts).all()
    assert (kept.toarray() >= 0).all()
    again = thin_counts(sparse.csc_matrix(counts.astype(np.float32)), rate, seed=seed)
    np.testing.assert_array_equal(again.toarray(), kept.toarray())
    more = thin_counts(counts, min(1, rate + 0.1), seed=seed).toarray()
    assert (more >= kept.toarray()).all()


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_neither_other_cells_nor_the_order_matter(counts, seed, random):
    genes = np.array([f"GENE{i}" for i in range(counts.shape[1])])
    kept = thin_counts(counts, 0.4, seed=seed, genes=genes).toarray()
    rows = random.sample(range(len(counts)), random.randint(1, len(counts)))
    columns = random.sample(range(counts.shape[1]), counts.shape[1])
    other = thin_counts(counts[rows][:, columns], 0.4, seed=seed, genes=genes[columns]).toarray()
    np.testing.assert_array_equal(other, kept[rows][:, columns])


def test_seeds_give_other_draws_and_nothing_global_is_used():
    counts = np.random.default_rng(1).poisson(3, (30, 40))
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = thin_counts(counts, 0.5, seed=0).toarray()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.testing.assert_array_equal(thin_counts(counts, 0.5, seed=0).toarray(), first)
    assert (thin_counts(counts, 0.5, seed=1).toarray() != first).mean() > 0.2


def test_all_or_nothing():
    counts = np.array([[3, 0, 4000], [0, 0, 0]])
    np.testing.assert_array_equal(thin_counts(counts, 1.0).toarray(), counts)
    assert thin_counts(counts, 0.0).nnz == 0


def test_the_input_stays_and_stored_zeros_do_not_matter():
    counts = sparse.csr_matrix((np.array([5.0, 0.0, 9.0]), np.array([0, 1, 2]), np.array([0, 3])), shape=(1, 3))
    kept = thin_counts(counts, 0.5, seed=2)
    assert list(counts.data) == [5, 0, 9]
    np.testing.assert_array_equal(thin_counts(counts.toarray(), 0.5, seed=2).toarray(), kept.toarray())


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        ([[1]], {"rate": 1.5}, "between 0 and 1"),
        ([[1]], {"rate": np.nan}, "between 0 and 1"),
        ([[0.5]], {"rate": 0.5}, "only counts"),
        ([[-1]], {"rate": 0.5}, "only counts"),
        ([[np.nan]], {"rate": 0.5}, "only counts"),
        ([[1]], {"rate": 0.5, "genes": ["a", "b"]}, "2 names of genes for 1 columns"),
    ],
)
def test_wrong_input(counts, arguments, message):
    with pytest.raises(ValueError, match=message):
        thin_counts(np.array(counts), **arguments)
