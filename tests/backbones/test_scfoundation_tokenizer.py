"""Tokens of scFoundation: modes, depths, and what happens to unusual cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.scfoundation import SCFoundationConfig
from scfm.genes import GeneVocab

N_GENES = 12
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])
T, S = N_GENES, N_GENES + 1


@pytest.fixture(scope="module")
def backbone():
    config = SCFoundationConfig(
        n_genes=N_GENES, encoder_dim=6, encoder_depth=1, encoder_heads=2, decoder_dim=4, decoder_depth=1,
        decoder_heads=1, decoder_dim_head=4, n_bins=3,
    )  # fmt: skip
    return from_config("scfoundation", config, GeneVocab(GENES), seed=0)


def cells(*rows):
    return sparse.csr_matrix(np.array(rows, dtype=np.float64))


def row(**values):
    out = np.zeros(N_GENES)
    for name, value in values.items():
        out[int(name[1:])] = value
    return out


def entry(tokens, cell, position):
    one = tokens.select([cell])
    return one.flat_values[one.flat_ids == position].tolist()


def test_counts_become_log_normalised_values_between_genes_and_depths(backbone):
    tokens = backbone.tokenize(cells(row(g7=30, g2=10)), GENES, target="t4")
    assert tokens.flat_ids.tolist() == [2, 7, T, S]
    expected = [np.log1p(10 / 40 * 1e4), np.log1p(30 / 40 * 1e4), 4.0, np.log10(40)]
    np.testing.assert_allclose(tokens.flat_values, expected, rtol=1e-6)
    assert tokens.flat_values.dtype == torch.float32
    assert tokens.queries is None


@pytest.mark.parametrize(
    ("target", "expected"), [("t4", 4.0), ("t4.5", 4.5), ("f2", np.log10(80)), ("a1", np.log10(40) + 1)]
)
def test_rules_of_the_wanted_depth(backbone, target, expected):
    tokens = backbone.tokenize(cells(row(g1=40)), GENES, target=target)
    assert entry(tokens, 0, T) == pytest.approx([expected])
    again = backbone.tokenize(cells(row(g1=40)), GENES, tgthighres=target)
    assert torch.equal(tokens.flat_values, again.flat_values)


@pytest.mark.parametrize("target", ["", "4", "x4", "t", "tt", "f0", "t-1", "tinf", None])
def test_a_wrong_target_is_explained(backbone, target):
    with pytest.raises(ValueError, match="write 't4'"):
        backbone.tokenize(cells(row(g1=40)), GENES, target=target)


def test_depth_of_log_values_is_their_own_sum(backbone):
    tokens = backbone.tokenize(cells(row(g1=3.5, g2=9.5)), GENES, pre_normalized=True)
    assert entry(tokens, 0, 1) == [3.5]
    assert entry(tokens, 0, S) == pytest.approx([np.log10(13)])


def test_totals_are_given_apart_or_in_a_last_column(backbone):
    data = cells(row(g1=3.5, g2=9.5), row(g0=1))
    given_apart = backbone.tokenize(data, GENES, pre_normalized="A", total_counts=np.array([1000, 200]))
    appended = sparse.hstack([data, sparse.csr_matrix([[1000.0], [200.0]])], format="csr")
    in_column = backbone.tokenize(appended, GENES, pre_normalized="A")
    assert entry(given_apart, 0, S) == pytest.approx([3.0])
    assert torch.equal(given_apart.flat_values, in_column.flat_values)
    with pytest.raises(ValueError, match="needs the total count"):
        backbone.tokenize(data, GENES, pre_normalized="A")
    with pytest.raises(ValueError, match="one entry for each of 2 cells"):
        backbone.tokenize(data, GENES, pre_normalized="A", total_counts=np.array([5.0]))
    with pytest.raises(ValueError, match="belong to pre_normalized='A'"):
        backbone.tokenize(data, GENES, total_counts=np.array([5.0, 5.0]))


def test_bulk_counts_are_scaled_to_the_median(backbone):
    data = cells(row(g0=10, g1=30), row(g0=50, g3=50), row(g5=70, g6=10))
    tokens = backbone.tokenize(data, GENES, input_type="bulk")
    values = [np.log1p(10 * 80 / 40), np.log1p(30 * 80 / 40)]
    np.testing.assert_allclose(entry(tokens, 0, 0) + entry(tokens, 0, 1), values, rtol=1e-6)
    assert entry(tokens, 0, S) == entry(tokens, 0, T) == pytest.approx([np.log10(sum(values))])
    same = backbone.tokenize(data, GENES, input_type="bulk", median_total=80.0)
    assert torch.equal(tokens.flat_values, same.flat_values)


def test_the_median_of_all_blocks_is_what_one_block_would_give(backbone):
    rng = np.random.default_rng(0)
    data = sparse.csr_matrix(rng.poisson(2, (9, N_GENES)).astype(float) * (np.arange(9)[:, None] != 4))
    match = backbone.vocab.match(GENES)
    blocks = [data[:4], data[4:]]
    options = backbone.prepare(iter(blocks), match, {"input_type": "bulk"})
    parts = [backbone.tokenize(block, match, **options) for block in blocks]
    whole = backbone.tokenize(data, match, input_type="bulk")
    assert torch.equal(torch.cat([part.flat_values for part in parts]), whole.flat_values)


def test_other_inputs_need_no_pass_over_the_data(backbone):
    def untouched():
        pytest.fail("the data was read")
        yield

    match = backbone.vocab.match(GENES)
    for options in ({}, {"pre_normalized": True}, {"input_type": "bulk", "pre_normalized": "T"}):
        assert backbone.prepare(untouched(), match, options) == options


def test_bulk_log_values_have_the_plain_sum_as_depth(backbone):
    tokens = backbone.tokenize(cells(row(g1=3.5, g2=9.5)), GENES, input_type="bulk", pre_normalized=True)
    assert entry(tokens, 0, S) == entry(tokens, 0, T) == [13.0]


def test_cells_without_genes_or_depth_are_not_valid(backbone):
    data = cells(row(), row(g3=1), row(g3=2), row(g3=1, g4=1))
    tokens = backbone.tokenize(data, GENES)
    assert tokens.valid.tolist() == [False, False, True, True]
    embedded = backbone.embed(tokens)
    assert torch.isnan(embedded).all(1).tolist() == [True, True, False, False]
    assert torch.isnan(backbone.gene_states(tokens)).flatten(1).all(1).tolist() == [True, True, False, False]
    assert torch.isnan(backbone.reconstruct(tokens)).all(1).tolist() == [True, True, False, False]
    assert backbone.tokenize(cells(row(g3=20)), GENES, target="f0.05").valid.tolist() == [False]


def test_negative_values_reach_the_decoder_alone(backbone):
    data = cells(row(g1=3, g4=-2, g9=40))
    tokens = backbone.tokenize(data, GENES, pre_normalized=True)
    assert tokens.flat_ids.tolist() == [1, 9, T, S]
    assert tokens.queries.flat_ids.tolist() == [4]
    assert tokens.queries.flat_values.tolist() == [-2]
    without = backbone.tokenize(cells(row(g1=3, g9=38)), GENES, pre_normalized=True)
    assert not torch.allclose(backbone.gene_states(tokens), backbone.gene_states(without))


@pytest.mark.parametrize("mark", [102.0, 103.0])
def test_a_real_value_is_not_taken_for_a_mark(backbone, mark):
    tokens = backbone.tokenize(cells(row(g1=mark)), GENES, input_type="bulk", pre_normalized=True)
    near = backbone.tokenize(cells(row(g1=mark - 1e-3)), GENES, input_type="bulk", pre_normalized=True)
    assert tokens.flat_ids.tolist() == [1, T, S]
    torch.testing.assert_close(backbone.embed(tokens), backbone.embed(near), atol=1e-3, rtol=1e-3)


def test_impossible_values_are_refused(backbone):
    with pytest.raises(ValueError, match="pre_normalized=True"):
        backbone.tokenize(cells(row(g1=-1)), GENES)
    with pytest.raises(ValueError, match="NaN"):
        backbone.tokenize(cells(row(g1=np.nan)), GENES, pre_normalized=True)
    for options, text in (
        ({"input_type": "spatial"}, "'singlecell' or 'bulk'"),
        ({"pre_normalized": "yes"}, "False, True or 'A'"),
        ({"pre_normalized": "A", "input_type": "bulk"}, "single-cell mode"),
        ({"duplicates": "keep"}, "one place for each gene"),
    ):
        with pytest.raises(ValueError, match=text):
            backbone.tokenize(cells(row(g1=5)), GENES, **options)


def test_counts_of_one_gene_are_summed_but_logarithms_are_not(backbone):
    names = ["GENE1", "GENE1", "OTHER"]
    data = sparse.csr_matrix([[10.0, 20.0, 7.0]])
    tokens = backbone.tokenize(data, names)
    assert tokens.flat_ids.tolist() == [1, T, S]
    assert entry(tokens, 0, S) == pytest.approx([np.log10(30)])
    with pytest.raises(ValueError, match="GENE1"):
        backbone.tokenize(data, names, pre_normalized=True)
    assert len(backbone.tokenize(data, names, pre_normalized=True, duplicates="sum")) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_form_of_the_matrix_changes_nothing(backbone, seed):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(1.0, (4, N_GENES)).astype(np.float32)
    expected = backbone.tokenize(sparse.csr_matrix(dense), GENES)
    order = rng.permutation(N_GENES)
    split = sparse.csr_matrix(dense)
    twice = sparse.csr_matrix(
        (np.repeat(split.data / 2, 2), np.repeat(split.indices, 2), split.indptr * 2), shape=split.shape
    )
    unsorted = sparse.csr_matrix(dense[:, order])[:, np.argsort(order)]
    for counts, names in (
        (sparse.csr_matrix(dense[:, order]), GENES[order]),
        (sparse.csc_matrix(dense), GENES),
        (twice, GENES),
        (unsorted, GENES),
        (sparse.csr_matrix(dense.astype(np.int64)), np.arange(N_GENES)),
    ):
        before = counts.copy()
        tokens = backbone.tokenize(counts, names)
        assert torch.equal(tokens.flat_ids, expected.flat_ids)
        assert torch.equal(tokens.flat_values, expected.flat_values)
        assert torch.equal(tokens.offsets, expected.offsets)
        np.testing.assert_array_equal(counts.data, before.data)
        np.testing.assert_array_equal(counts.indices, before.indices)


def test_batches_from_rows_and_from_padded_arrays_agree(backbone):
    tokens = backbone.tokenize(cells(row(g7=30, g2=10), row(g0=4, g1=5, g11=6)), GENES)
    rows = np.zeros((2, N_GENES + 2), dtype=np.float32)
    rows[np.repeat([0, 1], tokens.lengths), tokens.flat_ids] = tokens.flat_values
    from_rows = backbone.batch(rows)
    from_padded = backbone.batch(tokens.ids, tokens.values)
    for other in (from_rows, from_padded):
        assert torch.equal(other.flat_ids, tokens.flat_ids)
        assert torch.equal(other.flat_values, tokens.flat_values)
        assert torch.equal(other.padding, tokens.padding)


def test_masked_positions_of_rows_reach_the_decoder_alone(backbone):
    rows = np.zeros((1, N_GENES + 2))
    rows[0, [1, 5, T, S]] = [2.0, 102.0, 4.0, 3.0]
    tokens = backbone.batch(rows)
    assert tokens.flat_ids.tolist() == [1, T, S]
    assert tokens.queries.flat_ids.tolist() == [5]
    rows[0, 5] = 0
    assert not torch.allclose(backbone.reconstruct(tokens), backbone.reconstruct(backbone.batch(rows)))


def test_wrong_arrays_are_refused(backbone):
    with pytest.raises(ValueError, match="14 columns"):
        backbone.batch(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="between 0 and 13"):
        backbone.batch([[1, 99]], [[1.0, 1.0]])
    with pytest.raises(ValueError, match="occurs twice"):
        backbone.batch([[1, 1]], [[1.0, 1.0]])
