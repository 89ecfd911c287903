"""The scGPT network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attend, attend_first, attend_with_self
from ...nn.low_rank import effective_weight
from .config import MAX_VALUE
from .heads import AffineDecoder, Discriminator, ExpressionDecoder, MVCDecoder, mlp_head
from .modality import TABLE, UNKNOWN

if TYPE_CHECKING:
    from .config import SCGPTConfig
    from .heads import Decoded

_BATCH_NORM_EPS = 6.1e-5


class NormedEmbedding(nn.Module):
    """An embedding table followed by LayerNorm."""

    def __init__(self, rows: int, dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Embedding of ``ids``, ``(*ids.shape, dim)``."""
        return self.norm(self.embedding(ids))

    def table(self) -> Tensor:
        """All rows after LayerNorm, ``(rows, dim)``."""
        return self.norm(self.embedding.weight)


class ContinuousValues(nn.Module):
    """MLP on the bin number."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """Embedding of ``values``, ``(*values.shape, dim)``."""
        values = values.unsqueeze(-1).to(self.linear1.weight.dtype).clamp(max=MAX_VALUE)
        return self.dropout(self.norm(self.linear2(F.relu(self.linear1(values)))))


class EncoderLayer(nn.Module):
    """Transformer layer: post-norm, or scGPT's own pre-norm in which the residual is the normalised tensor."""

    def __init__(self, config: SCGPTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.n_heads
        self.pre_norm = config.pre_norm
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``(cells, heads, length, dim / heads)``."""
        cells, length, dim = x.shape
        packed = self.qkv(x).view(cells, length, 3, self.heads, dim // self.heads)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def attention_dropout(self) -> float:
        """Dropout on attention weights, 0 in inference."""
        return self.dropout.p if self.training else 0.0

    def feed_forward(self, x: Tensor) -> Tensor:
        """The two linear layers after attention."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention, for a post-norm layer; ``attended`` is overwritten without gradients."""
        # under autocast the stream is wider than what is added to it
        if not (self.training or torch.is_grad_enabled()) and attended.dtype == x.dtype:
            x = self.norm1(attended.add_(x))
            return self.norm2(self.linear2(F.relu_(self.linear1(x))).add_(x))
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def forward(self, x: Tensor, padding: Tensor | None = None, *, zero_padded: bool = False) -> Tensor:
        """Apply the layer to ``x`` of shape ``(cells, length, dim)``.

        ``zero_padded`` sets the attention output of padded queries to zero, as flash kernels do; such rows are never
        read, except by average pooling over padded positions.
        """
        if self.pre_norm:
            x = self.norm1(x)
        attended = attend(*self.project(x), padding, self.attention_dropout).transpose(1, 2).reshape(x.shape)
        if zero_padded and padding is not None:
            attended = attended.masked_fill(padding.unsqueeze(-1), 0.0)
        attended = self.out(attended)
        if self.pre_norm:
            x = self.norm2(x + self.dropout(attended))
            return x + self.dropout(self.feed_forward(x))
        return self.finish(x, attended)

    def first(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Output of position 0 only, ``(cells, dim)``; for inference."""
        if self.pre_norm:
            x = self.norm1(x)
        attended = self.out(attend_first(x, effective_weight(self.qkv), self.qkv.bias, self.heads, padding))
        if self.pre_norm:
            x = self.norm2(x[:, 0] + attended)
            return x + self.feed_forward(x)
        return self.finish(x[:, 0], attended)

    def with_queries(self, x: Tensor, queries: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer on both streams of generative training.

        Known positions attend to known positions; a query attends to known positions and itself. The query stream
        skips the output projection, as in the network that was trained.
        """
        q, k, v = self.project(x)
        q_query, k_query, v_query = self.project(queries)
        known = self.out(attend(q, k, v, padding, self.attention_dropout).transpose(1, 2).reshape(x.shape))
        asked = attend_with_self(q_query, k, v, k_query, v_query, padding).transpose(1, 2).reshape(queries.shape)
        return self.finish(x, known), self.finish(queries, asked)


class SCGPT(nn.Module):
    """scGPT: a transformer over the set of expressed genes of a cell.

    Parameters
    ----------
    config
        Hyper-parameters.
    n_tokens
        Entries of the vocabulary, special tokens included.
    pad_id
        Id of ``<pad>``, whose embedding gets no gradient.
    """

    def __init__(self, config: SCGPTConfig, n_tokens: int, pad_id: int) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.genes = NormedEmbedding(n_tokens, dim, padding_idx=pad_id)
        nn.init.uniform_(self.genes.embedding.weight, -0.1, 0.1)
        self.values: nn.Module | None = None
        if config.value_style == "continuous":
            self.values = ContinuousValues(dim, config.dropout)
        elif config.value_style == "category":
            self.values = NormedEmbedding(config.n_value_bins, dim, padding_idx=int(config.pad_value))
        self.query_flag = nn.Embedding(2, dim) if config.query_flag else None
        self.batch_norm = self.domain_norms = None
        if config.input_norm == "batchnorm":
            self.batch_norm = nn.BatchNorm1d(dim, eps=_BATCH_NORM_EPS)
        elif config.input_norm != "none":
            affine = config.input_norm == "dsbn-affine"
            norms = [nn.BatchNorm1d(dim, eps=_BATCH_NORM_EPS, affine=affine) for _ in range(config.n_batches)]
            self.domain_norms = nn.ModuleList(norms)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        context = 2 * dim if config.use_batch_labels or config.modalities else dim
        self.batches = NormedEmbedding(config.n_batches, dim) if config.use_batch_labels else None
        self.modalities = None
        if config.modalities:
            pad = config.modalities.index(config.pad_token)
            self.modalities = NormedEmbedding(len(config.modalities), dim, padding_idx=pad)
            self.register_buffer(TABLE, torch.full((n_tokens,), UNKNOWN))
        self.flags = None
        if config.perturbation_flags:
            self.flags = nn.Embedding(config.perturbation_flags, dim, padding_idx=config.frozen_flag)
        self.decoder: nn.Module = ExpressionDecoder(context, dim, explicit_zeros=config.explicit_zeros)
        if config.affine_decoder:
            self.decoder = AffineDecoder(dim, config.decoder_activation, adaptive=config.adaptive_shift)
        self.mvc = None
        if config.mvc is not None:
            query = context if config.multiomic else dim
            self.mvc = MVCDecoder(query, context, config.mvc, explicit_zeros=config.explicit_zeros)
        self.classifier = None
        if config.n_classes:
            self.classifier = mlp_head(dim, config.n_classes, config.n_class_layers, nn.ReLU())
        self.discriminator = Discriminator(dim, config.n_batches) if config.discriminator else None
        self._folded: tuple[Tensor, Tensor | None] | None = None
        self._folded_from: object = None

    # -- tables that inference looks up ----------------------------------------------------------------------------

    def fold(self) -> tuple[Tensor, Tensor | None]:
        """LayerNormed gene table, and value embeddings of ``pad_value`` to ``n_bins - 1`` (or ``None``)."""
        sources = [*self.genes.parameters(), *(self.values.parameters() if self.values is not None else ())]
        state = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in sources]
        if self._folded is None or self._folded_from != state:
            table = None
            if self.config.value_style == "continuous" and float(self.config.pad_value).is_integer():
                bins = torch.arange(self._lowest_value, self.config.n_bins, device=sources[0].device)
                table = self.values(bins)
            self._folded, self._folded_from = (self.genes.table(), table), state
        return self._folded

    @property
    def _lowest_value(self) -> int:
        return int(min(self.config.pad_value, self.config.mask_value, 0))

    @property
    def _can_fold(self) -> bool:
        return not self.training and not torch.is_grad_enabled()

    def embed_genes(self, ids: Tensor) -> Tensor:
        """Gene embedding after LayerNorm, ``(*ids.shape, dim)``."""
        if self._can_fold:
            return F.embedding(ids, self.fold()[0])
        return self.genes(ids)

    def embed_values(self, values: Tensor) -> Tensor:
        """Embedding of the value channel (for ``"scaling"``: the values themselves as a column)."""
        if self.config.value_style == "scaling":
            return values.unsqueeze(-1).to(self.genes.embedding.weight.dtype)
        if self.config.value_style == "category":
            return self.values(values.long())
        if self._can_fold and (table := self.fold()[1]) is not None:
            rows = values.long()
            whole = (values == rows).all() & (rows >= self._lowest_value).all() & (rows < self.config.n_bins).all()
            if bool(whole):
                return F.embedding(rows - self._lowest_value, table)
        return self.values(values)

    # -- forward in pieces -------------------------------------------------------------------------------------------

    def combine(self, genes: Tensor, values: Tensor | None, domains: Tensor | None) -> Tensor:
        """Input of the first layer from gene embeddings and the value channel."""
        x = genes
        if values is not None:
            embedded = self.embed_values(values)
            x = genes * embedded if self.config.value_style == "scaling" else genes + embedded
        return self.normalize_input(x, domains)

    def normalize_input(self, x: Tensor, domains: Tensor | None) -> Tensor:
        """Batch normalisation of the summed embedding, with the statistics of each cell's own domain."""
        if self.batch_norm is not None:
            return self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        if self.domain_norms is None:
            return x
        if domains is None:
            msg = "this model normalises per batch: pass batch_labels (and domain_labels, if they differ)"
            raise ValueError(msg)
        if not self.training:
            return self._running_domain_norm(x, domains)
        out = torch.empty_like(x)
        for domain in torch.unique(domains).tolist():
            rows = domains == domain
            out[rows] = self.domain_norms[domain](x[rows].transpose(1, 2)).transpose(1, 2)
        return out

    def _running_domain_norm(self, x: Tensor, domains: Tensor) -> Tensor:
        mean = torch.stack([norm.running_mean for norm in self.domain_norms])[domains]
        var = torch.stack([norm.running_var for norm in self.domain_norms])[domains]
        scale = torch.rsqrt(var + _BATCH_NORM_EPS)
        if self.config.input_norm == "dsbn-affine":
            scale = scale * torch.stack([norm.weight for norm in self.domain_norms])[domains]
            shift = torch.stack([norm.bias for norm in self.domain_norms])[domains]
            return (x - mean[:, None]) * scale[:, None] + shift[:, None]
        return (x - mean[:, None]) * scale[:, None]

    def encode(self, x: Tensor, padding: Tensor | None, *, zero_padded: bool = False) -> Tensor:
        """Run all layers, ``(cells, length, dim)``."""
        for layer in self.layers:
            x = layer(x, padding, zero_padded=zero_padded)
        return x

    def encode_first(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Output of position 0 after all layers, ``(cells, dim)``; the last layer runs for that row only."""
        for layer in self.layers[:-1]:
            x = layer(x, padding)
        return self.layers[-1].first(x, padding)

    def encode_with_queries(self, x: Tensor, queries: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run all layers on the known and the query stream."""
        for layer in self.layers:
            x, queries = layer.with_queries(x, queries, padding)
        return x, queries

    def context(self, batch_labels: Tensor | None, modalities: Tensor | None) -> Tensor | None:
        """What the decoders see beside states: embeddings of batch ``(cells,)`` and modality ``(cells, length)``.

        Returns
        -------
        ``(cells, length, dim)``, or 1 instead of ``length`` without modalities; ``None`` for models without either.
        """
        if self.batches is None and self.modalities is None:
            return None
        parts = []
        if self.batches is not None:
            if batch_labels is None:
                msg = "this model was trained with batch labels: pass batch_labels"
                raise ValueError(msg)
            parts.append(self.batches(batch_labels)[:, None])
        if self.modalities is not None:
            parts.append(self.modalities(modalities))
        return sum(parts)

    def with_context(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Append the context to cell ``(cells, dim)`` or token ``(cells, length, dim)`` vectors.

        Cells get that of the first token, which is ``<cls>``.
        """
        if context is None:
            return x
        if x.ndim == 2:
            return torch.cat([x, context[:, 0]], -1)
        shape = torch.broadcast_shapes(x.shape[:2], context.shape[:2])
        return torch.cat([x.expand(*shape, -1), context.expand(*shape, -1)], -1)

    def decode_from_cells(
        self, cells: Tensor, genes: Tensor, context: Tensor | None, gene_context: Tensor | None = None
    ) -> Decoded | None:
        """Values of genes from cell embeddings; ``None`` without such a decoder.

        Parameters
        ----------
        cells
            Cell embeddings that are not normalised, ``(cells, dim)``.
        genes
            Gene embeddings ``(cells, length, dim)``, or 1 instead of ``cells`` for the same genes in all of them.
        context
            What :meth:`context` gives for the tokens of the cells.
        gene_context
            The same for ``genes`` where these are others; only multi-omic networks use it.
        """
        if self.mvc is None:
            return None
        if self.config.multiomic:
            genes = self.with_context(genes, context if gene_context is None else gene_context)
        return self.mvc(self.with_context(cells, context), genes)
