"""Averages of attention over groups of cells, with one map of genes by genes for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ._run import visit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ..backbones import Backbone, TokenBatch
    from ._task import Task

    Mean = Literal["true_mean", "upstream_mean"]

_SUM_BYTES = 4 * 2**30
_BATCH_BYTES = 64 * 2**20
_BLOCK_VALUES = 2**18
_CELLS = 2**12


class AttentionMeans:
    """Sums of attention maps over the cells of each group, collected while the cells pass by.

    A pair of genes is averaged over the cells in which the model has a score for it, which are those in which both genes
    are tokens. Which cells these are is kept as one bit for each cell and gene, so that nothing else of the size of a map
    is in memory.

    Parameters
    ----------
    task
        The run.
    codes
        Group of each cell.
    n_groups
        Number of groups.
    ids
        Vocabulary ids of the genes, each once.
    layer
        Layer of the model.
    options
        Further options of its ``attention``.
    mean
        ``"upstream_mean"`` leaves the first cell of each group out of the sum, but not out of the number of cells, as
        the authors' notebook of scGPT does.

    Raises
    ------
    MemoryError
        If the maps would need more than 4 GiB.
    """

    def __init__(
        self,
        task: Task,
        codes: np.ndarray,
        n_groups: int,
        ids: np.ndarray,
        *,
        layer: int = -1,
        options: Mapping[str, Any] | None = None,
        mean: Mean = "true_mean",
    ) -> None:
        n_bytes = 8 * n_groups * len(ids) ** 2
        if n_bytes > _SUM_BYTES:
            msg = (
                f"maps of {len(ids):,} x {len(ids):,} genes for {n_groups} groups would need {n_bytes / 2**30:.0f} GiB; "
                "choose fewer with genes= or groups="
            )
            raise MemoryError(msg)
        self.task, self.codes, self.ids = task, codes, ids
        self._options = {"layer": layer, "genes": torch.from_numpy(ids), **(options or {})}
        # float64, so that the mean does not depend on the order in which a million cells are added
        home = task.backbone.device if task.backbone.device.type == "cuda" else "cpu"
        self._sums = torch.zeros(n_groups, len(ids), len(ids), dtype=torch.float64, device=home)
        self._seen: list[list[np.ndarray]] = [[] for _ in range(n_groups)]
        groups, first = np.unique(codes, return_index=True)
        self._left_out = set(first[groups >= 0].tolist()) if mean == "upstream_mean" else set()

    def run(self, batch_size: int | None, **options: Any) -> int:
        """Visit all cells; returns the number of those without any token that the model can use."""
        most = max(1, _BATCH_BYTES // (4 * len(self.ids) ** 2))
        batch_size = most if batch_size is None else min(most, batch_size)
        return visit(**self.task.inputs, compute=self._maps, consume=self._add, batch_size=batch_size, **options)

    def _maps(self, backbone: Backbone, tokens: TokenBatch) -> Tensor:
        return backbone.attention(tokens, **self._options)

    @torch.inference_mode()
    def _add(self, cells: np.ndarray, maps: Tensor) -> None:
        seen = ~maps.diagonal(dim1=1, dim2=2).isnan().cpu().numpy()
        maps = maps.nan_to_num_(nan=0.0).to(self._sums.device)
        for cell, one, genes in zip(cells.tolist(), maps, seen, strict=True):
            group = self.codes[cell]
            self._seen[group].append(np.packbits(genes))
            if cell not in self._left_out:
                self._sums[group] += one

    def n_cells(self, group: int) -> int:
        """Number of cells of a group that have tokens."""
        return len(self._seen[group])

    def blocks(self, group: int, keys: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Mean scores of a group, a few keys at a time.

        Parameters
        ----------
        group
            Number of the group.
        keys
            Positions among ``ids`` of the genes that are looked at; all by default.

        Yields
        ------
        The positions of some of the keys; the mean score of each query for them, ``(keys, queries)``, NaN where no cell
        has one; and the number of cells behind it.
        """
        keys = np.arange(len(self.ids)) if keys is None else np.asarray(keys)
        step = max(1, _BLOCK_VALUES // len(self.ids))
        for start in range(0, len(keys), step):
            some = keys[start : start + step]
            counts = self._counts(group, some)
            sums = self._sums[group][:, torch.from_numpy(some)].T.cpu().numpy()
            with np.errstate(invalid="ignore"):
                means = np.where(counts > 0, sums / counts, np.nan)
            yield some, means, counts

    def _counts(self, group: int, keys: np.ndarray) -> np.ndarray:
        """Number of cells in which both genes are, ``(keys, genes)``."""
        seen, n_genes = self._seen[group], len(self.ids)
        counts = np.zeros((len(keys), n_genes), dtype=np.int64)
        for start in range(0, len(seen), _CELLS):
            packed = np.stack(seen[start : start + _CELLS])
            # exact: whole numbers below 2**24
            there = np.unpackbits(packed, axis=1, count=n_genes).astype(np.float32)
            counts += (there[:, keys].T @ there).astype(np.int64)
        return counts


class CellAttentionMeans:
    """Sums of the attention of the token of a cell to genes, over the cells of each group.

    Parameters
    ----------
    task, codes, n_groups, ids, options
        As for :class:`AttentionMeans`.
    """

    def __init__(
        self,
        task: Task,
        codes: np.ndarray,
        n_groups: int,
        ids: np.ndarray,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.codes = task, torch.from_numpy(codes)
        self._options = {"genes": torch.from_numpy(ids), **(options or {})}
        self._sums = torch.zeros(n_groups, len(ids), dtype=torch.float64)
        self._counts = torch.zeros(n_groups, len(ids), dtype=torch.int64)

    def run(self, batch_size: int | None, **options: Any) -> int:
        """Visit all cells; returns the number of those without any token that the model can use."""
        return visit(**self.task.inputs, compute=self._ranks, consume=self._add, batch_size=batch_size, **options)

    def _ranks(self, backbone: Backbone, tokens: TokenBatch) -> Tensor:
        return backbone.cell_attention(tokens, **self._options)

    @torch.inference_mode()
    def _add(self, cells: np.ndarray, ranks: Tensor) -> None:
        ranks, groups = ranks.double().cpu(), self.codes[torch.from_numpy(cells)]
        self._counts.index_add_(0, groups, (~ranks.isnan()).long())
        self._sums.index_add_(0, groups, ranks.nan_to_num(nan=0.0))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean for each group and gene, NaN where no cell has the gene, and the number of cells behind it."""
        counts = self._counts.numpy()
        with np.errstate(invalid="ignore"):
            return np.where(counts > 0, self._sums.numpy() / counts, np.nan), counts
