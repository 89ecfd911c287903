"""Expression as a model predicts it: for expressed genes, the same genes in all cells, or chosen genes of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from .. import _logging
from ._memory import choose_limits
from ._run import run, visit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..backbones import Backbone, TokenBatch
    from ..genes import GeneMatch
    from ._task import Task

_MEMORY_BYTES = 2 * 2**30
_BATCH_BYTES = 256 * 2**20
# cell and gene (int64 each) and value of one prediction
_ROW_BYTES = 20


def genes_to_predict(match: GeneMatch, genes: Sequence[str] | str) -> np.ndarray:
    """Vocabulary ids of the genes to predict; -1 for genes of the data that the model does not know."""
    if isinstance(genes, str):
        return match.ids
    names = np.asarray(list(genes), dtype=object)
    where = pd.Index(match.names).get_indexer_for(names) if pd.Index(match.names).is_unique else None
    by_data = np.full(len(names), -1, dtype=np.int64) if where is None else np.where(where >= 0, match.ids[where], -1)
    ids = np.where(by_data >= 0, by_data, match.vocab.get_ids(names))
    if (ids < 0).any():
        msg = f"the model does not know {', '.join(map(str, names[ids < 0][:10]))}"
        raise KeyError(msg)
    return ids


def check_size(n_cells: int, n_genes: int) -> None:
    """Raise ``MemoryError`` if a dense prediction would be larger than 2 GiB."""
    n_bytes = 4 * n_cells * n_genes
    if n_bytes > _MEMORY_BYTES:
        msg = (
            f"{n_genes:,} genes in {n_cells:,} cells would need {n_bytes / 2**30:.1f} GiB; give a folder with out=, "
            "choose genes, or predict the expressed ones only (genes='expressed')"
        )
        raise MemoryError(msg)


def predict_everywhere(task: Task, columns: np.ndarray, *, minimum: float | None = None, **writing: Any) -> Any:
    """Predictions of the same genes in all cells, ``(cells, genes)``.

    Parameters
    ----------
    task
        The run.
    columns
        Vocabulary id of each gene; those with -1 are NaN.
    minimum
        What smaller predictions are set to.
    **writing
        Sizes, ``out`` and the like of :func:`scfm.engine.run`.
    """
    wanted, place = np.unique(columns[columns >= 0], return_inverse=True)

    def compute(backbone: Backbone, tokens: TokenBatch) -> torch.Tensor:
        table = torch.full((len(tokens), len(wanted)), torch.nan, device=backbone.device)
        position = torch.full((len(backbone.vocab),), -1, device=backbone.device)
        position[torch.as_tensor(wanted, device=backbone.device)] = torch.arange(len(wanted), device=backbone.device)
        for part in backbone.iter_reconstruction(tokens, wanted):
            table[part.cells, position[part.genes]] = part.values.float()
        values = torch.full((len(tokens), len(columns)), torch.nan, device=backbone.device)
        values[:, torch.as_tensor(columns >= 0)] = table[:, torch.as_tensor(place)]
        return values if minimum is None else values.clamp_(min=minimum)

    what = {"output": "expression", "genes": columns.tolist()}
    result = run(
        **task.inputs,
        compute=compute,
        shape=(len(columns),),
        task=what if minimum is None else what | {"minimum": minimum},
        **writing,
    )
    _warn_if_empty(task, result.n_empty)
    return result.array


def predict_expressed(task: Task, *, minimum: float | None = None, **options: Any) -> sparse.csr_matrix:
    """Predictions of the expressed genes of each cell, in the columns of the data.

    Parameters
    ----------
    task
        The run.
    minimum
        What smaller predictions are set to.
    **options
        Sizes of :func:`scfm.engine.visit`.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def consume(cells: np.ndarray, rows: list) -> None:
        for part in rows:
            values = part.values.float().cpu().numpy()
            parts.append((cells[part.cells.cpu().numpy()], part.genes.cpu().numpy(), values))

    compute = lambda backbone, tokens: list(backbone.iter_reconstruction(tokens))
    n_empty = visit(**task.inputs, compute=compute, consume=consume, **options)
    _warn_if_empty(task, n_empty)
    empty = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    cells, genes, values = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    values = values if minimum is None else np.maximum(values, np.float32(minimum))
    row, column = _places(genes, task.match.ids, len(task.backbone.vocab))
    shape = (task.source.n_obs, len(task.match))
    return sparse.csr_matrix((values[row], (cells[row], column)), shape=shape, dtype=np.float32)


def _places(genes: np.ndarray, ids: np.ndarray, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the data that each of ``genes`` has: several if columns share it, none if it is not in the data.

    Returns
    -------
    Position in ``genes`` and column, for each pair.
    """
    by_id = np.argsort(ids, kind="stable")[np.count_nonzero(ids < 0) :]
    n_columns = np.bincount(ids[by_id], minlength=n_vocab)
    first = np.cumsum(n_columns) - n_columns
    n = n_columns[genes]
    row = np.repeat(np.arange(len(genes)), n)
    return row, by_id[np.arange(len(row)) + np.repeat(first[genes] - (np.cumsum(n) - n), n)]


def predict_at(
    task: Task,
    where: sparse.csr_matrix,
    *,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Predictions of other genes in each cell, without a table of all cells and genes.

    Parameters
    ----------
    task
        The run.
    where
        Its stored entries say which genes of which cells are wanted, ``(cells, vocabulary)``, sorted indices.
    batch_size, tokens_per_batch
        As in :func:`scfm.engine.run`; fewer cells if their predictions would take much memory together.
    **options
        Other options of :func:`scfm.engine.visit`.

    Returns
    -------
    One number for each stored entry, in their order, float32; NaN where the model predicts nothing.
    """
    n_vocab = where.shape[1]
    rows = np.repeat(np.arange(where.shape[0]), np.diff(where.indptr))
    keys = rows * n_vocab + where.indices
    wanted = np.unique(where.indices)
    out = np.full(len(keys), np.nan, dtype=np.float32)
    if not len(keys):
        return out

    def consume(cells: np.ndarray, parts: list) -> None:
        for part in parts:
            found = cells[part.cells.cpu().numpy()] * n_vocab + part.genes.cpu().numpy()
            place = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
            hit = keys[place] == found
            out[place[hit]] = part.values.float().cpu().numpy()[hit]

    limits = choose_limits(task.backbone.device, batch_size, tokens_per_batch)
    most = max(1, _BATCH_BYTES // (_ROW_BYTES * len(wanted)))
    sizes = {"batch_size": min(most, limits.cells or most), "tokens_per_batch": limits.tokens}
    compute = lambda backbone, tokens: list(backbone.iter_reconstruction(tokens, wanted))
    n_empty = visit(**task.inputs, compute=compute, consume=consume, **sizes, **options)
    _warn_if_empty(task, n_empty)
    return out


def _warn_if_empty(task: Task, n_empty: int) -> None:
    if n_empty:
        _logging.warning(
            f"{n_empty:,} of {task.source.n_obs:,} cells have no expressed gene that {task.backbone.name} knows, or too "
            "few counts; nothing is predicted for them"
        )
