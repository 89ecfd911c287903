"""The loop itself."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    if block_size is None:
        block_size = choose_block_size(source, shape)
    elif block_size < 1:
        msg = f"block_size must be a positive whole number; got {block_size!r}"
        raise ValueError(msg)
    options = dict(options or {})
    whole = (source.n_obs, *shape)
    writer: Writer
    if out is None:
        writer = MemoryWriter(whole, block_size)
    else:
        identity = fingerprint(backbone, source, match, options, task)
        writer = ZarrWriter(out, whole, block_size, identity, overwrite=overwrite)

    starts = [start for start in range(0, source.n_obs, writer.block_size) if start not in writer.done]
    if starts and type(backbone).prepare is not Backbone.prepare:
        blocks = _checked(source.blocks(writer.block_size), check)
        options = backbone.prepare((block.counts for block in blocks), match, options)
    n_left = sum(min(writer.block_size, source.n_obs - start) for start in starts)
    if n_left < source.n_obs:
        _logging.info(f"    {source.n_obs - n_left:,} of {source.n_obs:,} cells are finished already in {out}")

    tokenised = _tokenised(backbone, _checked(source.blocks(writer.block_size, starts=starts), check), match, options)
    with (
        progress_bar(source.n_obs, done=source.n_obs - n_left, label=backbone.name, show=progress) as bar,
        closing(prefetch(tokenised)) as ahead,
    ):
        for start, tokens in ahead:
            values, n_empty, limits = _compute_block(backbone, compute, tokens, shape, limits, bar.update)
            writer.write(start, values, n_empty)
    return Result(writer.array, sum(writer.done.values()))


def _checked(blocks: Iterator[Block], check: Callable[[Block], None] | None) -> Iterator[Block]:
    for block in blocks:
        if check is not None:
            check(block)
        yield block


def _tokenised(
    backbone: Backbone, blocks: Iterator[Block], match: GeneMatch, options: Mapping[str, Any]
) -> Iterator[tuple[int, TokenBatch]]:
    for block in blocks:
        yield block.start, backbone.tokenize(block.counts, match, **options_for(options, block.start, block.stop))


def _compute_block(
    backbone: Backbone,
    compute: Compute,
    tokens: TokenBatch,
    shape: tuple[int, ...],
    limits: Limits,
    advance: Callable[[int], object],
) -> tuple[NDArray[np.float32], int, Limits]:
    """Results of one block, the number of empty cells, and the limits, which shrink when memory runs out."""
    values = np.full((len(tokens), *shape), np.nan, dtype=np.float32)
    usable = np.arange(len(tokens)) if tokens.valid is None else np.flatnonzero(tokens.valid.numpy())
    lengths = tokens.lengths.numpy()
    if tokens.queries is not None:
        lengths = lengths + tokens.queries.lengths.numpy()
    advance(len(tokens) - len(usable))

    waiting: tuple[NDArray[np.intp], Tensor] | None = None
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
            _fetch(values, *waiting, advance)
        waiting = (cells, result)
    if waiting is not None:
        _fetch(values, *waiting, advance)
    return values, len(tokens) - len(usable), limits


def _attempt(backbone: Backbone, compute: Compute, tokens: TokenBatch) -> Tensor | None:
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


def _fetch(
    values: NDArray[np.float32], cells: NDArray[np.intp], result: Tensor, advance: Callable[[int], object]
) -> None:
    values[cells] = result.float().cpu().numpy()
    advance(len(cells))
