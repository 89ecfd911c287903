"""Parts of the CellFM network: the value encoder, the encoder layer and the decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.retention import BilinearFFN, GatedRetention, blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


class ValueEncoder(nn.Module):
    """A number becomes a mixture of learned vectors.

    Upstream computes ``softmax(W3 h + a h)`` with ``h = LeakyReLU(w1 x)``. Leaky ReLUs commute with positive factors,
    so for ``x >= 0`` the logits are ``x`` times one constant vector, which is computed in float64: the logits are large,
    and in float32 the two ways differ in the fifth digit.

    Parameters
    ----------
    dim
        Width of the vectors.
    n_bins
        Number of vectors.
    slope
        Slope of the leaky ReLU.
    """

    def __init__(self, dim: int, n_bins: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.a = nn.Parameter(torch.zeros(1, 1))
        self.w1 = nn.Linear(1, n_bins, bias=False)
        self.w3 = nn.Linear(n_bins, n_bins, bias=False)
        self.table = nn.Linear(n_bins, dim, bias=False)

    def _apply(self, fn, recurse: bool = True):
        # the table may be bfloat16, but the logits it is mixed with need the precision their weights were trained in
        exact = [self.a, self.w1.weight, self.w3.weight]
        before = [p.data for p in exact]
        super()._apply(fn, recurse)
        for owner, name, old in zip((self, self.w1, self.w3), ("a", "weight", "weight"), before, strict=True):
            now = getattr(owner, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = old.to(now.device)
        return self

    def logits_of_one(self) -> Tensor:
        """Logits of the number 1, ``(n_bins,)``; float64 where the device has it."""
        wide = torch.float32 if self.a.device.type == "mps" else torch.float64
        hidden = F.leaky_relu(self.w1.weight[:, 0].to(wide), self.slope)
        return self.w3.weight.to(wide) @ hidden + self.a[0, 0].to(wide) * hidden

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``values`` (not negative) of shape ``(...)``; the result has the type of the table."""
        if torch.is_grad_enabled():
            return self.embed(values)
        # a cell has few distinct counts
        distinct, where = torch.unique(values, return_inverse=True)
        return self.embed(distinct)[where]

    def embed(self, values: Tensor) -> Tensor:
        """Embed each of ``values``, equal or not."""
        logits = self.logits_of_one()
        mixture = torch.softmax((values.to(logits.dtype).unsqueeze(-1) * logits).float(), -1)
        return self.table(mixture.to(self.table.weight.dtype))


class RetentionLayer(nn.Module):
    """Gated retention and a bilinear feed-forward network, each with DeepNorm's weighted residual and a LayerNorm.

    Parameters
    ----------
    dim
        Width of the tokens.
    heads
        Number of heads.
    alpha
        Weight of the residual stream.
    dropout
        Dropout in training.
    rank
        Rank of low-rank updates.
    eps
        Constant of the LayerNorms.
    """

    def __init__(self, dim: int, heads: int, alpha: float, dropout: float, rank: int, eps: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.attention = GatedRetention(dim, heads, rank)
        self.ffn = BilinearFFN(dim, rank)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, lengths: Sequence[int], weights: Tensor | None = None, first: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x
            Shape ``(tokens, dim)``. Overwritten when no gradients are wanted.
        lengths
            Tokens of each cell.
        weights
            Weight of each token as a key; 1 by default.
        first
            Rows of the first tokens of all cells; given if the others are not wanted, which then are keys and values
            only.
        """
        sums = self.attention.sums(x, lengths, weights)
        if first is not None:
            x, lengths = x[first], [1] * len(lengths)
        if torch.is_grad_enabled():
            return self._update(x, sums, lengths)
        for block in blocks(lengths, x):
            x[block.rows] = self._update(x[block.rows], sums[block.cells], block.lengths)
        return x

    def _update(self, x: Tensor, sums: Tensor, lengths: Sequence[int]) -> Tensor:
        x = self.norm1(torch.add(self.dropout(self.attention.read(x, sums, lengths)), x, alpha=self.alpha))
        return self.norm2(torch.add(self.dropout(self.ffn(x)), x, alpha=self.alpha))


class GeneDecoder(nn.Module):
    """Expression of a gene from the state of its token, and the probability that it is expressed.

    Parameters
    ----------
    dim
        Width of the states.
    slope
        Slope of the leaky ReLUs.
    zero_head
        Whether the probability can be predicted.
    """

    def __init__(self, dim: int, slope: float, *, zero_head: bool) -> None:
        super().__init__()
        self.slope = slope
        self.w1 = nn.Linear(dim, dim, bias=False)
        self.w2 = nn.Linear(dim, 1, bias=False)
        self.zero_head = None
        if zero_head:
            hidden = (nn.Linear(dim, dim), nn.LeakyReLU(slope), nn.Linear(dim, dim), nn.LeakyReLU(slope))
            self.zero_head = nn.Sequential(*hidden, nn.Linear(dim, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Predicted values, last axis removed."""
        return self.w2(F.leaky_relu(self.w1(states), self.slope)).squeeze(-1)

    def expressed(self, states: Tensor) -> Tensor:
        """Probability that a gene is expressed."""
        return torch.sigmoid(self.zero_head(states).squeeze(-1))


class CellDecoder(nn.Module):
    """Expression of any gene from the CLS state and the gene's row of the gene table.

    Parameters
    ----------
    dim
        Width of the states.
    zero_head
        Whether the probability that a gene is expressed can be predicted.
    """

    def __init__(self, dim: int, *, zero_head: bool) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim, bias=False)
        self.zero_head = nn.Linear(dim, dim) if zero_head else None

    def queries(self, genes: Tensor) -> Tensor:
        """Vectors whose products with CLS states are predicted values, from rows of the gene table."""
        return torch.sigmoid(self.map(genes))
