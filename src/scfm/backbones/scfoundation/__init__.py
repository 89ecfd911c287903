"""scFoundation (Hao et al., Nature Methods 2024) behind the contract of all backbones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from ... import _logging
from ..._depth import DepthTarget
from ...genes import GeneMatch
from .._base import Backbone, Checkpoint, GeneRows
from .._fine_tuning import FineTuning, ZeroShot
from .._keywords import keyword_options
from .._tokens import TokenBatch
from . import checkpoint, tokenizer
from .attention import attention_map
from .config import PRESETS, SCFoundationConfig
from .module import SCFoundation, split_tokens
from .pooling import POOLINGS, pool
from .tokenizer import InputMode, InputType

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import GeneVocab
    from ...nn.linear_attention import KeyMax
    from .._base import Genes

__all__ = ["PRESETS", "SCFoundation", "SCFoundationBackbone", "SCFoundationConfig"]


class SCFoundationBackbone(Backbone):
    """scFoundation for inference; built by :func:`scfm.load`.

    A cell is the set of its expressed genes with log-normalised values, and two read depths: that of the input (token
    S) and the wanted one (token T). The encoder sees these, the decoder sees all genes of the vocabulary, so
    :meth:`gene_states` and :meth:`reconstruct` give each gene of the vocabulary for each cell.

    The official file holds three sets of weights; choose with ``scfm.load(..., weights=)`` between ``"cell"`` (the
    default; cell embeddings), ``"rde"`` (cell embeddings across read depths) and ``"gene"`` (gene states and
    reconstruction).
    """

    kind: ClassVar[str] = "scfoundation"
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"embeds", "gene_embeddings", "gene_states", "reconstructs", "attends", "enhances_depth", "pretrains"}
    )
    poolings: ClassVar[tuple[str, ...]] = POOLINGS
    normalized_option: ClassVar[str] = "pre_normalized=True"
    expression_scale: ClassVar[str] = "log1p of counts per 10,000 at the wanted read depth"
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (r"(encoder|decoder)\.layers\.\d+\.(qkv|query|key|value|out)",),
        "ffn": (r"(encoder|decoder)\.layers\.\d+\.linear[12]",),
    }
    embedding_modules: ClassVar[tuple[str, ...]] = ("gene_embedding", "value_embedding")
    vocab_tables: ClassVar[tuple[str, ...]] = ("gene_embedding.weight",)
    layer_stacks: ClassVar[tuple[str, ...]] = ("encoder.layers", "decoder.layers")
    class_heads: ClassVar[tuple[str, ...]] = ("max-pool", "max-pool-padded")
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    task_weights: ClassVar[Mapping[str, str]] = {"annotation": "gene", "expression": "gene", "integration": "rde"}
    # the only map in which each gene of each cell has a place
    network_attention: ClassVar[Mapping[str, Any]] = {"kind": "decoder"}
    module: SCFoundation
    config: SCFoundationConfig
    _told_about_weights: bool = False

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, directory: Path) -> bool:
        """Whether ``directory``, or its subfolder ``models``, holds ``models.ckpt``."""
        return checkpoint.recognizes(directory)

    @classmethod
    def read_official(cls, directory: Path, **options: Any) -> Checkpoint:
        """Read an official container; options are those of ``scfm.backbones.scfoundation.checkpoint.read``."""
        return checkpoint.read(directory, **options)

    @classmethod
    def read_vocab(cls, directory: Path, **options: Any) -> GeneVocab:
        """Read the gene list; the weights are not needed if it lies in ``directory``."""
        return checkpoint.read_vocab(directory, **options)

    @classmethod
    def config_from_dict(cls, values: dict[str, Any]) -> SCFoundationConfig:
        """Rebuild the config from JSON values."""
        return SCFoundationConfig(**values)

    @classmethod
    def config_for(cls, values: dict[str, Any], vocab: GeneVocab) -> SCFoundationConfig:
        """Config of a new network for the genes of ``vocab``."""
        return cls.config_from_dict({"n_genes": len(vocab), **values})

    @classmethod
    def build(cls, config: SCFoundationConfig, vocab: GeneVocab) -> SCFoundation:
        """Make the network with fresh weights."""
        if len(vocab) != config.n_genes:
            msg = f"the vocabulary has {len(vocab):,} genes, the config {config.n_genes:,}; they have to agree"
            raise ValueError(msg)
        return SCFoundation(config)

    def embedding_dim(self, pooling: str | None = None, **options: Any) -> int:
        """Width of the cell embedding: four times the encoder's for ``"all"``, else once."""
        return self.config.encoder_dim * (4 if self.check_pooling(pooling) == "all" else 1)

    # -- fine-tuning -------------------------------------------------------------------------------------------------

    def fine_tuning(self, task: str) -> FineTuning:
        """How the authors fine-tune: the second-last layer of the encoder and the head; the epoch with the best F1 counts."""
        if task == "gears":
            return FineTuning(
                optimization={"learning_rate": 1e-2},
                batch_size=6,
                accumulate=5,
                max_epochs=15,
                objective={"hidden": self.config.decoder_dim, "positions": "table"},
            )
        if task != "annotation":
            return super().fine_tuning(task)
        layer = max(0, self.config.encoder_depth - 2)
        return FineTuning(
            tokenize={"depth_tokens": False},
            optimization={"optimizer": "adam", "learning_rate": 1e-3},
            batch_size=64,
            accumulate=5,
            train_only=(rf"encoder\.layers\.{layer}\.", r"classifier\."),
            class_weights="capped",
            monitor="macro F1",
        )

    def normalized_input(self, totals: np.ndarray | None = None) -> dict[str, Any]:
        """Values as they are, with T = S; S comes from the sum of the values where counts are not known."""
        if totals is None:
            return {"pre_normalized": True, "target": "f1"}
        return {"pre_normalized": "A", "total_counts": totals, "target": "f1"}

    @classmethod
    def zero_shot(cls, task: str) -> ZeroShot:
        """For integration the wanted depth is one that few cells have."""
        if task == "integration":
            return ZeroShot(pooling="all", tokenize={"target": "t4.5"})
        return super().zero_shot(task)

    def config_with_classes(self, n_classes: int, head: str) -> SCFoundationConfig:
        """The config with a classifier; ``"max-pool-padded"`` takes the maximum over padding, too, as upstream."""
        return replace(self.config, n_classes=n_classes, padded_pooling=head == "max-pool-padded")

    def _class_logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        return (self.module.classify(tokens),)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        *,
        input_type: InputType = "singlecell",
        pre_normalized: bool | Literal["F", "T", "A"] = False,
        target: str = "t4",
        tgthighres: str | None = None,
        total_counts: np.ndarray | None = None,
        median_total: float | None = None,
        depth_tokens: bool = True,
        duplicates: Literal["sum", "error"] | None = None,
    ) -> TokenBatch:
        """Turn expression into tokens: expressed genes in the order of the vocabulary, then T, then S.

        Parameters
        ----------
        counts
            Sparse matrix ``(cells, genes)``. With ``pre_normalized="A"`` it may have one more column at the end, the
            total count of each cell.
        genes
            Names of the columns, a :class:`scfm.genes.GeneMatch`, or vocabulary ids (columns with -1 are left out).
        input_type
            ``"singlecell"``, or ``"bulk"`` for bulk profiles.
        pre_normalized
            What the numbers are: ``False`` (or ``"F"``) for counts; ``True`` (``"T"``) for log-normalised values, from
            whose sum the read depth is then taken, as upstream does; ``"A"`` for log-normalised values with
            ``total_counts``.
        target
            Wanted read depth of single cells (token T): ``"t4"`` for 10^4 counts, ``"f5"`` for five times and ``"a1"``
            for 10^1 times the counts of the cell. Bulk profiles have T = S.
        tgthighres
            Upstream's name of ``target``; wins if given.
        total_counts
            Total count of each cell for ``pre_normalized="A"``, shape ``(cells,)``.
        median_total
            Sum that bulk counts are scaled to. By default the median over the cells of this call; :meth:`prepare` and
            with it every function of ``scfm.tl`` takes the median over the whole data set, as upstream does.
        depth_tokens
            Whether there are tokens T and S; the authors' classifier has none.
        duplicates
            Columns of one gene are summed or refused; by default counts are summed and normalised values refused,
            because a sum of logarithms means nothing.

        Returns
        -------
        Tokens. Cells without any known expressed gene, or with an actual or wanted total count of 1 or less, are not
        ``valid``.

        Raises
        ------
        ValueError
            For an unknown mode or target, negative counts, missing values, or a wrong number of columns or totals.
        """
        from scipy.sparse import csr_matrix

        mode = InputMode(input_type, pre_normalized)
        target = DepthTarget.parse(target if tgthighres is None else tgthighres)
        counts, totals = tokenizer.split_totals(csr_matrix(counts), len(genes), mode, total_counts)
        if duplicates is None:
            duplicates = "sum" if mode.pre_normalized is False else "error"
        counts, ids = self._known(counts, genes, duplicates)
        return tokenizer.tokenize(
            counts,
            ids,
            self.config,
            mode=mode,
            target=target,
            totals=totals,
            median_total=median_total,
            depth_tokens=depth_tokens,
        )

    def tokenize_for_training(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, generator: torch.Generator
    ) -> TokenBatch:
        """All expressed genes with T = S; the objective masks and down-samples them."""
        return self.tokenize(counts, genes, target="f1")

    def expected_values(self, options: Mapping[str, Any]) -> Literal["counts", "normalized", "any"]:
        """Counts, unless ``pre_normalized`` says otherwise; bulk profiles may be TPM or FPKM, too."""
        mode = InputMode(**{name: options[name] for name in ("input_type", "pre_normalized") if name in options})
        if mode.pre_normalized is not False:
            return "normalized"
        return "any" if mode.input_type == "bulk" else "counts"

    def prepare(self, blocks: Iterable[csr_matrix], match: GeneMatch, options: dict[str, Any]) -> dict[str, Any]:
        """Add ``median_total`` for bulk counts; all other inputs do not depend on other cells."""
        names = ("input_type", "pre_normalized")
        mode = InputMode(**{name: options[name] for name in names if name in options})
        if not mode.needs_median or options.get("median_total") is not None:
            return options
        duplicates = options.get("duplicates") or "sum"
        sums = [tokenizer.row_sums(match.collapse(block, duplicates=duplicates)[0]) for block in blocks]
        return {**options, "median_total": tokenizer.median_of_positive(np.concatenate(sums) if sums else np.zeros(0))}

    def _known(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, duplicates: str
    ) -> tuple[csr_matrix, np.ndarray]:
        if duplicates == "keep":
            msg = "scFoundation has one place for each gene; use duplicates='sum' or 'error'"
            raise ValueError(msg)
        if not isinstance(genes, GeneMatch):
            names = np.asarray(genes)
            if names.dtype.kind in "iu":
                names = np.append(self.vocab.names, "")[names]
            genes = self.vocab.match(names)
        return genes.collapse(counts, duplicates=duplicates)

    def batch(
        self,
        rows: Tensor | np.ndarray,
        values: Tensor | np.ndarray | None = None,
        *,
        padding: Tensor | np.ndarray | None = None,
    ) -> TokenBatch:
        """Build a token batch from arrays that hold model values already.

        Parameters
        ----------
        rows
            Without ``values``: model rows ``(cells, n_genes + 2)``, genes, then T, then S (or without the last two).
            Positive entries go to the encoder; the mask value and other entries that are not zero are seen by the
            decoder alone. With ``values``: position ids, ``(cells, length)``.
        values
            Value channel of padded arrays, ``(cells, length)``; the encoder sees all of it.
        padding
            True at positions to leave out, ``(cells, length)``; by default where the id is that of padding.
        """
        if values is None:
            return tokenizer.tokens_of_rows(np.asarray(rows), self.config)
        ids = torch.as_tensor(rows)
        tokens = TokenBatch.from_padded(
            ids, torch.as_tensor(values), pad_id=self.config.pad_id, pad_value=self.config.pad_value, padding=padding
        )
        return tokenizer.checked_ids(tokens, self.config)

    # -- outputs -----------------------------------------------------------------------------------------------------

    def _embed(self, tokens: TokenBatch, pooling: str) -> Tensor:
        """Cell embeddings; ``"all"`` is S, T, maximum and mean over genes side by side.

        ``"max"`` is the maximum over all tokens, T and S included. The parts of ``"all"`` are ``"S"``, ``"T"``,
        ``"gene_max"`` and ``"gene_mean"``.
        """
        parts = (pool(part, self.module.encode(part), pooling, self.config) for part in split_tokens(tokens))
        return torch.cat(list(parts))

    def _gene_embeddings(self) -> Tensor:
        return self.module.gene_embedding.weight[: self.config.n_genes]

    def _gene_states(self, tokens: TokenBatch, *, genes: Genes | None = None, key_max: KeyMax = "cell") -> Tensor:
        """Decoder states of genes, ``(cells, genes, decoder_dim)``.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of the wanted genes, which saves work in the last layer; all by default.
        key_max
            ``"cell"`` gives each cell the same numbers in every batch. ``"batch"`` is upstream's ``gene_batch``: the
            cells of the batch influence each other through the maximum of the linear attention.
        """
        positions = self._positions(genes)
        shape = (len(positions), self.config.decoder_dim)
        return self._decode(tokens, positions, key_max, shape, lambda states: states)

    def _iter_gene_states(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        return self._iter_decoded(tokens, self._positions(genes), lambda states: states)

    def _iter_reconstruction(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        if genes is not None:
            yield from self._iter_decoded(tokens, genes, self.module.predict)
            return
        for i in range(len(tokens)):
            cell = tokens.select(slice(i, i + 1))
            expressed = cell.flat_ids[cell.flat_ids < self.config.n_genes]
            for rows in self._iter_decoded(cell, expressed, self.module.predict):
                yield replace(rows, cells=rows.cells + i)

    def _iter_decoded(self, tokens: TokenBatch, genes: Tensor, finish: Any) -> Iterator[GeneRows]:
        """Decoder output at the same genes of all cells, a few cells at a time."""
        self._tell_about_weights()
        start = 0
        for states in self.module.decode(tokens, self.module.encode(tokens), rows=genes):
            cells = torch.arange(start, start + len(states), device=self.device)
            yield GeneRows(cells.repeat_interleave(len(genes)), genes.repeat(len(states)), finish(states).flatten(0, 1))
            start += len(states)

    @property
    def gene_state_dim(self) -> int:
        """Width of contextual gene embeddings: that of the decoder."""
        return self.config.decoder_dim

    def _reconstruct(
        self,
        tokens: TokenBatch,
        *,
        genes: Genes | None = None,
        include_depth_tokens: bool = False,
        key_max: KeyMax = "cell",
    ) -> Tensor:
        """Predicted expression, ``log1p`` of counts per 10,000 of a cell with read depth T, ``(cells, genes)``.

        Predictions can be negative.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of the wanted genes; all by default.
        include_depth_tokens
            Append the (meaningless) outputs at T and S, as the network of upstream does.
        key_max
            As for gene states.
        """
        positions = self._positions(genes)
        if include_depth_tokens:
            depths = positions.new_tensor([self.config.target_id, self.config.source_id])
            positions = torch.cat([positions, depths])
        return self._decode(tokens, positions, key_max, (len(positions),), self.module.predict)

    def _attention(
        self,
        tokens: TokenBatch,
        layer: int,
        *,
        kind: Literal["encoder", "decoder"] = "encoder",
        genes: Genes | None = None,
        average_heads: bool = True,
        rank: bool = False,
    ) -> Tensor:
        """Attention weights of one layer, ``(cells, queries, keys)`` or ``(cells, heads, queries, keys)``, float32.

        Parameters
        ----------
        tokens
            Token batch.
        layer
            Layer, counted from the end if negative.
        kind
            ``"encoder"``: weights among the tokens of each cell. ``"decoder"``: weights among chosen positions, each
            row being part of a distribution over all positions (its sum is 1 when all are chosen).
        genes
            Names or ids of genes; ids can be ``config.target_id`` and ``config.source_id`` too. For the encoder, all
            tokens in their order by default, zero at padding; NaN where a cell has no such token. The decoder needs
            them.
        average_heads
            Mean over heads.
        rank
            Replace weights by their ranks among the keys that are returned, before heads are averaged.
        """
        places = self.gene_ids(genes, self.config.n_positions)
        return attention_map(
            self.module, tokens, layer, kind=kind, places=places, average_heads=average_heads, rank=rank
        )

    def _pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .objective import read_depth_aware_loss

        return read_depth_aware_loss(self, tokens, generator, **options)

    def objective_options(self) -> set[str] | None:
        """Names of the options of :meth:`pretraining_loss`."""
        from .objective import read_depth_aware_loss

        return keyword_options(read_depth_aware_loss)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _positions(self, genes: Genes | None) -> Tensor:
        """Position ids of genes given by name or id; all genes by default."""
        ids = self.gene_ids(genes)
        return torch.arange(self.config.n_genes, device=self.device) if ids is None else ids

    def _decode(
        self, tokens: TokenBatch, positions: Tensor, key_max: str, shape: tuple[int, ...], finish: Any
    ) -> Tensor:
        """Decoder output of all cells, NaN for cells that are not valid."""
        self._tell_about_weights()
        kind = torch.promote_types(self.dtype, torch.float32)
        out = torch.full((len(tokens), *shape), torch.nan, dtype=kind, device=self.device)
        usable = tokens.lengths > 0 if tokens.valid is None else tokens.valid
        rows = torch.nonzero(usable).squeeze(1)
        if rows.numel():
            chosen = tokens if bool(usable.all()) else tokens.select(rows.cpu())
            states: Iterator[Tensor] = self.module.decode(
                chosen, self.module.encode(chosen), rows=positions, key_max=key_max
            )
            start = 0
            for some in states:
                out[rows[start : start + len(some)]] = finish(some).to(kind)
                start += len(some)
        return out

    def _tell_about_weights(self) -> None:
        if self.provenance.weights in ("cell", "rde") and not self._told_about_weights:
            _logging.warning(
                f"the authors take the weights 'gene' for gene states and expression; these are {self.provenance.weights!r} "
                "(scfm.load(..., weights='gene'))"
            )
            self._told_about_weights = True
