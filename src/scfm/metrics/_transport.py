"""Moved cells beside the cells that were treated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.spatial.distance import pdist

from ._correlation import pearson_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_GAMMAS = (2.0, 1.0, 0.5, 0.1, 0.01, 0.005)
_BLOCK = 2048


def kernel_discrepancy(
    first: np.ndarray, second: np.ndarray, *, gammas: Sequence[float] = _GAMMAS, relative: bool = False
) -> float:
    """Maximum mean discrepancy of two sets of cells, averaged over Gaussian kernels.

    It is zero for equal sets. A cell is compared with itself, too, as CellOT does, so that small sets look farther apart.

    Fixed widths are those of CellOT. Where cells are farther apart than the widest kernel reaches, as they are in the expression of
    thousands of genes, all kernels vanish and any two sets look alike; ``relative=True`` measures distances in units that suit the
    cells.

    Parameters
    ----------
    first, second
        Cells, ``(cells, values)``; the numbers of cells may differ.
    gammas
        Widths of the kernels ``exp(-gamma * distance^2)``.
    relative
        Divide squared distances by their median among the cells of ``first``.

    Raises
    ------
    ValueError
        If shapes do not fit, there are no cells, or values are missing.

    References
    ----------
    Gretton et al., JMLR 13, 723 (2012); Bunne et al., CellOT, Nature Methods 20, 1759 (2023).
    """
    first, second = _pair(first, second)
    gammas = np.asarray(gammas, dtype=np.float64)
    if not gammas.size or (gammas <= 0).any():
        msg = "gammas must be positive numbers"
        raise ValueError(msg)
    if relative:
        gammas = gammas / _median_square(first)
    within = _kernel_mean(first, first, gammas) + _kernel_mean(second, second, gammas)
    return float((within - 2 * _kernel_mean(first, second, gammas)).mean())


def transport_scores(
    observed: np.ndarray | sparse.spmatrix,
    predicted: np.ndarray | sparse.spmatrix,
    *,
    genes: Sequence[int] | np.ndarray | None = None,
    gammas: Sequence[float] = _GAMMAS,
    relative: bool = True,
) -> dict[str, float]:
    """Scores of predicted cells after a treatment, as CellOT and CellFM report them.

    Parameters
    ----------
    observed
        Expression of treated cells, ``(cells, genes)``.
    predicted
        Expression that is predicted for other cells under the treatment, ``(cells, genes)``.
    genes
        Positions of the genes to look at, such as the 50 strongest markers of the treatment; by default all.
    gammas, relative
        See :func:`kernel_discrepancy`; ``relative=False`` is what CellOT computes.

    Returns
    -------
    ``l2``
        Distance of the mean profiles.
    ``Pearson``
        Correlation of the mean profiles over genes; NaN if one of them is constant.
    ``MMD``
        :func:`kernel_discrepancy` of the cells.

    Raises
    ------
    ValueError
        If shapes do not fit, there are no cells, or values are missing.
    """
    observed, predicted = (
        matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
        for matrix in (
            (observed, predicted)
            if genes is None
            else (observed[:, np.asarray(genes)], predicted[:, np.asarray(genes)])
        )
    )
    observed, predicted = _pair(observed, predicted)
    means = observed.mean(0), predicted.mean(0)
    return {
        "l2": float(np.linalg.norm(means[0] - means[1])),
        "Pearson": float(pearson_rows(means[0][None], means[1][None])[0]),
        "MMD": kernel_discrepancy(observed, predicted, gammas=gammas, relative=relative),
    }


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not first.size or not second.size:
        msg = f"two sets of cells need the same columns, and cells, not the shapes {first.shape} and {second.shape}"
        raise ValueError(msg)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        msg = "cells hold values that are missing or infinite"
        raise ValueError(msg)
    return first, second


def _median_square(cells: np.ndarray) -> float:
    """Median squared distance of two different cells, of at most some thousand; 1 if all are equal."""
    some = cells[np.linspace(0, len(cells) - 1, min(len(cells), _BLOCK)).astype(int)]
    squares = pdist(some, "sqeuclidean")
    squares = squares[squares > 0]
    return float(np.median(squares)) if len(squares) else 1.0


def _kernel_mean(first: np.ndarray, second: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Mean of each kernel over all pairs, some rows at a time."""
    sums = np.zeros(len(gammas))
    lengths = (second**2).sum(1)
    for start in range(0, len(first), _BLOCK):
        some = first[start : start + _BLOCK]
        squares = np.maximum((some**2).sum(1)[:, None] + lengths - 2 * some @ second.T, 0)
        sums += [np.exp(-gamma * squares).sum() for gamma in gammas]
    return sums / (len(first) * len(second))
