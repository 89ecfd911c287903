"""The registry of backbone classes: the entry-point group ``scfm.backbones``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._base import Backbone


@cache
def _entry_points() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="scfm.backbones")}


def backbone_kinds() -> list[str]:
    """Names of all installed backbone classes."""
    return sorted(_entry_points())


@cache
def backbone_class(kind: str) -> type[Backbone]:
    """The class registered under ``kind`` in the entry-point group ``scfm.backbones``."""
    points = _entry_points()
    if kind not in points:
        msg = f"no backbone class {kind!r} is installed; there are {', '.join(sorted(points)) or 'none'}"
        raise KeyError(msg)
    return points[kind].load()


def kinds_with(condition: Callable[[type[Backbone]], bool]) -> list[str]:
    """Names of the installed classes that meet a condition."""
    return [kind for kind in backbone_kinds() if _meets(kind, condition)]


def _meets(kind: str, condition: Callable[[type[Backbone]], bool]) -> bool:
    try:
        return condition(backbone_class(kind))
    except (ImportError, AttributeError):  # a broken third-party package must not hide the real message
        return False
