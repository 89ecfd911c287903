"""Perturbed cells beside the control cells that they are compared with, as mini-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import sparse

from ..metrics import condition_means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix
    from torch import Tensor


class PairBatch(NamedTuple):
    """A mini-batch.

    Parameters
    ----------
    before, after
        Expression of control cells and of perturbed cells, ``(cells, genes)``.
    perturbed
        Numbers of the perturbed genes, filled with -1, ``(cells, most)``.
    conditions
        Number of the condition, ``(cells,)``.
    controls
        Which control cells these are, ``(cells,)``.
    """

    before: Tensor
    after: Tensor
    perturbed: Tensor
    conditions: Tensor
    controls: np.ndarray


@dataclass(frozen=True, eq=False)
class PerturbationPairs:
    """Cells, the control cell of each, and what was done to them.

    Parameters
    ----------
    expression
        Log-normalised expression of all cells, ``(cells, genes)``, float32.
    controls
        Number of the control cell that each cell is paired with; control cells are paired with themselves.
    conditions
        Names of the conditions; the first is control.
    codes
        Number of the condition of each cell, ``(cells,)``.
    perturbed
        Numbers of the perturbed genes of each condition among those that can be perturbed, filled with -1,
        ``(conditions, most)``.

    Raises
    ------
    ValueError
        If sizes differ, a cell is paired with none of the control cells, or a control cell with another cell, as after cells
        were reordered.
    """

    expression: csr_matrix
    controls: np.ndarray
    conditions: Sequence[str]
    codes: np.ndarray
    perturbed: np.ndarray

    def __post_init__(self) -> None:
        n_cells = self.expression.shape[0]
        if len(self.controls) != n_cells or len(self.codes) != n_cells or len(self.perturbed) != len(self.conditions):
            msg = (
                f"there are {n_cells} cells and {len(self.conditions)} conditions, but other numbers of pairs or labels"
            )
            raise ValueError(msg)
        if (self.controls < 0).any() or (self.controls >= n_cells).any() or (self.codes[self.controls] != 0).any():
            msg = "each cell has to be paired with the number of a control cell; run scfm.pp.perturbation_setup again"
            raise ValueError(msg)
        own = np.flatnonzero(self.codes == 0)
        if (self.controls[own] != own).any():
            msg = (
                "control cells have to be paired with themselves, but the cells are in another order than when they were paired; "
                "run scfm.pp.perturbation_setup again"
            )
            raise ValueError(msg)

    @cached_property
    def control_mean(self) -> np.ndarray:
        """Mean expression of the control cells, float32, ``(genes,)``."""
        return np.asarray(self.expression[self.codes == 0].mean(0), dtype=np.float64).ravel().astype(np.float32)

    def counted(self, cells: np.ndarray) -> np.ndarray:
        """Genes that any of these cells of a condition expresses, ``(conditions, genes)``; all genes for control."""
        members = sparse.csr_matrix(
            (np.ones(len(cells), dtype=np.float32), (self.codes[cells], np.arange(len(cells)))),
            shape=(len(self.conditions), len(cells)),
        )
        out = (members @ abs(self.expression[cells])).toarray() > 0
        out[0] = True
        return out

    def means(self, cells: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Conditions of some cells, and their mean expression, ``(conditions, genes)``."""
        names = [str(self.conditions[code]) for code in np.unique(self.codes[cells])]
        labels = np.asarray(self.conditions, dtype=str)[self.codes[cells]]
        return names, condition_means(self.expression[cells], labels, names=names).to_numpy()

    def batch(self, cells: np.ndarray, device: torch.device | str = "cpu") -> PairBatch:
        """The pairs of some cells."""
        controls, codes = self.controls[cells], self.codes[cells]
        before, after = (
            torch.from_numpy(self.expression[rows].toarray().astype(np.float32, copy=False))
            for rows in (controls, cells)
        )
        perturbed, conditions = torch.from_numpy(self.perturbed[codes]), torch.from_numpy(codes.astype(np.int64))
        return PairBatch(*(part.to(device) for part in (before, after, perturbed, conditions)), controls)
