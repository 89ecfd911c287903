"""Outputs of scFoundation: what they mean, that shortcuts change nothing, and that cells do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.scfoundation import SCFoundationConfig, layers, module
from scfm.genes import GeneVocab
from scfm.nn import performer, steps

N_GENES = 60
KINDS = [("transformer", "performer"), ("performer", "performer"), ("transformer", "transformer")]


def make(encoder="transformer", decoder="performer", **values):
    config = SCFoundationConfig(
        n_genes=N_GENES, encoder_dim=16, encoder_depth=3, encoder_heads=4, encoder_dim_head=6, encoder_layer=encoder,
        decoder_dim=12, decoder_depth=3, decoder_heads=3, decoder_dim_head=8, decoder_layer=decoder, n_bins=9, **values,
    )  # fmt: skip
    return from_config("scfoundation", config, GeneVocab([f"GENE{i}" for i in range(N_GENES)]), seed=2)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def backbone(request):
    return make(*request.param)


@pytest.fixture(scope="module")
def released_kind():
    return make()


def tokens_of(backbone, n_cells=5, seed=0):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.2, 3, (n_cells, 1))
    counts = rng.poisson(depth, (n_cells, N_GENES)) + np.eye(n_cells, N_GENES, dtype=int) * 2
    return backbone.tokenize(sparse.csr_matrix(counts), backbone.vocab.names)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# -- inference and training agree ----------------------------------------------------------------------------------------


def test_inference_and_training_code_give_the_same(backbone):
    tokens = tokens_of(backbone)
    hidden = backbone.module.encode(tokens)
    states = torch.cat(list(backbone.module.decode(tokens, hidden)))
    with torch.inference_mode():
        fast_hidden = backbone.module.encode(tokens)
        fast_states = torch.cat(list(backbone.module.decode(tokens, fast_hidden)))
    close(fast_hidden, hidden)
    close(fast_states, states)


def test_sizes_of_steps_change_nothing(backbone, monkeypatch):
    tokens = tokens_of(backbone)
    embedded, states = backbone.embed(tokens), backbone.gene_states(tokens)
    monkeypatch.setattr(layers, "_STEP_PER_THREAD", 1)
    monkeypatch.setattr(performer, "_STEP_PER_THREAD", {4: 1})
    monkeypatch.setattr(steps, "MIN_ROWS", 8)
    monkeypatch.setattr(module, "_ENCODER_STEP", 20)
    close(backbone.embed(tokens), embedded)
    close(backbone.gene_states(tokens), states)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), n_cells=st.integers(1, 7))
def test_cells_do_not_see_each_other(backbone, seed, n_cells):
    tokens = tokens_of(backbone, n_cells, seed)
    alone = [tokens.select([i]) for i in range(n_cells)]
    for pooling in backbone.poolings:
        together = backbone.embed(tokens, pooling=pooling)
        close(together, torch.cat([backbone.embed(cell, pooling=pooling) for cell in alone]))
    close(backbone.gene_states(tokens), torch.cat([backbone.gene_states(cell) for cell in alone]))
    close(backbone.reconstruct(tokens), torch.cat([backbone.reconstruct(cell) for cell in alone]))


def test_the_maximum_over_the_batch_couples_cells(released_kind):
    tokens = tokens_of(released_kind)
    coupled = released_kind.gene_states(tokens, key_max="batch")
    assert not torch.equal(coupled, released_kind.gene_states(tokens))
    one = tokens.select([3])
    close(released_kind.gene_states(one, key_max="batch"), released_kind.gene_states(one))


def test_double_precision_is_kept_inside(released_kind):
    tokens = tokens_of(released_kind)
    single = released_kind.gene_states(tokens)
    double = make()
    double.module.double()
    states = double.gene_states(tokens)
    assert states.dtype == torch.float64
    close(states.float(), single, 1e-4)


def test_bfloat16_keeps_random_features_in_float32_and_stays_close(backbone):
    tokens = tokens_of(backbone)
    low = make(backbone.config.encoder_layer, backbone.config.decoder_layer).to("cpu", "bfloat16")
    assert low.dtype == torch.bfloat16
    for name, buffer in low.module.named_buffers():
        assert not name.endswith("projection") or buffer.dtype == torch.float32
    for exact, close_to in (
        (backbone.embed(tokens), low.embed(tokens)),
        (backbone.gene_states(tokens).flatten(1), low.gene_states(tokens).flatten(1)),
    ):
        assert close_to.dtype == torch.float32
        assert torch.cosine_similarity(exact, close_to).min() > 0.999


# -- embeddings ----------------------------------------------------------------------------------------------------------


def test_parts_of_the_cell_embedding(backbone):
    tokens = tokens_of(backbone, 3)
    with torch.inference_mode():
        hidden = backbone.module.encode(tokens).split(tokens.lengths.tolist())
    # genes first, then T, then S
    expected = torch.stack([torch.cat([h[-1], h[-2], h[:-2].amax(0), h[:-2].mean(0)]) for h in hidden])
    close(backbone.embed(tokens), expected)
    close(backbone.embed(tokens, pooling="all"), expected)
    parts = [backbone.embed(tokens, pooling=name) for name in ("S", "T", "gene_max", "gene_mean")]
    close(torch.cat(parts, 1), expected)
    close(backbone.embed(tokens, pooling="max"), torch.stack([h.amax(0) for h in hidden]))


def test_depths_are_found_by_id_in_any_order(released_kind):
    tokens = tokens_of(released_kind, 1)
    order = torch.randperm(len(tokens.flat_ids), generator=torch.Generator().manual_seed(0))
    shuffled = released_kind.batch(tokens.ids[:, order], tokens.values[:, order])
    close(released_kind.embed(shuffled), released_kind.embed(tokens))
    close(released_kind.gene_states(shuffled), released_kind.gene_states(tokens))


def test_a_deeper_target_changes_cells_and_predictions(released_kind):
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (2, N_GENES)))
    one, five = (released_kind.tokenize(counts, released_kind.vocab.names, target=t) for t in ("f1", "f5"))
    assert not torch.allclose(released_kind.embed(one), released_kind.embed(five))
    assert not torch.allclose(released_kind.reconstruct(one), released_kind.reconstruct(five))


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_chosen_genes_are_rows_of_all_genes(backbone):
    tokens = tokens_of(backbone)
    states, predicted = backbone.gene_states(tokens), backbone.reconstruct(tokens)
    assert states.shape == (5, N_GENES, 12)
    genes = [31, 2, 59]
    close(backbone.gene_states(tokens, genes=genes), states[:, genes])
    close(backbone.gene_states(tokens, genes=["GENE31", "GENE2", "GENE59"]), states[:, genes])
    assert backbone.gene_states(tokens, genes=[]).shape == (5, 0, 12)
    close(backbone.reconstruct(tokens, genes=np.array(genes)), predicted[:, genes])
    close(backbone.reconstruct(tokens, genes=genes, include_depth_tokens=True)[:, :3], predicted[:, genes])
    assert backbone.reconstruct(tokens, include_depth_tokens=True).shape == (5, N_GENES + 2)
    close(backbone.module.predict(states), predicted)


def test_unexpressed_genes_share_their_value_but_not_their_place(released_kind):
    tokens = tokens_of(released_kind, 1)
    hidden = set(range(N_GENES)) - set(tokens.flat_ids.tolist())
    states = released_kind.gene_states(tokens, genes=sorted(hidden)[:2])[0]
    assert not torch.allclose(states[0], states[1])
    explicit = np.zeros((1, N_GENES + 2), dtype=np.float32)
    explicit[0, tokens.flat_ids] = tokens.flat_values
    close(released_kind.gene_states(released_kind.batch(explicit)), released_kind.gene_states(tokens))


def test_the_gene_table_has_one_row_per_gene(released_kind):
    table = released_kind.gene_embeddings()
    assert table.shape == (N_GENES, 16)
    assert torch.equal(table, released_kind.module.gene_embedding.weight[:N_GENES])


@pytest.mark.parametrize(
    ("genes", "text"),
    [
        ([60], "between 0 and 59"),
        ([-1], "between 0"),
        (["GENEX"], "not one of"),
        ([0.5], "names or"),
        ([[1]], "names or"),
    ],
)
def test_wrong_gene_ids_are_refused(released_kind, genes, text):
    with pytest.raises((ValueError, KeyError), match=text):
        released_kind.gene_states(tokens_of(released_kind), genes=genes)


# -- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, -1])
def test_encoder_maps_are_distributions_over_the_tokens(backbone, layer):
    tokens = tokens_of(backbone, 3)
    weights = backbone.attention(tokens, layer, average_heads=False)
    longest = tokens.max_length
    assert weights.shape == (3, 4, longest, longest)
    real = ~tokens.padding
    close(weights.sum(-1), real[:, None].expand(-1, 4, -1).float())
    assert not weights[~real[:, None, None].expand_as(weights)].any()
    close(backbone.attention(tokens, layer), weights.mean(1))
    assert backbone.attention(tokens.select([]), layer).shape == (0, 0, 0)


def test_encoder_maps_of_chosen_genes(released_kind):
    tokens = tokens_of(released_kind, 2)
    present = tokens.flat_ids[: tokens.lengths[0]].tolist()
    absent = next(i for i in range(N_GENES) if i not in present)
    genes = [present[4], absent, released_kind.config.target_id]
    weights = released_kind.attention(tokens.select([0]), 1, genes=genes)[0]
    whole = released_kind.attention(tokens.select([0]), 1)[0]
    places = [4, present.index(released_kind.config.target_id)]
    close(weights[[0, 2]][:, [0, 2]], whole[places][:, places])
    assert torch.isnan(weights[1]).all()
    assert torch.isnan(weights[:, 1]).all()


def test_decoder_maps_are_distributions_over_all_positions(backbone):
    tokens = tokens_of(backbone, 2)
    everything = np.arange(N_GENES + 2)
    weights = backbone.attention(tokens, -1, kind="decoder", genes=everything, average_heads=False)
    assert weights.shape == (2, 3, N_GENES + 2, N_GENES + 2)
    close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    some = backbone.attention(tokens, -1, kind="decoder", genes=[5, 50], average_heads=False)
    close(some, weights[:, :, [5, 50]][..., [5, 50]])


def test_maps_that_do_not_exist_are_refused(released_kind):
    tokens = tokens_of(released_kind)
    for options, text in (
        ({"layer": 3}, "layers 0 to 2"),
        ({"kind": "both"}, "'encoder' or 'decoder'"),
        ({"kind": "decoder"}, "choose some with genes"),
        ({"kind": "decoder", "genes": [99]}, "between 0 and 61"),
    ):
        with pytest.raises(ValueError, match=text):
            released_kind.attention(tokens, **options)


# -- training ------------------------------------------------------------------------------------------------------------


def test_every_weight_gets_a_gradient(backbone):
    trained = make(backbone.config.encoder_layer, backbone.config.decoder_layer)
    trained.module.train().requires_grad_(True)
    rows = np.zeros((2, N_GENES + 2), dtype=np.float32)
    rows[:, ::3] = 1.5
    rows[:, 1] = trained.config.mask_value
    rows[1, 30:] *= 2
    rows[:, -2:] = 4
    tokens = trained.batch(rows)
    states = torch.cat(list(trained.module.decode(tokens, trained.module.encode(tokens))))
    trained.module.predict(states).square().sum().backward()
    without = [name for name, p in trained.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # padding has no place in ragged batches
    assert without == ["value_embedding.pad.weight"]


def test_random_features_are_redrawn_only_when_asked(released_kind):
    trained = make()
    decoder = trained.module.decoder
    before = [layer.projection.clone() for layer in decoder.layers]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        trained.module.count_call(3, generator)
    assert int(decoder.calls_since_redraw) == 3
    assert all(torch.equal(layer.projection, old) for layer, old in zip(decoder.layers, before, strict=True))
    trained.module.count_call(3, generator)
    assert int(decoder.calls_since_redraw) == 0
    assert not any(torch.equal(layer.projection, old) for layer, old in zip(decoder.layers, before, strict=True))
