"""Labels of cells as codes, whatever type they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._label_names import label_names

if TYPE_CHECKING:
    from collections.abc import Sequence


def encode(
    values: Sequence | np.ndarray | pd.Series, what: str, *, beside_numbers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and sorted names of labels.

    Whole numbers are named alike whether they come as integers or as floats, as they do beside missing values.

    Parameters
    ----------
    values
        Label of each cell, ``(cells,)``: strings, numbers or a categorical.
    what
        What the labels are, for error messages.
    beside_numbers
        They are compared with numbers: text such as ``"1.0"`` means the number, too.

    Returns
    -------
    codes
        Position in ``names``, -1 where the label is missing.
    names
        Sorted strings.
    """
    if np.ndim(values) != 1:
        msg = f"{what} must have one value per cell, not the shape {np.shape(values)}"
        raise ValueError(msg)
    codes, found = pd.factorize(label_names(values, beside_numbers=beside_numbers))
    names, place = np.unique(np.asarray(found).astype(str), return_inverse=True)
    return np.append(place, -1)[codes], names


def encode_complete(
    values: Sequence | np.ndarray | pd.Series,
    what: str,
    n_cells: int,
    *,
    least: int = 1,
    beside_numbers: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for labels that each of ``n_cells`` cells must have, with at least ``least`` different ones."""
    codes, names = encode(values, what, beside_numbers=beside_numbers)
    if len(codes) != n_cells:
        msg = f"there are {len(codes):,} {what} for {n_cells:,} cells"
        raise ValueError(msg)
    if missing := int((codes < 0).sum()):
        msg = f"{missing:,} of {n_cells:,} {what} are missing; leave these cells out first"
        raise ValueError(msg)
    if not len(codes):
        msg = f"there are no cells, so no {what}"
        raise ValueError(msg)
    if len(names) < least:
        msg = f"at least {least} different {what} are needed; there is {', '.join(names)} only"
        raise ValueError(msg)
    return codes, names


def check_embedding(embedding: np.ndarray) -> np.ndarray:
    """A finite matrix ``(cells, dim)``, or an error that says what is wrong."""
    embedding = np.asarray(embedding)
    if embedding.ndim != 2:
        msg = f"an embedding has the shape (cells, dim), not {embedding.shape}"
        raise ValueError(msg)
    if missing := int((~np.isfinite(embedding).all(1)).sum()):
        msg = f"the embedding of {missing:,} of {len(embedding):,} cells is not finite; leave these cells out first"
        raise ValueError(msg)
    return embedding
