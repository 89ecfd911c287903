"""Genetic interactions: the scLong reference, and pairs with a known answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scfm.metrics import distance_correlation, genetic_interaction, interaction_magnitude

GEARS = {
    "c1": "c1",
    "c2": "c2",
    "mag": "magnitude",
    "dcor": "similarity",
    "dcor_singles": "similarity singles",
    "dcor_first": "similarity first",
    "dcor_second": "similarity second",
    "corr_fit": "model fit",
    "dominance": "dominance",
    "eq_contr": "equality of contribution",
}


def test_golden_sclong(golden):
    case = golden("sclong", "downstream_metrics")
    expected = json.loads((case.path / "expected.json").read_text())
    effects = [case.input[f"gi_{name}"] for name in ("first", "second", "double")]
    rtol = case.case["tolerance"]["rtol"]
    robust = genetic_interaction(*effects)
    assert set(robust) == set(GEARS.values())
    for theirs, ours in GEARS.items():
        np.testing.assert_allclose(robust[ours], expected["gi_theilsen"][theirs], rtol=rtol, err_msg=theirs)
    ols = interaction_magnitude(*effects)
    for theirs, value in expected["gi_ols_with_offset"].items():
        np.testing.assert_allclose(ols[theirs.replace("c0", "intercept")], value, rtol=rtol, err_msg=theirs)


def test_outliers_move_only_least_squares():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 40))
    double = 2 * first + 0.5 * second
    double[:4] += 50
    robust, ols = genetic_interaction(first, second, double), interaction_magnitude(first, second, double)
    assert robust["c1"] == pytest.approx(2, abs=0.1)
    assert robust["c2"] == pytest.approx(0.5, abs=0.1)
    assert robust["dominance"] == pytest.approx(np.log10(4), abs=0.1)
    assert ols["intercept"] > 2


def test_swapping_the_pair_swaps_the_coefficients():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 30))
    double = first - 0.7 * second + 0.1 * rng.normal(size=30)
    there, back = genetic_interaction(first, second, double), genetic_interaction(second, first, double)
    assert (there["c1"], there["c2"]) == pytest.approx((back["c2"], back["c1"]), rel=1e-3)
    assert np.isnan(there["dominance"])  # opposite signs
    assert there["equality of contribution"] == pytest.approx(back["equality of contribution"])


def test_distance_correlation():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 2))
    rotated = x @ [[0.6, 0.8], [-0.8, 0.6]] * 3 + 1
    assert distance_correlation(x, rotated) == pytest.approx(1)
    assert distance_correlation(x[:, 0], x[:, 0] ** 2) > 0.4  # where Pearson sees nothing
    assert distance_correlation(x[:, 0], rng.normal(size=300)) < 0.2
    assert np.isnan(distance_correlation(x[:, 0], np.ones(300)))
    # two points: distances 1 and 3, so the correlation is exactly 1
    assert distance_correlation([0, 1], [5, 2]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        ((np.ones(3), np.ones(4), np.ones(3)), "the same genes"),
        ((np.ones(2), np.ones(2), np.ones(2)), "at least three"),
        ((np.ones(3), np.array([1, np.nan, 2]), np.ones(3)), "missing"),
    ],
)
def test_bad_input(effects, message):
    for function in (genetic_interaction, interaction_magnitude):
        with pytest.raises(ValueError, match=message):
            function(*effects)


def test_golden_gears(golden):
    case = golden("scfoundation", "gears_utils")
    expected = json.loads((case.path / "expected.json").read_text())
    conditions, values = case.input["condition"], case.input["X"].astype(np.float64)
    control = values[conditions == "ctrl"].mean(0)
    pairs = [name for name in expected if name.startswith("gi_")]
    assert len(pairs) >= 3
    for name in pairs:
        first, second = name.removeprefix("gi_").split("+")
        effects = [
            values[conditions == label].mean(0) - control
            for label in (f"{first}+ctrl", f"{second}+ctrl", f"{first}+{second}")
        ]
        found = genetic_interaction(*effects)
        for theirs, ours in GEARS.items():
            np.testing.assert_allclose(
                found[ours], expected[name][theirs], rtol=1e-5, atol=1e-6, err_msg=f"{name} {theirs}"
            )
