"""MindSpore checkpoints (``.ckpt``), read without MindSpore and without protobuf.

Such a file is a row of protobuf records ``tag, (dims, type, content)``. Only the heads of the records are parsed; the
contents stay in the memory-mapped file, whatever its size, and become tensors without a copy.
"""

from __future__ import annotations

import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_CRC_MARK = b"crc_num"
_CRC_LENGTH = 17
_CRC_CHUNK = 1 << 24
# what MindSpore's encryption puts in front of every block
_ENCRYPTED = tuple(0x7F3A5ED8.to_bytes(4, order) for order in ("little", "big"))
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_DTYPES: dict[str, tuple[np.dtype, torch.dtype]] = {
    name: (np.dtype(stored), kind)
    for name, stored, kind in (
        ("Float16", "<f2", torch.float16),
        ("Float32", "<f4", torch.float32),
        ("Float64", "<f8", torch.float64),
        ("BFloat16", "<i2", torch.bfloat16),
        ("Int8", "<i1", torch.int8),
        ("Int16", "<i2", torch.int16),
        ("Int32", "<i4", torch.int32),
        ("Int64", "<i8", torch.int64),
        ("UInt8", "<u1", torch.uint8),
        ("UInt16", "<u2", torch.uint16),
        ("UInt32", "<u4", torch.uint32),
        ("UInt64", "<u8", torch.uint64),
        ("Bool", "|b1", torch.bool),
        # one number in each byte
        ("Int4", "<i1", torch.int8),
    )
}
_TEXT = "str"


@dataclass
class Entry:
    """A tensor of a file: what it is and where its bytes lie.

    Parameters
    ----------
    shape
        Sizes; empty for a scalar.
    kind
        Name of the type in the file.
    places
        Start and end of the content in the file; several where the writer split the tensor.
    """

    shape: tuple[int, ...]
    kind: str
    places: list[tuple[int, int]]

    @property
    def n_bytes(self) -> int:
        """Length of the content."""
        return sum(stop - start for start, stop in self.places)


class MindSporeFile:
    """A memory-mapped MindSpore checkpoint.

    Parameters
    ----------
    path
        The file.
    check_crc
        Compare the checksum at the end of the file, if it has one; the whole file is read for that.

    Attributes
    ----------
    entries
        What the file holds, by name; of several with the same name the last counts.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    CheckpointError
        If it is no such file, damaged, cut off or encrypted.
    """

    def __init__(self, path: str | Path, *, check_crc: bool = False) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            start = file.read(4)
            if not start:
                msg = f"{self.path} is empty; fetch it again"
                raise CheckpointError(msg)
            if start in _ENCRYPTED:
                msg = f"{self.path} is encrypted; decrypt it with MindSpore (load_checkpoint(dec_key=...)) and save it"
                raise CheckpointError(msg)
            # a private map is writable, as torch wants it, and never changes the file
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._end, crc = len(self._map), None
        if self._map[-_CRC_LENGTH : -_CRC_LENGTH + len(_CRC_MARK)] == _CRC_MARK:
            crc = int.from_bytes(self._map[-_CRC_LENGTH + len(_CRC_MARK) :], "big")
            self._end -= _CRC_LENGTH
        self.entries = self._read_heads()
        if check_crc and crc is not None and crc != self._crc():
            msg = f"the checksum of {self.path} is wrong: the file is damaged; fetch it again"
            raise CheckpointError(msg)

    def tensor(self, name: str) -> Tensor:
        """One tensor, a view of the map; a copy if the writer split it.

        Raises
        ------
        KeyError
            If the file has no such tensor, or it is a text.
        """
        entry = self.entries[name]
        if entry.kind == _TEXT:
            msg = f"{name!r} is a text; see text()"
            raise KeyError(msg)
        stored, kind = _DTYPES[entry.kind]
        if len(entry.places) == 1:
            start, stop = entry.places[0]
            if entry.n_bytes == 0:
                return torch.empty(entry.shape, dtype=kind)
            array = np.frombuffer(self._map, stored, (stop - start) // stored.itemsize, start)
        else:
            array = np.empty(entry.n_bytes // stored.itemsize, stored)
            target, at = memoryview(array).cast("B"), 0
            for start, stop in entry.places:
                target[at : at + stop - start] = memoryview(self._map)[start:stop]
                at += stop - start
        return torch.from_numpy(array).view(kind).reshape(entry.shape)

    def text(self, name: str) -> str:
        """A text that was saved beside the tensors."""
        return b"".join(self._map[start:stop] for start, stop in self.entries[name].places).decode("utf-32-le")

    def read(self, skip: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """All tensors by name, without those that ``skip`` is true for; texts are left out."""
        names = (name for name, entry in self.entries.items() if entry.kind != _TEXT)
        return {name: self.tensor(name) for name in names if skip is None or not skip(name)}

    def release(self) -> None:
        """Give back the memory of the pages read so far; tensors read them again when they are used."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    # -- the format --------------------------------------------------------------------------------------------------

    def _read_heads(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        last = None
        for field, start, stop in self._fields(0, self._end):
            if field != 1:
                self._fail(start)
            tag, entry = self._read_record(start, stop)
            # a tensor above a limit is split into records that follow one another, all with the full shape
            if tag == last and not self._complete(tag, entries[tag], start):
                entries[tag].places += entry.places
            else:
                entries.pop(tag, None)
                entries[tag] = entry
            last = tag
        for tag, entry in entries.items():
            if not self._complete(tag, entry, self._end):
                msg = f"{self.path} is cut off: {tag!r} has {entry.n_bytes:,} bytes, too few for {entry.shape}"
                raise CheckpointError(msg)
        return entries

    def _complete(self, tag: str, entry: Entry, at: int) -> bool:
        if entry.kind == _TEXT:
            return True
        if entry.kind not in _DTYPES:
            msg = f"{tag!r} in {self.path} has the type {entry.kind!r}, which scfm does not know"
            raise CheckpointError(msg)
        wanted = int(np.prod(entry.shape, dtype=np.int64)) * _DTYPES[entry.kind][0].itemsize
        if entry.n_bytes > wanted:
            self._fail(at, f"{tag!r} has {entry.n_bytes:,} bytes, too many for {entry.kind} of shape {entry.shape}")
        return entry.n_bytes == wanted

    def _read_record(self, start: int, stop: int) -> tuple[str, Entry]:
        tag, tensor = None, None
        for field, at, value in self._fields(start, stop):
            if field == 1:
                tag = self._text(at, value)
            elif field == 2:
                tensor = (at, value)
        if tag is None or tensor is None:
            self._fail(start, "a record has no name or no tensor")
        dims: list[int] = []
        kind, places = "", []
        for field, at, value in self._fields(*tensor):
            if field == 1 and at < 0:
                dims.append(value)
            elif field == 1:
                while at < value:
                    number, at = self._varint(at, value)
                    dims.append(number)
            elif field == 2:
                kind = self._text(at, value)
            elif field == 3:
                places.append((at, value))
        # the writer has no shape for scalars: it leaves the sizes out, or writes a single 0
        shape = () if dims == [0] else tuple(dims)
        return tag, Entry(shape, kind, places[-1:])

    def _fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Number, start and end of each field of a message; -1 and the value for numbers; skips fixed-size fields."""
        while at < stop:
            key, at = self._varint(at, stop)
            wire = key & 7
            if wire == _VARINT:
                value, at = self._varint(at, stop)
                yield key >> 3, -1, value
            elif wire == _BYTES:
                length, at = self._varint(at, stop)
                if length > stop - at:
                    self._fail(at, f"{length - (stop - at):,} bytes are missing")
                yield key >> 3, at, at + length
                at += length
            elif wire in (_FIXED32, _FIXED64):
                at += 4 if wire == _FIXED32 else 8
            else:
                self._fail(at)

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        value = shift = 0
        while at < stop and shift < 64:
            byte = self._map[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
        self._fail(at)

    def _text(self, start: int, stop: int) -> str:
        try:
            return self._map[start:stop].decode() if start >= 0 else self._fail(0)
        except UnicodeDecodeError:
            self._fail(start)

    def _fail(self, at: int, why: str = "") -> Any:
        msg = (
            f"{self.path} is no MindSpore checkpoint, or it is encrypted, damaged or cut off (at byte {at:,} of "
            f"{len(self._map):,}{': ' if why else ''}{why})"
        )
        raise CheckpointError(msg)

    def _crc(self) -> int:
        crc = 0
        with memoryview(self._map) as view:
            for start in range(0, self._end, _CRC_CHUNK):
                crc = zlib.crc32(view[start : min(start + _CRC_CHUNK, self._end)], crc)
        return crc


def read(path: str | Path, *, skip: Callable[[str], bool] | None = None, check_crc: bool = False) -> dict[str, Tensor]:
    """Tensors of a MindSpore checkpoint by name, as views of the memory-mapped file.

    Parameters
    ----------
    path
        The file.
    skip
        Leave out names for which this is true.
    check_crc
        Compare the checksum at the end of the file, if it has one.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    CheckpointError
        If it is no such file, damaged, cut off or encrypted.
    """
    return MindSporeFile(path, check_crc=check_crc).read(skip)


def names(path: str | Path) -> frozenset[str]:
    """Names of what a file holds; empty if it is no MindSpore checkpoint."""
    try:
        return frozenset(MindSporeFile(path).entries)
    except (CheckpointError, OSError):
        return frozenset()
