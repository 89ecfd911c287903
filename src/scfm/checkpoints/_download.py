"""One HTTP download by pooch, with errors that a user understands."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from .. import _logging
from .._errors import OfflineError
from .._settings import settings

if TYPE_CHECKING:
    from pathlib import Path

    import requests

_WAITS = (1, 5)  # seconds before the second and the third attempt
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20


class _BrokenOffError(ConnectionError):
    """A transfer failed in a way that makes another attempt worthwhile."""


def download(url: str, target: Path) -> Path:
    """Download ``url`` to ``target``; what broke off is tried again from the start.

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
    for wait in _WAITS:
        try:
            return _attempt(url, target)
        except _BrokenOffError as error:
            _logging.info(f"{error} Trying again in {wait} s")
            time.sleep(wait)
    return _attempt(url, target)


def _attempt(url: str, target: Path) -> Path:
    import requests
    from pooch import HTTPDownloader
    from tqdm.auto import tqdm

    _logging.info(f"downloading {url}")
    # pooch sets the total when the server has told it; it takes a bar without a total for no bar
    with tqdm(total=1, unit="B", unit_scale=True, desc=target.name, disable=settings.verbosity < 2) as bar:
        fetch = HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, timeout=_TIMEOUT)
        try:
            fetch(url, str(target), None)
        except requests.RequestException as error:
            raise _explained(url, error) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            msg = f"no space left in {target.parent.parent}; set SCFM_CACHE to a directory on a larger disk"
            raise OSError(error.errno, msg) from None
    return target


def _explained(url: str, error: requests.RequestException) -> ConnectionError:
    """The same failure in one line, as a type that tells whether another attempt makes sense."""
    import requests
    from urllib3.exceptions import MaxRetryError

    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        kind = _BrokenOffError if status >= 500 else ConnectionError
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
