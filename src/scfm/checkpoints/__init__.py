"""Checkpoints: what is released, how it gets here, how it is kept."""

from __future__ import annotations

from ._registry import Entry, info
from ._registry import list_checkpoints as list
from .convert import KeyRule, LoadReport
from .fetch import fetch, fetch_file

__all__ = ["Entry", "KeyRule", "LoadReport", "fetch", "fetch_file", "info", "list"]
