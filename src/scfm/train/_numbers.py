"""Numbers from files and command lines, which may come as text."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def real(name: str, value: Any) -> float:
    """A finite number; YAML reads ``1e-3`` as text.

    Raises
    ------
    ValueError
        If it is none, naming the field.
    """
    try:
        number = float(value) if isinstance(value, (str, Real)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        msg = f"{name} must be a number; got {value!r}"
        raise ValueError(msg)
    return number


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number, at least ``least``.

    Raises
    ------
    ValueError
        If it is none, or smaller, naming the field.
    """
    whole = value if isinstance(value, int) and not isinstance(value, bool) else real(name, value)
    if whole != int(whole):
        msg = f"{name} must be a whole number; got {value!r}"
        raise ValueError(msg)
    if least is not None and whole < least:
        msg = f"{name} must be at least {least}; got {value!r}"
        raise ValueError(msg)
    return int(whole)
