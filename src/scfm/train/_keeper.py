"""Keeps the books of a run: loss curve, losses of held-out cells, saved states, progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from lightning.pytorch import Callback
from tqdm.auto import tqdm

from ..checkpoints._files import write_text
from ._freeze import set_training_mode
from ._state import read_tensors, write_state

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger

    from ._plan import MicroBatch, PretrainingPlan
    from ._state import RunState
    from ._stream import Stream


@dataclass
class RunKeeper(Callback):
    """Runs beside the training loop; what it keeps does not depend on where an earlier process stopped.

    Parameters
    ----------
    state
        Where the run stands; kept up to date.
    stream
        Source of micro-batches, told which process it works for.
    total_steps
        Step at which training stops.
    validation
        Micro-batches of held-out cells.
    log_every, validate_every, save_every
        Steps between rows, rows with the loss of held-out cells, and saved states.
    state_folder, history_file
        Where to save; ``None`` for nowhere.
    loggers
        What else gets the rows.
    progress
        Whether to show a bar.
    label
        Text of the bar.
    """

    state: RunState
    stream: Stream
    total_steps: int
    validation: Sequence[MicroBatch] = ()
    log_every: int = 100
    validate_every: int = 100
    save_every: int = 1000
    state_folder: Path | None = None
    history_file: Path | None = None
    loggers: Sequence[Logger] = ()
    progress: bool = False
    label: str = ""
    _sums: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _bar: Any = field(default=None, init=False)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, plan: PretrainingPlan) -> None:
        """Choose the micro-batches of this process."""
        self.stream.rank, self.stream.world_size = trainer.global_rank, trainer.world_size

    def on_train_start(self, trainer: Trainer, plan: PretrainingPlan) -> None:
        """Restore the weights and the optimiser, or note the loss before the first step."""
        self._sums = {
            name: torch.tensor(value / trainer.world_size, dtype=torch.float64, device=_sum_device(plan))
            for name, value in self.state.sums.items()
        }
        if self.state.step:
            read_tensors(self.state_folder, plan.module, trainer.optimizers[0])
            trainer.precision_plugin.load_state_dict(self.state.precision)
        elif self.validation:
            self._add_row(trainer, plan)
        shown = self.progress and trainer.is_global_zero
        self._bar = tqdm(
            total=self.total_steps, initial=self.state.step, desc=self.label, unit="step", disable=not shown
        )

    def on_train_batch_end(
        self, trainer: Trainer, plan: PretrainingPlan, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Add up losses; at the end of a step write what is due."""
        if outputs["parts"]:
            for name, value in {**outputs["parts"], "": torch.ones(())}.items():
                value = value.detach().to(_sum_device(plan), torch.float64)
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.state.step += 1
        self._bar.update()
        step, last = self.state.step, self.state.step >= self.total_steps
        if last or step % self.log_every == 0 or step % self.validate_every == 0:
            self._add_row(trainer, plan)
        if last or step % self.save_every == 0:
            self._save(trainer, plan)
        trainer.should_stop = last

    def on_train_end(self, trainer: Trainer, plan: PretrainingPlan) -> None:
        """Close the bar."""
        self._bar.close()

    # -- rows --------------------------------------------------------------------------------------------------------

    def history(self) -> pd.DataFrame:
        """Loss curve, indexed by step."""
        table = pd.DataFrame(self.state.history, dtype=float)
        first = ["step", "loss", "validation_loss"]
        table = table.reindex(columns=[*first, *(name for name in table if name not in first)])
        return table.astype({"step": int}).set_index("step")

    def _add_row(self, trainer: Trainer, plan: PretrainingPlan) -> None:
        step = self.state.step
        sums = self._totals(trainer)
        self._sums = {}
        n_batches = sums.pop("", 0.0)
        row = {"step": step} | {name: value / n_batches for name, value in sums.items()}
        if self.validation and (step % self.validate_every == 0 or step >= self.total_steps):
            row["validation_loss"] = self._validate(trainer, plan)
        self.state.history.append(row)
        values = {name: value for name, value in row.items() if name != "step"}
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items() if name.endswith("loss")})
        if trainer.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics({**values, "learning_rate": _rate(trainer)}, step)

    def _totals(self, trainer: Trainer) -> dict[str, float]:
        """Sums of all processes since the last row."""
        names = trainer.strategy.broadcast(list(self._sums))
        if not names:
            return {}
        zero = torch.zeros((), dtype=torch.float64)
        sums = torch.stack([self._sums.get(name, zero).cpu() for name in names]).to(trainer.strategy.root_device)
        return dict(zip(names, _added(trainer, sums).tolist(), strict=True))

    @torch.no_grad()
    def _validate(self, trainer: Trainer, plan: PretrainingPlan) -> float:
        """Mean loss over the held-out cells, shared by the processes."""
        plan.module.eval()
        size, rank = trainer.world_size, trainer.global_rank
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(self.validation), size):
            mine = first + rank < len(self.validation)
            # all processes have to run equally often, because they may exchange parameters on the way
            batch = self.validation[first + rank if mine else 0]
            loss = trainer.strategy.validation_step(batch, 0)["loss"].double().cpu()
            sums += torch.stack([loss * len(batch), torch.tensor(float(len(batch)))]) * mine
        total, n_cells = _added(trainer, sums.to(trainer.strategy.root_device)).tolist()
        set_training_mode(plan.module)
        return total / n_cells if n_cells else math.nan

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, plan: PretrainingPlan) -> None:
        if self.state_folder is None:
            return
        self.state.sums = self._totals(trainer)
        self.state.precision = trainer.precision_plugin.state_dict()
        writes = trainer.is_global_zero
        write_state(self.state_folder, self.state, plan.module, trainer.optimizers[0], writes=writes)
        if writes:
            write_text(self.history_file, self.history().to_csv())
        trainer.strategy.barrier()


def _sum_device(plan: PretrainingPlan) -> torch.device:
    """Where float64 exists."""
    return torch.device("cpu") if plan.device.type == "mps" else plan.device


def _added(trainer: Trainer, sums: torch.Tensor) -> torch.Tensor:
    return trainer.strategy.reduce(sums, reduce_op="sum") if trainer.world_size > 1 else sums


def _rate(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])
