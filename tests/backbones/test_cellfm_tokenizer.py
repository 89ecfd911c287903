"""From counts to CellFM tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.cellfm import CellFMConfig, TokenDraws
from scfm.backbones.cellfm.tokenizer import cap_depth
from scfm.genes import GeneVocab

N_GENES = 30
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


@pytest.fixture(scope="module")
def backbone():
    config = CellFMConfig(n_genes=N_GENES, dim=8, n_heads=2, n_bins=4)
    return from_config("cellfm", config, GeneVocab(["<pad>", *GENES], specials=["<pad>"]))


def counts_of(seed, n_cells=5):
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(1.5, (n_cells, N_GENES)))


def dense(tokens):
    out = np.zeros((len(tokens), N_GENES + 1), dtype=np.float32)
    out[tokens.flat_cells, tokens.flat_ids] = tokens.flat_values
    return out[:, 1:]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_values_are_scanpys(backbone, seed):
    import anndata
    import scanpy as sc

    counts = counts_of(seed)
    adata = anndata.AnnData(counts.astype(np.float32))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    tokens = backbone.tokenize(counts, GENES)
    np.testing.assert_allclose(dense(tokens), adata.X.toarray(), rtol=1e-6)
    assert tokens.flat_values.dtype == torch.float32


def test_ids_are_rows_of_the_gene_table(backbone):
    tokens = backbone.tokenize(sparse.csr_matrix([[3, 0, 1]]), ["GENE29", "GENE4", "GENE0"])
    assert tokens.flat_ids.tolist() == [1, 30]
    assert backbone.vocab["GENE29"] == 30
    by_number = backbone.tokenize(sparse.csr_matrix([[3, 7, 1]]), np.array([30, -1, 1]))
    assert by_number.flat_ids.tolist() == [1, 30]
    assert torch.equal(by_number.flat_values, tokens.flat_values)


def test_depth_cap_counts_all_genes_of_the_data_and_rounds_half_to_even(backbone):
    counts = sparse.csr_matrix([[1, 3, 5, 199_991], [1, 3, 5, 991]])
    capped = cap_depth(counts)
    assert capped.toarray().tolist() == [[0, 2, 2, 99_996], [1, 3, 5, 991]]
    assert capped.nnz == 7
    tokens = backbone.tokenize(counts, ["GENE0", "GENE1", "GENE2", "unknown"])
    assert tokens.lengths.tolist() == [2, 3]
    assert tokens.per_cell["total"].tolist() == [4, 9]
    np.testing.assert_allclose(tokens.flat_values[:2], np.log1p([5000, 5000]), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.integers(1, N_GENES))
def test_the_largest_values_stay(backbone, seed, limit):
    counts = counts_of(seed)
    everything = dense(backbone.tokenize(counts, GENES, max_length=None))
    tokens = backbone.tokenize(counts, GENES, max_length=limit)
    assert tokens.max_length <= limit
    for cell, kept in zip(everything, dense(tokens), strict=True):
        order = sorted(np.flatnonzero(cell), key=lambda gene: (-cell[gene], gene))[:limit]
        expected = np.zeros_like(cell)
        expected[order] = cell[order]
        np.testing.assert_array_equal(kept, expected)


def test_weighted_sampling_depends_on_seed_and_content_only(backbone):
    counts = counts_of(1, 40)
    options = {"max_length": 8, "sampling": "weighted"}
    tokens = backbone.tokenize(counts, GENES, seed=3, **options)
    assert (tokens.lengths == 8).all()
    order = np.random.default_rng(0).permutation(40)
    genes = np.random.default_rng(1).permutation(N_GENES)
    shuffled = backbone.tokenize(counts[order][:, genes], GENES[genes], seed=3, **options)
    np.testing.assert_array_equal(dense(shuffled), dense(tokens)[order])
    assert not np.array_equal(dense(backbone.tokenize(counts, GENES, seed=4, **options)), dense(tokens))


def test_weighted_sampling_has_the_published_probabilities(backbone):
    counts = sparse.csr_matrix(np.tile([8, 1, 1, 1], (1, 1)))
    first = [
        backbone.tokenize(counts, GENES[:4], max_length=1, sampling="weighted", seed=seed).flat_ids.item()
        for seed in range(600)
    ]
    weight = np.log1p([8, 1, 1, 1])
    expected = weight[0] / weight.sum()
    assert np.mean(np.array(first) == 1) == pytest.approx(expected, abs=0.07)


def test_injected_genes_stay(backbone):
    counts = counts_of(2, 2) + sparse.csr_matrix(np.ones((2, N_GENES)))
    draws = TokenDraws([np.array([4, 1, 9]), np.array([30, 2, 3])])
    tokens = backbone.tokenize(counts, GENES, max_length=3, draws=draws)
    assert tokens.ids.tolist() == [[1, 4, 9], [2, 3, 30]]
    with pytest.raises(ValueError, match="draws for 1 cells"):
        backbone.tokenize(counts, GENES, max_length=3, draws=draws[:1])
    with pytest.raises(ValueError, match="no genes for a cell"):
        backbone.tokenize(counts, GENES, max_length=3, draws=TokenDraws([None, None]))


def test_a_panel_keeps_zeros_and_the_order_of_columns(backbone):
    genes = ["GENE7", "nobody", "GENE2", "else"]
    values = sparse.csr_matrix([[0.5, 1.0, 0.0, 0.0], [0, 2.0, 1.5, 3.0]])
    options = {"pre_normalized": True, "include_zeros": True}
    dropped = backbone.tokenize(values, genes, **options)
    assert dropped.ids.tolist() == [[8, 3], [8, 3]]
    assert dropped.values.tolist() == [[0.5, 0.0], [0.0, 1.5]]
    padded = backbone.tokenize(values, genes, unknown="pad", **options)
    assert padded.ids.tolist() == [[8, 0, 3, 0]] * 2
    assert padded.values.tolist() == values.toarray().tolist()
    with pytest.raises(ValueError, match="together with include_zeros"):
        backbone.tokenize(values, genes, unknown="pad")


def test_unexpressed_genes_are_added_for_training(backbone):
    counts = counts_of(3)
    tokens = backbone.tokenize_for_training(counts, GENES[::-1], torch.Generator().manual_seed(0))
    for i in range(len(tokens)):
        seen, unseen = tokens.select([i]).flat_ids, tokens.queries.select([i]).flat_ids
        assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(1, N_GENES + 1))
        assert len(seen) == (counts[i] > 0).sum()


def test_cells_without_known_genes_are_marked(backbone):
    counts = sparse.csr_matrix([[1, 0], [0, 4], [0, 0]])
    tokens = backbone.tokenize(counts, ["GENE1", "unknown"])
    assert tokens.valid.tolist() == [True, False, False]
    assert tokens.lengths.tolist() == [1, 0, 0]


def test_duplicates(backbone):
    counts, genes = sparse.csr_matrix([[1, 2, 3]]), ["GENE1", "GENE1", "GENE2"]
    same = backbone.tokenize(sparse.csr_matrix([[3, 3]]), ["GENE1", "GENE2"])
    assert torch.equal(backbone.tokenize(counts, genes).flat_values, same.flat_values)
    with pytest.raises(ValueError, match="met by several genes"):
        backbone.tokenize(counts, genes, pre_normalized=True)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (-1.0, {}, "negative"),
        (np.nan, {}, "NaN or infinite"),
        (np.inf, {}, "NaN or infinite"),
        (-1.0, {"pre_normalized": True}, "negative"),
        (1.0, {"sampling": "first"}, "sampling must be"),
        (1.0, {"max_length": 0}, "max_length must be"),
        (1.0, {"unknown": "keep"}, "unknown must be"),
    ],
)
def test_what_is_refused(backbone, value, options, message):
    with pytest.raises(ValueError, match=message):
        backbone.tokenize(sparse.csr_matrix([[value]]), ["GENE1"], **options)


def test_batches_of_ready_values_are_checked(backbone):
    with pytest.raises(ValueError, match="ids must lie"):
        backbone.batch(np.array([[31]]), np.array([[1.0]]))
    with pytest.raises(ValueError, match="log-normalised"):
        backbone.batch(np.array([[3]]), np.array([[-1.0]]))


def test_expected_values(backbone):
    assert backbone.expected_values({}) == "counts"
    assert backbone.expected_values({"pre_normalized": True}) == "normalized"
