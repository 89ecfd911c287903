"""Whether a predicted response is that of its own perturbation, or the same for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial.distance import cdist

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK_BYTES = 64 * 2**20


def discrimination_scores(observed: pd.DataFrame | np.ndarray, predicted: pd.DataFrame | np.ndarray) -> pd.DataFrame:
    """How well predicted responses can be told apart: random guesses, and predictions that are all the same, have 0.5.

    Parameters
    ----------
    observed, predicted
        Mean expression of the cells of each condition, or changes from control, ``(conditions, genes)``, in the same order.

    Returns
    -------
    One row per condition; Euclidean distances, and equal ones count half.

    ``centroid accuracy``
        Share of the other conditions whose observed mean is farther from the prediction than that of its own condition; 1 is best.
    ``rank``
        Share of the other conditions whose prediction is nearer to the observed mean than its own; 0 is best. Predictions that
        collapse to one profile are found by it. (PerturBench counts equal distances fully.)

    Raises
    ------
    ValueError
        If shapes differ, values are missing, or there is only one condition.

    References
    ----------
    Viñas Torné et al., Systema, Nature Biotechnology (2025); Wu et al., PerturBench, arXiv 2408.10609 (2024).
    """
    index = observed.index if isinstance(observed, pd.DataFrame) else pd.RangeIndex(len(observed), name="condition")
    truth, guess = (np.asarray(values, dtype=np.float64) for values in (observed, predicted))
    if truth.ndim != 2 or truth.shape != guess.shape:
        msg = f"observed and predicted means have the shapes {truth.shape} and {guess.shape}, which must be the same"
        raise ValueError(msg)
    if len(truth) < 2:
        msg = "one condition cannot be told apart from others; at least two are needed"
        raise ValueError(msg)
    if not (np.isfinite(truth).all() and np.isfinite(guess).all()):
        msg = "means hold values that are missing or infinite"
        raise ValueError(msg)
    distances = cdist(guess, truth)
    own = np.diag(distances)
    others = len(truth) - 1

    def nearer(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Rows of others that are nearer than the own one, equal ones as halves, the own one not counted."""
        equal = np.isclose(values, mine, rtol=1e-9, atol=1e-12)
        return ((values < mine) & ~equal).sum(0) + (equal.sum(0) - 1) / 2

    return pd.DataFrame(
        {"centroid accuracy": 1 - nearer(distances.T, own) / others, "rank": nearer(distances, own) / others},
        index=index,
    )


def de_overlap(
    observed: pd.DataFrame | np.ndarray,
    predicted: pd.DataFrame | np.ndarray,
    control: np.ndarray,
    de_genes: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
) -> pd.DataFrame:
    """Whether the genes that change most are predicted to change, and into which direction.

    Parameters
    ----------
    observed, predicted
        Mean expression of the cells of each condition, ``(conditions, genes)``, in the same order.
    control
        Mean expression of the control cells, ``(genes,)``.
    de_genes
        For each condition, positions of the genes that change most.

    Returns
    -------
    One row per condition.

    ``DE overlap``
        Share of ``de_genes`` among as many genes with the largest predicted changes, whatever the direction; equal changes
        count as far as they can be expected to be there by chance.
    ``DE direction``
        Share of ``de_genes`` with the right sign of the predicted change; no change is never right.
    ``DE opposite direction``
        Share of ``de_genes`` with the opposite sign; no change is never opposite.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024), for directions.
    """
    index = observed.index if isinstance(observed, pd.DataFrame) else pd.RangeIndex(len(observed), name="condition")
    truth, guess = (np.asarray(values, dtype=np.float64) - control for values in (observed, predicted))
    if truth.shape != guess.shape or len(de_genes) != len(truth):
        msg = f"there are {truth.shape} observed and {guess.shape} predicted values, and genes for {len(de_genes)} conditions"
        raise ValueError(msg)
    rows = []
    for change, there, chosen in zip(guess, truth, de_genes, strict=True):
        chosen = np.asarray(chosen)
        size = np.abs(change)
        limit = np.sort(size)[len(size) - len(chosen)]
        above, at = size > limit, size == limit
        inside = above[chosen].sum() + at[chosen].sum() * (len(chosen) - above.sum()) / max(at.sum(), 1)
        turns = np.sign(change[chosen]) * np.sign(there[chosen])
        right = np.sign(change[chosen]) == np.sign(there[chosen])
        rows.append((inside / len(chosen), np.mean(right), np.mean(turns < 0)))
    return pd.DataFrame(rows, index=index, columns=["DE overlap", "DE direction", "DE opposite direction"], dtype=float)


def e_distance(first: np.ndarray | sparse.spmatrix, second: np.ndarray | sparse.spmatrix) -> float:
    """Energy distance of two sets of cells: 0 in expectation if they come from one distribution.

    Twice the mean distance between the sets, minus the mean distances within each (over different cells, so that the size of a set
    makes no difference; small negative values can occur). Distances are Euclidean.

    Parameters
    ----------
    first, second
        Cells by features, usually principal components; two cells each at least.

    References
    ----------
    Székely and Rizzo, Journal of Statistical Planning and Inference 143, 1249 (2013); Peidli et al., scPerturb, Nature Methods 21,
    531 (2024), with squared distances.
    """
    first, second = (
        np.asarray(cells.toarray() if sparse.issparse(cells) else cells, dtype=np.float64) for cells in (first, second)
    )
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        msg = f"sets of cells need the same features; their shapes are {first.shape} and {second.shape}"
        raise ValueError(msg)
    if min(len(first), len(second)) < 2:
        msg = f"sets of {len(first)} and {len(second)} cells have no distances within; two cells each are needed"
        raise ValueError(msg)
    between = _sum_of_distances(first, second) / (len(first) * len(second))
    within = [_sum_of_distances(cells, cells) / (len(cells) * (len(cells) - 1)) for cells in (first, second)]
    return float(2 * between - sum(within))


def _sum_of_distances(first: np.ndarray, second: np.ndarray) -> float:
    step = max(1, _BLOCK_BYTES // (8 * len(second)))
    return float(sum(cdist(first[start : start + step], second).sum() for start in range(0, len(first), step)))
