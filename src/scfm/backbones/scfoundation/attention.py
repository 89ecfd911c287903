"""Attention maps: softmax weights of the encoder, implied weights of the linear attention of the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ...nn.ranks import rank_normalize

if TYPE_CHECKING:
    from torch import Tensor

    from ...nn.performer import PerformerStack
    from .._tokens import TokenBatch
    from .layers import TransformerStack
    from .module import SCFoundation


def attention_map(
    module: SCFoundation,
    tokens: TokenBatch,
    layer: int,
    *,
    kind: Literal["encoder", "decoder"],
    places: Tensor | None,
    average_heads: bool,
    rank: bool = False,
) -> Tensor:
    """Attention weights of one layer; see ``SCFoundationBackbone.attention``.

    Raises
    ------
    ValueError
        If there is no such layer, or the decoder's map is asked for without ``places``.
    """
    if kind not in ("encoder", "decoder"):
        msg = f"kind must be 'encoder' or 'decoder'; got {kind!r}"
        raise ValueError(msg)
    stack = getattr(module, kind)
    if not -len(stack.layers) <= layer < len(stack.layers):
        msg = f"the {kind} of this model has layers 0 to {len(stack.layers) - 1}; got {layer}"
        raise ValueError(msg)
    if kind == "decoder" and places is None:
        msg = f"the decoder's map has {module.config.n_positions:,} positions squared; choose some with genes=[...]"
        raise ValueError(msg)
    layer %= len(stack.layers)
    size = tokens.max_length if places is None else len(places)
    heads = () if average_heads else (stack.layers[layer].heads,)
    out = torch.zeros(len(tokens), *heads, size, size, device=tokens.device)
    base = module.unexpressed() if kind == "decoder" else None
    for i, target in enumerate(out):
        cell = tokens.select(slice(i, i + 1))
        if base is None:
            x = module.embed_tokens(cell)
            rows = _all(x) if places is None else _rows_of(places, cell.flat_ids, module.config.n_positions)
        else:
            x, rows = module.embed_decoder(cell, module.encode(cell), base), places
        weights = _cell_map(stack, x, layer, rows)
        weights = rank_normalize(weights) if rank else weights
        target[..., : len(rows), : len(rows)] = weights.mean(0) if average_heads else weights
    return out


def _cell_map(stack: TransformerStack | PerformerStack, x: Tensor, layer: int, rows: Tensor) -> Tensor:
    """Weights ``(heads, rows, rows)`` of one cell; NaN where a row is -1."""
    x = stack.inputs_of(layer, x)
    there = torch.nonzero(rows >= 0).squeeze(1)
    weights = stack.layers[layer].attention_map(x, rows[there]).float()
    if len(there) == len(rows):
        return weights
    out = weights.new_full((len(weights), len(rows), len(rows)), torch.nan)
    out[:, there[:, None], there] = weights
    return out


def _all(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _rows_of(places: Tensor, ids: Tensor, n_positions: int) -> Tensor:
    """Row of each place among the tokens of a cell, -1 where it has none."""
    rows = torch.full((n_positions,), -1, device=ids.device)
    rows[ids] = _all(ids)
    return rows[places]
