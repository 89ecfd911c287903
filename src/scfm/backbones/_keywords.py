"""Names of the options of a function."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def keyword_options(function: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments that can be given by keyword only; ``None`` if the function takes any name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
