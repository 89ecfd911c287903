"""The scFoundation network: an encoder of expressed genes and a decoder of all genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.performer import PerformerStack
from .classifier import ClassHead, pooled
from .layers import TransformerStack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...nn.linear_attention import KeyMax
    from .._tokens import TokenBatch
    from .config import SCFoundationConfig

# tokens that pass through the encoder together; more gains nothing on a CPU and would cost memory
_ENCODER_STEP = 4096


class ValueEmbedding(nn.Module):
    """Auto-discretisation: a number becomes a mixture of learned bin vectors.

    Parameters
    ----------
    dim
        Width of the bin vectors.
    n_bins
        Number of bin vectors.
    alpha
        Weight of the hidden layer in the mixing logits.
    mask_value, pad_value
        Numbers that have a vector of their own.
    """

    def __init__(self, dim: int, n_bins: int, alpha: float, mask_value: float, pad_value: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.mask_value = mask_value
        self.pad_value = pad_value
        self.linear1 = nn.Linear(1, n_bins)
        self.linear2 = nn.Linear(n_bins, n_bins)
        self.bins = nn.Embedding(n_bins, dim)
        self.mask = nn.Embedding(1, dim)
        self.pad = nn.Embedding(1, dim)

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``values`` of any shape; the result has the type of the weights."""
        kind = self.bins.weight.dtype
        # the mixing weights are made in float32 at least: bfloat16 cannot tell neighbouring log counts apart
        wide = torch.promote_types(kind, torch.float32)
        values = values.to(wide).unsqueeze(-1)
        hidden = F.leaky_relu(_linear(values, self.linear1, wide), 0.1)
        weights = torch.softmax(torch.add(_linear(hidden, self.linear2, wide), hidden, alpha=self.alpha), -1)
        out = weights.to(kind) @ self.bins.weight
        is_mask, is_pad = values == self.mask_value, values == self.pad_value
        if torch.is_grad_enabled() or bool((is_mask | is_pad).any()):
            out = torch.where(is_mask, self.mask.weight[0], out)
            out = torch.where(is_pad, self.pad.weight[0], out)
        return out


def _linear(x: Tensor, layer: nn.Linear, kind: torch.dtype) -> Tensor:
    return F.linear(x, layer.weight.to(kind), layer.bias.to(kind))


class SCFoundation(nn.Module):
    """scFoundation, also known as xTrimoGene (Hao et al., Nature Methods 2024).

    Parameters
    ----------
    config
        Hyper-parameters.
    """

    def __init__(self, config: SCFoundationConfig) -> None:
        super().__init__()
        self.config = config
        self.value_embedding = ValueEmbedding(
            config.encoder_dim, config.n_bins, config.bin_alpha, config.mask_value, config.pad_value
        )
        self.gene_embedding = nn.Embedding(config.n_positions + 1, config.encoder_dim)
        self.encoder = _stack(config, "encoder")
        self.decoder_input = nn.Linear(config.encoder_dim, config.decoder_dim)
        self.decoder = _stack(config, "decoder")
        self.norm = nn.LayerNorm(config.decoder_dim)
        self.head = nn.Linear(config.decoder_dim, 1)
        self.classifier = ClassHead(config.encoder_dim, config.n_classes) if config.n_classes else None

    # -- encoder -----------------------------------------------------------------------------------------------------

    def embed_tokens(self, tokens: TokenBatch) -> Tensor:
        """Input of the encoder, ``(tokens, encoder_dim)``."""
        return self.value_embedding(tokens.flat_values) + self.gene_embedding(tokens.flat_ids)

    def encode(self, tokens: TokenBatch) -> Tensor:
        """Encoder states of all tokens, cell after cell, ``(tokens, encoder_dim)``."""
        if torch.is_grad_enabled() or self.training:
            return self.encoder(self.embed_tokens(tokens), tokens.lengths.tolist())
        return torch.cat(
            [self.encoder(self.embed_tokens(part), part.lengths.tolist()) for part in split_tokens(tokens)]
        )

    # -- decoder -----------------------------------------------------------------------------------------------------

    def unexpressed(self) -> Tensor:
        """Decoder input of all positions of a cell that expresses nothing, ``(n_positions, decoder_dim)``."""
        zero = self.value_embedding(self.gene_embedding.weight.new_zeros(1))
        return self.decoder_input(self.gene_embedding.weight[: self.config.n_positions] + zero)

    def embed_decoder(self, tokens: TokenBatch, hidden: Tensor, base: Tensor) -> Tensor:
        """Decoder input of all positions of all cells, ``(cells * n_positions, decoder_dim)``.

        Parameters
        ----------
        tokens
            What the encoder saw, and in ``queries`` the other positions whose value is not zero.
        hidden
            Encoder states of the tokens.
        base
            Result of :meth:`unexpressed`.
        """
        out = base.repeat(len(tokens), 1)
        parts = [(tokens, hidden)]
        if tokens.queries is not None and len(tokens.queries.flat_ids):
            parts.append((tokens.queries, self.value_embedding(tokens.queries.flat_values)))
        for batch, states in parts:
            rows = batch.flat_cells * self.config.n_positions + batch.flat_ids
            inputs = self.decoder_input(states + self.gene_embedding(batch.flat_ids))
            out = out.index_copy(0, rows, inputs) if torch.is_grad_enabled() else out.index_copy_(0, rows, inputs)
        return out

    def decode(
        self, tokens: TokenBatch, hidden: Tensor, *, rows: Tensor | None = None, key_max: KeyMax = "cell"
    ) -> Iterator[Tensor]:
        """Decoder states after the last LayerNorm, a few cells at a time.

        Parameters
        ----------
        tokens
            What the encoder saw, and in ``queries`` the other positions whose value is not zero.
        hidden
            Encoder states of the tokens.
        rows
            Positions that are wanted; all by default.
        key_max
            ``"cell"``, or ``"batch"`` for a maximum over all cells, which then are in memory together.

        Yields
        ------
        Shape ``(some cells, positions, decoder_dim)``; together they are all cells in order.
        """
        base = self.unexpressed()
        together = key_max == "batch" or torch.is_grad_enabled() or self.training
        parts = [(tokens, hidden)]
        if not together:
            cells = [tokens.select(slice(i, i + 1)) for i in range(len(tokens))]
            parts = zip(cells, hidden.split(tokens.lengths.tolist()), strict=True)
        for part, states in parts:
            x = self.embed_decoder(part, states, base)
            x = self.decoder(x, [self.config.n_positions] * len(part), rows=rows, key_max=key_max)
            yield self.norm(x).unflatten(0, (len(part), -1))

    def predict(self, states: Tensor) -> Tensor:
        """Expression (log1p of counts per 10,000 at depth T) from decoder states, last axis removed."""
        return self.head(states).squeeze(-1)

    def classify(self, tokens: TokenBatch) -> Tensor:
        """Logits of the classes of a fine-tuned model, ``(cells, classes)``."""
        return self.classifier(pooled(self, tokens))

    # -- training ----------------------------------------------------------------------------------------------------

    def count_call(self, redraw_every: int, generator: torch.Generator | None = None) -> None:
        """Count a training step; new random features are drawn after ``redraw_every`` of them."""
        for stack in (self.encoder, self.decoder):
            if isinstance(stack, PerformerStack):
                stack.count_call(redraw_every, generator)


def _stack(config: SCFoundationConfig, side: str) -> TransformerStack | PerformerStack:
    dim, depth, heads, kind = (getattr(config, f"{side}_{name}") for name in ("dim", "depth", "heads", "layer"))
    if kind == "transformer":
        return TransformerStack(dim, depth, heads, config.transformer_dropout)
    dim_head, ff, attention = (
        getattr(config, f"{side}_{name}") for name in ("dim_head", "ff_dropout", "attention_dropout")
    )
    return PerformerStack(dim, depth, heads, dim_head, ff, attention)


def split_tokens(tokens: TokenBatch) -> list[TokenBatch]:
    """Cut a batch into runs of cells: one for an accelerator, such that fit into the caches for a CPU."""
    if tokens.device.type != "cpu" or len(tokens.flat_ids) <= _ENCODER_STEP:
        return [tokens]
    _, sizes = torch.unique_consecutive(tokens.offsets[:-1] // _ENCODER_STEP, return_counts=True)
    ends = sizes.cumsum(0)
    return [tokens.select(slice(start, end)) for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]
