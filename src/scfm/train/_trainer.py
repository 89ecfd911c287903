"""Lightning, set up for runs that keep their own books."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._optional import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy


# how Lightning may be told that a run is to be computed in one of them
_PRECISIONS = {
    "32-true": ("32-true", "32", 32, None),
    "bf16-mixed": ("bf16-mixed", "bf16"),
    "16-mixed": ("16-mixed", "16", 16),
}


def choose_precision(precision: str | int | None) -> str:
    """Name of a precision in which training works: weights always are float32.

    Raises
    ------
    ValueError
        If it is another one.
    """
    for name, aliases in _PRECISIONS.items():
        if precision in aliases:
            return name
    msg = f"precision must be one of {', '.join(_PRECISIONS)} (weights stay float32 in training); got {precision!r}"
    raise ValueError(msg)


# how strategies start their processes
_START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


def make_trainer(
    *,
    accelerator: str,
    devices: int | str | list[int],
    strategy: str | Strategy,
    num_nodes: int,
    precision: str,
    accumulate: int,
) -> Trainer:
    """Make a trainer that neither saves, logs, shows nor stops anything by itself."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=choose_strategy(strategy, accelerator=accelerator, devices=devices, num_nodes=num_nodes),
        num_nodes=num_nodes,
        precision=choose_precision(precision),
        accumulate_grad_batches=accumulate,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def choose_strategy(
    strategy: str | Strategy, *, accelerator: str, devices: int | str | list[int], num_nodes: int = 1
) -> str | Strategy:
    """Lightning's strategy for a name, set up for networks whose losses do not need all parameters.

    ``"auto"`` is DDP wherever there are several devices.
    """
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    if strategy == "auto":
        chosen = _AcceleratorConnector(accelerator=accelerator, devices=devices, num_nodes=num_nodes).strategy
        # strategies for TPUs are classes below this one
        if type(chosen) is DDPStrategy:
            # the way in which processes start is another in notebooks
            return DDPStrategy(find_unused_parameters=True, start_method=chosen._start_method)
    if isinstance(strategy, str) and strategy in _START_METHODS:
        # objectives leave parameters out, such as those of a decoder that is switched on later
        return DDPStrategy(find_unused_parameters=True, start_method=_START_METHODS[strategy])
    if strategy == "fsdp":
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    return strategy


def make_loggers(names: Sequence[str], folder: Path | None) -> list[Logger]:
    """Loggers beside ``history.csv``.

    Raises
    ------
    ValueError
        If a name is unknown, or there is no folder.
    """
    if unknown := sorted(set(names) - {"csv", "tensorboard"}):
        msg = f"unknown loggers {', '.join(unknown)}; there are csv and tensorboard"
        raise ValueError(msg)
    if "tensorboard" not in names:
        return []
    if folder is None:
        msg = "tensorboard files need a folder: give out="
        raise ValueError(msg)
    require("tensorboard", purpose="loggers=['tensorboard']")
    from lightning.pytorch.loggers import TensorBoardLogger

    return [TensorBoardLogger(folder / "training", name="tensorboard", version="")]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide what Lightning says about devices, workers and lengths; none of it is news here."""
    import lightning.pytorch  # noqa: F401  its import sets the level

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        logger.setLevel(level)
