"""Training of a model class: the objective of the paper on the cells of an AnnData object."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
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
from ..train._plan import PretrainingPlan, default_optimization
from ..train._presets import Optimization, preset
from ._batches import CellBatches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..backbones import Backbone
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


def fit(
    model: FoundationModel,
    *,
    max_epochs: int | None,
    max_steps: int | None,
    accelerator: str,
    devices: int | list[int] | str,
    batch_size: int,
    train_size: float,
    validation_size: float | None,
    early_stopping: bool,
    early_stopping_patience: int,
    optimization: Optimization,
    objective: Mapping[str, Any] | None,
    freeze: Freeze | None,
    seed: int,
    log_every_n_steps: int,
    **trainer_kwargs: Any,
) -> None:
    """Train a model in place; see :meth:`FoundationModel.train`."""
    backbone = model.backbone
    train, validation, test = split_cells(model.adata.n_obs, train_size, validation_size, seed)
    if early_stopping and not len(validation):
        msg = "early stopping watches the loss of held-out cells, but there are none; use train_size < 1"
        raise ValueError(msg)
    if max_epochs is None:
        max_epochs = -1 if max_steps is not None else get_max_epochs_heuristic(model.adata.n_obs, _MOST_EPOCHS)
    accelerator, devices, device = parse_device_args(accelerator=accelerator, devices=devices, return_device="torch")
    callbacks = [*trainer_kwargs.pop("callbacks", []), StepLoss(log_every_n_steps)]
    if early_stopping:
        callbacks.append(
            EarlyStopping("validation_loss", patience=early_stopping_patience, check_on_train_epoch_end=False)
        )
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
    with trainable(backbone, freeze), model._cells(model.adata) as task:
        per_step = trainer.world_size * trainer.accumulate_grad_batches
        n_steps = -(-len(train) // (batch_size * per_step))
        if max_epochs == -1:
            trainer.fit_loop.max_epochs = max_epochs = -(-max_steps // n_steps)
        plan = PretrainingPlan(
            backbone,
            optimization,
            genes=task.match,
            objective=objective,
            seed=seed,
            total_steps=n_steps * max_epochs if max_steps is None else max_steps,
            steps_per_epoch=n_steps,
            per_step=per_step,
        )
        check = InputCheck(backbone, task.source, task.match, {})
        labels = {"batch": task.options["batch_labels"]} if "batch_labels" in task.options else {}
        batches = {
            stage: CellBatches(task.source, rows, batch_size, plan, stage, check=check, labels=labels)
            for stage, rows in (("training", train), ("validation", validation))
        }
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
