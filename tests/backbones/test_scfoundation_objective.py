"""Read-depth-aware pre-training: what is drawn, what is hidden, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scfm.backbones import from_config
from scfm.backbones.scfoundation import SCFoundationConfig
from scfm.backbones.scfoundation.objective import DownSampling, Draws, corrupt, draw, log_normalize, raw_counts
from scfm.genes import GeneVocab

N_GENES = 200
CONFIG = SCFoundationConfig(
    n_genes=N_GENES, encoder_dim=12, encoder_depth=1, encoder_heads=2, decoder_dim=12, decoder_depth=1,
    decoder_heads=2, decoder_dim_head=6, n_bins=8,
)  # fmt: skip


@pytest.fixture
def backbone():
    return from_config("scfoundation", CONFIG, GeneVocab([f"GENE{i}" for i in range(N_GENES)]), seed=0)


def counts_of(n_cells=40, mean=8.0, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, mean / 0.5, N_GENES)
    return rng.poisson(rates, (n_cells, N_GENES)).astype(np.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_counts_come_back_from_tokens(backbone):
    counts = counts_of() * np.random.default_rng(1).choice([1, 1000], (40, 1))
    tokens = backbone.tokenize_for_training(sparse.csr_matrix(counts), backbone.vocab.names, generator())
    np.testing.assert_array_equal(raw_counts(tokens, CONFIG), counts)


@pytest.mark.parametrize("options", [{"pre_normalized": True}, {"input_type": "bulk"}])
def test_tokens_without_counts_are_refused(backbone, options):
    tokens = backbone.tokenize(sparse.csr_matrix(np.log1p(counts_of())), backbone.vocab.names, **options)
    with pytest.raises(ValueError, match="needs raw counts"):
        backbone.pretraining_loss(tokens, generator())


def test_shares_of_masked_and_shown_values():
    counts = torch.from_numpy(counts_of(400))
    draws = draw(counts, CONFIG, generator(), down_sampling=DownSampling(probability=0))
    assert torch.equal(draws.input_counts, counts)
    expressed = counts > 0
    assert draws.mask[expressed].double().mean() == pytest.approx(0.3, abs=0.01)
    assert draws.mask[~expressed].double().mean() == pytest.approx(0.03, abs=0.005)
    values = log_normalize(counts)
    is_mask, is_own = draws.shown == CONFIG.mask_value, draws.shown == values
    assert is_mask.double().mean() == pytest.approx(0.8, abs=0.01)
    assert is_own.double().mean() == pytest.approx(0.1, abs=0.01)
    random = draws.shown[~is_mask & ~is_own]
    assert torch.isin(random, values[expressed]).all()
    assert draw(counts, CONFIG, generator(), mask_only=True).shown is None


def test_thinning_keeps_a_share_of_the_counts_of_deep_cells():
    counts = torch.from_numpy(counts_of(300, mean=20))
    counts[:50, 10:] = 0  # shallow cells
    rule = DownSampling(probability=0.5, min_total=1000, alpha=200, beta=600)
    draws = draw(counts, CONFIG, generator(), down_sampling=rule)
    share = draws.input_counts.sum(1) / counts.sum(1)
    deep = counts.sum(1) > 1000
    assert (share[~deep] == 1).all()
    thinned = deep & (share < 1)
    assert thinned[deep].double().mean() == pytest.approx(0.5, abs=0.1)
    assert share[thinned].mean() == pytest.approx(0.25, abs=0.02)
    assert (draws.input_counts <= counts).all()
    assert torch.equal(draws.input_counts, draws.input_counts.round())


def test_draws_depend_on_the_generator_alone():
    counts = torch.from_numpy(counts_of())
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = draw(counts, CONFIG, generator(3))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = draw(counts, CONFIG, generator(3))
    other = draw(counts, CONFIG, generator(4))
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.input_counts, second.input_counts)
    assert torch.equal(first.shown, second.shown)
    assert not torch.equal(first.mask, other.mask)


def test_what_encoder_and_decoder_see():
    raw = torch.zeros(1, N_GENES)
    raw[0, :4] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    inputs = torch.zeros(1, N_GENES)
    inputs[0, :4] = torch.tensor([5.0, 10.0, 15.0, 10.0])
    mask = torch.zeros(1, N_GENES, dtype=torch.bool)
    mask[0, [1, 3, 9]] = True
    batch = corrupt(raw, Draws(inputs, mask), CONFIG)
    assert batch.tokens.flat_ids.tolist() == [0, 2, CONFIG.target_id, CONFIG.source_id]
    expected = [np.log1p(5 / 40 * 1e4), np.log1p(15 / 40 * 1e4), np.log10(100), np.log10(40)]
    np.testing.assert_allclose(batch.tokens.flat_values, expected)
    assert batch.tokens.queries.flat_ids.tolist() == [1, 3, 9]
    assert batch.tokens.queries.flat_values.tolist() == [102.0] * 3
    np.testing.assert_allclose(batch.target[0, [1, 9]], [np.log1p(20 / 100 * 1e4), 0])


def test_cells_too_long_for_the_encoder_lose_random_genes_to_the_decoder():
    config = SCFoundationConfig(n_genes=N_GENES, max_encoder_length=52)
    counts = torch.from_numpy(counts_of(6)) + 1
    draws = draw(counts, config, generator())
    batch = corrupt(counts, draws, config)
    assert batch.tokens.lengths.tolist() == [52] * 6
    left_out = batch.tokens.queries.select([0])
    places = torch.nonzero(draws.left_out[0]).squeeze(1)
    assert torch.isin(places, left_out.flat_ids).all()
    shown = left_out.flat_values[torch.isin(left_out.flat_ids, places)]
    torch.testing.assert_close(shown, log_normalize(draws.input_counts)[0, places])


def test_nothing_masked_gives_zero_and_empty_cells_are_left_out(backbone):
    counts = counts_of(4)
    nothing = Draws(torch.from_numpy(counts), torch.zeros(4, N_GENES, dtype=torch.bool))
    tokens = backbone.tokenize_for_training(sparse.csr_matrix(counts), backbone.vocab.names, generator())
    loss = backbone.pretraining_loss(tokens, draws=nothing)
    assert (float(loss.total), loss.n_masked) == (0, 0)
    counts[2] = 0
    with_empty = backbone.tokenize_for_training(sparse.csr_matrix(counts), backbone.vocab.names, generator())
    without = backbone.tokenize_for_training(sparse.csr_matrix(counts[[0, 1, 3]]), backbone.vocab.names, generator())
    losses = [float(backbone.pretraining_loss(part, generator(5)).total) for part in (with_empty, without)]
    assert losses[0] == pytest.approx(losses[1])
    assert np.isfinite(losses[0])


def test_constants_can_be_given_as_a_mapping(backbone):
    tokens = backbone.tokenize_for_training(sparse.csr_matrix(counts_of(3)), backbone.vocab.names, generator())
    as_mapping = backbone.pretraining_loss(tokens, generator(), down_sampling={"probability": 0.9, "min_total": 10})
    as_object = backbone.pretraining_loss(tokens, generator(), down_sampling=DownSampling(0.9, 10))
    assert float(as_mapping.total) == float(as_object.total)


def test_the_loss_falls_in_training(backbone):
    counts = sparse.csr_matrix(counts_of(64))
    module = backbone.module.train().requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    source = generator()

    def loss_of(cells, source):
        tokens = backbone.tokenize_for_training(cells, backbone.vocab.names, source)
        return backbone.pretraining_loss(tokens, source, redraw_every=10).total

    def evaluate():
        module.eval()
        with torch.no_grad():
            value = float(loss_of(counts, generator(9)))
        module.train()
        return value

    before = evaluate()
    for step in range(40):
        optimizer.zero_grad()
        loss_of(counts[step % 4 :: 4], source).backward()
        optimizer.step()
    assert evaluate() < 0.5 * before
