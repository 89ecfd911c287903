"""From scores of all pairs of genes to the edges of a network, a few genes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_BLOCK_VALUES = 2**23
_MOST_EDGES = 20_000_000


@dataclass(frozen=True)
class Edges:
    """Edges between genes that are given by number.

    Parameters
    ----------
    source, target
        Numbers of the genes, ``(edges,)``.
    weight
        Score of each edge, ``(edges,)``.
    """

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    def undirected(self, n: int) -> Edges:
        """Each pair once, the gene with the smaller number as source."""
        low, high = np.minimum(self.source, self.target), np.maximum(self.source, self.target)
        _, first = np.unique(low.astype(np.int64) * n + high, return_index=True)
        return Edges(low[first], high[first], self.weight[first])

    def strongest_first(self) -> Edges:
        """Ordered by weight, then by the numbers of the genes."""
        order = np.lexsort((self.target, self.source, -self.weight))
        return Edges(self.source[order], self.target[order], self.weight[order])

    def matrix(self, columns: np.ndarray, n_vars: int, *, symmetric: bool) -> sparse.csr_matrix:
        """Weights as a sparse matrix of sources by targets.

        Parameters
        ----------
        columns
            Place of each gene among ``n_vars``.
        symmetric
            Whether an edge goes both ways.
        """
        source, target, weight = columns[self.source], columns[self.target], self.weight.astype(np.float32)
        if symmetric:
            other = source != target
            source, target = np.concatenate([source, target[other]]), np.concatenate([target, source[other]])
            weight = np.concatenate([weight, weight[other]])
        return sparse.csr_matrix((weight, (source, target)), shape=(n_vars, n_vars))


def cosine_blocks(values: np.ndarray, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cosine of some genes with all genes, a few at a time.

    Parameters
    ----------
    values
        Vectors of the genes, ``(genes, dim)``; a vector of zeros has cosine 0 with all others.
    rows
        Numbers of the genes; all by default.

    Yields
    ------
    Numbers of some genes, and their cosines, ``(some genes, genes)``, in float64.
    """
    values = values.astype(np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(length > 0, length, 1)
    rows = np.arange(len(unit)) if rows is None else rows
    step = max(1, _BLOCK_VALUES // len(unit))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        yield some, unit[some] @ unit.T


def select_edges(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    self_loops: bool = False,
) -> Edges:
    """Edges whose score is high enough, or among the highest of their source.

    Parameters
    ----------
    blocks
        Numbers of some sources, and their scores for all genes, ``(sources, genes)``; NaN is no edge.
    threshold
        Scores have to be larger than this.
    top_k
        How many edges a source has at most; of equal scores the gene that comes first is taken.
    self_loops
        Keep edges of genes with themselves, beside the ``top_k``.

    Raises
    ------
    MemoryError
        If there are more than 20 million edges.
    """
    parts: list[Edges] = []
    total = 0
    for sources, scores in blocks:
        part = _of_block(sources, scores, threshold, top_k, self_loops)
        total += len(part)
        if total > _MOST_EDGES:
            msg = f"the network has more than {_MOST_EDGES:,} edges; raise threshold=, or set top_k= or genes="
            raise MemoryError(msg)
        parts.append(part)
    if not parts:
        return Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    return Edges(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("source", "target", "weight")))


def _of_block(
    sources: np.ndarray, scores: np.ndarray, threshold: float | None, top_k: int | None, self_loops: bool
) -> Edges:
    lowest = -np.inf if threshold is None else threshold
    with np.errstate(invalid="ignore"):
        wanted = scores > lowest
    own = np.zeros_like(wanted)
    own[np.arange(len(sources)), sources] = True
    loops = wanted & own
    wanted &= ~own
    if top_k is not None and top_k < scores.shape[1]:
        ordered = np.where(wanted, scores, -np.inf)
        last = np.partition(ordered, -top_k, axis=1)[:, -top_k, None]
        wanted &= ordered >= last
    row, target = np.nonzero(wanted)
    weight = scores[row, target]
    if top_k is not None:
        # rows in which several scores are equal to the last one have too many
        order = np.lexsort((target, -weight, row))
        row, target, weight = row[order], target[order], weight[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        row, target, weight = row[place < top_k], target[place < top_k], weight[place < top_k]
    if self_loops:
        loop_row, loop_target = np.nonzero(loops)
        row, target = np.concatenate([row, loop_row]), np.concatenate([target, loop_target])
        weight = np.concatenate([weight, scores[loop_row, loop_target]])
    return Edges(sources[row], target, weight)
