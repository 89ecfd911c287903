"""Ranks in place of attention scores, whose size differs between queries, heads and cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rank_normalize(scores: Tensor, dim: int = -1, *, stable: bool = True) -> Tensor:
    """Replace scores by their ascending ranks along an axis, divided by how many there are.

    Parameters
    ----------
    scores
        Any shape; NaN marks what does not take part.
    dim
        Axis to rank along.
    stable
        The earlier position comes first among equal scores; else the order of equals is that of ``torch.argsort``.

    Returns
    -------
    Ranks ``0/n, 1/n, ..., (n - 1)/n`` in float32; NaN stays NaN.
    """
    missing = scores.isnan()
    # NaN sorts last, so the ranks of the others are those among themselves
    order = scores.argsort(dim=dim, stable=stable)
    shape = [1] * scores.ndim
    shape[dim] = -1
    places = torch.arange(scores.shape[dim], dtype=torch.float32, device=scores.device).view(shape).expand(scores.shape)
    ranks = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).scatter_(dim, order, places)
    counts = (~missing).sum(dim, keepdim=True)
    return (ranks / counts).masked_fill_(missing, torch.nan)
