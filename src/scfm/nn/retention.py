"""Gated retention without decay: linear attention with ReLU features, per-head RMS normalisation and a SiLU gate.

The keys and values of a cell meet in one small matrix per head, so the cost is linear in the number of tokens. All
tokens of a ragged batch lie in one row; without gradients they pass through in blocks, so that neither padding nor
whole projections are ever stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ragged import pad, unpad

if TYPE_CHECKING:
    from collections.abc import Sequence

# rows of one matrix product: more gains nothing on a CPU, fewer cost the packing of the weights
_CPU_BLOCK = 2048
_ACCELERATOR_BLOCK = 1 << 17
_TINY = 1e-24

KEY, VALUE, QUERY, GATE = range(4)


class Block(NamedTuple):
    """Consecutive rows of a ragged batch, and the cells they belong to."""

    rows: slice
    cells: slice
    lengths: list[int]


def blocks(lengths: Sequence[int], x: Tensor) -> list[Block]:
    """Cut the rows of ``x``, which belong to cells of these lengths, into blocks; one block if gradients are wanted."""
    total = len(x)
    step = _CPU_BLOCK if x.device.type == "cpu" else _ACCELERATOR_BLOCK
    if torch.is_grad_enabled() or total <= step:
        return [Block(slice(0, total), slice(0, len(lengths)), list(lengths))]
    # equal blocks, so that no last one is too small to be fast
    step = -(-total // -(-total // step))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    out = []
    for start in range(0, total, step):
        stop = min(start + step, total)
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        inside = np.diff(offsets[first : last + 1].clip(start, stop))
        out.append(Block(slice(start, stop), slice(first, last), inside.tolist()))
    return out


class PackedLinear(nn.Module):
    """Several bias-free maps of the same input as one matrix product, with or without low-rank updates.

    Parameters
    ----------
    dim
        Width of the input and of the output of each map.
    n_maps
        Number of maps.
    rank
        Rank of the update ``x A^T B^T`` that each map has beside its matrix (LoRA, not scaled); 0 for none.
    """

    def __init__(self, dim: int, n_maps: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(n_maps * dim, dim))
        if rank:
            self.lora_a = nn.Parameter(torch.empty(n_maps * rank, dim))
            self.lora_b = nn.Parameter(torch.zeros(n_maps * dim, rank))
            nn.init.normal_(self.lora_a, std=0.01)

    def init_weights(self, gains: Sequence[float]) -> None:
        """Draw the matrix of each map from Xavier's normal distribution with its gain."""
        for part, gain in zip(self.weight.data.split(self.dim), gains, strict=True):
            nn.init.xavier_normal_(part, gain)

    def forward(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Results of the maps ``first`` to before ``last`` side by side, ``(tokens, maps * dim)``."""
        last = len(self.weight) // self.dim if last is None else last
        out = F.linear(x, self.weight[first * self.dim : last * self.dim])
        if self.rank:
            down = F.linear(x, self.lora_a[first * self.rank : last * self.rank]).unflatten(-1, (-1, self.rank))
            up = self.lora_b[first * self.dim : last * self.dim].unflatten(0, (-1, self.dim))
            out = out + torch.einsum("tmr,mdr->tmd", down, up).flatten(1)
        return out


def merge_low_rank(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Weight of a :class:`PackedLinear` with its low-rank updates added: ``W + B A`` for each map."""
    dim, rank = weight.shape[1], lora_b.shape[1]
    update = lora_b.unflatten(0, (-1, dim)) @ lora_a.unflatten(0, (-1, rank))
    return weight + update.flatten(0, 1)


def _one_by_one(x: Tensor) -> bool:
    """Whether to go through the cells instead of padding them: on a CPU that costs no time, and no work for padding."""
    return x.device.type == "cpu" or not len(x)


def sum_keys_values(k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum of the outer products of keys and values over the tokens of each cell.

    Parameters
    ----------
    k, v
        Shape ``(tokens, heads, dim)``.
    lengths
        Tokens of each cell.

    Returns
    -------
    Shape ``(cells, heads, dim, dim)``; float32 at least, because a sum of thousands of terms outgrows bfloat16.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        k, v = k.to(wide), v.to(wide)
        if _one_by_one(k):
            cells = zip(k.split(list(lengths)), v.split(list(lengths)), strict=True)
            return torch.stack([torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1)) for a, b in cells])
        (k, _), (v, _) = pad(k, lengths), pad(v, lengths)
        return k.permute(0, 2, 3, 1) @ v.transpose(1, 2)


def read_sums(q: Tensor, sums: Tensor, lengths: Sequence[int]) -> Tensor:
    """Multiply queries ``(tokens, heads, dim)`` by the sums ``(cells, heads, dim, dim)`` of their cells."""
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(sums.dtype)
        if _one_by_one(q):
            cells = zip(q.split(list(lengths)), sums, strict=True)
            return torch.cat([torch.bmm(a.transpose(0, 1), total).transpose(0, 1) for a, total in cells])
        q, padding = pad(q, lengths)
        return unpad((q.transpose(1, 2) @ sums).transpose(1, 2), padding)


def rms_normalize(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; what is all zero stays zero, and so does its gradient."""
    mean = x.square().mean(-1, keepdim=True)
    return x * (torch.rsqrt(mean.clamp_min(_TINY)) * (mean > _TINY))


class GatedRetention(nn.Module):
    """Retention of RetNet without decay, as CellFM uses it (Zeng et al., Nature Communications 2025).

    Each query reads ``ReLU(q) (sum over keys of ReLU(k)^T v)``; the result of each head is divided by its root mean
    square, which makes a normaliser over keys needless, and multiplied by ``SiLU`` of a gate.

    Parameters
    ----------
    dim
        Width of the tokens.
    heads
        Number of heads.
    rank
        Rank of low-rank updates of all projections; 0 for none.
    """

    def __init__(self, dim: int, heads: int, rank: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim // heads
        self.kvqu = PackedLinear(dim, 4, rank)
        self.out = PackedLinear(dim, 1, rank)

    def init_weights(self, gain: float) -> None:
        """Xavier's normal distribution, with a gain for all but queries and keys."""
        gains = {KEY: 1.0, VALUE: gain, QUERY: 1.0, GATE: gain}
        self.kvqu.init_weights([gains[i] for i in range(4)])
        self.out.init_weights([gain])

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Projections ``first`` to before ``last`` of tokens, each ``(tokens, heads, dim / heads)``."""
        return self.kvqu(x, first, last).unflatten(1, (last - first, self.heads, -1)).unbind(1)

    def sums(self, x: Tensor, lengths: Sequence[int], weights: Tensor | None = None) -> Tensor:
        """What queries can read from a set of tokens, ``(cells, heads, dim / heads, dim / heads)``.

        Parameters
        ----------
        x
            Shape ``(tokens, dim)``.
        lengths
            Tokens of each cell.
        weights
            Weight of each token as a key, 0 for tokens that are not to be seen, shape ``(tokens,)``; 1 by default.
        """
        parts = blocks(lengths, x)
        total = None
        for block in parts:
            k, v = self.project(x[block.rows], KEY, QUERY)
            k = F.relu(k)
            if weights is not None:
                k = k * weights[block.rows, None, None].to(k.dtype)
            some = sum_keys_values(k, v, block.lengths) / self.dim_head
            if len(parts) == 1:
                return some
            if total is None:
                total = some.new_zeros(len(lengths), *some.shape[1:])
            total[block.cells] += some
        return total

    def read(self, x: Tensor, sums: Tensor, lengths: Sequence[int]) -> Tensor:
        """Result for tokens ``(tokens, dim)`` of cells whose keys and values were summed, ``(tokens, dim)``."""
        q, u = self.project(x, QUERY, GATE + 1)
        normal = rms_normalize(read_sums(F.relu(q), sums, lengths))
        return self.out((normal * F.silu(u)).to(x.dtype).flatten(1))

    def features(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rectified queries of ``x`` and keys of ``keys`` (of ``x`` by default), ``(heads, tokens, dim)``, float32.

        Both are divided by the square root of their width, so that their products are the scores of the tokens.
        """
        (q,), (k,) = self.project(x, QUERY, QUERY + 1), self.project(x if keys is None else keys, KEY, KEY + 1)
        wide = torch.promote_types(q.dtype, torch.float32)
        return tuple(F.relu(part).to(wide).transpose(0, 1) / self.dim_head**0.5 for part in (q, k))


class BilinearFFN(nn.Module):
    """Feed-forward network ``W_o (W_u x * W_v x)``: a gated linear unit without an activation.

    Parameters
    ----------
    dim
        Width of the tokens, and of the hidden layer.
    rank
        Rank of low-rank updates of all projections; 0 for none.
    """

    def __init__(self, dim: int, rank: int = 0) -> None:
        super().__init__()
        self.uv = PackedLinear(dim, 2, rank)
        self.out = PackedLinear(dim, 1, rank)

    def init_weights(self, gain: float) -> None:
        """Xavier's normal distribution with a gain."""
        self.uv.init_weights([gain, gain])
        self.out.init_weights([gain])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to ``x`` of shape ``(tokens, dim)``."""
        u, v = self.uv(x).chunk(2, -1)
        return self.out(u * v)
