"""Optimisers and schedules against the formulas of the papers' code."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scfm.backbones import backbone_class, from_config
from scfm.genes import GeneVocab
from scfm.nn.retention import PackedLinear
from scfm.train import OPTIMIZATIONS, Optimization, build_optimizer, build_schedule
from scfm.train._presets import clip_gradients, learning_rate_at


def test_restarts_are_those_of_sclong(golden):
    case = golden("sclong", "pretrain_step")
    rates = [learning_rate_at(OPTIMIZATIONS["sclong-code"], epoch) for epoch in range(80)]
    np.testing.assert_allclose(rates, case.expected["lr_per_epoch"], rtol=1e-12)


def test_five_epochs_of_the_code_of_sclong_never_leave_the_warm_up():
    rates = [learning_rate_at(OPTIMIZATIONS["sclong-code"], epoch) for epoch in range(5)]
    np.testing.assert_allclose(rates, [1e-6, 1.08e-5, 2.06e-5, 3.04e-5, 4.02e-5], rtol=1e-12)


def test_the_schedule_of_sclong_counts_steps_and_that_of_its_code_epochs():
    units = {name: OPTIMIZATIONS[name].unit for name in ("sclong", "sclong-code")}
    assert units == {"sclong": "step", "sclong-code": "epoch"}
    assert replace(OPTIMIZATIONS["sclong"], unit="epoch") == OPTIMIZATIONS["sclong-code"]


def test_numbers_may_be_text():
    given = Optimization(learning_rate="1e-3", betas=["0.8", "0.9"], warmup_steps="10", redraw_every="5")
    assert given == Optimization(learning_rate=1e-3, betas=(0.8, 0.9), warmup_steps=10, redraw_every=5)
    for values, text in [
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"learning_rate": True}, "learning_rate must be a number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number"),
        ({"warmup_steps": 2.5}, "warmup_steps must be a whole number"),
        ({"step_size": 0}, "step_size must be at least 1"),
        ({"redraw_every": 0}, "redraw_every must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            Optimization(**values)


def test_warm_up_and_cosine_of_scgpt():
    preset = OPTIMIZATIONS["scgpt"]
    rates = [learning_rate_at(preset, step, 50_000) for step in (0, 5_000, 10_000, 20_000, 30_000, 50_000, 60_000)]
    quarter = 1e-4 * (1 + math.sqrt(0.5)) / 2
    np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, quarter, 5e-5, 0, 0], atol=1e-18)


def test_other_schedules():
    steps = Optimization(learning_rate=1.0, schedule="steps", step_size=100, gamma=0.99)
    assert [learning_rate_at(steps, k) for k in (0, 99, 100, 250)] == [1.0, 1.0, 0.99, 0.99**2]
    linear = Optimization(learning_rate=1.0, schedule="linear", min_rate=0.2)
    np.testing.assert_allclose([learning_rate_at(linear, k, 10) for k in (0, 5, 10, 99)], [1.0, 0.6, 0.2, 0.2])
    assert learning_rate_at(OPTIMIZATIONS["scfoundation"], 9766 // 2) == pytest.approx(5e-5)
    assert learning_rate_at(OPTIMIZATIONS["scfoundation"], 10**6) == 1e-4
    with pytest.raises(ValueError, match="total number of steps"):
        learning_rate_at(OPTIMIZATIONS["scgpt"], 20_000)


def test_a_schedule_of_epochs_is_stepped_after_each_step_and_can_start_in_the_middle():
    def rates(first_step: int, n: int) -> list[float]:
        optimizer = build_optimizer({"w": nn.Parameter(torch.zeros(1))}, OPTIMIZATIONS["sclong-code"])
        schedule = build_schedule(optimizer, OPTIMIZATIONS["sclong-code"], steps_per_epoch=2, first_step=first_step)
        out = []
        for _ in range(n):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return out

    np.testing.assert_allclose(rates(0, 6), [1e-6, 1e-6, 1.08e-5, 1.08e-5, 2.06e-5, 2.06e-5])
    assert rates(3, 3) == rates(0, 6)[3:]
    with pytest.raises(ValueError, match="steps_per_epoch"):
        build_schedule(
            build_optimizer({"w": nn.Parameter(torch.zeros(1))}, OPTIMIZATIONS["sclong-code"]),
            OPTIMIZATIONS["sclong-code"],
        )


@pytest.mark.parametrize(("name", "expected"), [("adam", 3.0 - 0.1), ("adamw", 3.0 * (1 - 0.1 * 0.01))])
def test_weight_decay_is_added_to_the_gradient_or_decoupled(name, expected):
    weight, spared = (nn.Parameter(torch.tensor([3.0])) for _ in range(2))
    optimization = Optimization(optimizer=name, learning_rate=0.1, weight_decay=0.01, no_decay=("bias",))
    optimizer = build_optimizer({"weight": weight, "bias": spared}, optimization)
    weight.grad, spared.grad = torch.zeros(1), torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(expected, rel=1e-6)  # Adam's first step has the length of the rate
    assert spared.item() == 3.0


def test_cellfm_decays_what_upstream_decays():
    config = {"n_genes": 7, "dim": 64, "n_heads": 2, "n_layers": 1, "n_bins": 8, "has_zero_heads": True}
    cls = backbone_class("cellfm")
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(7))], specials=cls.specials)
    backbone = from_config("cellfm", cls.config_from_dict(config), vocab)
    backbone.module.requires_grad_()
    optimizer = build_optimizer(backbone.module.named_parameters(), OPTIMIZATIONS["cellfm"])
    names = {p: name for name, p in backbone.module.named_parameters()}
    spared = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    # upstream: names with "emb", "bias" or "layernorm"; its norms are called post_norm and have gamma and beta
    embeddings = {"gene_embedding.weight", "zero_embedding", "mask_embedding", "depth_tokens"}
    assert {name for name in spared if "zero_head" not in name} == embeddings
    assert {name for name in spared if "zero_head" in name} == {
        name for name in names.values() if "zero_head" in name and name.endswith("bias")
    }
    assert len(spared) == 4 + 3 + 1
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


class Two(nn.Module):
    """Two parameters with gradients (3, 4) and (6, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.a.grad, self.b.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])


@pytest.mark.parametrize(
    ("clip", "limit", "a", "b"),
    [
        ("norm", math.sqrt(125) / 2, (1.5, 2.0), (3.0, 4.0)),
        ("norm", 100.0, (3.0, 4.0), (6.0, 8.0)),
        ("value", 4.0, (3.0, 4.0), (4.0, 4.0)),
        ("tensor", 5.0, (3.0, 4.0), (3.0, 4.0)),
        (None, 1.0, (3.0, 4.0), (6.0, 8.0)),
    ],
)
def test_what_is_clipped(clip, limit, a, b):
    module = Two()
    clip_gradients(module, Optimization(clip=clip, clip_value=limit))
    torch.testing.assert_close(module.a.grad, torch.tensor(a))
    torch.testing.assert_close(module.b.grad, torch.tensor(b))


def test_joined_maps_are_clipped_one_by_one():
    joined = PackedLinear(2, n_maps=2)
    joined.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.3, 0.0], [0.0, 0.4]])
    clip_gradients(joined, Optimization(clip="tensor", clip_value=1.0))
    expected = torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.3, 0.0], [0.0, 0.4]])
    torch.testing.assert_close(joined.weight.grad, expected)


def test_a_preset_can_be_changed_and_mistakes_are_named():
    changed = Optimization.from_dict({"preset": "cellfm", "learning_rate": 1e-3, "betas": [0.8, 0.9]})
    assert (changed.learning_rate, changed.betas, changed.clip) == (1e-3, (0.8, 0.9), "tensor")
    for values, text in [
        ({"preset": "gpt5"}, "no optimization preset"),
        ({"rate": 1}, "no field rate"),
        ({"optimizer": "sgd"}, "optimizer must be"),
        ({"schedule": "cosine_restarts", "warmup_steps": 9, "cycle": 5}, "cycle of 5"),
    ]:
        with pytest.raises(ValueError, match=text):
            Optimization.from_dict(values)


def test_frozen_parameters_get_no_optimiser():
    frozen, free = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer({"a": frozen, "b": free}, Optimization())
    assert [p is free for group in optimizer.param_groups for p in group["params"]] == [True]
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        build_optimizer({"a": frozen}, Optimization())
