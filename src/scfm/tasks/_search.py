"""Exact search for nearest neighbours: candidates from fast products, certainty from a bound on their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._optional import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    # scores and numbers of the reference rows with the largest scores, for a block of queries
    Candidates = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]

_QUERY_ROWS = 1024
_SPARE = 8
_ROUNDOFF = 2.0**-24
_UNDERFLOW = 1e-36


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a matrix that have values, as float64; of unit length if ``unit``."""

    matrix: NDArray
    numbers: NDArray[np.int64]
    unit: bool

    @classmethod
    def of(cls, matrix: NDArray, *, unit: bool, block_bytes: int) -> Rows:
        """The rows without missing values; those of zeros have no direction."""
        good = np.empty(len(matrix), dtype=bool)
        for part in slices(len(matrix), block_bytes // (9 * max(1, matrix.shape[1]))):
            good[part] = np.isfinite(matrix[part]).all(1)
            if unit:
                good[part] &= (matrix[part] != 0).any(1)
        return cls(matrix, np.flatnonzero(good), unit)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, part: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """Some of the rows; a slice or an array counts usable rows, not those of the matrix."""
        rows = self.matrix[self.numbers[part]].astype(np.float64)
        if self.unit:
            # the largest value first, so that squares neither overflow nor vanish
            rows /= np.abs(rows).max(-1, keepdims=True)
            rows /= np.sqrt((rows * rows).sum(-1, keepdims=True))
        return rows


@dataclass(frozen=True, eq=False)
class Search:
    """Squared Euclidean distances are ranked by an inner product that bounds them from below.

    With centred rows, ``|q - r|² = |q|² - (2 q.r - |r|²)``. The rounding error of the bracket in float32 is below
    ``slack * (|q|² + |r|²)`` (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), so that
    ``score = 2 q.r - (1 - slack) |r|²`` gives ``|q - r|² >= (1 - slack) |q|² - score``: every row that is not among the
    ``m`` largest scores is at least as far away as the ``m``-th score says.
    """

    rows: Rows
    center: NDArray[np.float64]
    scale: float
    slack: float
    candidates: Candidates
    query_rows: int
    block_bytes: int

    @classmethod
    def prepare(cls, rows: Rows, *, faiss: bool, block_bytes: int) -> Search:
        """Find centre and scale of the rows, and index them if faiss is to be used."""
        n, dim = len(rows), rows.matrix.shape[1]
        parts = slices(n, block_bytes // (24 * (dim + 1)))
        center = sum(rows.take(part).sum(0) for part in parts) / n
        radius = max(np.abs(rows.take(part) - center).max(initial=0.0) for part in parts)
        scale = 1.0 / radius if radius > 0 else 1.0
        slack = (2 * (dim + 1) + 8) * _ROUNDOFF
        query_rows = min(_QUERY_ROWS, max(1, block_bytes // (24 * (dim + 1))))

        def augmented(part: slice) -> NDArray[np.float32]:
            centred = (rows.take(part) - center) * scale
            norms = (centred * centred).sum(1, keepdims=True)
            return np.hstack([2 * centred, (slack - 1) * norms]).astype(np.float32)

        if faiss:
            candidates = _faiss_candidates(augmented, parts, dim + 1)
        else:
            # a row needs its float64 and float32 form, and two numbers for each query
            step = block_bytes // (24 * (dim + 1) + 8 * query_rows)
            candidates = _exact_candidates(augmented, slices(n, step))
        return cls(rows, center, scale, slack, candidates, query_rows, block_bytes)

    def nearest(self, query: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distances and numbers of the ``k`` nearest rows."""
        n = len(self.rows)
        distances, indices = np.empty((len(query), k)), np.empty((len(query), k), dtype=np.int64)
        left, m = np.arange(len(query)), min(n, k + max(_SPARE, k // 2))
        while len(left):
            doubtful = []
            for part in slices(len(left), self.block_bytes // (32 * m)):
                rows = left[part]
                where, bound = self._candidates(query[rows], m)
                distances[rows], indices[rows] = self._refine(query[rows], where, k)
                # what is not a number is a doubt too
                doubtful.append(rows[~(bound > distances[rows, -1])])
            if m == n:
                break
            left, m = np.concatenate(doubtful), min(n, 4 * m)
        return distances, indices

    def _candidates(self, query: NDArray[np.float64], m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Numbers of ``m`` rows, and the distance beyond which all others are."""
        n, n_queries = len(self.rows), len(query)
        if m == n:
            return np.broadcast_to(np.arange(n), (n_queries, n)), np.full(n_queries, np.inf)
        centred = (query - self.center) * self.scale
        norms = (1 - self.slack) * (centred * centred).sum(1)
        # queries that are so far away that float32 overflows leave a doubt
        with np.errstate(over="ignore", invalid="ignore"):
            scores, where = self.candidates(np.hstack([centred, np.ones((n_queries, 1))]).astype(np.float32), m)
            bound = (norms - scores.min(1) - _UNDERFLOW * (query.shape[1] + 1)) / self.scale**2
        known = np.isfinite(scores).all(1) & (where >= 0).all(1)
        return where, np.where(known, bound, -np.inf)

    def _refine(
        self, query: NDArray[np.float64], where: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The ``k`` nearest of the candidates by their distances in float64, equal ones by number."""
        where = np.sort(where, axis=1)
        exact = np.empty(where.shape)
        for rows in slices(len(query), self.block_bytes // (24 * where.shape[1] * query.shape[1] + 1)):
            n_rows = rows.stop - rows.start
            for columns in slices(where.shape[1], self.block_bytes // (24 * n_rows * query.shape[1] + 1)):
                difference = self.rows.take(where[rows, columns]) - query[rows, None]
                exact[rows, columns] = (difference * difference).sum(-1)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(exact, order, 1), np.take_along_axis(where, order, 1)


def _exact_candidates(augmented: Callable[[slice], NDArray[np.float32]], parts: list[slice]) -> Candidates:
    # one block is made once, several are made again for each block of queries
    only = augmented(parts[0]) if len(parts) == 1 else None
    rows_of = augmented if only is None else lambda _: only

    def candidates(query: NDArray[np.float32], m: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, where = torch.empty((len(query), 0)), torch.empty((len(query), 0), dtype=torch.int64)
        for part in parts:
            # numpy multiplies in full float32, whatever precision torch was told to use
            product = torch.from_numpy(query @ rows_of(part).T)
            best, place = product.topk(min(m, product.shape[1]), dim=1, sorted=False)
            scores, where = torch.cat([scores, best], 1), torch.cat([where, place + part.start], 1)
            if scores.shape[1] > m:
                scores, kept = scores.topk(m, dim=1, sorted=False)
                where = where.gather(1, kept)
        return scores.numpy(), where.numpy()

    return candidates


def _faiss_candidates(augmented: Callable[[slice], NDArray[np.float32]], parts: list[slice], dim: int) -> Candidates:
    faiss = require("faiss", purpose="index='faiss'")
    flat = faiss.IndexFlatIP(dim)
    for part in parts:
        flat.add(augmented(part))
    return flat.search


def slices(n: int, step: int) -> list[slice]:
    """Consecutive parts of ``n`` rows."""
    step = max(1, int(step))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
