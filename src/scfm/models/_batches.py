"""Cells of an AnnData object, as micro-batches of a training run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

from ..data import Block
from ..engine._prefetch import prefetch
from ..train._plan import MicroBatch
from ..train._random import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..data import CellSource
    from ..train._plan import Stage, TrainingPlan


class CellBatches:
    """Cells in random order (training) or as they come (validation), tokenised ahead in a second thread.

    In training, several processes take turns with the batches, so that together they see what one process would see; in
    validation, each of them sees all cells. The order depends on the seed of the plan and the number of the epoch alone.

    Parameters
    ----------
    source
        All cells.
    rows
        Which of them.
    batch_size
        Cells of a micro-batch.
    stage
        What for.
    seed
        Seed of the order.
    check
        Called with every block that is read.
    labels
        What else the network needs for each cell, by name, one entry for each cell of the source.
    groups
        Group of each cell of the source, if the cells of a micro-batch are to come from one group.

    Attributes
    ----------
    plan
        The plan that is going to use them; has to be set before the first batch.
    """

    plan: TrainingPlan

    def __init__(
        self,
        source: CellSource,
        rows: np.ndarray,
        batch_size: int,
        stage: Stage,
        *,
        seed: int,
        check: Callable[[Block], None],
        labels: dict[str, np.ndarray] | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.source, self.rows, self.batch_size, self.stage = source, rows, batch_size, stage
        self.seed, self.check, self.labels = seed, check, labels or {}
        self.groups = np.zeros(len(rows), dtype=np.int64) if groups is None else groups[rows]
        self.n_batches = int(sum(-(-n // batch_size) for n in np.unique(self.groups, return_counts=True)[1]))
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.n_batches // self._world()[1])

    def __iter__(self) -> Iterator[MicroBatch]:
        with closing(prefetch(self._batches(self._divided(), self.epoch))) as ahead:
            self.epoch += 1
            yield from ahead

    def _divided(self) -> list[np.ndarray]:
        """Cells of each micro-batch, in random order in training."""
        rows, groups = self.rows, self.groups
        shuffled = self.stage == "training"
        generator = generator_for(self.seed, "order", self.epoch)
        if shuffled:
            order = torch.randperm(len(rows), generator=generator).numpy()
            rows, groups = rows[order], groups[order]
        rows = rows[np.argsort(groups, kind="stable")]
        ends = np.cumsum(np.unique(groups, return_counts=True)[1])
        parts = np.split(rows, ends[:-1]) if len(ends) else []
        out = [part[i : i + self.batch_size] for part in parts for i in range(0, len(part), self.batch_size)]
        if shuffled and len(parts) > 1:
            out = [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]
        return out

    def _batches(self, parts: list[np.ndarray], epoch: int) -> Iterator[MicroBatch]:
        rank, world = self._world()
        first = epoch * self.n_batches if self.stage == "training" else 0
        for place in range(rank, len(self) * world, world):
            # a process whose turn comes after the last cell still takes the step, with no cells
            some = parts[place] if place < len(parts) else self.rows[:0]
            batch = self._batch(first + place, some)
            if len(batch) or self.stage == "training":
                yield batch

    def _batch(self, number: int, rows: np.ndarray) -> MicroBatch:
        counts = self.source.select(rows).read(0, len(rows))
        self.check(Block(0, len(rows), counts))
        tokens = self.plan.tokens(MicroBatch(number, counts), self.stage)
        if self.labels:
            labels = {name: torch.as_tensor(values[rows]) for name, values in self.labels.items()}
            tokens = replace(tokens, per_cell={**tokens.per_cell, **labels})
        if tokens.valid is not None and not bool(tokens.valid.all()):
            tokens = tokens.select(np.flatnonzero(tokens.valid.numpy()))
        return MicroBatch(number, tokens)

    def _world(self) -> tuple[int, int]:
        """Number of this process, and how many take turns."""
        if self.stage == "training" and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
