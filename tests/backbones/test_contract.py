"""What every backbone promises, tested over all installed ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import backbone_class, backbone_kinds, from_config, random_copy
from scfm.genes import GeneVocab

N_GENES = 40
# models whose values contain the total of all genes of the data, known or not
TOTAL_OF_ALL_GENES = {"sclong": {"normalization": "as_is"}}
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=backbone_kinds())
def backbone(request):
    cls = backbone_class(request.param)
    names = [*cls.specials, *(f"GENE{i}" for i in range(N_GENES))]
    assert request.param in TINY, f"add a tiny config for {request.param} to tests/tiny.py"
    vocab = GeneVocab(names, specials=cls.specials)
    config = cls.config_for(TINY[request.param], vocab)
    return from_config(request.param, config, vocab, name="tiny", seed=1)


def counts_of(seed: int, n_cells: int = 6) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(1.0, 1.5, size=(1, N_GENES)), size=(n_cells, N_GENES)) + np.eye(n_cells, N_GENES) * 3
    return sparse.csr_matrix(dense.astype(np.float32))


GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def embed(backbone, counts, genes=GENES, **options):
    return backbone.embed(backbone.tokenize(counts, genes, **options)).numpy()


def test_embeddings_have_the_promised_shape_for_each_pooling(backbone):
    tokens = backbone.tokenize(counts_of(0), GENES)
    for pooling in backbone.poolings:
        out = backbone.embed(tokens, pooling=pooling)
        assert out.shape == (6, backbone.embedding_dim(pooling))
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()


def test_unknown_pooling_is_named(backbone):
    with pytest.raises(ValueError, match="no pooling 'sum'"):
        backbone.embed(backbone.tokenize(counts_of(0), GENES), pooling="sum")


def test_a_capability_that_is_missing_names_models_that_have_it(backbone):
    with pytest.raises(scfm.UnsupportedError, match="Models that can"):
        backbone.require("folds_proteins")


@few
@given(seed=st.integers(0, 10_000))
def test_order_of_cells_permutes_rows(backbone, seed):
    counts = counts_of(seed)
    order = np.random.default_rng(seed).permutation(counts.shape[0])
    np.testing.assert_allclose(embed(backbone, counts)[order], embed(backbone, counts[order]), atol=1e-5)


@few
@given(seed=st.integers(0, 10_000))
def test_order_of_genes_changes_nothing(backbone, seed):
    counts = counts_of(seed)
    order = np.random.default_rng(seed).permutation(N_GENES)
    np.testing.assert_allclose(embed(backbone, counts), embed(backbone, counts[:, order], GENES[order]), atol=1e-5)


@few
@given(seed=st.integers(0, 10_000), n_cells=st.integers(1, 20))
def test_a_cell_does_not_see_its_batch(backbone, seed, n_cells):
    counts = counts_of(seed, n_cells)
    alone = np.concatenate([embed(backbone, counts[[i]]) for i in range(n_cells)])
    np.testing.assert_allclose(embed(backbone, counts), alone, atol=1e-5)
    tokens = backbone.tokenize(counts, GENES)
    parts = [backbone.embed(tokens.select([i])).numpy() for i in range(n_cells)]
    np.testing.assert_allclose(np.concatenate(parts), alone, atol=1e-5)


@few
@given(seed=st.integers(0, 10_000))
def test_unknown_genes_change_nothing(backbone, seed):
    counts = counts_of(seed)
    extra = sparse.hstack([counts_of(seed + 1)[:, :7], counts], format="csr")
    genes = np.concatenate([[f"OTHER{i}" for i in range(7)], GENES])
    options = TOTAL_OF_ALL_GENES.get(backbone.kind, {})
    expected = embed(backbone, counts, **options)
    np.testing.assert_allclose(expected, embed(backbone, extra, genes, **options), atol=1e-5)


def test_duplicate_genes_are_summed(backbone):
    counts = counts_of(3)
    first = counts.copy()
    first.data = np.floor(first.data / 2)
    second = sparse.csr_matrix(counts - first)
    doubled = sparse.hstack([first, second], format="csr")
    np.testing.assert_allclose(
        embed(backbone, counts), embed(backbone, doubled, np.concatenate([GENES, GENES])), atol=1e-5
    )


def test_empty_cells_give_nan_and_leave_others_alone(backbone):
    counts = counts_of(5).tolil()
    counts[2] = 0
    out = embed(backbone, counts.tocsr())
    assert np.isnan(out[2]).all()
    keep = np.arange(6) != 2
    np.testing.assert_allclose(out[keep], embed(backbone, counts_of(5)[keep]), atol=1e-5)


def test_only_empty_cells_and_no_cells(backbone):
    nothing = sparse.csr_matrix((3, N_GENES), dtype=np.float32)
    assert np.isnan(embed(backbone, nothing)).all()
    assert embed(backbone, nothing[:0]).shape == (0, backbone.embedding_dim())


def test_a_single_gene_and_all_genes(backbone):
    counts = np.zeros((2, N_GENES), dtype=np.float32)
    counts[0, 4], counts[1] = 7, np.arange(1, N_GENES + 1)
    assert np.isfinite(embed(backbone, sparse.csr_matrix(counts))).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64, np.uint16])
def test_type_of_counts_changes_nothing(backbone, dtype):
    counts = counts_of(7)
    np.testing.assert_allclose(embed(backbone, counts), embed(backbone, counts.astype(dtype)), atol=1e-6)


def test_stored_zeros_change_nothing(backbone):
    counts = counts_of(8)
    stored = sparse.csr_matrix(np.ones_like(counts.toarray()))
    stored.data = counts.toarray().ravel()
    np.testing.assert_allclose(embed(backbone, counts), embed(backbone, stored), atol=1e-6)


def test_global_random_state_is_neither_used_nor_touched(backbone):
    counts = counts_of(9)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = embed(backbone, counts)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(before, embed(backbone, counts))
    assert torch.equal(state, torch.get_rng_state())


def test_static_gene_embeddings_have_one_row_per_entry(backbone):
    table = backbone.gene_embeddings()
    assert table.shape[0] == len(backbone.vocab)
    assert torch.isfinite(table).all()


def test_save_and_load_give_the_same_model(backbone, tmp_path):
    path = backbone.save(tmp_path / "saved")
    loaded = scfm.load(path)
    assert loaded.kind == backbone.kind
    assert loaded.config == backbone.config
    assert loaded.vocab == backbone.vocab
    assert loaded.load_report.ok
    np.testing.assert_array_equal(embed(backbone, counts_of(1)), embed(loaded, counts_of(1)))
    with pytest.raises((FileExistsError, ValueError)):
        backbone.save(path)


def test_reduced_precision_stays_close(backbone, tmp_path):
    exact = embed(backbone, counts_of(2))
    reduced = scfm.load(backbone.save(tmp_path / "saved"), precision="bfloat16")
    assert reduced.dtype == torch.bfloat16
    close = embed(reduced, counts_of(2))
    cosine = (exact * close).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(close, axis=1)
    assert cosine.min() > 0.999


def test_random_copy_has_other_weights_of_the_same_shape(backbone):
    copy = random_copy(backbone, seed=3)
    assert copy.config == backbone.config
    assert not np.allclose(embed(copy, counts_of(1)), embed(backbone, counts_of(1)))
    np.testing.assert_array_equal(embed(copy, counts_of(1)), embed(random_copy(backbone, seed=3), counts_of(1)))


def test_training_loss_has_gradients(backbone):
    if "pretrains" not in backbone.capabilities:
        pytest.skip("no objective")
    model = random_copy(backbone, seed=0)
    model.module.train().requires_grad_(requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    tokens = model.tokenize_for_training(counts_of(1), GENES, generator)
    loss = model.pretraining_loss(tokens, generator).total
    loss.backward()
    norms = [p.grad.norm() for p in model.module.parameters() if p.grad is not None]
    assert norms
    assert all(torch.isfinite(norm) for norm in norms)


# -- cells at the edges, in batches of any size ------------------------------------------------------------------------


def edge_cells() -> sparse.csr_matrix:
    """64 cells: one gene, none, all genes, a huge count, and ordinary ones."""
    counts = counts_of(11, 64).toarray()
    counts[5], counts[6], counts[7], counts[8] = 0, 0, np.arange(1, N_GENES + 1), 0
    counts[5, 3] = 4
    counts[8, [0, 9]] = [200_000, 1]
    return sparse.csr_matrix(counts.astype(np.float32))


def test_edge_cells_get_the_same_vector_alone_and_among_64(backbone):
    from scfm.engine import accepted_options

    counts = edge_cells()
    options = {"max_length": 9} if "max_length" in accepted_options(backbone) else {}
    for pooling in backbone.poolings:
        tokens = backbone.tokenize(counts, GENES, **options)
        together = backbone.embed(tokens, pooling=pooling).numpy()
        alone = [backbone.embed(backbone.tokenize(counts[[i]], GENES, **options), pooling=pooling) for i in range(64)]
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
        assert np.isnan(together[6]).all()
        assert np.isfinite(np.delete(together, 6, axis=0)).all()


# -- genes -------------------------------------------------------------------------------------------------------------


def rows_of(parts) -> dict[tuple[int, int], np.ndarray]:
    return {
        (int(cell), int(gene)): value.float().numpy()
        for part in parts
        for cell, gene, value in zip(part.cells, part.genes, part.values, strict=True)
    }


@pytest.mark.parametrize("what", ["gene_states", "reconstruction"])
def test_rows_of_genes_do_not_depend_on_batch_and_choice(backbone, what):
    if {"gene_states": "gene_states", "reconstruction": "reconstructs"}[what] not in backbone.capabilities:
        pytest.skip(f"no {what}")
    give = getattr(backbone, f"iter_{what}")
    counts = counts_of(12).tolil()
    counts[4] = 0
    tokens = backbone.tokenize(counts.tocsr(), GENES)
    rows = rows_of(give(tokens))
    assert {cell for cell, _ in rows} == {0, 1, 2, 3, 5}
    assert all(backbone.vocab.is_gene[gene] for _, gene in rows)
    if what == "gene_states":
        assert {value.shape for value in rows.values()} == {(backbone.gene_state_dim,)}
        chosen = [backbone.vocab["GENE7"], backbone.vocab["GENE2"]]
        some = rows_of(give(tokens, chosen))
        assert some.keys() == {key for key in rows if key[1] in chosen}
    else:
        assert {value.shape for value in rows.values()} == {()}
        expressed = {(i, backbone.vocab[f"GENE{j}"]) for i, j in zip(*counts.nonzero(), strict=True)}
        assert rows.keys() == expressed
        some = rows_of(give(tokens, ["GENE7"]))
        assert some.keys() == {(cell, backbone.vocab["GENE7"]) for cell in (0, 1, 2, 3, 5)}
        assert all(np.isfinite(value) for value in some.values())
        alone = rows_of(give(tokens.select([3]), ["GENE7"]))
        np.testing.assert_allclose(alone[0, backbone.vocab["GENE7"]], some[3, backbone.vocab["GENE7"]], atol=1e-5)
        return
    for key, value in some.items():
        np.testing.assert_allclose(value, rows[key], atol=1e-5)
    for key, value in rows_of(give(tokens.select([3]))).items():
        np.testing.assert_allclose(value, rows[3, key[1]], atol=1e-5)


def test_attention_among_chosen_genes(backbone):
    if "attends" not in backbone.capabilities:
        pytest.skip("no attention maps")
    counts = counts_of(13).tolil()
    counts[:, [2, 7, 30]] = 5
    counts[1, 7] = 0
    tokens = backbone.tokenize(counts.tocsr(), GENES)
    names = ["GENE7", "GENE30", "GENE2"]
    maps = backbone.attention(tokens, genes=names)
    assert maps.shape == (6, 3, 3)
    assert maps.dtype == torch.float32
    assert torch.isfinite(maps[0]).all()
    assert (maps[0] >= 0).all()
    np.testing.assert_allclose(backbone.attention(tokens.select([3]), genes=names)[0], maps[3], atol=1e-5)
    turned = backbone.attention(tokens, genes=names[::-1])
    np.testing.assert_allclose(turned.flip(1).flip(2).numpy(), maps.numpy(), atol=1e-5)
    heads = backbone.attention(tokens, genes=names, average_heads=False)
    np.testing.assert_allclose(heads.mean(1).numpy(), maps.numpy(), atol=1e-5)
    ranks = backbone.attention(tokens, genes=names, rank=True)
    assert ranks.shape == maps.shape
    assert ((ranks[0] >= 0) & (ranks[0] < 1)).all()


def test_reduced_precision_of_gene_outputs(backbone, tmp_path):
    if "reconstructs" not in backbone.capabilities:
        pytest.skip("no reconstruction")
    exact = rows_of(backbone.iter_reconstruction(backbone.tokenize(counts_of(2), GENES)))
    reduced = scfm.load(backbone.save(tmp_path / "saved"), precision="bfloat16")
    close = rows_of(reduced.iter_reconstruction(reduced.tokenize(counts_of(2), GENES)))
    assert close.keys() == exact.keys()
    pairs = np.array([[float(exact[key]), float(close[key])] for key in exact])
    assert np.abs(pairs[:, 0] - pairs[:, 1]).max() < 0.1 * max(1.0, np.abs(pairs).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_an_accelerator_gives_the_same_vectors(backbone, tmp_path):
    path = backbone.save(tmp_path / "saved")
    moved = scfm.load(path, device="cuda", precision="float32")
    close = moved.embed(moved.tokenize(counts_of(4), GENES)).cpu().numpy()
    np.testing.assert_allclose(close, embed(backbone, counts_of(4)), atol=1e-4)
    assert moved.to("cpu").device.type == "cpu"
    np.testing.assert_allclose(embed(moved, counts_of(4)), embed(backbone, counts_of(4)), atol=1e-5)


def test_types_and_back(backbone, tmp_path):
    moved = scfm.load(backbone.save(tmp_path / "saved"))
    wide = moved.to("cpu", "float64")
    assert wide.dtype == torch.float64
    np.testing.assert_allclose(embed(wide, counts_of(4)), embed(backbone, counts_of(4)), atol=1e-4)
    np.testing.assert_allclose(
        embed(moved.to("cpu", "float32"), counts_of(4)), embed(backbone, counts_of(4)), atol=1e-5
    )
