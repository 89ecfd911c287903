"""Options of a tokenizer: which ones there are, and the part of them that belongs to a block of cells."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..backbones import Backbone


def accepted_options(backbone: Backbone) -> set[str]:
    """Keyword options of ``backbone.tokenize``."""
    parameters = inspect.signature(backbone.tokenize).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def check_options(backbone: Backbone, options: Mapping[str, Any], n_obs: int) -> None:
    """Raise unless the backbone's tokenizer has all ``options`` and those per cell have the right length.

    Raises
    ------
    TypeError
        If the tokenizer has no such option.
    ValueError
        If an array has not one entry for each cell.
    """
    accepted = accepted_options(backbone)
    unknown = [name for name in options if name not in accepted]
    if unknown:
        msg = (
            f"{backbone.kind} has no option {', '.join(map(repr, unknown))}; "
            f"its tokenizer takes {', '.join(sorted(accepted)) or 'no options'}"
        )
        raise TypeError(msg)
    for name, value in options.items():
        if is_per_cell(name, value) and len(value) != n_obs:
            msg = f"{name} must have one entry for each of the {n_obs} cells; it has {len(value)}"
            raise ValueError(msg)


def options_for(options: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The options for cells ``start:stop``: what is given per cell is cut, the rest is the same for all."""
    return {name: _cut(value, start, stop) if is_per_cell(name, value) else value for name, value in options.items()}


def is_per_cell(name: str, value: Any) -> bool:
    """Whether an option has one entry for each cell: arrays, and injected random numbers."""
    if name == "draws":
        return value is not None
    return isinstance(value, (np.ndarray, pd.Series, pd.Categorical))


def _cut(value: Any, start: int, stop: int) -> Any:
    return value.iloc[start:stop].to_numpy() if isinstance(value, pd.Series) else value[start:stop]
