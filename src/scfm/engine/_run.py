"""The loop itself."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from .. import _logging
from ..backbones import Backbone
from ._fingerprint import fingerprint
from ._memory import choose_block_size, choose_limits, free_memory, is_out_of_memory
from ._options import options_for
from ._plan import Limits, plan_batches
from ._prefetch import prefetch
from ._progress import progress_bar
from ._writer import MemoryWriter, Writer, ZarrWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ..backbones import TokenBatch
    from ..data import Block, CellSource
    from ..genes import GeneMatch

    Compute = Callable[[Backbone, TokenBatch], Tensor]

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Parameters
    ----------
    array
        Results in the order of the cells, float32, shape ``(cells, ...)``: a numpy array, or the zarr array at ``out``.
    n_empty
        Number of cells without any token that the model can use; their rows are NaN.
    """

    array: Any
    n_empty: int


def run(
    backbone: Backbone,
    source: CellSource,
    match: GeneMatch,
    compute: Compute,
    *,
    shape: tuple[int, ...],
    task: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    check: Callable[[Block], None] | None = None,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Result:
    """Compute something for every cell of a source.

    Blocks of cells are read and tokenised in a second thread while the network works on the block before. Within a
    block, cells of similar length share a batch. The numbers of a cell do not depend on the sizes of block and batch.

    Parameters
    ----------
    backbone
        Model; its device and precision are used.
    source
        Cells, from :func:`scfm.data.open_source`.
    match
        Which gene of the model each column of the source is.
    compute
        Called with the backbone and a token batch; returns a tensor of shape ``(cells, *shape)``.
    shape
        Shape of the result of one cell.
    task
        JSON values that name what is computed; part of the fingerprint of ``out``.
    options
        Options of ``backbone.tokenize``; arrays have one entry for each cell of the source.
    check
        Called with every block as soon as it has been read; raises if the values are not what the model needs.
    batch_size, tokens_per_batch
        Most cells (by default ``settings.batch_size``) and most padded tokens in one forward pass. Without either, a
        token budget that suits the device.
    block_size
        Cells read at a time.
    out
        Folder of a zarr array to write to; finished blocks of an earlier run with the same fingerprint are kept.
    overwrite
        Replace an existing result of another run at ``out``.
    progress
        Whether to show a progress bar.

    Raises
    ------
    MemoryError
        If not even one cell fits into memory.
    ValueError
        If ``out`` holds a result of another run, or a size is not positive.
    """
    limits = choose_limits(backbone.device, batch_size, tokens_per_batch)
    block_size = _block_size(block_size, source, shape)
    options = dict(options or {})
    whole = (source.n_obs, *shape)
    writer: Writer
    if out is None:
        writer = MemoryWriter(whole, block_size)
    else:
        identity = fingerprint(backbone, source, match, options, task)
        writer = ZarrWriter(out, whole, block_size, identity, overwrite=overwrite)

    starts = [start for start in range(0, source.n_obs, writer.block_size) if start not in writer.done]
    n_left = sum(min(writer.block_size, source.n_obs - start) for start in starts)
    if n_left < source.n_obs:
        _logging.info(f"    {source.n_obs - n_left:,} of {source.n_obs:,} cells are finished already in {out}")
    blocks = _Blocks(backbone, source, match, options, check, writer.block_size, starts)
    with blocks.tokenised(done=source.n_obs - n_left, progress=progress) as (ahead, advance):
        for start, tokens in ahead:
            values = np.full((len(tokens), *shape), np.nan, dtype=np.float32)
            limits = _compute_block(backbone, compute, tokens, limits, partial(_store, values), advance)
            writer.write(start, values, _n_empty(tokens))
    return Result(writer.array, sum(writer.done.values()))


def visit(
    backbone: Backbone,
    source: CellSource,
    match: GeneMatch,
    compute: Callable[[Backbone, TokenBatch], T],
    consume: Callable[[NDArray[np.intp], T], object],
    *,
    options: Mapping[str, Any] | None = None,
    check: Callable[[Block], None] | None = None,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    progress: bool | None = None,
) -> int:
    """Compute something for batches of cells and hand it over, for results that are no array with a row per cell.

    Parameters
    ----------
    backbone, source, match, options, check, batch_size, tokens_per_batch, block_size, progress
        As in :func:`run`.
    compute
        Called with the backbone and a token batch; called again with fewer cells when memory runs out.
    consume
        Called once for every cell that has tokens, a batch at a time in no particular order, with the numbers of the
        cells in the source and what ``compute`` returned for them.

    Returns
    -------
    Number of cells without any token that the model can use.

    Raises
    ------
    MemoryError
        If not even one cell fits into memory.
    ValueError
        If a size is not positive.
    """
    limits = choose_limits(backbone.device, batch_size, tokens_per_batch)
    block_size = _block_size(block_size, source, ())
    n_empty = 0
    starts = range(0, source.n_obs, block_size)
    blocks = _Blocks(backbone, source, match, dict(options or {}), check, block_size, starts)
    with blocks.tokenised(progress=progress) as (ahead, advance):
        for start, tokens in ahead:
            handed = lambda cells, result, start=start: consume(start + cells, result)
            limits = _compute_block(backbone, compute, tokens, limits, handed, advance)
            n_empty += _n_empty(tokens)
    return n_empty


def _block_size(block_size: int | None, source: CellSource, shape: tuple[int, ...]) -> int:
    if block_size is None:
        return choose_block_size(source, shape)
    if block_size < 1:
        msg = f"block_size must be a positive whole number; got {block_size!r}"
        raise ValueError(msg)
    return block_size


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a source that are left to do."""

    backbone: Backbone
    source: CellSource
    match: GeneMatch
    options: Mapping[str, Any]
    check: Callable[[Block], None] | None
    size: int
    starts: Sequence[int]

    @contextmanager
    def tokenised(
        self, *, done: int = 0, progress: bool | None = None
    ) -> Iterator[tuple[Iterator[tuple[int, TokenBatch]], Callable[[int], object]]]:
        """First cell and tokens of each block, made ahead in a thread, and what moves the progress bar."""
        backbone, options = self.backbone, self.options
        if self.starts and type(backbone).prepare is not Backbone.prepare:
            blocks = _checked(self.source.blocks(self.size), self.check)
            options = backbone.prepare((block.counts for block in blocks), self.match, dict(options))
        blocks = _checked(self.source.blocks(self.size, starts=self.starts), self.check)
        tokens = (
            (
                block.start,
                backbone.tokenize(block.counts, self.match, **options_for(options, block.start, block.stop)),
            )
            for block in blocks
        )
        with (
            _logging.each_warning_once(),
            progress_bar(self.source.n_obs, done=done, label=backbone.name, show=progress) as bar,
            closing(prefetch(tokens)) as ahead,
        ):
            yield ahead, bar.update


def _checked(blocks: Iterator[Block], check: Callable[[Block], None] | None) -> Iterator[Block]:
    for block in blocks:
        if check is not None:
            check(block)
        yield block


def _n_empty(tokens: TokenBatch) -> int:
    return 0 if tokens.valid is None else int((~tokens.valid).sum())


def _compute_block(
    backbone: Backbone,
    compute: Callable[[Backbone, TokenBatch], T],
    tokens: TokenBatch,
    limits: Limits,
    consume: Callable[[NDArray[np.intp], T], object],
    advance: Callable[[int], object],
) -> Limits:
    """Compute and hand over all batches of one block; returns the limits, which shrink when memory runs out."""
    usable = np.arange(len(tokens)) if tokens.valid is None else np.flatnonzero(tokens.valid.numpy())
    lengths = tokens.lengths.numpy()
    if tokens.queries is not None:
        lengths = lengths + tokens.queries.lengths.numpy()
    advance(len(tokens) - len(usable))

    waiting: tuple[NDArray[np.intp], T] | None = None
    todo = [usable[batch] for batch in plan_batches(lengths[usable], limits)]
    while todo:
        cells = todo.pop(0)
        result = _attempt(backbone, compute, tokens.select(cells))
        if result is None:
            longest = int(lengths[cells].max())
            _raise_if_alone(cells, longest, backbone)
            limits = limits.after_failure(len(cells), longest)
            _logging.info(
                f"    out of memory with {len(cells)} cells at a time; going on with {limits.tokens:,} tokens"
            )
            rest = np.concatenate([cells, *todo])
            todo = [rest[batch] for batch in plan_batches(lengths[rest], limits)]
            continue
        # fetching waits for the device, so the next batch is queued before the last one is fetched
        if waiting is not None:
            consume(*waiting)
            advance(len(waiting[0]))
        waiting = (cells, result)
    if waiting is not None:
        consume(*waiting)
        advance(len(waiting[0]))
    return limits


def _attempt(backbone: Backbone, compute: Callable[[Backbone, TokenBatch], T], tokens: TokenBatch) -> T | None:
    """The result, or ``None`` if memory ran out."""
    try:
        with torch.inference_mode():
            return compute(backbone, tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the except clause, whose traceback would keep the tensors of the failed pass alive
    free_memory(backbone.device)
    return None


def _raise_if_alone(cells: Sequence[int], longest: int, backbone: Backbone) -> None:
    if len(cells) > 1:
        return
    msg = (
        f"one cell with {longest:,} tokens does not fit into the memory of {backbone.device}. "
        "Use precision='bfloat16', fewer genes (max_length= where the model has it), or device='cpu'"
    )
    raise MemoryError(msg)


def _store(values: NDArray[np.float32], cells: NDArray[np.intp], result: Tensor) -> None:
    values[cells] = result.float().cpu().numpy()
