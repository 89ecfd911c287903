"""Which weights of a backbone are trained, and what the others do meanwhile."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..nn.low_rank import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ..backbones import Backbone


def freeze(
    backbone: Backbone,
    patterns: Sequence[str] | str = (),
    *,
    last_n_layers: int | None = None,
    embeddings: bool = True,
) -> Backbone:
    """Choose the weights that fine-tuning leaves alone; all others become trainable.

    The papers fine-tune with the embeddings of genes and values frozen (scGPT), or train the last layers only
    (scFoundation).

    Parameters
    ----------
    backbone
        The model.
    patterns
        Regular expressions; parameters whose name holds a match are frozen.
    last_n_layers
        Freeze all layers but the last of each stack; 0 freezes all of them.
    embeddings
        Freeze what embeds genes and values.

    Returns
    -------
    The backbone.

    Raises
    ------
    ValueError
        If the model has adapters, which freeze everything else already, a pattern matches nothing, or nothing would be
        trained.

    Examples
    --------
    >>> import scfm
    >>> backbone = scfm.train.freeze(scfm.load("scgpt-mini"), last_n_layers=2)  # doctest: +SKIP
    """
    module = backbone.module
    if any(True for _ in adapted_layers(module)):
        msg = f"{backbone.name} has adapters, beside which all other weights are frozen; merge them first"
        raise ValueError(msg)
    names = [name for name, _ in module.named_parameters()]
    frozen = {name for name in names if embeddings and _is_inside(name, backbone.embedding_modules)}
    if last_n_layers is not None:
        frozen |= {name for name in names if _is_inside(name, _early_layers(backbone, last_n_layers))}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            msg = f"no parameter of {backbone.name} matches {pattern!r}; names look like {', '.join(names[:3])}"
            raise ValueError(msg)
        frozen |= found
    if len(frozen) == len(names):
        msg = f"nothing of {backbone.name} would be trained"
        raise ValueError(msg)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    keep_features(module)
    return backbone


def set_training_mode(module: nn.Module) -> nn.Module:
    """Put a network into training mode, but for parts none of whose weights are trained.

    Those parts keep doing what they do in inference: no dropout, no running statistics, no weights cut to a norm.
    """
    module.train()
    _frozen_to_eval(module)
    return module


def keep_features(module: nn.Module) -> None:
    """Keep the random features of layers whose own weights are frozen; the others may draw new ones."""
    for part in module.modules():
        if hasattr(part, "fixed_features"):
            own = [p for name, p in part.named_parameters() if ".lora_" not in name]
            part.fixed_features = not any(p.requires_grad for p in own)


def _frozen_to_eval(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        _frozen_to_eval(child)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in modules)


def _early_layers(backbone: Backbone, last_n_layers: int) -> list[str]:
    """Names of all layers but the last ones of each stack."""
    if last_n_layers < 0:
        msg = f"last_n_layers must not be negative; got {last_n_layers}"
        raise ValueError(msg)
    out = []
    for stack in backbone.layer_stacks:
        n_layers = len(backbone.module.get_submodule(stack))
        out += [re.escape(f"{stack}.{i}") for i in range(max(0, n_layers - last_n_layers))]
    return out
