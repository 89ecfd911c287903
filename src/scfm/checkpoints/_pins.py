"""Trust in files: certain hashes are enforced, the others are fixed when a file is first used.

Beside a file in the cache stands ``<file>.sha256`` in the format of ``sha256sum -c``. Its comment line holds size and
time stamp at the time of hashing, so that a file of gigabytes is not hashed again by every process.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from .. import _logging
from .._errors import CheckpointError
from ._files import sha256, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from ._registry import RemoteFile

_PATTERN = re.compile(r"# scfm: (\d+) bytes, modified (\d+) ns\n([0-9a-f]{64})  ")


class _Pin(NamedTuple):
    bytes: int
    modified: int
    sha256: str


def check(path: Path, file: RemoteFile, *, pin: bool, downloaded_from: str = "") -> str:
    """Compare a file with its known hash and with its hash at first use.

    Parameters
    ----------
    path
        The file.
    file
        What the registry knows about it.
    pin
        Write down the hash at first use, and compare with it later.
    downloaded_from
        URL, if the file has just arrived and is not in place yet.

    Returns
    -------
    SHA-256 of the file.

    Raises
    ------
    CheckpointError
        If the hash differs from a certain one or from the one at first use.
    """
    old = _read_pin(path) if pin else None
    status = path.stat()
    unchanged = old is not None and (old.bytes, old.modified) == (status.st_size, status.st_mtime_ns)
    found = old.sha256 if unchanged else sha256(path)

    if file.sha256 and found != file.sha256:
        if file.hash_verified:
            raise CheckpointError(_mismatch(path, found, file.sha256, file.hash_source, downloaded_from))
        if old is None or old.sha256 != found:
            _logging.warning(
                f"{path} has SHA-256 {found}, but {file.sha256} was expected ({file.hash_source}). The expected "
                "hash is not certain, so the file is used. If you did not expect this, fetch it again from "
                "the authors."
            )
    if old is not None and old.sha256 != found:
        raise CheckpointError(_mismatch(path, found, old.sha256, "at first use", downloaded_from))
    if pin and not unchanged:
        _write_pin(path, _Pin(status.st_size, status.st_mtime_ns, found))
    return found


def pinned(path: Path) -> str:
    """SHA-256 of a file, from its pin if there is a fresh one."""
    old = _read_pin(path)
    status = path.stat()
    if old is not None and (old.bytes, old.modified) == (status.st_size, status.st_mtime_ns):
        return old.sha256
    return sha256(path)


def pin_path(path: Path) -> Path:
    """Where the hash of a file at first use is written down."""
    return path.with_name(f"{path.name}.sha256")


def _read_pin(path: Path) -> _Pin | None:
    try:
        text = pin_path(path).read_text(encoding="utf-8")
    except OSError:
        return None
    match = _PATTERN.match(text)
    if match is None:
        _logging.warning(f"{pin_path(path)} is not readable and is written anew")
        return None
    return _Pin(int(match[1]), int(match[2]), match[3])


def _write_pin(path: Path, pin: _Pin) -> None:
    text = f"# scfm: {pin.bytes} bytes, modified {pin.modified} ns\n{pin.sha256}  {path.name}\n"
    try:
        write_text(pin_path(path), text)
    except OSError as error:
        _logging.debug(f"the hash of {path} is not kept, its directory cannot be written to ({error})")


def _mismatch(path: Path, found: str, wanted: str, source: str, downloaded_from: str) -> str:
    if downloaded_from:
        return (
            f"the download of {path.name} from {downloaded_from} has SHA-256 {found}, expected is {wanted} ({source}). "
            "Nothing was kept; try again, and report it if it happens twice."
        )
    return (
        f"{path} has SHA-256 {found}, expected is {wanted} ({source}): the file is damaged, cut off or was changed. "
        f"Move it and {pin_path(path).name} away and fetch it again."
    )
