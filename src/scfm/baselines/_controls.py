"""Labels that know nothing of the cells, as the floor of every annotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence


def shuffled_labels(labels: Sequence | np.ndarray | pd.Series, *, random_state: int = 0) -> np.ndarray:
    """Labels handed out to other cells at random; how often each occurs stays.

    Parameters
    ----------
    labels
        Label of each cell; missing ones are shuffled with the others.
    random_state
        Seed.
    """
    values = np.asarray(labels)
    return values[np.random.default_rng(random_state).permutation(len(values))]


def majority_labels(labels: Sequence | np.ndarray | pd.Series, n_cells: int) -> np.ndarray:
    """The most frequent label for every cell.

    Parameters
    ----------
    labels
        Labels of the reference; missing ones do not count. Of equally frequent labels the first in order is taken.
    n_cells
        Number of cells to label.

    Raises
    ------
    ValueError
        If no label is there.
    """
    counts = pd.Series(labels).value_counts().sort_index()
    if not counts.sum():
        msg = "there are no labels, so none is the most frequent"
        raise ValueError(msg)
    return np.full(n_cells, counts.idxmax())
