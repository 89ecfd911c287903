"""Attention maps: softmax weights of the encoder, implied weights of the linear attention of the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .._tokens import TokenBatch
    from .layers import PerformerStack, TransformerStack
    from .module import SCFoundation


def attention_map(
    module: SCFoundation,
    tokens: TokenBatch,
    layer: int = -1,
    *,
    kind: Literal["encoder", "decoder"] = "encoder",
    genes: Sequence[int] | np.ndarray | Tensor | None = None,
    average_heads: bool = True,
) -> Tensor:
    """Attention weights of one layer, float32, ``(cells, queries, keys)`` or ``(cells, heads, queries, keys)``.

    Parameters
    ----------
    module
        The network.
    tokens
        Token batch.
    layer
        Layer, counted from the end if negative.
    kind
        ``"encoder"``: weights among the tokens of each cell. ``"decoder"``: weights among chosen positions, each
        row being part of a distribution over all positions (its sum is 1 when all are chosen).
    genes
        Position ids (genes, and ``config.target_id``, ``config.source_id``). For the encoder, all tokens in their
        order by default, zero at padding; with ids, NaN where a cell has no such token. The decoder needs them.
    average_heads
        Mean over heads.

    Raises
    ------
    ValueError
        If there is no such layer, or the decoder's map is asked for without ``genes``.
    """
    if kind not in ("encoder", "decoder"):
        msg = f"kind must be 'encoder' or 'decoder'; got {kind!r}"
        raise ValueError(msg)
    layers = getattr(module, kind).layers
    if not -len(layers) <= layer < len(layers):
        msg = f"the {kind} of this model has layers 0 to {len(layers) - 1}; got {layer}"
        raise ValueError(msg)
    layer %= len(layers)
    if genes is not None:
        genes = torch.as_tensor(np.asarray(genes), device=tokens.device).long()
        if genes.ndim != 1 or (genes.numel() and (genes.min() < 0 or genes.max() >= module.config.n_positions)):
            msg = f"genes must be a list of position ids between 0 and {module.config.n_positions - 1}"
            raise ValueError(msg)
    lengths = tokens.lengths.tolist()
    if kind == "encoder":
        inputs = module.embed_tokens(tokens).split(lengths)
        places = [
            _all(x) if genes is None else _places(ids, genes, module.config.n_positions)
            for x, ids in zip(inputs, tokens.flat_ids.split(lengths), strict=True)
        ]
    elif genes is None:
        msg = f"the decoder's map has {module.config.n_positions:,} positions squared; choose some with genes=[...]"
        raise ValueError(msg)
    else:
        hidden = module.encode(tokens)
        inputs = module.embed_decoder(tokens, hidden, module.unexpressed()).split(module.config.n_positions)
        places = [genes] * len(tokens)
    maps = [_cell_map(getattr(module, kind), x, layer, rows) for x, rows in zip(inputs, places, strict=True)]
    if average_heads:
        maps = [weights.mean(0) for weights in maps]
    longest = max(weights.shape[-1] for weights in maps)
    out = maps[0].new_zeros(len(maps), *maps[0].shape[:-2], longest, longest)
    for target, weights in zip(out, maps, strict=True):
        target[..., : weights.shape[-2], : weights.shape[-1]] = weights
    return out


def _cell_map(stack: TransformerStack | PerformerStack, x: Tensor, layer: int, places: Tensor) -> Tensor:
    """Weights ``(heads, places, places)`` of one cell; NaN where a place is -1."""
    x = stack.inputs_of(layer, x)
    there = torch.nonzero(places >= 0).squeeze(1)
    weights = stack.layers[layer].attention_map(x, places[there])
    if len(there) == len(places):
        return weights.float()
    out = weights.new_full((len(weights), len(places), len(places)), torch.nan, dtype=torch.float32)
    out[:, there[:, None], there] = weights.float()
    return out


def _all(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _places(ids: Tensor, genes: Tensor, n_positions: int) -> Tensor:
    """Place of each gene among the tokens of a cell, -1 where it has none."""
    places = torch.full((n_positions,), -1, device=ids.device)
    places[ids] = torch.arange(len(ids), device=ids.device)
    return places[genes]
