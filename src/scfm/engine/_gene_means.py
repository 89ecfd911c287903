"""Averages of gene states over groups of cells, without the states of all cells in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ._run import visit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..backbones import Backbone, GeneRows, TokenBatch
    from ..genes import GeneMatch
    from ._task import Task

_SUM_BYTES = 4 * 2**30
_BATCH_BYTES = 256 * 2**20


def by_column(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of a table with one row per id, for each gene of the data; NaN where the id is -1."""
    out = np.full((len(ids), table.shape[1]), np.nan, dtype=np.float32)
    out[ids >= 0] = table[ids[ids >= 0]]
    return out


def genes_to_average(match: GeneMatch, genes: Sequence[str] | None) -> np.ndarray:
    """Vocabulary ids of genes of the data, each once."""
    if genes is None:
        return np.unique(match.ids[match.ids >= 0])
    columns = pd.Index(match.names).get_indexer_for(list(genes))
    missing = [gene for gene, column in zip(genes, columns, strict=False) if column < 0]
    if missing:
        msg = f"adata has no gene {', '.join(map(str, missing[:10]))}"
        raise KeyError(msg)
    unknown = match.names[columns[match.ids[columns] < 0]]
    if len(unknown):
        msg = f"the model does not know {', '.join(unknown[:10])}"
        raise KeyError(msg)
    return np.unique(match.ids[columns])


class GeneMeans:
    """Sums of gene states over the cells of each group, collected while the cells pass by.

    Parameters
    ----------
    task
        The run.
    codes
        Group of each cell.
    n_groups
        Number of groups.
    ids
        Vocabulary ids of the genes.
    """

    def __init__(self, task: Task, codes: np.ndarray, n_groups: int, ids: np.ndarray) -> None:
        backbone = task.backbone
        self.task, self.codes, self.ids, self.n_groups = task, codes, ids, n_groups
        n_bytes = 8 * n_groups * len(ids) * backbone.gene_state_dim
        if n_bytes > _SUM_BYTES:
            msg = (
                f"averages of {len(ids):,} genes in {n_groups} groups would need {n_bytes / 2**30:.0f} GiB; choose "
                "fewer with genes= or groups="
            )
            raise MemoryError(msg)
        # float64, so that the mean does not depend on the order in which a million cells are added
        self.sums = torch.zeros(n_groups * len(ids), backbone.gene_state_dim, dtype=torch.float64)
        self.counts = torch.zeros(n_groups * len(ids), dtype=torch.int64)
        self._place = torch.full((len(backbone.vocab),), -1)
        self._place[torch.from_numpy(ids)] = torch.arange(len(ids))

    def run(self, batch_size: int | None, **options: Any) -> None:
        """Visit all cells."""
        rows = 4 * len(self.ids) * self.task.backbone.gene_state_dim
        most = max(1, _BATCH_BYTES // max(1, rows))
        batch_size = most if batch_size is None else min(most, batch_size)
        visit(**self.task.inputs, compute=self._states, consume=self._add, batch_size=batch_size, **options)

    def _states(self, backbone: Backbone, tokens: TokenBatch) -> list[GeneRows]:
        return list(backbone.iter_gene_states(tokens, self.ids))

    def _add(self, cells: np.ndarray, parts: list[GeneRows]) -> None:
        groups = torch.from_numpy(self.codes[cells])
        for part in parts:
            where = groups[part.cells.cpu()] * len(self.ids) + self._place[part.genes.cpu()]
            self.sums.index_add_(0, where, part.values.cpu().double())
            self.counts.index_add_(0, where, torch.ones_like(where))

    def of_columns(self) -> list[np.ndarray]:
        """Mean of each group for the genes of the data, ``(n_vars, dim)``; NaN where there is none."""
        means = (self.sums / self.counts[:, None]).float().numpy()
        return [by_column(mean, self._columns()) for mean in means.reshape(self.n_groups, len(self.ids), -1)]

    def n_cells(self) -> np.ndarray:
        """Number of cells behind each mean, ``(n_vars, groups)``."""
        columns = self._columns()
        counts = self.counts.numpy().reshape(self.n_groups, -1).T
        out = np.zeros((len(columns), self.n_groups), dtype=np.int64)
        out[columns >= 0] = counts[columns[columns >= 0]]
        return out

    def _columns(self) -> np.ndarray:
        ids = self.task.match.ids
        return np.where(ids >= 0, self._place.numpy()[ids], -1)
