"""Checkpoints: what is released, how it gets here, how it is kept."""

from __future__ import annotations

from .convert import KeyRule, LoadReport

__all__ = ["KeyRule", "LoadReport"]
