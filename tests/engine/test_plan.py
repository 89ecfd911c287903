"""Batches of cells of like length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.engine import Limits, plan_batches

lengths = st.lists(st.integers(0, 3000), max_size=60).map(lambda x: np.array(x, dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(lengths, st.none() | st.integers(1, 20000), st.none() | st.integers(1, 20))
def test_every_cell_once_and_within_the_limits(lengths, tokens, cells):
    batches = plan_batches(lengths, Limits(tokens, cells))
    members = np.concatenate(batches) if batches else np.empty(0)
    assert sorted(members) == list(range(len(lengths)))
    for batch in batches:
        assert cells is None or len(batch) <= cells
        assert tokens is None or len(batch) == 1 or len(batch) * lengths[batch].max() <= tokens


@settings(max_examples=30, deadline=None)
@given(lengths)
def test_longest_first(lengths):
    batches = plan_batches(lengths, Limits(tokens=6000))
    assert np.all(np.diff([lengths[batch].max() for batch in batches]) <= 0)


def test_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 3000, 2048)
    batches = plan_batches(lengths, Limits(tokens=131072))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() < 1.04


def test_equal_lengths_fill_the_budget():
    batches = plan_batches(np.full(100, 1200), Limits(tokens=12000))
    assert [len(batch) for batch in batches] == [10] * 10


def test_different_lengths_do_not_make_tiny_batches():
    lengths = np.geomspace(10, 3000, 32).astype(int)
    assert len(plan_batches(lengths, Limits(cells=8))) <= 16


@pytest.mark.parametrize("limits", [{"tokens": 0}, {"cells": 0}, {"cells": -1}])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match="positive"):
        Limits(**limits)
