"""Layers of scFoundation's softmax encoder, on ragged batches.

Each layer has one definition in terms of its sub-modules. Without gradients it runs over a few hundred or thousand
tokens at a time, so that what lies between two matrix products stays in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attention_weights
from ...nn.ragged import attend_ragged
from ...nn.steps import rows_per_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...nn.linear_attention import KeyMax

# numbers for each thread in the widest tensor of one step
_STEP_PER_THREAD = 3 << 20


class TransformerLayer(nn.Module):
    """Post-norm transformer layer with ReLU."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``(tokens, heads, dim / heads)``."""
        return self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Apply the layer to ``x`` of shape ``(tokens, dim)``."""
        attended = attend_ragged(*self.project(x), lengths, self.dropout.p if self.training else 0.0)
        if torch.is_grad_enabled() or self.training:
            x = self.norm1(x + self.dropout(self.out(attended)))
            return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        out = torch.empty_like(x)
        step = rows_per_step(x, self.linear1.out_features, _STEP_PER_THREAD)
        for rows, some, target in zip(attended.split(step), x.split(step), out.split(step), strict=True):
            y = self.norm1(some + self.out(rows))
            target.copy_(self.norm2(y + self.linear2(F.relu_(self.linear1(y)))))
        return out

    def attention_map(self, x: Tensor, places: Tensor) -> Tensor:
        """Softmax weights among some tokens of one cell, ``(heads, places, places)``."""
        q, k, _ = self.project(x)
        return attention_weights(q[places].transpose(0, 1)[None], k.transpose(0, 1)[None])[0, ..., places]


class TransformerStack(nn.Module):
    """Transformer layers and a final LayerNorm."""

    def __init__(self, dim: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, lengths: Sequence[int], *, rows: Tensor | None = None, key_max: KeyMax = "cell"
    ) -> Tensor:
        """Run all layers on ``x`` of shape ``(tokens, dim)``; see :meth:`scfm.nn.performer.PerformerStack.forward`."""
        for layer in self.layers:
            x = layer(x, lengths)
        if rows is not None:
            x = x.unflatten(0, (len(lengths), -1))[:, rows].flatten(0, 1)
        return self.norm(x)

    def inputs_of(self, layer: int, x: Tensor) -> Tensor:
        """What a layer gets when ``x`` of shape ``(tokens, dim)`` is the input of the stack and a single cell."""
        for block in self.layers[:layer]:
            x = block(x, [len(x)])
        return x
