"""Training of any backbone as a Lightning module: what all training has in common, and pre-training."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule

from ..backbones import TokenBatch
from ._freeze import set_training_mode
from ._presets import OPTIMIZATIONS, Optimization, build_optimizer, build_schedule, clip_gradients
from ._random import generator_for, seed_for, seeded
from ._sharding import average_gradients, shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from scipy.sparse import csr_matrix
    from torch import Tensor, nn

    from ..backbones import Backbone
    from ..genes import GeneMatch

Stage = Literal["training", "validation"]

# no training run has so many micro-batches, so the masks of held-out cells are drawn from seeds of their own
_VALIDATION = 1 << 62


@dataclass(frozen=True)
class MicroBatch:
    """Cells of one forward pass.

    Parameters
    ----------
    number
        Its place in the run, counted over all processes and epochs; decides everything that is random about it.
    cells
        Raw counts, one column for each entry of ``PretrainingPlan.genes``, or tokens made of them.
    """

    number: int
    cells: csr_matrix | TokenBatch

    def __len__(self) -> int:
        return len(self.cells) if isinstance(self.cells, TokenBatch) else self.cells.shape[0]


class TrainingPlan(LightningModule):
    """Trains the parameters of a network that require gradients.

    Masks, dropout and whatever else is random in a micro-batch depend on ``seed`` and its number alone. A run can
    therefore go on after a stop as if nothing had happened, and ``n`` processes that accumulate ``a`` micro-batches each
    do what one process does that accumulates ``n * a`` of them.

    A class for a purpose says how tokens are made (:meth:`make_tokens`) and what is minimised (:meth:`compute_loss`).

    Parameters
    ----------
    backbone
        The model. It is trained in place.
    module
        What is trained: the network of the model, or one that has it as a part.
    optimization
        Optimiser, clipping and schedule; by default those of ``OPTIMIZATIONS`` for this kind of backbone.
    seed
        Seed of everything random.
    total_steps, steps_per_epoch
        Optimiser steps of the run and of an epoch, for schedules that need them.
    per_step
        Micro-batches of all processes in one optimiser step.
    first_step
        Finished optimiser steps, if a run goes on.

    Attributes
    ----------
    module
        The network.
    """

    def __init__(
        self,
        backbone: Backbone,
        module: nn.Module,
        optimization: Optimization | None = None,
        *,
        seed: int = 0,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        per_step: int = 1,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.module = module
        self.optimization = optimization or default_optimization(backbone.kind)
        self.seed = seed
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.per_step = per_step
        self.first_step = first_step
        self._redraw_every = self.optimization.redraw_steps(backbone.config, per_step)
        self._unsharded: list[nn.Parameter] = []
        self._period = self._period_of(max(0, first_step - 1))

    # -- what a class for a purpose implements -----------------------------------------------------------------------

    @abstractmethod
    def make_tokens(self, counts: csr_matrix, generator: torch.Generator, stage: Stage) -> TokenBatch:
        """Tokens of raw counts."""

    @abstractmethod
    def compute_loss(self, tokens: TokenBatch, generator: torch.Generator, *, stage: Stage, step: int | None) -> Any:
        """Loss of a micro-batch, an object whose ``total`` is minimised; ``step`` is ``None`` in validation."""

    # -- the loss ----------------------------------------------------------------------------------------------------

    def tokens(self, batch: MicroBatch, stage: Stage = "training") -> TokenBatch:
        """Tokens of a micro-batch; those it has, or new ones from its counts."""
        if isinstance(batch.cells, TokenBatch):
            return batch.cells
        return self.make_tokens(batch.cells, generator_for(self.seed, "tokens", _place(batch, stage)), stage)

    def loss(self, batch: MicroBatch, stage: Stage = "training") -> Any:
        """What the objective returns for a micro-batch; ``.total`` is what to minimise.

        The masks of validation are the same each time, and others than those of training.
        """
        place = _place(batch, stage)
        generator = generator_for(self.seed, "objective", place)
        step = self.step_of(batch) if stage == "training" else None
        with seeded(seed_for(self.seed, "dropout", place), self.backbone.device):
            return self.compute_loss(self.tokens(batch, stage), generator, stage=stage, step=step)

    def training_step(self, batch: MicroBatch, batch_idx: int = 0) -> dict[str, Any]:
        """Loss of a micro-batch, and in ``parts`` the same and what it consists of by name, for the record.

        A micro-batch without cells has the loss 0 for all parameters, and no parts.
        """
        self._redraw_features(self.step_of(batch))
        if not len(batch):
            return {"loss": sum(p.sum() * 0.0 for p in self.parameters() if p.requires_grad), "parts": {}}
        loss = self.loss(batch)
        parts = loss_parts(loss)
        self._log(parts, len(batch))
        return {"loss": loss.total, "parts": parts}

    def validation_step(self, batch: MicroBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Loss of held-out cells and its parts, with masks that are the same each time."""
        return loss_parts(self.loss(batch, "validation"))

    def on_validation_batch_end(
        self, outputs: dict[str, Tensor], batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log what :meth:`validation_step` returned, where Lightning runs the validation."""
        self._log({f"validation_{name}": value for name, value in outputs.items()}, len(batch))

    def step_of(self, batch: MicroBatch) -> int:
        """Optimiser step that a micro-batch of training belongs to, counted from 0."""
        return batch.number // self.per_step

    def _log(self, values: dict[str, Tensor], n_cells: int) -> None:
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=n_cells)

    # -- random features ---------------------------------------------------------------------------------------------

    def _period_of(self, step: int) -> int:
        return 0 if self._redraw_every is None else step // self._redraw_every

    def _redraw_features(self, step: int) -> None:
        """New random features of Performers when it is time, the same in all processes."""
        stacks = [part for part in self.module.modules() if hasattr(part, "redraw_projections")]
        for stack in stacks:
            stack.calls_since_redraw.zero_()  # counts calls of one process, so it must never cause a redraw
        period = self._period_of(step)
        if period != self._period:
            self._period = period
            generator = generator_for(self.seed, "features", period)
            for stack in stacks:
                if not getattr(stack, "fixed_features", False):
                    stack.redraw_projections(generator)

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Distribute the parameters where the strategy asks for it."""
        if self.device_mesh is not None:
            self._unsharded = shard(self, self.device_mesh)

    def on_fit_start(self) -> None:
        """Turn dropout on, except in frozen parts."""
        set_training_mode(self.module)

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimiser and schedule."""
        optimizer = build_optimizer(self.module.named_parameters(), self.optimization)
        schedule = build_schedule(
            optimizer,
            self.optimization,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            first_step=self.first_step,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip as the optimisation says; options of the trainer do not count."""
        average_gradients(self._unsharded)
        clip_gradients(self, self.optimization)

    def transfer_batch_to_device(self, batch: MicroBatch, device: torch.device, dataloader_idx: int) -> MicroBatch:
        """Leave the batch where it is: objectives draw masks on the CPU and move what the network needs."""
        return batch


class PretrainingPlan(TrainingPlan):
    """Trains the parameters of a backbone that require gradients with the objective of its paper.

    Parameters
    ----------
    backbone
        The model. It is trained in place.
    optimization
        Optimiser, clipping and schedule; by default those of ``OPTIMIZATIONS`` for this kind of backbone.
    genes
        What the columns of counts are, see :meth:`scfm.Backbone.tokenize`; not needed for batches of tokens.
    objective
        Options of the backbone's objective.
    objective_from
        Options that change on the way, by the first step they are for, counted from 0. Held-out cells are judged by
        the last ones.
    run
        Where and how the run proceeds, see :class:`TrainingPlan`.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimization: Optimization | None = None,
        *,
        genes: GeneMatch | np.ndarray | None = None,
        objective: Mapping[str, Any] | None = None,
        objective_from: Mapping[int, Mapping[str, Any]] | None = None,
        **run: Any,
    ) -> None:
        super().__init__(backbone, backbone.module, optimization, **run)
        self.genes = genes
        self.objective = dict(objective or {})
        self.objective_from = dict(sorted((objective_from or {}).items()))
        for options in (self.objective, *self.objective_from.values()):
            backbone.check_objective(options)

    def make_tokens(self, counts: csr_matrix, generator: torch.Generator, stage: Stage) -> TokenBatch:
        """Tokens as the objective expects them."""
        return self.backbone.tokenize_for_training(counts, self.genes, generator)

    def compute_loss(self, tokens: TokenBatch, generator: torch.Generator, *, stage: Stage, step: int | None) -> Any:
        """The backbone's objective."""
        options = dict(self.objective)
        for first, changed in self.objective_from.items():
            if step is None or step >= first:
                options |= changed
        return self.backbone.pretraining_loss(tokens, generator, **options)


def default_optimization(kind: str) -> Optimization:
    """What the authors of a model use, or defaults that suit most networks."""
    return OPTIMIZATIONS.get(kind, Optimization())


def loss_parts(loss: Any) -> dict[str, Tensor]:
    """Scalars of a loss by name, detached: ``loss``, the total, and the other tensors it consists of."""
    parts = {"loss": loss.total.detach()}
    if is_dataclass(loss):
        values = {field.name: getattr(loss, field.name) for field in fields(loss) if field.name != "total"}
        parts |= {
            name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor) and not value.ndim
        }
    return parts


def _place(batch: MicroBatch, stage: Stage) -> int:
    return batch.number + (_VALIDATION if stage == "validation" else 0)
