"""One HTTP download by pooch, with errors that a user understands."""

from __future__ import annotations

import errno
import json
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from .. import _logging
from .._errors import OfflineError
from .._settings import settings

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import requests

_WAITS = (1, 5)  # seconds before the second and the third attempt
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20


class _BrokenOffError(ConnectionError):
    """A transfer failed in a way that makes another attempt worthwhile."""


def download(url: str, target: Path) -> Path:
    """Download ``url`` to ``target``, or the rest of it if a part is there that the server still vouches for.

    What breaks off is tried again. A part stays where it is if the server has named a version of the file that the rest can be
    asked for with; the name lies beside it until the file is complete.

    Raises
    ------
    scfm.OfflineError
        If scfm is offline or the server cannot be reached.
    ConnectionError
        If the server refuses or the transfer breaks off every time.
    OSError
        If the disk is full.
    """
    if settings.offline:
        msg = f"{url} is needed, and scfm is offline (settings.offline or SCFM_OFFLINE)"
        raise OfflineError(msg)
    part = _Part(url, target)
    try:
        for wait in _WAITS:
            try:
                return _attempt(part)
            except _BrokenOffError as error:
                _logging.info(f"{error} Trying again in {wait} s")
                time.sleep(wait)
        return _attempt(part)
    finally:
        if not part.version:
            part.remove()


class _Part:
    """A file that is on its way, and what is known about the server's version of it."""

    def __init__(self, url: str, target: Path) -> None:
        self.url, self.target = url, target
        self._note = note_of(target)
        self.version, self.complete = "", False
        try:
            known = json.loads(self._note.read_text(encoding="utf-8"))
            self.version = str(known["version"]) if known["url"] == url and target.is_file() else ""
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def length(self) -> int:
        """Bytes that need not be asked for again."""
        return self.target.stat().st_size if self.version else 0

    def begin(self, response: requests.Response, file: BinaryIO) -> None:
        """Put the file where the bytes of an answer belong, and remember which version they are of."""
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            begins = f"bytes {self.length()}-"
            if not response.headers.get("Content-Range", "").startswith(begins):
                msg = f"{self.url} cannot be downloaded: the server sends another part than the one it was asked for."
                self.version = ""
                raise _BrokenOffError(msg)
            file.seek(self.length())
        elif response.ok and not response.is_redirect:
            file.seek(0)
            file.truncate()
            tag = response.headers.get("ETag", "")
            # a weak tag does not promise the same bytes
            self.version = response.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
            note = json.dumps({"url": self.url, "version": self.version})
            self._note.write_text(note, encoding="utf-8")
        elif response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.version = ""

    def finish(self) -> Path:
        """The complete file."""
        self.version, self.complete = "", True
        self._note.unlink(missing_ok=True)
        return self.target

    def remove(self) -> None:
        """Delete what is no use to a later attempt."""
        self._note.unlink(missing_ok=True)
        if not self.complete:
            self.target.unlink(missing_ok=True)


def note_of(target: Path) -> Path:
    """File beside a partial download that says of which version it is a part."""
    return target.with_name(f"{target.name}.version")


def _attempt(part: _Part) -> Path:
    import requests
    from pooch import HTTPDownloader
    from tqdm.auto import tqdm

    done, target = part.length(), part.target
    # bytes that the server packs on the way would not be those that the range counts
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": part.version}
        _logging.info(f"going on with {part.url} after {done / 1e6:,.1f} MB")
    else:
        _logging.info(f"downloading {part.url}")
    # pooch sets the total when the server has told it; it takes a bar without a total for no bar
    with (
        target.open("r+b" if done else "w+b") as file,
        tqdm(total=1, unit="B", unit_scale=True, desc=target.name, disable=settings.verbosity < 2) as bar,
    ):

        def begin(response: requests.Response, *_: object, **__: object) -> None:
            part.begin(response, file)

        fetch = HTTPDownloader(
            progressbar=bar, chunk_size=_CHUNK, timeout=_TIMEOUT, headers=headers, hooks={"response": begin}
        )
        try:
            fetch(part.url, file, None)
        except requests.RequestException as error:
            raise _explained(part.url, error) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            msg = f"no space left in {target.parent.parent}; set SCFM_CACHE to a directory on a larger disk"
            raise OSError(error.errno, msg) from None
    return part.finish()


def _explained(url: str, error: requests.RequestException) -> ConnectionError:
    """The same failure in one line, as a type that tells whether another attempt makes sense."""
    import requests
    from urllib3.exceptions import MaxRetryError

    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        again = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        kind = _BrokenOffError if again else ConnectionError
        return kind(f"{url} cannot be downloaded: the server answers {status}.")
    if error.args and isinstance(error.args[0], MaxRetryError):  # no connection came about
        return OfflineError(f"{url} cannot be reached ({_reason(error)}). Check the network and the proxy settings.")
    if isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
        return _BrokenOffError(f"The download of {url} broke off ({_reason(error)}).")
    return ConnectionError(f"{url} cannot be downloaded ({_reason(error)}).")


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
