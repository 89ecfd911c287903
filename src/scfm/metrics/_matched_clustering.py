"""Clusters of an embedding, as many as there are labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._clustering import clustering_agreement, label_silhouette
from ._labels import check_embedding, encode_complete
from ._neighbors import clusters_by_bisection, neighbor_graph, scaled_pca

if TYPE_CHECKING:
    from collections.abc import Sequence


def matched_clustering_scores(
    embedding: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    *,
    reference: np.ndarray | None = None,
    n_clusters: int | None = None,
    high: float = 2.0,
    max_steps: int = 120,
    n_neighbors: int = 15,
    n_comps: int = 50,
    random_state: int = 42,
) -> dict[str, float]:
    """Clusters of an embedding, as many as there are labels, beside the labels: the evaluation of scFoundation.

    The embedding is scaled and reduced by PCA; Leiden runs on its neighbour graph, with the resolution found by bisection.

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    labels
        Label of each cell, for example clusters of the data at full depth.
    reference
        Space in which the silhouette of the clusters is taken, ``(cells, dim)``, for example the PCA of the data at full
        depth. By default the silhouette is that of the labels in the PCA of the embedding.
    n_clusters
        Wanted number of clusters; by default the number of labels.
    high, max_steps
        Upper bound of the resolution; most clusterings that are tried.
    n_neighbors, n_comps
        Neighbours of the graph, principal components.
    random_state
        Seed.

    Returns
    -------
    ``NMI``, ``ARI``, ``SIL`` (silhouette, between -1 and 1; NaN if only one cluster was found), ``clusters`` (their number)
    and ``resolution``.

    References
    ----------
    Hao et al., scFoundation, Nature Methods 21, 1481 (2024).
    """
    embedding = check_embedding(embedding)
    codes, names = encode_complete(labels, "labels", len(embedding), least=2)
    space = scaled_pca(embedding, n_comps=n_comps, random_state=random_state)
    graph = neighbor_graph(space, n_neighbors=n_neighbors, random_state=random_state)
    clusters, resolution = clusters_by_bisection(
        graph, n_clusters or len(names), high=high, max_steps=max_steps, random_state=random_state
    )
    n_found = len(np.unique(clusters))
    if reference is None:
        silhouette = label_silhouette(space, codes)
    else:
        silhouette = label_silhouette(_check_rows(reference, embedding), clusters) if n_found > 1 else np.nan
    return {
        **clustering_agreement(codes, clusters),
        "SIL": silhouette,
        "clusters": n_found,
        "resolution": resolution,
    }


def _check_rows(reference: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    reference = check_embedding(reference)
    if len(reference) != len(embedding):
        msg = f"reference has {len(reference):,} cells, the embedding {len(embedding):,}"
        raise ValueError(msg)
    return reference
