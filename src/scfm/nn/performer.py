"""Pre-norm layers with linear attention, the Performer (Choromanski et al., ICLR 2021), on ragged batches.

Without gradients a layer runs over some hundred or thousand tokens at a time and adds its residuals in place. The
stream of the residuals has the type of the input, which may be wider than that of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_attention import (
    Backend,
    KeyMax,
    KeySums,
    check_backend,
    default_features,
    favor_attention,
    orthogonal_random_features,
    shared_maxima,
    tokens_per_step,
)
from .linear_attention_gradient import ragged_attention
from .ragged import pad, unpad
from .steps import rows_per_step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# numbers for each thread in the widest tensor of one step, by the bytes of a weight: packing the weights for a product
# has to pay, and products in bfloat16 are over sooner
_STEP_PER_THREAD = {2: 5 << 20, 4: 5 << 19, 8: 5 << 19}


def layer_norm(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm computed in the type of ``x``, the result in ``dtype``."""
    if x.dtype != norm.weight.dtype:
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    else:
        x = norm(x)
    return x.to(dtype)


class PerformerLayer(nn.Module):
    """Pre-norm layer with linear attention and GELU.

    Parameters
    ----------
    dim
        Width of the layer.
    heads, dim_head
        Number and width of the heads; together they may be wider or narrower than the layer.
    ff_dropout, attention_dropout
        Dropout in training.
    qkv_bias
        Whether queries, keys and values have a bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        ff_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        *,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.backend: Backend = "scfm"
        inner = heads * dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=qkv_bias)
        self.key = nn.Linear(dim, inner, bias=qkv_bias)
        self.value = nn.Linear(dim, inner, bias=qkv_bias)
        self.out = nn.Linear(inner, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.ff_dropout = nn.Dropout(ff_dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.register_buffer("projection", orthogonal_random_features(default_features(dim_head), dim_head))
        # set while the weights are frozen, which were trained with the features as they are
        self.fixed_features = False

    def _apply(self, fn, recurse: bool = True):
        # exponents of the random features need float32, so the projection follows the device but no lower precision
        before = self.projection
        super()._apply(fn, recurse)
        if self.projection.dtype in (torch.bfloat16, torch.float16):
            # a copy, because a single view into a mapped file keeps all of it in memory
            self.projection = before.to(self.projection.device, copy=True)
        return self

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.linear1.weight
        widest = max(self.query.out_features, self.linear1.out_features)
        return x.split(rows_per_step(x, widest, _STEP_PER_THREAD[weight.element_size()]))

    def _normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(norm, x, self.out.weight.dtype)

    def split_heads(self, x: Tensor) -> Tensor:
        """From ``(tokens, heads * dim)`` to ``(tokens, heads, dim)``."""
        return x.unflatten(1, (self.heads, -1))

    def forward(self, x: Tensor, lengths: Sequence[int], key_max: KeyMax) -> Tensor:
        """Apply the layer to ``x`` of shape ``(tokens, dim)`` with everything in memory, for training."""
        h = self._normed(self.norm1, x)
        heads = [self.split_heads(linear(h)) for linear in (self.query, self.key, self.value)]
        # short cells gain nothing from steps, and are faster together
        if self.backend == "scfm" and max(lengths, default=0) > tokens_per_step(heads[0], self.projection):
            attended = ragged_attention(*heads, self.projection, lengths, key_max=key_max)
        else:
            attended = self._attend_padded(heads, lengths, key_max)
        x = x + self.attention_dropout(self.out(attended.flatten(1)))
        return x + self.linear2(self.ff_dropout(F.gelu(self.linear1(self._normed(self.norm2, x)))))

    def _attend_padded(self, heads: Sequence[Tensor], lengths: Sequence[int], key_max: KeyMax) -> Tensor:
        padded = [pad(part, lengths) for part in heads]
        padding = padded[0][1]
        q, k, v = (part.transpose(1, 2) for part, _ in padded)
        attended = favor_attention(q, k, v, self.projection, key_max=key_max, padding=padding, backend=self.backend)
        return unpad(attended.transpose(1, 2), padding)

    def key_sums(self, x: Tensor) -> KeySums:
        """Sums over the keys and values of one cell, ``x`` of shape ``(tokens, dim)``."""
        sums = KeySums.empty(self.heads, self.projection)
        for some in self._steps(x):
            h = self._normed(self.norm1, some)
            sums.add(self.split_heads(self.key(h)), self.split_heads(self.value(h)))
        return sums

    def attend_(self, x: Tensor, sums: KeySums, maximum: Tensor) -> None:
        """The first half of :meth:`update_`, without the feed-forward part."""
        self._update_(x, sums, maximum, feed_forward=False)

    def update_(self, x: Tensor, sums: KeySums, maximum: Tensor) -> None:
        """Apply the layer in place to some tokens of a cell, given the sums over all of its keys."""
        self._update_(x, sums, maximum, feed_forward=True)

    def _update_(self, x: Tensor, sums: KeySums, maximum: Tensor, *, feed_forward: bool) -> None:
        context = sums.context(maximum)
        for some in self._steps(x):
            attended = context.read(self.split_heads(self.query(self._normed(self.norm1, some))))
            some.add_(self.out(attended.flatten(1)))
            if feed_forward:
                hidden = self.linear1(self._normed(self.norm2, some))
                some.add_(self.linear2(torch.ops.aten.gelu_(hidden)))

    def attention_map(self, x: Tensor, places: Tensor) -> Tensor:
        """Weights among some tokens of one cell that the linear attention implies, ``(heads, places, places)``."""
        return torch.cat(list(self.iter_attention_map(x, places, max(1, len(places)))), 1)

    def iter_attention_map(self, x: Tensor, places: Tensor, step: int) -> Iterator[Tensor]:
        """The rows of :meth:`attention_map`, at most ``step`` of them at a time."""
        sums = self.key_sums(x)
        context = sums.context(sums.maximum.amax())
        h = self._normed(self.norm1, x[places])
        keys = self.split_heads(self.key(h))
        for some in h.split(step):
            yield context.map(self.split_heads(self.query(some)), keys)


class PerformerStack(nn.Module):
    """Performer layers, and a final LayerNorm if there is one.

    Parameters
    ----------
    dim, heads, dim_head, ff_dropout, attention_dropout, qkv_bias
        As in :class:`PerformerLayer`.
    depth
        Number of layers.
    final_norm
        Whether a LayerNorm follows the last layer.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        ff_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        *,
        qkv_bias: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        layers = (
            PerformerLayer(dim, heads, dim_head, ff_dropout, attention_dropout, qkv_bias=qkv_bias) for _ in range(depth)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()
        self.register_buffer("calls_since_redraw", torch.tensor(0))

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # no conversion ever copies a whole number, and it may be a view into a mapped file
        self.calls_since_redraw = self.calls_since_redraw.clone()
        return self

    def use_backend(self, backend: Backend) -> None:
        """Compute the attention of all layers with ``"scfm"`` or, if it is installed, ``"performer-pytorch"``."""
        check_backend(backend)
        for layer in self.layers:
            layer.backend = backend

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
        if torch.is_grad_enabled() or self.training or any(layer.backend != "scfm" for layer in self.layers):
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
        """Draw new random features in all layers but those whose features are fixed."""
        for layer in self.layers:
            if layer.fixed_features:
                continue
            layer.projection.copy_(orthogonal_random_features(*layer.projection.shape, generator))
        self.calls_since_redraw.zero_()
