"""From the states of all positions of a cell to one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

POOLINGS = ("mean_genes", "mean_expressed", "eq11", "mean_dims", "sum_dims")
BY_GENE = ("eq11", "mean_dims", "sum_dims")
"""Poolings that keep one number for each gene."""
BY_COLUMN = ("eq11", "mean_dims")
"""Poolings that can follow the genes of the data."""


def pool(
    states: Tensor, predict: Callable[[Tensor], Tensor], expressed: Tensor, pooling: str, columns: Tensor | None
) -> Tensor:
    """One vector of a cell, float32 or better.

    Parameters
    ----------
    states
        Shape ``(n_positions, dim)``.
    predict
        From states to predicted expression.
    expressed
        Positions with a value above zero, in any order.
    pooling
        One of :data:`POOLINGS`.
    columns
        Positions that the result of :data:`BY_COLUMN` consists of, or that ``"mean_genes"`` is taken over; -1 stands
        for the mean over all positions.
    """
    if pooling == "mean_genes":
        return _in_order(states, columns).mean(0)
    if pooling == "mean_expressed":
        return states[expressed].mean(0)
    if pooling == "sum_dims":
        return states.sum(1)
    per_gene = states.mean(1) if pooling == "mean_dims" else states.sum(1) + predict(states)
    return _in_order(per_gene, columns)


def _in_order(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Rows in the order of ``columns``; the last one, which -1 means, is the mean over all."""
    return rows if columns is None else torch.cat([rows, rows.mean(0, keepdim=True)])[columns]
