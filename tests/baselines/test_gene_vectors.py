"""Vectors of genes from chance, from expression and from co-expression."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scfm.baselines import coexpression_vectors, expression_statistics, random_gene_vectors


def cells(n=300, seed=0):
    """Two programs of four genes in different cells, and a gene that is never expressed."""
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.5
    on = np.where(np.repeat([True, False], 4), first[:, None], ~first[:, None])
    table = (rng.random((n, 8)) < np.where(on, 0.8, 0.05)) * rng.integers(1, 6, (n, 8))
    table = np.column_stack([table, np.zeros(n)]).astype(np.float32)
    return AnnData(sparse.csr_matrix(table), var=pd.DataFrame(index=[f"g{i}" for i in range(9)]))


def test_statistics():
    adata = cells()
    dense = adata.X.toarray().astype(float)
    table = expression_statistics(adata)
    assert list(table.index) == list(adata.var_names)
    np.testing.assert_allclose(table["mean"], dense.mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["variance"], dense.var(0), rtol=1e-5)
    np.testing.assert_allclose(table["log mean"], np.log1p(dense.mean(0)), rtol=1e-6)
    np.testing.assert_allclose(table["share of cells"], (dense > 0).mean(0), rtol=1e-6)
    adata.layers["other"] = adata.X * 2
    np.testing.assert_allclose(expression_statistics(adata, layer="other")["mean"], 2 * dense.mean(0), rtol=1e-6)


def test_genes_of_a_program_have_like_vectors():
    adata = cells()
    vectors = coexpression_vectors(adata, dim=3)
    assert vectors.shape == (9, 3)
    assert vectors.loc["g8"].isna().all()
    unit = vectors.to_numpy()[:8]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    same = np.equal.outer(np.arange(8) // 4, np.arange(8) // 4)
    assert cosine[same].min() > cosine[~same].max()


def test_order_of_cells_does_not_matter_and_contexts_bound_the_work():
    adata = cells()
    vectors = coexpression_vectors(adata, dim=3)
    again = coexpression_vectors(adata[::-1].copy(), dim=3)
    np.testing.assert_allclose(vectors, again, atol=1e-5)
    few = coexpression_vectors(adata, dim=50, n_contexts=5)
    assert few.shape == (9, 4)
    assert np.isfinite(few.iloc[:8]).all(axis=None)


def test_random_vectors():
    one = random_gene_vectors(["a", "b"], 5)
    pd.testing.assert_frame_equal(one, random_gene_vectors(["a", "b"], 5))
    assert not one.equals(random_gene_vectors(["a", "b"], 5, random_state=1))
    assert list(one.index) == ["a", "b"]


def test_wrong_input():
    adata = cells(10)
    with pytest.raises(KeyError, match="no layer 'x'"):
        coexpression_vectors(adata, layer="x")
    with pytest.raises(ValueError, match="no cells"):
        expression_statistics(adata[:0])
    adata.X.data[0] = -1
    with pytest.raises(ValueError, match="negative"):
        expression_statistics(adata)
