"""Micro-batches of a run for one process: buffers are read ahead, cut up and tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..engine._prefetch import prefetch
from ._plan import MicroBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from ..backbones import TokenBatch
    from ._cells import Cells
    from ._order import Order


@dataclass
class Stream:
    """An endless iterable of the micro-batches that belong to one of several processes.

    Together the processes get the micro-batches of ``order``, each exactly once. At most two buffers of each lane of
    this process are in memory, and two for each reader.

    Parameters
    ----------
    cells
        Where to read.
    order
        What to read.
    rank, world_size
        Number of this process, and how many there are, a divisor of the lanes of ``order``. May be set until the first
        micro-batch is asked for.
    first_step
        Optimiser step to begin with. Nothing before it is read.
    tokenize
        Turns a micro-batch of counts into tokens, in a thread that works ahead.
    min_genes
        Cells with fewer expressed genes of the vocabulary are left out of their micro-batch.
    readers
        Processes that read; 0 to read in the thread that tokenises.

    """

    cells: Cells
    order: Order
    rank: int = 0
    world_size: int = 1
    first_step: int = 0
    tokenize: Callable[[MicroBatch], TokenBatch] | None = None
    min_genes: int = 1
    readers: int = 0

    def __post_init__(self) -> None:
        self._ahead: Iterator[MicroBatch] | None = None

    def __iter__(self) -> Iterator[MicroBatch]:
        self.close()
        self._ahead = prefetch(self._micro_batches())
        return self._ahead

    def close(self) -> None:
        """End the thread that works ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _micro_batches(self) -> Iterator[MicroBatch]:
        lanes = range(self.rank, self.order.lanes, self.world_size)
        buffers = iter(
            DataLoader(
                _Reader(self.cells),
                sampler=_NewBuffers(self.order, lanes, self.first_step),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.readers,
                multiprocessing_context="spawn" if self.readers else None,
            )
        )
        current: dict[int, tuple[tuple[int, int, int], NDArray[np.int64], csr_matrix]] = {}
        for visit in self.order.visits(lanes, self.first_step):
            if visit.lane not in current or current[visit.lane][0] != visit.buffer:
                current[visit.lane] = (visit.buffer, *next(buffers))
            _, rows, counts = current[visit.lane]
            counts = counts[np.searchsorted(rows, np.sort(visit.rows))]
            batch = MicroBatch(visit.number, counts[self.cells.known_genes(counts) >= self.min_genes])
            yield batch if self.tokenize is None else MicroBatch(batch.number, self.tokenize(batch))


def _as_it_is(item: object) -> object:
    return item


class _Reader(Dataset):
    """Gives the counts of cells for their numbers, in whichever process the loader runs it."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def __getitem__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], csr_matrix]:
        return rows, self._cells.read(rows)


@dataclass
class _NewBuffers:
    """Cells of each buffer, in the order in which :meth:`Order.visits` first needs them."""

    order: Order
    lanes: range
    first_step: int

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        open_buffers: dict[int, tuple[int, int, int]] = {}
        epoch = None
        for visit in self.order.visits(self.lanes, self.first_step):
            if open_buffers.get(visit.lane) != visit.buffer:
                open_buffers[visit.lane] = visit.buffer
                number, lane, buffer = visit.buffer
                if epoch is None or epoch[0] != number:
                    epoch = number, self.order.epoch(number)
                yield epoch[1].buffer_cells(lane, buffer)
