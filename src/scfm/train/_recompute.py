"""Activations that are computed again in the backward pass instead of being kept (gradient checkpointing)."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from ._sharding import LAYER_CALLS, repeated_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..backbones import Backbone


@contextmanager
def recomputed_layers(backbone: Backbone, *, wanted: bool = True) -> Iterator[None]:
    """Keep only the inputs of each layer for the backward pass inside the block; results stay the same to the bit."""
    layers = repeated_layers(backbone) if wanted else []
    names = [(layer, name) for layer in layers for name in LAYER_CALLS if hasattr(layer, name)]
    for layer, name in names:
        setattr(layer, name, _recomputed(getattr(layer, name)))
    try:
        yield
    finally:
        for layer, name in names:
            delattr(layer, name)


def _recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, **kwargs)

    return run
