"""Parts of AnnData files, read without loading the rest of the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import pandas as pd
import zarr
from anndata.io import read_elem, sparse_dataset

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path


@dataclass
class StoredAnnData:
    """An ``.h5ad`` file or a ``.zarr`` store; matrices stay on disk."""

    root: h5py.File | zarr.Group
    path: Path

    def layers(self) -> list[str]:
        """Names of the layers."""
        return sorted(self.root["layers"].keys()) if "layers" in self.root else []

    def matrix(self, name: str) -> Any:
        """The matrix at ``name`` as a backed object, or ``None`` if there is none."""
        if name not in self.root:
            return None
        item = self.root[name]
        if isinstance(item, (h5py.Dataset, zarr.Array)):
            return item if item.ndim == 2 else None
        return sparse_dataset(item)

    def var(self, name: str) -> pd.DataFrame:
        """The table of genes."""
        return read_elem(self.root[name])

    def obs_names(self) -> pd.Index:
        """Names of the cells, without the other columns of ``obs``."""
        obs = self.root["obs"]
        return pd.Index(read_elem(obs[obs.attrs["_index"]]))


def open_file(path: Path, files: ExitStack) -> StoredAnnData:
    """Open ``path`` for reading; ``files`` closes it.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is not an AnnData file, or one in a layout that only an older anndata wrote.
    """
    path = path.expanduser()
    if not path.exists():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    if path.suffix == ".h5mu":
        msg = f"{path.name} is a MuData file; read it with mudata.read_h5mu and pass one modality, for example mdata['rna']"
        raise ValueError(msg)
    root = _open_zarr(path) if path.is_dir() else _open_hdf5(path, files)
    stored = StoredAnnData(root, path)
    if not {"obs", "var"} <= set(root.keys()):
        msg = f"{path.name} is not an AnnData file: it holds {', '.join(sorted(root.keys())) or 'nothing'}"
        raise ValueError(msg)
    if not all("_index" in root[name].attrs for name in ("obs", "var")):
        msg = (
            f"{path.name} has the layout of an old anndata; write it again with anndata.read_h5ad(...).write_h5ad(...)"
        )
        raise ValueError(msg)
    return stored


def _open_hdf5(path: Path, files: ExitStack) -> h5py.File:
    try:
        return files.enter_context(h5py.File(path, "r"))
    except OSError as error:
        msg = f"{path.name} cannot be read as .h5ad (damaged, incomplete, or another format): {error}"
        raise ValueError(msg) from error


def _open_zarr(path: Path) -> zarr.Group:
    try:
        return zarr.open_group(path, mode="r")
    except (zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError, ValueError, FileNotFoundError) as error:
        msg = f"{path.name} cannot be read as an AnnData zarr store: {error}"
        raise ValueError(msg) from error
