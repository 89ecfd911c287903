"""Optimisers and learning-rate schedules, as data: those of the papers by name, others by their fields."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..nn.retention import PackedLinear
from ._numbers import integer, real
from ._sharding import fill, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

OptimizerName = Literal["adam", "adamw"]
Clip = Literal["norm", "value", "tensor"]
Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "steps"]
Unit = Literal["step", "epoch"]

_REALS = ("learning_rate", "eps", "weight_decay", "clip_value", "min_rate", "gamma", "cycle_factor")
_INTEGERS = {"warmup_steps": 0, "step_size": 1, "cycle": 1}
_TINY = 1e-12
_TORCH_EPSILON = 1e-6


@dataclass(frozen=True)
class Optimization:
    """How weights are updated.

    Parameters
    ----------
    optimizer
        ``"adam"`` adds weight decay to the gradient (an L2 penalty), ``"adamw"`` decouples it.
    learning_rate
        Highest rate of the schedule.
    betas, eps
        Constants of both optimisers.
    weight_decay
        Weight decay of all parameters but those of ``no_decay``.
    no_decay
        Regular expressions; parameters in whose name one is found are not decayed.
    clip
        What is limited to ``clip_value``: the ``"norm"`` of all gradients together, each ``"value"``, the norm of
        each ``"tensor"``, or nothing.
    clip_value
        Limit of ``clip``.
    schedule
        What follows the warm-up: ``"constant"``; ``"linear"`` or ``"cosine"`` decay to ``min_rate`` at the last step;
        ``"cosine_restarts"`` with cycles that include a warm-up each; ``"steps"``, a factor ``gamma`` after every
        ``step_size``.
    warmup_steps
        Steps of linear growth from ``min_rate`` to ``learning_rate``.
    min_rate
        Rate at the start of the warm-up and at the end of a decay.
    unit
        What the schedule counts: optimiser steps or epochs.
    step_size
        See ``schedule``.
    gamma
        Factor of ``"steps"``, and of the highest rate from one cycle of ``"cosine_restarts"`` to the next.
    cycle, cycle_factor
        Length of the first cycle of ``"cosine_restarts"``, warm-up included, and growth of the rest of a cycle.
    redraw_every
        New random features of Performers are drawn after so many optimiser steps; ``None`` for never; ``"config"`` after
        as many forward passes, of all processes together, as ``redraw_every`` of the network's config says, rounded up
        to whole steps, and never if there is no such number.

    Raises
    ------
    ValueError
        If a choice is unknown, or a number is none or makes no sense.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    clip: Clip | None = "norm"
    clip_value: float = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    min_rate: float = 0.0
    unit: Unit = "step"
    step_size: int = 1
    gamma: float = 1.0
    cycle: int = 1
    cycle_factor: float = 1.0
    redraw_every: int | Literal["config"] | None = None

    def __post_init__(self) -> None:
        for name in _REALS:
            object.__setattr__(self, name, real(name, getattr(self, name)))
        for name, least in _INTEGERS.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), least=least))
        if self.redraw_every not in (None, "config"):
            object.__setattr__(self, "redraw_every", integer("redraw_every", self.redraw_every, least=1))
        for name, choices in (("optimizer", OptimizerName), ("schedule", Schedule), ("unit", Unit)):
            if getattr(self, name) not in get_args(choices):
                msg = f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.clip is not None and self.clip not in get_args(Clip):
            msg = f"clip must be None or one of {', '.join(get_args(Clip))}; got {self.clip!r}"
            raise ValueError(msg)
        if not (0 <= self.min_rate <= self.learning_rate and self.learning_rate > 0):
            msg = f"learning_rate ({self.learning_rate}) must be positive and min_rate ({self.min_rate}) not above it"
            raise ValueError(msg)
        if self.schedule == "cosine_restarts" and not 0 <= self.warmup_steps < self.cycle:
            msg = f"a cycle of {self.cycle} cannot hold a warm-up of {self.warmup_steps}"
            raise ValueError(msg)
        # YAML has lists only
        object.__setattr__(self, "betas", tuple(real("betas", beta) for beta in self.betas))
        object.__setattr__(self, "no_decay", tuple(self.no_decay))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], default: Optimization | None = None) -> Optimization:
        """Build from a mapping of fields.

        Parameters
        ----------
        values
            Fields, and as ``preset`` the name of an entry of :data:`OPTIMIZATIONS` that they change.
        default
            What they change without a ``preset``.

        Raises
        ------
        ValueError
            If the preset or a field is unknown, or a value makes no sense.
        """
        values = dict(values)
        base = preset(values.pop("preset")) if "preset" in values else default or cls()
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            msg = f"optimization has no field {', '.join(unknown)}; it has preset, {', '.join(sorted(known))}"
            raise ValueError(msg)
        return replace(base, **values)

    def redraw_steps(self, config: Any, per_step: int) -> int | None:
        """Optimiser steps between two draws of random features; ``None`` for never.

        Parameters
        ----------
        config
            Hyper-parameters of the network.
        per_step
            Forward passes of all processes in one step.
        """
        if self.redraw_every != "config":
            return self.redraw_every
        calls = getattr(config, "redraw_every", None)
        return None if calls is None else max(1, -(-int(calls) // per_step))


_SCLONG = Optimization(
    optimizer="adam",
    learning_rate=5e-5,
    clip="norm",
    clip_value=100.0,
    schedule="cosine_restarts",
    warmup_steps=5,
    min_rate=1e-6,
    cycle=15,
    cycle_factor=2.0,
    gamma=0.9,
    redraw_every="config",
)

OPTIMIZATIONS: dict[str, Optimization] = {
    "scgpt": Optimization(
        optimizer="adam", learning_rate=1e-4, clip="norm", clip_value=1.0, schedule="cosine", warmup_steps=10_000
    ),
    # the decay after the warm-up is not published
    "scfoundation": Optimization(
        optimizer="adamw", learning_rate=1e-4, clip="norm", clip_value=1.0, schedule="constant", warmup_steps=9766
    ),
    # "emb", "bias" and "layernorm" in upstream's names, where LayerNorms are called post_norm with gamma and beta
    "cellfm": Optimization(
        optimizer="adam",
        learning_rate=1e-7,
        betas=(0.9, 0.95),
        weight_decay=1e-5,
        no_decay=("embedding", "depth_tokens", r"zero_head\.(\d+\.)?bias"),
        clip="tensor",
        clip_value=1.0,
    ),
    "cellfm-tutorials": Optimization(
        optimizer="adam", learning_rate=1e-4, weight_decay=1e-5, clip="value", clip_value=2.0
    ),
    "sclong": _SCLONG,
    # the authors step the schedule after each epoch, so that the paper's five epochs never leave the warm-up
    "sclong-code": replace(_SCLONG, unit="epoch"),
}
"""Optimiser and schedule of each paper, by name of the backbone; further names are those of its code or tutorials."""


def preset(name: str) -> Optimization:
    """Look up an entry of :data:`OPTIMIZATIONS`.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    if name not in OPTIMIZATIONS:
        msg = f"there is no optimization preset {name!r}; there are {', '.join(OPTIMIZATIONS)}"
        raise ValueError(msg)
    return OPTIMIZATIONS[name]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]], optimization: Optimization
) -> torch.optim.Optimizer:
    """Make the optimiser of those parameters that require gradients.

    Parameters
    ----------
    parameters
        Parameters by name, such as ``module.named_parameters()``.
    optimization
        What to make.

    Raises
    ------
    ValueError
        If no parameter requires gradients.
    """
    parameters = {name: p for name, p in dict(parameters).items() if p.requires_grad}
    if not parameters:
        msg = "no parameter requires gradients; unfreeze some (module.requires_grad_()) before training"
        raise ValueError(msg)
    spared = [re.compile(pattern) for pattern in optimization.no_decay]
    decayed = {name: not any(pattern.search(name) for pattern in spared) for name in parameters}
    groups = [
        {
            "params": [p for name, p in parameters.items() if decayed[name] is decays],
            "weight_decay": optimization.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimization.optimizer]
    return make(
        [group for group in groups if group["params"]],
        lr=optimization.learning_rate,
        betas=optimization.betas,
        eps=optimization.eps,
    )


def learning_rate_at(optimization: Optimization, count: int, total: int | None = None) -> float:
    """Learning rate of the update after ``count`` steps or epochs (see ``Optimization.unit``).

    Parameters
    ----------
    optimization
        The schedule.
    count
        Finished steps or epochs.
    total
        Their number in the whole run, for decays that end with it.

    Raises
    ------
    ValueError
        If the schedule ends with the run and ``total`` is not given.
    """
    low, high, warmup = optimization.min_rate, optimization.learning_rate, optimization.warmup_steps
    if optimization.schedule == "cosine_restarts":
        return _restarted(optimization, count)
    if count < warmup:
        return low + (high - low) * count / warmup
    if optimization.schedule == "constant":
        return high
    if optimization.schedule == "steps":
        return high * optimization.gamma ** ((count - warmup) // optimization.step_size)
    if total is None:
        msg = f"a {optimization.schedule} schedule needs the total number of {optimization.unit}s"
        raise ValueError(msg)
    progress = min(1.0, (count - warmup) / max(1, total - warmup))
    if optimization.schedule == "linear":
        return low + (high - low) * (1 - progress)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def _restarted(optimization: Optimization, count: int) -> float:
    low, high, warmup, length = (
        optimization.min_rate,
        optimization.learning_rate,
        optimization.warmup_steps,
        optimization.cycle,
    )
    while count >= length:
        count -= length
        length = int((length - warmup) * optimization.cycle_factor) + warmup
        high *= optimization.gamma
    if count < warmup:
        return low + (high - low) * count / warmup
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (count - warmup) / (length - warmup)))


def build_schedule(
    optimizer: torch.optim.Optimizer,
    optimization: Optimization,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    first_step: int = 0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the schedule of an optimiser, to be stepped after each optimiser step whatever its unit is.

    Parameters
    ----------
    optimizer
        Result of :func:`build_optimizer`.
    optimization
        The schedule.
    total_steps
        Optimiser steps in the whole run.
    steps_per_epoch
        Optimiser steps of an epoch, for schedules that count epochs.
    first_step
        Steps of the run that are finished already.

    Raises
    ------
    ValueError
        If the schedule needs a number that is not given.
    """
    if optimization.unit == "epoch" and not steps_per_epoch:
        msg = "a schedule that counts epochs needs steps_per_epoch; or give unit='step'"
        raise ValueError(msg)
    unit = steps_per_epoch if optimization.unit == "epoch" else 1
    total = None if total_steps is None else -(-total_steps // unit)

    def factor(step: int) -> float:
        return learning_rate_at(optimization, (first_step + step) // unit, total) / optimization.learning_rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def clip_gradients(module: nn.Module, optimization: Optimization) -> None:
    """Limit the gradients of ``module`` in place.

    With ``clip="tensor"``, each of the maps that a :class:`scfm.nn.retention.PackedLinear` joins is a tensor by itself.
    """
    limit = optimization.clip_value
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if optimization.clip == "norm":
        # torch's own function refuses gradients of which only some are sharded
        norm = torch.stack([whole(gradient.norm()).double() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((limit / (norm + _TORCH_EPSILON)).clamp(max=1.0).to(gradient.dtype))
    elif optimization.clip == "value":
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
    elif optimization.clip == "tensor":
        for part in module.modules():
            n_maps = len(part.weight) // part.dim if isinstance(part, PackedLinear) else 1
            for parameter in part.parameters(recurse=False):
                if parameter.grad is not None:
                    _clip_each(parameter.grad, n_maps, limit)


def _clip_each(gradient: Tensor, n_parts: int, limit: float) -> None:
    """Limit the norm of each of ``n_parts`` equal parts of a gradient, which may be sharded."""
    values = whole(gradient)
    for part in values.chunk(n_parts):
        part.mul_((limit / part.norm().clamp(min=_TINY)).clamp(max=1.0))
    if values is not gradient:
        fill(gradient, values)
