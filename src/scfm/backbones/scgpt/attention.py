"""Attention of scGPT as scores between genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ...nn.attention import attention_weights
from ...nn.ranks import rank_normalize

if TYPE_CHECKING:
    from torch import Tensor

    from .._base import Genes
    from .._tokens import TokenBatch


# numbers of scores in memory at once
_STEP = 1 << 24


class SCGPTAttention:
    """The part of the backbone that shows attention."""

    def _attention(
        self,
        tokens: TokenBatch,
        layer: int,
        *,
        genes: Genes | None = None,
        scores: Literal["softmax", "raw"] | None = None,
        average_heads: bool = True,
        rank: bool = False,
    ) -> Tensor:
        """Attention of one layer, ``(cells, queries, keys)`` or ``(cells, heads, queries, keys)``, float32.

        Parameters
        ----------
        tokens
            Token batch.
        layer
            Layer, counted from the end if negative.
        genes
            Names or ids that choose rows and columns, NaN where a cell has no such token; all tokens in their order by
            default.
        scores
            Softmax weights (the default), or the raw products of queries and keys (the default for ranks).
        average_heads
            Mean over heads.
        rank
            Replace scores by their ranks among the keys of a cell, and these by their ranks among the queries, as
            scGPT does for regulatory networks.
        """
        ids = self.gene_ids(genes)
        scores = scores or ("raw" if rank else "softmax")
        q, k, padding = self._queries_and_keys(tokens, layer)
        padding = tokens.padding if scores == "raw" else padding
        place = there = None
        if ids is not None:
            there, place = _places(tokens, ids)
        lengths = tokens.lengths.tolist()
        # maps of all tokens and heads are large, those of the chosen genes are not
        step = 1 if rank else max(1, _STEP // max(1, q.shape[1] * q.shape[2] ** 2))
        parts = []
        for start in range(0, len(lengths), step):
            some = slice(start, start + step)
            columns = None if place is None else place[some]
            rows = columns if not rank else None
            weights = _weights(q[some], k[some], None if padding is None else padding[some], scores, rows)
            if rank:
                weights = _ranked(weights, lengths[start], columns)
            elif columns is not None:
                weights = weights.take_along_dim(columns[:, None, None, :], -1)
            weights = weights.mean(1) if average_heads else weights
            if there is not None:
                pairs = there[some, :, None] & there[some, None, :]
                weights = weights.masked_fill(~(pairs if average_heads else pairs[:, None]), torch.nan)
            parts.append(weights)
        return torch.cat(parts)

    def _cell_attention(self, tokens: TokenBatch, genes: Tensor | None, *, layer: int = -1) -> Tensor:
        """Ranks of the genes among the products of the query of ``<cls>`` with their keys, averaged over heads."""
        if bool((tokens.flat_ids[tokens.offsets[:-1]] != self.cls_id).any()):
            msg = "these cells do not begin with <cls>; leave append_cls=True"
            raise ValueError(msg)
        q, k, _ = self._queries_and_keys(tokens, layer)
        scores = (q[:, :, :1].float() @ k.float().transpose(-1, -2)).squeeze(2)
        ranks = rank_normalize(scores[..., 1:].masked_fill(tokens.padding[:, None, 1:], torch.nan)).mean(1)
        if genes is None:
            return ranks
        columns = torch.full((len(self.vocab),), len(genes), device=genes.device)
        columns[genes] = torch.arange(len(genes), device=genes.device)
        # what is not wanted, and padding, goes into a column that is cut off
        place = columns[tokens.ids[:, 1:]].masked_fill(tokens.padding[:, 1:], len(genes))
        out = torch.full((len(tokens), len(genes) + 1), torch.nan, device=ranks.device)
        return out.scatter_(1, place, ranks)[:, :-1]

    def _queries_and_keys(self, tokens: TokenBatch, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys of a layer, ``(cells, heads, length, dim)``, and the padding."""
        n_layers = len(self.module.layers)
        if not -n_layers <= layer < n_layers:
            msg = f"this model has layers 0 to {n_layers - 1}; got {layer}"
            raise ValueError(msg)
        _, x, padding = self._inputs(tokens)
        for block in self.module.layers[: layer % n_layers]:
            x = block(x, padding)
        block = self.module.layers[layer]
        q, k, _ = block.project(block.norm1(x) if block.pre_norm else x)
        return q, k, padding


def _weights(q: Tensor, k: Tensor, padding: Tensor | None, scores: str, rows: Tensor | None) -> Tensor:
    """Scores of some queries and all keys, ``(cells, heads, rows, length)``; raw ones are NaN at padding."""
    if rows is not None:
        q = q.take_along_dim(rows[:, None, :, None], 2)
    if scores == "softmax":
        return attention_weights(q, k, padding)
    weights = q.float() @ k.float().transpose(-1, -2)
    return weights if padding is None else weights.masked_fill(padding[:, None, None, :], torch.nan)


def _ranked(weights: Tensor, length: int, places: Tensor | None) -> Tensor:
    """Ranks among keys, then among queries, of one cell ``(1, heads, length, length)``; NaN at padding.

    Of ``places`` only these queries and keys are returned.
    """
    # ranks of different queries are equal all the time; only torch's own order of equals is the one of upstream,
    # and it depends on the length, so that padding must not take part
    ranks = rank_normalize(weights[:, :, :length, :length], -1)
    if places is None:
        out = torch.full_like(weights, torch.nan)
        out[:, :, :length, :length] = rank_normalize(ranks, -2, stable=False)
        return out
    ranks = rank_normalize(ranks.take_along_dim(places[:, None, None, :], -1), -2, stable=False)
    return ranks.take_along_dim(places[:, None, :, None], -2)


def _places(tokens: TokenBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each cell has a token of each gene, and where its first one is, ``(cells, genes)`` each; 0 where it has none."""
    wanted, which = torch.unique(ids, return_inverse=True)
    n_wanted, length = len(wanted), tokens.ids.shape[1]
    columns = torch.searchsorted(wanted, tokens.ids).clamp_max(max(0, n_wanted - 1))
    # what is not wanted goes into a column that is cut off
    columns = columns.masked_fill((wanted[columns] != tokens.ids) | tokens.padding, n_wanted)
    place = torch.full((len(tokens), n_wanted + 1), length, device=ids.device)
    position = torch.arange(length, device=ids.device).expand_as(columns)
    place = place.scatter_reduce_(1, columns, position, "amin")[:, :-1][:, which]
    there = place < length
    return there, place.masked_fill(~there, 0)
