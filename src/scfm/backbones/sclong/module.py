"""The scLong network: two encoders, for the genes with the highest values and for the others, and a decoder of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from ...nn.performer import PerformerStack, layer_norm
from .config import STACKS
from .layers import GeneTable, GOConvolution, ValueEmbedding, wide

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...nn.linear_attention import KeyMax
    from .._tokens import TokenBatch
    from .config import SCLongConfig

TieBreak = Literal["index", "torch"]
"""Which of the genes with equal values go to the large encoder: the first, or what ``torch.topk`` takes."""


@dataclass(frozen=True)
class Split:
    """Positions of some cells, divided between the encoders.

    Parameters
    ----------
    top
        Positions of the highest values, highest first, shape ``(cells, top_length)``.
    rest
        The other positions in ascending order, shape ``(cells, n_positions - top_length)``.
    """

    top: Tensor
    rest: Tensor

    @classmethod
    def of(cls, values: Tensor, top_length: int, tie_break: TieBreak = "index") -> Split:
        """Divide the positions of cells with these ``values``, shape ``(cells, n_positions)``.

        Raises
        ------
        ValueError
            If the rule is unknown.
        """
        if tie_break not in get_args(TieBreak):
            msg = f"tie_break must be one of {', '.join(get_args(TieBreak))}; got {tie_break!r}"
            raise ValueError(msg)
        if tie_break == "torch":
            top = values.topk(top_length, dim=1).indices
        else:
            top = values.sort(dim=1, descending=True, stable=True).indices[:, :top_length]
        left = torch.ones_like(values, dtype=torch.bool).scatter_(1, top, value=False)
        return cls(top, left.nonzero()[:, 1].view(len(values), -1))

    def rows(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Numbers of the top and of the other positions when all cells stand one after another."""
        first = torch.arange(len(self.top), device=self.top.device)[:, None] * n_positions
        return (self.top + first).flatten(), (self.rest + first).flatten()


@dataclass(frozen=True)
class Encoded:
    """What the two encoders make of some cells.

    Parameters
    ----------
    split
        Which positions went where.
    top, rest
        States of the large and of the mini encoder, shapes ``(cells, top_length, dim)`` and
        ``(cells, n_positions - top_length, dim)``, in the order of ``split``.
    """

    split: Split
    top: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Encodings:
    """All stages of some cells; see :meth:`SCLong.stages`.

    Parameters
    ----------
    top_indices
        Positions that went through the large encoder, highest value first, shape ``(cells, top_length)``.
    top_encodings, left_encodings
        Output of the large encoder in this order, and of the mini encoder in ascending order of the other positions.
    merged_encodings
        Input of the decoder, shape ``(cells, n_positions, dim)``.
    merged_decodings
        Its output, which is the representation of each gene, of the same shape.
    reconstruction
        Predicted expression, shape ``(cells, n_positions)``.
    """

    top_indices: Tensor
    top_encodings: Tensor
    left_encodings: Tensor
    merged_encodings: Tensor
    merged_decodings: Tensor
    reconstruction: Tensor


class SCLong(nn.Module):
    """scLong (Bai et al., Nature Communications 2026).

    Gene tokens and the streams through the layers are float32 at least, whatever the type of the weights.

    Parameters
    ----------
    config
        Hyper-parameters.
    """

    def __init__(self, config: SCLongConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.value_embedding = ValueEmbedding(dim, config.value_hidden, config.mask_threshold)
        self.gene_table = GeneTable(config.n_positions, dim) if config.gene_table else None
        self.go = GOConvolution(config.n_positions, dim, config.n_edges, config.go_layers, max_norm=config.go_max_norm)
        self.to_large = nn.Linear(dim, config.large_dim)
        self.large_norm = nn.LayerNorm(config.large_dim)
        for name in STACKS:
            stack = PerformerStack(**config.stack_sizes(name), qkv_bias=config.qkv_bias, final_norm=False)
            setattr(self, name, stack)
        self.from_large = nn.Linear(config.large_dim, dim)
        self.from_large_norm = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        self._gene_vectors: tuple[tuple[object, ...], Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._gene_vectors = None
        return super()._apply(fn, recurse)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Type of gene tokens and of what runs through the layers."""
        return wide(self.head.weight.dtype)

    # -- gene tokens -------------------------------------------------------------------------------------------------

    def gene_vectors(self) -> Tensor:
        """Sum of the gene table and the graph convolution, ``(n_positions, dim)``; kept until a weight changes."""
        parts = [*self.go.parameters(), *self.go.buffers()]
        if self.gene_table is not None:
            parts.append(self.gene_table.weight)
        key = tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
        if self._gene_vectors is None or self._gene_vectors[0] != key:
            with torch.inference_mode():
                total = self.go()
                if self.gene_table is not None:
                    # in the type of the table, so that the sum with a token is rounded once
                    total = self.gene_table.weight + total
            self._gene_vectors = (key, total)
        return self._gene_vectors[1]

    def add_gene_vectors(self, x: Tensor) -> Tensor:
        """Add the vectors of all positions to ``x`` of shape ``(cells, n_positions, dim)``."""
        if not self._learns():
            return x.add_(self.gene_vectors())
        if self.gene_table is not None:
            x = (x + self.gene_table.weight).to(x.dtype)
        return x + self.go().to(x.dtype)

    def _learns(self) -> bool:
        return self.training or torch.is_grad_enabled()

    def embed_tokens(self, tokens: TokenBatch) -> Tensor:
        """Gene tokens of all positions of all cells, ``(cells, n_positions, dim)``."""
        values = torch.cat([tokens.flat_values.new_zeros(1), tokens.flat_values])
        embedded = self.value_embedding(values)
        n = self.config.n_positions
        # unexpressed genes, which are most, share one vector
        x = embedded[:1].repeat(len(tokens) * n, 1)
        x = _put(x, tokens.flat_ids + tokens.flat_cells * n, embedded[1:], self._learns())
        return self.add_gene_vectors(x.view(len(tokens), n, -1))

    # -- layers ------------------------------------------------------------------------------------------------------

    def large_input(self, x: Tensor) -> Tensor:
        """Input of the large encoder from gene tokens, ``(tokens, large_dim)``."""
        return layer_norm(self.large_norm, self.to_large(x.to(self.head.weight.dtype)).to(x.dtype), x.dtype)

    def split(self, tokens: TokenBatch, tie_break: TieBreak = "index") -> Split:
        """Divide the positions of all cells between the encoders."""
        return Split.of(dense_values(tokens, self.config.n_positions), self.config.top_length, tie_break)

    def encode(self, tokens: TokenBatch, *, key_max: KeyMax = "cell", tie_break: TieBreak = "index") -> Encoded:
        """Run both encoders.

        Parameters
        ----------
        tokens
            Values of all positions that are not zero.
        key_max
            What the maximum of the linear attention is taken over.
        tie_break
            Which of the genes with equal values are among the top.
        """
        cells, n = len(tokens), self.config.n_positions
        split = self.split(tokens, tie_break)
        x = self.embed_tokens(tokens).flatten(0, 1)
        top, rest = (x[rows] for rows in split.rows(n))
        del x
        rest = self.mini(rest, [split.rest.shape[1]] * cells, key_max=key_max)
        hidden = self.large(self.large_input(top), [split.top.shape[1]] * cells, key_max=key_max)
        top = self.from_large(hidden.to(self.head.weight.dtype)).to(hidden.dtype)
        top = layer_norm(self.from_large_norm, top, hidden.dtype)
        return Encoded(split, top.unflatten(0, (cells, -1)), rest.unflatten(0, (cells, -1)))

    def merge(self, encoded: Encoded) -> Tensor:
        """Input of the decoder: all positions in order, gene vectors added again, ``(cells, n_positions, dim)``."""
        n = self.config.n_positions
        x = encoded.top.new_zeros(len(encoded.top) * n, encoded.top.shape[2])
        for rows, states in zip(encoded.split.rows(n), (encoded.top, encoded.rest), strict=True):
            x = _put(x, rows, states.flatten(0, 1), self._learns())
        return self.add_gene_vectors(x.view(-1, n, x.shape[1]))

    def decode(self, merged: Tensor, *, rows: Tensor | None = None, key_max: KeyMax = "cell") -> Tensor:
        """States of all positions, or of ``rows``, after the last LayerNorm; may overwrite ``merged``."""
        cells, n, _ = merged.shape
        x = self.decoder(merged.flatten(0, 1), [n] * cells, rows=rows, key_max=key_max)
        return layer_norm(self.norm, x, x.dtype).unflatten(0, (cells, -1))

    def forward(
        self,
        tokens: TokenBatch,
        *,
        rows: Tensor | None = None,
        key_max: KeyMax = "cell",
        tie_break: TieBreak = "index",
    ) -> Tensor:
        """From tokens to the states of all positions, or of ``rows``, ``(cells, positions, dim)``."""
        return self.decode(
            self.merge(self.encode(tokens, key_max=key_max, tie_break=tie_break)), rows=rows, key_max=key_max
        )

    def stages(self, tokens: TokenBatch, *, key_max: KeyMax = "cell", tie_break: TieBreak = "index") -> Encodings:
        """All that happens to some cells, in memory together; arguments as for :meth:`encode`."""
        encoded = self.encode(tokens, key_max=key_max, tie_break=tie_break)
        merged = self.merge(encoded)
        states = self.decode(merged.clone(), key_max=key_max)
        return Encodings(encoded.split.top, encoded.top, encoded.rest, merged, states, self.predict(states))

    def predict(self, states: Tensor) -> Tensor:
        """Expression from states, last axis removed."""
        return nn.functional.linear(states, self.head.weight.to(states.dtype), self.head.bias.to(states.dtype))[..., 0]

    # -- training ----------------------------------------------------------------------------------------------------

    def count_call(self, redraw_every: int, generator: torch.Generator | None = None) -> None:
        """Count a training step; new random features are drawn after ``redraw_every`` of them."""
        for name in STACKS:
            getattr(self, name).count_call(redraw_every, generator)


def dense_values(tokens: TokenBatch, n_positions: int) -> Tensor:
    """Values of all positions of a few cells, ``(cells, n_positions)``."""
    out = tokens.flat_values.new_zeros(len(tokens), n_positions)
    out[tokens.flat_cells, tokens.flat_ids] = tokens.flat_values
    return out


def _put(x: Tensor, rows: Tensor, values: Tensor, learns: bool) -> Tensor:
    """Replace rows of ``x``, in place unless gradients are wanted."""
    return x.index_copy(0, rows, values) if learns else x.index_copy_(0, rows, values)
