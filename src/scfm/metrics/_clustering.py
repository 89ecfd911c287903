"""How well clusters or an embedding agree with known labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

if TYPE_CHECKING:
    from collections.abc import Sequence


def clustering_agreement(labels: Sequence[str] | np.ndarray, clusters: Sequence[str] | np.ndarray) -> dict[str, float]:
    """Adjusted Rand index and normalised mutual information of clusters with labels.

    Parameters
    ----------
    labels, clusters
        Label and cluster of each cell, ``(cells,)``.

    Returns
    -------
    ``{"ARI": ..., "NMI": ...}``; 1 is perfect agreement, about 0 is chance.
    """
    labels, clusters = np.asarray(labels).astype(str), np.asarray(clusters).astype(str)
    return {
        "ARI": float(adjusted_rand_score(labels, clusters)),
        "NMI": float(normalized_mutual_info_score(labels, clusters)),
    }


def label_silhouette(embedding: np.ndarray, labels: Sequence[str] | np.ndarray) -> float:
    """Mean silhouette width of the labels in an embedding, between -1 and 1 (Euclidean distance).

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    labels
        Label of each cell.

    Raises
    ------
    ValueError
        If there are fewer than two labels, or as many as cells.
    """
    labels = np.asarray(labels).astype(str)
    n_labels = len(np.unique(labels))
    if not 2 <= n_labels < len(labels):
        msg = f"a silhouette needs at least two labels and fewer labels than cells; there are {n_labels} for {len(labels)} cells"
        raise ValueError(msg)
    return float(silhouette_score(embedding, labels))
