"""Correlation of matching rows, all rows at once."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def pearson_rows(first: np.ndarray, second: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation of each row of ``first`` with the same row of ``second``, NaN where one of them is constant.

    Parameters
    ----------
    first, second
        Matrices of one shape, ``(rows, columns)``.
    mask
        Columns that count in each row, ``(rows, columns)``; by default all.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mask = np.ones(first.shape, dtype=bool) if mask is None else mask
    first, second = _unit(first, mask), _unit(second, mask)
    return np.clip(np.einsum("ij,ij->i", first, second), -1, 1)


def spearman_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation of each row of ``first`` with the same row of ``second``, NaN where one of them is constant."""
    return pearson_rows(rankdata(first, axis=1), rankdata(second, axis=1))


def constant_rows(matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whether the columns that count hold one value, or none; a variance does not tell, because of rounding."""
    return np.where(mask, matrix, np.inf).min(1) >= np.where(mask, matrix, -np.inf).max(1)


def centred_rows(matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows less the mean of the columns that count; zero elsewhere."""
    with np.errstate(invalid="ignore"):
        means = np.where(mask, matrix, 0).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    return np.where(mask, matrix - means, 0)


def _unit(matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows centred and scaled to length 1; NaN if they are constant."""
    centred = centred_rows(matrix, mask)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    unit[constant_rows(matrix, mask)] = np.nan
    return unit
