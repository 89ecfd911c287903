"""Which cells share a micro-batch: pure arithmetic on cell numbers, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._optional import require
from ..engine import Limits, plan_batches
from ._random import seed_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """The order of an endless run, which does not depend on the number of processes.

    Each epoch shuffles blocks of neighbouring cells and deals them into ``lanes``, one for each micro-batch of an
    optimiser step. Within a lane, a buffer full of blocks is shuffled at a time and cut into micro-batches. Step ``k``
    takes the ``k``-th micro-batch of every lane. As processes take whole lanes, each reads its own cells only. What
    does not fill a micro-batch in all lanes is left out, other cells in each epoch.

    Parameters
    ----------
    cells
        Numbers of the cells to train on, increasing.
    lanes
        Micro-batches of all processes in one optimiser step.
    batch_size
        Most cells in a micro-batch.
    tokens_per_batch
        Most padded tokens in a micro-batch, which then holds cells of similar length. Without it all micro-batches
        have ``batch_size`` cells.
    lengths
        Estimated tokens of each of ``cells``, needed for ``tokens_per_batch``.
    block_size
        Neighbouring cells that stay together until they are in a buffer. Above 1, scdataset draws the order.
    buffer_cells
        Cells in the buffers of all lanes together.
    seed
        Seed of the order.

    Raises
    ------
    ValueError
        If there are fewer cells than one optimiser step takes.
    """

    cells: NDArray[np.int64]
    lanes: int
    batch_size: int
    tokens_per_batch: int | None = None
    lengths: NDArray[np.integer] | None = None
    block_size: int = 1
    buffer_cells: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.lanes, self.batch_size, self.block_size, self.buffer_cells) < 1:
            msg = "batch_size, block_size, buffer_cells and micro-batches per step must be at least 1"
            raise ValueError(msg)
        if len(self.cells) < self.lanes * self.batch_size:
            msg = (
                f"{len(self.cells):,} cells are fewer than one optimiser step takes ({self.lanes} micro-batches of "
                f"{self.batch_size}); lower batch_size or accumulate"
            )
            raise ValueError(msg)

    @property
    def cells_per_buffer(self) -> int:
        """Cells that a lane shuffles together, a multiple of ``batch_size``."""
        return max(1, self.buffer_cells // self.lanes // self.batch_size) * self.batch_size

    def epoch(self, number: int) -> Epoch:
        """The micro-batches of one epoch."""
        return Epoch(self, number, _shuffled(self, number))

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; for ``tokens_per_batch`` those of the first one."""
        if self.tokens_per_batch is None:
            return len(self.cells) // self.lanes // self.batch_size
        return self.epoch(0).steps

    def visits(self, lanes: Sequence[int], first_step: int = 0) -> Iterator[Visit]:
        """Micro-batches of some lanes from a step on, in the order of training."""
        before = 0
        for number in count():
            if self.tokens_per_batch is None and before + self.steps_per_epoch <= first_step:
                before += self.steps_per_epoch
                continue
            epoch = self.epoch(number)
            for step in range(max(0, first_step - before), epoch.steps):
                for lane in lanes:
                    buffer, place = epoch.find(lane, step)
                    rows = epoch.buffer(lane, buffer)[place]
                    yield Visit((before + step) * self.lanes + lane, lane, (number, lane, buffer), rows)
            before += epoch.steps


class Visit(NamedTuple):
    """One micro-batch: its number, lane, buffer, and the cells in it."""

    number: int
    lane: int
    buffer: tuple[int, int, int]
    rows: NDArray[np.int64]


class Epoch:
    """Micro-batches of one pass over the cells, found by lane and step."""

    def __init__(self, order: Order, number: int, places: NDArray[np.int64]) -> None:
        self._order, self._number, self._places = order, number, places
        self._lane = len(places) // order.lanes
        self._kept: dict[int, tuple[int, list[NDArray[np.int64]]]] = {}
        if order.tokens_per_batch is None:
            self.steps = self._lane // order.batch_size
        else:
            n_buffers = -(-self._lane // order.cells_per_buffer)
            sizes = [[len(self._batches(lane, i)) for i in range(n_buffers)] for lane in range(order.lanes)]
            self._ends = np.cumsum(sizes, axis=1)
            self.steps = int(self._ends[:, -1].min())

    def find(self, lane: int, step: int) -> tuple[int, int]:
        """Buffer of a lane that holds its ``step``-th micro-batch, and the place in it."""
        if self._order.tokens_per_batch is None:
            return divmod(step, self._order.cells_per_buffer // self._order.batch_size)
        ends = self._ends[lane]
        buffer = int(np.searchsorted(ends, step, side="right"))
        return buffer, step - (int(ends[buffer - 1]) if buffer else 0)

    def buffer(self, lane: int, number: int) -> list[NDArray[np.int64]]:
        """Cells of each micro-batch of a buffer."""
        if self._kept.get(lane, (-1,))[0] != number:
            cells = self._order.cells
            self._kept[lane] = number, [cells[places] for places in self._batches(lane, number)]
        return self._kept[lane][1]

    def buffer_cells(self, lane: int, number: int) -> NDArray[np.int64]:
        """All cells of a buffer, increasing."""
        return np.sort(np.concatenate(self.buffer(lane, number)))

    def _batches(self, lane: int, number: int) -> list[NDArray[np.int64]]:
        order = self._order
        first = lane * self._lane
        size = order.cells_per_buffer
        places = self._places[first + number * size : first + min((number + 1) * size, self._lane)]
        rng = np.random.default_rng(seed_for(order.seed, "order", self._number, lane, number))
        places = rng.permutation(places)
        if order.tokens_per_batch is None:
            whole = len(places) // order.batch_size * order.batch_size
            return list(places[:whole].reshape(-1, order.batch_size))
        limits = Limits(tokens=order.tokens_per_batch, cells=order.batch_size)
        batches = plan_batches(order.lengths[places], limits)
        return [places[batches[i]] for i in rng.permutation(len(batches))]


def _shuffled(order: Order, epoch: int) -> NDArray[np.int64]:
    """Places in ``order.cells`` with blocks of neighbours in random order."""
    seed, n_cells = seed_for(order.seed, "order", epoch), len(order.cells)
    if order.block_size == 1:
        return np.random.default_rng(seed).permutation(n_cells)
    # only its order is used: its batches depend on the number of processes and workers, and cannot be taken up again
    scdataset = require("scdataset", purpose="reading cells in shuffled blocks")
    return scdataset.BlockShuffling(order.block_size).get_indices(range(n_cells), seed=seed)
