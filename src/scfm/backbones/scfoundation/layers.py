"""The two kinds of layers that scFoundation's encoder and decoder are made of, on ragged batches.

Each layer has one definition in terms of its sub-modules. Without gradients it runs over a few hundred or thousand
tokens at a time, so that what lies between two matrix products stays in the cache, and adds residuals in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attention_weights
from ...nn.linear_attention import (
    KeyMax,
    KeySums,
    default_features,
    favor_attention,
    orthogonal_random_features,
    shared_maxima,
)
from ...nn.ragged import attend_ragged, pad, unpad

if TYPE_CHECKING:
    from collections.abc import Sequence

# numbers in the widest tensor of one step: on a CPU it should stay in the caches, elsewhere launches should be few
_STEP_PER_THREAD = {"transformer": 3 << 20, "performer": 1 << 20}
_ACCELERATOR_STEP = 1 << 27
_MIN_TOKENS = 64


def _step(x: Tensor, kind: str, width: int) -> int:
    """Tokens in one step when the widest tensor has ``width`` numbers for each."""
    on_cpu = x.device.type == "cpu"
    numbers = _STEP_PER_THREAD[kind] * torch.get_num_threads() if on_cpu else _ACCELERATOR_STEP
    return max(_MIN_TOKENS, numbers // width // 64 * 64)


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
        step = _step(x, "transformer", self.linear1.out_features)
        for rows, some, target in zip(attended.split(step), x.split(step), out.split(step), strict=True):
            y = self.norm1(self.out(rows).add_(some))
            target.copy_(self.norm2(self.linear2(F.relu_(self.linear1(y))).add_(y)))
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
        """Run all layers on ``x`` of shape ``(tokens, dim)``; see :meth:`PerformerStack.forward`."""
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


class PerformerLayer(nn.Module):
    """Pre-norm layer with linear attention and GELU."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, ff_dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * dim_head)
        self.key = nn.Linear(dim, heads * dim_head)
        self.value = nn.Linear(dim, heads * dim_head)
        self.out = nn.Linear(heads * dim_head, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.ff_dropout = nn.Dropout(ff_dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.register_buffer("projection", orthogonal_random_features(default_features(dim_head), dim_head))

    def _apply(self, fn, recurse: bool = True):
        # exponents of the random features need float32, so the projection follows the device but no lower precision
        before = self.projection
        super()._apply(fn, recurse)
        if self.projection.dtype in (torch.bfloat16, torch.float16):
            self.projection = before.to(self.projection.device)
        return self

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        widest = max(self.heads * len(self.projection), self.linear1.out_features)
        return x.split(_step(x, "performer", widest))

    def split_heads(self, x: Tensor) -> Tensor:
        """From ``(tokens, heads * dim)`` to ``(tokens, heads, dim)``."""
        return x.unflatten(1, (self.heads, -1))

    def forward(self, x: Tensor, lengths: Sequence[int], key_max: KeyMax) -> Tensor:
        """Apply the layer to ``x`` of shape ``(tokens, dim)`` with everything in memory, for training."""
        h = self.norm1(x)
        heads = [pad(self.split_heads(linear(h)), lengths) for linear in (self.query, self.key, self.value)]
        padding = heads[0][1]
        q, k, v = (part.transpose(1, 2) for part, _ in heads)
        attended = favor_attention(q, k, v, self.projection, key_max=key_max, padding=padding)
        x = x + self.attention_dropout(self.out(unpad(attended.transpose(1, 2), padding).flatten(1)))
        return x + self.linear2(self.ff_dropout(F.gelu(self.linear1(self.norm2(x)))))

    def key_sums(self, x: Tensor) -> KeySums:
        """Sums over the keys and values of one cell, ``x`` of shape ``(tokens, dim)``."""
        sums = KeySums.empty(self.heads, self.projection)
        for some in self._steps(x):
            h = self.norm1(some)
            sums.add(self.split_heads(self.key(h)), self.split_heads(self.value(h)))
        return sums

    def update_(self, x: Tensor, sums: KeySums, maximum: Tensor) -> None:
        """Apply the layer in place to some tokens of a cell, given the sums over all of its keys."""
        context = sums.context(maximum)
        for some in self._steps(x):
            attended = context.read(self.split_heads(self.query(self.norm1(some))))
            some.add_(self.out(attended.flatten(1)))
            some.add_(self.linear2(torch.ops.aten.gelu_(self.linear1(self.norm2(some)))))

    def attention_map(self, x: Tensor, places: Tensor) -> Tensor:
        """Weights among some tokens of one cell that the linear attention implies, ``(heads, places, places)``."""
        sums = self.key_sums(x)
        h = self.norm1(x[places])
        return sums.context(sums.maximum.amax()).map(self.split_heads(self.query(h)), self.split_heads(self.key(h)))


class PerformerStack(nn.Module):
    """Performer layers and a final LayerNorm."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        ff_dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers = (PerformerLayer(dim, heads, dim_head, ff_dropout, attention_dropout) for _ in range(depth))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("calls_since_redraw", torch.tensor(0))

    def forward(
        self, x: Tensor, lengths: Sequence[int], *, rows: Tensor | None = None, key_max: KeyMax = "cell"
    ) -> Tensor:
        """Run all layers.

        Parameters
        ----------
        x
            Shape ``(tokens, dim)``. Overwritten when no gradients are wanted.
        lengths
            Tokens of each cell.
        rows
            Places inside each cell that are wanted, the same for all cells; the last layer runs for them alone.
            All by default.
        key_max
            What the maximum of the key features is taken over.

        Returns
        -------
        Shape ``(tokens, dim)`` or ``(cells * rows, dim)``.
        """
        if torch.is_grad_enabled() or self.training:
            for layer in self.layers:
                x = layer(x, lengths, key_max)
            return self.norm(x if rows is None else x.unflatten(0, (len(lengths), -1))[:, rows].flatten(0, 1))
        cells = x.split(list(lengths))
        for layer in self.layers:
            sums = [layer.key_sums(cell) for cell in cells]
            if rows is not None and layer is self.layers[-1]:
                cells = [cell[rows] for cell in cells]
            for cell, total, maximum in zip(cells, sums, shared_maxima(sums, key_max), strict=True):
                layer.update_(cell, total, maximum)
        return self.norm(x if rows is None else torch.cat(cells))

    def inputs_of(self, layer: int, x: Tensor) -> Tensor:
        """What a layer gets when ``x``, which is overwritten, is the input of the stack and a single cell."""
        for block in self.layers[:layer]:
            sums = block.key_sums(x)
            block.update_(x, sums, sums.maximum.amax())
        return x

    def count_call(self, redraw_every: int, generator: torch.Generator | None = None) -> None:
        """Count a training step, or draw new random features when enough of them have passed."""
        if int(self.calls_since_redraw) >= redraw_every:
            self.redraw_projections(generator)
        else:
            self.calls_since_redraw += 1

    @torch.no_grad()
    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features in all layers."""
        for layer in self.layers:
            layer.projection.copy_(orthogonal_random_features(*layer.projection.shape, generator))
        self.calls_since_redraw.zero_()
