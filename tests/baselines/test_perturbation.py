"""Baselines of perturbations: each on means whose answer is known."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scfm.baselines import (
    ShiftedCells,
    additive,
    half_split,
    matching_mean,
    no_change,
    perturbed_mean,
    random_gene_vectors,
    ridge_linear,
)

GENES = [f"g{i}" for i in range(12)]


@pytest.fixture
def means():
    rng = np.random.default_rng(0)
    rows = {"ctrl": rng.uniform(1, 2, 12)}
    for name in ("A", "B", "C", "A+D"):
        rows[name] = rows["ctrl"] + rng.normal(size=12)
    return pd.DataFrame(rows, index=GENES).T


def test_means_and_sums(means):
    rest = means.drop(index="ctrl")
    assert np.allclose(no_change(means).predict_means(["A", "X"]), means.loc[["ctrl", "ctrl"]])
    np.testing.assert_allclose(perturbed_mean(means).predict_means(["X+Y"]).iloc[0], rest.mean())
    found = matching_mean(means).predict_means(["A+B", "A+X", "D", "X"])
    np.testing.assert_allclose(found.loc["A+B"], (means.loc["A"] + means.loc["B"]) / 2)
    np.testing.assert_allclose(found.loc["A+X"], (means.loc["A"] + rest.mean()) / 2)
    np.testing.assert_allclose(found.loc["D"], means.loc["A+D"])
    np.testing.assert_allclose(found.loc["X"], rest.mean())
    found = additive(means).predict_means(["A+B", "A+D", "ctrl"])
    np.testing.assert_allclose(found.loc["A+B"], means.loc["A"] + means.loc["B"] - means.loc["ctrl"])
    np.testing.assert_allclose(found.loc["A+D"], means.loc["A"])  # D was never alone
    np.testing.assert_allclose(found.loc["ctrl"], means.loc["ctrl"])
    assert additive(means).perturbable.tolist() == ["A", "B", "C"]
    assert matching_mean(means).perturbable.tolist() == ["A", "B", "C", "D"]


def test_the_linear_model_finds_a_linear_response():
    rng = np.random.default_rng(1)
    vectors = pd.DataFrame(rng.normal(size=(30, 3)), index=[f"P{i}" for i in range(30)])
    true = rng.normal(size=(3, 12))
    responses = pd.DataFrame(vectors.to_numpy() @ true, index=vectors.index, columns=GENES) + 5
    means = pd.concat([pd.DataFrame(5.0, index=["ctrl"], columns=GENES), responses.iloc[:25]])
    baseline = ridge_linear(means, vectors, n_components=3, ridge=1e-6)
    unseen = [f"P{i}" for i in range(25, 30)]
    predicted, truth = baseline.predict_means(unseen).to_numpy(), responses.loc[unseen].to_numpy()
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.97
    random = ridge_linear(means, random_gene_vectors(vectors.index, 3), ridge=0.1).predict_means(unseen)
    assert np.corrcoef(random.to_numpy().ravel(), truth.ravel())[0, 1] < 0.7
    # the formula, written out
    y = means.drop(index="ctrl").to_numpy().T
    b = y.mean(1, keepdims=True)
    u, s, _ = np.linalg.svd(y - b, full_matrices=False)
    g = u[:, :2] * s[:2]
    p = vectors.to_numpy()
    p = (p - p.mean(0)) / np.sqrt(np.square(p - p.mean(0)).mean())
    left = np.linalg.inv(g.T @ g + 0.1 * np.eye(2)) @ g.T
    w = left @ (y - b) @ p[:25] @ np.linalg.inv(p[:25].T @ p[:25] + 0.1 * np.eye(3))
    found = ridge_linear(means, vectors, n_components=2, ridge=0.1)
    # three columns are more than two components, so that the vectors are reduced as well
    assert found.predict_means(["P26"]).shape == (1, 12)
    found = ridge_linear(means, vectors * 7, n_components=3, ridge=0.1).predict_means(["P26", "P1+P2", "X"])
    u3 = u[:, :3] * s[:3]
    w3 = np.linalg.inv(u3.T @ u3 + 0.1 * np.eye(3)) @ u3.T @ (y - b) @ p[:25]
    w3 = w3 @ np.linalg.inv(p[:25].T @ p[:25] + 0.1 * np.eye(3))
    np.testing.assert_allclose(found.loc["P26"], (b + u3 @ w3 @ p[26][:, None])[:, 0])
    np.testing.assert_allclose(found.loc["P1+P2"], (b + u3 @ w3 @ (p[1] + p[2])[:, None])[:, 0])
    np.testing.assert_allclose(found.loc["X"], b[:, 0])
    assert w.shape == (2, 3)


def test_principal_components_are_the_vectors_of_measured_genes(means):
    measured = means.rename(index={"A": "g0", "A+D": "g0+g5"})
    baseline = ridge_linear(measured)
    assert set(GENES) <= set(baseline.perturbable)
    assert np.isfinite(baseline.predict_means(["g3"])).all().all()
    with pytest.raises(ValueError, match="perturbation_vectors"):
        ridge_linear(means)


def test_shifted_cells(means):
    control = sparse.csr_matrix(np.random.default_rng(0).uniform(0, 1, (7, 12)).astype(np.float32))
    cells = ad.AnnData(control, var=pd.DataFrame(index=GENES[::-1]))
    learner = ShiftedCells(additive(means))
    blocks = list(learner.iter_predictions(["A", "A+B"], cells, batch_size=3))
    assert [(name, rows.start, rows.stop) for name, rows, _ in blocks][:4] == [("A", 0, 3), ("A+B", 0, 3), ("A", 3, 6), ("A+B", 3, 6)]  # fmt: skip
    values = np.concatenate([part for name, _, part in blocks if name == "A"])
    shift = (means.loc["A"] - means.loc["ctrl"]).to_numpy()[::-1]
    np.testing.assert_allclose(values, np.maximum(control.toarray() + shift, 0), atol=1e-6)
    assert values.dtype == np.float32
    with pytest.raises(ValueError, match="other genes"):
        list(learner.iter_predictions(["A"], cells[:, :5]))


def test_halves():
    rng = np.random.default_rng(3)
    labels = np.array(["a"] * 10 + ["b"] * 7 + ["c"])
    values = rng.normal(size=(18, 4))
    first, second = half_split(values, labels, random_state=1)
    assert first.index.tolist() == second.index.tolist() == ["a", "b"]
    np.testing.assert_allclose((first.loc["a"] + second.loc["a"]) / 2, values[:10].mean(0))
    np.testing.assert_allclose((4 * first.loc["b"] + 3 * second.loc["b"]) / 7, values[10:17].mean(0))
    again, _ = half_split(sparse.csr_matrix(values), labels, random_state=1)
    np.testing.assert_allclose(first, again)
    assert not np.allclose(first, half_split(values, labels, random_state=2)[0])


@pytest.mark.parametrize("make", [no_change, perturbed_mean, matching_mean, additive, ridge_linear])
def test_bad_means(make, means):
    with pytest.raises(ValueError, match="row 'ctrl'"):
        make(means.drop(index="ctrl"))
    with pytest.raises(ValueError, match="control only"):
        make(means.loc[["ctrl"]])
