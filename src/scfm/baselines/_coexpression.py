"""Correlation of genes over cells, with which gene embeddings are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterable

_CHUNK_VALUES = 2**23
_MOST_BYTES = 4 * 2**30


def gene_correlation(expression: np.ndarray | sparse.spmatrix, *, chunk_size: int | None = None) -> np.ndarray:
    """Pearson correlation of all pairs of genes.

    Parameters
    ----------
    expression
        Log-normalised expression, ``(cells, genes)``, dense or sparse; made dense a few cells at a time only.
    chunk_size
        Cells at a time.

    Returns
    -------
    Matrix ``(genes, genes)`` of float64, with NaN for genes that are constant.

    Raises
    ------
    MemoryError
        If the matrix would need more than 4 GiB.
    """
    expression = expression.tocsr() if sparse.issparse(expression) else np.asarray(expression)
    n_cells, n_genes = expression.shape
    step = chunk_size or max(1, _CHUNK_VALUES // max(n_genes, 1))
    return correlation_of_blocks((expression[start : start + step] for start in range(0, n_cells, step)), n_genes)


def correlation_of_blocks(blocks: Iterable[np.ndarray | sparse.spmatrix], n_genes: int) -> np.ndarray:
    """The same for expression that comes in blocks of cells.

    Parameters
    ----------
    blocks
        Blocks of cells, ``(cells, genes)``.
    n_genes
        Number of genes.
    """
    if n_genes**2 * 8 > _MOST_BYTES:
        msg = (
            f"the correlation of {n_genes:,} genes needs {n_genes**2 * 8 / 2**30:.0f} GiB; "
            "choose fewer genes, such as highly variable ones"
        )
        raise MemoryError(msg)
    products, sums, n_cells = np.zeros((n_genes, n_genes)), np.zeros(n_genes), 0
    shift = None
    step = max(1, _CHUNK_VALUES // max(n_genes, 1))
    for block in blocks:
        for start in range(0, block.shape[0], step):
            part = block[start : start + step]
            values = (part.toarray() if sparse.issparse(part) else np.asarray(part)).astype(np.float64)
            # sums of squares around a value near the mean do not cancel
            shift = values.mean(0) if shift is None else shift
            values -= shift
            products += values.T @ values
            sums += values.sum(0)
            n_cells += len(values)
    covariance = products - np.outer(sums, sums) / max(n_cells, 1)
    spread = np.sqrt(np.clip(np.diag(covariance), 0, None))
    spread[spread < 1e-10 * np.sqrt(max(n_cells, 1))] = np.nan
    correlation = covariance / np.outer(spread, spread)
    return np.clip(correlation, -1, 1, out=correlation)
