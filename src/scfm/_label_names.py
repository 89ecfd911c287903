"""Names of labels: the same text for the same label, whatever type it has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_bool_dtype, is_numeric_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

_WHOLE = re.compile(r"([+-]?\d+)\.0*")


def label_names(values: Sequence | np.ndarray | pd.Index | pd.Series, *, beside_numbers: bool = False) -> pd.Series:
    """Labels as text, missing where they are.

    Whole numbers are named alike whether they come as integers or as floats, as they do beside missing values.

    Parameters
    ----------
    values
        Labels of any type.
    beside_numbers
        They are compared with numbers: text such as ``"1.0"`` means the number, too.

    Returns
    -------
    A column of objects with the index of ``values``, if it has one.
    """
    values = pd.Series(values)
    codes, found = pd.factorize(values)
    names = [_name(value, beside_numbers=beside_numbers) for value in found]
    return pd.Series(
        np.array([*names, np.nan], dtype=object)[codes], index=values.index, name=values.name, dtype=object
    )


def hold_numbers(values: Sequence | np.ndarray | pd.Series) -> bool:
    """Whether labels are numbers, such as those of clusters."""
    values = pd.Series(values)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.categories.to_series()
    if is_numeric_dtype(values):
        return not is_bool_dtype(values)
    return infer_dtype(values, skipna=True) in ("integer", "floating", "mixed-integer-float")


def _name(value: Any, *, beside_numbers: bool) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    text = str(value)
    whole = _WHOLE.fullmatch(text) if beside_numbers else None
    return whole[1] if whole else text
