"""Gene vectors from co-expression, for networks that start from gene2vec instead of random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.sparse import csr_matrix

from ..baselines._coexpression import correlation_of_blocks
from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..data import CellSource

_BLOCK = 1024
_TARGET_SUM = 1e4


def coexpression_vectors(
    sources: Sequence[str | Path], genes: Sequence[str], dim: int, *, layer: str | None = None
) -> np.ndarray:
    """Vectors whose scalar products approximate the correlation of genes across cells.

    gene2vec, from which scLong starts, learns vectors of genes that are close if the genes are expressed together in many
    data sets. Skip-grams factorise a matrix of associations; here the matrix is that of Pearson correlations of
    log-normalised counts, each within a source and averaged over the sources with their numbers of cells, so that
    differences between sources do not count. Its largest eigenvectors are scaled by the roots of their eigenvalues, and all
    vectors together so that their mean norm is 1.

    Parameters
    ----------
    sources
        Files with raw counts.
    genes
        Names of the genes.
    dim
        Width of the vectors.
    layer
        Layer with the counts.

    Returns
    -------
    Array ``(genes, dim)`` of float64; zero for genes that no source expresses.

    Raises
    ------
    ValueError
        If fewer than ``dim`` genes are expressed.

    References
    ----------
    Du et al., Gene2vec, BMC Genomics 20, 82 (2019); Levy and Goldberg, NeurIPS 2014.
    """
    index = pd.Index(genes)
    total, weight = np.zeros((len(index), len(index))), np.zeros((len(index), len(index)))
    for path in sources:
        with open_source(path, layer=layer) as source:
            columns = index.get_indexer(pd.Index(source.var_names))
            correlation, expressed = _correlation(source, columns, len(index))
            n = source.n_obs * np.outer(expressed, expressed)
            total += n * correlation
            weight += n
    np.divide(total, weight, out=total, where=weight > 0)
    n_expressed = int((np.diag(weight) > 0).sum())
    if n_expressed < dim:
        msg = f"{n_expressed} of {len(index)} genes are expressed in the sources; vectors of width {dim} need as many"
        raise ValueError(msg)
    values, vectors = eigh(total, subset_by_index=[len(index) - dim, len(index) - 1], overwrite_a=True)
    vectors, values = vectors[:, ::-1], values[::-1]
    # the sign of an eigenvector is arbitrary, and differs between machines
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dim)])
    vectors = vectors * np.sqrt(np.maximum(values, 0))
    return vectors / np.linalg.norm(vectors, axis=1).sum() * n_expressed


def _correlation(source: CellSource, columns: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation of genes over the cells of a source, and which genes vary there."""
    known = np.flatnonzero(columns >= 0)
    # names that are there twice are one gene
    selector = csr_matrix((np.ones(len(known)), (known, columns[known])), shape=(len(columns), n_genes))
    blocks = (_log_normalized(block.counts, selector) for block in source.blocks(_BLOCK))
    correlation = correlation_of_blocks(blocks, n_genes)
    varies = np.isfinite(np.diag(correlation))
    return np.nan_to_num(correlation), varies


def _log_normalized(counts: csr_matrix, selector: csr_matrix) -> csr_matrix:
    depth = np.asarray(counts.sum(1)).ravel()
    chosen = counts.astype(np.float64) @ selector
    scale = _TARGET_SUM / np.where(depth > 0, depth, 1)
    chosen.data = np.log1p(chosen.data * np.repeat(scale, np.diff(chosen.indptr)))
    return chosen
