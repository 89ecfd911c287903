"""Outputs of scLong: what they mean, that shortcuts change nothing, and that cells do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.sclong import GOGraph, attention
from scfm.backbones.sclong.objective import Draws, draw, n_targets
from scfm.genes import GeneVocab

N = 41
SIZES = {
    "n_positions": N, "top_length": 9, "dim": 12, "value_hidden": 8,
    "large_dim": 20, "large_depth": 3, "large_heads": 3, "large_dim_head": 6,
    "mini_depth": 2, "mini_heads": 2, "mini_dim_head": 6, "decoder_depth": 2, "decoder_heads": 2, "decoder_dim_head": 5,
}  # fmt: skip


def make(**changes):
    vocab = GeneVocab([*(f"GENE{i}" for i in range(N - 1)), "PAD"], specials=["PAD"])
    backbone = from_config("sclong", SIZES | changes, vocab, seed=3)
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, N - 1, (2, 60), generator=generator)
    backbone.set_go_graph(GOGraph(edges, torch.rand(60, generator=generator) + 0.1))
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return make()


def rows_of(seed=0, n_cells=4):
    rows = np.random.default_rng(seed).gamma(1.0, 2.0, (n_cells, N)).astype(np.float32)
    rows[rows < 2] = 0
    rows[:, -1] = 0
    rows[1, 4:12] = -10
    return rows


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(scope="module")
def tokens(backbone):
    return backbone.batch(rows_of())


def test_inference_and_gradient_code_give_the_same(backbone, tokens):
    for key_max in ("cell", "batch", "head"):
        expected = backbone.module(tokens, key_max=key_max)
        with torch.inference_mode():
            close(backbone.module(tokens, key_max=key_max), expected)


def test_every_key_maximum_gives_other_numbers(backbone, tokens):
    embedded = [backbone.embed(tokens, key_max=key_max) for key_max in ("cell", "batch", "head")]
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(embedded, [*embedded[1:], embedded[0]], strict=True))
    alone = torch.cat([backbone.embed(tokens.select([i]), key_max="batch") for i in range(4)])
    close(alone, embedded[0])
    with pytest.raises(ValueError, match="key_max must be one of"):
        backbone.embed(tokens, key_max="token")


def test_poolings_are_those_of_the_states(backbone, tokens):
    states = backbone.gene_states(tokens, genes=np.arange(N))
    expression = backbone.reconstruct(tokens, genes=np.arange(N))
    close(backbone.embed(tokens), states.mean(1))
    close(backbone.embed(tokens, pooling="sum_dims"), states.sum(2), 1e-4)
    expected = torch.stack([s[torch.from_numpy(r > 0)].mean(0) for s, r in zip(states, rows_of(), strict=True)])
    close(backbone.embed(tokens, pooling="mean_expressed"), expected)
    per_gene = torch.cat([states, expression[..., None]], 2).sum(2)
    close(backbone.embed(tokens, pooling="eq11"), per_gene, 1e-4)
    columns = [3, -1, 3, 0]
    filled = per_gene[:, columns]
    filled[:, 1] = per_gene.mean(1)
    close(backbone.embed(tokens, pooling="eq11", columns=columns), filled, 1e-4)


def test_poolings_by_gene_follow_the_genes_of_the_data(backbone):
    match = backbone.vocab.match(["GENE7", "OTHER", "GENE1"])
    for pooling in backbone.poolings:
        options = backbone.pooling_options(pooling, match)
        assert bool(options) == (pooling in ("eq11", "mean_dims"))
        assert backbone.embedding_dim(pooling, **options) == (3 if options else {"sum_dims": N}.get(pooling, 12))


def test_some_genes_are_those_of_the_whole(backbone, tokens):
    states, expression = backbone.gene_states(tokens), backbone.reconstruct(tokens)
    assert states.shape == (4, N - 1, 12)
    assert expression.shape == (4, N - 1)
    close(backbone.gene_states(tokens, genes=["GENE5", "GENE0"]), states[:, [5, 0]])
    close(backbone.reconstruct(tokens, genes=[5, 0]), expression[:, [5, 0]])


def test_genes_row_by_row(backbone, tokens):
    states, expression = backbone.gene_states(tokens), backbone.reconstruct(tokens)
    for part in backbone.iter_gene_states(tokens):
        close(part.values, states[part.cells, part.genes])
        assert len(part.values) == N - 1
    parts = list(backbone.iter_reconstruction(tokens))
    for i, part in enumerate(parts):
        assert (part.cells == i).all()
        assert sorted(part.genes.tolist()) == np.flatnonzero(rows_of()[i] > 0).tolist()
        close(part.values, expression[part.cells, part.genes])
    chosen = list(backbone.iter_reconstruction(tokens, ["GENE2"]))
    close(torch.cat([part.values for part in chosen]), expression[:, 2])


def test_cells_that_are_not_valid_are_nan(backbone):
    counts = sparse.csr_matrix(np.array([[1, 2], [0, 0], [3, 0]]))
    tokens = backbone.tokenize(counts, ["GENE1", "GENE2"])
    for out in (backbone.gene_states(tokens), backbone.reconstruct(tokens), backbone.embed(tokens, pooling="eq11")):
        missing = torch.isnan(out).flatten(1)
        assert missing.all(1).tolist() == [False, True, False]
        assert not missing[[0, 2]].any()


def test_static_gene_embeddings(backbone):
    position, go, total = (backbone.gene_embeddings(kind=kind) for kind in ("position", "go", "sum"))
    assert position.shape == (N, 12)
    close(backbone.gene_embeddings(), position)
    close(total, position + go)
    with pytest.raises(ValueError, match="kind must be one of position, go, sum"):
        backbone.gene_embeddings(kind="token")


def test_gene_vectors_follow_their_weights():
    backbone = make()
    tokens = backbone.batch(rows_of())
    first = backbone.embed(tokens)
    assert backbone.module.gene_vectors() is backbone.module.gene_vectors()
    for change in ("go", "gene_table"):
        weight = getattr(backbone.module, change).weight
        with torch.no_grad():
            weight.mul_(2)
        second = backbone.embed(tokens)
        assert (second - first).abs().max() > 1e-3, change
        first = second
    state = {name: value.clone() for name, value in make().module.state_dict().items()}
    backbone.module.load_state_dict(state)
    close(backbone.embed(tokens), make().embed(tokens))


def test_types_of_weights_tables_and_streams():
    backbone = make()
    exact = backbone.embed(backbone.batch(rows_of()))
    backbone.to(precision="bfloat16")
    assert backbone.dtype == torch.bfloat16
    module = backbone.module
    assert module.gene_table.weight.dtype == torch.float64
    assert {p.dtype for p in module.go.parameters()} == {torch.float32}
    assert module.large.layers[0].projection.dtype == torch.float32
    assert module.large.layers[0].query.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert module(backbone.batch(rows_of())).dtype == torch.float32
    close_to = torch.cosine_similarity(backbone.embed(backbone.batch(rows_of())), exact)
    assert close_to.min() > 0.999


def test_a_long_vector_of_masked_values_is_cut():
    backbone = make()
    mask = backbone.module.value_embedding.mask.weight
    tokens = backbone.batch(rows_of())
    with torch.no_grad():
        mask.mul_(3 / mask.norm())
    embedded, given = backbone.embed(tokens), mask.clone()
    torch.testing.assert_close(mask, given, msg="inference changes no weight")
    with torch.no_grad():
        mask.div_(3)
    close(backbone.embed(tokens), embedded)
    with torch.no_grad():
        mask.mul_(3)
    backbone.module.train()
    backbone.module(tokens)
    assert mask.norm().item() == pytest.approx(1, abs=1e-5), "training replaces the weight, as upstream"


def test_performer_pytorch_can_compute_the_attention(tokens):
    pytest.importorskip("performer_pytorch")
    from scfm.nn import _performer_pytorch

    backbone = make()
    able, unable = ("head", "cell") if _performer_pytorch._convention() == "head" else ("cell", "head")
    expected = backbone.embed(tokens, key_max=able)
    backbone.set_attention_backend("performer-pytorch")
    close(backbone.embed(tokens, key_max=able), expected)
    with pytest.raises(ValueError, match="cannot give key_max"):
        backbone.embed(tokens, key_max=unable)
    backbone.set_attention_backend("scfm")
    close(backbone.embed(tokens, key_max=able), expected)


# -- attention -----------------------------------------------------------------------------------------------------------


def test_maps_of_the_large_encoder(backbone, tokens):
    heads = backbone.attention(tokens, 1, average_heads=False)
    assert heads.shape == (4, 3, 9, 9)
    assert heads.dtype == torch.float32
    close(heads.sum(-1), torch.ones(4, 3, 9))
    close(backbone.attention(tokens, -2), heads.mean(1))
    every = torch.stack([backbone.attention(tokens, layer) for layer in range(3)])
    close(backbone.attention(tokens, average_layers=True), every.mean(0))


def test_maps_of_chosen_genes_are_parts_of_the_whole(backbone, tokens):
    whole = backbone.attention(tokens)
    top = backbone.encode(tokens).top_indices
    genes = torch.tensor([top[0, 4], top[0, 1], N - 2])
    chosen = backbone.attention(tokens, genes=genes)
    for cell in range(4):
        for i, row in enumerate(genes):
            for j, column in enumerate(genes):
                here = torch.nonzero(top[cell] == row), torch.nonzero(top[cell] == column)
                missing = not (len(here[0]) and len(here[1]))
                expected = torch.tensor(torch.nan) if missing else whole[cell, here[0][0, 0], here[1][0, 0]]
                close(chosen[cell, i, j], expected)


@pytest.mark.parametrize("kind", ["mini", "decoder"])
def test_maps_of_the_other_stacks(backbone, tokens, kind):
    weights = backbone.attention(tokens, kind=kind, genes=np.arange(N), average_heads=False)
    seen = ~torch.isnan(weights[:, 0]).all(-1)
    assert seen.sum(1).tolist() == [N - 9 if kind == "mini" else N] * 4
    sums = torch.nan_to_num(weights).sum(-1)
    close(sums[:, 0], seen.float())
    if kind == "mini":
        top = backbone.encode(tokens).top_indices
        assert not seen.gather(1, top).any()
    with pytest.raises(ValueError, match=r"choose some with genes="):
        backbone.attention(tokens, kind=kind)


def test_ranks_and_pieces(backbone, tokens, monkeypatch):
    weights = backbone.attention(tokens, average_heads=False)
    order = weights.argsort(-1).argsort(-1) / 9
    close(backbone.attention(tokens, rank=True, average_heads=False), order)
    close(backbone.attention(tokens, rank=True), order.mean(1))
    monkeypatch.setattr(attention, "_STEP", 60)
    close(backbone.attention(tokens, average_heads=False), weights)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layer": 3}, "layers 0 to 2"),
        ({"kind": "encoder"}, "one of large, mini, decoder"),
        ({"genes": [N]}, "between 0 and"),
    ],
)
def test_what_does_not_exist_is_named(backbone, tokens, options, text):
    with pytest.raises(ValueError, match=text):
        backbone.attention(tokens, **options)


# -- pre-training --------------------------------------------------------------------------------------------------------


def plain_tokens(backbone, seed=0, n_cells=6):
    return backbone.batch(np.maximum(rows_of(seed, n_cells), 0))


def test_targets_are_drawn_evenly_and_in_the_right_number(backbone):
    tokens = plain_tokens(backbone)
    generator, hits, masked = torch.Generator().manual_seed(0), 0, 0
    cells = torch.repeat_interleave(torch.arange(len(tokens)), tokens.lengths)
    for _ in range(400):
        draws = draw(tokens, backbone.config, generator)
        assert torch.equal(torch.bincount(cells[draws.targets], minlength=6), n_targets(tokens.lengths, 0.15))
        assert not (draws.replaced & ~draws.targets).any()
        hits, masked = hits + draws.targets.double(), masked + draws.replaced.sum()
    share = (n_targets(tokens.lengths, 0.15) / tokens.lengths)[cells]
    assert ((hits / 400 - share).abs() < 0.1).all()
    assert masked / hits.sum() == pytest.approx(0.9, abs=0.02)


def test_loss_is_the_error_at_the_targets(backbone):
    tokens = plain_tokens(backbone)
    draws = draw(tokens, backbone.config, torch.Generator().manual_seed(1))
    loss = backbone.pretraining_loss(tokens, draws=draws)
    cells = np.repeat(np.arange(6), tokens.lengths)
    shown, wanted = np.maximum(rows_of(0, 6), 0), np.zeros((6, N), dtype=bool)
    shown[cells[draws.replaced], tokens.flat_ids[draws.replaced]] = -10
    wanted[cells[draws.targets], tokens.flat_ids[draws.targets]] = True
    predicted = backbone.reconstruct(backbone.batch(shown), genes=np.arange(N)).numpy()
    expected = ((predicted - np.maximum(rows_of(0, 6), 0))[wanted] ** 2).mean()
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.n_targets == wanted.sum()
    again = backbone.pretraining_loss(tokens, torch.Generator().manual_seed(1))
    assert again.total.item() == pytest.approx(loss.total.item(), rel=1e-6)


def test_masked_genes_go_through_the_mini_encoder(backbone):
    tokens = plain_tokens(backbone)
    rows = np.maximum(rows_of(0, 6), 0)
    rows[:, :20][rows[:, :20] > 0] = -10
    top = backbone.encode(backbone.batch(rows)).top_indices.numpy()
    assert (np.take_along_axis(rows, top, 1) >= 0).all()
    assert len(tokens) == 6


def test_training_redraws_features_only_in_training_mode():
    backbone = make(redraw_every=2)
    tokens, module = plain_tokens(backbone), backbone.module
    before = module.large.layers[0].projection.clone()
    backbone.pretraining_loss(tokens)
    assert int(module.large.calls_since_redraw) == 0
    module.train()
    for calls in (1, 2, 0):
        backbone.pretraining_loss(tokens, torch.Generator().manual_seed(0))
        assert [int(getattr(module, s).calls_since_redraw) for s in ("large", "mini", "decoder")] == [calls] * 3
        assert torch.equal(module.large.layers[0].projection, before) == (calls > 0)


def test_cells_without_targets_and_masked_input(backbone):
    nothing = Draws(*[torch.zeros(len(plain_tokens(backbone).flat_ids), dtype=torch.bool)] * 2)
    loss = backbone.pretraining_loss(plain_tokens(backbone), draws=nothing)
    assert (loss.n_targets, loss.total.item()) == (0, 0)
    with pytest.raises(ValueError, match="masks values itself"):
        backbone.pretraining_loss(backbone.batch(rows_of()))
