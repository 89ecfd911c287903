"""Attention scores of a network without attention weights: products of the rectified queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ...nn.ranks import rank_normalize
from .module import runs

if TYPE_CHECKING:
    from torch import Tensor

    from .._tokens import TokenBatch
    from .module import CellFM

Rank = bool | Literal["upstream"]

_UPSTREAM_LENGTH = 2048
# numbers of scores in memory at once
_STEP = 1 << 26


def attention_map(
    module: CellFM,
    tokens: TokenBatch,
    layer: int,
    *,
    places: Tensor | None,
    include_cls: bool,
    average_heads: bool,
    rank: Rank,
    padded_length: int,
) -> Tensor:
    """Scores in an encoder layer; see ``CellFMBackbone.attention``.

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    layer = _layer(module, layer)
    attention = module.layers[layer].attention
    size = int(include_cls) + (tokens.max_length if places is None else len(places))
    heads = () if average_heads else (attention.heads,)
    out = torch.full((len(tokens), *heads, size, size), torch.nan, device=tokens.device)
    cell = 0
    for part in runs(tokens):
        sequences = module.sequences(part)
        states = module.encode(sequences, n_layers=layer) if layer else sequences.x
        for x, ids in zip(states.split(sequences.lengths), part.flat_ids.split(part.lengths.tolist()), strict=True):
            x = x if include_cls else x[1:]
            q, k = attention.features(x)
            rows = _rows(ids, places, include_cls=include_cls)
            there = torch.nonzero(rows >= 0).squeeze(1)
            scores = _chosen(
                q[:, rows[there]], k, rows[there], rank=rank, n_padding=padded_length - len(ids), average=average_heads
            )
            out[cell, ..., there[:, None], there] = scores
            cell += 1
    return out


def cls_attention(module: CellFM, tokens: TokenBatch, layer: int, *, rank: Rank, padded_length: int) -> Tensor:
    """Scores of the genes for the query of CLS in an encoder layer, averaged over heads, ``(tokens,)``.

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    layer = _layer(module, layer)
    attention = module.layers[layer].attention
    parts = []
    for part in runs(tokens):
        sequences = module.sequences(part)
        states = module.encode(sequences, n_layers=layer) if layer else sequences.x
        for x, n in zip(states.split(sequences.lengths), part.lengths.tolist(), strict=True):
            q, k = attention.features(x[:1], x[1:])
            parts.append(ranked((q @ k.transpose(1, 2)).squeeze(1), rank, padded_length - n).mean(0))
    return torch.cat(parts) if parts else tokens.flat_values.new_empty(0)


def _layer(module: CellFM, layer: int) -> int:
    n_layers = len(module.layers)
    if not -n_layers <= layer < n_layers:
        msg = f"this model has layers 0 to {n_layers - 1}; got {layer}"
        raise ValueError(msg)
    return layer % n_layers


def _chosen(q: Tensor, k: Tensor, columns: Tensor, *, rank: Rank, n_padding: int, average: bool) -> Tensor:
    """Scores ``(heads, queries, columns)`` or their mean over heads, a few heads at a time."""
    step = max(1, _STEP // max(1, q.shape[1] * k.shape[1]))
    total, parts = None, []
    for some, keys in zip(q.split(step), k.split(step), strict=True):
        scores = ranked(some @ keys.transpose(1, 2), rank, n_padding)[..., columns]
        if average:
            total = scores.sum(0) if total is None else total + scores.sum(0)
        else:
            parts.append(scores)
    return total / len(q) if average else torch.cat(parts)


def _rows(ids: Tensor, places: Tensor | None, *, include_cls: bool) -> Tensor:
    """Row of each wanted token among those of a cell, -1 where it has none."""
    shift = int(include_cls)
    if places is None:
        return torch.arange(len(ids) + shift, device=ids.device)
    table = torch.full((max(_top(ids), _top(places)) + 1,), -1, device=ids.device)
    table[ids] = torch.arange(len(ids), device=ids.device) + shift
    rows = table[places]
    return torch.cat([rows.new_zeros(1), rows]) if include_cls else rows


def _top(ids: Tensor) -> int:
    return int(ids.max()) if len(ids) else 0


def ranked(scores: Tensor, rank: Rank, n_padding: int) -> Tensor:
    """Scores, or their ranks among the keys (last axis).

    ``"upstream"`` ranks as if ``n_padding`` keys with score 0 stood behind the others, and divides by 2,048.
    """
    if rank == "upstream":
        n_keys = scores.shape[-1]
        behind = max(n_padding, 0) * (scores > 0)
        return (rank_normalize(scores) * n_keys + behind) / _UPSTREAM_LENGTH
    return rank_normalize(scores) if rank else scores
