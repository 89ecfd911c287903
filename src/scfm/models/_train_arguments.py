"""What ``train`` takes in the names of scvi-tools and Lightning, in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from scvi.train import LoudEarlyStopping, SaveCheckpoint

from .. import _logging
from ..train._numbers import integer, real

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

_OPTIMIZER_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "eps", "optimizer": "optimizer"}
# about loading, which is done in another way here, and without effect on what is learnt
_WITHOUT_EFFECT = ("load_sparse_tensor", "pin_memory", "num_workers", "persistent_workers")
_INSTEAD = {
    "plan_kwargs": "give lr=, weight_decay= or optimization=",
    "plan_config": "give lr=, weight_decay= or optimization=",
    "datasplitter_kwargs": "give train_size= and validation_size=",
    "shuffle_set_split": "cells are held out at random here",
    "datamodule": "cells come from the data of the model; set other data up with setup_anndata",
}


def optimizer_fields(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take ``plan_kwargs`` and ``plan_config`` out of ``arguments``, as fields of :class:`scfm.train.Optimization`.

    Raises
    ------
    ValueError
        If they say something about what has no counterpart here.
    """
    given = dict(arguments.pop("plan_config", None) or {}) | dict(arguments.pop("plan_kwargs", None) or {})
    if unknown := sorted(set(given) - set(_OPTIMIZER_FIELDS)):
        msg = (
            f"plan_kwargs may hold {', '.join(_OPTIMIZER_FIELDS)}, not {', '.join(unknown)}; everything else about "
            "the updates is said with optimization=, see scfm.train.Optimization"
        )
        raise ValueError(msg)
    fields = {_OPTIMIZER_FIELDS[name]: value for name, value in given.items()}
    return fields | ({"optimizer": str(fields["optimizer"]).lower()} if "optimizer" in fields else {})


def splitting(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take ``datasplitter_kwargs`` and what it may hold out of ``arguments``, as arguments of ``split_cells``.

    Raises
    ------
    ValueError
        If it says something about what has no counterpart here.
    """
    given = dict(arguments.pop("datasplitter_kwargs", None) or {})
    if unknown := sorted(set(given) - {"shuffle_set_split", *_WITHOUT_EFFECT}):
        msg = f"datasplitter_kwargs may hold shuffle_set_split, not {', '.join(unknown)}"
        raise ValueError(msg)
    shuffle = arguments.pop("shuffle_set_split", given.get("shuffle_set_split", True))
    arguments |= {name: value for name, value in given.items() if name in _WITHOUT_EFFECT}
    return {"shuffle": bool(shuffle)}


def trainer_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the trainer, ``trainer_config`` being their default, without those that change nothing.

    Raises
    ------
    TypeError
        If there is one that has no counterpart here.
    """
    out = dict(arguments.get("trainer_config") or {}) | dict(arguments)
    out.pop("trainer_config", None)
    for name in _WITHOUT_EFFECT:
        if name in out:
            _logging.debug(f"{name}={out.pop(name)!r} changes nothing here")
    for name, instead in _INSTEAD.items():
        # what says nothing may be there
        if out.get(name) or (name == "shuffle_set_split" and out.get(name) is False):
            msg = f"train() takes no {name} here; {instead}"
            raise TypeError(msg)
        out.pop(name, None)
    return out


def positive(**numbers: int | None) -> tuple[int | None, ...]:
    """Whole numbers that are at least 1, or not given.

    Raises
    ------
    ValueError
        If one is none, or smaller than 1.
    """
    return tuple(None if value is None else integer(name, value, least=1) for name, value in numbers.items())


def take_clipping(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take Lightning's options for clipping out of ``arguments``, as fields of :class:`scfm.train.Optimization`."""
    limit, kind = arguments.pop("gradient_clip_val", None), arguments.pop("gradient_clip_algorithm", None)
    if limit is None:
        return {}
    limit = real("gradient_clip_val", limit)
    return {"clip": kind or "norm", "clip_value": limit} if limit else {"clip": None}


def stopping_callbacks(
    arguments: MutableMapping[str, Any], monitor: str, mode: str, patience: int, *, wanted: bool
) -> list[Callback]:
    """Take the options of early stopping out of ``arguments``.

    Parameters
    ----------
    arguments
        Arguments of the trainer.
    monitor, mode
        What is watched by default, and whether the lowest (``"min"``) or highest is best.
    patience
        Epochs without improvement.
    wanted
        Whether to stop early at all.
    """
    names = ("min_delta", "monitor", "mode", "warmup_epochs")
    given = {name: arguments.pop(f"early_stopping_{name}", None) for name in names}
    if not wanted:
        return []
    watched = monitor if given["monitor"] is None else _logged(given["monitor"])
    return [
        LoudEarlyStopping(
            monitor=watched,
            mode=given["mode"] or (mode if watched == monitor else "min"),
            min_delta=real("early_stopping_min_delta", given["min_delta"] or 0.0),
            warmup_epochs=integer("early_stopping_warmup_epochs", given["warmup_epochs"] or 0, least=0),
            patience=integer("early_stopping_patience", patience, least=0),
            check_on_train_epoch_end=False,
        )
    ]


def _logged(monitor: str) -> str:
    """Name under which a loss of the history is logged."""
    return f"validation_{monitor.removesuffix('_validation')}" if monitor.endswith("_validation") else monitor


def take_callbacks(arguments: MutableMapping[str, Any]) -> list[Callback]:
    """Take callbacks out of ``arguments``.

    Raises
    ------
    ValueError
        If one would read the weights of scvi-tools' files.
    """
    given = arguments.pop("callbacks", None) or []
    given = [given] if isinstance(given, Callback) else list(given)
    for callback in given:
        if isinstance(callback, SaveCheckpoint) and (callback.load_best_on_end or callback.check_nan_gradients):
            msg = (
                "SaveCheckpoint saves models here, but cannot put them back: leave load_best_on_end and "
                "check_nan_gradients out, and load the folder best_model_path with the class of the model"
            )
            raise ValueError(msg)
    return given
