"""Training of a model class on the cells of an AnnData object."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
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
from ._batches import CellBatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from ..backbones import Backbone
    from ..genes import GeneMatch
    from ..train._plan import TrainingPlan
    from ._base import FoundationModel

    Freeze = bool | int | str | Sequence[str] | Mapping[str, Any]

LEARNING_RATE = 1e-4
_MOST_EPOCHS = 10


class History(SimpleLogger):
    """Losses of a run under the names that scvi-tools has for them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record metrics of an epoch or a step."""
        super().log_metrics({_name(name): value for name, value in metrics.items()}, step)


class StepLoss(Callback):
    """Records the training loss of a step now and then."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss after an optimiser step."""
        step = trainer.global_step
        if outputs is not None and step and (step - 1) % self.every == 0 and trainer.logger is not None:
            trainer.logger.log_metrics({"train_loss_step": float(outputs["loss"].detach()), "step": step}, step)


def _name(name: str) -> str:
    if name in ("epoch", "step", "train_loss_step", "validation_loss"):
        return name
    if name == "loss":
        return "train_loss_epoch"
    return f"{name.removeprefix('validation_')}_validation" if name.startswith("validation_") else f"{name}_train"


def split_cells(
    n_obs: int, train_size: float, validation_size: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the cells to train on, to validate on, and to leave alone, each in ascending order.

    Raises
    ------
    ValueError
        If the shares make no sense.
    """
    if not 0 < train_size <= 1 or not 0 <= (validation_size or 0) < 1 or train_size + (validation_size or 0) > 1:
        msg = f"train_size={train_size} and validation_size={validation_size} are no shares of the cells that fit together"
        raise ValueError(msg)
    n_train = math.ceil(train_size * n_obs)
    n_validation = n_obs - n_train if validation_size is None else math.floor(validation_size * n_obs)
    order = np.random.default_rng(seed).permutation(n_obs)
    parts = np.split(order, [n_validation, n_validation + n_train])
    validation, train, test = (np.sort(part) for part in parts)
    return train, validation, test


def choose_optimization(
    backbone: Backbone, optimization: Optimization | str | None, lr: float | None, weight_decay: float | None
) -> Optimization:
    """What is given, or the optimiser of the paper with a constant rate that suits a few epochs."""
    if isinstance(optimization, str):
        optimization = preset(optimization)
    if optimization is None:
        optimization = replace(
            default_optimization(backbone.kind),
            learning_rate=LEARNING_RATE if lr is None else lr,
            schedule="constant",
            warmup_steps=0,
            min_rate=0.0,
            unit="step",
            redraw_every=None,
        )
    given = {"learning_rate": lr, "weight_decay": weight_decay}
    return replace(optimization, **{name: value for name, value in given.items() if value is not None})


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
    """Puts back the weights of the epoch in which the loss of held-out cells, or a part of it, was lowest."""

    def __init__(self, monitor: str = "validation_loss") -> None:
        self.monitor, self.best, self.state, self.epoch = monitor, math.inf, {}, -1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Remember the weights if they are the best so far."""
        loss = float(trainer.callback_metrics.get(self.monitor, math.inf))
        if not trainer.sanity_checking and loss < self.best:
            self.best, self.epoch = loss, trainer.current_epoch
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
        Part of that loss that is meant; ``"loss"`` is the total.
    labels
        What else the network needs for each cell, by name, one entry for each cell of the data.
    groups
        Group of each cell, if the cells of a mini-batch are to come from one group.
    genes
        Restricts the genes of the data.
    tokenize
        Options of the tokenizer that say what the matrix has to hold.
    max_epochs, max_steps, accelerator, devices, batch_size, early_stopping, early_stopping_patience, seed, \
    log_every_n_steps, trainer_kwargs
        See :meth:`FoundationModel.train`.
    """
    backbone = model.backbone
    train, validation, test = split
    if early_stopping and not len(validation):
        msg = "early stopping watches the loss of held-out cells, but there are none; use train_size < 1"
        raise ValueError(msg)
    if max_epochs is None:
        max_epochs = -1 if max_steps is not None else get_max_epochs_heuristic(model.adata.n_obs, _MOST_EPOCHS)
    accelerator, devices, device = parse_device_args(accelerator=accelerator, devices=devices, return_device="torch")
    callbacks = [*trainer_kwargs.pop("callbacks", []), StepLoss(log_every_n_steps)]
    if early_stopping:
        callbacks.append(
            EarlyStopping(f"validation_{monitor}", patience=early_stopping_patience, check_on_train_epoch_end=False)
        )
    if keep_best and len(validation):
        callbacks.append(KeepBest(f"validation_{monitor}"))
    trainer = Trainer(
        **{"check_val_every_n_epoch": 1, "benchmark": False, "logger": History()} | trainer_kwargs,
        max_epochs=max_epochs,
        max_steps=-1 if max_steps is None else max_steps,
        accelerator=accelerator,
        devices=devices,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
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
        for part in batches.values():
            part.plan = plan
        start = _logging.info(f"training {backbone!r} on {len(train):,} cells")
        trainer.fit(plan, batches["training"], batches["validation"] if len(validation) else None)
        _logging.info("    finished", time=start)
    changed(backbone)
    model.train_indices, model.validation_indices, model.test_indices = train, validation, test
    recorded = getattr(trainer.logger, "history", None) if trainer.is_global_zero else None
    model.history_ = joined(model.history_, recorded or {})
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
