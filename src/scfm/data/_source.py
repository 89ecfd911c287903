"""One view on every kind of input: cells that can be read block by block."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from ._files import open_file
from ._matrix import JoinedRows, RowReader, SelectedRows, canonical, row_reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from scipy.sparse import csr_matrix

    Input = AnnData | str | PathLike[str] | Sequence["Input"]

_SAMPLE_ROWS = 64


class Block(NamedTuple):
    """Consecutive cells of a source."""

    start: int
    stop: int
    counts: csr_matrix


@dataclass
class CellSource:
    """Cells by genes, read in row blocks.

    Made by :func:`open_source`; a context manager that closes the files it opened.

    Attributes
    ----------
    obs_names
        Names of the cells.
    var
        The genes, one row per column of the matrix.
    where
        Name of the matrix for messages, for example ``"layer 'counts'"``.
    """

    reader: RowReader
    obs_names: pd.Index
    var: pd.DataFrame
    where: str
    _files: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.reader.shape[0]

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.reader.shape[1]

    @property
    def var_names(self) -> pd.Index:
        """Names of the genes."""
        return self.var.index

    def read(self, start: int, stop: int) -> csr_matrix:
        """Cells ``start:stop`` as float CSR with sorted indices, no duplicates and no stored zeros."""
        return canonical(self.reader.read(start, min(stop, self.n_obs)))

    def blocks(self, block_size: int, *, starts: Sequence[int] | None = None) -> Iterator[Block]:
        """Consecutive blocks of ``block_size`` cells; ``starts`` chooses some of them by their first cell."""
        for start in range(0, self.n_obs, block_size) if starts is None else starts:
            stop = min(start + block_size, self.n_obs)
            yield Block(start, stop, self.read(start, stop))

    def select(self, rows: np.ndarray) -> CellSource:
        """Some of the cells, in the order given; shares the files of this source."""
        return CellSource(SelectedRows(self.reader, rows, None), self.obs_names[rows], self.var, self.where)

    def values_per_cell(self) -> float:
        """Mean number of stored values per cell; estimated from the first cells where the storage does not tell."""
        if self.n_obs == 0:
            return 0.0
        if self.reader.nnz is not None:
            return self.reader.nnz / self.n_obs
        sample = self.read(0, _SAMPLE_ROWS)
        return sample.nnz / sample.shape[0]

    def close(self) -> None:
        """Close the files that were opened for this source."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(data: Input, *, layer: str | None = None, use_raw: bool = False) -> CellSource:
    """Open counts for reading in blocks; nothing but names and sizes is read here.

    Parameters
    ----------
    data
        AnnData (in memory, backed, with dask arrays, or a view), path of an ``.h5ad`` file or AnnData ``.zarr`` store,
        or a list of these. The cells of a list are put below each other; its genes are the union by name, in order
        of first appearance, and a gene that a part lacks counts as zero there.
    layer
        Layer to read instead of ``X``.
    use_raw
        Read ``raw.X`` with the genes of ``raw.var``.

    Raises
    ------
    KeyError
        If the layer does not exist.
    TypeError
        For MuData and other objects that are not cells by genes.
    ValueError
        If there are no genes, no matrix, or both ``layer`` and ``use_raw`` are given.
    """
    if layer is not None and use_raw:
        msg = "give either layer= or use_raw=True, not both"
        raise ValueError(msg)
    if isinstance(data, (list, tuple)):
        source = _from_list(data, layer, use_raw)
    elif isinstance(data, (str, PathLike)):
        source = _from_path(Path(data), layer, use_raw)
    elif isinstance(data, AnnData):
        source = _from_anndata(data, layer, use_raw)
    else:
        raise TypeError(_wrong_type(data))
    if source.n_vars == 0:
        source.close()
        msg = f"{source.where} has no genes ({source.n_obs} cells x 0 genes); was everything filtered out?"
        raise ValueError(msg)
    return source


def _from_anndata(adata: AnnData, layer: str | None, use_raw: bool) -> CellSource:
    if use_raw:
        if adata.raw is None:
            msg = "use_raw=True, but adata.raw is not set"
            raise ValueError(msg)
        where, matrix, var = "adata.raw.X", adata.raw.X, adata.raw.var
    elif layer is not None:
        if layer not in adata.layers:
            raise KeyError(_missing_layer(layer, adata.layers.keys()))
        where, matrix, var = f"layer {layer!r}", adata.layers[layer], adata.var
    elif adata.isbacked and adata.is_view:
        return CellSource(_backed_view(adata), adata.obs_names, adata.var, "adata.X")
    else:
        where, matrix, var = "adata.X", adata.X, adata.var
    if matrix is None:
        msg = f"{where} is empty (None); name the layer that holds the counts with layer= (layers: {_listed(adata.layers)})"
        raise ValueError(msg)
    if not isinstance(var, pd.DataFrame):  # AnnData opened with read_lazy
        var = var.to_memory()
    return CellSource(row_reader(matrix, where), pd.Index(adata.obs_names), var, where)


def _backed_view(adata: AnnData) -> RowReader:
    # `adata.X` of a backed view loads every selected cell at once, so the rows are picked block by block here
    parent, rows, columns = adata._adata_ref, adata._oidx, adata._vidx
    rows = np.arange(parent.n_obs)[rows]
    columns = np.arange(parent.n_vars)[columns]
    keep_all = np.array_equal(columns, np.arange(parent.n_vars))
    return SelectedRows(row_reader(parent.X, "adata.X"), rows, None if keep_all else columns)


def _from_path(path: Path, layer: str | None, use_raw: bool) -> CellSource:
    files = ExitStack()
    with ExitStack() as on_error:
        on_error.callback(files.close)
        stored = open_file(path, files)
        if use_raw:
            name = "raw/X"
        elif layer is not None:
            name = f"layers/{layer}"
            if layer not in stored.layers():
                raise KeyError(_missing_layer(layer, stored.layers()))
        else:
            name = "X"
        where = f"{f'layer {layer!r}' if layer is not None else name} of {path.name}"
        matrix = stored.matrix(name)
        if matrix is None:
            msg = f"{path.name} has no {name}; layers: {_listed(stored.layers())}"
            raise ValueError(msg)
        var = stored.var("raw/var" if use_raw else "var")
        source = CellSource(row_reader(matrix, where), stored.obs_names(), var, where, files)
        on_error.pop_all()
    return source


def _from_list(data: Sequence[Input], layer: str | None, use_raw: bool) -> CellSource:
    if not data:
        msg = "the list of inputs is empty"
        raise ValueError(msg)
    files = ExitStack()
    with ExitStack() as on_error:
        on_error.callback(files.close)
        parts = [files.enter_context(open_source(part, layer=layer, use_raw=use_raw)) for part in data]
        source = _join(parts, files)
        on_error.pop_all()
    return source


def _join(parts: list[CellSource], files: ExitStack) -> CellSource:
    # a name that occurs twice in one part is two genes, so names are told apart by their occurrence
    keys = []
    for part in parts:
        occurrence = pd.Series(0, index=part.var_names).groupby(level=0).cumcount()
        keys.append(pd.MultiIndex.from_arrays([part.var_names, occurrence]))
    union, frames = keys[0], [parts[0].var]
    for part, key in zip(parts[1:], keys[1:], strict=True):
        new = ~key.isin(union)
        union = union.append(key[new])
        frames.append(part.var[new])
    columns = [union.get_indexer(key).astype(np.int32) for key in keys]
    obs_names = parts[0].obs_names.append([part.obs_names for part in parts[1:]])
    where = parts[0].where if len(parts) == 1 else f"{parts[0].where} (and {len(parts) - 1} more)"
    reader = JoinedRows([part.reader for part in parts], columns, len(union))
    return CellSource(reader, obs_names, pd.concat(frames), where, files)


def _wrong_type(data: Any) -> str:
    from mudata import MuData

    if isinstance(data, MuData):
        names = list(data.mod)
        rna = next((name for name in ("rna", "gex", *names) if name in names), "rna")
        return f"this is MuData with modalities {_listed(names)}; pass one of them, for example mdata[{rna!r}]"
    return f"expected AnnData, a path to .h5ad or .zarr, or a list of these; got {type(data).__name__}"


def _missing_layer(layer: str, present: Any) -> str:
    return f"there is no layer {layer!r}; layers: {_listed(present)}"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
