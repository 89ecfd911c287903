"""Fine-tuning of a model for a task as a Lightning module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._plan import TrainingPlan

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ..backbones import TokenBatch
    from ..genes import GeneMatch
    from ..tasks.learner import Learner
    from ._plan import Stage
    from ._presets import Optimization


class TaskPlan(TrainingPlan):
    """Trains the parameters of a learner that require gradients.

    Parameters
    ----------
    learner
        A model with what a task puts on top of it.
    optimization
        Optimiser, clipping and schedule.
    genes
        What the columns of counts are.
    run
        Where and how the run proceeds, see :class:`TrainingPlan`.
    """

    def __init__(self, learner: Learner, optimization: Optimization, *, genes: GeneMatch, **run: Any) -> None:
        super().__init__(learner.backbone, learner, optimization, **run)
        self.genes = genes

    def make_tokens(self, counts: csr_matrix, generator: torch.Generator, stage: Stage) -> TokenBatch:
        """Tokens as the task expects them."""
        return self.module.tokens(counts, self.genes, generator)

    def compute_loss(self, tokens: TokenBatch, generator: torch.Generator, *, stage: Stage, step: int | None) -> Any:
        """The loss of the task."""
        return self.module.loss(tokens, generator)

    def on_validation_epoch_start(self) -> None:
        """Let the learner count the held-out cells anew."""
        self.module.start_validation()

    def on_validation_epoch_end(self) -> None:
        """Log scores of all held-out cells, of which every process sees all."""
        scores = {f"validation_{name}": value for name, value in self.module.validation_scores().items()}
        self.log_dict(scores, on_step=False, on_epoch=True, sync_dist=True)
