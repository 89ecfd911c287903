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
        places = self.gene_ids(genes)
        scores = scores or ("raw" if rank else "softmax")
        q, k, padding = self._queries_and_keys(tokens, layer)
        if scores == "raw":
            weights = (q.float() @ k.float().transpose(-1, -2)).masked_fill(tokens.padding[:, None, None, :], torch.nan)
        else:
            weights = attention_weights(q, k, padding)
        if rank:
            weights = _ranked(weights, tokens.lengths.tolist())
        weights = weights.mean(1) if average_heads else weights
        return weights if places is None else _chosen(weights, tokens, places)

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


def _ranked(weights: Tensor, lengths: list[int]) -> Tensor:
    """Ranks among keys, then among queries, of each cell; NaN at padding."""
    out = torch.full_like(weights, torch.nan)
    for some, target, n in zip(weights, out, lengths, strict=True):
        # ranks of different queries are equal all the time; only torch's own order of equals is the one of upstream,
        # and it depends on the length, so that padding must not take part
        rows = rank_normalize(some[:, :n, :n], -1)
        target[:, :n, :n] = rank_normalize(rows, -2, stable=False)
    return out


def _chosen(weights: Tensor, tokens: TokenBatch, ids: Tensor) -> Tensor:
    """Rows and columns of some genes, NaN where a cell has no token of them."""
    found = (tokens.ids[:, None] == ids[:, None]) & ~tokens.padding[:, None]
    there, place = found.any(-1), found.int().argmax(-1)
    if weights.ndim == 4:
        there, place = there[:, None], place[:, None]
    rows = weights.take_along_dim(place[..., :, None], -2).take_along_dim(place[..., None, :], -1)
    return rows.masked_fill(~(there[..., :, None] & there[..., None, :]), torch.nan)
