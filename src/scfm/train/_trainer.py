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
        strategy=_strategy(strategy),
        num_nodes=num_nodes,
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def _strategy(strategy: str | Strategy) -> str | Strategy:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if strategy == "ddp":
        # objectives leave parameters out, such as those of a decoder that is switched on later
        return DDPStrategy(find_unused_parameters=True)
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
