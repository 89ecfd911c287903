"""Predicted expression that is computed row by row, never as a whole matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    Chosen = slice | Sequence[int] | np.ndarray

TARGET_SUM = 1e4


class ExpressionPredictor(ABC):
    """Predicted ``log1p`` of counts per 10,000, ``(cells, genes)``, given for the cells and genes that are asked for.

    ``predictor[0:100]`` is the same as ``predictor.predict(slice(0, 100))``, so that a predictor can stand where a matrix is
    read in chunks, as in :func:`scfm.metrics.recovery_scores`.

    Attributes
    ----------
    shape
        Number of cells and genes.
    var_names
        Names of the genes.
    """

    def __init__(self, n_cells: int, var_names: pd.Index) -> None:
        self.shape = (n_cells, len(var_names))
        self.var_names = var_names

    def predict(self, cells: Chosen | None = None, genes: Chosen | None = None) -> np.ndarray:
        """Predictions of some cells and genes.

        Parameters
        ----------
        cells, genes
            Slices, positions or boolean masks; by default all.

        Returns
        -------
        Array ``(cells, genes)`` of float32.
        """
        chosen = (_positions(which, n) for which, n in zip((cells, genes), self.shape, strict=True))
        return np.log1p(TARGET_SUM * self._shares(*chosen)).astype(np.float32)

    def __getitem__(self, cells: Chosen) -> np.ndarray:
        return self.predict(cells)

    @abstractmethod
    def _shares(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Share of a cell's counts that a gene has; cells and genes are positions."""


def _positions(which: Chosen | None, n: int) -> np.ndarray:
    if which is None:
        return np.arange(n)
    if not isinstance(which, slice):
        which = np.asarray(which)
        which = which.astype(np.intp) if not which.size else which  # an empty list has no type
    return np.arange(n)[which]
