"""States of genes in control cells: computed once, kept in a memory-mapped file, read in mini-batches."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import _logging, engine
from .._settings import settings
from ..checkpoints._files import give_rights
from ..engine._fingerprint import _hash_weights, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..backbones import Backbone, GeneRows, TokenBatch

_BATCH_BYTES = 128 * 2**20
_DTYPES = ("float16", "float32")


class ControlStates:
    """States of the genes of some cells, ``(cells, genes, dim)``, on disk.

    Parameters
    ----------
    array
        The states, usually memory-mapped.
    cells
        Numbers of the cells in the data, in ascending order.
    folder
        Temporary folder that lives as long as this object, if any.
    """

    def __init__(
        self, array: np.ndarray, cells: np.ndarray, folder: tempfile.TemporaryDirectory[str] | None = None
    ) -> None:
        self.array, self.cells, self._folder = array, cells, folder

    def __call__(self, cells: np.ndarray) -> Tensor:
        """States of cells by their number in the data, float32."""
        place = np.searchsorted(self.cells, cells)
        return torch.from_numpy(self.array[place].astype(np.float32))


def cached_states(
    task: engine.Task,
    expression: csr_matrix,
    cells: np.ndarray,
    *,
    folder: str | os.PathLike[str] | None,
    dtype: str,
    max_gib: float,
) -> ControlStates:
    """States of all cells of a run, from the cache or computed.

    Parameters
    ----------
    task
        The cells, what their genes are to the model, and options of its tokenizer.
    expression
        The same values, which are part of the key of the cache.
    cells
        Numbers of the cells in the data.
    folder
        Where the file is kept; a temporary folder by default.
    dtype
        Type of the numbers in the file.
    max_gib
        Largest file.

    Raises
    ------
    ValueError
        If the type is no such type.
    MemoryError
        If the file would be larger.
    """
    if dtype not in _DTYPES:
        msg = f"cache_dtype must be one of {', '.join(map(repr, _DTYPES))}; got {dtype!r}"
        raise ValueError(msg)
    shape = task.source.n_obs, task.source.n_vars, task.backbone.gene_state_dim
    gib = np.prod(shape, dtype=np.float64) * np.dtype(dtype).itemsize / 2**30
    if gib > max_gib:
        msg = (
            f"states of {shape[1]:,} genes in {shape[0]:,} control cells need {gib:,.1f} GiB on disk, more than "
            f"max_cache_gib={max_gib:g}. Allow more, choose fewer genes or control cells (scfm.pp.perturbation_setup), or a "
            f"model with narrower states"
        )
        raise MemoryError(msg)
    temporary = tempfile.TemporaryDirectory(prefix="scfm-states-") if folder is None else None
    place = Path(temporary.name if temporary is not None else folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{_key(task, expression, dtype)}.npy"
    if not file.is_file():
        start = _logging.info(f"states of {shape[1]:,} genes in {shape[0]:,} control cells ({gib:.2f} GiB on disk)")
        _write(task, file, shape, dtype)
        _logging.info("    finished", time=start)
    return ControlStates(np.load(file, mmap_mode="r", allow_pickle=False), cells, temporary)


def states_in_memory(task: engine.Task, *, quiet: bool = False) -> np.ndarray:
    """States of all cells of a run, float32, ``(cells, genes, dim)``; ``quiet`` says nothing that was said before."""
    out = np.zeros((task.source.n_obs, task.source.n_vars, task.backbone.gene_state_dim), dtype=np.float32)
    verbosity = settings.verbosity
    try:
        settings.verbosity = 0 if quiet else verbosity
        _visit(task, out.__setitem__, progress=False)
    finally:
        settings.verbosity = verbosity
    return out


def _key(task: engine.Task, expression: csr_matrix, dtype: str) -> str:
    digest = hashlib.sha256()
    # the weights may have changed since they were loaded, so that the hash of their file is not enough
    output = {"output": "gene states", "dtype": dtype, "module": _hash_weights(task.backbone)}
    output["unknown genes"] = "own states" if _has_padding(task) else "mean"
    values = fingerprint(task.backbone, task.source, task.match, task.options, output)
    digest.update(json.dumps(values, sort_keys=True).encode())
    for array in (expression.data, expression.indices, expression.indptr):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _write(task: engine.Task, file: Path, shape: tuple[int, ...], dtype: str) -> None:
    """A file appears complete or not at all, also when several processes write it."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".states-", suffix=".npy")
    os.close(handle)
    try:
        _fill(task, name, shape, dtype)
        give_rights(Path(name))
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


def _fill(task: engine.Task, name: str, shape: tuple[int, ...], dtype: str) -> None:
    array = np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=shape)
    limit = float(np.finfo(dtype).max)

    def put(rows: np.ndarray, values: np.ndarray) -> None:
        array[rows] = np.clip(values, -limit, limit)

    _visit(task, put)
    array.flush()


def _has_padding(task: engine.Task) -> bool:
    """Whether genes that the model does not know are tokens, too, and so have states of their own."""
    return task.options.get("unknown") == "pad" and bool((task.match.ids < 0).any())


def _visit(task: engine.Task, put: Callable[[Any, np.ndarray], object], *, progress: bool | None = None) -> None:
    """Hand over the states of all genes in the order of the data, some cells at a time.

    A gene without a state of its own (one that the model does not know, or gives none for) has the mean over all genes that the
    model gives for this cell, as in scLong's code; all of them if there are such genes. Where unknown genes are tokens with the
    vector of padding, as in CellFM's code, each has the state of its own token, which depends on its value. Cells without any
    state have zeros.
    """
    backbone, ids = task.backbone, task.match.ids
    known = np.unique(ids[ids >= 0])
    padded = _has_padding(task)
    complete = padded or bool((ids >= 0).all())
    place = torch.full((len(backbone.vocab),), -1)
    place[torch.from_numpy(known)] = torch.arange(len(known))
    columns = np.where(ids >= 0, np.searchsorted(known, ids), 0)
    dim = backbone.gene_state_dim

    def compute(model: Backbone, tokens: TokenBatch) -> tuple[int, list[GeneRows]]:
        wanted = np.append(known, tokens.pad_id) if padded else known
        return len(tokens), list(model.iter_gene_states(tokens, wanted if complete else None))

    def consume(cells: np.ndarray, result: tuple[int, list[GeneRows]]) -> None:
        n_cells, parts = result
        block, there = torch.zeros(n_cells, len(known), dim), torch.zeros(n_cells, len(known), dtype=torch.bool)
        sums, counts = torch.zeros(n_cells, dim, dtype=torch.float64), torch.zeros(n_cells, 1, dtype=torch.int64)
        for part in parts:
            rows, genes, values = part.cells.cpu(), place[part.genes.cpu()], part.values.float().cpu()
            sums.index_add_(0, rows, values.double())
            counts.index_add_(0, rows, torch.ones(len(rows), 1, dtype=torch.int64))
            wanted = genes >= 0
            block[rows[wanted], genes[wanted]] = values[wanted]
            there[rows[wanted], genes[wanted]] = True
        mean = (sums / counts.clamp_min(1)).float()
        block = torch.where(there.unsqueeze(-1), block, mean.unsqueeze(1))
        out = block.numpy()[:, columns]
        out[:, ids < 0] = _states_of_padding(parts, place, n_cells) if padded else mean.numpy()[:, None]
        put(cells, out)

    per_cell = 4 * max(len(ids), len(known) if complete else len(backbone.vocab)) * dim
    most = max(1, _BATCH_BYTES // max(1, per_cell))
    n_empty = engine.visit(**task.inputs, compute=compute, consume=consume, batch_size=most, progress=progress)
    if n_empty:
        _logging.warning(f"{n_empty:,} cells have no gene that {backbone.name} knows; their genes have states of zero")


def _states_of_padding(parts: list[GeneRows], place: Tensor, n_cells: int) -> np.ndarray:
    """States of tokens that are no known gene, in the order of the columns, ``(cells, unknown genes, dim)``."""
    rows, genes = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("cells", "genes"))
    values = torch.cat([part.values.float().cpu() for part in parts])
    unknown = place[genes] < 0
    order = torch.argsort(rows[unknown], stable=True)
    return values[unknown][order].view(n_cells, -1, values.shape[-1]).numpy()
