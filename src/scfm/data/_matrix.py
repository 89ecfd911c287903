"""Row blocks of a stored matrix as CSR, whatever the storage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import zarr
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from ._transpose import TransposedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

_DENSE_BYTES = 32 * 2**20
_EXACT_IN_FLOAT32 = 2**24
_BRIDGED_ROWS = 8
_ROWS_AT_ONCE = 2048


class RowReader(ABC):
    """Reads rows ``start:stop`` of one matrix.

    Attributes
    ----------
    shape
        Rows and columns.
    nnz
        Number of stored values, or ``None`` where the storage does not know it.
    """

    shape: tuple[int, int]
    nnz: int | None = None

    @abstractmethod
    def read(self, start: int, stop: int) -> csr_matrix:
        """Rows ``start:stop``; the caller must not write to the result, which may share memory with the data."""

    def row_lengths(self) -> np.ndarray:
        """Number of stored values of each row, shape ``(rows,)``; reads everything where the storage does not know it."""
        starts = range(0, self.shape[0], _ROWS_AT_ONCE)
        blocks = (self.read(start, min(start + _ROWS_AT_ONCE, self.shape[0])) for start in starts)
        return np.concatenate([np.zeros(0, dtype=np.int64), *(np.diff(block.indptr) for block in blocks)])


class SparseRows(RowReader):
    """A CSR matrix in memory."""

    def __init__(self, matrix: Any) -> None:
        matrix = matrix.tocsr()
        self._data, self._indices, self._indptr = matrix.data, matrix.indices, matrix.indptr
        self.shape, self.nnz = matrix.shape, int(matrix.indptr[-1])

    def read(self, start: int, stop: int) -> csr_matrix:
        return _csr_slice(self._data, self._indices, self._indptr[start : stop + 1], self.shape[1])


class StoredSparseRows(RowReader):
    """A sparse matrix in an HDF5 or zarr group; CSC is transposed once into a temporary file."""

    def __init__(self, dataset: CSRDataset | CSCDataset) -> None:
        self._dataset = dataset
        self.shape = tuple(int(n) for n in dataset.shape)
        group = dataset.group
        self.nnz = int(group["data"].shape[0])
        self._indptr: np.ndarray | None = None
        self._data, self._indices = group["data"], group["indices"]

    def read(self, start: int, stop: int) -> csr_matrix:
        indptr = self._pointers()
        return _csr_slice(self._data, self._indices, indptr[start : stop + 1], self.shape[1])

    def row_lengths(self) -> np.ndarray:
        return np.diff(self._pointers())

    def _pointers(self) -> np.ndarray:
        # the row pointers, and for CSC the transposed file, are made by the thread that reads
        if self._indptr is None:
            group = self._dataset.group
            if isinstance(self._dataset, CSCDataset):
                transposed = TransposedFile(group["data"], group["indices"], group["indptr"][...], self.shape)
                self._data, self._indices, self._indptr = transposed.data, transposed.indices, transposed.indptr
                self._transposed = transposed  # its files live as long as it does
            else:
                self._indptr = group["indptr"][...]
        return self._indptr


class DenseRows(RowReader):
    """A dense array in memory, HDF5 or zarr; converted in pieces that stay small."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = tuple(int(n) for n in array.shape)

    def read(self, start: int, stop: int) -> csr_matrix:
        step = max(1, _DENSE_BYTES // max(1, self.shape[1] * self._array.dtype.itemsize))
        pieces = [
            sparse.csr_matrix(np.asarray(self._array[first : min(first + step, stop)]))
            for first in range(start, stop, step)
        ]
        return _stack(pieces, self.shape[1])


class DaskRows(RowReader):
    """A dask array with dense or sparse chunks; one row chunk is computed at a time and the last one is kept."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = tuple(int(n) for n in array.shape)
        self._bounds = np.concatenate([[0], np.cumsum(array.chunks[0])]).astype(np.int64)
        self._kept: tuple[int, csr_matrix] | None = None

    def read(self, start: int, stop: int) -> csr_matrix:
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self._bounds[first + 1]))
            if end > start:
                pieces.append(self._chunk(first)[start - self._bounds[first] : end - self._bounds[first]])
            start, first = end, first + 1
        return _stack(pieces, self.shape[1])

    def _chunk(self, number: int) -> csr_matrix:
        if self._kept is None or self._kept[0] != number:
            self._kept = None
            chunk = self._array.blocks[number].compute()
            self._kept = (number, sparse.csr_matrix(chunk if sparse.issparse(chunk) else np.asarray(chunk)))
        return self._kept[1]


class SelectedRows(RowReader):
    """Chosen rows and columns of another reader, for views of a backed object."""

    def __init__(self, reader: RowReader, rows: np.ndarray, columns: np.ndarray | None) -> None:
        self._reader, self._rows, self._columns = reader, rows, columns
        self.shape = (len(rows), reader.shape[1] if columns is None else len(columns))
        if reader.nnz is not None:
            self.nnz = int(reader.nnz * len(rows) / max(1, reader.shape[0]))

    def read(self, start: int, stop: int) -> csr_matrix:
        wanted, where = np.unique(self._rows[start:stop], return_inverse=True)
        # neighbouring rows are read in one go, short gaps included
        runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) > _BRIDGED_ROWS) + 1)
        pieces = []
        for run in runs:
            if len(run):
                first, last = int(wanted[run[0]]), int(wanted[run[-1]])
                pieces.append(self._reader.read(first, last + 1)[wanted[run] - first])
        block = _stack(pieces, self._reader.shape[1])[where]
        return block if self._columns is None else block[:, self._columns]


class JoinedRows(RowReader):
    """Several readers below each other; ``columns[i]`` says where the columns of reader ``i`` go."""

    def __init__(self, readers: Sequence[RowReader], columns: Sequence[np.ndarray], n_columns: int) -> None:
        self._readers, self._columns = readers, columns
        self._bounds = np.concatenate([[0], np.cumsum([reader.shape[0] for reader in readers])]).astype(np.int64)
        self.shape = (int(self._bounds[-1]), n_columns)
        if all(reader.nnz is not None for reader in readers):
            self.nnz = sum(reader.nnz for reader in readers)

    def read(self, start: int, stop: int) -> csr_matrix:
        pieces = []
        for first, last, reader, columns in zip(
            self._bounds[:-1], self._bounds[1:], self._readers, self._columns, strict=True
        ):
            low, high = max(start, first), min(stop, last)
            if low < high:
                part = reader.read(int(low - first), int(high - first))
                pieces.append(
                    sparse.csr_matrix(
                        (part.data, columns[part.indices], part.indptr), shape=(high - low, self.shape[1])
                    )
                )
        return _stack(pieces, self.shape[1])


def row_reader(matrix: Any, where: str) -> RowReader:
    """Choose the reader for ``matrix``.

    Raises
    ------
    TypeError
        If the matrix is of a kind that scfm cannot read; ``where`` names it in the message.
    """
    if sparse.issparse(matrix):
        return SparseRows(matrix)
    if isinstance(matrix, (CSRDataset, CSCDataset)):
        return StoredSparseRows(matrix)
    if isinstance(matrix, (np.ndarray, h5py.Dataset, zarr.Array)):
        return DenseRows(matrix)
    if hasattr(matrix, "dask") and hasattr(matrix, "chunks"):
        return DaskRows(matrix)
    msg = f"{where} is a {type(matrix).__name__}; scfm reads numpy, scipy.sparse, dask, HDF5 and zarr matrices"
    raise TypeError(msg)


def canonical(block: csr_matrix) -> csr_matrix:
    """Sort indices, sum duplicates, drop stored zeros and choose float32 or float64, without touching the input."""
    data = block.data
    if data.dtype not in (np.float32, np.float64):
        data = _as_float(data)
    out = sparse.csr_matrix((data, block.indices, block.indptr), shape=block.shape)
    stored_zeros = data.size > 0 and not data.all()
    if stored_zeros or not out.has_canonical_format:
        out = out.copy()
        out.sum_duplicates()
        out.eliminate_zeros()
    return out


def _as_float(data: np.ndarray) -> np.ndarray:
    """Float32 where it holds every value exactly, else float64."""
    if data.dtype.kind in "iu":
        exact = data.size == 0 or max(abs(int(data.max())), abs(int(data.min()))) <= _EXACT_IN_FLOAT32
        return data.astype(np.float32 if exact else np.float64)
    return data.astype(np.float32 if data.dtype.kind == "b" or data.dtype.itemsize <= 4 else np.float64)


def _csr_slice(data: Any, indices: Any, indptr: np.ndarray, n_columns: int) -> csr_matrix:
    first, last = int(indptr[0]), int(indptr[-1])
    return sparse.csr_matrix(
        (np.asarray(data[first:last]), np.asarray(indices[first:last]), indptr - indptr[0]),
        shape=(len(indptr) - 1, n_columns),
    )


def _stack(pieces: list[csr_matrix], n_columns: int) -> csr_matrix:
    if not pieces:
        return sparse.csr_matrix((0, n_columns), dtype=np.float32)
    return pieces[0] if len(pieces) == 1 else sparse.vstack(pieces, format="csr")
