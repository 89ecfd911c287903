"""Which genes are alike: by vectors of a model or by correlation over cells, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from .neighbors import find_neighbors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

GeneMetric = Literal["euclidean", "cosine"]


class GeneSpace(Protocol):
    """What is needed to cluster genes and to say how alike those of a cluster are."""

    def __len__(self) -> int: ...

    def nearest(self, k: int, metric: GeneMetric) -> tuple[NDArray, NDArray]:
        """Distances and numbers of the ``k`` nearest genes of each gene, itself first."""

    def sums(self, members: csr_matrix) -> NDArray:
        """Summed similarity of each gene to the genes of each program, ``(programs, genes)``.

        Parameters
        ----------
        members
            Ones where a gene is in a program, ``(programs, genes)``.
        """


@dataclass(frozen=True, eq=False)
class VectorSpace:
    """Genes as vectors; their similarity is the cosine.

    Parameters
    ----------
    values
        Finite vectors, ``(genes, dim)``.
    """

    values: NDArray

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def units(self) -> NDArray[np.float64]:
        """Vectors of length 1; zeros stay zeros."""
        values = np.asarray(self.values, dtype=np.float64)
        length = np.linalg.norm(values, axis=1, keepdims=True)
        return np.divide(values, length, out=np.zeros_like(values), where=length > 0)

    def nearest(self, k: int, metric: GeneMetric) -> tuple[NDArray, NDArray]:
        """Exact neighbours, see :func:`scfm.tasks.neighbors.find_neighbors`."""
        if metric not in get_args(GeneMetric):
            msg = f"metric must be one of {', '.join(get_args(GeneMetric))}; got {metric!r}"
            raise ValueError(msg)
        found = find_neighbors(self.values, self.values, k, metric=metric)
        distances = np.sqrt(found.distances) if metric == "euclidean" else found.distances
        return _self_first(distances, found.indices)

    def sums(self, members: csr_matrix) -> NDArray:
        """Summed cosines."""
        return (members @ self.units) @ self.units.T


@dataclass(frozen=True, eq=False)
class CorrelationSpace:
    """Genes by their correlation over cells.

    Parameters
    ----------
    correlation
        Finite correlations, ``(genes, genes)``.
    """

    correlation: NDArray

    def __len__(self) -> int:
        return len(self.correlation)

    def nearest(self, k: int, metric: GeneMetric) -> tuple[NDArray, NDArray]:
        """Genes of the largest correlation; the distance is 1 minus it, whatever the metric for vectors is."""
        distances = 1 - self.correlation
        np.fill_diagonal(distances, -1.0)  # nothing is nearer than the gene itself
        chosen = np.argpartition(distances, k - 1, axis=1)[:, :k]
        order = np.lexsort((chosen, np.take_along_axis(distances, chosen, 1)), axis=1)
        indices = np.take_along_axis(chosen, order, 1)
        found = np.take_along_axis(distances, indices, 1)
        found[:, 0] = 0
        return found, indices

    def sums(self, members: csr_matrix) -> NDArray:
        """Summed correlations."""
        return members @ self.correlation


@dataclass(frozen=True, eq=False)
class GeneGraph:
    """Neighbour graph of genes, as :func:`scanpy.pp.neighbors` makes it.

    Parameters
    ----------
    distances
        Distances of the neighbours of each gene, sparse ``(genes, genes)``.
    connectivities
        Symmetric weights between 0 and 1, sparse ``(genes, genes)``.
    """

    distances: csr_matrix
    connectivities: csr_matrix

    @classmethod
    def of(cls, space: GeneSpace, *, n_neighbors: int = 15, metric: GeneMetric = "euclidean") -> GeneGraph:
        """Graph of exact nearest neighbours with the weights of UMAP.

        Parameters
        ----------
        n_neighbors
            Neighbours of each gene, itself included (fewer if there are fewer genes).
        metric
            Distance of vectors.
        """
        if n_neighbors < 2:
            msg = f"n_neighbors counts the gene itself, so it must be at least 2; got {n_neighbors}"
            raise ValueError(msg)
        n = len(space)
        k = min(n_neighbors, n)
        work = AnnData(np.zeros((n, 1), dtype=np.float32), obs=pd.DataFrame(index=pd.RangeIndex(n).astype(str)))
        sc.pp.neighbors(work, use_rep="X", transformer=_Found(*space.nearest(k, metric)))
        distances, connectivities = (work.obsp[name] for name in ("distances", "connectivities"))
        return cls(_without_self(distances), connectivities.tocsr())


class _Found:
    """Neighbours that are known already, in the place where Scanpy wants a method to find them."""

    def __init__(self, distances: NDArray, indices: NDArray) -> None:
        self.distances, self.indices = distances, indices

    def get_params(self, *, deep: bool = True) -> dict[str, int]:
        return {"n_neighbors": self.indices.shape[1]}

    def fit_transform(self, X: NDArray) -> csr_matrix:
        n, k = self.indices.shape
        starts = np.arange(0, n * k + 1, k)
        return sparse.csr_matrix((self.distances.ravel(), self.indices.ravel(), starts), shape=(n, n))


def _self_first(distances: NDArray, indices: NDArray) -> tuple[NDArray, NDArray]:
    """Each gene as its own first neighbour, also among genes with the same vector."""
    own = np.arange(len(indices))[:, None]
    place = np.where((indices == own).any(1), (indices == own).argmax(1), indices.shape[1] - 1)
    # sorting by "is it the gene itself" keeps the order of the others
    rank = np.argsort(np.arange(indices.shape[1]) != place[:, None], axis=1, kind="stable")
    indices, distances = np.take_along_axis(indices, rank, 1), np.take_along_axis(distances, rank, 1)
    indices[:, :1], distances[:, 0] = own, 0
    return distances, indices


def _without_self(distances: csr_matrix) -> csr_matrix:
    """The matrix without the distances of genes to themselves; those of equal genes stay as stored zeros."""
    matrix = distances.tocoo()
    other = matrix.row != matrix.col
    parts = (matrix.data[other], (matrix.row[other], matrix.col[other]))
    return sparse.csr_matrix(parts, shape=distances.shape)
