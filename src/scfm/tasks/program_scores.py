"""Scores of gene programs in cells, for many programs at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix


def score_weights(
    members: csr_matrix,
    means: NDArray,
    *,
    ctrl_size: int = 50,
    n_bins: int = 25,
    seed: int = 0,
) -> csr_matrix:
    """Weights with which expression becomes scores: the mean over a program minus the mean over control genes.

    Control genes come from bins of genes with a similar mean, as in :func:`scanpy.tl.score_genes`: from each bin that a
    program has genes in, ``ctrl_size`` genes are drawn, and those of the program are left out. The draw of a bin is the same
    for all programs.

    Parameters
    ----------
    members
        Ones where a gene is in a program, ``(programs, genes)``.
    means
        Mean expression of each gene; genes with NaN are no controls.
    ctrl_size
        Control genes from each bin.
    n_bins
        Number of bins.
    seed
        Seed of the draws.

    Returns
    -------
    Sparse matrix ``(genes, programs)``: ``expression @ weights`` are the scores.
    """
    members = members.tocsr()
    n_programs, n_genes = members.shape
    ranks = pd.Series(means).rank(method="min").to_numpy()
    per_bin = max(1, int(np.round(np.isfinite(ranks).sum() / (n_bins - 1))))
    bins = np.where(np.isfinite(ranks), ranks // per_bin, -1).astype(np.int64)
    chosen = np.zeros(n_genes, dtype=bool)
    for number in np.unique(bins[bins >= 0]):
        genes = np.flatnonzero(bins == number)
        if ctrl_size < len(genes):
            genes = np.random.default_rng([seed, number]).choice(genes, ctrl_size, replace=False)
        chosen[genes] = True
    columns = []
    for program in range(n_programs):
        own = members.indices[members.indptr[program] : members.indptr[program + 1]]
        if not len(own):
            columns.append(sparse.csc_matrix((n_genes, 1)))
            continue
        control = chosen & np.isin(bins, np.unique(bins[own]))
        control[own] = False
        control = np.flatnonzero(control)
        weights = np.concatenate([np.full(len(own), 1 / len(own)), np.full(len(control), -1 / max(len(control), 1))])
        rows = np.concatenate([own, control])
        columns.append(sparse.csc_matrix((weights, (rows, np.zeros_like(rows))), shape=(n_genes, 1)))
    return sparse.hstack(columns, format="csr")


def scaled_scores(scores: NDArray) -> NDArray:
    """Scores of each program on a scale from 0 (its lowest cell) to 1 (its highest); NaN stays NaN."""
    finite = np.isfinite(scores).all(1)
    if not finite.any():
        return np.full_like(scores, np.nan)
    low, high = scores[finite].min(0), scores[finite].max(0)
    return (scores - low) / np.where(high > low, high - low, 1)
