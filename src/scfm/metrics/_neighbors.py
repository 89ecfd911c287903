"""Neighbour graphs of embeddings, and clusters on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# bounds of the resolution that are no longer worth a clustering between them
_CLOSE = 1e-6


def neighbor_graph(embedding: np.ndarray, *, n_neighbors: int = 15, random_state: int = 0) -> csr_matrix:
    """Weighted graph of nearest neighbours, as :func:`scanpy.pp.neighbors` makes it.

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    n_neighbors
        Neighbours of each cell, itself included (fewer if there are fewer cells).
    random_state
        Seed of the search, which is exact for small data.

    Returns
    -------
    Symmetric matrix ``(cells, cells)`` with weights between 0 and 1.
    """
    work = _cells(len(embedding))
    work.obsm["X"] = np.asarray(embedding)
    sc.pp.neighbors(work, n_neighbors=min(n_neighbors, work.n_obs), use_rep="X", random_state=random_state)
    return work.obsp["connectivities"].tocsr()


def leiden_clusters(graph: csr_matrix, resolution: float = 1.0, *, random_state: int = 0) -> np.ndarray:
    """Leiden clusters of a neighbour graph (igraph, modularity, two iterations).

    Parameters
    ----------
    graph
        Symmetric matrix ``(cells, cells)`` of weights.
    resolution
        Larger values give more clusters.
    random_state
        Seed.

    Returns
    -------
    Number of the cluster of each cell.
    """
    work = _cells(graph.shape[0])
    sc.tl.leiden(
        work, resolution, adjacency=graph, random_state=random_state, flavor="igraph", n_iterations=2, directed=False
    )
    return work.obs["leiden"].to_numpy().astype(np.int64)


def clusters_by_bisection(
    graph: csr_matrix,
    n_clusters: int,
    *,
    low: float = 0.0,
    high: float = 2.0,
    max_steps: int = 20,
    random_state: int = 0,
) -> tuple[np.ndarray, float]:
    """Leiden clusters of a wanted number, found by bisection of the resolution.

    Numbers of clusters jump, so the wanted one may not exist; then the closest that was met is given.

    Parameters
    ----------
    graph
        Symmetric matrix ``(cells, cells)`` of weights.
    n_clusters
        Wanted number of clusters.
    low, high
        Bounds of the resolution.
    max_steps
        Most clusterings that are tried; fewer if the bounds meet before.
    random_state
        Seed of each clustering.

    Returns
    -------
    clusters
        Number of the cluster of each cell.
    resolution
        Resolution that gave them.

    References
    ----------
    Evaluation of Hao et al., scFoundation, Nature Methods 21, 1481 (2024).
    """
    if not 1 <= n_clusters <= graph.shape[0] or max_steps < 1:
        msg = f"cannot make {n_clusters} clusters of {graph.shape[0]:,} cells in {max_steps} steps"
        raise ValueError(msg)
    best: tuple[int, float, np.ndarray] | None = None
    for _ in range(max_steps):
        middle = (low + high) / 2
        clusters = leiden_clusters(graph, middle, random_state=random_state)
        n = len(np.unique(clusters))
        if best is None or (abs(n - n_clusters), middle) < best[:2]:
            best = abs(n - n_clusters), middle, clusters
        if n == n_clusters or high - low < _CLOSE:
            break
        low, high = (middle, high) if n < n_clusters else (low, middle)
    return best[2], best[1]


def scaled_pca(embedding: np.ndarray, *, n_comps: int = 50, random_state: int = 0) -> np.ndarray:
    """PCA of an embedding whose columns were scaled to unit variance.

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    n_comps
        Principal components (fewer if the embedding is smaller).
    random_state
        Seed of the solver.
    """
    work = AnnData(np.array(embedding, dtype=np.float32), obs=_cells(len(embedding)).obs)
    sc.pp.scale(work)
    if (n_comps := min(n_comps, work.n_obs - 1, work.n_vars - 1)) < 1:
        return work.X
    sc.pp.pca(work, n_comps=n_comps, random_state=random_state)
    return work.obsm["X_pca"]


def _cells(n: int) -> AnnData:
    return AnnData(obs=pd.DataFrame(index=pd.RangeIndex(n).astype(str)))
