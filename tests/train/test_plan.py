"""The Lightning module: what is random, and what it depends on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import sparse

from scfm.backbones import backbone_class, from_config
from scfm.genes import GeneVocab
from scfm.train import MicroBatch, Optimization, PretrainingPlan, freeze
from scfm.train._plan import default_optimization, loss_parts

from .conftest import N_GENES, SMALL


def plan_of(kind: str, *, redraw_every: int = 1000, **options) -> PretrainingPlan:
    cls = backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(N_GENES))], specials=cls.specials)
    values = SMALL[kind]["config"] | ({"redraw_every": redraw_every} if kind == "sclong" else {})
    config = cls.config_for(values, vocab)
    backbone = from_config(kind, config, vocab, device="cpu", precision="float32")
    backbone.module.requires_grad_()
    return PretrainingPlan(backbone, genes=vocab.match(vocab.genes), **options)


def batch_of(number: int, n_cells: int = 5) -> MicroBatch:
    rng = np.random.default_rng(number)
    return MicroBatch(number, sparse.csr_matrix(rng.poisson(2.0, (n_cells, N_GENES)).astype(np.float32)))


@pytest.mark.parametrize("kind", list(SMALL))
def test_a_micro_batch_has_one_loss_whatever_came_before(kind):
    plan = plan_of(kind, seed=3)
    plan.module.train()
    first = plan.loss(batch_of(7)).total
    torch.rand(5)
    state = torch.get_rng_state()
    plan.loss(batch_of(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(plan.loss(batch_of(7)).total, first)
    same_cells = MicroBatch(8, batch_of(7).cells)
    assert not torch.equal(plan.loss(same_cells).total, first)
    assert not torch.equal(plan_of(kind, seed=4).loss(batch_of(7)).total, first)
    assert not torch.equal(plan.loss(batch_of(7), "validation").total, first)


def test_tokens_may_be_made_before():
    plan = plan_of("cellfm")
    batch = batch_of(0)
    made = MicroBatch(0, plan.tokens(batch))
    assert (len(batch), len(made)) == (5, 5)
    assert torch.equal(plan.loss(made).total, plan.loss(batch).total)


def test_options_change_on_the_way_and_held_out_cells_are_judged_by_the_last():
    plan = plan_of("scgpt", per_step=2, objective={"cell_prompt": False}, objective_from={3: {"cell_prompt": True}})
    assert float(plan.loss(batch_of(5)).cell_prompt) == 0
    assert plan.loss(batch_of(6)).cell_prompt.item() > 0
    assert plan.loss(batch_of(0), "validation").cell_prompt.item() > 0


def test_random_features_are_drawn_with_the_step_and_not_with_calls():
    optimization = Optimization(redraw_every=2)
    one = plan_of("sclong", optimization=optimization, per_step=2, seed=1)
    features = lambda plan: plan.module.decoder.layers[0].projection.clone()
    plan_of_rank_1 = plan_of("sclong", optimization=optimization, per_step=2, seed=1)
    one.log_dict = plan_of_rank_1.log_dict = lambda *_, **__: None
    seen = []
    for number in range(10):
        one.training_step(batch_of(number))
        if number % 2:
            plan_of_rank_1.training_step(batch_of(number))
            assert torch.equal(features(one), features(plan_of_rank_1))
        seen.append(features(one))
    changes = [not torch.equal(before, after) for before, after in zip(seen[:-1], seen[1:], strict=True)]
    assert [number for number, change in enumerate(changes, start=1) if change] == [4, 8]
    resumed = plan_of("sclong", optimization=optimization, per_step=2, seed=1, first_step=4)
    resumed.log_dict = lambda *_, **__: None
    resumed.training_step(batch_of(8))
    assert torch.equal(features(resumed), seen[8])


@pytest.mark.parametrize(("calls", "per_step", "steps"), [(1000, 200, 5), (1000, 300, 4), (2, 5, 1)])
def test_features_are_redrawn_after_as_many_calls_as_the_config_says(calls, per_step, steps):
    plan = plan_of("sclong", per_step=per_step, redraw_every=calls)
    assert plan.optimization.redraw_every == "config"
    periods = [plan._period_of(step) for step in range(2 * steps + 1)]
    assert periods == [0] * steps + [1] * steps + [2]


def test_features_follow_the_config_in_training_unless_something_else_is_said():
    features = lambda plan: plan.module.decoder.layers[0].projection.clone()
    for optimization, changes in [(None, [2, 4]), (Optimization(), []), (Optimization(redraw_every=3), [3])]:
        plan = plan_of("sclong", optimization=optimization, redraw_every=2)
        plan.log_dict = lambda *_, **__: None
        seen = [features(plan)]
        for number in range(5):
            plan.training_step(batch_of(number))
            seen.append(features(plan))
        pairs = enumerate(zip(seen[:-1], seen[1:], strict=True))
        assert [number for number, (before, after) in pairs if not torch.equal(before, after)] == changes


def test_options_that_an_objective_does_not_have_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"scgpt has no option 'foo'; it has cell_prompt, max_length, ratio, task"):
        plan_of("scgpt", objective={"foo": 1})
    with pytest.raises(ValueError, match="'bar'"):
        plan_of("cellfm", objective_from={3: {"bar": 1}})


def test_features_of_frozen_stacks_stay():
    plan = plan_of("sclong", optimization=Optimization(redraw_every=1))
    freeze(plan.backbone, [r"^large\."])
    plan.log_dict = lambda *_, **__: None
    before = [plan.module.large.layers[0].projection.clone(), plan.module.mini.layers[0].projection.clone()]
    plan.training_step(batch_of(5))
    assert torch.equal(plan.module.large.layers[0].projection, before[0])
    assert not torch.equal(plan.module.mini.layers[0].projection, before[1])


def test_a_micro_batch_without_cells_has_gradients_of_zero():
    plan = plan_of("scgpt")
    out = plan.training_step(batch_of(0, n_cells=0))
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in plan.parameters())


def test_parts_of_a_loss_have_names():
    parts = loss_parts(plan_of("scgpt").loss(batch_of(0)))
    assert list(parts) == ["loss", "gene_prompt", "cell_decoder", "cell_prompt"]
    torch.testing.assert_close(parts["loss"], sum(value for name, value in parts.items() if name != "loss"))
    assert list(loss_parts(plan_of("sclong").loss(batch_of(0)))) == ["loss"]


def test_the_papers_optimisation_is_the_default():
    assert plan_of("sclong").optimization.clip_value == 100.0
    assert default_optimization("a model of somebody else") == Optimization()


def test_lightning_is_imported_when_it_is_used():
    code = (
        "import sys, scfm, scfm.train\nscfm.train.Recipe, scfm.train.pretrain, scfm.train.OPTIMIZATIONS\n"
        "assert 'lightning' not in sys.modules\nscfm.train.PretrainingPlan\nassert 'lightning' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
