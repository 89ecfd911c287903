"""Expression as a model predicts it, for the expressed genes of each cell or the same genes in all cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ._run import run, visit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..backbones import Backbone, TokenBatch
    from ..genes import GeneMatch
    from ._task import Task

_MEMORY_BYTES = 2 * 2**30


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


def predict_everywhere(task: Task, columns: np.ndarray, **writing: Any) -> Any:
    """Predictions of the same genes in all cells, ``(cells, genes)``."""
    wanted, place = np.unique(columns[columns >= 0], return_inverse=True)

    def compute(backbone: Backbone, tokens: TokenBatch) -> torch.Tensor:
        table = torch.full((len(tokens), len(wanted)), torch.nan, device=backbone.device)
        position = torch.full((len(backbone.vocab),), -1, device=backbone.device)
        position[torch.as_tensor(wanted, device=backbone.device)] = torch.arange(len(wanted), device=backbone.device)
        for part in backbone.iter_reconstruction(tokens, wanted):
            table[part.cells, position[part.genes]] = part.values.float()
        values = torch.full((len(tokens), len(columns)), torch.nan, device=backbone.device)
        values[:, torch.as_tensor(columns >= 0)] = table[:, torch.as_tensor(place)]
        return values

    result = run(
        **task.inputs,
        compute=compute,
        shape=(len(columns),),
        task={"output": "expression", "genes": columns.tolist()},
        **writing,
    )
    return result.array


def predict_expressed(task: Task, **options: Any) -> sparse.csr_matrix:
    """Predictions of the expressed genes of each cell, in the columns of the data."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def consume(cells: np.ndarray, rows: list) -> None:
        for part in rows:
            values = part.values.float().cpu().numpy()
            parts.append((cells[part.cells.cpu().numpy()], part.genes.cpu().numpy(), values))

    compute = lambda backbone, tokens: list(backbone.iter_reconstruction(tokens))
    visit(**task.inputs, compute=compute, consume=consume, **options)
    ids, n_vocab = task.match.ids, len(task.backbone.vocab)
    empty = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    cells, genes, values = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    table = sparse.csr_matrix((values, (cells, genes)), shape=(task.source.n_obs, n_vocab), dtype=np.float32)
    # a gene that several columns of the data share has its prediction in each of them
    known = np.flatnonzero(ids >= 0)
    spread = sparse.csr_matrix((np.ones(len(known), np.float32), (ids[known], known)), shape=(n_vocab, len(ids)))
    return (table @ spread).tocsr()
