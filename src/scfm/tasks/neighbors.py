"""Labels from nearest neighbours: exact search, and votes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ._search import Rows, Search, slices

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Metric = Literal["euclidean", "cosine"]
Index = Literal["exact", "faiss"]
Weights = Literal["uniform", "distance", "proportion"]
_CHOICES = {"metric": Metric, "index": Index, "weights": Weights}

# of the votes of a cell, scGPT's atlas mode ignores this share for each label
_NOISE = 0.01


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Nearest reference rows of each query row, the nearest first.

    Parameters
    ----------
    distances
        Squared Euclidean distances, or cosine distances (1 minus the cosine), float64, shape ``(queries, k)``; NaN where
        there is no neighbour.
    indices
        Row numbers in the reference, int64, shape ``(queries, k)``; -1 where there is no neighbour.
    metric
        Which of the two distances it is.
    """

    distances: NDArray[np.float64]
    indices: NDArray[np.int64]
    metric: Metric = "euclidean"

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Votes:
    """Labels that the neighbours of each cell voted for.

    Parameters
    ----------
    codes
        Number of the winning label, int64, shape ``(cells,)``; -1 for cells without votes.
    confidence
        Share of the votes that the winner has, float64, shape ``(cells,)``; NaN for cells without votes.
    probabilities
        Share of the votes of every label, float32, shape ``(cells, labels)``; NaN for cells without votes.
    """

    codes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.codes)


# -- search --------------------------------------------------------------------------------------------------------------


def find_neighbors(
    reference: ArrayLike,
    query: ArrayLike,
    k: int,
    *,
    metric: Metric = "euclidean",
    index: Index = "exact",
    block_bytes: int = 256 * 2**20,
) -> Neighbors:
    """Exact nearest neighbours of each query row among the reference rows.

    Candidates come from matrix products in float32, with a bound on their rounding errors; what is returned are
    distances computed in float64 from the rows themselves, and the search is widened where the bound leaves a doubt.
    The result therefore depends neither on the size of blocks nor on which index gave the candidates. Of equally
    distant rows the first in the reference is nearer.

    Parameters
    ----------
    reference
        Rows among which neighbours are sought, shape ``(rows, dim)``. Rows with a value that is not finite, and with
        the cosine rows of zeros, are never neighbours.
    query
        Rows whose neighbours are sought, shape ``(queries, dim)``; such rows have no neighbours there.
    k
        Number of neighbours.
    metric
        ``"euclidean"`` (distances are squared) or ``"cosine"``.
    index
        Where candidates come from: ``"exact"``, or a flat index of faiss.
    block_bytes
        About how much memory the search may take beside its input, and beside the copy that faiss keeps.

    Raises
    ------
    MissingExtraError
        If ``index="faiss"`` and faiss is not installed.
    ValueError
        If shapes do not fit, ``k`` is not between 1 and the number of usable reference rows, or an option is unknown.
    """
    check_choices(metric=metric, index=index)
    reference, query = _matrix("reference", reference), _matrix("query", query)
    if reference.shape[1] != query.shape[1]:
        msg = (
            f"the reference has {reference.shape[1]} columns and the query {query.shape[1]}; "
            "both must be embedded by the same model"
        )
        raise ValueError(msg)
    usable = Rows.of(reference, unit=metric == "cosine", block_bytes=block_bytes)
    check_k(k, len(usable), f"rows with values ({len(reference):,} in all)")
    sought = Rows.of(query, unit=metric == "cosine", block_bytes=block_bytes)

    distances = np.full((len(query), k), np.nan)
    indices = np.full((len(query), k), -1, dtype=np.int64)
    if len(sought):
        search = Search.prepare(usable, faiss=index == "faiss", block_bytes=block_bytes)
        for start in range(0, len(sought), search.query_rows):
            rows = sought.numbers[start : start + search.query_rows]
            found, where = search.nearest(sought.take(slice(start, start + search.query_rows)), k)
            distances[rows], indices[rows] = found, usable.numbers[where]
    return Neighbors(distances / 2 if metric == "cosine" else distances, indices, metric)


def check_k(k: int, available: int, what: str) -> None:
    """Raise ``ValueError`` unless there are ``k`` neighbours to be found."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        msg = f"k must be a positive whole number; got {k!r}"
        raise ValueError(msg)
    if k > available:
        msg = f"k={k} neighbours were asked for, but the reference has {available:,} {what}; choose a smaller k"
        raise ValueError(msg)


# -- votes ---------------------------------------------------------------------------------------------------------------


def vote(
    neighbors: Neighbors,
    codes: ArrayLike,
    n_labels: int,
    *,
    weights: Weights = "uniform",
    proportions: ArrayLike | None = None,
    block_bytes: int = 256 * 2**20,
) -> Votes:
    """Let the neighbours of each cell vote for its label.

    Of labels with equally many votes, the one with the nearest neighbour wins; if these are equally far away too, the
    first label.

    Parameters
    ----------
    neighbors
        Neighbours from :func:`find_neighbors`. Places without a neighbour have no vote.
    codes
        Number of the label of each reference row, shape ``(rows,)``; rows with -1 have no vote.
    n_labels
        Number of labels.
    weights
        ``"uniform"``
            Every neighbour has one vote.
        ``"distance"``
            Votes are divided by the (not squared) distance; neighbours at distance zero outvote all others.
        ``"proportion"``
            From the votes of each label, 1% of the number of neighbours is taken away, down to zero, and the rest is
            divided by the label's proportion in the reference, so that rare labels have a chance (the weighted vote of
            the atlas mode of scGPT, Cui et al., Nature Methods 2024). A cell has no label if nothing is left.
    proportions
        Proportion of each label for ``weights="proportion"``, shape ``(n_labels,)``; by default those of ``codes``.
    block_bytes
        About how much memory may be taken beside the result.

    Raises
    ------
    ValueError
        If a code or neighbour is out of range, or ``weights`` is unknown.
    """
    check_choices(weights=weights)
    if n_labels < 1:
        msg = f"a vote needs at least one label; n_labels is {n_labels}"
        raise ValueError(msg)
    codes = np.asarray(codes)
    if codes.ndim != 1 or codes.dtype.kind not in "iu" or codes.min(initial=0) < -1 or codes.max(initial=0) >= n_labels:
        msg = f"codes must be whole numbers from 0 to {n_labels - 1} in one dimension, with -1 where there is no label"
        raise ValueError(msg)
    if neighbors.indices.max(initial=-1) >= len(codes):
        msg = f"there are {len(codes):,} labels, but a neighbour has number {neighbors.indices.max():,}"
        raise ValueError(msg)
    if proportions is None:
        proportions = label_proportions(codes, n_labels) if weights == "proportion" else None
    elif np.shape(proportions) != (n_labels,):
        msg = f"proportions must have one entry for each of the {n_labels} labels; the shape is {np.shape(proportions)}"
        raise ValueError(msg)

    out = Votes(
        np.full(len(neighbors), -1, dtype=np.int64),
        np.full(len(neighbors), np.nan),
        np.full((len(neighbors), n_labels), np.nan, dtype=np.float32),
    )
    per_cell = 40 * (n_labels + neighbors.indices.shape[1])
    for part in slices(len(neighbors), block_bytes // per_cell):
        indices, distances = neighbors.indices[part], neighbors.distances[part]
        labels = np.where(indices >= 0, codes[indices] if len(codes) else -1, -1)
        counted = labels >= 0
        strength = _strength(distances, neighbors.metric, counted) if weights == "distance" else None
        table = _tally(labels, counted, n_labels, strength)
        if weights == "proportion":
            table = np.maximum(table - _NOISE * indices.shape[1], 0.0)
            table = np.divide(table, proportions, out=np.zeros_like(table), where=table > 0)
        total = table.sum(1)
        some = total > 0
        share = table[some] / total[some, None]
        winner = _winners(table[some], labels[some], distances[some])
        cells = np.arange(len(neighbors))[part][some]
        out.codes[cells] = winner
        out.confidence[cells] = share[np.arange(len(winner)), winner]
        out.probabilities[cells] = share
    return out


def label_proportions(codes: NDArray[np.integer], n_labels: int) -> NDArray[np.float64]:
    """Share of each label among the rows that have one, shape ``(n_labels,)``."""
    counts = np.bincount(codes[codes >= 0], minlength=n_labels)
    return counts / max(1, counts.sum())


def _strength(distances: NDArray[np.float64], metric: Metric, counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Votes by inverse distance, scaled so that the nearest neighbour has one."""
    lengths = np.where(counted, np.sqrt(distances) if metric == "euclidean" else distances, np.inf)
    nearest = lengths.min(1, keepdims=True)
    # zero by zero is the nearest neighbour itself
    ratio = np.divide(nearest, lengths, out=np.ones_like(lengths), where=(lengths > 0) & counted)
    return np.where(counted, ratio, 0.0)


def _tally(
    labels: NDArray[np.integer], counted: NDArray[np.bool_], n_labels: int, strength: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Votes of each label, ``(cells, n_labels)``."""
    cells, _ = np.nonzero(counted)
    flat = cells * n_labels + labels[counted]
    votes = np.bincount(flat, weights=None if strength is None else strength[counted], minlength=len(labels) * n_labels)
    return votes.reshape(len(labels), n_labels).astype(np.float64)


def _winners(
    table: NDArray[np.float64], labels: NDArray[np.integer], distances: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Label with most votes; among several, the one whose nearest neighbour is nearest, then the first."""
    best = table == table.max(1, keepdims=True)
    winner = best.argmax(1)
    tied = np.flatnonzero(best.sum(1) > 1)
    if len(tied):
        nearest = np.full((len(tied), table.shape[1]), np.inf)
        row, column = np.nonzero(labels[tied] >= 0)
        np.minimum.at(nearest, (row, labels[tied][row, column]), distances[tied][row, column])
        winner[tied] = np.where(best[tied], nearest, np.inf).argmin(1)
    return winner


# -- checks --------------------------------------------------------------------------------------------------------------


def _matrix(name: str, values: ArrayLike) -> NDArray:
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind not in "fiub":
        msg = f"the {name} must be a numeric array of shape (rows, dim); got {values.dtype} of shape {values.shape}"
        raise ValueError(msg)
    return values


def check_choices(**chosen: str) -> None:
    """Raise ``ValueError`` unless ``metric``, ``index`` and ``weights`` are what the functions here know."""
    for name, value in chosen.items():
        known = get_args(_CHOICES[name])
        if value not in known:
            msg = f"{name} must be one of {', '.join(known)}; got {value!r}"
            raise ValueError(msg)
