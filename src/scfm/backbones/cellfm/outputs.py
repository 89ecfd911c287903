"""From values of tokens to arrays with one row per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...nn.ragged import pad

if TYPE_CHECKING:
    from torch import Tensor

    from .._tokens import TokenBatch


def mean_by_cell(states: Tensor, tokens: TokenBatch) -> Tensor:
    """Mean over the tokens of each cell, float32 or better; NaN for cells without any."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    sums = states.new_zeros(len(tokens), states.shape[1]).index_add(0, tokens.flat_cells, states)
    return sums / tokens.lengths[:, None]


def arranged(tokens: TokenBatch, flat: Tensor, ids: Tensor | None, n_ids: int) -> Tensor:
    """Values of tokens side by side, NaN where there is none.

    Parameters
    ----------
    tokens
        Token batch.
    flat
        Values, shape ``(tokens, ...)``.
    ids
        Vocabulary ids of the columns, for a result ``(cells, ids, ...)``; by default all tokens of a cell in their
        order, ``(cells, longest, ...)``.
    n_ids
        Size of the vocabulary.
    """
    if ids is None:
        if not len(flat):
            return flat.new_empty(len(tokens), 0, *flat.shape[1:])
        out, padding = pad(flat, tokens.lengths.tolist())
        if padding is not None:
            out = out.masked_fill(padding.view(*padding.shape, *[1] * (out.ndim - 2)), torch.nan)
        return without_invalid(tokens, out)
    columns = torch.full((n_ids,), -1, device=flat.device)
    columns[ids] = torch.arange(len(ids), device=flat.device)
    found = columns[tokens.flat_ids]
    kept = found >= 0
    out = flat.new_full((len(tokens), len(ids), *flat.shape[1:]), torch.nan)
    out[tokens.flat_cells[kept], found[kept]] = flat[kept]
    # the same gene may be asked for more than once
    return without_invalid(tokens, out[:, columns[ids]])


def without_invalid(tokens: TokenBatch, out: Tensor) -> Tensor:
    """NaN in the rows of cells that are not valid."""
    return out if tokens.valid is None else out.masked_fill(~tokens.valid.view(-1, *[1] * (out.ndim - 1)), torch.nan)
