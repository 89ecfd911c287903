"""Pre-training with the objectives of the papers, from a laptop to many devices."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import _logging as logg
from .._errors import UnsupportedError
from .._settings import settings
from ..checkpoints._files import write_text
from ._cells import Cells
from ._order import Order
from ._outcome import export, finished, new_backbone
from ._random import seed_for
from ._recipe import Recipe
from ._state import RunState, read_counters, read_tensors
from ._trainer import make_loggers, make_trainer, quiet_lightning

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from ..backbones import Backbone
    from ._keeper import RunKeeper
    from ._plan import MicroBatch, PretrainingPlan

_BLOCK_ON_DISK = 128
_CELLS_AT_ONCE = 1024
# how a run is computed, not what: these fields may change when it goes on
_MAY_CHANGE = {
    *("name", "sources", "max_steps", "max_epochs", "accumulate", "log_every", "validate_every", "save_every"),
    *("precision", "gradient_checkpointing", "readers"),
}
STATE = "training/state"
HISTORY = "history.csv"


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of :func:`pretrain`.

    Parameters
    ----------
    backbone
        The trained model, ready for inference.
    history
        Losses indexed by step: ``loss`` of training and its parts (means over the steps since the last row), and
        ``validation_loss`` of held-out cells.
    n_cells, n_validation
        Cells trained on, and cells held out.
    """

    backbone: Backbone
    history: pd.DataFrame
    n_cells: int
    n_validation: int


def pretrain(
    recipe: Recipe | str | Path,
    *,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    resume: Literal["auto"] | bool = "auto",
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    strategy: str | Strategy = "auto",
    num_nodes: int = 1,
    precision: str | None = None,
    accumulate: int | None = None,
    gradient_checkpointing: bool | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    validate_every: int | None = None,
    save_every: int | None = None,
    loggers: Sequence[str] = ("csv",),
    progress: bool | None = None,
) -> TrainingResult:
    """Train a backbone with the objective of its paper, from scratch or from a checkpoint.

    A run depends on its recipe and on the number of micro-batches in an optimiser step (processes times ``accumulate``),
    but neither on how these are shared among processes nor on interruptions.

    Parameters
    ----------
    recipe
        What to train, on what, and how; also as a YAML file.
    checkpoint
        Go on with the training of this model (a name or path that :func:`scfm.load` takes) with its genes and config,
        instead of starting with fresh weights.
    out
        Folder for the trained model, the loss curve ``history.csv``, the recipe, and in ``training`` the state of the
        unfinished run. Needed for several processes.
    resume
        ``"auto"`` goes on with an unfinished run in ``out`` if there is one; ``True`` insists on it; ``False`` starts
        anew.
    accelerator, devices, num_nodes
        As in :class:`lightning.pytorch.Trainer`.
    strategy
        ``"auto"``, ``"ddp"`` (each process has the whole model), ``"fsdp"`` (parameters and optimiser are spread over
        the devices of a node) or a strategy of Lightning.
    precision, accumulate, gradient_checkpointing, max_steps, max_epochs, validate_every, save_every
        Instead of those of the recipe.
    loggers
        ``"csv"`` writes ``history.csv``; ``"tensorboard"`` also event files in ``training``.
    progress
        Whether to show a bar; by default if ``settings.verbosity`` is at least 2.

    Returns
    -------
    The trained backbone and its loss curve.

    Raises
    ------
    FileNotFoundError
        If ``resume=True`` and there is no unfinished run in ``out``.
    ValueError
        If the run in ``out`` is another one, the data are no counts, there are too few cells, or none of them has
        enough expressed genes.
    UnsupportedError
        If the network needs the batch of each cell.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe = recipe.changed(
        checkpoint=None if checkpoint is None else str(checkpoint),
        precision=precision,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        max_steps=max_steps,
        max_epochs=max_epochs,
        validate_every=validate_every,
        save_every=save_every,
    )
    out = None if out is None else Path(out).expanduser()
    boards = make_loggers(loggers, out)
    with quiet_lightning():
        trainer = make_trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            num_nodes=num_nodes,
            precision=recipe.precision,
            accumulate=recipe.accumulate,
        )
        run = _Run.prepare(recipe, trainer, out, resume)
        plan = run.plan()
        keeper = run.keeper(plan, boards, settings.verbosity >= 2 if progress is None else progress)
        return run.train(trainer, plan, keeper)


@dataclass
class _Run:
    """Everything that has to exist before the first step."""

    recipe: Recipe
    out: Path | None
    backbone: Backbone
    cells: Cells
    order: Order
    held_out: np.ndarray
    total_steps: int
    state: RunState

    @classmethod
    def prepare(cls, recipe: Recipe, trainer: Trainer, out: Path | None, resume: Literal["auto"] | bool) -> _Run:
        if trainer.world_size > 1 and out is None:
            msg = "a run of several processes needs a folder: give out="
            raise ValueError(msg)
        if resume is True and out is None:
            msg = "an unfinished run is looked for in a folder: give out= with resume=True"
            raise ValueError(msg)
        backbone = new_backbone(recipe)
        _check_objective(recipe, backbone)
        cells = Cells(recipe.sources, backbone.vocab, recipe.layer, recipe.in_memory)
        training, held_out = _divided(cells.n_cells, recipe)
        _check_usable(recipe, cells, training)
        order = _order(recipe, cells, training, trainer.world_size * recipe.accumulate)
        total_steps = recipe.max_steps or (recipe.max_epochs or 0) * order.steps_per_epoch
        if total_steps < 1:
            msg = "how long to train? give max_steps or max_epochs"
            raise ValueError(msg)
        identity = _identity(recipe, backbone, cells, order)
        state = _earlier(out, resume, identity) or RunState(run=identity)
        return cls(recipe, out, backbone, cells, order, held_out, total_steps, state)

    def plan(self) -> PretrainingPlan:
        from ._plan import PretrainingPlan

        recipe, optimization = self.recipe, self.recipe.optimization_for(self.backbone.kind)
        if optimization.unit == "step" and optimization.warmup_steps >= self.total_steps:
            logg.warning(
                f"the warm-up takes {optimization.warmup_steps:,} steps and the run {self.total_steps:,}, so the learning "
                f"rate never reaches {optimization.learning_rate:g}; see optimization: {{warmup_steps: ...}} of the recipe"
            )
        return PretrainingPlan(
            self.backbone,
            optimization,
            genes=self.cells.genes,
            objective=recipe.objective,
            objective_from=self._objective_from(),
            seed=recipe.seed,
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            per_step=self.order.lanes,
            first_step=self.state.step,
        )

    def _objective_from(self) -> dict[int, dict[str, Any]]:
        """Options of the objective by the first step they are for."""
        recipe = self.recipe
        if recipe.objective or recipe.objective_from or recipe.checkpoint is not None:
            return recipe.objective_from
        return dict(self.backbone.objective_schedule)

    def keeper(self, plan: PretrainingPlan, loggers: Sequence[Any], progress: bool) -> RunKeeper:
        from ._keeper import RunKeeper
        from ._stream import Stream

        recipe = self.recipe
        stream = Stream(
            self.cells,
            self.order,
            first_step=self.state.step,
            tokenize=plan.tokens,
            min_genes=recipe.min_genes,
            readers=0 if self.cells.is_in_memory else recipe.readers,
        )
        return RunKeeper(
            self.state,
            stream,
            self.total_steps,
            validation=self._validation(plan),
            log_every=recipe.log_every,
            validate_every=recipe.validate_every,
            save_every=recipe.save_every,
            state_folder=None if self.out is None else self.out / STATE,
            history_file=None if self.out is None else self.out / HISTORY,
            loggers=loggers,
            progress=progress,
            label=recipe.name,
        )

    def train(self, trainer: Trainer, plan: PretrainingPlan, keeper: RunKeeper) -> TrainingResult:
        from ._recompute import recomputed_layers

        recipe, out, order = self.recipe, self.out, self.order
        writes = out is not None and trainer.is_global_zero
        if writes:
            out.mkdir(parents=True, exist_ok=True)
            recipe.write(out / "recipe.yaml")
        start = logg.info(
            f"training {recipe.name}: {len(order.cells):,} cells, {self.cells.n_genes:,} genes, steps "
            f"{self.state.step:,} to {self.total_steps:,} of {order.lanes} x {recipe.batch_size} cells"
        )
        if self.state.step < self.total_steps:
            trainer.callbacks.append(keeper)
            with (
                recomputed_layers(self.backbone, wanted=recipe.gradient_checkpointing),
                closing(keeper.stream) as stream,
            ):
                trainer.fit(plan, train_dataloaders=stream)
            _raise_if_interrupted(trainer)
        else:
            read_tensors(out / STATE, self.backbone.module)
        backbone = finished(self.backbone, None if out is None else out / STATE)
        if trainer.world_size == 1:
            backbone.to(str(trainer.strategy.root_device), "float32")
        history = keeper.history()
        if writes:
            export(backbone, out)
            write_text(out / HISTORY, history.to_csv())
        trainer.strategy.barrier()
        logg.info("    finished", time=start)
        return TrainingResult(backbone, history, len(order.cells), len(self.held_out))

    def _validation(self, plan: PretrainingPlan) -> list[MicroBatch]:
        """A random part of the held-out cells, in micro-batches of tokens."""
        from ._plan import MicroBatch

        recipe = self.recipe
        counts = self.cells.read(np.sort(self.held_out[: recipe.validation_cells]))
        counts = counts[self.cells.known_genes(counts) >= recipe.min_genes]
        starts = range(0, counts.shape[0], recipe.batch_size)
        parts = [MicroBatch(i, counts[start : start + recipe.batch_size]) for i, start in enumerate(starts)]
        return [MicroBatch(part.number, plan.tokens(part, "validation")) for part in parts]


def _check_objective(recipe: Recipe, backbone: Backbone) -> None:
    """Raise unless the objective can be computed from counts, with the options of the recipe."""
    for options in (recipe.objective, *recipe.objective_from.values()):
        backbone.check_objective(options)
    if backbone.needs_batch_labels:
        msg = (
            f"this {backbone.kind} network sees the batch of each cell, which a recipe has no place for; pre-train it "
            f"without batches, or train it as one of scfm.models on data with a batch_key"
        )
        raise UnsupportedError(msg)


def _check_usable(recipe: Recipe, cells: Cells, training: np.ndarray) -> None:
    """Raise if no cell would be trained on; normally the first block that is read holds one."""
    for start in range(0, len(training), _CELLS_AT_ONCE):
        counts = cells.read(training[start : start + _CELLS_AT_ONCE])
        if (cells.known_genes(counts) >= recipe.min_genes).any():
            return
    msg = (
        f"none of the {len(training):,} cells to train on has {recipe.min_genes:,} expressed genes of the vocabulary; lower "
        "min_genes, or check the names of the genes"
    )
    raise ValueError(msg)


def _divided(n_cells: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Cells to train on, increasing, and held-out cells in random order."""
    order = np.random.default_rng(seed_for(recipe.seed, "split")).permutation(n_cells)
    n_held_out = round(recipe.validation_share * n_cells)
    return np.sort(order[n_held_out:]), order[:n_held_out]


def _order(recipe: Recipe, cells: Cells, training: np.ndarray, lanes: int) -> Order:
    return Order(
        training,
        lanes,
        recipe.batch_size,
        tokens_per_batch=recipe.tokens_per_batch,
        lengths=None if recipe.tokens_per_batch is None else cells.lengths()[training],
        block_size=recipe.block_size or (1 if cells.is_in_memory else _BLOCK_ON_DISK),
        buffer_cells=recipe.buffer_cells,
        seed=recipe.seed,
    )


def _identity(recipe: Recipe, backbone: Backbone, cells: Cells, order: Order) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values."""
    values = {name: value for name, value in asdict(recipe).items() if name not in _MAY_CHANGE}
    values |= {
        "optimization": asdict(recipe.optimization_for(backbone.kind)),
        "config": backbone.config_to_dict(),
        "genes": sha256("\n".join(backbone.vocab.names).encode()).hexdigest(),
        "annotations": recipe.annotations and sha256(Path(recipe.annotations).read_bytes()).hexdigest(),
        "block_size": order.block_size,
        "cells": cells.n_cells,
        "micro-batches per step": order.lanes,
    }
    return json.loads(json.dumps(values))


def _earlier(out: Path | None, resume: Literal["auto"] | bool, identity: dict[str, Any]) -> RunState | None:
    """The unfinished run to go on with, if there is one and it is wanted."""
    state = None if out is None or resume is False else read_counters(out / STATE)
    if state is None:
        if resume is True:
            msg = f"there is no unfinished run in {out}; start one with resume='auto'"
            raise FileNotFoundError(msg)
        return None
    if differing := sorted(name for name in identity | state.run if identity.get(name) != state.run.get(name)):
        msg = (
            f"the unfinished run in {out} differs in {', '.join(differing)}; choose another folder, or start anew with "
            "resume=False"
        )
        raise ValueError(msg)
    logg.info(f"going on with the run in {out} after step {state.step:,}")
    return state


def _raise_if_interrupted(trainer: Trainer) -> None:
    """Lightning swallows Ctrl-C; an unfinished model must not pass for a finished one."""
    if trainer.interrupted:
        raise KeyboardInterrupt
