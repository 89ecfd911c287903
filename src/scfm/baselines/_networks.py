"""Regulatory networks without a foundation model, and networks that know nothing but how many edges a gene has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _logging
from .._optional import require
from ..metrics import edges_from_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

Method = Literal["pearson", "spearman"]
# in each round every edge is offered one exchange
_ROUNDS = 40
# settings of arboreto's GRNBoost2
_EARLY_STOP = 25


def correlation_matrix(values: sparse.spmatrix | np.ndarray, method: Method = "pearson") -> np.ndarray:
    """Correlations of all genes over cells; the cells are never made dense.

    Parameters
    ----------
    values
        Expression, ``(cells, genes)``.
    method
        ``"pearson"`` or ``"spearman"`` (of ranks, ties share their mean).

    Returns
    -------
    Matrix ``(genes, genes)`` of float64; genes that are the same in all cells correlate with nothing, not even themselves.

    Raises
    ------
    ValueError
        If the method is unknown, there are fewer than two cells, or values are not finite.
    """
    if method not in ("pearson", "spearman"):
        msg = f"method must be 'pearson' or 'spearman'; got {method!r}"
        raise ValueError(msg)
    table = sparse.csc_matrix(values, dtype=np.float64, copy=True)
    table.sum_duplicates()
    table.eliminate_zeros()
    if table.shape[0] < 2 or not np.isfinite(table.data).all():
        msg = (
            "a correlation needs at least two cells"
            if table.shape[0] < 2
            else "expression holds values that are not finite"
        )
        raise ValueError(msg)
    if method == "spearman":
        table.data = _ranks(table)
    n_cells = table.shape[0]
    mean = np.asarray(table.mean(axis=0)).ravel()
    products = np.asarray((table.T @ table).todense())
    covariance = products / n_cells - np.outer(mean, mean)
    variance = np.diag(covariance)
    # what is left of a gene without variance is rounding
    varies = variance > 1e-12 * np.maximum(np.diag(products) / n_cells, np.finfo(float).tiny)
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    return np.clip(covariance * np.outer(scale, scale), -1, 1)


def _ranks(table: sparse.csc_matrix) -> np.ndarray:
    """Rank of each stored value among the cells of its gene, less the rank of a zero, so that zeros stay what they are."""
    column = np.repeat(np.arange(table.shape[1]), np.diff(table.indptr))
    order = np.lexsort((table.data, column))
    data, place = table.data[order], column[order]
    rank = np.arange(len(data)) - table.indptr[place] + 1.0
    new = np.ones(len(data), dtype=bool)
    new[1:] = (data[1:] != data[:-1]) | (place[1:] != place[:-1])
    group = np.cumsum(new) - 1
    rank = (np.bincount(group, rank) / np.bincount(group))[group] if len(data) else rank
    n_zeros = table.shape[0] - np.diff(table.indptr)
    n_negative = np.bincount(column[table.data < 0], minlength=table.shape[1])
    of_zero = n_negative + (n_zeros + 1) / 2
    out = np.empty(len(data))
    out[order] = rank + np.where(data > 0, n_zeros[place], 0) - of_zero[place]
    return out


def correlation_network(
    adata: AnnData,
    *,
    layer: str | None = None,
    method: Method = "pearson",
    tfs: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Edges between genes whose expression correlates, in either direction.

    Parameters
    ----------
    adata
        Annotated data with normalised expression; it is not changed.
    layer
        Layer with the expression; by default ``X``.
    method
        See :func:`correlation_matrix`.
    tfs
        Genes that may be sources; by default all.

    Returns
    -------
    Table with ``source``, ``target`` and ``weight`` (the absolute correlation), the strongest first.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        As in :func:`correlation_matrix`.
    """
    correlation = np.abs(correlation_matrix(_expression(adata, layer), method))
    np.fill_diagonal(correlation, 0)
    return edges_from_matrix(correlation, adata.var_names, sources=tfs)


def grnboost2_network(
    adata: AnnData, *, layer: str | None = None, tfs: Sequence[str] | None = None, random_state: int = 0
) -> pd.DataFrame:
    """Edges by GRNBoost2: how much a source helps gradient-boosted trees to predict a target.

    Targets are done one after the other, without dask.

    Parameters
    ----------
    adata, layer, tfs
        As in :func:`correlation_network`.
    random_state
        Seed.

    Returns
    -------
    Table with ``source``, ``target`` and ``weight``, the strongest first.

    Raises
    ------
    KeyError
        If the layer does not exist.
    MissingExtraError
        If arboreto is not installed.
    ValueError
        If no gene is a source.

    References
    ----------
    Moerman et al., GRNBoost2 and Arboreto, Bioinformatics 35, 2159 (2019).
    """
    core = require("arboreto.core", purpose="the GRNBoost2 baseline")
    names = adata.var_names.to_numpy(dtype=str)
    sources = names if tfs is None else names[np.isin(names, np.asarray(list(tfs), dtype=str))]
    if not len(sources):
        msg = "none of tfs= is a gene of the data"
        raise ValueError(msg)
    values = sparse.csc_matrix(_expression(adata, layer), dtype=np.float64)
    regulators = values[:, adata.var_names.get_indexer(sources)].toarray()
    parts = [
        core.infer_partial_network(
            regressor_type="GBM",
            regressor_kwargs=core.SGBM_KWARGS,
            tf_matrix=regulators,
            tf_matrix_gene_names=list(sources),
            target_gene_name=name,
            target_gene_expression=values[:, [column]].toarray().ravel(),
            include_meta=False,
            early_stop_window_length=_EARLY_STOP,
            seed=random_state,
        )
        for column, name in enumerate(names)
        if values[:, [column]].nnz
    ]
    edges = pd.concat(parts, ignore_index=True).set_axis(["source", "target", "weight"], axis=1)
    edges["weight"] = edges["weight"].astype(float)
    return edges.sort_values("weight", ascending=False, kind="stable", ignore_index=True)


def shuffled_network(edges: pd.DataFrame, *, random_state: int = 0) -> pd.DataFrame:
    """Another network in which each gene has as many targets, and as many sources, as before.

    Pairs of edges exchange their targets, again and again, wherever that gives neither an edge that is there already nor one
    of a gene with itself. What such a network achieves is due to the numbers of edges alone.

    Parameters
    ----------
    edges
        Network with the columns ``source`` and ``target``, each edge once. Other columns stay with the source.
    random_state
        Seed.

    Returns
    -------
    A table like ``edges``. A network that has no other of the same degrees, such as one with all edges, comes back as it was,
    with a warning.

    Raises
    ------
    ValueError
        If a column is missing, or an edge is there twice.
    """
    if absent := [name for name in ("source", "target") if name not in edges]:
        msg = f"edges lacks the column {', '.join(absent)}"
        raise ValueError(msg)
    n = len(edges)
    names, codes = np.unique(
        np.concatenate([edges[name].to_numpy(dtype=str) for name in ("source", "target")]), return_inverse=True
    )
    source, target = codes[:n].astype(np.int64), codes[n:].astype(np.int64)
    key = source * len(names) + target
    if len(np.unique(key)) < n:
        msg = "an edge is there twice; call edges.drop_duplicates(['source', 'target']) first"
        raise ValueError(msg)
    before = key
    rng = np.random.default_rng(random_state)
    for _ in range(_ROUNDS):
        first, second = np.split(rng.permutation(n)[: n - n % 2], 2)
        one, other = source[first] * len(names) + target[second], source[second] * len(names) + target[first]
        proposed, times = np.unique(np.concatenate([one, other]), return_counts=True)
        taken = np.union1d(key, proposed[times > 1])
        own = (source[first] == target[second]) | (source[second] == target[first])
        swap = ~np.isin(one, taken) & ~np.isin(other, taken) & ~own
        a, b = first[swap], second[swap]
        target[a], target[b] = target[b], target[a]
        key = source * len(names) + target
    if n and np.isin(key, before).all():
        _logging.warning("the shuffled network is the same as before: there is no other with these numbers of edges")
    return edges.assign(source=names[source], target=names[target])


def _expression(adata: AnnData, layer: str | None) -> sparse.spmatrix | np.ndarray:
    if layer is not None and layer not in adata.layers:
        msg = f"there is no layer {layer!r}; there are {', '.join(adata.layers) or 'none'}"
        raise KeyError(msg)
    return adata.X if layer is None else adata.layers[layer]
