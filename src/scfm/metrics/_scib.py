"""Scores of the single-cell integration benchmark, computed by scib-metrics."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from .._optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

# as scib-metrics' own benchmark has them
_NEIGHBORS = 90
_GRAPH_NEIGHBORS = 15


def has_scib() -> bool:
    """Whether scib-metrics is installed."""
    return find_spec("scib_metrics") is not None


def scib_scores(
    embedding: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    batches: Sequence[str] | np.ndarray | None = None,
    *,
    random_state: int = 0,
) -> dict[str, float]:
    """Scores of Luecken et al. (Nature Methods 2022) between 0 and 1, higher is better.

    Parameters
    ----------
    embedding
        One row per cell, ``(cells, dim)``.
    labels, batches
        Label and batch of each cell.
    random_state
        Seed of the neighbour search.

    Returns
    -------
    ``cLISI`` (neighbours have the same label); with batches also ``isolated labels`` (silhouette of labels that few
    batches have), ``batch silhouette`` (1 minus the absolute silhouette of batches within labels), ``iLISI``
    (neighbours are from all batches) and ``graph connectivity`` (cells of a label are connected).

    Raises
    ------
    MissingExtraError
        If scib-metrics is not installed.
    ValueError
        If there are fewer than two labels or batches.
    """
    scib = require("scib_metrics", purpose="integration scores")
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    groups = {"labels": labels} | ({} if batches is None else {"batches": batches})
    codes = {}
    for name, values in groups.items():
        _, codes[name] = np.unique(np.asarray(values).astype(str), return_inverse=True)
        if codes[name].max(initial=0) == 0:
            msg = f"integration scores need at least two {name}"
            raise ValueError(msg)
    n_neighbors = min(_NEIGHBORS, len(embedding) - 1)
    neighbors = scib.nearest_neighbors.pynndescent(embedding, n_neighbors=n_neighbors, random_state=random_state)
    out = {"cLISI": scib.clisi_knn(neighbors, codes["labels"])}
    if batches is not None:
        both = codes["labels"], codes["batches"]
        out["isolated labels"] = scib.isolated_labels(embedding, *both)
        out["batch silhouette"] = scib.silhouette_batch(embedding, *both)
        out["iLISI"] = scib.ilisi_knn(neighbors, codes["batches"])
        out["graph connectivity"] = scib.graph_connectivity(
            neighbors.subset_neighbors(n=min(_GRAPH_NEIGHBORS, n_neighbors)), codes["labels"]
        )
    return {name: float(value) for name, value in out.items()}
