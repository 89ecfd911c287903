"""Cell types from a reference by the two standard classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from .._counts import CountStats

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin


class LabelPrediction(NamedTuple):
    """Predicted labels of cells.

    Attributes
    ----------
    labels
        Most probable label of each cell; of equal ones the first in alphabetical order.
    probabilities
        Cells by labels; rows sum to 1.
    """

    labels: pd.Series
    probabilities: pd.DataFrame


def knn_labels(
    reference: AnnData,
    query: AnnData,
    labels_key: str,
    *,
    layer: str | None = None,
    n_neighbors: int = 15,
    n_top_genes: int = 2000,
    metric: Literal["euclidean", "cosine"] = "euclidean",
) -> LabelPrediction:
    """Label query cells by the nearest reference cells, on log-normalised highly variable genes of the reference.

    Parameters
    ----------
    reference
        Labelled data; cells without a label are left out. It is not changed.
    query
        Data to label. It is not changed.
    labels_key
        Column of ``reference.obs`` with the labels.
    layer
        Layer of both with raw counts; by default ``X``.
    n_neighbors
        Neighbours that vote (all if there are fewer); probabilities are their shares.
    n_top_genes
        Highly variable genes among those that both data sets have.
    metric
        Distance between cells.

    Returns
    -------
    Labels and probabilities, with the names of the query cells as index.

    Raises
    ------
    KeyError
        If a column or layer does not exist.
    ValueError
        If no genes are shared, gene names are not unique, there are fewer than two labels, or the values cannot be counts.
    """
    cells, target, genes = _features(reference, query, labels_key, layer, n_top_genes)
    model = KNeighborsClassifier(min(n_neighbors, len(target)), metric=metric, algorithm="brute")
    return _classify(model, cells, target, genes, query)


def logistic_labels(
    reference: AnnData,
    query: AnnData,
    labels_key: str,
    *,
    layer: str | None = None,
    C: float = 1.0,
    n_top_genes: int = 2000,
    class_weight: Literal["balanced"] | None = None,
    max_iter: int = 1000,
) -> LabelPrediction:
    """Label query cells by multinomial logistic regression on log-normalised highly variable genes of the reference.

    Parameters
    ----------
    reference, query, labels_key, layer, n_top_genes
        As in :func:`knn_labels`.
    C
        Inverse strength of the L2 penalty.
    class_weight
        ``"balanced"`` weights classes inversely to their number of cells.
    max_iter
        Most iterations of the solver.

    Returns
    -------
    Labels and probabilities, with the names of the query cells as index.

    Raises
    ------
    KeyError, ValueError
        As in :func:`knn_labels`.
    """
    cells, target, genes = _features(reference, query, labels_key, layer, n_top_genes)
    model = LogisticRegression(C=C, class_weight=class_weight, max_iter=max_iter)
    return _classify(model, cells, target, genes, query)


def _classify(
    model: ClassifierMixin, cells: sparse.csr_matrix, target: np.ndarray, genes: sparse.csr_matrix, query: AnnData
) -> LabelPrediction:
    probabilities = model.fit(cells, target).predict_proba(genes)
    table = pd.DataFrame(probabilities, index=query.obs_names, columns=pd.Index(model.classes_, name="label"))
    labels = model.classes_[probabilities.argmax(1)]
    return LabelPrediction(pd.Series(labels, index=query.obs_names, name="label"), table)


def _features(
    reference: AnnData, query: AnnData, labels_key: str, layer: str | None, n_top_genes: int
) -> tuple[sparse.csr_matrix, np.ndarray, sparse.csr_matrix]:
    """Log-normalised values of reference and query, with the labels of the former."""
    if labels_key not in reference.obs:
        columns = ", ".join(map(str, reference.obs.columns)) or "none"
        msg = f"obs of the reference has no column {labels_key!r}; there are {columns}"
        raise KeyError(msg)
    labels = reference.obs[labels_key]
    labelled = labels.notna().to_numpy()
    target = labels[labelled].astype(str).to_numpy()
    if len(np.unique(target)) < 2:
        msg = f"obs[{labels_key!r}] of the reference has {len(np.unique(target))} label(s); a classifier needs at least two"
        raise ValueError(msg)
    for name, adata in {"reference": reference, "query": query}.items():
        if not adata.var_names.is_unique:
            msg = f"the {name} has gene names that are there twice; make them unique or sum the columns first"
            raise ValueError(msg)
    shared = reference.var_names.intersection(query.var_names, sort=False)
    if not len(shared):
        msg = (
            "reference and query share no gene names: "
            f"{', '.join(reference.var_names[:3])} ... and {', '.join(query.var_names[:3])} ..."
        )
        raise ValueError(msg)
    known = AnnData(_log_normalized(reference, layer, shared, "reference")[labelled])
    asked = _log_normalized(query, layer, shared, "query")
    if known.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(known, n_top_genes=n_top_genes)
        chosen = np.flatnonzero(known.var["highly_variable"])
        return known.X[:, chosen], target, asked[:, chosen]
    return known.X, target, asked


def _log_normalized(adata: AnnData, layer: str | None, genes: pd.Index, name: str) -> sparse.csr_matrix:
    """Log of counts per 10,000 of the shared genes, so that panels of different size are on one scale."""
    if layer is not None and layer not in adata.layers:
        msg = f"the {name} has no layer {layer!r}; there are {', '.join(adata.layers) or 'none'}"
        raise KeyError(msg)
    counts = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32)
    stats = CountStats().update(counts)
    # fractions that are no transformed counts, such as estimated counts, are fine here
    if stats.n_nan or stats.n_infinite or stats.n_negative or stats.kind == "log-normalized":
        msg = f"{'X' if layer is None else f'layer {layer!r}'} of the {name} {stats.problem()}. {stats.remedy()}"
        raise ValueError(msg)
    work = AnnData(counts[:, adata.var_names.get_indexer(genes)])
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    return work.X
