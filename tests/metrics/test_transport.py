"""Moved cells beside treated ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics.pairwise import rbf_kernel

from scfm.metrics import kernel_discrepancy, transport_scores


def test_golden(golden):
    data = golden("cellfm", "cellot_icnn")
    value = kernel_discrepancy(data.input["target"], data.expected["transport"])
    np.testing.assert_allclose(value, data.expected["mmd"], rtol=1e-6)


def test_is_the_mean_over_kernels():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 3)), rng.normal(1, 1, size=(5, 3))
    expected = [
        rbf_kernel(first, gamma=g).mean()
        + rbf_kernel(second, gamma=g).mean()
        - 2 * rbf_kernel(first, second, gamma=g).mean()
        for g in (2.0, 0.1)
    ]
    assert kernel_discrepancy(first, second, gammas=(2.0, 0.1)) == pytest.approx(np.mean(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(9, 3)), rng.normal(1, 2, size=(6, 3))
    value = kernel_discrepancy(first, second)
    assert value >= 0
    assert kernel_discrepancy(first, rng.permutation(first)) == pytest.approx(0, abs=1e-12)
    assert kernel_discrepancy(second[::-1], first) == pytest.approx(value)
    relative = kernel_discrepancy(first, second, relative=True)
    assert kernel_discrepancy(50 * first, 50 * second, relative=True) == pytest.approx(relative)


def test_fixed_widths_say_nothing_about_distant_cells():
    rng = np.random.default_rng(0)
    first, near = 100 * rng.normal(size=(2, 40, 20))
    far = near + 1000
    assert kernel_discrepancy(first, far) == pytest.approx(kernel_discrepancy(first, near))
    assert kernel_discrepancy(first, far, relative=True) > 3 * kernel_discrepancy(first, near, relative=True)


def test_scores():
    rng = np.random.default_rng(0)
    observed, predicted = rng.gamma(1.0, 2.0, size=(2, 30, 8))
    scores = transport_scores(sparse.csr_matrix(observed), predicted[:20])
    means = observed.mean(0), predicted[:20].mean(0)
    assert scores["l2"] == pytest.approx(np.linalg.norm(means[0] - means[1]))
    assert scores["Pearson"] == pytest.approx(np.corrcoef(*means)[0, 1])
    some = transport_scores(observed, predicted, genes=[1, 5])
    assert some == transport_scores(observed[:, [1, 5]], predicted[:, [1, 5]])
    assert transport_scores(observed, observed) == pytest.approx({"l2": 0, "Pearson": 1, "MMD": 0}, abs=1e-12)


def test_wrong_input():
    with pytest.raises(ValueError, match="the same columns"):
        kernel_discrepancy(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="the same columns, and cells"):
        transport_scores(np.ones((0, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="missing"):
        kernel_discrepancy(np.full((2, 2), np.nan), np.ones((2, 2)))
    with pytest.raises(ValueError, match="positive"):
        kernel_discrepancy(np.ones((2, 2)), np.ones((2, 2)), gammas=())
