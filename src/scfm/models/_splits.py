"""Which cells are trained on: whole groups are held out wherever groups are known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .. import _logging
from ._label_field import label_column
from ._training import split_cells

if TYPE_CHECKING:
    from anndata import AnnData


def split_by_group(groups: np.ndarray, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the cells to train and to validate on, no group being in both.

    Groups are held out in random order until they hold the share; at least one is, and at least one is left.

    Parameters
    ----------
    groups
        Group of each cell, shape ``(cells,)``.
    validation_share
        Share of the cells to hold out.
    seed
        Seed of the order.

    Raises
    ------
    ValueError
        If there is one group only.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        msg = "there is one group of cells only, so that none can be held out; leave split_by= out, or use train_size=1"
        raise ValueError(msg)
    order = np.random.default_rng(seed).permutation(len(names))
    wanted = math.ceil(validation_share * len(groups))
    n_held_out = min(int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1, len(names) - 1)
    held_out = np.isin(codes, order[:n_held_out])
    _logging.info(f"    held out: {', '.join(map(str, names[np.sort(order[:n_held_out])]))}")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def held_out_within(groups: np.ndarray, labels: np.ndarray, test_share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Which cells are tested on if each batch is divided by itself, as CellFM has it within a data set.

    Of the cells of each group and label, the share, rounded up, is drawn at random.

    Parameters
    ----------
    groups, labels
        Batch and cell type of each cell, shape ``(cells,)``.
    test_share
        Share to test on.
    seed
        Seed of the choice.

    Returns
    -------
    True for the cells to test on, shape ``(cells,)``.
    """
    rng = np.random.default_rng(seed)
    _, codes = np.unique(np.stack([groups, labels]).astype(str), axis=1, return_inverse=True)
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    sizes = np.bincount(codes)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # a share such as 0.3 is a little more than it says
    wanted = np.ceil(np.round(test_share * sizes, 9))
    chosen = np.zeros(len(codes), dtype=bool)
    chosen[order] = place < np.repeat(wanted, sizes)
    return chosen


def divide(
    adata: AnnData,
    candidates: np.ndarray,
    *,
    split_by: str | None,
    train_size: float,
    validation_size: float | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the cells to train on, to validate on, and to leave alone.

    Parameters
    ----------
    adata
        All cells.
    candidates
        Numbers of the cells that can be used.
    split_by
        Column of ``obs`` with groups, such as donors, that are held out as a whole. Without it cells are held out at
        random, with a warning.
    train_size, validation_size
        As in :func:`split_cells`.
    seed
        Seed of the division.
    """
    everything = np.arange(adata.n_obs)
    train, validation, left = split_cells(len(candidates), train_size, validation_size, seed)
    if len(validation) and split_by is not None:
        groups = label_column(adata, split_by).fillna("missing").to_numpy(dtype=str)[candidates]
        train, validation = split_by_group(groups, len(validation) / len(candidates), seed)
        left = np.zeros(0, dtype=np.int64)
    elif len(validation):
        _logging.warning(
            "the cells to validate on are random cells of the batches that are trained on, so that their scores are too "
            "good; name donors, batches or studies with split_by="
        )
    chosen = candidates[train], candidates[validation]
    rest = np.concatenate([candidates[left], np.setdiff1d(everything, candidates)])
    return *chosen, np.sort(rest)
