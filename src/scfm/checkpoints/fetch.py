"""Getting the files of a checkpoint: from the cache, from a directory of the user, or from the network.

A file in the cache is complete or absent: a download lands under another name, is checked there, and is moved into place in
one step. What lies in place is never deleted and never downloaded again. What broke off goes on where it ended, if the server
can say that it still has the same file.
"""

from __future__ import annotations

import errno
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _logging
from .._errors import LicenseError, OfflineError
from .._settings import settings
from ._download import download
from ._pins import check
from ._registry import info

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._registry import Entry, Mirror, RemoteFile

_PARTIAL = ".partial"
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_shown: set[str] = set()


def fetch(name: str, *, path: str | Path | None = None, mirror: str | None = None) -> Path:
    """Make sure that the files of a checkpoint are here.

    Parameters
    ----------
    name
        Name or alias, see :func:`scfm.checkpoints.list`.
    path
        Directory in which the files lie already; nothing is downloaded or copied then. By default they are looked for
        in ``settings.cachedir / name``, where they may have been put by hand, and downloaded if they are not there.
    mirror
        Name of a copy that somebody other than the authors keeps, see :func:`scfm.checkpoints.info`.

    Returns
    -------
    The directory with the files.

    Raises
    ------
    ValueError
        If no checkpoint or mirror has this name.
    scfm.LicenseError
        Before a download, if the licence is non-commercial or not stated and has not been accepted.
    scfm.OfflineError
        If a file is missing and scfm is offline or the server cannot be reached.
    FileNotFoundError
        If a file is missing that has to be fetched by hand.
    scfm.CheckpointError
        If a file does not have the hash it should have.
    PermissionError
        If the cache cannot be written to.

    Examples
    --------
    >>> import scfm
    >>> scfm.checkpoints.fetch("scgpt", path="downloads/scGPT_human")  # doctest: +SKIP
    PosixPath('downloads/scGPT_human')
    """
    entry = info(name)
    return fetch_files(entry, entry.required_files, path=path, mirror=mirror)


def fetch_file(name: str, file: str) -> Path:
    """Make sure that one file of a checkpoint is here, for example its gene list; raises like :func:`fetch`."""
    entry = info(name)
    return fetch_files(entry, [entry.file(file)]) / file


def fetch_files(
    entry: Entry, files: Sequence[RemoteFile], *, path: str | Path | None = None, mirror: str | None = None
) -> Path:
    """Make sure that some files of a checkpoint are here; see :func:`fetch`."""
    if path is not None:
        return _from_directory(entry, files, Path(path).expanduser())
    directory = entry.directory
    source = entry.mirror(mirror) if mirror else None
    missing = _missing(files, directory)
    if missing:
        _refuse_unless_possible(entry, missing, source)
        with _locked(directory) as alone:
            # another process may have brought some of them while this one waited
            for file in _missing(missing, directory):
                _bring(file, _url(file, source), directory, alone=alone)
    for file in files:
        check(directory / file.name, file, pin=entry.bundled is None)
    return directory


def show_licence(entry: Entry, *, presumed: bool = False) -> None:
    """Log licence and citation of a checkpoint, once per process; ``presumed`` if its identity is not certain."""
    if entry.name in _shown:
        return
    _shown.add(entry.name)
    licence = entry.licence
    lines = [f"{licence.text} {licence.url}".rstrip()]
    if entry.citation.text:
        lines.append(f"Cite: {entry.citation}")
    _logging.info(
        f"{'If these are the released weights of ' if presumed else ''}{entry.name}: "
        f"licence of the weights: {licence.name} (commercial use: {licence.commercial})",
        deep="\n    ".join(lines),
    )


def _missing(files: Sequence[RemoteFile], directory: Path) -> list[RemoteFile]:
    return [file for file in files if not (directory / file.name).is_file()]


def _url(file: RemoteFile, mirror: Mirror | None) -> str | None:
    return file.url or (mirror.files.get(file.name) if mirror else None)


def _from_directory(entry: Entry, files: Sequence[RemoteFile], directory: Path) -> Path:
    missing = _missing(files, directory)
    if missing:
        msg = f"{directory} lacks {_names(missing)} of checkpoint {entry.name!r}. {_where(entry, missing, directory)}"
        raise FileNotFoundError(msg)
    for file in files:
        check(directory / file.name, file, pin=False)
    return directory


def _refuse_unless_possible(entry: Entry, missing: Sequence[RemoteFile], mirror: Mirror | None) -> None:
    """Everything that speaks against a download is said before a socket is opened or a file is made."""
    what = f"checkpoint {entry.name!r} needs {_names(missing)}"
    if settings.offline:
        msg = (
            f"{what}, and scfm is offline (settings.offline or SCFM_OFFLINE). {_where(entry, missing, entry.directory)}"
        )
        raise OfflineError(msg)
    if by_hand := [file for file in missing if _url(file, mirror) is None]:
        msg = f"{what}; {_names(by_hand)} cannot be downloaded by a program. {_where(entry, by_hand, entry.directory)}"
        raise FileNotFoundError(msg)
    licence = entry.licence
    if licence.needs_consent and not settings.accept_licenses and any(file.licence is None for file in missing):
        kind = "non-commercial" if licence.commercial == "no" else "not clearly stated"
        msg = (
            f"the licence of the weights of {entry.name!r} is {kind}: {licence.name}. {licence.text} {licence.url}\n"
            "To accept it and download, set scfm.settings.accept_licenses = True "
            "or the environment variable SCFM_ACCEPT_LICENSES=1."
        )
        raise LicenseError(msg)


def _where(entry: Entry, files: Sequence[RemoteFile], directory: Path) -> str:
    """Where files are to be had and where they have to be put."""
    parts = [f"{file.name}: {file.url}" for file in files if file.url]
    if entry.by_hand and any(file.url is None for file in files):
        parts.append(f"{entry.by_hand.text} {entry.by_hand.link}")
    for mirror in entry.mirrors:
        how = f", or scfm.checkpoints.fetch({entry.name!r}, mirror={mirror.name!r})" if mirror.files else ""
        parts.append(f"Mirror ({mirror.note}): {mirror.link}{how}")
    lines = "\n    ".join(parts)
    return f"Get\n    {lines}\nand put {_names(files)} into {directory}"


def _names(files: Sequence[RemoteFile]) -> str:
    return ", ".join(file.name for file in files)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Let one process at a time download into ``directory``; the system frees the lock of a process that dies.

    Yields
    ------
    Whether this process is the only one; file systems without locks cannot promise it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory.parent / f".{directory.name}.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _logging.info(f"another process is downloading into {directory}; waiting for it")
            lock.acquire()
    except NotImplementedError:
        yield False
        return
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        yield True
    finally:
        lock.release()


def _bring(file: RemoteFile, url: str, directory: Path, *, alone: bool) -> None:
    """Download one file into a directory beside its place, check it, and move it in.

    The directory is the same every time, so that a later call goes on with a part, unless another process may use it, too.
    """
    try:
        if alone:
            _arrive(file, url, directory, directory / _PARTIAL)
        else:
            with tempfile.TemporaryDirectory(dir=directory, prefix=_PARTIAL) as private:
                _arrive(file, url, directory, Path(private))
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise _cannot_write(directory, error) from error


def _arrive(file: RemoteFile, url: str, directory: Path, partial: Path) -> None:
    partial.mkdir(exist_ok=True)
    try:
        arrived = download(url, partial / file.name)
        try:
            check(arrived, file, pin=False, downloaded_from=url)
            arrived.replace(directory / file.name)
        finally:
            arrived.unlink(missing_ok=True)
    finally:
        # parts of this and other files stay
        with suppress(OSError):
            partial.rmdir()


def _cannot_write(directory: Path, error: OSError) -> PermissionError:
    return PermissionError(
        f"cannot write to {directory} ({error.strerror or error}). Set the environment variable SCFM_CACHE, or "
        "scfm.settings.cachedir, to a directory that can be written to."
    )
