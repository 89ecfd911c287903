"""From the columns of the data to the genes of a model, for one CSR block after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Duplicates = Literal["sum", "keep", "error"]


@dataclass(frozen=True, eq=False)
class ColumnMap:
    """Keeps the columns of known genes and adds up those that are one gene; built once, applied to many blocks.

    Parameters
    ----------
    n_vars
        Number of columns of the data.
    ids
        Vocabulary id of each result column, int64, shape ``(columns,)``.
    known
        Data columns that are kept, shape ``(known,)``.
    target
        Result column of each kept column, int32, shape ``(known,)``.
    """

    n_vars: int
    ids: np.ndarray
    known: np.ndarray
    target: np.ndarray

    @classmethod
    def from_ids(cls, ids: np.ndarray, *, duplicates: Duplicates = "sum") -> ColumnMap:
        """Build the map from the vocabulary id of each data column (-1 where unknown), shape ``(n_vars,)``.

        ``"sum"`` gives ids that occur several times one column, at the place of the first; ``"keep"`` leaves every
        column by itself.
        """
        known = np.flatnonzero(ids >= 0)
        if duplicates == "keep":
            return cls(len(ids), ids[known], known, np.arange(len(known), dtype=np.int32))
        target, unique = pd.factorize(ids[known])  # numbers in order of first appearance
        return cls(len(ids), np.asarray(unique, dtype=np.int64), known, target.astype(np.int32))

    @property
    def sums(self) -> bool:
        """Whether some columns are added up."""
        return len(self.ids) < len(self.known)

    def apply(self, counts: csr_matrix) -> csr_matrix:
        """Map a block.

        The input is never changed; it is returned as it is when every column stays. Without summed columns the entries
        of a row stay in the order they had, explicit zeros included; with them, rows come out sorted by column.

        Parameters
        ----------
        counts
            Block of shape ``(cells, n_vars)``.

        Returns
        -------
        Block of shape ``(cells, columns)``; column ``j`` belongs to vocabulary id ``ids[j]``.

        Raises
        ------
        ValueError
            If the block has another number of columns than the data the map was built for.
        """
        if counts.shape[1] != self.n_vars:
            msg = f"the block has {counts.shape[1]} genes, but {self.n_vars} were matched; match the genes of this data"
            raise ValueError(msg)
        counts = sparse.csr_matrix(counts)
        if len(self.known) < self.n_vars or self.sums:
            counts = counts[:, self.known]
        if self.sums:
            shape = (counts.shape[0], len(self.ids))
            counts = sparse.csr_matrix((counts.data, self.target[counts.indices], counts.indptr), shape=shape)
            counts.sum_duplicates()
        return counts


def check_duplicates(duplicates: str) -> None:
    """Raise ``ValueError`` unless ``duplicates`` is a known rule."""
    if duplicates not in get_args(Duplicates):
        msg = f"duplicates must be one of {', '.join(get_args(Duplicates))}; got {duplicates!r}"
        raise ValueError(msg)
