"""Weights of linear layers that carry low-rank updates (Hu et al., ICLR 2022), as peft puts them around a layer.

Only the interface of such layers is used (``base_layer``, ``get_delta_weight``, ``active_adapters``, ``merged``,
``disable_adapters``), so that networks need not import peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer is another one with low-rank updates around it."""
    return hasattr(layer, "base_layer") and hasattr(layer, "get_delta_weight")


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers with low-rank updates."""
    return ((name, layer) for name, layer in module.named_modules() if is_adapted(layer))


def effective_weight(layer: nn.Module) -> Tensor:
    """Weight that a linear layer multiplies by, for code that does without calling the layer.

    ``layer.weight`` of an adapted layer is the frozen weight alone; what reads it would silently ignore the adapter.
    """
    return layer.weight + _update(layer) if _has_update(layer) else layer.weight


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict of the network that results when all low-rank updates are added to their weights.

    The network itself is not changed; a network without updates gives its own state dict.
    """
    state = module.state_dict()
    for name, layer in adapted_layers(module):
        inside = [key for key in state if key.startswith(f"{name}.")]
        for key in inside:
            tensor, rest = state.pop(key), key.removeprefix(f"{name}.")
            if not rest.startswith("base_layer."):
                continue
            rest = rest.removeprefix("base_layer.")
            if rest == getattr(layer, "parameter_name", "weight") and _has_update(layer):
                tensor = tensor + _update(layer).detach()
            state[f"{name}.{rest}"] = tensor
    return state


def _has_update(layer: nn.Module) -> bool:
    return is_adapted(layer) and not (layer.merged or layer.disable_adapters or not layer.active_adapters)


def _update(layer: nn.Module) -> Tensor:
    return sum(layer.get_delta_weight(name) for name in layer.active_adapters)
