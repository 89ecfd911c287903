"""Batches of cells in scvi-tools' registry, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import rich.table
from scvi import REGISTRY_KEYS
from scvi.data.fields import BaseAnnDataField

if TYPE_CHECKING:
    from anndata import AnnData


class BatchField(BaseAnnDataField):
    """Column of ``obs`` with the batch of each cell; it is not changed.

    Parameters
    ----------
    batch_key
        The column.
    """

    CATEGORIES = "categories"
    COLUMN = "column"

    def __init__(self, batch_key: str) -> None:
        super().__init__()
        self._column = batch_key

    @property
    def registry_key(self) -> str:
        """Key of the field."""
        return REGISTRY_KEYS.BATCH_KEY

    @property
    def attr_name(self) -> str:
        """Attribute of AnnData."""
        return "obs"

    @property
    def attr_key(self) -> str:
        """Name of the column."""
        return self._column

    @property
    def is_empty(self) -> bool:
        """There always are batches."""
        return False

    def validate_field(self, adata: AnnData) -> None:
        """Raise ``KeyError`` if the column does not exist, ``ValueError`` if a cell has no batch."""
        super().validate_field(adata)
        batch_names(adata.obs, self._column)

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """The batches.

        Raises
        ------
        ValueError
            If there is one only.
        """
        super().register_field(adata)
        categories = np.unique(batch_names(adata.obs, self._column))
        check_several(categories, self._column)
        return {self.COLUMN: self._column, self.CATEGORIES: categories}

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, extend_categories: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The batches that there were; those of other data behind them, if ``extend_categories``.

        Raises
        ------
        ValueError
            If there are new batches and they may not be added.
        """
        self.validate_field(adata_target)
        known = np.asarray(state_registry[self.CATEGORIES])
        new = np.setdiff1d(batch_names(adata_target.obs, self._column), known)
        if len(new) and not extend_categories:
            raise ValueError(unknown_batches(new, self._column))
        return {**state_registry, self.CATEGORIES: np.concatenate([known, new])}

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Number of batches."""
        return {f"n_{self.registry_key}": len(state_registry[self.CATEGORIES])}

    def view_state_registry(self, state_registry: dict[str, Any]) -> rich.table.Table:
        """The batches in a table."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Source Location", "Batches"):
            table.add_column(column, justify="center", overflow="fold")
        table.add_row(f"adata.obs[{state_registry[self.COLUMN]!r}]", ", ".join(state_registry[self.CATEGORIES]))
        return table


def batch_names(obs: pd.DataFrame, column: str) -> np.ndarray:
    """Name of the batch of each cell, as text.

    Raises
    ------
    KeyError
        If the column does not exist.
    ValueError
        If a cell has no batch.
    """
    if column not in obs:
        msg = f"obs has no column {column!r}; there are {', '.join(map(str, obs.columns)) or 'none'}"
        raise KeyError(msg)
    if n_missing := int(obs[column].isna().sum()):
        msg = f"{n_missing:,} cells have no batch in obs[{column!r}]; leave them out or give them one"
        raise ValueError(msg)
    return obs[column].astype(object).map(str).to_numpy(dtype=str)


def batch_codes(obs: pd.DataFrame, column: str, categories: np.ndarray) -> np.ndarray:
    """Number of the batch of each cell, int64.

    Raises
    ------
    KeyError
        If the column does not exist.
    ValueError
        If a cell has no batch, or one that is not among ``categories``.
    """
    names = batch_names(obs, column)
    codes = pd.Index(categories).get_indexer(names).astype(np.int64)
    if (codes < 0).any():
        raise ValueError(unknown_batches(np.unique(names[codes < 0]), column))
    return codes


def check_several(categories: np.ndarray, column: str) -> None:
    """Raise ``ValueError`` if there is one batch only."""
    if len(categories) < 2:
        msg = (
            f"obs[{column!r}] has one batch only ({', '.join(map(str, categories)) or 'no cells'}), so there is nothing to "
            "integrate; name the column of donors, samples or technologies"
        )
        raise ValueError(msg)


def unknown_batches(new: np.ndarray, column: str) -> str:
    """What to say about batches that a model has not been trained on."""
    shown = ", ".join(map(str, new[:10])) + (f" and {len(new) - 10} more" if len(new) > 10 else "")
    return (
        f"{shown} in obs[{column!r}] are batches that the model does not know; make one that does with "
        "BatchIntegrator.load_query_data, and train it"
    )
