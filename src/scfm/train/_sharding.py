"""Parameters spread over processes (FSDP)."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch.distributed import all_reduce, get_world_size
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from ..backbones import Backbone
    from ._plan import PretrainingPlan

# names under which networks run a layer in training
LAYER_CALLS = ("forward", "with_queries")
# and those under which they run a part of it without gradients
_PARTIAL_CALLS = ("key_sums", "update_")


def repeated_layers(backbone: Backbone) -> list[nn.Module]:
    """The layers of all stacks."""
    modules = dict(backbone.module.named_modules())
    return [layer for name in backbone.layer_stacks if name in modules for layer in modules[name]]


def shard(plan: PretrainingPlan, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Shard each layer by itself and the other parameters together; they are gathered where a layer or step starts.

    Parameters are spread over the second axis of ``mesh``, the devices of a node, and copied along the first.

    Returns
    -------
    Parameters that stay whole, because a training pass changes them or their type is another than that of most; see
    :func:`average_gradients`.
    """
    types = Counter(p.dtype for p in plan.parameters())
    changing = "|".join(plan.backbone.self_changing) or "(?!)"
    others = {
        p
        for name, p in plan.module.named_parameters()
        if re.fullmatch(changing, name) or p.dtype != types.most_common(1)[0][0]
    }
    for layer in repeated_layers(plan.backbone):
        fully_shard(layer, mesh=mesh, ignored_params=others)
        for name in (*LAYER_CALLS[1:], *_PARTIAL_CALLS):
            if hasattr(layer, name):
                register_fsdp_forward_method(layer, name)
    fully_shard(plan, mesh=mesh, ignored_params=others)
    for name in ("training_step", "validation_step"):
        register_fsdp_forward_method(plan, name)
    return [p for p in plan.parameters() if p in others]


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes."""
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            all_reduce(parameter.grad)
            parameter.grad /= get_world_size()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Write ``values`` into a tensor that may be sharded."""
    target.copy_(sharded_like(values, target))


def sharded_like(values: Tensor, other: Tensor) -> Tensor:
    """``values`` on the device of ``other`` and, where shapes agree, sharded as that is."""
    if isinstance(other, DTensor) and values.shape == other.shape:
        return distribute_tensor(values.to(other.device), other.device_mesh, other.placements)
    return values.to(other.device)
