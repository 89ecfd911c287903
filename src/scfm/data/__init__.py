"""From files and AnnData objects to blocks of cells."""

from __future__ import annotations

from ._source import Block, CellSource, open_source

__all__ = ["Block", "CellSource", "open_source"]
