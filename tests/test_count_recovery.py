"""Counts behind normalised values, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm._count_recovery import count_decimals, guess_transform, recover_block

BASES = [None, np.e, 2.0, 10.0]


def transform(counts, base, *, factor=None, log=np.log1p):
    """Normalise as Scanpy does, in single precision."""
    dense = counts.astype(np.float32)
    if factor is None:
        totals = dense.sum(1, keepdims=True)
        factor = np.float32(1e4) / np.where(totals > 0, totals, 1)
    dense = dense * np.asarray(factor, dtype=np.float32)
    if base is not None:
        dense = log(dense) / np.float32(np.log(base))
    return sparse.csr_matrix(dense.astype(np.float32))


def without_common_divisor(counts):
    divisor = np.gcd.reduce(counts, axis=1, keepdims=True)
    return counts // np.where(divisor > 0, divisor, 1)


@st.composite
def count_matrices(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 80))
    counts = np.rint(rng.lognormal(0.0, draw(st.sampled_from([0.5, 1.5, 3.0])), shape)).astype(np.int64)
    counts *= rng.random(shape) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    counts = np.minimum(counts, 50_000) * rng.integers(1, 4, (shape[0], 1))
    # cells whose smallest count is above 20 are refused, which another test is about
    smallest = np.where(counts > 0, counts, np.iinfo(np.int64).max).min(1) // np.gcd.reduce(counts, axis=1).clip(1)
    return counts[smallest <= 20]


@settings(max_examples=150, deadline=None)
@given(count_matrices(), st.sampled_from(BASES), st.sampled_from([1e4, 1e6, None]))
def test_counts_come_back_exactly_up_to_a_common_divisor(counts, base, target):
    totals = counts.sum(1, keepdims=True).astype(float)
    target = np.median(totals) if target is None and len(totals) else target
    values = transform(counts, base, factor=(target or 1.0) / np.where(totals > 0, totals, 1))
    found = recover_block(values, base)
    assert not found.failed.any()
    recovered = sparse.csr_matrix((found.counts, values.indices, values.indptr), shape=values.shape)
    exact = 1e-4 if found.n_uncertain else 0
    np.testing.assert_allclose(recovered.toarray(), without_common_divisor(counts), rtol=exact)
    np.testing.assert_array_equal(np.isnan(found.scale), counts.sum(1) == 0)


@settings(max_examples=50, deadline=None)
@given(count_matrices(), st.sampled_from(BASES))
def test_a_known_scale_settles_the_common_divisor(counts, base):
    factor = 1e4 / np.maximum(counts.sum(1, keepdims=True), 1)
    values = transform(counts, base, factor=factor)
    found = recover_block(values, base, scale=factor[:, 0])
    assert not found.failed.any()
    np.testing.assert_array_equal(found.counts, counts[counts > 0])


@pytest.mark.parametrize("base", [np.e, 2.0, 10.0])
def test_a_logarithm_without_log1p_loses_no_counts(base):
    # deep cells have small normalised values, of which log(1 + x) keeps few digits
    counts = np.random.default_rng(0).poisson(np.geomspace(0.5, 2000, 600), (5, 600))
    values = transform(counts, base, factor=1e4 / counts.sum(1, keepdims=True), log=lambda x: np.log(np.float32(1) + x))
    found = recover_block(values, base)
    np.testing.assert_array_equal(found.counts, counts[counts > 0])


@pytest.mark.parametrize("decimals", [3, 4])
def test_values_written_with_few_decimals(decimals):
    counts = np.random.default_rng(1).poisson(np.geomspace(0.2, 60, 300), (20, 300))
    values = transform(counts, np.e)
    values.data = np.round(values.data, decimals)
    assert count_decimals(values.data) == decimals
    guess = guess_transform(values)
    assert (guess.base, guess.share, guess.decimals) == (np.e, 1.0, decimals)
    found = recover_block(values, np.e, decimals=decimals)
    np.testing.assert_array_equal(found.counts, counts[counts > 0])


def test_full_precision_is_no_rounding():
    assert count_decimals(np.random.default_rng(0).gamma(1.0, size=100).astype(np.float32)) is None
    assert count_decimals(np.zeros(0)) is None


@pytest.mark.parametrize("base", BASES)
def test_values_that_are_no_multiples_fail(base):
    values = sparse.csr_matrix(np.random.default_rng(2).gamma(1.0, size=(30, 50)).astype(np.float32))
    assert recover_block(values, base).failed.all()


def test_values_beyond_the_precision_prove_nothing():
    # next to 1e-7, any value of ordinary size is a whole multiple as far as single precision can tell
    values = np.random.default_rng(3).gamma(1.0, size=(30, 50)).astype(np.float32)
    values[:, 0] = 1e-7
    assert recover_block(sparse.csr_matrix(values), None).failed.all()


def test_a_few_huge_counts_are_kept_and_reported():
    counts = np.random.default_rng(4).poisson(3.0, (1, 2000)) + 1
    counts[0, 7] = 30_000_000
    found = recover_block(transform(counts, np.e), np.e)
    assert not found.failed.any()
    assert found.n_uncertain == 1
    assert abs(found.counts[7] - 30_000_000) < 1000
    np.testing.assert_array_equal(np.delete(found.counts, 7), np.delete(counts[0], 7))


def test_a_smallest_count_above_twenty_needs_the_scale():
    counts = np.array([[31, 37, 41]])
    values = transform(counts, np.e)
    assert recover_block(values, np.e).failed.all()
    np.testing.assert_array_equal(recover_block(values, np.e, scale=np.array([1e4 / 109])).counts, counts[0])


def test_failed_cells_leave_the_others_alone():
    counts = np.random.default_rng(5).poisson(1.0, (6, 40))
    values = transform(counts, np.e).toarray()
    values[3] = np.random.default_rng(6).gamma(1.0, size=40)
    values[4] = 0
    found = recover_block(sparse.csr_matrix(values), np.e)
    assert found.failed.tolist() == [False, False, False, True, False, False]
    assert np.isnan(found.deviation[[3, 4]]).all()


def test_stored_zeros_stay_zero():
    values = sparse.csr_matrix((np.array([0.0, 2.5, 5.0, 0.0]), [0, 1, 2, 0], [0, 3, 4]), shape=(2, 3))
    found = recover_block(values, None)
    assert found.counts.tolist() == [0, 1, 2, 0]
    assert not found.failed.any()


def test_no_cells():
    found = recover_block(sparse.csr_matrix((0, 5), dtype=np.float32), np.e)
    assert len(found.counts) == len(found.scale) == 0
    assert guess_transform(sparse.csr_matrix((0, 5), dtype=np.float32)).share == 0.0
