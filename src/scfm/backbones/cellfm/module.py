"""The CellFM network: a stack of gated retention over the expressed genes of a cell and a CLS token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .heads import ClassScores, CrossRetentionHead, MLPHead
from .layers import CellDecoder, GeneDecoder, RetentionLayer, ValueEncoder

if TYPE_CHECKING:
    from .._tokens import TokenBatch
    from .config import CellFMConfig

Prefix = Literal["cls", "depths", "none"]

# tokens that pass through the encoder together
_CPU_RUN = 4096
_ACCELERATOR_RUN = 1 << 16


@dataclass(frozen=True)
class Sequences:
    """What the encoder gets: all cells in one row, in each the prefix and then the genes.

    Parameters
    ----------
    x
        Input vectors, ``(rows, dim)``.
    lengths
        Rows of each cell.
    first
        First row of each cell, that of CLS where there is one, ``(cells,)``.
    genes
        Rows of the gene tokens in the order of the token batch, ``(tokens,)``.
    early
        Weight of each row as a key in the first half of the layers; ``None`` for 1 everywhere.
    late
        The same for the second half.
    """

    x: Tensor
    lengths: list[int]
    first: Tensor
    genes: Tensor
    early: Tensor | None = None
    late: Tensor | None = None


class CellFM(nn.Module):
    """CellFM (Zeng et al., Nature Communications 2025).

    Parameters
    ----------
    config
        Hyper-parameters.
    """

    def __init__(self, config: CellFMConfig) -> None:
        super().__init__()
        self.config = config
        dim, slope = config.dim, config.leaky_slope
        self.gene_embedding = nn.Embedding(config.n_rows, dim)
        self.cls_token = _vector(dim) if config.has_cls else None
        self.zero_embedding = nn.Parameter(torch.zeros(1, 1, dim)) if config.has_zero_embedding else None
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.value_encoder = ValueEncoder(dim, config.n_bins, slope)
        self.depth_tokens, self.depth_encoder = None, None
        if config.has_depth_tokens:
            self.depth_tokens = _vector(dim, 2)
            self.depth_encoder = ValueEncoder(dim, config.n_bins, slope)
        self.layers = nn.ModuleList(
            RetentionLayer(
                dim, config.n_heads, config.alpha, config.dropout * i / config.n_layers, config.lora_rank, config.ln_eps
            )
            for i in range(config.n_layers)
        )
        zero_head = config.has_zero_heads
        self.gene_decoder = GeneDecoder(dim, slope, zero_head=zero_head) if config.has_gene_decoder else None
        self.cell_decoder = CellDecoder(dim, zero_head=zero_head) if config.has_cell_decoder else None
        self.head = _head(config)
        nn.init.xavier_normal_(self.gene_embedding.weight, 0.5)
        with torch.no_grad():
            self.gene_embedding.weight[0] = 0
        for layer in self.layers:
            gain = (8 * config.n_layers) ** -0.25
            layer.attention.init_weights(gain)
            layer.ffn.init_weights(gain)

    # -- input -------------------------------------------------------------------------------------------------------

    def sequences(
        self,
        tokens: TokenBatch,
        prefix: Prefix = "cls",
        *,
        hidden: Tensor | None = None,
        unexpressed: Tensor | None = None,
        depths: Tensor | None = None,
        padded_length: int | None = None,
    ) -> Sequences:
        """Input of the encoder for any of upstream's forward passes, without padding.

        Parameters
        ----------
        tokens
            Genes and their values.
        prefix
            What stands in front of the genes: ``"cls"``, ``"depths"`` for CLS and the read-depth tokens S and T, or
            ``"none"``.
        hidden
            True at genes whose value is not to be seen; the first half of the layers does not see them as keys at all.
            Shape ``(tokens,)``.
        unexpressed
            True at sampled genes without expression, which have an embedding of their own unless they are hidden, shape
            ``(tokens,)``.
        depths
            ``log1p`` of S and T in thousands, shape ``(cells, 2)``.
        padded_length
            Length to which upstream's root class pads. That class lets padding act as keys in the first half of the
            layers if values are given without a mask; one more row per cell, with the weight of all its padding, gives
            the same numbers.
        """
        x = self.embed_genes(tokens, hidden, unexpressed)
        fronts = self._prefix(len(tokens), prefix, depths)
        n_front, n_back = fronts.shape[1], int(padded_length is not None)
        n_rows = tokens.lengths + n_front + n_back
        first = n_rows.cumsum(0) - n_rows
        genes = torch.arange(len(x), device=x.device) + tokens.flat_cells * (n_front + n_back) + n_front
        out = x.new_zeros(len(x) + len(tokens) * (n_front + n_back), x.shape[1]).index_copy(0, genes, x)
        if n_front:
            rows = (first[:, None] + torch.arange(n_front, device=x.device)).flatten()
            out = out.index_copy(0, rows, fronts.flatten(0, 1))
        early = late = None
        if hidden is not None or n_back:
            early = torch.ones(len(out), device=x.device)
        if hidden is not None:
            early[genes[hidden]] = 0
        if n_back:
            late = torch.ones_like(early)
            last = first + n_rows - 1
            early[last] = (padded_length - tokens.lengths).clamp_min(0).to(early.dtype)
            late[last] = 0
        return Sequences(out, n_rows.tolist(), first, genes, early, late)

    def embed_genes(
        self, tokens: TokenBatch, hidden: Tensor | None = None, unexpressed: Tensor | None = None
    ) -> Tensor:
        """Sum of the embeddings of gene and value, ``(tokens, dim)``."""
        values = self.value_encoder(tokens.flat_values)
        if unexpressed is not None:
            values = torch.where(unexpressed[:, None], self.zero_embedding[0].to(values.dtype), values)
        if hidden is not None:
            values = torch.where(hidden[:, None], self.mask_embedding[0].to(values.dtype), values)
        return self.gene_embedding(tokens.flat_ids) + values

    def _prefix(self, n_cells: int, prefix: Prefix, depths: Tensor | None) -> Tensor:
        """Vectors in front of the genes, ``(cells, tokens, dim)``."""
        if prefix == "none":
            return self.gene_embedding.weight.new_empty(n_cells, 0, self.config.dim)
        fronts = self.cls_token.expand(n_cells, -1, -1)
        if prefix == "depths":
            tokens = self.depth_tokens.expand(n_cells, -1, -1)
            if depths is not None and (self.training or self.config.compat != "torch-port"):
                tokens = tokens + self.depth_encoder(depths)
            fronts = torch.cat([fronts, tokens], 1)
        return fronts

    # -- encoder -----------------------------------------------------------------------------------------------------

    def encode(self, sequences: Sequences, *, first_only: bool = False, n_layers: int | None = None) -> Tensor:
        """States after the last layer.

        Parameters
        ----------
        sequences
            Input, overwritten when no gradients are wanted.
        first_only
            Give only the first row of each cell, ``(cells, dim)``, which saves three quarters of the last layer.
        n_layers
            How many layers to apply; all by default.

        Returns
        -------
        Shape ``(rows, dim)``.
        """
        x, lengths = sequences.x, sequences.lengths
        half = len(self.layers) // 2
        layers = self.layers[:n_layers]
        for i, layer in enumerate(layers):
            weights = sequences.early if i < half else sequences.late
            last = first_only and i == len(layers) - 1
            x = layer(x, lengths, weights, sequences.first if last else None)
        return x

    # -- output ------------------------------------------------------------------------------------------------------

    def predict_genes(self, states: Tensor) -> Tensor:
        """Expression (``log1p`` of counts per 10,000) from states of gene tokens."""
        return self.gene_decoder(states)

    def predict_from_cells(self, cells: Tensor, ids: Tensor) -> Tensor:
        """Expression of the genes ``ids`` in all cells from CLS states ``(cells, dim)``, ``(cells, genes)``."""
        return cells @ self.cell_decoder.queries(self.gene_embedding(ids)).T

    def classify(self, tokens: TokenBatch) -> ClassScores:
        """Logits of the classes of a fine-tuned model."""
        if isinstance(self.head, MLPHead):
            sequences = self._sequences_of_the_port(tokens)
            return ClassScores(self.head(self.encode(sequences, first_only=True)))
        sequences = self.sequences(tokens)
        states = self.encode(sequences)
        return self.head(states[sequences.first], states[sequences.genes], tokens.lengths.tolist())

    def _sequences_of_the_port(self, tokens: TokenBatch) -> Sequences:
        """The port's classifier sees the read-depth tokens of the pre-training, here of whole cells."""
        if not self.config.has_depth_tokens:
            return self.sequences(tokens)
        total = tokens.per_cell.get("total")
        depths = None
        if total is not None and "panel" not in tokens.per_cell:
            depths = torch.log1p(total.double() / 1000).float().to(self.depth_tokens.device)[:, None].expand(-1, 2)
        return self.sequences(tokens, "depths", depths=depths)


def _vector(dim: int, n: int = 1) -> nn.Parameter:
    # the fans of MindSpore for a tensor of three axes
    return nn.Parameter(torch.randn(1, n, dim) * 0.5 * (2 / (n * dim + dim)) ** 0.5)


def _head(config: CellFMConfig) -> nn.Module | None:
    if config.class_head == "retention":
        return CrossRetentionHead(
            config.dim, config.n_heads, config.n_classes, config.n_head_layers, config.dropout, config.ln_eps
        )
    return MLPHead(config.dim, config.n_classes) if config.class_head == "mlp" else None


def runs(tokens: TokenBatch) -> list[TokenBatch]:
    """Cut a batch into runs of cells that are small enough to pass through the network together."""
    limit = _CPU_RUN if tokens.device.type == "cpu" else _ACCELERATOR_RUN
    if len(tokens.flat_ids) + len(tokens) <= limit:
        return [tokens]
    starts = tokens.offsets[:-1] + torch.arange(len(tokens), device=tokens.device)
    _, sizes = torch.unique_consecutive(starts // limit, return_counts=True)
    ends = sizes.cumsum(0)
    return [tokens.select(slice(start, end)) for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]
