"""State of an unfinished run on disk: weights and optimiser as safetensors, counters as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .._errors import CheckpointError
from ..checkpoints._files import new_directory, read_json, recover
from ._sharding import fill, sharded_like, whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

FORMAT = 1
COUNTERS = "state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass
class RunState:
    """Where a run stands.

    Parameters
    ----------
    step
        Finished optimiser steps.
    run
        What must not change when the run goes on: recipe, genes, micro-batches per step.
    history
        Rows of the loss curve.
    sums
        Sums of the losses since the last row, and under ``""`` their number.
    precision
        State of the loss scaling, where there is one.
    """

    step: int = 0
    run: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)


def write_state(
    path: Path, state: RunState, module: nn.Module, optimizer: torch.optim.Optimizer, *, writes: bool = True
) -> None:
    """Write a state folder, which appears complete or not at all.

    All processes of a run have to call it, because sharded tensors are put together; one of them ``writes``.
    """
    from safetensors.torch import save_file

    weights = {name: whole(tensor).detach().cpu() for name, tensor in module.state_dict().items()}
    moments = {
        f"{name}/{key}": whole(torch.as_tensor(value)).detach().cpu()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if not writes:
        return
    with new_directory(path, overwrite=True) as folder:
        save_file(_separate(weights), folder / WEIGHTS)
        save_file(_separate(moments), folder / OPTIMIZER)
        values = {"format": FORMAT, **vars(state)}
        (folder / COUNTERS).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_counters(path: Path) -> RunState | None:
    """Counters of a state folder, or ``None`` if there is none.

    Raises
    ------
    CheckpointError
        If the folder is damaged or written by a newer version.
    """
    recover(path)
    if not path.exists():
        return None
    values = read_json(path / COUNTERS)
    if values.pop("format", FORMAT + 1) > FORMAT:
        msg = f"{path} was written by a newer version of scfm; upgrade it, or start anew with resume=False"
        raise CheckpointError(msg)
    return RunState(**values)


def read_tensors(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill a network, and its optimiser, from a state folder.

    Raises
    ------
    CheckpointError
        If the folder is damaged or belongs to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights, moments = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        msg = f"the state of the run in {path} cannot be read ({error}); start anew with resume=False"
        raise CheckpointError(msg) from error
    targets = module.state_dict()
    if {name: tensor.shape for name, tensor in targets.items()} != {name: t.shape for name, t in weights.items()}:
        msg = f"the weights in {path} belong to another network; start anew with resume=False"
        raise CheckpointError(msg)
    for name, target in targets.items():
        fill(target, weights[name])
    if optimizer is not None:
        _fill_optimizer(module, optimizer, moments)


def _fill_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("/")
        by_parameter.setdefault(name, {})[part] = value
    parameters = dict(module.named_parameters())
    for name, parts in by_parameter.items():
        parameter = parameters[name]
        # counts of steps stay on the CPU, where optimisers keep them
        optimizer.state[parameter] = {
            part: value if part == "step" else sharded_like(value, parameter) for part, value in parts.items()
        }


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory with each other, as safetensors needs them."""
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
