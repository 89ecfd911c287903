"""Signatures of drugs without a network."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.baselines import mean_signatures, neighbor_signatures, ridge_signatures

SIGNATURES = np.array([[0.0, 2], [2, 4], [10, 10], [20, 0]])
PRINTS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]])
DOSES = ["low", "high", "low", "high"]


def test_means():
    np.testing.assert_array_equal(mean_signatures(SIGNATURES, 2), [[8, 4], [8, 4]])
    found = mean_signatures(SIGNATURES, conditions=DOSES, new_conditions=["high", "low", "zero"])
    np.testing.assert_array_equal(found, [[11, 2], [5, 6], [8, 4]])
    for wrong in ({}, {"n_samples": 1, "conditions": DOSES, "new_conditions": DOSES}, {"conditions": DOSES}):
        with pytest.raises(ValueError, match="give n_samples"):
            mean_signatures(SIGNATURES, **wrong)
    with pytest.raises(ValueError, match="1 conditions for 4"):
        mean_signatures(SIGNATURES, conditions=["low"], new_conditions=["low"])


def test_neighbours_share_the_condition():
    new = [[1, 1, 0, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(neighbor_signatures(SIGNATURES, PRINTS, new, n_neighbors=2), [[1, 3], [15, 5]])
    found = neighbor_signatures(
        SIGNATURES, PRINTS, new, conditions=DOSES, new_conditions=["high", "low"], n_neighbors=1
    )
    np.testing.assert_array_equal(found, [[2, 4], [10, 10]])
    # two samples have the dose, and not more of them count than there are
    found = neighbor_signatures(
        SIGNATURES, PRINTS, new, conditions=DOSES, new_conditions=["high", "new"], n_neighbors=3
    )
    np.testing.assert_array_equal(found[0], [11, 2])
    np.testing.assert_allclose(found[1], SIGNATURES[[2, 3, 0]].mean(0))
    assert neighbor_signatures(SIGNATURES, PRINTS, np.zeros((0, 4))).shape == (0, 2)
    with pytest.raises(ValueError, match="as many fingerprints"):
        neighbor_signatures(SIGNATURES, PRINTS[:2], new)


def test_ridge_finds_a_line_and_shrinks_to_the_mean():
    x = np.arange(10.0)[:, None]
    y = np.hstack([2 * x + 1, -x])
    np.testing.assert_allclose(ridge_signatures(y, x, [[20.0]], alpha=1e-9), [[41, -20]], rtol=1e-6)
    np.testing.assert_allclose(ridge_signatures(y, x, [[20.0]], alpha=1e9), y.mean(0)[None], rtol=1e-4)
    with pytest.raises(ValueError, match="finite"):
        ridge_signatures(y * np.nan, x, x)
