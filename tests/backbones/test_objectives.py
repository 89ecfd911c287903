"""Options of the pre-training objectives, and the precision of their losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from tiny import TINY

from scfm.backbones import backbone_class, from_config
from scfm.backbones.scgpt.objective import subsampled
from scfm.genes import GeneVocab

N_GENES = 40


def make(kind: str, **changes):
    cls = backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(N_GENES))], specials=cls.specials)
    config = cls.config_for({**TINY[kind], **changes}, vocab)
    return from_config(kind, config, vocab, seed=0, device="cpu", precision="float32")


def tokens_of(backbone, n_cells: int = 12):
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(3.0, (n_cells, N_GENES)).astype(np.float32))
    genes = backbone.vocab.match([f"G{i}" for i in range(N_GENES)])
    return backbone.tokenize_for_training(counts, genes, torch.Generator().manual_seed(0))


def loss_of(backbone, **options):
    return backbone.pretraining_loss(tokens_of(backbone), torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("kind", list(TINY))
def test_losses_are_float32_beside_a_network_in_bfloat16(kind):
    backbone = make(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(backbone).total
    assert loss.dtype == torch.float32
    assert loss.item() != loss.bfloat16().item()


@pytest.mark.parametrize("kind", list(TINY))
def test_unknown_options_are_named_with_those_that_exist(kind):
    backbone = make(kind)
    backbone.check_objective(backbone.objective_options())
    with pytest.raises(ValueError, match=f"{kind} has no option 'foo'; it has "):
        backbone.check_objective({"foo": 1})


# -- scGPT ---------------------------------------------------------------------------------------------------------------


def test_masked_values_are_a_task_of_their_own():
    backbone = make("scgpt")
    assert loss_of(backbone).cell_prompt.item() > 0
    masked = loss_of(backbone, task="masked")
    assert masked.gene_prompt.item() > 0
    assert masked.cell_prompt.item() == 0
    assert loss_of(make("scgpt", query_flag=False)).cell_prompt.item() == 0
    assert loss_of(backbone, task="masked", ratio=0.0).total.item() == 0
    assert loss_of(backbone, task="masked", max_length=5).total.item() != masked.total.item()
    for options, message in [
        ({"task": "gen"}, "task must be one of 'both', 'masked'"),
        ({"task": "masked", "cell_prompt": True}, "belong to task='both'"),
        ({"task": "masked", "ratio": (0.2, 0.4)}, "belong to task='both'"),
        ({"ratio": 1.5}, "ratio must lie between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss_of(backbone, **options)


def test_long_cells_are_subsampled_at_random_and_keep_cls():
    backbone = make("scgpt")
    tokens = tokens_of(backbone)
    short = subsampled(tokens, torch.Generator().manual_seed(0), max_length=7)
    assert short.lengths.tolist() == [7] * len(tokens)
    assert (short.ids[:, 0] == tokens.ids[:, 0]).all()
    for cell in range(len(tokens)):
        bins = dict(zip(tokens.ids[cell].tolist(), tokens.values[cell].tolist(), strict=True))
        genes = short.ids[cell].tolist()
        assert len(set(genes)) == 7
        assert [bins[gene] for gene in genes] == short.values[cell].tolist()
    other = subsampled(tokens, torch.Generator().manual_seed(1), max_length=7)
    assert not torch.equal(other.ids, short.ids)
    assert subsampled(tokens, max_length=500) is tokens


def test_one_of_several_ratios_is_drawn():
    backbone = make("scgpt")
    each = {loss_of(backbone, ratio=ratio).total.item() for ratio in (0.1, 0.9)}
    tokens = tokens_of(backbone)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    drawn = [backbone.pretraining_loss(tokens, generator, ratio=[0.1, 0.9]).total.item() for generator in generators]
    assert len(each) == 2
    assert all(np.isfinite(drawn))
    single = [
        backbone.pretraining_loss(tokens, torch.Generator().manual_seed(seed), ratio=[0.1]).total.item()
        for seed in (0, 1)
    ]
    assert single[0] != single[1]


# -- others --------------------------------------------------------------------------------------------------------------


def test_shares_of_scfoundation():
    backbone = make("scfoundation")
    some = loss_of(backbone, value_mask_prob=0.5, zero_mask_prob=0.0, down_sampling=False).n_masked
    every = loss_of(backbone, value_mask_prob=1.0, zero_mask_prob=1.0, down_sampling=False).n_masked
    assert every == 12 * N_GENES
    assert 0.3 * every < some < 0.6 * every


def test_down_sampling_of_scfoundation_may_be_switched_off():
    backbone = make("scfoundation")
    never = loss_of(backbone, down_sampling={"probability": 0.0}).total
    assert torch.equal(loss_of(backbone, down_sampling=False).total, never)
    assert torch.equal(loss_of(backbone, down_sampling=True).total, loss_of(backbone).total)
    always = {"probability": 1.0, "min_total": 0.0}
    assert not torch.equal(loss_of(backbone, down_sampling=always).total, never)


def test_shares_of_sclong():
    backbone = make("sclong")
    assert loss_of(backbone, target_share=1.0).n_targets == len(tokens_of(backbone).flat_ids)
    assert loss_of(backbone, target_share=0.5).n_targets < loss_of(backbone, target_share=0.9).n_targets
    shown, hidden = (loss_of(backbone, replace_prob=probability).total for probability in (0.0, 1.0))
    assert not torch.equal(shown, hidden)


def test_what_cellfm_cannot_do_is_refused():
    with pytest.raises(ValueError, match="zeros_over must be one of 'masked', 'all'; got 'foo'"):
        loss_of(make("cellfm"), zeros_over="foo")
    with pytest.raises(ValueError, match="no embedding of genes without expression"):
        loss_of(make("cellfm", has_zero_embedding=False), zero_length=30)
