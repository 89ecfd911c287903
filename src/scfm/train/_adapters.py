"""Low-rank adapters (LoRA; Hu et al., ICLR 2022) on any backbone, made by peft."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import _logging
from .._errors import CheckpointError, UnsupportedError
from .._optional import require
from ..checkpoints._files import new_directory, read_json
from ..nn.low_rank import adapted_layers
from ._freeze import keep_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..backbones import Backbone

HEADER = "adapter.json"
TENSORS = "adapter.safetensors"
FORMAT = 1
_ADAPTER = "default"


def add_lora(
    backbone: Backbone,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ("attention", "ffn"),
    seed: int = 0,
) -> Backbone:
    """Put low-rank adapters around linear maps of a backbone, in place.

    Each map ``W`` becomes ``W + (alpha / rank) B A`` with a random ``A`` and zero ``B``, so that the numbers stay what
    they are until training. Only ``A`` and ``B`` are trainable afterwards. Maps that are stored as one packed matrix,
    such as queries, keys and values, have one adapter together.

    Parameters
    ----------
    backbone
        The model. Its random features, if it has any, are not drawn anew from now on.
    rank
        Rank of the updates.
    alpha
        Their scale, relative to the rank.
    dropout
        Dropout on the input of the adapters in training.
    targets
        Parts of the network that get adapters: those of the backbone's ``lora_targets`` (``"attention"`` and
        ``"ffn"``), or regular expressions for whole names of its linear maps; one of them or several.
    seed
        Seed of ``A``. The global random state is neither used nor changed.

    Returns
    -------
    The backbone.

    Raises
    ------
    MissingExtraError
        If peft is not installed.
    UnsupportedError
        If the backbone names no place for adapters, or dropout is asked for where peft has none.
    ValueError
        If there are adapters already, or ``targets`` match no linear map.

    Examples
    --------
    >>> import scfm
    >>> backbone = scfm.train.add_lora(scfm.load("scgpt-mini"), rank=4)  # doctest: +SKIP
    """
    peft = require("peft", purpose="LoRA")
    if has_lora(backbone):
        msg = f"{backbone.name} has adapters already; merge them first with scfm.train.merge_lora"
        raise ValueError(msg)
    linear, packed = _targets(backbone, targets)
    if packed and dropout:
        msg = (
            f"{backbone.name} has packed maps ({packed[0]} ...), whose adapters can have no dropout; use dropout=0 or "
            "other targets"
        )
        raise UnsupportedError(msg)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear, target_parameters=packed or None
    )
    backbone.module.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, backbone.module, adapter_name=_ADAPTER)
    keep_features(backbone.module)
    backbone.module.eval()
    changed(backbone)
    n_trainable = sum(p.numel() for p in backbone.module.parameters() if p.requires_grad)
    _logging.info(
        f"adapters of rank {rank} around {len(linear) + len(packed)} maps of {backbone.name}: {n_trainable:,} of "
        f"{backbone.n_parameters:,} parameters are trained"
    )
    return backbone


def merge_lora(backbone: Backbone) -> Backbone:
    """Add the adapters to the weights they belong to, and remove them, in place.

    The numbers stay the same up to rounding. The result is an ordinary backbone.

    Raises
    ------
    ValueError
        If there are no adapters.
    """
    _require_adapters(backbone)
    for _, layer in adapted_layers(backbone.module):
        layer.merge(safe_merge=True)
    _remove(backbone)
    return changed(backbone)


def has_lora(backbone: Backbone) -> bool:
    """Whether a backbone has adapters that are not merged."""
    return next(iter(adapted_layers(backbone.module)), None) is not None


def save_adapters(backbone: Backbone, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapters alone: ``adapter.json`` and ``adapter.safetensors``.

    The whole model, with the adapters merged, is written by :meth:`scfm.Backbone.save`.

    Parameters
    ----------
    backbone
        A model with adapters.
    path
        Directory to make; it appears complete or not at all.
    overwrite
        Replace adapters that lie there.

    Raises
    ------
    FileExistsError
        If ``path`` exists and may not be replaced.
    ValueError
        If there are no adapters.
    """
    from safetensors.torch import save_file

    _require_adapters(backbone)
    path = Path(path).expanduser().resolve()
    if overwrite and path.exists() and not (path / HEADER).is_file():
        msg = f"{path} holds no adapters and is not replaced even with overwrite=True; choose another path"
        raise FileExistsError(msg)
    header = {
        "format": FORMAT,
        "kind": backbone.kind,
        "base": backbone.provenance.extra.get("source", {}),
        "lora": _options(backbone),
    }
    with new_directory(path, overwrite=overwrite) as directory:
        save_file(adapter_state(backbone), directory / TENSORS, metadata={"format": "pt"})
        (directory / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return path


def load_adapters(backbone: Backbone, path: str | Path) -> Backbone:
    """Put adapters that :func:`save_adapters` wrote onto the model they were trained on, in place.

    Raises
    ------
    CheckpointError
        If the files are damaged, or belong to a model of another kind or shape.
    ValueError
        If the model has adapters already.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path).expanduser()
    header = read_json(path / HEADER)
    if header.get("kind") != backbone.kind or header.get("format", FORMAT + 1) > FORMAT:
        msg = f"{path} holds adapters of {header.get('kind')} in format {header.get('format')}, not of {backbone.kind}"
        raise CheckpointError(msg)
    try:
        state = load_file(path / TENSORS)
    except (SafetensorError, FileNotFoundError) as error:
        msg = f"{path / TENSORS} cannot be read: {error}"
        raise CheckpointError(msg) from error
    base, own = header["base"].get("sha256"), backbone.provenance.sha256
    if base and own and base != own:
        _logging.warning(f"the adapters in {path} were trained on other weights than those of {backbone.name}")
    add_lora(backbone, **header["lora"])
    expected = adapter_state(backbone)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in expected.items()}:
        _remove(backbone)
        msg = f"the adapters in {path} do not fit {backbone.name}: they belong to a network of another shape"
        raise CheckpointError(msg)
    backbone.module.load_state_dict(state, strict=False)
    return backbone


def adapter_state(backbone: Backbone) -> dict[str, Tensor]:
    """Tensors of the adapters alone, on the CPU."""
    state = backbone.module.state_dict()
    return {key: value.detach().cpu().contiguous() for key, value in state.items() if re.search(r"\.lora_[AB]\.", key)}


def changed(backbone: Backbone) -> Backbone:
    """Note that weights differ from the file they came from, so that results are not taken for those of the file."""
    origin = backbone.provenance
    if origin.sha256:
        extra = {**origin.extra, "source": {"id": origin.id, "sha256": origin.sha256}}
        backbone.provenance = replace(origin, sha256="", extra=extra)
    return backbone


def _remove(backbone: Backbone) -> None:
    for name, layer in list(adapted_layers(backbone.module)):
        backbone.module.set_submodule(name, layer.get_base_layer())


def _require_adapters(backbone: Backbone) -> None:
    if not has_lora(backbone):
        msg = f"{backbone.name} has no adapters; scfm.train.add_lora makes them"
        raise ValueError(msg)


def _targets(backbone: Backbone, targets: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the matrices in other modules, that get adapters."""
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not backbone.lora_targets:
        msg = f"{backbone.kind} names no maps for adapters; a backbone class does that in lora_targets"
        raise UnsupportedError(msg)
    named = backbone.lora_targets
    patterns = [re.compile(text) for target in targets for text in named.get(target, (target,))]
    linear, packed = [], []
    for name, part in backbone.module.named_modules():
        if not any(pattern.fullmatch(name) for pattern in patterns):
            continue
        if isinstance(part, nn.Linear):
            linear.append(name)
        elif _is_matrix(getattr(part, "weight", None)):
            packed.append(f"{name}.weight")
    if not linear and not packed:
        msg = f"targets={targets} match no linear map of {backbone.kind}; its parts are {', '.join(named)}"
        raise ValueError(msg)
    return linear, packed


def _options(backbone: Backbone) -> dict[str, Any]:
    """Arguments of :func:`add_lora` that make the same adapters."""
    layers = dict(adapted_layers(backbone.module))
    one = next(iter(layers.values()))
    return {
        "rank": one.r[_ADAPTER],
        "alpha": one.lora_alpha[_ADAPTER],
        "dropout": getattr(one.lora_dropout[_ADAPTER], "p", 0.0),
        "targets": [re.escape(name) for name in layers],
    }


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.ndim == 2
