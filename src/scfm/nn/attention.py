"""Softmax attention: the one place that picks a kernel."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .cpu_speed import best_time

if TYPE_CHECKING:
    from torch import Tensor

# block sizes at which the scores of one step stay in the cache
_QUERY_BLOCK = 256
_SCORE_BLOCK = 1 << 22
# cells, heads, tokens and width on which the kernels are compared
_PROBE = (1, 8, 1024, 64)
# how much faster chunks have to be on it, so that noise does not decide where both are alike
_CLEARLY = 1.25


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled softmax attention over full sequences, without a cells x heads x length x length tensor.

    Parameters
    ----------
    q, k, v
        Queries ``(cells, heads, queries, dim)``, keys and values ``(cells, heads, length, dim)``.
    padding
        True at keys to ignore, shape ``(cells, length)``; ``None`` when no key is padded, which is faster.
    dropout
        Dropout on the attention weights.

    Returns
    -------
    Tensor of the shape of ``q``.
    """
    mask = None if padding is None else ~padding[:, None, None, :]
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        if q.dtype in (torch.bfloat16, torch.float16) and not dropout and _chunks_win(q.dtype):
            return _attend_chunked(q, k, v, mask)
        # rows of a packed projection lie whole pages apart and fall into few sets of the cache, and these are read often
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


@cache
def _chunks_win(dtype: torch.dtype) -> bool:
    """Whether products with an explicit softmax are clearly faster here than torch's fused kernel.

    On some CPUs the fused kernel gains nothing from reduced precision, while products and softmax do.
    """
    x = torch.full(_PROBE, 0.5, dtype=dtype)
    fused = best_time(lambda: F.scaled_dot_product_attention(x, x, x))
    return fused > _CLEARLY * best_time(lambda: _attend_chunked(x, x, x, None))


def _attend_chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Matrix products with an explicit softmax over a block of heads and queries of one cell at a time."""
    cells, heads, queries, dim = q.shape
    length = k.shape[2]
    n_steps = max(1, -(-queries // _QUERY_BLOCK))
    step = max(1, -(-queries // n_steps))
    block = max(1, min(heads, _SCORE_BLOCK // (step * length)))
    # one buffer for all blocks: fresh memory of this size costs more in page faults than the product itself
    buffer = torch.empty(block * step * length, dtype=q.dtype)
    # laid out as the output projection reads it
    out = torch.empty(cells, queries, heads, dim, dtype=q.dtype)
    for cell in range(cells):
        scaled, keys, values = (q[cell] * dim**-0.5).contiguous(), k[cell].contiguous(), v[cell].contiguous()
        hidden = None if mask is None else ~mask[cell]
        target = out[cell].transpose(0, 1)
        for first in range(0, heads, block):
            group = slice(first, min(first + block, heads))
            for start in range(0, queries, step):
                rows = slice(start, min(start + step, queries))
                shape = (group.stop - group.start, rows.stop - rows.start, length)
                scores = buffer[: math.prod(shape)].view(shape)
                torch.bmm(scaled[group, rows], keys[group].transpose(1, 2), out=scores)
                if hidden is not None:
                    scores.masked_fill_(hidden, -math.inf)
                target[group, rows] = torch.bmm(torch.softmax(scores, -1, out=scores), values[group])
    return out.transpose(1, 2)


def attend_with_self(q: Tensor, k: Tensor, v: Tensor, k_self: Tensor, v_self: Tensor, padding: Tensor | None) -> Tensor:
    """Attention of queries that see a shared set of keys and, besides, only themselves.

    The softmax runs over ``[q k^T, q . k_self]``, so no queries x queries block is ever formed.

    Parameters
    ----------
    q, k_self, v_self
        Shape ``(cells, heads, queries, dim)``.
    k, v
        Shape ``(cells, heads, length, dim)``.
    padding
        True at keys to ignore, shape ``(cells, length)``.
    """
    cells, heads, queries, dim = q.shape
    step = max(32, 4 * _SCORE_BLOCK // max(1, cells * heads * (k.shape[2] + 1)))
    q = q * dim**-0.5
    own = (q * k_self).sum(-1, keepdim=True)
    keys = k.transpose(-1, -2)
    parts = []
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = q[:, :, rows] @ keys
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        weights = torch.softmax(torch.cat([scores, own[:, :, rows]], -1), -1)
        parts.append(weights[..., :-1] @ v + weights[..., -1:] * v_self[:, :, rows])
    return torch.cat(parts, 2) if parts else q


def attention_weights(q: Tensor, k: Tensor, padding: Tensor | None = None) -> Tensor:
    """Softmax attention weights themselves, ``(cells, heads, queries, length)``, in float32."""
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    return torch.softmax(scores, -1)


def attend_first(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, heads: int, padding: Tensor | None) -> Tensor:
    """Self-attention output of position 0 only, heads concatenated, before the output projection.

    Keys and values are never formed: ``q . (W_k x_j)`` is computed as ``(W_k^T q) . x_j`` and the weights average
    ``x_j`` before ``W_v`` is applied, which is the same sum in another order. The key bias adds the same number to
    all scores of a head and leaves the softmax unchanged.

    Parameters
    ----------
    x
        Layer input, shape ``(cells, length, width)``.
    qkv_weight, qkv_bias
        Packed projection, ``(3 * width, width)`` and ``(3 * width,)``, in the order query, key, value.
    heads
        Number of heads.
    padding
        True at keys to ignore, shape ``(cells, length)``.

    Returns
    -------
    Shape ``(cells, width)``.
    """
    cells, _, width = x.shape
    w_q, w_k, w_v = qkv_weight.chunk(3)
    b_q, _, b_v = qkv_bias.chunk(3)
    dim = width // heads
    q = F.linear(x[:, 0], w_q, b_q).view(cells, heads, dim) * dim**-0.5
    pulled = torch.einsum("bhd,hdw->bhw", q, w_k.view(heads, dim, width))
    scores = pulled @ x.transpose(1, 2)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, :], -math.inf)
    mixed = torch.softmax(scores, -1) @ x
    return torch.einsum("bhw,hdw->bhd", mixed, w_v.view(heads, dim, width)).reshape(cells, width) + b_v
