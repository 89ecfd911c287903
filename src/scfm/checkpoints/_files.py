"""Files that are either complete or absent: hashes, atomic writes, and directories published in one step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _logging
from .._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

_hashes: dict[tuple[str, int, int], str] = {}


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text; remembered for this process until size or time stamp change."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: readers see the old content or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        give_rights(Path(temporary))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file, or say which file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path} is missing; the checkpoint directory is incomplete. Fetch or save it again."
        raise CheckpointError(msg) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is damaged or cut off ({error}). Delete it and fetch or save the checkpoint again."
        raise CheckpointError(msg) from None


def backup_of(path: Path) -> Path:
    """Where the old version of a directory waits while the new one is moved in."""
    return path.with_name(f".{path.name}.replaced")


def recover(path: Path) -> None:
    """Put the old version of a directory back if a process died between the two moves of an overwrite."""
    if path.exists():
        return
    backup = backup_of(path)
    if backup.is_dir():
        backup.replace(path)
        _logging.warning(f"{path} was being overwritten by a process that died; its former content is back")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside ``path`` that becomes ``path`` when the block ends without an error.

    A process that dies on the way leaves ``path`` as it was, or, between the two moves of an overwrite, a backup
    that :func:`recover` puts back.

    Raises
    ------
    FileExistsError
        If ``path`` exists and ``overwrite`` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    if path.exists() and not overwrite:
        msg = f"{path} exists already; pass overwrite=True to replace it"
        raise FileExistsError(msg)
    staged = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        yield staged
        _open_up(staged)
        _publish(staged, path, overwrite=overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, path: Path, *, overwrite: bool) -> None:
    backup = backup_of(path)
    if path.exists() and overwrite:
        if backup.exists():
            shutil.rmtree(backup)
        path.replace(backup)
    try:
        staged.replace(path)
    except OSError as error:
        if path.exists():
            msg = f"{path} exists already: another process made it meanwhile"
            raise FileExistsError(msg) from error
        recover(path)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def give_rights(path: Path) -> None:
    """Give a file or directory that was made private the rights that the user's other ones have.

    Temporary files are private, and so are those that ``safetensors`` writes.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _open_up(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            give_rights(path)
