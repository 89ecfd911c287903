"""Sequences of unequal length without padding: all tokens in one row, cell after cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .attention import attend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_rectangular(lengths: Sequence[int]) -> bool:
    """Whether all sequences have the same length."""
    return len(set(lengths)) < 2


def padding_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """True where a sequence has ended, shape ``(cells, longest)``."""
    lengths = torch.as_tensor(lengths, device=device)
    return torch.arange(int(lengths.max()), device=device) >= lengths[:, None]


def pad(flat: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Sequences side by side, zero where they have ended.

    Parameters
    ----------
    flat
        Shape ``(tokens, ...)``.
    lengths
        Tokens of each cell.

    Returns
    -------
    Shape ``(cells, longest, ...)``, and the padding mask or ``None`` if nothing is padded.
    """
    if is_rectangular(lengths):
        return flat.unflatten(0, (len(lengths), -1)), None
    padding = padding_of(lengths, flat.device)
    out = flat.new_zeros(*padding.shape, *flat.shape[1:])
    return out.masked_scatter(~padding.view(*padding.shape, *[1] * (flat.ndim - 1)), flat), padding


def unpad(padded: Tensor, padding: Tensor | None) -> Tensor:
    """Inverse of :func:`pad`."""
    return padded.flatten(0, 1) if padding is None else padded[~padding]


def attend_ragged(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each cell of a ragged batch.

    On a CPU unequal cells are taken one by one, which costs no work for padding and gives each cell the same numbers in
    every batch; elsewhere they are padded.

    Parameters
    ----------
    q, k, v
        Shape ``(tokens, heads, dim)``.
    lengths
        Tokens of each cell.
    dropout
        Dropout on the attention weights.

    Returns
    -------
    Heads side by side, shape ``(tokens, heads * dim)``.
    """
    if q.device.type == "cpu" and not is_rectangular(lengths):
        cells = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        return torch.cat([attend_ragged(*cell, [len(cell[0])], dropout) for cell in cells])
    (q, padding), (k, _), (v, _) = (pad(x, lengths) for x in (q, k, v))
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), padding, dropout)
    return unpad(out.transpose(1, 2), padding).flatten(1)
