"""Labels of cells in scvi-tools' registry: which classes there are, and which cells have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import rich.table
from scvi import REGISTRY_KEYS
from scvi.data.fields import BaseAnnDataField

from .. import _logging
from .._label_names import label_names

if TYPE_CHECKING:
    from anndata import AnnData


class LabelField(BaseAnnDataField):
    """Column of ``obs`` with labels, some of which may be missing.

    The column is not changed. Other data need not have it: they get the classes that there were.

    Parameters
    ----------
    labels_key
        The column.
    unlabeled_category
        Label that stands for "not known", besides missing ones.
    """

    CLASSES = "classes"
    COLUMN = "column"

    def __init__(self, labels_key: str | None, unlabeled_category: str | None = None) -> None:
        super().__init__()
        self._column, self._unlabeled = labels_key, unlabeled_category

    @property
    def registry_key(self) -> str:
        """Key of the field."""
        return REGISTRY_KEYS.LABELS_KEY

    @property
    def attr_name(self) -> str:
        """Attribute of AnnData."""
        return "obs"

    @property
    def attr_key(self) -> str | None:
        """Name of the column."""
        return self._column

    @property
    def is_empty(self) -> bool:
        """Whether there are no labels."""
        return self._column is None

    def validate_field(self, adata: AnnData) -> None:
        """Raise ``KeyError`` if the column does not exist, ``ValueError`` if it has fewer than two labels."""
        super().validate_field(adata)
        if len(self.classes_of(adata)) < 2:
            msg = f"obs[{self._column!r}] has fewer than two labels, so there is nothing to tell apart"
            raise ValueError(msg)

    def classes_of(self, adata: AnnData) -> np.ndarray:
        """Labels that occur, sorted; missing ones and ``unlabeled_category`` are none.

        Raises
        ------
        KeyError
            If the column does not exist.
        """
        labels = label_column(adata, self._column)
        return np.array(sorted(set(labels.dropna()) - {self._unlabeled}), dtype=object)

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """The classes."""
        super().register_field(adata)
        return {self.COLUMN: self._column, self.CLASSES: self.classes_of(adata).astype(str)}

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """The classes that there were, whatever labels other data have."""
        if self._column in adata_target.obs:
            new = sorted(set(self.classes_of(adata_target)) - set(state_registry[self.CLASSES]))
            if new:
                _logging.warning(
                    f"{', '.join(new[:10])} in obs[{self._column!r}] are no classes of the model; such cells count as "
                    "not labelled"
                )
        return dict(state_registry)

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Number of classes."""
        return {f"n_{self.registry_key}": len(state_registry[self.CLASSES])}

    def view_state_registry(self, state_registry: dict[str, Any]) -> rich.table.Table:
        """The classes in a table."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Source Location", "Classes"):
            table.add_column(column, justify="center", overflow="fold")
        table.add_row(f"adata.obs[{state_registry[self.COLUMN]!r}]", ", ".join(state_registry[self.CLASSES]))
        return table


def label_column(adata: AnnData, column: str) -> pd.Series:
    """A column of ``obs`` as text, missing where it is; whole numbers have no decimal places.

    Raises
    ------
    KeyError
        If the column does not exist.
    """
    if column not in adata.obs:
        # those of scvi-tools are none of the user's
        own = [name for name in map(str, adata.obs.columns) if not name.startswith("_scvi")]
        msg = f"obs has no column {column!r}; there are {', '.join(own) or 'none'}"
        raise KeyError(msg)
    return label_names(adata.obs[column])


def label_codes(adata: AnnData, column: str, classes: np.ndarray) -> np.ndarray:
    """Number of the class of each cell, -1 for none, int64."""
    return pd.Index(classes).get_indexer(label_column(adata, column).to_numpy(dtype=object)).astype(np.int64)
