"""Baselines of expression recovery."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scfm.baselines import ExpressionPredictor, gene_mean, knn_smoothing, scvi_expression
from scfm.metrics import recovery_scores


def two_types(n=60, seed=0):
    """Deep counts of two types, and one cell without counts."""
    rng = np.random.default_rng(seed)
    rate = np.full((n, 40), 5.0)
    rate[: n // 2, :10] *= 8
    rate[n // 2 :, 10:20] *= 8
    counts = rng.poisson(rate)
    counts[7] = 0
    genes = pd.DataFrame(index=[f"g{i}" for i in range(40)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=genes), rng


@pytest.fixture
def deep():
    return two_types()[0]


@pytest.fixture
def shallow():
    """A tenth of the counts."""
    adata, rng = two_types()
    adata.X.data = rng.binomial(adata.X.data.astype(int), 0.1).astype(np.float32)
    adata.X.eliminate_zeros()
    return adata


def log_normalized(counts):
    counts = np.asarray(counts.todense(), dtype=float)
    totals = counts.sum(1, keepdims=True)
    return np.log1p(np.divide(1e4 * counts, totals, out=np.zeros_like(counts), where=totals > 0))


PREDICTORS = {
    "mean": gene_mean,
    "smoothing": lambda adata, **options: knn_smoothing(adata, n_neighbors=8, n_comps=5, **options),
    "scvi": lambda adata, **options: scvi_expression(adata, max_epochs=2, n_latent=4, n_layers=1, **options),
}


@pytest.fixture(params=PREDICTORS)
def predictor(request, shallow):
    return PREDICTORS[request.param](shallow)


def test_any_cells_and_genes(predictor):
    assert isinstance(predictor, ExpressionPredictor)
    whole = predictor.predict()
    assert whole.shape == predictor.shape == (60, 40)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()
    assert list(predictor.var_names[:2]) == ["g0", "g1"]
    mask = np.arange(40) % 3 == 0
    np.testing.assert_allclose(predictor[10:20], whole[10:20], rtol=1e-5)
    np.testing.assert_allclose(predictor.predict([5, 2, 5], mask), whole[[5, 2, 5]][:, mask], rtol=1e-5)
    np.testing.assert_allclose(predictor.predict(genes=slice(3, 9)), whole[:, 3:9], rtol=1e-5)
    assert predictor.predict([], [1]).shape == (0, 1)
    with pytest.raises(IndexError):
        predictor.predict([60])


def test_predictions_are_on_the_scale_of_log_counts_per_ten_thousand(predictor):
    totals = np.expm1(predictor.predict().astype(float)).sum(1)
    np.testing.assert_allclose(totals, 1e4, rtol=1e-3)


def test_neighbours_recover_more_than_the_mean_of_genes(shallow, deep):
    reference = sparse.csr_matrix(log_normalized(deep.X))
    smoothed = recovery_scores(reference, knn_smoothing(shallow, n_neighbors=20, n_comps=5))
    mean = recovery_scores(reference, gene_mean(shallow))
    nothing = recovery_scores(reference, log_normalized(shallow.X))
    assert smoothed["MAE"] < mean["MAE"] < nothing["MAE"]
    assert smoothed["Pearson"] > max(mean["Pearson"], nothing["Pearson"])


def test_one_neighbour_is_the_cell_itself(shallow):
    np.testing.assert_allclose(
        knn_smoothing(shallow, n_neighbors=1).predict(), log_normalized(shallow.X), rtol=1e-5, atol=1e-6
    )


def test_all_neighbours_are_the_sum_of_all_cells(shallow):
    total = np.asarray(shallow.X.sum(0), dtype=float).ravel()
    out = knn_smoothing(shallow, n_neighbors=1000, n_comps=5).predict()
    np.testing.assert_allclose(out, np.tile(np.log1p(1e4 * total / total.sum()), (60, 1)), rtol=1e-5)


def test_mean_by_its_definition(shallow):
    counts = shallow.X.toarray()[np.arange(60) != 7]  # the empty cell does not count
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(gene_mean(shallow)[7:8][0], np.log1p(1e4 * shares.mean(0)), rtol=1e-5)


def test_cells_of_one_type_are_summed(shallow):
    """Neighbours come from the own type, so markers of the other stay low."""
    out = knn_smoothing(shallow, n_neighbors=10, n_comps=5).predict()
    kept = np.delete(np.arange(60), 7)
    first = kept < 30
    assert (out[kept][first, :10].mean(1) > out[kept][first, 10:20].mean(1) + 1).all()
    assert (out[kept][~first, 10:20].mean(1) > out[kept][~first, :10].mean(1) + 1).all()


def test_empty_data():
    adata = AnnData(sparse.csr_matrix((5, 4), dtype=np.float32))
    assert not gene_mean(adata).predict().any()
    assert not knn_smoothing(adata, n_neighbors=1).predict().any()


def test_layers(shallow):
    expected = gene_mean(shallow).predict(), knn_smoothing(shallow, n_comps=5).predict()
    shallow.layers["counts"] = shallow.X.toarray()
    shallow.X = sparse.csr_matrix(shallow.shape, dtype=np.float32)
    np.testing.assert_allclose(gene_mean(shallow, layer="counts").predict(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(knn_smoothing(shallow, n_comps=5, layer="counts").predict(), expected[1], rtol=1e-5)


def test_scvi_is_seeded_and_leaves_global_states(shallow):
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first, second = (PREDICTORS["scvi"](shallow, random_state=3).predict() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, PREDICTORS["scvi"](shallow, random_state=4).predict())
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[1])


def test_bad_input(shallow):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        knn_smoothing(shallow, n_neighbors=0)
    shallow.X.data[0] = -1
    for predict in (gene_mean, knn_smoothing):
        with pytest.raises(ValueError, match="X holds negative"):
            predict(shallow)
