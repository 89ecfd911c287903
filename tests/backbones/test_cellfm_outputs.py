"""What CellFM gives, and what must not matter for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm.backbones import from_config
from scfm.backbones.cellfm import CellFMConfig, module
from scfm.backbones.cellfm.layers import ValueEncoder
from scfm.backbones.cellfm.objective import DownSampling, Draws, corrupt, draw, raw_counts
from scfm.genes import GeneVocab
from scfm.nn import retention

N_GENES = 40
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def network(**fields):
    config = CellFMConfig(**{"n_genes": N_GENES, "dim": 16, "n_heads": 2, "n_layers": 4, "n_bins": 8} | fields)
    out = from_config("cellfm", config, GeneVocab(["<pad>", *GENES], specials=["<pad>"]), seed=2)
    for encoder in (out.module.value_encoder, out.module.depth_encoder):
        if encoder is not None:
            torch.nn.init.normal_(encoder.a, generator=torch.Generator().manual_seed(0))
    for layer in out.module.layers:
        for norm in (layer.norm1, layer.norm2):
            torch.nn.init.normal_(norm.bias, std=0.2, generator=torch.Generator().manual_seed(0))
    return out


@pytest.fixture(scope="module")
def backbone():
    return network()


def counts_of(seed=0, n_cells=6):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(
        rng.poisson(rng.gamma(0.5, 2.0, (n_cells, 1)), (n_cells, N_GENES)) + np.eye(n_cells, N_GENES)
    )


@pytest.fixture(scope="module")
def tokens(backbone):
    return backbone.tokenize(counts_of(), GENES)


def test_closed_form_of_the_value_encoder():
    torch.manual_seed(0)
    encoder = ValueEncoder(6, 16, 0.2).double()
    torch.nn.init.normal_(encoder.a)
    x = torch.tensor([[0.0, 0.3, 1.0], [9.2, 0.3, 2.0]], dtype=torch.float64)
    hidden = torch.nn.functional.leaky_relu(encoder.w1(x[..., None]), 0.2)
    expected = encoder.table(torch.softmax(encoder.w3(hidden) + encoder.a * hidden, -1))
    torch.testing.assert_close(encoder(x), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected, atol=1e-6, rtol=1e-5)
    mean = encoder.table.weight.mean(1)
    torch.testing.assert_close(encoder(x[:1, :1])[0, 0], mean, atol=1e-6, rtol=1e-5)


def test_reduced_precision_keeps_the_logits_of_values():
    model = network()
    exact = model.module.value_encoder.logits_of_one()
    model.to(precision="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.module.value_encoder.table.weight.dtype == torch.bfloat16
    assert torch.equal(model.module.value_encoder.logits_of_one(), exact)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("run", "block"), [(1, 3), (30, 7), (60, 1000)])
def test_runs_and_blocks_change_nothing(backbone, tokens, monkeypatch, pooling, run, block):
    expected = backbone.embed(tokens, pooling=pooling)
    states = backbone.gene_states(tokens)
    monkeypatch.setattr(module, "_CPU_RUN", run)
    monkeypatch.setattr(retention, "_CPU_BLOCK", block)
    torch.testing.assert_close(backbone.embed(tokens, pooling=pooling), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.gene_states(tokens), states, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_training_and_inference_are_one_definition(backbone, tokens):
    sequences = backbone.module.sequences(tokens)
    with torch.enable_grad():
        slow = backbone.module.encode(sequences)
    assert backbone.module.training is False
    fast = backbone.embed(tokens)
    torch.testing.assert_close(slow[sequences.first], fast, atol=1e-5, rtol=1e-5)


def test_pooling_by_mean(backbone, tokens):
    states = backbone.gene_states(tokens)
    torch.testing.assert_close(backbone.embed(tokens, pooling="mean"), states.nanmean(1), atol=1e-5, rtol=1e-5)


def test_padding_acts_only_in_the_root_class(backbone, tokens):
    ids, values = tokens.ids, tokens.values
    wide = [torch.nn.functional.pad(part, (0, 5)) for part in (ids, values)]
    torch.testing.assert_close(backbone.embed(backbone.batch(*wide)), backbone.embed(tokens))
    short, long = (backbone.embed(tokens, forward="root", padded_length=n) for n in (40, 400))
    assert (short - long).abs().max() > 1e-3
    longest = backbone.tokenize(np.ones((1, N_GENES)), GENES)
    torch.testing.assert_close(
        backbone.embed(longest, forward="root", padded_length=N_GENES), backbone.embed(longest), atol=1e-5, rtol=1e-5
    )


def test_root_class_is_what_padding_gives(backbone, tokens):
    """One weighted row stands for all padding of a cell."""
    length, net = 45, backbone.module
    expected = backbone.embed(tokens, forward="root", padded_length=length)
    for i in range(len(tokens)):
        cell = tokens.select([i])
        sequences = net.sequences(cell)
        padding = length - len(cell.flat_ids)
        x = torch.cat([sequences.x, torch.zeros(padding, 16)])
        shown = torch.ones(len(x))
        shown[len(sequences.x) :] = 0
        with torch.no_grad():
            for j, layer in enumerate(net.layers):
                x = layer(x, [len(x)], None if j < 2 else shown)
        torch.testing.assert_close(x[0], expected[i], atol=1e-5, rtol=1e-5)


def test_depth_tokens_change_the_cell(backbone, tokens):
    depths = torch.rand(len(tokens), 2)
    with_depths = backbone.batch(tokens.ids, tokens.values, padding=tokens.padding, depths=depths)
    first = backbone.embed(with_depths, forward="depths")
    other = backbone.batch(tokens.ids, tokens.values, padding=tokens.padding, depths=depths * 3)
    assert not torch.allclose(first, backbone.embed(other, forward="depths"))
    torch.testing.assert_close(backbone.embed(with_depths), backbone.embed(tokens))
    with pytest.raises(scfm.UnsupportedError, match="no read-depth"):
        network(has_depth_tokens=False).embed(with_depths, forward="depths")
    with pytest.raises(ValueError, match="forward must be"):
        backbone.embed(tokens, forward="sideways")
    with pytest.raises(ValueError, match="no CLS"):
        backbone.embed(tokens, forward="encoder")


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_gene_states_in_their_three_forms(backbone, tokens):
    states = backbone.gene_states(tokens)
    assert states.shape == (len(tokens), tokens.max_length, 16)
    assert torch.equal(states.isnan().all(-1), tokens.padding)
    chosen = ["GENE5", "GENE0", "GENE5"]
    some = backbone.gene_states(tokens, genes=chosen)
    assert torch.equal(some[:, 0].nan_to_num(), some[:, 2].nan_to_num())
    rows = list(backbone.iter_gene_states(tokens, chosen[:2]))
    n_rows = 0
    for part in rows:
        for cell, gene, vector in zip(part.cells, part.genes, part.values, strict=True):
            column = chosen.index(backbone.vocab.names[gene])
            torch.testing.assert_close(vector, some[cell, column])
            place = (tokens.ids[cell] == gene).nonzero().item()
            torch.testing.assert_close(vector, states[cell, place])
            n_rows += 1
    assert n_rows == int((~some[:, :2].isnan().any(-1)).sum())
    assert backbone.gene_state_dim == 16


def test_a_panel_goes_through_the_encoder_without_cls(backbone):
    panel = backbone.tokenize(counts_of(1), GENES, include_zeros=True)
    states = backbone.gene_states(panel)
    assert states.shape == (6, N_GENES, 16)
    sequences = backbone.module.sequences(panel, "none")
    with torch.no_grad():
        torch.testing.assert_close(states, backbone.module.encode(sequences).view(6, N_GENES, 16))
    assert not torch.allclose(states, backbone.gene_states(panel, forward="backbone"))
    assert torch.isfinite(backbone.embed(panel)).all()


def test_reconstruction_by_both_decoders(backbone, tokens):
    by_gene = backbone.reconstruct(tokens)
    assert by_gene.shape == (len(tokens), tokens.max_length)
    assert torch.equal(by_gene.isnan(), tokens.padding)
    everything = backbone.reconstruct(tokens, decoder="cell")
    assert everything.shape == (len(tokens), len(backbone.vocab))
    torch.testing.assert_close(backbone.reconstruct(tokens, genes=["GENE3"]), everything[:, [4]])
    cells, table = backbone.embed(tokens), backbone.gene_embeddings()
    expected = cells @ torch.sigmoid(table @ backbone.module.cell_decoder.map.weight.T).T
    torch.testing.assert_close(everything, expected, atol=1e-5, rtol=1e-5)
    for genes, dense in ((None, None), (["GENE3", "GENE9"], everything[:, [4, 10]])):
        parts = list(backbone.iter_reconstruction(tokens, genes))
        cells, ids, values = (torch.cat([getattr(p, name) for p in parts]) for name in ("cells", "genes", "values"))
        if genes is None:
            assert torch.equal(ids, tokens.flat_ids)
            assert torch.equal(cells, tokens.flat_cells)
            torch.testing.assert_close(values, by_gene[~tokens.padding])
        else:
            torch.testing.assert_close(values.view(dense.shape), dense)
    with pytest.raises(ValueError, match="decoder must be"):
        backbone.reconstruct(tokens, decoder="both")


def test_cells_without_genes_are_nan_in_every_output(backbone):
    counts = counts_of(2).tolil()
    counts[3] = 0
    tokens = backbone.tokenize(counts.tocsr(), GENES)
    keep = [0, 1, 2, 4, 5]
    for out in (
        backbone.embed(tokens),
        backbone.gene_states(tokens, genes=["GENE1"]),
        backbone.gene_states(tokens),
        backbone.reconstruct(tokens),
        backbone.reconstruct(tokens, genes=GENES),
        backbone.attention(tokens, genes=["GENE1"]),
    ):
        assert out[3].isnan().all()
    finite = backbone.reconstruct(tokens, genes=GENES)[keep]
    torch.testing.assert_close(finite, backbone.reconstruct(tokens.select(keep), genes=GENES))
    cells = torch.cat([part.cells for part in backbone.iter_gene_states(tokens)])
    assert set(cells.tolist()) == set(keep)


# -- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_attention_scores_of_a_layer(backbone, tokens, layer):
    maps = backbone.attention(tokens, layer, average_heads=False)
    assert maps.shape == (len(tokens), 2, tokens.max_length + 1, tokens.max_length + 1)
    cell = tokens.select([2])
    with torch.no_grad():
        x = backbone.module.sequences(cell).x
        for block in backbone.module.layers[: layer % 4]:
            x = block(x, [len(x)])
    q, k = backbone.module.layers[layer].attention.features(x)
    size = len(x)
    torch.testing.assert_close(maps[2, :, :size, :size], q @ k.transpose(1, 2))
    assert maps[2, :, size:].isnan().all()
    torch.testing.assert_close(backbone.attention(tokens, layer), maps.mean(1), equal_nan=True)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        backbone.attention(tokens, 4)


def test_genes_choose_rows_and_columns(backbone, tokens):
    full = backbone.attention(tokens, 1, rank=True, include_cls=False)
    chosen = backbone.attention(tokens, 1, rank=True, genes=["GENE7", "GENE2"])
    with_cls = backbone.attention(tokens, 1, genes=["GENE7", "GENE2"], include_cls=True)
    assert chosen.shape == (len(tokens), 2, 2)
    assert with_cls.shape == (len(tokens), 3, 3)
    for i in range(len(tokens)):
        ids = tokens.select([i]).flat_ids.tolist()
        for a, first in enumerate((8, 3)):
            for b, second in enumerate((8, 3)):
                if first in ids and second in ids:
                    assert chosen[i, a, b] == full[i, ids.index(first), ids.index(second)]
                else:
                    assert chosen[i, a, b].isnan()
    torch.testing.assert_close(
        with_cls[:, 1:, 1:], backbone.attention(tokens, 1, genes=["GENE7", "GENE2"]), equal_nan=True
    )


def test_ranks_are_taken_per_head_and_query(backbone, tokens):
    cell = tokens.select([1])
    raw = backbone.attention(cell, 0, average_heads=False)[0]
    ranks = backbone.attention(cell, 0, average_heads=False, rank=True)[0]
    n = raw.shape[-1]
    expected = raw.argsort(dim=-1, stable=True).argsort(dim=-1) / n
    torch.testing.assert_close(ranks, expected)
    upstream = backbone.attention(cell, 0, average_heads=False, rank="upstream", padded_length=60)[0]
    padding = 60 - (n - 1)
    behind = torch.cat([raw, torch.zeros(*raw.shape[:2], padding)], -1)
    order = behind.argsort(dim=-1, stable=True).argsort(dim=-1)[..., :n] / 2048
    torch.testing.assert_close(upstream, order)
    with pytest.raises(ValueError, match="rank must be"):
        backbone.attention(cell, rank="best")


# -- classes -------------------------------------------------------------------------------------------------------------


def test_class_head_outputs():
    model = network(class_head="retention", n_classes=3)
    tokens = model.tokenize(counts_of(4), GENES)
    probabilities = model.classify(tokens)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
    alone = torch.cat([model.classify(tokens.select([i])) for i in range(6)])
    torch.testing.assert_close(probabilities, alone, atol=1e-5, rtol=1e-5)
    ranks = model.class_attention(tokens)
    assert ranks.shape == (6, tokens.max_length)
    assert torch.equal(ranks.isnan(), tokens.padding)
    heads = model.class_attention(tokens, average_heads=False)
    assert heads.shape == (6, 2, tokens.max_length)
    torch.testing.assert_close(heads.mean(1), ranks, equal_nan=True)
    chosen = model.class_attention(tokens, ["GENE4"])
    place = tokens.ids == 5
    torch.testing.assert_close(chosen[place.any(1), 0], ranks[place])


def test_models_without_a_class_head_say_so(backbone, tokens):
    for ask in (backbone.classify, backbone.class_attention):
        with pytest.raises(scfm.UnsupportedError, match="no class head"):
            ask(tokens)


# -- pre-training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(backbone):
    return backbone.tokenize_for_training(counts_of(5, 12), GENES, torch.Generator().manual_seed(0))


def per_cell(flags, cells, n):
    return torch.zeros(n, dtype=torch.int64).index_add(0, cells, flags.long())


def test_counts_come_back_from_tokens(training):
    expected = counts_of(5, 12)
    np.testing.assert_array_equal(raw_counts(training), expected.data)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.01])
def test_how_many_genes_are_hidden(training, ratio):
    draws = draw(training, torch.Generator().manual_seed(1), mask_ratio=ratio, hidden_share=0.8)
    n = training.lengths
    masked = (ratio * n.double()).floor().long()
    hidden = per_cell(draws.hidden, training.flat_cells, 12)
    in_loss = per_cell(draws.in_loss, training.flat_cells, 12)
    assert torch.equal(hidden, (0.8 * masked.double()).floor().long())
    assert torch.equal(in_loss, torch.where(masked > 0, masked, n))


def test_sampled_zeros(backbone, training):
    draws = draw(training, torch.Generator().manual_seed(1), mask_ratio=0.5, hidden_share=0.8, zero_length=30)
    batch = corrupt(training, draws, backbone.config)
    n, tokens = training.lengths, batch.tokens
    assert torch.equal(tokens.lengths, n.clamp_min(30))
    assert torch.equal(per_cell(~batch.unexpressed, tokens.flat_cells, 12), n)
    assert not batch.target[batch.unexpressed].any()
    room = (30 - n).clamp_min(0)
    n_hidden = (0.5 * torch.minimum(n, room).double()).floor().long()
    zeros = batch.unexpressed
    assert torch.equal(per_cell(batch.hidden & zeros, tokens.flat_cells, 12), n_hidden)
    assert torch.equal(per_cell(batch.in_loss & zeros, tokens.flat_cells, 12), (0.8 * n_hidden.double()).floor().long())
    for i in range(12):
        assert tokens.select([i]).flat_ids.unique().numel() == tokens.lengths[i]
    plain = backbone.tokenize(counts_of(5), GENES)
    with pytest.raises(ValueError, match="with_unexpressed=True"):
        draw(plain, mask_ratio=0.5, hidden_share=0.8, zero_length=30)


def test_down_sampling(backbone, training):
    draws = draw(
        training, torch.Generator().manual_seed(2), mask_ratio=0.2, hidden_share=0.8, down_sampling=DownSampling(0.5)
    )
    raw, cells = raw_counts(training), training.flat_cells
    assert 0 < draws.thinned.sum() < 12
    assert (draws.input_counts >= 1).all()
    assert (draws.input_counts <= raw).all()
    assert torch.equal(draws.input_counts[~draws.thinned[cells]], raw[~draws.thinned[cells]])
    batch = corrupt(training, draws, backbone.config)
    total = torch.zeros(12, dtype=torch.float64).index_add(0, cells, draws.input_counts)
    source = torch.where(draws.thinned, total, training.per_cell["total"])
    torch.testing.assert_close(batch.depths[:, 0].double(), torch.log1p(source / 1000), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(batch.target, training.flat_values, atol=1e-5, rtol=1e-5)


def test_loss_is_driven_by_the_generator_alone(backbone, training):
    def loss(seed, **options):
        return backbone.pretraining_loss(training, torch.Generator().manual_seed(seed), **options).total.item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    nothing = Draws(
        torch.zeros_like(training.flat_ids, dtype=torch.bool), torch.ones_like(training.flat_ids, dtype=torch.bool)
    )
    given = backbone.pretraining_loss(training, draws=nothing)
    assert given.n_in_loss == len(training.flat_ids)
    with pytest.raises(ValueError, match="raw counts"):
        backbone.pretraining_loss(backbone.tokenize(counts_of(), GENES, pre_normalized=True), torch.Generator())


def test_all_terms_have_gradients():
    model = network(has_zero_heads=True, lora_rank=2)
    model.module.train().requires_grad_(requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    tokens = model.tokenize_for_training(counts_of(6), GENES, generator)
    loss = model.pretraining_loss(tokens, generator, zero_length=35, similarity=0.8, mask_ratio=0.5)
    terms = (loss.genes, loss.cells, loss.zeros_genes, loss.zeros_cells, loss.similarity)
    torch.testing.assert_close(loss.total, sum(terms))
    loss.total.backward()
    without = {name for name, p in model.module.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not without


def test_a_hidden_value_cannot_be_seen(backbone, tokens):
    hidden = torch.zeros(len(tokens.flat_ids), dtype=torch.bool)
    hidden[::3] = True
    other = tokens.flat_values.clone()
    other[hidden] += 1
    from dataclasses import replace

    with torch.no_grad():
        first, second = (
            backbone.module.encode(backbone.module.sequences(replace(tokens, flat_values=values), hidden=hidden))
            for values in (tokens.flat_values, other)
        )
    assert torch.equal(first, second)
