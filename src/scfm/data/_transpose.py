"""Column-stored matrices on disk, turned into row-stored ones with bounded memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _logging

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VALUES_AT_ONCE = 2**20


class TransposedFile:
    """CSR copy of a CSC matrix in temporary files that vanish with the object.

    A row block of a CSC file touches every column, so that reading block after block would scan the whole file each
    time. Two passes are enough to write the rows: one counts the values of each row, one puts them in place.

    Parameters
    ----------
    data, indices
        Values and row numbers on disk (HDF5 or zarr), column after column.
    indptr
        Start of each column, in memory.
    shape
        Rows and columns.

    Attributes
    ----------
    data, indices, indptr
        The parts of the CSR matrix; the first two are memory-mapped.
    """

    def __init__(self, data: Any, indices: Any, indptr: NDArray[np.integer], shape: tuple[int, int]) -> None:
        _logging.info("    the matrix is stored by genes (CSC); writing a temporary copy by cells")
        self._folder = tempfile.TemporaryDirectory(prefix="scfm-")
        total = int(indptr[-1])
        chunks = _column_chunks(indptr)

        counts = np.zeros(shape[0], dtype=np.int64)
        for first, last in chunks:
            counts += np.bincount(indices[indptr[first] : indptr[last]], minlength=shape[0])
        self.indptr = np.concatenate([[0], np.cumsum(counts)])

        self.data = self._create("data", data.dtype, total)
        self.indices = self._create("indices", np.dtype(np.int32), total)
        free = self.indptr[:-1].copy()
        for first, last in chunks:
            low, high = int(indptr[first]), int(indptr[last])
            rows = np.asarray(indices[low:high])
            columns = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(indptr[first : last + 1]))
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
            new_row = np.diff(rows, prepend=-1) != 0
            starts = np.flatnonzero(new_row)
            lengths = np.diff(starts, append=len(rows))
            rank = np.arange(len(rows)) - np.repeat(starts, lengths)
            target = free[rows] + rank
            self.data[target] = np.asarray(data[low:high])[order]
            self.indices[target] = columns[order]
            free[rows[starts]] += lengths

    def _create(self, name: str, dtype: np.dtype, size: int) -> NDArray:
        # a file cannot be mapped with length zero
        return np.memmap(Path(self._folder.name) / name, dtype=dtype, mode="w+", shape=max(1, size))


def _column_chunks(indptr: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Cut the columns into runs of about ``_VALUES_AT_ONCE`` values, each at least one column."""
    cuts = [0]
    n_columns = len(indptr) - 1
    while cuts[-1] < n_columns:
        last = int(np.searchsorted(indptr, indptr[cuts[-1]] + _VALUES_AT_ONCE, side="right")) - 1
        cuts.append(min(n_columns, max(last, cuts[-1] + 1)))
    return list(zip(cuts[:-1], cuts[1:], strict=True))
