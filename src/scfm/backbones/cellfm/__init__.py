"""CellFM (Zeng et al., Nature Communications 2025) behind the contract of all backbones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch

from ... import _logging
from ..._errors import UnsupportedError
from ...genes import GeneMatch
from .._base import Backbone, Checkpoint, GeneRows
from .._keywords import keyword_options
from .._tokens import TokenBatch
from . import checkpoint, tokenizer
from .attention import Rank, attention_map, cls_attention, ranked
from .config import PRESETS, CellFMConfig
from .gene_list import PAD
from .heads import CrossRetentionHead
from .module import CellFM, runs
from .outputs import arranged, mean_by_cell, without_invalid
from .tasks import MAX_LENGTH, CellFMTasks
from .tokenizer import Sampling, TokenDraws, TokenRules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import GeneVocab
    from .._base import Genes
    from .module import Sequences

__all__ = ["PRESETS", "CellFM", "CellFMBackbone", "CellFMConfig", "TokenDraws"]

Forward = Literal["backbone", "root", "depths", "encoder"]


class CellFMBackbone(CellFMTasks, Backbone):
    """CellFM for inference; built by :func:`scfm.load`.

    A cell is the set of its expressed genes with log-normalised values, and a CLS token that stands for the cell.
    There is no softmax and no position: the cost of a cell is linear in the number of its genes.

    Files that the authors' tutorials or their PyTorch port wrote for classification load with their head, see
    :meth:`classify`.
    """

    kind: ClassVar[str] = "cellfm"
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"embeds", "gene_embeddings", "gene_states", "reconstructs", "attends", "cell_attends", "pretrains"}
    )
    poolings: ClassVar[tuple[str, ...]] = ("cls", "mean")
    specials: ClassVar[tuple[str, ...]] = (PAD,)
    normalized_option: ClassVar[str] = "pre_normalized=True"
    expression_scale: ClassVar[str] = "log1p of counts per 10,000"
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (r"layers\.\d+\.attention\.(kvqu|out)",),
        "ffn": (r"layers\.\d+\.ffn\.(uv|out)",),
    }
    embedding_modules: ClassVar[tuple[str, ...]] = ("gene_embedding", "value_encoder", "depth_encoder")
    vocab_tables: ClassVar[tuple[str, ...]] = ("gene_embedding.weight",)
    class_heads: ClassVar[tuple[str, ...]] = ("retention", "mlp")
    joint_heads: ClassVar[tuple[str, ...]] = ("mlp",)
    head_modules: ClassVar[tuple[str, ...]] = ("head",)
    network_attention: ClassVar[Mapping[str, Any]] = {"rank": True}
    integrates: ClassVar[bool] = True
    module: CellFM
    config: CellFMConfig

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether ``path`` is a CellFM weight file, or a folder with one."""
        return checkpoint.recognizes(path)

    @classmethod
    def read_official(cls, directory: Path, **options: Any) -> Checkpoint:
        """Read an official file; options are those of ``scfm.backbones.cellfm.checkpoint.read``."""
        return checkpoint.read(directory, **options)

    @classmethod
    def read_vocab(cls, directory: Path, **options: Any) -> GeneVocab:
        """Read the gene list; the weights are not needed if it lies in ``directory``."""
        return checkpoint.read_vocab(directory, **options)

    @classmethod
    def config_from_dict(cls, values: dict[str, Any]) -> CellFMConfig:
        """Rebuild the config from JSON values."""
        return CellFMConfig(**values)

    @classmethod
    def config_for(cls, values: dict[str, Any], vocab: GeneVocab) -> CellFMConfig:
        """Config of a new network for the genes of ``vocab``."""
        return cls.config_from_dict({"n_genes": vocab.n_genes, **values})

    @classmethod
    def build(cls, config: CellFMConfig, vocab: GeneVocab) -> CellFM:
        """Make the network with fresh weights."""
        if len(vocab) != config.n_genes + 1 or vocab.specials != cls.specials or vocab.is_gene[0]:
            msg = (
                f"the vocabulary must hold {PAD!r} and then {config.n_genes:,} genes, as the config says; it "
                f"has {vocab.n_genes:,} genes and {len(vocab.specials)} special tokens"
            )
            raise ValueError(msg)
        return CellFM(config)

    def embedding_dim(self, pooling: str | None = None, **options: Any) -> int:
        """Width of the cell embedding."""
        self.check_pooling(pooling)
        return self.config.dim

    @property
    def gene_state_dim(self) -> int:
        """Width of contextual gene embeddings."""
        return self.config.dim

    # -- tokens ------------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        *,
        max_length: int | None = MAX_LENGTH,
        sampling: Sampling = "largest",
        pre_normalized: bool = False,
        include_zeros: bool = False,
        unknown: Literal["drop", "pad"] = "drop",
        with_unexpressed: bool = False,
        duplicates: Literal["sum", "error"] | None = None,
        seed: int = 0,
        draws: TokenDraws | None = None,
    ) -> TokenBatch:
        """Turn expression into tokens, in the order of the vocabulary.

        Counts of cells above 100,000 are scaled down to that and rounded, all genes of the data included; the counts
        of known genes are then scaled to 10,000 per cell and ``log1p`` is taken.

        Parameters
        ----------
        counts
            Sparse matrix ``(cells, genes)``.
        genes
            Names of the columns, a :class:`scfm.genes.GeneMatch`, or vocabulary ids (columns with -1 are left out).
        max_length
            Most genes of a cell; ``None`` for no limit.
        sampling
            Which genes stay in longer cells: those with the largest values, ties broken by vocabulary id, or
            ``"weighted"``, a random choice in which large values are more likely, as the authors publish it. It depends
            on ``seed`` and the content of the cell alone.
        pre_normalized
            The numbers are log-normalised values, to be used as they are.
        include_zeros
            All genes of the matrix become tokens, in the order of the columns (a gene panel); ``max_length`` does not
            apply.
        unknown
            Genes of a panel that the model does not know are left out, or all take the vector of padding, as
            upstream.
        with_unexpressed
            Add the known genes that a cell does not express as ``queries``, from which training can draw.
        duplicates
            Columns of one gene are summed or refused; by default counts are summed and normalised values refused,
            because a sum of logarithms means nothing.
        seed
            Seed of ``sampling="weighted"``.
        draws
            Genes to keep, to use instead of sampling them.

        Returns
        -------
        Tokens. Cells without any known expressed gene are not ``valid``.

        Raises
        ------
        ValueError
            For an unknown rule, negative or missing values, or draws that do not fit.
        """
        from scipy.sparse import csr_matrix

        if unknown not in ("drop", "pad") or (unknown == "pad" and not include_zeros):
            msg = f"unknown must be 'drop', or 'pad' together with include_zeros=True; got {unknown!r}"
            raise ValueError(msg)
        rules = TokenRules(max_length, sampling, pre_normalized, include_zeros, with_unexpressed, seed, draws)
        counts = csr_matrix(counts)
        if draws is not None and len(draws) != counts.shape[0]:
            msg = f"draws for {len(draws)} cells were given, but there are {counts.shape[0]}"
            raise ValueError(msg)
        counts = counts.astype(np.float64) if pre_normalized else tokenizer.cap_depth(counts)
        if duplicates is None:
            duplicates = "error" if pre_normalized else "sum"
        match = self._match(genes)
        if unknown == "pad":
            match.column_map(duplicates)
            if n_unknown := len(match) - match.n_matched:
                _logging.warning(f"{n_unknown:,} unknown genes of the panel all have the vector of padding")
            return tokenizer.tokenize(counts, np.where(match.ids < 0, tokenizer.PAD_ID, match.ids), rules)
        return tokenizer.tokenize(*match.collapse(counts, duplicates=duplicates), rules)

    def tokenize_for_training(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, generator: torch.Generator
    ) -> TokenBatch:
        """Expressed genes, at random where they are too many, and the others as ``queries``."""
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        return self.tokenize(counts, genes, sampling="weighted", with_unexpressed=True, seed=seed)

    def expected_values(self, options: Mapping[str, Any]) -> Literal["counts", "normalized", "any"]:
        """Counts, unless ``pre_normalized`` is set."""
        return "normalized" if options.get("pre_normalized") else "counts"

    def _match(self, genes: Sequence[str] | np.ndarray | GeneMatch) -> GeneMatch:
        if isinstance(genes, GeneMatch):
            return genes
        names = np.asarray(genes)
        if names.dtype.kind in "iu":
            names = np.append(self.vocab.names, "")[names]
        return self.vocab.match(names)

    def batch(
        self,
        ids: Tensor | np.ndarray,
        values: Tensor | np.ndarray,
        *,
        padding: Tensor | np.ndarray | None = None,
        depths: Tensor | np.ndarray | None = None,
        panel: bool = False,
    ) -> TokenBatch:
        """Build a token batch from padded arrays that hold model values already.

        Parameters
        ----------
        ids
            Vocabulary ids, which are rows of the gene table, ``(cells, length)``.
        values
            Log-normalised values, ``(cells, length)``.
        padding
            True at positions to leave out; by default where the id is 0.
        depths
            ``log1p`` of input and target read depth in thousands, ``(cells, 2)``, for ``forward="depths"``.
        panel
            The arrays hold a gene panel, zeros included.
        """
        values = torch.as_tensor(np.asarray(values), dtype=torch.float32)
        tokens = TokenBatch.from_padded(torch.as_tensor(ids), values, pad_id=0, pad_value=0.0, padding=padding)
        flat = tokens.flat_ids
        if len(flat) and (flat.min() < 0 or flat.max() > self.config.n_genes):
            msg = f"ids must lie between 0 and {self.config.n_genes}"
            raise ValueError(msg)
        if not bool((tokens.flat_values >= 0).all()):
            msg = "values must be log-normalised, so none is negative or NaN"
            raise ValueError(msg)
        per_cell = {} if depths is None else {"depths": torch.as_tensor(np.asarray(depths), dtype=torch.float32)}
        per_cell |= {"panel": torch.ones(len(tokens), dtype=torch.bool)} if panel else {}
        return replace(tokens, per_cell=per_cell)

    # -- outputs -----------------------------------------------------------------------------------------------------

    def _embed(
        self, tokens: TokenBatch, pooling: str, *, forward: Forward = "backbone", padded_length: int = MAX_LENGTH
    ) -> Tensor:
        """Cell embeddings ``(cells, dim)``: the CLS state, or the mean of the gene states.

        Parameters
        ----------
        tokens
            Token batch.
        pooling
            ``"cls"``, as the authors do, or ``"mean"``.
        forward
            One of upstream's forward passes: ``"backbone"``, which its embeddings come from; ``"depths"``, with
            read-depth tokens S and T behind CLS; ``"root"``, the class of pre-training, in which padding acts on the
            cell; ``"encoder"``, without CLS (mean only).
        padded_length
            Length to which the root class would pad.
        """
        cls_only = pooling == "cls"
        if cls_only and forward == "encoder":
            msg = "forward='encoder' has no CLS token; use pooling='mean'"
            raise ValueError(msg)
        parts = []
        for part in runs(tokens):
            sequences = self._sequences(part, forward, padded_length)
            states = self.module.encode(sequences, first_only=cls_only)
            parts.append(states if cls_only else mean_by_cell(states[sequences.genes], part))
        return torch.cat(parts)

    def _gene_embeddings(self) -> Tensor:
        return self.module.gene_embedding.weight[: len(self.vocab)]

    def _gene_states(self, tokens: TokenBatch, *, genes: Genes | None = None, forward: Forward | None = None) -> Tensor:
        """States of gene tokens, float32, NaN where there is none.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of wanted genes, for a result ``(cells, genes, dim)``; by default all tokens in their order,
            ``(cells, longest, dim)``.
        forward
            As for embeddings; by default ``"encoder"`` for a gene panel, as the authors do, and else ``"backbone"``.
        """
        states = torch.cat([states for _, _, states in self._iter_states(tokens, forward)])
        return arranged(tokens, states.float(), self.gene_ids(genes), len(self.vocab))

    def _iter_gene_states(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        for start, part, states in self._iter_states(tokens, None):
            rows = self._token_rows(part, states, genes)
            yield replace(rows, cells=rows.cells + start)

    def _reconstruct(
        self, tokens: TokenBatch, *, genes: Genes | None = None, decoder: Literal["gene", "cell"] | None = None
    ) -> Tensor:
        """Predicted expression, ``log1p`` of counts per 10,000, float32, NaN where there is none.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of the wanted genes.
        decoder
            ``"gene"`` decodes the states of the tokens of a cell (the default without ``genes``): ``(cells,
            longest)``, or ``(cells, genes)``. ``"cell"`` decodes any gene from the CLS state (the default with
            ``genes``): ``(cells, genes)``, by default one column for each entry of the vocabulary.
        """
        if decoder not in (None, "gene", "cell"):
            msg = f"decoder must be 'gene' or 'cell'; got {decoder!r}"
            raise ValueError(msg)
        ids = self.gene_ids(genes)
        if decoder is None:
            decoder = "gene" if ids is None else "cell"
        self.need_decoder(decoder)
        if decoder == "gene":
            parts = (self.module.predict_genes(states) for _, _, states in self._iter_states(tokens, "backbone"))
            return arranged(tokens, torch.cat(list(parts)).float(), ids, len(self.vocab))
        ids = torch.arange(len(self.vocab), device=self.device) if ids is None else ids
        parts = [self.module.predict_from_cells(cells, ids) for _, cells in self._iter_cells(tokens)]
        return without_invalid(tokens, torch.cat(parts).float())

    def _iter_reconstruction(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        """Expressed genes from the states of their tokens; chosen genes from the CLS state, which knows all genes."""
        self.need_decoder("gene" if genes is None else "cell")
        if genes is None:
            for start, part, states in self._iter_states(tokens, "backbone"):
                rows = self._token_rows(part, self.module.predict_genes(states), None)
                yield replace(rows, cells=rows.cells + start)
            return
        for start, cells in self._iter_cells(tokens):
            values = self.module.predict_from_cells(cells, genes)
            numbers = torch.arange(start, start + len(cells), device=self.device)
            yield GeneRows(numbers.repeat_interleave(len(genes)), genes.repeat(len(cells)), values.flatten())

    def _attention(
        self,
        tokens: TokenBatch,
        layer: int,
        *,
        genes: Genes | None = None,
        average_heads: bool = True,
        rank: Rank = False,
        include_cls: bool | None = None,
        padded_length: int = MAX_LENGTH,
    ) -> Tensor:
        """Scores ``ReLU(q) ReLU(k)^T / width`` of one layer, float32.

        They are no weights: rows do not sum to 1, and the sizes of heads and cells differ. Take ranks to compare them.

        Parameters
        ----------
        tokens
            Token batch.
        layer
            Layer, counted from the end if negative.
        genes
            Names or ids of genes that choose rows and columns; all tokens in their order by default.
        average_heads
            Mean over heads, after ranking.
        rank
            Replace scores by their ranks among all keys of the cell, divided by their number; ``"upstream"`` ranks
            among the padding to ``padded_length``, too, and divides by 2,048.
        include_cls
            Put the CLS token in front of rows and columns, and among the ranked keys; by default without ``genes``.
        padded_length
            Length to which upstream pads.

        Returns
        -------
        Shape ``(cells, queries, keys)`` or ``(cells, heads, queries, keys)``; NaN where a cell has no such token.
        """
        _check_rank(rank)
        places = self.gene_ids(genes)
        include_cls = places is None if include_cls is None else include_cls
        return attention_map(
            self.module,
            tokens,
            layer,
            places=places,
            include_cls=include_cls,
            average_heads=average_heads,
            rank=rank,
            padded_length=padded_length,
        )

    def _cell_attention(
        self,
        tokens: TokenBatch,
        genes: Tensor | None,
        *,
        layer: int | None = None,
        rank: Rank = True,
        padded_length: int = MAX_LENGTH,
    ) -> Tensor:
        """As :meth:`class_attention`; without a class head, or in a chosen layer, what CLS looks at in the encoder."""
        _check_rank(rank)
        if layer is None and isinstance(self.module.head, CrossRetentionHead):
            return self.class_attention(tokens, genes, rank=rank, padded_length=padded_length)
        scores = cls_attention(
            self.module, tokens, -1 if layer is None else layer, rank=rank, padded_length=padded_length
        )
        return arranged(tokens, scores, genes, len(self.vocab))

    def _pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .objective import pretraining_loss

        return pretraining_loss(self, tokens, generator, **options)

    def objective_options(self) -> set[str] | None:
        """Names of the options of :meth:`pretraining_loss`."""
        from .objective import pretraining_loss

        return keyword_options(pretraining_loss)

    # -- fine-tuned files --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def classify(self, tokens: TokenBatch) -> Tensor:
        """Probabilities of the classes that a fine-tuned file was trained on, ``(cells, classes)``, float32.

        Raises
        ------
        scfm.UnsupportedError
            If the model has no class head.
        """
        self._need_head()

        def run(valid: TokenBatch) -> Tensor:
            logits = [self.module.classify(part).logits for part in runs(valid)]
            return torch.softmax(torch.cat(logits).float(), -1)

        return self._with_nan(tokens, run, self.config.n_classes)

    @torch.inference_mode()
    def class_attention(
        self,
        tokens: TokenBatch,
        genes: Genes | None = None,
        *,
        average_heads: bool = True,
        rank: Rank = True,
        padded_length: int = MAX_LENGTH,
    ) -> Tensor:
        """What the class head of a fine-tuned file looks at: attention of CLS to the genes in its last layer.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of wanted genes; all tokens in their order by default.
        average_heads, rank, padded_length
            As for :meth:`attention`.

        Returns
        -------
        Shape ``(cells, genes)`` or ``(cells, heads, genes)``, float32; NaN where a cell has no such token.

        Raises
        ------
        scfm.UnsupportedError
            If the model has no class head that looks at genes.
        """
        self._need_head()
        if not isinstance(self.module.head, CrossRetentionHead):
            msg = f"the class head of {self.name} sees the CLS state alone, so it has no attention to genes"
            raise UnsupportedError(msg)
        _check_rank(rank)
        tokens = tokens.to(self.device)
        parts = []
        for part in runs(tokens):
            sequences = self.module.sequences(part)
            states, lengths = self.module.encode(sequences), part.lengths.tolist()
            cells = self.module.head.cls_scores(states[sequences.first], states[sequences.genes], lengths)
            ranks = (ranked(scores, rank, padded_length - n) for scores, n in zip(cells, lengths, strict=True))
            parts += [scores.mean(0) if average_heads else scores.T for scores in ranks]
        out = arranged(tokens, torch.cat(parts), self.gene_ids(genes), len(self.vocab))
        return out if average_heads else out.transpose(1, 2)

    # -- parts -------------------------------------------------------------------------------------------------------

    def need_decoder(self, decoder: Literal["gene", "cell"]) -> None:
        """Raise :class:`scfm.UnsupportedError` if the file of the model lacks a decoder."""
        if getattr(self.module, f"{decoder}_decoder") is None:
            msg = (
                f"the file of {self.name} has no {decoder}-wise decoder of expression; the official .ckpt files have "
                "both decoders"
            )
            raise UnsupportedError(msg)

    def _need_head(self) -> None:
        if not self.config.class_head:
            msg = f"{self.name} has no class head; load a file that was fine-tuned for classification"
            raise UnsupportedError(msg)

    def _sequences(self, tokens: TokenBatch, forward: Forward, padded_length: int = MAX_LENGTH) -> Sequences:
        if forward not in get_args(Forward):
            msg = f"forward must be one of {', '.join(map(repr, get_args(Forward)))}; got {forward!r}"
            raise ValueError(msg)
        if forward == "encoder":
            return self.module.sequences(tokens, "none")
        if not self.config.has_cls:
            msg = f"the file of {self.name} has no CLS token; it can give gene states of a panel (forward='encoder')"
            raise UnsupportedError(msg)
        if forward == "depths":
            if not self.config.has_depth_tokens:
                msg = f"{self.name} has no read-depth tokens S and T"
                raise UnsupportedError(msg)
            return self.module.sequences(tokens, "depths", depths=tokens.per_cell.get("depths"))
        return self.module.sequences(tokens, padded_length=padded_length if forward == "root" else None)

    def _iter_states(self, tokens: TokenBatch, forward: Forward | None) -> Iterator[tuple[int, TokenBatch, Tensor]]:
        """Runs of cells: number of the first, tokens, states of the gene tokens."""
        if forward is None:
            forward = "encoder" if "panel" in tokens.per_cell else "backbone"
        start = 0
        for part in runs(tokens):
            sequences = self._sequences(part, forward)
            yield start, part, self.module.encode(sequences)[sequences.genes]
            start += len(part)

    def _iter_cells(self, tokens: TokenBatch) -> Iterator[tuple[int, Tensor]]:
        """Runs of cells: number of the first, CLS states."""
        start = 0
        for part in runs(tokens):
            yield start, self.module.encode(self._sequences(part, "backbone"), first_only=True)
            start += len(part)


def _check_rank(rank: Rank) -> None:
    if rank not in (True, False, "upstream"):
        msg = f"rank must be True, False or 'upstream'; got {rank!r}"
        raise ValueError(msg)
