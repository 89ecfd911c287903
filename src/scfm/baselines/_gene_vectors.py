"""Vectors of genes without a foundation model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from ._networks import _expression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_COLUMNS = ("mean", "log mean", "variance", "log variance", "share of cells")


def random_gene_vectors(genes: Sequence[str], dim: int = 64, *, random_state: int = 0) -> pd.DataFrame:
    """Standard normal numbers for each gene, which say nothing about it.

    Parameters
    ----------
    genes
        Names of the genes.
    dim
        Width.
    random_state
        Seed. The vectors of a set of genes depend on their order.

    Returns
    -------
    One row for each gene, float32.
    """
    values = np.random.default_rng(random_state).standard_normal((len(genes), dim), dtype=np.float32)
    return pd.DataFrame(values, index=pd.Index(genes))


def expression_statistics(adata: AnnData, *, layer: str | None = None) -> pd.DataFrame:
    """How much, how variably and how often a gene is expressed.

    Parameters
    ----------
    adata
        Annotated data; it is not changed.
    layer
        Layer with the expression; by default ``X``.

    Returns
    -------
    One row for each gene, float32: ``mean``, ``variance``, their logarithms (``log1p``), and ``share of cells`` in which the
    gene is expressed.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If there are no cells, or values are negative or not finite.
    """
    values = _checked(adata, layer)
    n_cells = values.shape[0]
    mean = np.asarray(values.sum(axis=0)).ravel() / n_cells
    squares = np.bincount(
        values.indices, (values.data - mean[values.indices]) ** 2, minlength=values.shape[1]
    ) + mean**2 * (n_cells - np.bincount(values.indices, minlength=values.shape[1]))
    variance = squares / n_cells
    share = np.bincount(values.indices, minlength=values.shape[1]) / n_cells
    table = np.column_stack([mean, np.log1p(mean), variance, np.log1p(variance), share]).astype(np.float32)
    return pd.DataFrame(table, index=adata.var_names, columns=list(_COLUMNS))


def coexpression_vectors(
    adata: AnnData, dim: int = 64, *, n_contexts: int = 2000, layer: str | None = None, random_state: int = 0
) -> pd.DataFrame:
    """Vectors of genes from how often two of them are expressed in the same cell, in the manner of gene2vec.

    gene2vec learns vectors from pairs of co-expressed genes with word2vec, which factorises the pointwise mutual information
    of such pairs (Levy & Goldberg, 2014). Here its positive part is factorised by a singular value decomposition.

    Parameters
    ----------
    adata
        Annotated data; it is not changed. A value above zero is expression.
    dim
        Width; fewer if there are fewer genes.
    n_contexts
        Number of genes, those that most cells express, with which every gene is paired; it bounds the memory.
    layer
        Layer with the expression; by default ``X``.
    random_state
        Seed of the decomposition.

    Returns
    -------
    One row for each gene, float32; NaN for genes that no cell expresses.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If there are no cells, or values are negative or not finite.

    References
    ----------
    Du et al., Gene2vec, BMC Genomics 20 (Suppl 1), 82 (2019).
    """
    values = _checked(adata, layer)
    n_cells = np.bincount(values.indices, minlength=values.shape[1])
    expressed = np.flatnonzero(n_cells)
    contexts = np.sort(np.argsort(-n_cells[expressed], kind="stable")[:n_contexts])
    dim = max(1, min(dim, len(contexts) - 1))
    out = np.full((values.shape[1], dim), np.nan, dtype=np.float32)
    if len(expressed) > 1:
        cells = values[:, expressed]
        cells.data = np.ones_like(cells.data)
        svd = TruncatedSVD(dim, random_state=random_state)
        # half of the singular values for genes, half for their contexts, as in word2vec
        vectors = svd.fit_transform(_mutual_information(cells, contexts))
        out[expressed] = vectors / np.sqrt(np.maximum(svd.singular_values_, 1e-12))
    return pd.DataFrame(out, index=adata.var_names)


def _mutual_information(cells: sparse.csr_matrix, contexts: np.ndarray) -> sparse.csr_matrix:
    """Positive pointwise mutual information of genes and contexts, a gene with itself left out."""
    pairs = sparse.coo_matrix(cells.T @ cells[:, contexts])
    different = pairs.row != contexts[pairs.col]
    row, column, together = pairs.row[different], pairs.col[different], pairs.data[different]
    of_gene = np.bincount(row, together, minlength=pairs.shape[0])
    of_context = np.bincount(column, together, minlength=pairs.shape[1])
    information = np.log(together * together.sum() / (of_gene[row] * of_context[column]))
    positive = information > 0
    return sparse.csr_matrix((information[positive], (row[positive], column[positive])), shape=pairs.shape)


def _checked(adata: AnnData, layer: str | None) -> sparse.csr_matrix:
    values = sparse.csr_matrix(_expression(adata, layer), dtype=np.float64, copy=True)
    values.sum_duplicates()
    values.eliminate_zeros()
    if not values.shape[0] or not np.isfinite(values.data).all() or (values.data < 0).any():
        msg = (
            "there are no cells"
            if not values.shape[0]
            else "expression holds negative values, or values that are not finite"
        )
        raise ValueError(msg)
    return values
