"""Labels of cells: read from a reference, written with confidence and probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_bool_dtype, is_integer_dtype, is_numeric_dtype

from .. import _keys
from .._label_names import hold_numbers, label_names

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from ..tasks.neighbors import Votes


@dataclass(frozen=True, eq=False)
class Labels:
    """A column of labels.

    Parameters
    ----------
    codes
        Number of the label of each cell, -1 where it is missing, shape ``(cells,)``.
    categories
        The labels.
    ordered
        Whether the labels have an order.
    """

    codes: NDArray[np.integer]
    categories: pd.Index
    ordered: bool = False

    @classmethod
    def of(cls, obs: pd.DataFrame, key: str, what: str, *, whole_numbers: bool = False) -> Labels:
        """Labels of a column of ``obs``.

        Parameters
        ----------
        obs
            The cells.
        key
            Name of the column.
        what
            Name of the object, for messages.
        whole_numbers
            Whether whole numbers are labels, too, such as those of clusters.

        Raises
        ------
        KeyError
            If there is no such column.
        TypeError
            If the column holds numbers, or numbers that are not whole.
        ValueError
            If no cell has a label.
        """
        if key not in obs:
            msg = f"obs of {what} has no column {key!r}; there are {', '.join(map(str, obs.columns)) or 'none'}"
            raise KeyError(msg)
        column = obs[key]
        if column.isna().all():
            msg = f"no cell of {what} has a label in obs[{key!r}]"
            raise ValueError(msg)
        if not isinstance(column.dtype, pd.CategoricalDtype):
            column = _whole(column) if whole_numbers else column
            _check_kind(column, what, whole_numbers=whole_numbers)
            column = column.astype("category")
        categorical, categories = column.array, column.cat.categories
        if is_integer_dtype(categories):  # files cannot hold pandas' own integers here
            categories = categories.astype(np.int64)
        return cls(np.asarray(categorical.codes), categories, bool(categorical.ordered))

    @property
    def names(self) -> list[str]:
        """The labels as column names: text, each once, without the slash that HDF5 and zarr do not allow."""
        names: dict[str, None] = {}
        for label in label_names(self.categories):
            name = base = label.replace("/", "_")
            number = 1
            while name in names:
                name, number = f"{base}_{number}", number + 1
            names[name] = None
        return list(names)


def _whole(column: pd.Series) -> pd.Series:
    """Whole numbers as integers, some of which may be missing; any other column as it is."""
    if not hold_numbers(column):
        return column
    numbers = pd.to_numeric(column).astype("Float64")
    return numbers.astype("Int64") if (numbers.dropna() % 1 == 0).all() else column


def _check_kind(column: pd.Series, what: str, *, whole_numbers: bool) -> None:
    if whole_numbers and is_integer_dtype(column):
        return
    if is_numeric_dtype(column) and not is_bool_dtype(column):
        msg = (
            f"obs[{column.name!r}] of {what} holds numbers, for which cells cannot vote; "
            "turn it into labels with .astype('category') if they are names of groups"
        )
        raise TypeError(msg)
    if infer_dtype(column, skipna=True) not in ("string", "boolean"):
        msg = f"obs[{column.name!r}] of {what} must hold text, categories, or True and False; it is {column.dtype}"
        raise TypeError(msg)


def write_labels(
    adata: AnnData,
    key: str,
    labels: Labels,
    votes: Votes,
    record: dict[str, Any],
    *,
    rejected: NDArray[np.bool_] | None = None,
) -> str:
    """Put labels into ``adata`` and say for the log what was added.

    Parameters
    ----------
    adata
        Annotated data.
    key
        Name of the column, from which the other names are made.
    labels
        The labels that there are.
    votes
        Label, confidence and probabilities of each cell.
    record
        What was done.
    rejected
        Cells whose label is left out, shape ``(cells,)``.
    """
    codes = votes.codes if rejected is None else np.where(rejected, -1, votes.codes)
    adata.obs[key] = pd.Categorical.from_codes(codes, categories=labels.categories, ordered=labels.ordered)
    adata.obs[_keys.confidence(key)] = votes.confidence
    adata.obsm[_keys.probabilities(key)] = pd.DataFrame(
        votes.probabilities, index=adata.obs_names, columns=labels.names
    )
    adata.uns[key] = {**record, "labels": np.asarray(label_names(labels.categories).to_list())}
    return (
        f"\n    {key!r}, labels (adata.obs)\n    {_keys.confidence(key)!r}, confidence (adata.obs)"
        f"\n    {_keys.probabilities(key)!r}, probabilities (adata.obsm)\n    {key!r}, record of the run (adata.uns)"
    )
