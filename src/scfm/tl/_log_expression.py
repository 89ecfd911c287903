"""Log-normalised expression that is read block by block, from counts or from what is log-normalised already."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from .. import _logging
from .._counts import CountStats
from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from ..data import CellSource

_TARGET_SUM = 1e4
_BLOCK_VALUES = 2**24


class GeneMoments(NamedTuple):
    """Moments of each gene over all cells.

    Parameters
    ----------
    mean, std
        Of log-normalised expression.
    n_cells
        Number of cells that express the gene.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    n_cells: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LogExpression:
    """Log-normalised expression of all cells.

    Parameters
    ----------
    source
        Where it is read from.
    kind
        What the source holds: ``"counts"``, ``"normalized"`` or ``"log-normalized"``.
    empty
        Cells without any value.
    """

    source: CellSource
    kind: str
    empty: NDArray[np.bool_]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.source.n_vars

    def blocks(self) -> Iterator[tuple[slice, csr_matrix]]:
        """Blocks of consecutive cells, float32."""
        for rows, values in _blocks(self.source):
            if self.kind == "counts":
                totals = np.asarray(values.sum(1)).ravel()
                scale = np.divide(_TARGET_SUM, totals, out=np.zeros(len(totals)), where=totals > 0)
                values = sparse.diags(scale) @ values
            values = values.astype(np.float32).tocsr()
            if self.kind != "log-normalized":
                values.data = np.log1p(values.data)
            yield rows, values

    def moments(self) -> GeneMoments:
        """Moments of each gene."""
        total, squares = np.zeros(self.n_genes), np.zeros(self.n_genes)
        n_expressed, n = np.zeros(self.n_genes, dtype=np.int64), self.source.n_obs
        for _, values in self.blocks():
            values.data = values.data.astype(np.float64)
            total += np.asarray(values.sum(0)).ravel()
            squares += np.asarray(values.multiply(values).sum(0)).ravel()
            n_expressed += values.getnnz(0)
        mean = total / n
        # the variance of Scanpy, with n - 1
        variance = np.clip(squares / n - mean**2, 0, None) * (n / max(n - 1, 1))
        return GeneMoments(mean, np.sqrt(variance), n_expressed)


@contextmanager
def open_log_expression(adata: AnnData, layer: str | None) -> Iterator[LogExpression]:
    """Open expression and find out what it is.

    Raises
    ------
    ValueError
        If values are negative, missing or infinite, or there is no cell with a value.
    """
    with open_source(adata, layer=layer) as source:
        stats, empty = CountStats(), np.zeros(source.n_obs, dtype=bool)
        for rows, values in _blocks(source):
            stats.update(values)
            empty[rows] = values.getnnz(1) == 0
        remedy = (
            "scores need counts or log-normalised values: name a layer that has them with layer=, take them from "
            "adata.raw.to_adata(), or leave scores out with score=False and genes="
        )
        if stats.n_negative or stats.n_nan or stats.n_infinite:
            msg = f"{source.where} {stats.problem()}. {remedy[0].upper()}{remedy[1:]}"
            raise ValueError(msg)
        if not stats.n_nonzero:
            msg = f"{source.where} holds nothing but zeros; {remedy}"
            raise ValueError(msg)
        kind = stats.kind
        if kind == "unknown":
            _logging.warning(
                f"{source.where} holds neither counts nor values that look log-normalised; taken as they are"
            )
            kind = "log-normalized"
        how = {"counts": "counts, log-normalised on the fly", "normalized": "normalised, logarithms on the fly"}
        _logging.info(f"    expression: {source.where} ({how.get(kind, 'log-normalised')})")
        yield LogExpression(source, kind, empty)


def most_variable(moments: GeneMoments, candidates: NDArray[np.bool_], n_top: int) -> NDArray[np.bool_]:
    """The candidates whose log-normalised expression varies most.

    Dispersions among genes of a similar mean, as Scanpy's flavours rank them, leave out genes that much of the cells express
    steadily within one cell type: of PBMC 3k all three genes of CD3.

    Parameters
    ----------
    moments
        Moments of all genes.
    candidates
        Which genes may be chosen.
    n_top
        How many; of equal genes the first.
    """
    if candidates.sum() <= n_top:
        return candidates
    out = np.zeros(len(candidates), dtype=bool)
    out[np.argsort(-np.where(candidates, moments.std, -np.inf), kind="stable")[:n_top]] = True
    return out & candidates


def _blocks(source: CellSource) -> Iterator[tuple[slice, csr_matrix]]:
    size = max(1, int(_BLOCK_VALUES / max(source.values_per_cell(), 1)))
    for block in source.blocks(size):
        yield slice(block.start, block.stop), block.counts
