"""Programs of genes: clusters of a neighbour graph, with what says how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from ..metrics import leiden_clusters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from .gene_graph import GeneSpace

_MOST_SEEDS = 2**31


@dataclass(frozen=True, eq=False)
class GenePrograms:
    """Programs, the largest first.

    Parameters
    ----------
    codes
        Number of the program of each gene, -1 for genes in none.
    closeness
        Mean similarity of each gene to the others of its program, NaN for genes in none.
    coherence
        Mean similarity of all pairs of genes of each program.
    stability
        How much of each program is found again with other seeds: the mean over seeds of the largest Jaccard index with a
        cluster; NaN if it was not asked for.
    resolution
        Resolution that gave them.
    sweep
        What each resolution gave, one row each.
    """

    codes: NDArray[np.int64]
    closeness: NDArray[np.float64]
    coherence: NDArray[np.float64]
    stability: NDArray[np.float64]
    resolution: float
    sweep: pd.DataFrame

    def __len__(self) -> int:
        return len(self.coherence)

    @property
    def members(self) -> csr_matrix:
        """Ones where a gene is in a program, ``(programs, genes)``."""
        return membership(self.codes, len(self))


def find_programs(
    space: GeneSpace,
    graph: csr_matrix,
    resolutions: Sequence[float],
    *,
    min_genes: int = 5,
    stability_seeds: int = 0,
    seed: int = 0,
) -> GenePrograms:
    """Leiden clusters with enough genes, at the best of some resolutions.

    Of several resolutions the best is the one with the largest ``gain``: the coherence of the programs above that of all genes,
    averaged over all genes, of which those that are in no program count as zero. Small clusters are more coherent and
    leave more genes out, so that there is an optimum.

    Parameters
    ----------
    space
        The genes, sorted by name: clusters depend on their order.
    graph
        Weights of their neighbour graph, ``(genes, genes)``.
    resolutions
        Resolutions of Leiden.
    min_genes
        Smallest number of genes of a program.
    stability_seeds
        Number of further seeds to measure stability with.
    seed
        Seed of the clusters.

    Raises
    ------
    ValueError
        If no resolution gives a program, or an argument is out of range.
    """
    if not len(resolutions) or min(resolutions) <= 0 or min_genes < 2:
        msg = f"resolutions must be positive and min_genes at least 2; got {list(resolutions)} and {min_genes}"
        raise ValueError(msg)
    n = len(space)
    everything = sparse.csr_matrix(np.ones((1, n)))
    background = float(_coherence(space.sums(everything), everything)[0])
    rows, best = [], None
    for resolution in resolutions:
        clusters = leiden_clusters(graph, resolution, random_state=seed)
        codes = _large(clusters, min_genes)
        members = membership(codes, codes.max(initial=-1) + 1)
        sums = space.sums(members)
        sizes = np.bincount(codes[codes >= 0], minlength=len(sums))
        coherence = _coherence(sums, members)
        gain = float((sizes * (coherence - background)).sum() / n)
        rows.append(
            {
                "resolution": float(resolution),
                "n_clusters": len(np.unique(clusters)),
                "n_programs": len(sizes),
                "n_genes": int(sizes.sum()),
                "coherence": float((sizes * coherence).sum() / sizes.sum()) if len(sizes) else np.nan,
                "gain": gain,
            }
        )
        if len(sizes) and (best is None or gain > best[0]):
            best = gain, float(resolution), codes, sums, coherence
    if best is None:
        msg = (
            f"no cluster of the {n:,} genes has {min_genes} genes at the resolution {', '.join(map(str, resolutions))}; "
            "choose a lower resolution= or min_genes="
        )
        raise ValueError(msg)
    _, resolution, codes, sums, coherence = best
    seeds = np.random.default_rng(seed).integers(_MOST_SEEDS, size=stability_seeds)
    return GenePrograms(
        codes=codes,
        closeness=_closeness(sums, codes),
        coherence=coherence,
        stability=_stability(graph, codes, resolution, seeds.tolist()),
        resolution=resolution,
        sweep=pd.DataFrame(rows),
    )


def membership(codes: NDArray, n_programs: int) -> csr_matrix:
    """Ones where a gene is in a program, ``(programs, genes)``."""
    genes = np.flatnonzero(codes >= 0)
    return sparse.csr_matrix((np.ones(len(genes)), (codes[genes], genes)), shape=(n_programs, len(codes)))


def _large(clusters: NDArray, min_genes: int) -> NDArray[np.int64]:
    """Clusters with enough genes, numbered by size; of equal ones the one with the first gene comes first."""
    _, first, codes, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.full(len(sizes), -1, dtype=np.int64)
    kept = order[sizes[order] >= min_genes]
    number[kept] = np.arange(len(kept))
    return number[codes]


def _coherence(sums: NDArray, members: csr_matrix) -> NDArray[np.float64]:
    """Mean similarity of pairs, from the sums over programs; every gene has the similarity 1 to itself."""
    sizes = np.asarray(members.sum(1)).ravel()
    within = np.asarray(members.multiply(sums).sum(1)).ravel()
    return (within - sizes) / np.maximum(sizes * (sizes - 1), 1)


def _closeness(sums: NDArray, codes: NDArray) -> NDArray[np.float64]:
    out = np.full(len(codes), np.nan)
    genes = np.flatnonzero(codes >= 0)
    sizes = np.bincount(codes[genes], minlength=len(sums))
    out[genes] = (sums[codes[genes], genes] - 1) / (sizes[codes[genes]] - 1)
    return out


def _stability(graph: csr_matrix, codes: NDArray, resolution: float, seeds: list[int]) -> NDArray[np.float64]:
    members = membership(codes, codes.max(initial=-1) + 1)
    sizes = np.asarray(members.sum(1))
    if not seeds:
        return np.full(len(sizes), np.nan)
    found = np.zeros(len(sizes))
    for seed in seeds:
        clusters = leiden_clusters(graph, resolution, random_state=seed)
        others = membership(clusters, clusters.max() + 1)
        shared = (members @ others.T).toarray()
        found += (shared / (sizes + np.asarray(others.sum(1)).T - shared)).max(1)
    return found / len(seeds)
