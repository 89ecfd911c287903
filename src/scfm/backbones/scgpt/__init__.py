"""scGPT (Cui et al., Nature Methods 2024) behind the contract of all backbones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..._errors import UnsupportedError
from ...genes import GeneMatch
from .._base import Backbone, Checkpoint, GeneRows
from .._keywords import keyword_options
from .._tokens import TokenBatch
from . import checkpoint, generation, modality, tokenizer
from .attention import SCGPTAttention
from .config import PRESETS, SCGPTConfig
from .heads import Decoded, MVCDecoder, elastic_cell_similarity
from .module import SCGPT
from .tasks import SCGPTTasks
from .tokenizer import TieBreak, TokenDraws

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import GeneVocab

# cells whose genes are decoded from their embedding at once
_CELLS_PER_STEP = 8
# upstream asks for an iteration above 1000, counted from 0
_CELL_PROMPT_FROM = 1001

__all__ = ["PRESETS", "SCGPT", "MVCDecoder", "SCGPTBackbone", "SCGPTConfig", "SCGPTOutput", "TokenDraws"]


@dataclass(frozen=True)
class SCGPTOutput:
    """Everything one forward pass of scGPT gives; what the model has no head for is ``None``.

    Parameters
    ----------
    hidden
        Token states after the last layer, ``(cells, length, dim)``.
    genes
        Gene embeddings of the tokens before the first layer, ``(cells, length, dim)``.
    cells
        Cell embeddings, not normalised, ``(cells, dim)``.
    expression
        Value (and P(non-zero)) of each gene from its token.
    cell_expression
        Value (and P(non-zero)) of each gene from the cell embedding.
    class_logits
        Logits of the cell-type head, ``(cells, classes)``.
    batch_logits
        Logits of the adversarial batch classifier, ``(cells, batches)``.
    similarity_loss
        Elastic cell similarity loss over the cells of the batch.
    """

    hidden: Tensor
    genes: Tensor
    cells: Tensor
    expression: Decoded
    cell_expression: Decoded | None
    class_logits: Tensor | None
    batch_logits: Tensor | None
    similarity_loss: Tensor


class SCGPTBackbone(SCGPTTasks, SCGPTAttention, Backbone):
    """scGPT for inference; built by :func:`scfm.load`.

    A cell is the set of its expressed genes: gene symbol plus the quantile bin of its value among the cell's own
    expressed genes, after a ``<cls>`` token. Raw counts and log-normalised values are both accepted, because only the
    order of values inside a cell matters.
    """

    kind: ClassVar[str] = "scgpt"
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {
            "embeds",
            "gene_embeddings",
            "gene_states",
            "reconstructs",
            "attends",
            "cell_attends",
            "generates",
            "pretrains",
            "multiomics",
            "perturbs",
        }
    )
    poolings: ClassVar[tuple[str, ...]] = ("cls", "avg-pool", "w-pool")
    specials: ClassVar[tuple[str, ...]] = checkpoint.SPECIALS
    expression_scale: ClassVar[str] = "bin of the value among the expressed genes of the cell"
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (r"layers\.\d+\.(qkv|out)",),
        "ffn": (r"layers\.\d+\.linear[12]",),
    }
    embedding_modules: ClassVar[tuple[str, ...]] = ("genes", "values", "batches", "modalities", "query_flag")
    constants: ClassVar[tuple[str, ...]] = (modality.TABLE,)
    vocab_tables: ClassVar[tuple[str, ...]] = ("genes.embedding.weight", modality.TABLE)
    class_heads: ClassVar[tuple[str, ...]] = ("cls",)
    network_attention: ClassVar[Mapping[str, Any]] = {"rank": True}
    head_modules: ClassVar[tuple[str, ...]] = ("classifier", "discriminator", "flags")
    integrates: ClassVar[bool] = True
    batch_modules: ClassVar[tuple[str, ...]] = ("batches", "domain_norms", "discriminator")
    module: SCGPT
    config: SCGPTConfig

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether ``path`` holds ``best_model.pt`` and ``vocab.json``, or is a file with the weights of scGPT."""
        return checkpoint.recognizes(path)

    @classmethod
    def read_official(cls, directory: Path, **options: Any) -> Checkpoint:
        """Read an official folder; options are those of ``scfm.backbones.scgpt.checkpoint.read``."""
        return checkpoint.read(directory, **options)

    @classmethod
    def read_vocab(cls, directory: Path, **options: Any) -> GeneVocab:
        """Read the genes of an official folder without its weights."""
        return checkpoint.read_vocab(options.get("vocab") or directory / checkpoint.VOCAB)

    @classmethod
    def config_from_dict(cls, values: dict[str, Any]) -> SCGPTConfig:
        """Rebuild the config from JSON values."""
        return SCGPTConfig(**values)

    def config_to_dict(self) -> dict[str, Any]:
        """Config as JSON-writable values."""
        return super().config_to_dict() | {"modalities": list(self.config.modalities)}

    @classmethod
    def build(cls, config: SCGPTConfig, vocab: GeneVocab) -> SCGPT:
        """Make the network with fresh weights."""
        return SCGPT(config, len(vocab), vocab[config.pad_token])

    def set_modalities(self, features: Mapping[str, Sequence[str]]) -> None:
        """Say which vocabulary entries belong to which modality of a multi-omic network.

        Parameters
        ----------
        features
            Names of the entries of each modality in ``config.modalities``; entries that are not named have none then.

        Raises
        ------
        ValueError
            If the network has no modalities, or a modality or a name is unknown or occurs twice.
        """
        if self.module.modalities is None:
            msg = f"{self.name} has no modalities; make a multi-omic network with scfm.backbones.rebuilt"
            raise ValueError(msg)
        getattr(self.module, modality.TABLE).copy_(modality.modality_table(self.config, self.vocab, features))

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.vocab[self.config.pad_token]

    @property
    def cls_id(self) -> int:
        """Id of the cell token."""
        return self.vocab[self.config.cls_token]

    def embedding_dim(self, pooling: str | None = None, **options: Any) -> int:
        """Width of the cell embedding (the same for each pooling)."""
        self.check_pooling(pooling)
        return self.config.dim

    def expected_values(self, options: Mapping[str, Any]) -> Literal["any"]:
        """Bins depend on the order of the values in a cell only, so that normalised values serve, too."""
        return "any"

    # -- tokens ------------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        *,
        max_length: int | None = None,
        n_bins: int | None | Literal["config"] = "config",
        tie_break: TieBreak = "random",
        truncate: Literal["sample", "first"] = "sample",
        include_zeros: bool = False,
        append_cls: bool = True,
        cls_value: float | None = None,
        batch_labels: np.ndarray | None = None,
        duplicates: Literal["sum", "keep", "error"] = "sum",
        rng: int = 0,
        draws: TokenDraws | None = None,
    ) -> TokenBatch:
        """Turn counts (or other non-negative values) of known genes into tokens.

        In a multi-omic model the values of each modality are binned by themselves.

        Parameters
        ----------
        counts
            Sparse matrix ``(cells, genes)``.
        genes
            Names of the columns, a :class:`scfm.genes.GeneMatch`, or vocabulary ids (columns with -1 are left out).
        max_length
            Tokens per cell, ``<cls>`` included; by default that of the model (1200 for released ones).
        n_bins
            Number of value bins; ``None`` when the matrix holds bins already.
        tie_break
            A value that equals several quantile edges (a count of 1, usually) goes to a random one of their bins, as
            upstream does in its main branch (``"random"``), or to the highest (``"left"``, as in pre-training).
        truncate
            Cells with more genes than fit keep a random subset (``"sample"``) or the first columns (``"first"``).
        include_zeros
            Make tokens of unexpressed genes too, as fine-tuning does on a few thousand genes; in a multi-omic model
            only those of modalities of which the cell has any value.
        append_cls, cls_value
            Whether to put ``<cls>`` first, and the number in its value channel: by default the pad value (-2) as in
            embedding and pre-training; fine-tuning uses 0.
        batch_labels
            Batch of each cell, for models with batch embedding or per-batch normalisation.
        duplicates
            Columns of one gene are summed, kept as separate tokens (as upstream does) or refused.
        rng
            Seed. Random numbers depend on the seed, the cell's content and the gene, never on other cells.
        draws
            Random numbers to use instead.

        Raises
        ------
        ValueError
            For negative or missing values, or ``draws`` of another size.
        """
        if tie_break not in ("random", "left"):
            msg = f"tie_break must be 'random' or 'left'; got {tie_break!r}"
            raise ValueError(msg)
        if truncate not in ("sample", "first"):
            msg = f"truncate must be 'sample' or 'first'; got {truncate!r}"
            raise ValueError(msg)
        max_length = self.config.max_length if max_length is None else int(max_length)
        if max_length < 2:
            msg = f"max_length must be at least 2 (one gene beside <cls>); got {max_length}"
            raise ValueError(msg)
        counts, ids = self._known(counts, genes, duplicates)
        tokens = tokenizer.tokenize(
            counts,
            ids,
            self.config,
            pad_id=self.pad_id,
            cls_id=self.cls_id if append_cls else None,
            n_bins=self.config.n_bins if n_bins == "config" else n_bins,
            max_length=max_length,
            cls_value=self.config.pad_value if cls_value is None else cls_value,
            include_zeros=include_zeros,
            tie_break=tie_break,
            truncate=truncate,
            seed=int(rng),
            draws=draws,
            groups=None if self.module.modalities is None else self._modalities_of(torch.from_numpy(ids)).numpy(),
        )
        return replace(tokens, per_cell=self._labels(len(tokens), batch_labels, None))

    def tokenize_for_training(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, generator: torch.Generator
    ) -> TokenBatch:
        """All expressed genes with one-sided bins; the objective divides and subsamples them."""
        return self.tokenize(counts, genes, tie_break="left", max_length=len(self.vocab) + 1)

    def _known(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, duplicates: str
    ) -> tuple[csr_matrix, np.ndarray]:
        from scipy.sparse import csr_matrix

        counts = csr_matrix(counts)
        if not isinstance(genes, GeneMatch) and np.asarray(genes).dtype.kind in "iu":
            ids = np.asarray(genes, dtype=np.int64)
            if len(ids) != counts.shape[1]:
                msg = f"the matrix has {counts.shape[1]} columns but genes has {len(ids)} entries"
                raise ValueError(msg)
            known = ids >= 0
            return (counts, ids) if known.all() else (csr_matrix(counts[:, known]), ids[known])
        match = genes if isinstance(genes, GeneMatch) else self.vocab.match(genes)
        return match.collapse(counts, duplicates=duplicates)

    def batch(
        self,
        genes: Tensor | np.ndarray,
        values: Tensor | np.ndarray,
        *,
        padding: Tensor | np.ndarray | None = None,
        batch_labels: Tensor | np.ndarray | None = None,
        domain_labels: Tensor | np.ndarray | None = None,
        modalities: Tensor | np.ndarray | None = None,
        query_genes: Tensor | np.ndarray | None = None,
        query_values: Tensor | np.ndarray | None = None,
        query_padding: Tensor | np.ndarray | None = None,
    ) -> TokenBatch:
        """Build a token batch from padded arrays.

        Parameters
        ----------
        genes, values
            Vocabulary ids and value channel, ``(cells, length)``; usually ``<cls>`` comes first.
        padding
            True at positions to leave out; by default where the id is that of ``<pad>``.
        batch_labels
            Batch of each cell, ``(cells,)``.
        domain_labels
            Batch whose normalisation statistics are used, if not that of the cell itself (upstream uses that of the
            first cell of a mini-batch for all of them).
        modalities
            Modality of each token as an index into ``config.modalities``, ``(cells, length)``; by default that of its
            vocabulary entry, see :meth:`set_modalities`.
        query_genes, query_padding
            Genes to generate, ``(cells, queries)``.
        query_values
            Their true bins, for training.
        """
        tokens = TokenBatch.from_padded(
            torch.as_tensor(genes),
            torch.as_tensor(values),
            pad_id=self.pad_id,
            pad_value=self.config.pad_value,
            padding=None if padding is None else torch.as_tensor(padding),
            per_token=self._checked_modalities(genes, modalities),
        )
        queries = None
        if query_genes is not None:
            query_genes = torch.as_tensor(query_genes)
            queries = TokenBatch.from_padded(
                query_genes,
                torch.full(query_genes.shape, torch.nan) if query_values is None else torch.as_tensor(query_values),
                pad_id=self.pad_id,
                pad_value=self.config.pad_value,
                padding=None if query_padding is None else torch.as_tensor(query_padding),
            )
        return replace(tokens, per_cell=self._labels(len(tokens), batch_labels, domain_labels), queries=queries)

    def _labels(self, n_cells: int, batch_labels: Any, domain_labels: Any) -> dict[str, Tensor]:
        out = {}
        for name, labels in (("batch", batch_labels), ("domain", domain_labels)):
            if labels is None:
                continue
            labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
            if labels.shape != (n_cells,):
                msg = f"{name}_labels must have one entry for each of {n_cells} cells; got shape {tuple(labels.shape)}"
                raise ValueError(msg)
            if not self.config.n_batches:
                msg = f"{name}_labels were given, but this model has no batch labels"
                raise ValueError(msg)
            if n_cells and (labels.min() < 0 or labels.max() >= self.config.n_batches):
                msg = f"{name}_labels must lie between 0 and {self.config.n_batches - 1}"
                raise ValueError(msg)
            out[name] = labels
        return out

    # -- modalities --------------------------------------------------------------------------------------------------

    def _checked_modalities(self, genes: Any, modalities: Any) -> dict[str, Tensor]:
        if modalities is None:
            return {}
        modalities, n = torch.as_tensor(modalities, dtype=torch.int64), len(self.config.modalities)
        if not n:
            msg = "modalities were given, but this model has none"
            raise ValueError(msg)
        if modalities.shape != genes.shape or (len(modalities) and (modalities.min() < 0 or modalities.max() >= n)):
            msg = f"modalities must be numbers from 0 to {n - 1}, one for each position of genes {tuple(genes.shape)}"
            raise ValueError(msg)
        return {"modality": modalities}

    def _modalities_of(self, ids: Tensor) -> Tensor:
        """Modality of vocabulary entries."""
        table = getattr(self.module, modality.TABLE)
        found = table[ids.to(table.device)].to(ids.device)
        if bool((found < 0).any()):
            name = self.vocab.names[int(ids[found < 0][0])]
            msg = f"the modality of {name!r} and perhaps others is not known; give all with set_modalities"
            raise ValueError(msg)
        return found

    def _context(self, tokens: TokenBatch, *, queries: bool = False) -> Tensor | None:
        """Embeddings of batch and modality that the decoders see, for the tokens or for the queries."""
        part, modalities = tokens.queries if queries else tokens, None
        if self.module.modalities is not None:
            given = part.per_token.get("modality")
            pad = self.config.modalities.index(self.config.pad_token)
            modalities = self._modalities_of(part.ids) if given is None else part.padded(given, pad)
        return self.module.context(tokens.per_cell.get("batch"), modalities)

    # -- forward -----------------------------------------------------------------------------------------------------

    def _inputs(self, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gene embeddings, input of the first layer, and the padding mask (``None`` without padding)."""
        genes = self.module.embed_genes(tokens.ids)
        x = self.module.combine(genes, tokens.values, _domain(tokens))
        return genes, x, None if tokens.is_rectangular else tokens.padding

    def _pool(self, tokens: TokenBatch, hidden: Tensor, pooling: str, *, count_padding: bool = False) -> Tensor:
        if pooling == "cls":
            return hidden[:, 0]
        if pooling == "avg-pool":
            if count_padding:
                return hidden.mean(1)
            kept = hidden.masked_fill(tokens.padding.unsqueeze(-1), 0.0)
            return kept.sum(1) / tokens.lengths.unsqueeze(1).to(hidden.dtype)
        weights = tokens.values if count_padding else tokens.values.masked_fill(tokens.padding, 0.0)
        return F.normalize((hidden * weights.unsqueeze(-1).to(hidden.dtype)).sum(1), dim=1)

    def forward(
        self, tokens: TokenBatch, *, pooling: str = "cls", padded_rows: Literal["ignore", "native", "flash"] = "ignore"
    ) -> SCGPTOutput:
        """Run the network and every head it has, with gradients if they are enabled.

        Parameters
        ----------
        tokens
            Token batch.
        pooling
            How the cell embedding is made.
        padded_rows
            Averages leave padded positions out (``"ignore"``); the other two count them as upstream does with
            PyTorch's layers or with flash attention.
        """
        pooling = self.check_pooling(pooling)
        tokens = tokens.to(self.device)
        genes, x, padding = self._inputs(tokens)
        hidden = self.module.encode(x, padding, zero_padded=padded_rows == "flash")
        cells = self._pool(tokens, hidden, pooling, count_padding=padded_rows != "ignore")
        module, context = self.module, self._context(tokens)
        return SCGPTOutput(
            hidden=hidden,
            genes=genes,
            cells=cells,
            expression=module.decoder(module.with_context(hidden, context)),
            cell_expression=module.decode_from_cells(cells, genes, context),
            class_logits=None if module.classifier is None else module.classifier(cells),
            batch_logits=None if module.discriminator is None else module.discriminator(cells),
            similarity_loss=elastic_cell_similarity(cells, self.config.ecs_threshold),
        )

    def _embed(self, tokens: TokenBatch, pooling: str, *, normalize: bool = True) -> Tensor:
        """Cell embeddings, each of length 1 unless ``normalize=False``."""
        _, x, padding = self._inputs(tokens)
        if pooling == "cls":
            cells = self.module.encode_first(x, padding)
        else:
            cells = self._pool(tokens, self.module.encode(x, padding), pooling)
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
        return cells / cells.norm(dim=1, keepdim=True) if normalize else cells

    def _gene_embeddings(self) -> Tensor:
        return self.module.fold()[0]

    def _gene_states(self, tokens: TokenBatch) -> Tensor:
        """States of the tokens after the last layer, ``(cells, max_length, dim)``; zero at padded positions."""
        _, x, padding = self._inputs(tokens)
        hidden = self.module.encode(x, padding)
        return hidden if padding is None else hidden.masked_fill(padding.unsqueeze(-1), 0.0)

    def _iter_gene_states(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        _, x, padding = self._inputs(tokens)
        hidden = self.module.encode(x, padding)
        yield self._token_rows(tokens, hidden[~tokens.padding], genes)

    def _iter_reconstruction(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        """Expressed genes from the states of their tokens; others from the cell embedding, which knows all genes."""
        _, x, padding = self._inputs(tokens)
        module, context = self.module, self._context(tokens)
        hidden = module.encode(x, padding)
        if genes is None:
            values = module.decoder(module.with_context(hidden, context)).values
            yield self._token_rows(tokens, values[~tokens.padding], None)
            return
        if module.mvc is None:
            msg = (
                f"{self.name} has no decoder from the cell embedding, so it predicts expressed genes only (genes=None)"
            )
            raise UnsupportedError(msg)
        cells, labels = self._pool(tokens, hidden, self.default_pooling), tokens.per_cell.get("batch")
        vectors = module.embed_genes(genes[None])
        modalities = None if module.modalities is None else self._modalities_of(genes[None])
        for start in range(0, len(tokens), _CELLS_PER_STEP):
            some = slice(start, start + _CELLS_PER_STEP)
            of_cells = None if context is None else context[some]
            of_genes = module.context(None if labels is None else labels[some], modalities)
            values = module.decode_from_cells(cells[some], vectors, of_cells, of_genes).values
            numbers = torch.arange(start, start + len(values), device=self.device)
            yield GeneRows(numbers.repeat_interleave(len(genes)), genes.repeat(len(values)), values.flatten())

    @property
    def gene_state_dim(self) -> int:
        """Width of contextual gene embeddings."""
        return self.config.dim

    def _reconstruct(
        self,
        tokens: TokenBatch,
        *,
        decoder: Literal["genes", "cell"] = "genes",
        output: Literal["values", "nonzero", "sampled"] = "values",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predicted bins of the tokens, ``(cells, max_length)``, NaN at padded positions.

        Parameters
        ----------
        tokens
            Token batch; positions whose value is ``config.mask_value`` are predicted from the others. With
            ``queries`` the values of the query genes are generated instead (see :meth:`generate`).
        decoder
            From the state of each gene's own token, or from the cell embedding alone.
        output
            Values, P(non-zero) (models with explicit zeros), or values times a Bernoulli sample of it.
        generator
            Source of the Bernoulli samples.
        """
        if tokens.queries is not None:
            return self.generate(tokens)
        if decoder not in ("genes", "cell"):
            msg = f"decoder must be 'genes' or 'cell'; got {decoder!r}"
            raise ValueError(msg)
        out = self.forward(tokens)
        decoded = out.expression if decoder == "genes" else out.cell_expression
        if decoded is None:
            msg = "this checkpoint has no decoder from the cell embedding; use decoder='genes'"
            raise ValueError(msg)
        values = _choose(decoded, output, generator)
        return values if tokens.is_rectangular else values.masked_fill(tokens.padding, torch.nan)

    # -- generation --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, tokens: TokenBatch, **options: Any) -> Tensor:
        """Values of the query genes given the known ones; see :func:`scfm.backbones.scgpt.generation.generate`."""
        return generation.generate(self, tokens, **options)

    @torch.inference_mode()
    def decode_cells(self, cells: Tensor, tokens: TokenBatch, *, use_values: bool = False) -> Tensor:
        """Values of genes from given cell embeddings, in one pass where all tokens see each other.

        This is ``generate`` of upstream's main branch: the embedding takes the place of position 0.

        Parameters
        ----------
        cells
            Cell embeddings that are not normalised, ``(cells, dim)``.
        tokens
            Genes, with any token at position 0.
        use_values
            Whether the value channel of ``tokens`` is used or left out.
        """
        tokens = tokens.to(self.device)
        genes = self.module.embed_genes(tokens.ids)
        x = self.module.combine(genes, tokens.values if use_values else None, _domain(tokens)).clone()
        x[:, 0] = cells.to(x)
        hidden = self.module.encode(x, None if tokens.is_rectangular else tokens.padding)
        return self.module.decoder(self.module.with_context(hidden, self._context(tokens))).values

    def _pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .objective import pretraining_loss

        return pretraining_loss(self, tokens, generator, **options)

    @property
    def objective_schedule(self) -> dict[int, dict[str, Any]]:
        """Genes are generated from the cell embedding, too, when it has learnt something."""
        if not self.config.query_flag:
            return {}
        return {0: {"cell_prompt": False}, _CELL_PROMPT_FROM: {"cell_prompt": True}}

    @property
    def needs_batch_labels(self) -> bool:
        """Whether decoders or normalisations are made for the batch of a cell."""
        return self.config.use_batch_labels or self.config.input_norm.startswith("dsbn")

    def objective_options(self) -> set[str] | None:
        """Names of the options of :meth:`pretraining_loss`."""
        from .objective import pretraining_loss

        return keyword_options(pretraining_loss)


def _domain(tokens: TokenBatch) -> Tensor | None:
    return tokens.per_cell.get("domain", tokens.per_cell.get("batch"))


def _choose(decoded: Decoded, output: str, generator: torch.Generator | None) -> Tensor:
    if output == "values":
        return decoded.values
    if decoded.nonzero is None:
        msg = f"output={output!r} needs a model with explicit zeros; use output='values'"
        raise ValueError(msg)
    if output == "nonzero":
        return decoded.nonzero
    if output == "sampled":
        return decoded.values * torch.bernoulli(decoded.nonzero, generator=generator)
    msg = f"output must be 'values', 'nonzero' or 'sampled'; got {output!r}"
    raise ValueError(msg)
