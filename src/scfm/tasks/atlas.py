"""Atlases: labelled cells in an index of faiss, in the layout in which scGPT's atlas was released."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd

from .._optional import require
from ._search import slices
from .neighbors import Neighbors, check_k, label_proportions

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from numpy.typing import ArrayLike, NDArray

INDEX, LABELS, CONFIG = "index.faiss", "meta.h5ad", "index_config.json"
_LABELS_DATASET = "meta_labels"
_LABELS_AT_A_TIME = 1_000_000
_QUERIES_AT_A_TIME = 65_536
# lists that are searched, by the number of lists at most, as scGPT does it
_PROBES = ((1_000, 16), (4_000, 32), (16_000, 64))
_MOST_PROBES = 128
_NOT_FOUND = -1


@dataclass(frozen=True, eq=False)
class AtlasIndex:
    """Labelled cells in an index of faiss, to which query cells are mapped.

    Made by :meth:`read` from a folder, or by :meth:`build` from an embedding; see :func:`scfm.tl.map_to_reference`.
    Needs ``pip install 'scfm[faiss]'``.

    Parameters
    ----------
    index
        Index of faiss with squared Euclidean distances.
    codes
        Number of the label of each cell in ``categories``, shape ``(cells,)``.
    categories
        The labels, sorted.
    config
        What ``index_config.json`` says; :meth:`build` puts the record of the embedding under ``"embedding"``.
    path
        File from which the index was read, and where its vectors may still lie.

    Examples
    --------
    >>> from scfm.tasks.atlas import AtlasIndex
    >>> atlas = AtlasIndex.read("path/to/atlas")  # doctest: +SKIP
    >>> scfm.tl.map_to_reference(adata, atlas, "cell_type", model="scgpt")  # doctest: +SKIP
    """

    index: Any
    codes: NDArray[np.integer]
    categories: pd.Index
    config: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        faiss = _faiss()
        if self.index.metric_type != faiss.METRIC_L2:
            msg = "the index ranks cells by an inner product; an atlas needs one with squared Euclidean distances"
            raise ValueError(msg)
        if len(self.codes) != self.index.ntotal:
            msg = f"the atlas has {self.index.ntotal:,} cells in its index but {len(self.codes):,} labels"
            raise ValueError(msg)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def __repr__(self) -> str:
        kind = type(self.index).__name__
        return f"AtlasIndex({len(self):,} cells, {len(self.categories):,} labels, {self.dim} columns, {kind})"

    @property
    def dim(self) -> int:
        """Width of the embedding."""
        return int(self.index.d)

    @property
    def nprobe(self) -> int | None:
        """Number of lists that a search looks into; ``None`` if the index has no lists."""
        lists = _lists(self.index)
        return None if lists is None else int(lists.nprobe)

    @property
    def proportions(self) -> NDArray[np.float64]:
        """Share of each label in the atlas, shape ``(labels,)``."""
        return label_proportions(self.codes, len(self.categories))

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, nprobe: int | None = None) -> AtlasIndex:
        """Read a folder with an atlas, released by scGPT or written by :meth:`write`.

        Vectors of an index with lists stay on disk and are read where a search needs them. Nothing is unpickled.

        Parameters
        ----------
        folder
            Folder with ``index.faiss``, ``meta.h5ad`` (an HDF5 file whose data set ``meta_labels`` has one string for
            each cell) and, if it is there, ``index_config.json``.
        nprobe
            Number of lists that a search looks into; by default by their number as scGPT does it: 16 of up to 1,000, 32
            of up to 4,000, 64 of up to 16,000, else 128.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        MissingExtraError
            If faiss is not installed.
        ValueError
            If a file is damaged, or the number of labels is not that of the cells in the index.
        """
        folder = Path(folder)
        for name in (INDEX, LABELS):
            if not (folder / name).is_file():
                msg = f"{folder} has no file {name!r}; an atlas is a folder with {INDEX}, {LABELS} and {CONFIG}"
                raise FileNotFoundError(msg)
        index = _read_index(_faiss(), folder / INDEX)
        _set_probes(index, nprobe)
        codes, categories = _read_labels(folder / LABELS)
        return cls(index, codes, categories, _read_config(folder / CONFIG), folder / INDEX)

    @classmethod
    def build(
        cls,
        embedding: ArrayLike,
        labels: Sequence[str] | pd.Series | NDArray,
        *,
        factory: str = "Flat",
        nprobe: int | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> AtlasIndex:
        """Index labelled cells; those without a label or with a missing value in their embedding are left out.

        Parameters
        ----------
        embedding
            One row per cell, ``(cells, dim)``.
        labels
            Label of each cell.
        factory
            What faiss builds, in the words of its ``index_factory``: ``"Flat"`` is exact; scGPT's atlas is
            ``"PCA64,IVF16384_HNSW32,PQ16"``, which takes a hundredth of the memory.
        nprobe
            As in :meth:`read`.
        record
            Record of the embedding from ``adata.uns``, so that queries embedded otherwise are refused.

        Raises
        ------
        MissingExtraError
            If faiss is not installed.
        ValueError
            If shapes do not fit, no cell is left, or faiss cannot build the index from these cells.
        """
        faiss = _faiss()
        embedding = np.asarray(embedding)
        labels = pd.Series(np.asarray(labels, dtype=object))
        if embedding.ndim != 2 or len(embedding) != len(labels):
            msg = f"an atlas needs one label for each row of the embedding; got {embedding.shape} and {len(labels)} labels"
            raise ValueError(msg)
        usable = np.isfinite(embedding).all(1) & labels.notna().to_numpy()
        if not usable.any():
            msg = "no cell has both an embedding and a label, so there is nothing to index"
            raise ValueError(msg)
        codes, categories = pd.factorize(labels[usable].astype(str), sort=True)
        vectors = np.ascontiguousarray(embedding[usable], dtype=np.float32)
        try:
            index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
            index.train(vectors)
            index.add(vectors)
        except RuntimeError as error:
            msg = (
                f"faiss cannot build {factory!r} from {len(vectors):,} cells with {vectors.shape[1]} columns; "
                f"fewer lists need fewer cells, and 'Flat' any number. It says: {error}"
            )
            raise ValueError(msg) from error
        _set_probes(index, nprobe)
        config = {"index_desc": factory, "n_cells": len(vectors), "dim": vectors.shape[1]}
        if record is not None:
            config["embedding"] = _plain(record)
        return cls(index, codes.astype(np.int32), pd.Index(categories), config)

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the three files that :meth:`read` reads.

        Parameters
        ----------
        folder
            Folder, made if it is not there.
        overwrite
            Replace an atlas that is there.

        Raises
        ------
        FileExistsError
            If there is an atlas already and ``overwrite`` is not set.
        """
        folder = Path(folder)
        if (folder / INDEX).exists() and not overwrite:
            msg = f"{folder} holds an atlas already; choose another folder or set overwrite=True"
            raise FileExistsError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_index(folder / INDEX)
        (folder / LABELS).unlink(missing_ok=True)
        names = self.categories.to_numpy(dtype=object)
        with h5py.File(folder / LABELS, "w") as file:
            chunks = (min(len(self), _LABELS_AT_A_TIME),)
            dataset = file.create_dataset(
                _LABELS_DATASET, len(self), h5py.string_dtype(), chunks=chunks, compression="gzip"
            )
            for part in slices(len(self), _LABELS_AT_A_TIME):
                dataset[part] = names[self.codes[part]]
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    def _write_index(self, target: Path) -> None:
        if self.path is not None and self.path.resolve() == target.resolve():
            return
        # another process may have the old file mapped; a new one leaves it to that process
        target.unlink(missing_ok=True)
        if self.path is None:
            _faiss().write_index(self.index, str(target))
        else:
            # faiss would write a reference to the lists on disk, not the lists
            shutil.copyfile(self.path, target)

    def search(self, query: ArrayLike, k: int = 50) -> Neighbors:
        """Nearest cells of the atlas, as its index finds them.

        Parameters
        ----------
        query
            Embedding of the query cells, shape ``(queries, dim)``. Rows with a value that is not finite have no neighbours.
        k
            Number of neighbours. An index with lists may find fewer.

        Raises
        ------
        ValueError
            If the width is not that of the atlas, or ``k`` is not between 1 and the number of its cells.
        """
        query = np.asarray(query)
        if query.ndim != 2 or query.shape[1] != self.dim:
            msg = (
                f"the atlas has embeddings with {self.dim} columns, the query has shape {query.shape}; "
                "embed it with the model of the atlas"
            )
            raise ValueError(msg)
        check_k(k, len(self), "cells in its index")
        distances = np.full((len(query), k), np.nan)
        indices = np.full((len(query), k), -1, dtype=np.int64)
        usable = np.flatnonzero(np.isfinite(query).all(1))
        for part in slices(len(usable), _QUERIES_AT_A_TIME):
            rows = usable[part]
            found, where = self.index.search(np.ascontiguousarray(query[rows], dtype=np.float32), k)
            # what an index with lists does not find has number -1, which comes last
            found = np.where(where == _NOT_FOUND, np.inf, np.maximum(found.astype(np.float64), 0.0))
            order = np.lexsort((where, found), axis=1)
            where, found = np.take_along_axis(where, order, 1), np.take_along_axis(found, order, 1)
            indices[rows] = where
            distances[rows] = np.where(where == _NOT_FOUND, np.nan, found)
        return Neighbors(distances, indices)


def is_atlas(folder: str | os.PathLike[str]) -> bool:
    """Whether a path looks like the folder of an atlas."""
    return (Path(folder) / INDEX).is_file()


def _faiss() -> ModuleType:
    return require("faiss", purpose="an atlas")


def _lists(index: Any) -> Any | None:
    """The part of an index that has lists."""
    return _faiss().try_extract_index_ivf(index)


def _set_probes(index: Any, nprobe: int | None) -> None:
    lists = _lists(index)
    if nprobe is not None and (lists is None or not 1 <= nprobe <= lists.nlist):
        has = "has no lists" if lists is None else f"has {lists.nlist:,} lists"
        msg = f"nprobe is the number of lists to look into, and the index {has}; got {nprobe!r}"
        raise ValueError(msg)
    if lists is not None:
        default = next((probes for most, probes in _PROBES if lists.nlist <= most), _MOST_PROBES)
        lists.nprobe = nprobe or min(default, lists.nlist)


def _read_index(faiss: ModuleType, path: Path) -> Any:
    """Read an index, with its lists left on disk where its kind allows it."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError:
        pass
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        msg = f"{path} is no index of faiss, or is damaged; download or write it again. faiss says: {error}"
        raise ValueError(msg) from error


def _read_labels(path: Path) -> tuple[NDArray[np.int32], pd.Index]:
    """Codes and sorted labels, a million strings at a time."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        msg = f"{path} is no HDF5 file, or is damaged; download or write it again"
        raise ValueError(msg) from error
    with file:
        dataset = file.get(_LABELS_DATASET)
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or h5py.check_string_dtype(dataset.dtype) is None:
            there = ", ".join(map(repr, file)) or "nothing"
            msg = f"{path} has no list of strings {_LABELS_DATASET!r}; it has {there}"
            raise ValueError(msg)
        codes = np.empty(len(dataset), dtype=np.int32)
        seen = pd.Index([], dtype=object)
        for part in slices(len(dataset), _LABELS_AT_A_TIME):
            own, names = pd.factorize(dataset.asstr("utf-8")[part])
            seen = seen.append(pd.Index(names, dtype=object).difference(seen, sort=False))
            codes[part] = seen.get_indexer(names)[own]
    order = np.argsort(seen.to_numpy(dtype=object), kind="stable")
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    return rank[codes], seen[order]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        msg = f"{path} is no JSON file; write it again, or delete it"
        raise ValueError(msg) from error
    return config if isinstance(config, dict) else {"config": config}


def _plain(value: Any) -> Any:
    """The same in values that JSON knows."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
