"""A column that says what each cell or sample is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._label_field import label_column

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

PARTS = ("train", "validation", "test")
_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
_NAMES |= {"test": "test", "ood": "test"}


def parts_of(adata: AnnData, column: str) -> np.ndarray:
    """``"train"``, ``"validation"`` or ``"test"`` for each row, ``""`` where the value is missing.

    Raises
    ------
    KeyError
        If the column does not exist.
    ValueError
        If it holds something else, or nothing to train on.
    """
    values = label_column(adata, column)
    parts = values.map(lambda text: _NAMES.get(text.strip().lower(), text), na_action="ignore").fillna("")
    if unknown := sorted(set(parts) - {*PARTS, ""}):
        msg = f"obs[{column!r}] has to hold {', '.join(map(repr, PARTS))}; it holds {', '.join(map(repr, unknown[:5]))}"
        raise ValueError(msg)
    if "train" not in set(parts):
        msg = f"obs[{column!r}] names nothing to train on ('train')"
        raise ValueError(msg)
    return parts.to_numpy(dtype=object)
