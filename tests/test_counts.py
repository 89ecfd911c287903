"""Running statistics of a matrix, and what they say about it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm._counts import CountStats

RNG = np.random.default_rng(0)
COUNTS = sparse.csr_matrix(RNG.poisson(1.0, (40, 60)))
TOTALS = np.asarray(COUNTS.sum(1))
NORMALIZED = COUNTS.multiply(1e4 / TOTALS).tocsr().astype(np.float32)


def log1p(matrix, base=np.e):
    out = matrix.copy()
    out.data = (np.log1p(out.data) / np.log(base)).astype(np.float32)
    return out


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float32, np.float64, bool])
def test_whole_numbers_of_any_type_are_counts(dtype):
    stats = CountStats().update(COUNTS.astype(dtype))
    assert stats.kind == "counts"
    assert stats.problem() == stats.remedy() == ""
    assert stats.integer_share == 1.0
    assert stats.min == 0
    assert stats.max == COUNTS.astype(dtype).max()


@pytest.mark.parametrize(
    ("matrix", "kind", "base", "target"),
    [
        (NORMALIZED, "normalized", None, 1e4),
        (log1p(NORMALIZED), "log-normalized", np.e, 1e4),
        (log1p(NORMALIZED, 2), "log-normalized", 2.0, 1e4),
        (log1p(NORMALIZED, 10), "log-normalized", 10.0, 1e4),
        (NORMALIZED[:, :30], "normalized", None, None),  # after a choice of genes the totals differ
        (log1p(NORMALIZED[:, :30]), "log-normalized", np.e, None),
        (log1p(NORMALIZED).astype(np.float64), "log-normalized", np.e, 1e4),
    ],
)
def test_normalised_values_are_recognised(matrix, kind, base, target):
    stats = CountStats().update(matrix)
    assert (stats.kind, stats.log_base, stats.target_sum) == (kind, base, target)
    assert stats.integer_share < 0.1
    assert "recover_counts" in stats.remedy()


def test_equal_totals_are_enough_evidence():
    imputed = np.random.default_rng(1).gamma(1.0, size=(40, 60))
    imputed *= 1e4 / imputed.sum(1, keepdims=True)
    assert CountStats().update(imputed).kind == "normalized"
    stats = CountStats().update(np.log1p(imputed))
    assert (stats.kind, stats.target_sum) == ("log-normalized", 1e4)


@pytest.mark.parametrize(
    ("matrix", "kind", "words"),
    [
        (RNG.normal(size=(40, 60)), "scaled", "scaled or centred"),
        (np.array([[1, -2], [0, 3]]), "unknown", "1 negative values"),
        (np.array([[1.0, np.nan], [0, 3]]), "unknown", "1 NaN and 0 infinite"),
        (np.array([[1.0, -np.inf], [np.inf, 3]]), "unknown", "0 NaN and 2 infinite"),
        (np.full((2, 2), np.nan), "unknown", "4 NaN"),
        (RNG.gamma(1.0, 50.0, size=(40, 60)), "unknown", "neither counts nor plainly normalised"),
        (np.round(RNG.gamma(1.0, 50.0, size=(40, 60)), 2), "unknown", "neither counts"),  # RSEM writes two decimals
    ],
)
def test_other_values_are_described(matrix, kind, words):
    stats = CountStats().update(matrix)
    assert stats.kind == kind
    assert words in stats.problem()
    assert stats.remedy()


def test_negative_values_point_at_the_layer_and_at_raw():
    stats = CountStats().update(np.array([[1.5, -2.0]]))
    assert (stats.min, stats.max, stats.n_negative) == (-2.0, 1.5, 1)
    assert "layer=" in stats.remedy()
    assert "use_raw=True" in stats.remedy()


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_nothing_but_zeros_is_empty(shape):
    stats = CountStats().update(sparse.csr_matrix(shape))
    assert stats.kind == "empty"
    assert stats.problem() == ""
    assert stats.n_empty_cells == shape[0]
    assert CountStats().kind == "empty"


def test_stored_zeros_are_no_values():
    stats = CountStats().update(sparse.csr_matrix((np.array([0.0, 2.0]), [0, 1], [0, 1, 2]), shape=(2, 2)))
    assert (stats.n_nonzero, stats.n_empty_cells, stats.min, stats.max) == (1, 1, 0, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from([COUNTS, NORMALIZED, log1p(NORMALIZED)]))
def test_blocks_do_not_matter(cuts, matrix):
    whole, parts = CountStats().update(matrix), CountStats()
    bounds = [0, *sorted(cuts), 40]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        parts.update(matrix[start:stop])
        assert parts.kind in (whole.kind, "empty")
    for name in (
        "n_cells",
        "n_genes",
        "n_nonzero",
        "n_noninteger",
        "n_empty_cells",
        "min",
        "max",
        "kind",
        "target_sum",
    ):
        assert getattr(parts, name) == getattr(whole, name)


def test_a_bad_block_late_in_the_matrix_is_seen():
    stats = CountStats().update(COUNTS)
    assert stats.kind == "counts"
    stats.update(np.array([[0.5] + [0.0] * 59]))
    assert stats.problem()
