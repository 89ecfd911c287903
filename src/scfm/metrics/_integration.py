"""Integration of batches: is the biology kept, are the batches mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import silhouette_samples

from .._optional import require
from ._clustering import clustering_agreement, label_silhouette
from ._labels import check_embedding, encode_complete
from ._neighbors import leiden_clusters, neighbor_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

# scIB's search for the best clustering
RESOLUTIONS = tuple(round(0.1 * step, 1) for step in range(1, 21))
_BIO_SHARE = 0.6


def integration_scores(
    embedding: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    batches: Sequence[str] | np.ndarray | None = None,
    *,
    unintegrated: np.ndarray | None = None,
    resolutions: Sequence[float] = RESOLUTIONS,
    n_neighbors: int = 15,
    random_state: int = 0,
) -> dict[str, float]:
    """Scores of an integrated embedding as the scGPT paper defines them; higher is better.

    Clusters are Leiden clusters at the resolution, of 0.1 to 2 in steps of 0.1, with the best NMI (scIB uses Louvain).

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    labels, batches
        Cell type and batch of each cell.
    unintegrated
        Representation before integration, for example HVG + PCA, ``(cells, dim)``; adds the PCR comparison.
    resolutions
        Resolutions that are tried.
    n_neighbors
        Neighbours of the graph.
    random_state
        Seed of neighbours and clusters.

    Returns
    -------
    ``NMI``, ``ARI``
        Of the clusters with the labels.
    ``ASW label``
        Silhouette of the labels, scaled to 0 to 1.
    ``ASW batch``
        :func:`batch_silhouette`.
    ``graph connectivity``
        :func:`graph_connectivity`.
    ``PCR comparison``
        By how much the variance that batches explain is smaller than in ``unintegrated``; absent without it.
    ``AvgBIO``
        Mean of NMI, ARI and ASW label.
    ``AvgBATCH``
        Mean of ASW batch and graph connectivity.
    ``Overall``
        0.6 AvgBIO + 0.4 AvgBATCH.

    Without batches, with one batch, or if no label is found in two batches, there is nothing to mix: ``ASW batch``,
    ``AvgBATCH`` and ``Overall`` are NaN, and without two batches ``PCR comparison`` too.

    Raises
    ------
    MissingExtraError
        If ``unintegrated`` is given and scib-metrics is not installed.
    ValueError
        If there are fewer than two labels, values are missing, or numbers of cells differ.

    References
    ----------
    Luecken et al., Nature Methods 19, 41 (2022); Cui et al., scGPT, Nature Methods 21, 1470 (2024).
    """
    embedding = check_embedding(embedding)
    codes, _ = encode_complete(labels, "labels", len(embedding), least=2)
    batch = np.zeros(len(codes), int) if batches is None else encode_complete(batches, "batches", len(embedding))[0]
    graph = neighbor_graph(embedding, n_neighbors=n_neighbors, random_state=random_state)
    tried = (leiden_clusters(graph, value, random_state=random_state) for value in resolutions)
    best = max((clustering_agreement(codes, clusters) for clusters in tried), key=lambda scores: scores["NMI"])
    scores = {
        "NMI": best["NMI"],
        "ARI": best["ARI"],
        "ASW label": (label_silhouette(embedding, codes) + 1) / 2,
        "ASW batch": batch_silhouette(embedding, codes, batch),
        "graph connectivity": graph_connectivity(graph, codes),
    }
    if unintegrated is not None:
        scib = require("scib_metrics", purpose="the PCR comparison")
        before = check_embedding(unintegrated)
        if len(before) != len(embedding):
            msg = f"unintegrated has {len(before):,} cells, the embedding {len(embedding):,}"
            raise ValueError(msg)
        scores["PCR comparison"] = np.nan
        if batch.max() > 0:
            pair = (np.ascontiguousarray(array, dtype=np.float32) for array in (before, embedding))
            scores["PCR comparison"] = float(scib.pcr_comparison(*pair, batch, categorical=True))
    scores["AvgBIO"] = (scores["NMI"] + scores["ARI"] + scores["ASW label"]) / 3
    scores["AvgBATCH"] = (scores["ASW batch"] + scores["graph connectivity"]) / 2
    scores["Overall"] = _BIO_SHARE * scores["AvgBIO"] + (1 - _BIO_SHARE) * scores["AvgBATCH"]
    return scores


def batch_silhouette(
    embedding: np.ndarray, labels: Sequence[str] | np.ndarray, batches: Sequence[str] | np.ndarray
) -> float:
    """Batch ASW of scIB, with which the scLong paper scores integration: 1 where batches overlap, 0 where they are apart.

    Within each label, 1 minus the absolute silhouette of the batches is averaged over cells, then over labels. Labels
    in one batch only, or with as many batches as cells, are left out. The value is that of ``silhouette_batch`` in
    scib-metrics, without a compilation for each size of a label.

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    labels, batches
        Cell type and batch of each cell.

    Returns
    -------
    Score between 0 and 1; NaN if no label is left.

    Raises
    ------
    ValueError
        If values are missing or numbers of cells differ.
    """
    embedding = check_embedding(embedding)
    codes, names = encode_complete(labels, "labels", len(embedding))
    batch, _ = encode_complete(batches, "batches", len(embedding))
    scores = []
    for label in range(len(names)):
        chosen = codes == label
        if 1 < len(np.unique(batch[chosen])) < chosen.sum():
            scores.append(1 - np.abs(silhouette_samples(embedding[chosen], batch[chosen])).mean())
    return float(np.mean(scores)) if scores else np.nan


def graph_connectivity(graph: csr_matrix, labels: Sequence[str] | np.ndarray) -> float:
    """Share of the cells of a label that hang together in the neighbour graph, averaged over labels.

    This is scIB's definition on the symmetric graph. The function of that name in scib-metrics takes the directed one,
    where a cell counts as connected only if it can be reached in both directions.

    Parameters
    ----------
    graph
        Symmetric matrix ``(cells, cells)``, for example of :func:`neighbor_graph`.
    labels
        Cell type of each cell.
    """
    codes, names = encode_complete(labels, "labels", graph.shape[0])
    edges = graph.tocoo()
    within = (codes[edges.row] == codes[edges.col]) & (edges.data != 0)
    same_label = edges.copy()
    same_label.row, same_label.col, same_label.data = edges.row[within], edges.col[within], edges.data[within]
    _, component = connected_components(same_label, directed=False)
    # a component lies within one label
    first = np.unique(component, return_index=True)[1]
    largest = np.zeros(len(names))
    np.maximum.at(largest, codes[first], np.bincount(component))
    return float((largest / np.bincount(codes)).mean())
