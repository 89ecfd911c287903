"""From counts to scLong tokens: scales, genes of the data, and the genes with the highest values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.sclong.module import Split, dense_values
from scfm.genes import GeneVocab

N_GENES = 20
GENES = [f"GENE{i}" for i in range(N_GENES)]
SMALL = {
    "n_positions": N_GENES + 1,
    "top_length": 6,
    "dim": 4,
    "large_dim": 4,
    "large_depth": 1,
    "mini_depth": 1,
    "decoder_depth": 1,
}


@pytest.fixture(scope="module")
def backbone():
    return from_config("sclong", SMALL, GeneVocab([*GENES, "PAD"], specials=["PAD"]))


def counts_of(seed, n_cells=5, n_genes=N_GENES):
    return np.random.default_rng(seed).poisson(1.2, (n_cells, n_genes)).astype(np.float64)


def rows(backbone, counts, genes=GENES, **options):
    return dense_values(backbone.tokenize(sparse.csr_matrix(counts), genes, **options), N_GENES + 1).numpy()[:, :-1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1, 50, 100_000]))
def test_scales_follow_their_formulas(backbone, seed, scale):
    counts = counts_of(seed) * scale
    for cell, x in enumerate(counts):
        y = np.log1p(1e4 * x / x.sum())
        literal = np.log(x / 1e4 + 1)
        for name, expected in (
            ("log1p_1e4", y),
            ("log1p_1e4_max10", np.minimum(y, 10) if y.max() > 10 else 10 * y / y.max()),
            ("paper_literal", np.minimum(literal, 10) if literal.max() > 10 else 10 * literal / literal.max()),
            ("as_is", x),
        ):
            np.testing.assert_allclose(rows(backbone, counts, normalization=name)[cell], expected, rtol=1e-6)


def test_the_default_stretches_to_ten_exactly(backbone):
    values = rows(backbone, counts_of(0))
    np.testing.assert_allclose(values.max(1), 10)


def test_totals_are_those_of_all_genes_of_the_data(backbone):
    counts = counts_of(1, n_genes=N_GENES + 4)
    genes = [*GENES[:7], "X1", "X2", *GENES[7:], "X3", "X4"]
    known = [i for i, gene in enumerate(genes) if not gene.startswith("X")]
    expected = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    np.testing.assert_allclose(rows(backbone, counts, genes, normalization="log1p_1e4"), expected[:, known], rtol=1e-6)
    stretched = 10 * expected / expected.max(1, keepdims=True)
    np.testing.assert_allclose(rows(backbone, counts, genes), stretched[:, known], rtol=1e-6)


def test_only_expressed_genes_are_stored(backbone):
    counts = counts_of(2)
    tokens = backbone.tokenize(sparse.csr_matrix(counts), GENES)
    assert torch.equal(tokens.lengths, torch.from_numpy((counts > 0).sum(1)))
    assert tokens.flat_values.min() > 0
    assert tokens.flat_values.dtype == torch.float32


def test_a_gene_called_pad_is_no_gene(backbone):
    counts = np.ones((1, 2))
    tokens = backbone.tokenize(sparse.csr_matrix(counts), ["PAD", "GENE3"], normalization="as_is")
    assert tokens.flat_ids.tolist() == [3]


def test_cells_without_known_genes_are_not_valid(backbone):
    counts = np.array([[0, 0, 0], [0, 0, 5], [1, 0, 5]])
    tokens = backbone.tokenize(sparse.csr_matrix(counts), ["GENE1", "GENE2", "OTHER"])
    assert tokens.valid.tolist() == [False, False, True]
    assert backbone.batch(np.zeros((2, N_GENES + 1))).valid is None


@pytest.mark.parametrize("rule", ["sum", "last", "error"])
def test_columns_of_the_same_gene(backbone, rule):
    counts, genes = np.array([[1.0, 2, 3, 4]]), ["GENE0", "GENE1", "GENE0", "OTHER"]
    options = {"normalization": "as_is", "duplicates": rule}
    if rule == "error":
        with pytest.raises(ValueError, match="GENE0 from GENE0, GENE0"):
            rows(backbone, counts, genes, **options)
        with pytest.raises(ValueError, match="GENE0 from GENE0, GENE0"):
            rows(backbone, counts, genes, normalization="as_is")
        return
    assert rows(backbone, counts, genes, **options)[0, :2].tolist() == [4 if rule == "sum" else 3, 2]


def test_counts_of_the_same_gene_are_summed_before_the_logarithm(backbone):
    counts, genes = np.array([[1.0, 2, 3, 4]]), ["GENE0", "GENE1", "GENE0", "GENE2"]
    expected = np.log1p(1e3 * np.array([4, 2, 4]))
    np.testing.assert_allclose(rows(backbone, counts, genes, normalization="log1p_1e4")[0, :3], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({0: -1.0}, {"normalization": "as_is"}, "cannot be negative"),
        ({0: -1.0}, {}, "cannot be negative"),
        ({3: np.nan}, {}, "NaN or infinite"),
        ({}, {"normalization": "log2"}, "normalization must be one of log1p_1e4_max10"),
        ({}, {"duplicates": "keep"}, "duplicates must be one of sum, last, error"),
    ],
)
def test_values_and_options_that_make_no_sense_are_refused(backbone, change, options, text):
    counts = counts_of(0) + 1
    for column, value in change.items():
        counts[0, column] = value
    with pytest.raises(ValueError, match=text):
        rows(backbone, counts, **options)
    with pytest.raises(ValueError, match="19 columns, but 20 genes"):
        rows(backbone, counts_of(0)[:, 1:])


def test_model_rows_may_hold_masked_values_but_no_other_negative_ones(backbone):
    given = np.zeros((2, N_GENES + 1), dtype=np.float32)
    given[0, 3], given[1, 5] = -10, 2
    tokens = backbone.batch(given)
    assert tokens.flat_values.tolist() == [-10, 2]
    assert torch.equal(backbone.batch(given[:, :-1]).flat_ids, tokens.flat_ids)
    given[0, 4] = -0.5
    with pytest.raises(ValueError, match=r"at most -1\.0 where they are masked"):
        backbone.batch(given)
    with pytest.raises(ValueError, match="21 columns, or 20 without PAD"):
        backbone.batch(given[:, :7])


def test_what_a_matrix_has_to_hold(backbone):
    assert backbone.expected_values({}) == "counts"
    assert backbone.expected_values({"normalization": "as_is"}) == "normalized"
    assert backbone.expected_values({"normalization": "paper_literal"}) == "counts"


# -- the genes with the highest values -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 19), distinct=st.integers(1, 6))
def test_equal_values_are_taken_in_the_order_of_the_vocabulary(seed, length, distinct):
    values = np.random.default_rng(seed).integers(-1, distinct, (4, 20)).astype(np.float32)
    split = Split.of(torch.from_numpy(values), length)
    for row, top, rest in zip(values, split.top.tolist(), split.rest.tolist(), strict=True):
        order = sorted(range(20), key=lambda i: (-row[i], i))
        assert top == order[:length]
        assert rest == sorted(order[length:])


def test_ties_as_torch_takes_them_and_unknown_rules():
    values = torch.zeros(1, 50)
    values[0, 30] = 1
    split = Split.of(values, 10, "torch")
    assert split.top[0, 0] == 30
    assert sorted([*split.top[0].tolist(), *split.rest[0].tolist()]) == list(range(50))
    with pytest.raises(ValueError, match="tie_break must be one of index, torch"):
        Split.of(values, 10, "random")
