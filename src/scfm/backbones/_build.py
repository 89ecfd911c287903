"""Networks from a config: filled with the weights of a checkpoint, or fresh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from .._errors import CheckpointError
from ..checkpoints.convert import LoadReport, check_against
from ._base import Provenance
from ._kinds import backbone_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from .._settings import Precision
    from ..genes import GeneVocab
    from ._base import Backbone

_INITIALISERS = {
    *("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"),
    *("xavier_normal_", "orthogonal_", "constant_", "zeros_", "ones_", "fill_", "zero_"),
}


class _NoInitialisation(TorchFunctionMode):
    """Leaves tensors as they are; on the meta device, initialisation does nothing but import a compiler for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in _INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def filled(
    cls: type[Backbone],
    config: Any,
    vocab: GeneVocab,
    state: Mapping[str, Tensor],
    report: LoadReport,
    *,
    what: str,
) -> nn.Module:
    """Build the network around the tensors of a checkpoint, without a copy of them.

    The network is made on the meta device, where nothing is allocated or initialised, and then takes over the tensors
    themselves; memory-mapped tensors stay mapped. A type that differs from the network's is converted. Buffers that
    are not part of a state dict are made by ``reset_buffers()`` of the module that owns them.

    Raises
    ------
    CheckpointError
        If keys or shapes differ, or a buffer stays empty.
    """
    with torch.device("meta"), _NoInitialisation():
        module = cls.build(config, vocab)
    expected = module.state_dict()
    check_against(state, expected, report).raise_for_errors(what)
    module.load_state_dict(
        {key: value.to(expected[key].dtype) for key, value in state.items()}, strict=True, assign=True
    )
    for part in module.modules():
        if hasattr(part, "reset_buffers") and any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            part.reset_buffers()
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if empty:
        msg = (
            f"{what} does not fill {', '.join(empty)} of {cls.__name__}. A module with buffers that are not saved needs "
            "a method reset_buffers() that computes them."
        )
        raise CheckpointError(msg)
    return module


def from_config(
    kind: str,
    config: Any,
    vocab: GeneVocab,
    *,
    seed: int = 0,
    name: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Backbone:
    """Make a backbone with fresh weights, to be trained or to serve as a control.

    Parameters
    ----------
    kind
        Name of the backbone class, see :func:`scfm.backbones.backbone_kinds`.
    config
        Config of that class, or its values as a dict.
    vocab
        The genes.
    seed
        Seed of the weights. The global random state is neither used nor changed.
    name
        Name of the model; by default ``kind`` with the suffix ``-random``.
    device, precision
        As in :func:`scfm.load`.

    Raises
    ------
    KeyError
        If no backbone class of this kind is installed.
    """
    cls = backbone_class(kind)
    if isinstance(config, dict):
        config = cls.config_from_dict(config)
    name = name or f"{kind}-random"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        module = cls.build(config, vocab)
    backbone = cls(
        module,
        config,
        vocab,
        name=name,
        load_report=LoadReport(),
        provenance=Provenance(id=name, extra={"seed": seed}),
    )
    return backbone.to(device, precision)


def random_copy(backbone: Backbone, seed: int = 0) -> Backbone:
    """Make a copy of a backbone with the same architecture and vocabulary but fresh weights.

    What such a copy achieves in an evaluation is not due to pre-training.

    Parameters
    ----------
    backbone
        The model to copy; it is not changed.
    seed
        Seed of the weights.

    Returns
    -------
    A backbone on the same device and in the same floating-point type; its name ends in ``-random``.
    """
    copy = from_config(
        backbone.kind,
        backbone.config,
        backbone.vocab,
        seed=seed,
        name=f"{backbone.name}-random",
        device=str(backbone.device),
        precision=str(backbone.dtype).removeprefix("torch."),
    )
    state = backbone.module.state_dict()
    copy.module.load_state_dict({name: state[name] for name in backbone.constants if name in state}, strict=False)
    return copy
