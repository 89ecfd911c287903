"""Recovery of known groups of genes by programs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.metrics import program_recovery

UNIVERSE = [f"G{i}" for i in range(200)]
PROGRAMS = {"1": UNIVERSE[:20], "2": UNIVERSE[20:30], "3": UNIVERSE[30:36]}


def test_shares_of_the_best_program():
    known = {"found": [*UNIVERSE[20:29], UNIVERSE[100]], "not": UNIVERSE[150:160], "absent": ["X1", "X2", UNIVERSE[0]]}
    table = program_recovery(PROGRAMS, known, UNIVERSE)
    found = table.loc["found"]
    assert (found["program"], found["program_size"], found["overlap"], found["n_genes"]) == ("2", 10, 9, 10)
    assert (found["precision"], found["recall"]) == (0.9, 0.9)
    assert found["F1"] == pytest.approx(0.9)
    assert found["F1 z"] > 8
    assert found["F1 p"] == pytest.approx(1 / 1001)
    assert found["together"] == pytest.approx(9 * 8 / (10 * 9))
    assert found["together p"] == pytest.approx(1 / 1001)
    assert table.loc["not", "F1"] == 0
    assert table.loc["not", "F1 p"] == 1
    assert table.loc["absent", "n_genes"] == 1
    assert np.isnan(table.loc["absent", "F1"])


def test_random_programs_are_those_of_shuffled_genes():
    rng = np.random.default_rng(0)
    known = {"a": UNIVERSE[:12]}
    table = program_recovery(PROGRAMS, known, UNIVERSE, n_random=4000, rng=1)
    best, together = [], []
    for _ in range(2000):
        order = rng.permutation(len(UNIVERSE))
        mixed = {name: [UNIVERSE[order[UNIVERSE.index(g)]] for g in genes] for name, genes in PROGRAMS.items()}
        shared = {name: len(set(genes) & set(known["a"])) for name, genes in mixed.items()}
        best.append(max(2 * shared[name] / (12 + len(mixed[name])) for name in mixed))
        together.append(sum(n * (n - 1) for n in shared.values()) / (12 * 11))
    assert table.loc["a", "F1 random"] == pytest.approx(np.mean(best), abs=0.01)
    assert table.loc["a", "together random"] == pytest.approx(np.mean(together), abs=0.005)
    z = (table.loc["a", "F1"] - np.mean(best)) / np.std(best)
    assert table.loc["a", "F1 z"] == pytest.approx(z, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_random_groups_are_not_found(seed):
    rng = np.random.default_rng(seed)
    known = {str(i): list(rng.choice(UNIVERSE, 12, replace=False)) for i in range(40)}
    table = program_recovery(PROGRAMS, known, UNIVERSE, n_random=200)
    # P is at most 0.05 in about a twentieth of them
    assert (table["F1 p"] <= 0.05).mean() < 0.25
    assert (table["together p"] <= 0.05).mean() < 0.25


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(200)))
def test_the_order_of_the_universe_does_not_matter(order):
    known = {"a": UNIVERSE[5:25]}
    first = program_recovery(PROGRAMS, known, UNIVERSE, n_random=50)
    second = program_recovery(PROGRAMS, known, [UNIVERSE[i] for i in order], n_random=50)
    pd.testing.assert_frame_equal(first, second)


def test_seeds():
    known = {"a": UNIVERSE[5:25]}
    first = program_recovery(PROGRAMS, known, UNIVERSE, rng=1)
    pd.testing.assert_frame_equal(first, program_recovery(PROGRAMS, known, UNIVERSE, rng=np.random.default_rng(1)))


def test_wrong_input():
    with pytest.raises(ValueError, match="in one only"):
        program_recovery({"1": ["G1", "G2"], "2": ["G2"]}, {"a": ["G1", "G2"]}, UNIVERSE)
    with pytest.raises(ValueError, match="no programs"):
        program_recovery({}, {"a": ["G1", "G2"]}, UNIVERSE)
    with pytest.raises(ValueError, match="n_random"):
        program_recovery(PROGRAMS, {"a": ["G1", "G2"]}, UNIVERSE, n_random=0)
