"""Scanpy-style log lines: a start line gives a time stamp, the end line shows the time that passed."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.DEBUG}

_logger = logging.getLogger("scfm")


class _StderrHandler(logging.StreamHandler):
    """Writes to the ``sys.stderr`` of the moment, so that notebooks and pytest can capture it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"WARNING: {message}" if record.levelno == logging.WARNING else message


if not _logger.handlers:
    _logger.addHandler(_StderrHandler())
    _logger.propagate = False


def set_verbosity(level: int) -> None:
    """Apply ``settings.verbosity`` (0 errors, 1 warnings, 2 info, 3 debug)."""
    _logger.setLevel(_LEVELS[min(max(int(level), 0), 3)])


def _emit(level: int, message: str, time: datetime | None, deep: str | None) -> datetime:
    now = datetime.now(tz=UTC)
    if time is not None:
        passed = timedelta(seconds=round((now - time).total_seconds(), 1))
        message = f"{message} ({str(passed).rstrip('0') if passed.microseconds else passed})"
    if deep is not None and _logger.isEnabledFor(logging.INFO):
        message = f"{message}\n    {deep}"
    _logger.log(level, message)
    return now


def warning(message: str) -> datetime:
    """Log a warning."""
    return _emit(logging.WARNING, message, None, None)


def info(message: str, *, time: datetime | None = None, deep: str | None = None) -> datetime:
    """Log a line; with ``time`` (a value returned earlier) the passed time is appended."""
    return _emit(logging.INFO, message, time, deep)


def debug(message: str) -> datetime:
    """Log a detail."""
    return _emit(logging.DEBUG, message, None, None)


class _Once(logging.Filter):
    """Drops warnings that were given before."""

    def __init__(self, given: set[str]) -> None:
        super().__init__()
        self.given = given

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        message = record.getMessage()
        new = message not in self.given
        self.given.add(message)
        return new


@contextmanager
def each_warning_once(given: set[str] | None = None) -> Iterator[None]:
    """Within the block, what is true of every batch is said once; with ``given``, once in all blocks that share it."""
    once = _Once(set() if given is None else given)
    _logger.addFilter(once)
    try:
        yield
    finally:
        _logger.removeFilter(once)
