"""Cells of many files as rows over the genes of one vocabulary, read where they are needed."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import _logging
from .._counts import CountStats
from ..data import open_source
from ..data._matrix import SelectedRows, canonical
from ..genes import resolve_gene_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from ..data import CellSource
    from ..genes import GeneMatch, GeneVocab

_BLOCK = 2048
_IN_MEMORY = 1 << 27
_UNKNOWN = "a gene that the model does not know"


@dataclass
class _Part:
    """One source, and which column of the result each of its columns is added to."""

    source: CellSource
    target: NDArray[np.int32]


@dataclass
class Cells:
    """Raw counts of all sources, one column for each gene of the vocabulary.

    Behind them stand the genes of each source that the model does not know, which count for the totals that some
    tokenizers take; such a column is another gene in each source. Copies that travel to other processes open the files
    anew.

    Parameters
    ----------
    sources
        What :func:`scfm.data.open_source` takes.
    vocab
        Genes of the model, which become the columns.
    layer
        Layer to read instead of ``X``.
    in_memory
        Whether to read everything at once; by default if there are not more than about 130 million counts.

    Attributes
    ----------
    genes
        What the columns are.

    Raises
    ------
    ValueError
        If there is no source, no gene of one of them is known, or values are not counts.
    """

    sources: Sequence[Any]
    vocab: GeneVocab
    layer: str | None = None
    in_memory: bool | None = None
    _process: int = field(default=-1, init=False)
    _matrix: csr_matrix | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.sources:
            msg = "there is nothing to train on: name .h5ad or .zarr files with raw counts"
            raise ValueError(msg)
        self._open()
        n_unknown = max(int(part.target.max(initial=-1)) + 1 - self.n_genes for part in self._parts)
        self.genes: GeneMatch = self.vocab.match([*self.vocab.genes, *[_UNKNOWN] * max(0, n_unknown)])
        self._bounds = np.cumsum([0, *(part.source.n_obs for part in self._parts)])
        stored = sum(part.source.n_obs * part.source.values_per_cell() for part in self._parts)
        if self.in_memory if self.in_memory is not None else stored <= _IN_MEMORY:
            self._matrix = self.read(np.arange(self.n_cells))
            self._close()

    @property
    def n_cells(self) -> int:
        """Number of cells in all sources."""
        return int(self._bounds[-1])

    @property
    def is_in_memory(self) -> bool:
        """Whether everything has been read."""
        return self._matrix is not None

    @property
    def n_genes(self) -> int:
        """Number of genes of the vocabulary."""
        return self.vocab.n_genes

    def lengths(self) -> NDArray[np.int32]:
        """Values that each cell has in the file, an estimate of its length in tokens."""
        if self._matrix is not None:
            return np.diff(self._matrix.indptr).astype(np.int32)
        return np.concatenate([part.source.reader.row_lengths() for part in self._parts]).astype(np.int32)

    def read(self, cells: NDArray[np.int64]) -> csr_matrix:
        """Counts of cells given by increasing numbers, shape ``(cells, len(self.genes))``."""
        if self._matrix is not None:
            return self._matrix[cells]
        if self._process != os.getpid():
            self._open()
        edges = np.searchsorted(cells, self._bounds)
        pieces = [
            self._read(part, cells[low:high] - first)
            for part, low, high, first in zip(self._parts, edges[:-1], edges[1:], self._bounds[:-1], strict=True)
            if low < high
        ]
        if not pieces:
            return sparse.csr_matrix((0, len(self.genes)), dtype=np.float32)
        return sparse.vstack(pieces, format="csr", dtype=np.float32)

    def known_genes(self, counts: csr_matrix) -> NDArray[np.int64]:
        """Expressed genes of the vocabulary in each row of what :meth:`read` returned."""
        before = np.concatenate([[0], np.cumsum(counts.indices < self.n_genes)])
        return before[counts.indptr[1:]] - before[counts.indptr[:-1]]

    def _read(self, part: _Part, rows: NDArray[np.int64]) -> csr_matrix:
        pieces = []
        for start in range(0, len(rows), _BLOCK):
            some = rows[start : start + _BLOCK]
            block = canonical(SelectedRows(part.source.reader, some, None).read(0, len(some)))
            _require_counts(block, part.source.where)
            pieces.append(self._over_vocabulary(part, block))
        return sparse.vstack(pieces, format="csr")

    def _over_vocabulary(self, part: _Part, block: csr_matrix) -> csr_matrix:
        data = block.data.astype(np.float32)
        counts = sparse.csr_matrix(
            (data, part.target[block.indices], block.indptr.copy()), shape=(block.shape[0], len(self.genes))
        )
        counts.sum_duplicates()
        return counts

    # -- files -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._files = ExitStack()
        with ExitStack() as on_error:
            on_error.callback(self._files.close)
            first = self._process == -1
            self._parts = [self._part(source, quiet=not first) for source in self.sources]
            on_error.pop_all()
        self._process = os.getpid()

    def _part(self, given: Any, *, quiet: bool) -> _Part:
        source = self._files.enter_context(open_source(given, layer=self.layer))
        source.obs_names = source.obs_names[:0]  # names of a hundred million cells fill the memory
        names = resolve_gene_names(source.var)
        match = self.vocab.match(names.symbols, ensembl_ids=names.ensembl_ids)
        match.require_any()
        if not quiet:
            _logging.info(f"    {source.where}: {source.n_obs:,} cells; {match.summary()}")
        column = np.cumsum(self.vocab.is_gene) - 1
        unknown = match.ids < 0
        target = np.where(unknown, self.n_genes - 1 + np.cumsum(unknown), column[match.ids]).astype(np.int32)
        return _Part(source, target)

    def _close(self) -> None:
        self._files.close()
        self._parts = []

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_files", "_parts"}
        return {name: value for name, value in self.__dict__.items() if name not in hidden} | {"_process": -2}


def _require_counts(block: csr_matrix, where: str) -> None:
    stats = CountStats().update(block)
    if problem := stats.problem():
        msg = f"pre-training needs raw counts, but {where} {problem}. {stats.remedy()}"
        raise ValueError(msg)
