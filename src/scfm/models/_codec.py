"""Registries and histories as JSON: arrays and tables keep their types, and nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_ARRAY = "__array__"
_TABLE = "__table__"


def encode(value: Any) -> Any:
    """JSON-writable form of nested mappings and lists of numbers, texts, arrays and tables.

    Raises
    ------
    TypeError
        If there is anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): encode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, np.ndarray):
        return {_ARRAY: [encode(item) for item in value.tolist()], "dtype": str(value.dtype)}
    if isinstance(value, pd.DataFrame):
        columns = {str(name): encode(column.to_numpy()) for name, column in value.items()}
        return {_TABLE: columns, "index": encode(value.index.to_numpy()), "name": value.index.name}
    msg = f"a {type(value).__name__} cannot be saved as JSON"
    raise TypeError(msg)


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return np.array(value[_ARRAY], dtype=value["dtype"])
    if _TABLE in value:
        columns = {name: decode(column) for name, column in value[_TABLE].items()}
        return pd.DataFrame(columns, index=pd.Index(decode(value["index"]), name=value["name"]))
    return {name: decode(item) for name, item in value.items()}
