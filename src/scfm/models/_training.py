"""Training of a model class on the cells of an AnnData object."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from scvi.model._utils import get_max_epochs_heuristic, parse_device_args
from scvi.train import Trainer
from scvi.train._logger import SimpleLogger

from .. import _logging
from ..engine import InputCheck
from ..nn.low_rank import adapted_layers
from ..train._adapters import changed
from ..train._freeze import freeze as freeze_weights
from ..train._freeze import set_training_mode
from ..train._plan import default_optimization
from ..train._presets import Optimization, preset
from ..train._trainer import choose_precision, choose_strategy
from ._batches import CellBatches
from ._train_arguments import positive, stopping_callbacks, take_callbacks, take_clipping, trainer_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from ..backbones import Backbone
    from ..genes import GeneMatch
    from ..train._plan import TrainingPlan
    from ._base import FoundationModel

    Freeze = bool | int | str | Sequence[str] | Mapping[str, Any]

LEARNING_RATE = 1e-4
# what is better when it is higher; of everything else about held-out cells the lowest is best
_MAXIMISED = ("macro F1",)
_MOST_EPOCHS = 10
_TRAIN_SIZE = 0.9


class History(SimpleLogger):
    """Losses of a run under the names that scvi-tools has for them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record metrics of an epoch or a step."""
        super().log_metrics({_name(name): value for name, value in metrics.items()}, step)


class StepLoss(Callback):
    """Records the training loss of a step, the mean over its micro-batches, now and then."""

    def __init__(self, every: int) -> None:
        self.every, self.step, self.losses = every, 0, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss after an optimiser step."""
        if outputs is not None and "loss" in outputs["parts"]:
            self.losses.append(outputs["parts"]["loss"])
        step = trainer.global_step
        if step == self.step:
            return
        if self.losses and (step - 1) % self.every == 0 and trainer.logger is not None:
            loss = float(torch.stack(self.losses).mean())
            trainer.logger.log_metrics({"train_loss_step": loss, "step": step}, step)
        self.step, self.losses = step, []


def _name(name: str) -> str:
    if name in ("epoch", "step", "train_loss_step", "validation_loss"):
        return name
    if name == "loss":
        return "train_loss_epoch"
    return f"{name.removeprefix('validation_')}_validation" if name.startswith("validation_") else f"{name}_train"


def split_cells(
    n_obs: int, train_size: float | None, validation_size: float | None, seed: int, *, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the cells to train on, to validate on, and to leave alone, each in ascending order.

    Parameters
    ----------
    n_obs
        Number of cells.
    train_size, validation_size
        Shares; by default 0.9 and the rest.
    seed
        Seed of the division.
    shuffle
        Whether cells are chosen at random; else the first are to validate on, the next to train on.

    Raises
    ------
    ValueError
        If the shares make no sense.
    """
    train_size = _TRAIN_SIZE if train_size is None else train_size
    if not 0 < train_size <= 1 or not 0 <= (validation_size or 0) < 1 or train_size + (validation_size or 0) > 1:
        msg = f"train_size={train_size} and validation_size={validation_size} are no shares of the cells that fit together"
        raise ValueError(msg)
    n_train = math.ceil(train_size * n_obs)
    n_validation = n_obs - n_train if validation_size is None else math.floor(validation_size * n_obs)
    order = np.random.default_rng(seed).permutation(n_obs) if shuffle else np.arange(n_obs)
    parts = np.split(order, [n_validation, n_validation + n_train])
    validation, train, test = (np.sort(part) for part in parts)
    return train, validation, test


def choose_optimization(
    backbone: Backbone,
    optimization: Optimization | Mapping[str, Any] | str | None,
    lr: float | None,
    weight_decay: float | None,
    fields: Mapping[str, Any] | None = None,
) -> Optimization:
    """What is given, or the optimiser of the paper with a constant rate that suits a few epochs.

    A mapping has fields that change that, or those of its ``preset``. Further ``fields`` change all of them, and ``lr`` and
    ``weight_decay`` these.
    """
    if isinstance(optimization, str):
        optimization = preset(optimization)
    elif not isinstance(optimization, Optimization):
        few_epochs = replace(
            default_optimization(backbone.kind),
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_steps=0,
            min_rate=0.0,
            unit="step",
            redraw_every=None,
        )
        optimization = Optimization.from_dict(optimization or {}, few_epochs)
    given = {"learning_rate": lr, "weight_decay": weight_decay}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(optimization, **{**(fields or {}), **given})


@contextmanager
def trainable(backbone: Backbone, freeze: Freeze | None) -> Iterator[None]:
    """Let weights be trained inside the block, all of them unless adapters or ``freeze`` say otherwise."""
    parameters = dict(backbone.module.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    if freeze is None or freeze is False:
        if not any(before.values()) and not any(True for _ in adapted_layers(backbone.module)):
            backbone.module.requires_grad_(requires_grad=True)
    elif freeze is True:
        freeze_weights(backbone)
    elif isinstance(freeze, int):
        freeze_weights(backbone, last_n_layers=freeze)
    elif hasattr(freeze, "keys"):
        freeze_weights(backbone, **freeze)
    else:
        freeze_weights(backbone, freeze, embeddings=False)
    set_training_mode(backbone.module)
    try:
        yield
    finally:
        backbone.module.eval()
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


class KeepBest(Callback):
    """Puts back the weights of the epoch that was best on held-out cells, by what ``monitor`` names.

    Parameters
    ----------
    monitor
        What is logged: the loss, a part of it, or a score.
    mode
        Whether the lowest (``"min"``) or the highest (``"max"``) is best; of equals it is the first.
    """

    def __init__(self, monitor: str = "validation_loss", mode: Literal["min", "max"] = "min") -> None:
        self.monitor, self.best, self.state, self.epoch = monitor, math.inf, {}, -1
        self.sign = -1.0 if mode == "max" else 1.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Remember the weights if they are the best so far."""
        value = trainer.callback_metrics.get(self.monitor)
        badness = math.inf if value is None else self.sign * float(value)
        if not trainer.sanity_checking and badness < self.best:
            self.best, self.epoch = badness, trainer.current_epoch
            self.state = {name: value.detach().cpu().clone() for name, value in self._values(pl_module)}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for name, value in self._values(pl_module):
                if name in self.state:
                    value.copy_(self.state[name])

    @staticmethod
    def _values(plan: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """What training changes: weights with gradients, and running statistics."""
        yield from ((name, p) for name, p in plan.module.named_parameters() if p.requires_grad)
        yield from plan.module.named_buffers()


def fit(
    model: FoundationModel,
    make_plan: Callable[..., TrainingPlan],
    trained: AbstractContextManager,
    split: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    max_epochs: int | None,
    max_steps: int | None,
    accelerator: str,
    devices: int | list[int] | str,
    precision: str | int | None = "32-true",
    batch_size: int,
    early_stopping: bool,
    early_stopping_patience: int,
    seed: int,
    log_every_n_steps: int,
    keep_best: bool = False,
    monitor: str = "loss",
    labels: Mapping[str, np.ndarray] | None = None,
    groups: np.ndarray | None = None,
    genes: Callable[[GeneMatch], GeneMatch] | None = None,
    tokenize: Mapping[str, Any] | None = None,
    **trainer_kwargs: Any,
) -> None:
    """Train a model in place.

    Parameters
    ----------
    model
        The model, with data.
    make_plan
        Called with ``genes`` and the length of the run; returns the plan.
    trained
        Block in which the weights that are to be trained require gradients.
    split
        Numbers of the cells to train on, to validate on, and to leave alone.
    keep_best
        Whether the weights with the lowest loss of held-out cells count.
    monitor
        What is meant instead of the total, ``"loss"``: a part of it, or ``"macro F1"``, of which the highest is best.
    labels
        What else the network needs for each cell, by name, one entry for each cell of the data.
    groups
        Group of each cell, if the cells of a mini-batch are to come from one group.
    genes
        Restricts the genes of the data.
    tokenize
        Options of the tokenizer that say what the matrix has to hold.
    max_epochs, max_steps, accelerator, devices, precision, batch_size, early_stopping, early_stopping_patience, seed, \
    log_every_n_steps, trainer_kwargs
        See :meth:`FoundationModel.train`.
    """
    backbone = model.backbone
    max_epochs, max_steps, batch_size, log_every_n_steps = positive(
        max_epochs=max_epochs, max_steps=max_steps, batch_size=batch_size, log_every_n_steps=log_every_n_steps
    )
    trainer_kwargs = trainer_arguments(trainer_kwargs)
    strategy = trainer_kwargs.pop("strategy", "auto")
    if "fsdp" in str(strategy) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        msg = (
            "model classes train with every device holding the whole model (strategy='ddp'); to spread it over devices use "
            "scfm.train.pretrain(..., strategy='fsdp')"
        )
        raise ValueError(msg)
    train, validation, test = split
    if early_stopping and not len(validation):
        msg = "early stopping watches the loss of held-out cells, but there are none; use train_size < 1"
        raise ValueError(msg)
    if max_epochs is None:
        max_epochs = -1 if max_steps is not None else get_max_epochs_heuristic(model.adata.n_obs, _MOST_EPOCHS)
    accelerator, devices, device = parse_device_args(accelerator=accelerator, devices=devices, return_device="torch")
    clipping = take_clipping(trainer_kwargs)
    callbacks = [*take_callbacks(trainer_kwargs), StepLoss(log_every_n_steps)]
    watched, mode = f"validation_{monitor}", "max" if monitor in _MAXIMISED else "min"
    callbacks += stopping_callbacks(trainer_kwargs, watched, mode, early_stopping_patience, wanted=early_stopping)
    if keep_best and len(validation):
        callbacks.append(KeepBest(watched, mode))
    n_nodes = trainer_kwargs.get("num_nodes", 1)
    with warnings.catch_warnings():
        # that of scvi-tools is; ours works in several processes, too
        warnings.filterwarnings("ignore", message="early_stopping was automatically disabled")
        trainer = Trainer(
            **{"check_val_every_n_epoch": 1, "benchmark": False, "logger": History()} | trainer_kwargs,
            strategy=choose_strategy(strategy, accelerator=accelerator, devices=devices, num_nodes=n_nodes),
            precision=choose_precision(precision),
            max_epochs=max_epochs,
            max_steps=-1 if max_steps is None else max_steps,
            accelerator=accelerator,
            devices=devices,
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_model_summary=False,
        )
    trainer._model = model  # what SaveCheckpoint of scvi-tools saves
    with trained, model._cells(model.adata) as task:
        match = task.match if genes is None else genes(task.match)
        labels = dict(labels or {})
        if "batch_labels" in task.options:
            labels.setdefault("batch", task.options["batch_labels"])
        # whether the genes of the data are known is asked of all of them, not of those that were chosen
        check = InputCheck(backbone, task.source, task.match, dict(tokenize or {}))
        parts = {"training": train, "validation": validation}
        batches = {
            stage: CellBatches(
                task.source, rows, batch_size, stage, seed=seed, check=check, labels=labels, groups=groups
            )
            for stage, rows in parts.items()
        }
        per_step = trainer.world_size * trainer.accumulate_grad_batches
        n_steps = -(-batches["training"].n_batches // per_step)
        if max_epochs == -1:
            trainer.fit_loop.max_epochs = max_epochs = -(-max_steps // n_steps)
        plan = make_plan(
            genes=match,
            seed=seed,
            total_steps=n_steps * max_epochs if max_steps is None else max_steps,
            steps_per_epoch=n_steps,
            per_step=per_step,
        )
        plan.optimization = replace(plan.optimization, **clipping)
        for part in batches.values():
            part.plan = plan
        start = _logging.info(f"training {backbone!r} on {len(train):,} cells")
        trainer.fit(plan, batches["training"], batches["validation"] if len(validation) else None)
        _logging.info("    finished", time=start)
    changed(backbone)
    model.train_indices, model.validation_indices, model.test_indices = train, validation, test
    recorded = getattr(trainer.logger, "history", None) if trainer.is_global_zero else None
    model.history_ = joined(model.history_, recorded or {})
    if trainer.global_step:
        model.is_trained_ = True
    model.trainer = trainer
    model.to_device(device)


def joined(before: dict[str, pd.DataFrame] | None, new: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """History of two runs, one after the other; epochs and steps are counted on."""
    out = dict(before or {})
    for name, table in new.items():
        table = table.astype(float)
        if (old := out.get(name)) is not None:
            shift = old.index[-1] + (1 if old.index.name == "epoch" else 0)
            table = pd.concat([old, table.set_axis(table.index + shift)]).rename_axis(old.index.name)
        out[name] = table
    return out


def seed_or_default(seed: int | None) -> int:
    """The seed, by default that of scvi-tools."""
    return int(scvi.settings.seed or 0) if seed is None else int(seed)
