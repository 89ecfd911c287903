"""Where results go: an array in memory, or a zarr array on disk that a later run can finish."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import zarr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_ATTRIBUTE = "scfm"
_DONE_FILE = "scfm_done.txt"


class Writer(Protocol):
    """Takes the results of blocks of cells.

    Attributes
    ----------
    block_size
        Cells per block; every block but the last has this size.
    done
        Number of cells without result, for every finished block, by the first cell of the block.
    array
        The result, of shape ``(cells, ...)``.
    """

    block_size: int
    done: dict[int, int]
    array: Any

    def write(self, start: int, values: NDArray[np.float32], n_empty: int) -> None:
        """Store the results of the cells from ``start`` on."""


class MemoryWriter:
    """Results in one numpy array."""

    def __init__(self, shape: tuple[int, ...], block_size: int) -> None:
        self.block_size = block_size
        self.done: dict[int, int] = {}
        self.array = np.empty(shape, dtype=np.float32)

    def write(self, start: int, values: NDArray[np.float32], n_empty: int) -> None:
        self.array[start : start + len(values)] = values
        self.done[start] = n_empty


class ZarrWriter:
    """Results in a zarr array whose row chunks are the blocks.

    Killed at any moment, the folder is either absent or can be resumed: it appears by one rename, complete with the
    fingerprint of the run, and a block is noted in a text file only after its chunk has been written.

    Parameters
    ----------
    path
        Folder of the zarr array.
    shape
        Shape of the whole result.
    block_size
        Cells per block for a new array; an array that is resumed keeps its own.
    fingerprint
        What the numbers depend on, as JSON values.
    overwrite
        Replace an existing zarr array.

    Raises
    ------
    FileExistsError
        If ``path`` exists and is not a result of scfm.
    ValueError
        If ``path`` holds a result with another fingerprint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, ...],
        block_size: int,
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists():
            existing = self._open_existing()
            if overwrite:
                shutil.rmtree(self.path)
            else:
                self._check_same(existing, shape, fingerprint)
        if not self.path.exists():
            self._create(shape, block_size, fingerprint)
        self.array = zarr.open_array(self.path, mode="r+")
        self.block_size = int(self.array.chunks[0])
        self._done_file = self.path / _DONE_FILE
        self.done = self._read_done()

    def write(self, start: int, values: NDArray[np.float32], n_empty: int) -> None:
        self.array[start : start + len(values)] = values
        with self._done_file.open("ab") as file:
            file.write(f"{start} {n_empty}\n".encode())
        self.done[start] = n_empty

    def _open_existing(self) -> zarr.Array:
        with suppress(ValueError, FileNotFoundError, zarr.errors.NodeTypeValidationError):
            array = zarr.open_array(self.path, mode="r")
            if _ATTRIBUTE in array.attrs:
                return array
        msg = f"{self.path} exists and is not a result of scfm; choose another path for out="
        raise FileExistsError(msg)

    def _check_same(self, existing: zarr.Array, shape: tuple[int, ...], fingerprint: Mapping[str, Any]) -> None:
        before = dict(existing.attrs[_ATTRIBUTE])
        names = sorted({*before, *fingerprint})
        changed = [name for name in names if before.get(name) != fingerprint.get(name)]
        if existing.shape != shape:
            changed.append("shape")
        if changed:
            msg = (
                f"{self.path} holds a result of another run: {', '.join(changed)} differ. "
                "Pass overwrite=True to replace it, or another path for out="
            )
            raise ValueError(msg)

    def _create(self, shape: tuple[int, ...], block_size: int, fingerprint: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.creating-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        zarr.create_array(
            unfinished,
            shape=shape,
            chunks=(max(1, min(block_size, shape[0])), *shape[1:]),
            dtype="float32",
            fill_value=np.nan,
            attributes={_ATTRIBUTE: dict(fingerprint)},
        )
        unfinished.rename(self.path)

    def _read_done(self) -> dict[int, int]:
        if not self._done_file.exists():
            return {}
        text = self._done_file.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:
            # a kill in the middle of a line: the block will be done again, on a line of its own
            with self._done_file.open("r+b") as file:
                file.truncate(len(complete))
        return {int(start): int(n_empty) for start, n_empty in (line.split() for line in complete.splitlines())}
