"""Linear attention for training, forward and backward in steps that stay in the caches.

Autograd keeps each array of features that lies between two products, six for each layer, and writes as many gradients of the
same size; with tens of thousands of tokens and 266 features for each head moving them takes longer than the products. Here nothing of
this size outlives a step: the backward pass makes the features again from queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from .linear_attention import EPSILON, KeyMax, KeySums, Scratch, check_key_max, scaled, shared_maxima, tokens_per_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, lengths: Sequence[int], *, key_max: KeyMax = "cell"
) -> Tensor:
    """Linear attention within each cell of a ragged batch; differentiable once, gradients flow through the maxima too.

    Parameters
    ----------
    q, k, v
        Shape ``(tokens, heads, dim)``, the tokens of one cell after those of another.
    projection
        Shape ``(features, dim)``.
    lengths
        Tokens of each cell.
    key_max
        What the maximum of the key features is taken over.

    Returns
    -------
    Shape and type of ``v``.

    Raises
    ------
    ValueError
        If the convention is unknown.

    See Also
    --------
    scfm.nn.linear_attention.favor_attention : the same, written down.
    """
    check_key_max(key_max)
    return _RaggedAttention.apply(q, k, v, projection, tuple(lengths), key_max)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, projection, lengths, key_max):
        # mixed-precision training must not make the exponents of the features in bfloat16
        with torch.autocast(q.device.type, enabled=False):
            sums = []
            for some_k, some_v in zip(k.split(lengths), v.split(lengths), strict=True):
                sums.append(KeySums.empty(q.shape[1], projection))
                sums[-1].add(some_k, some_v)
            contexts = [one.context(m) for one, m in zip(sums, shared_maxima(sums, key_max), strict=True)]
            parts = [context.read_with_share(some) for some, context in zip(q.split(lengths), contexts, strict=True)]
            out, share = (torch.cat(part) for part in zip(*parts, strict=True))
        tables, maxima = (torch.stack([getattr(one, name) for one in contexts]) for name in ("table", "maximum"))
        ctx.save_for_backward(q, k, v, projection, out, share, tables, maxima)
        ctx.lengths, ctx.key_max = lengths, key_max
        return out.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, projection, out, share, tables, maxima = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            steps = _Backward(scaled(projection))
            peaks = []
            cells = zip(*(part.split(ctx.lengths) for part in (q, k, v, out, share, grad, *grads)), strict=True)
            for (q_, k_, v_, out_, share_, grad_, dq, dk, dv), table, maximum in zip(
                cells, tables, maxima, strict=True
            ):
                d_table = steps.queries(q_, out_, share_, grad_, table, dq)
                peaks.append((steps.keys(k_, v_, maximum, d_table, dk, dv), dk))
            steps.through_maxima(peaks, ctx.key_max)
        return *grads, None, None, None


@dataclass
class _Peak:
    """Largest exponent of the keys of a cell for each head, where it is, and the gradient that all exponents add up to."""

    value: list[float]
    token: list[int]
    feature: list[int]
    total: Tensor


@dataclass
class _Backward:
    """Gradients of the attention of one cell.

    Parameters
    ----------
    projection
        Scaled projection, shape ``(features, dim)``.
    """

    projection: Tensor
    features: Scratch = field(default_factory=Scratch)
    gradients: Scratch = field(default_factory=Scratch)

    def queries(self, q: Tensor, out: Tensor, share: Tensor, grad: Tensor, table: Tensor, dq: Tensor) -> Tensor:
        """Write the gradient of the queries; returns that of the sums over the keys, ``(heads, features, dim + 1)``."""
        d_table = torch.zeros_like(table)
        total = table.new_zeros(len(table), 1, table.shape[2])
        step = tokens_per_step(q, self.projection)
        for some, some_out, some_share, some_grad, target in zip(
            *(part.split(step) for part in (q, out, share, grad, dq)), strict=True
        ):
            some_grad = some_grad.to(table.dtype) / some_share
            both = torch.cat([some_grad, -(some_grad * some_out).sum(-1, keepdim=True)], -1).transpose(0, 1)
            u, g = self.features.exponents(some, self.projection)
            largest = u.max(-1)
            phi = u.sub_(g.add_(largest.values[..., None])).exp_()
            d_table.baddbmm_(phi.permute(1, 2, 0), both)
            total += both.sum(1, keepdim=True)
            weight, summed = self._exponent_gradients(both, table, phi)
            # the row that gave the maximum gets back what all others together are given
            inner = self._inputs(weight, summed, some)
            inner -= summed[..., None] * self.projection[largest.indices]
            target.copy_(inner)
        return d_table.add_(total, alpha=EPSILON)

    def keys(self, k: Tensor, v: Tensor, maximum: Tensor, d_table: Tensor, dk: Tensor, dv: Tensor) -> _Peak:
        """Write the gradients of keys and values, that of the keys without what comes through the maximum."""
        heads, dim = v.shape[1:]
        d_values = d_table[..., :dim]
        floor = EPSILON * d_values.sum(1, keepdim=True)
        peak = _Peak([float("-inf")] * heads, [0] * heads, [0] * heads, d_table.new_zeros(heads))
        step = tokens_per_step(k, self.projection)
        start = 0
        for some_k, some_v, target_k, target_v in zip(*(part.split(step) for part in (k, v, dk, dv)), strict=True):
            u, g = self.features.exponents(some_k, self.projection)
            self._look_for_peak(u, start, peak)
            phi = u.sub_(g.add_(maximum[:, None])).exp_()
            target_v.copy_(torch.baddbmm(floor, phi.transpose(0, 1), d_values).transpose(0, 1))
            ones = some_v.new_ones(*some_v.shape[:2], 1)
            both = torch.cat([some_v, ones], -1).to(d_table.dtype).transpose(0, 1)
            weight, summed = self._exponent_gradients(both, d_table, phi)
            target_k.copy_(self._inputs(weight, summed, some_k))
            peak.total += summed.sum(0)
            start += len(some_k)
        return peak

    def _exponent_gradients(self, both: Tensor, table: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the exponents, ``(heads, tokens, features)``, and their sums over features, ``(tokens, heads)``."""
        weight = self.gradients.take(both.shape[0], both.shape[1], table.shape[1], like=table)
        torch.bmm(both, table.transpose(1, 2), out=weight)
        weight.mul_(phi.transpose(0, 1))
        return weight, weight.sum(-1).T

    def _inputs(self, weight: Tensor, summed: Tensor, x: Tensor) -> Tensor:
        """Gradient of queries or keys, ``(tokens, heads, dim)``, through products and half squared norms."""
        inner = (weight @ self.projection).transpose(0, 1)
        return torch.addcmul(inner, summed[..., None], x.to(inner.dtype), value=-(x.shape[-1] ** -0.5))

    def _look_for_peak(self, u: Tensor, start: int, peak: _Peak) -> None:
        for head, value in enumerate(u.amax((0, 2)).tolist()):
            if value > peak.value[head]:
                place = int(u[:, head].argmax())
                peak.value[head] = value
                peak.token[head], peak.feature[head] = start + place // u.shape[2], place % u.shape[2]

    def through_maxima(self, peaks: Sequence[tuple[_Peak, Tensor]], key_max: KeyMax) -> None:
        """Take from the key that gave each maximum what all exponents below it are given together."""
        shares = [
            (peak.value[head], peak.total[head], number, head)
            for number, (peak, _) in enumerate(peaks)
            for head in range(len(peak.value))
        ]
        groups: dict[tuple[int, ...], list[tuple[float, Tensor, int, int]]] = {}
        for share in shares:
            _, _, number, head = share
            name = {"batch": (), "cell": (number,), "head": (number, head)}[key_max]
            groups.setdefault(name, []).append(share)
        for members in groups.values():
            _, _, number, head = max(members, key=lambda share: share[0])
            peak, dk = peaks[number]
            total = torch.stack([share[1] for share in members]).sum()
            dk[peak.token[head], head] -= (total * self.projection[peak.feature[head]]).to(dk.dtype)
