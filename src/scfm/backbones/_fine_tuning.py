"""How a paper fine-tunes its model for a task, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

ClassWeights = Literal["balanced", "capped"]


@dataclass(frozen=True)
class FineTuning:
    """What a model needs to be told to be fine-tuned as its authors do it.

    Parameters
    ----------
    tokenize
        Options of the model's tokenizer.
    optimization
        Fields of :class:`scfm.train.Optimization`, such as ``{"preset": "cellfm-tutorials"}``.
    batch_size
        Cells in a forward pass.
    mixed_optimization
        Fields of it that differ in mixed precision.
    accumulate
        Forward passes in an optimiser step.
    max_epochs
        Passes over the cells.
    train_only
        Regular expressions for the names of the parameters that are trained; all if there are none.
    class_weights
        Weights of classes in the loss, see :func:`scfm.tasks.classifier.class_weights`.
    min_cells
        Classes with fewer cells to train on are left out.
    keep
        Which weights count after training: those of the epoch that is best on held-out cells, or the last.
    monitor
        What about held-out cells decides that, and when training stops early: a part of their loss, of which ``"loss"``
        is the total; or ``"macro F1"``, the higher the better.
    objective
        Options of the loss.
    n_top_genes
        Highly variable genes that the cells are restricted to; all genes if ``None``.
    by_batch
        Whether the cells of a mini-batch come from one batch of the data.
    """

    tokenize: Mapping[str, Any] = field(default_factory=dict)
    optimization: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": "adamw", "learning_rate": 1e-4})
    mixed_optimization: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    accumulate: int = 1
    max_epochs: int = 10
    train_only: tuple[str, ...] = ()
    class_weights: ClassWeights | None = None
    min_cells: int = 1
    keep: Literal["best", "last"] = "best"
    monitor: str = "loss"
    objective: Mapping[str, Any] = field(default_factory=dict)
    n_top_genes: int | None = None
    by_batch: bool = False


@dataclass(frozen=True)
class ZeroShot:
    """How the authors of a model embed cells for a task without training it.

    Parameters
    ----------
    pooling
        How token states become one vector per cell; the default of the model if ``None``.
    tokenize
        Options of the model's tokenizer.
    """

    pooling: str | None = None
    tokenize: Mapping[str, Any] = field(default_factory=dict)
