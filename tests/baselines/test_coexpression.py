"""Correlation of genes over cells."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scfm.baselines import gene_correlation


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 1000])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_correlation_is_that_of_numpy(kind, chunk_size):
    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(rng.gamma(1.0, 2.0, size=(40, 1)), size=(40, 12))).astype(np.float32)
    expected = np.corrcoef(values.astype(float).T)
    np.testing.assert_allclose(gene_correlation(kind(values), chunk_size=chunk_size), expected, atol=1e-10)


def test_a_large_mean_does_not_swallow_the_variance():
    values = 1e6 + np.random.default_rng(0).normal(size=(30, 4))
    np.testing.assert_allclose(gene_correlation(values, chunk_size=4), np.corrcoef(values.T), atol=1e-8)


def test_constant_genes_are_nan():
    values = np.random.default_rng(0).random((20, 3))
    values[:, 1] = 0.7
    result = gene_correlation(values)
    assert np.isnan(result[1]).all()
    assert np.isnan(result[:, 1]).all()
    assert np.isfinite(result[np.ix_([0, 2], [0, 2])]).all()


def test_too_many_genes_are_refused_before_anything_is_computed():
    with pytest.raises(MemoryError, match="choose fewer genes"):
        gene_correlation(sparse.csr_matrix((5, 100_000)))
