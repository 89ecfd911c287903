"""scLong (Bai et al., Nature Communications 2026) behind the contract of all backbones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from ...genes import GeneMatch
from .._base import Backbone, Checkpoint, GeneRows
from .._fine_tuning import FineTuning, ZeroShot
from .._keywords import keyword_options
from . import checkpoint, tokenizer
from .annotations import read_annotations
from .attention import attention_map
from .config import PRESETS, STACKS, SCLongConfig
from .graph import GOGraph
from .module import Encodings, SCLong
from .pooling import BY_COLUMN, BY_GENE, POOLINGS, pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import GeneVocab
    from ...nn.linear_attention import Backend, KeyMax
    from .._base import Genes
    from .._tokens import TokenBatch
    from .module import TieBreak
    from .tokenizer import Duplicates, Normalization

__all__ = ["PRESETS", "Encodings", "GOGraph", "SCLong", "SCLongBackbone", "SCLongConfig", "read_annotations"]

# width of the authors' network for perturbations on the released model, and the width of that
_GEARS_WIDTH, _RELEASED_WIDTH = 1024, 200


class SCLongBackbone(Backbone):
    """scLong for inference; built by :func:`scfm.load`.

    A cell is the list of all genes of the vocabulary. Those with the highest values go through a large encoder, the
    others through a small one, and a decoder sees all of them; each token carries a convolution over a Gene Ontology
    graph. :meth:`gene_states` and :meth:`reconstruct` give each gene of the vocabulary for each cell.
    """

    kind: ClassVar[str] = "sclong"
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"embeds", "gene_embeddings", "gene_states", "reconstructs", "attends", "pretrains"}
    )
    poolings: ClassVar[tuple[str, ...]] = POOLINGS
    specials: ClassVar[tuple[str, ...]] = (checkpoint.PAD,)
    normalized_option: ClassVar[str] = "normalization='as_is'"
    expression_scale: ClassVar[str] = "that of the input: log1p of counts per 10,000, by default stretched or cut to 10"
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (r"(large|mini|decoder)\.layers\.\d+\.(query|key|value|out)",),
        "ffn": (r"(large|mini|decoder)\.layers\.\d+\.linear[12]",),
    }
    embedding_modules: ClassVar[tuple[str, ...]] = ("value_embedding", "gene_table", "go")
    layer_stacks: ClassVar[tuple[str, ...]] = tuple(f"{name}.layers" for name in STACKS)
    network_attention: ClassVar[Mapping[str, Any]] = {"kind": "large", "average_layers": True}
    self_changing: ClassVar[tuple[str, ...]] = (r"value_embedding\.mask\.weight", r"go\.weight")
    # the graph is data, not weights
    constants: ClassVar[tuple[str, ...]] = ("go.edges", "go.edge_weight")
    vocab_tables: ClassVar[tuple[str, ...]] = ("gene_table.weight", "go.weight")
    module: SCLong
    config: SCLongConfig

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether ``path`` holds a pickle of scLong's hyper-parameters beside a weight file."""
        return checkpoint.recognizes(path)

    @classmethod
    def read_official(cls, directory: Path, **options: Any) -> Checkpoint:
        """Read an official pair of files; options are those of ``scfm.backbones.sclong.checkpoint.read``."""
        return checkpoint.read(directory, **options)

    @classmethod
    def read_vocab(cls, directory: Path, **options: Any) -> GeneVocab:
        """Read the gene list; the weights are not needed if it lies in ``directory``."""
        return checkpoint.read_vocab(directory, **options)

    @classmethod
    def config_from_dict(cls, values: dict[str, Any]) -> SCLongConfig:
        """Rebuild the config from JSON values."""
        return SCLongConfig(**values)

    @classmethod
    def config_for(cls, values: dict[str, Any], vocab: GeneVocab) -> SCLongConfig:
        """Config of a new network for the genes of ``vocab``."""
        return cls.config_from_dict({"n_positions": len(vocab), **values})

    @classmethod
    def build(cls, config: SCLongConfig, vocab: GeneVocab) -> SCLong:
        """Make the network with fresh weights; :meth:`set_go_graph` gives it a graph."""
        if len(vocab) != config.n_positions or checkpoint.PAD not in vocab.specials:
            msg = (
                f"the vocabulary has {len(vocab):,} entries, the config {config.n_positions:,}; they have to agree, and "
                f"one of them has to be the special entry {checkpoint.PAD!r}"
            )
            raise ValueError(msg)
        return SCLong(config)

    def set_go_graph(self, graph: GOGraph) -> None:
        """Replace the Gene Ontology graph, as for training from scratch; ``config.n_edges`` follows."""
        go = self.module.go
        if len(graph) and int(graph.edges.max()) >= self.config.n_positions:
            msg = f"the graph has genes beyond the {self.config.n_positions:,} entries of the vocabulary"
            raise ValueError(msg)
        go.edges, go.edge_weight = graph.edges.to(self.device), graph.weight.to(self.device, go.edge_weight.dtype)
        self.config = self.module.config = replace(self.config, n_edges=len(graph))

    def set_gene_annotations(self, annotations: str | Path) -> None:
        """Make the Gene Ontology graph of the vocabulary from a file that :func:`read_annotations` takes."""
        self.set_go_graph(GOGraph.from_annotations(annotations, self.vocab))

    def set_gene_vectors(self, vectors: np.ndarray, *, norm: float | None = None) -> None:
        """As for every model; as in the paper both tables start alike, and the vector of padding is zero."""
        super().set_gene_vectors(vectors, norm=norm)
        with torch.no_grad():
            for table in self.gene_tables:
                table[self.vocab.get_ids([checkpoint.PAD])] = 0

    def set_attention_backend(self, backend: Backend) -> None:
        """Compute linear attention with ``"scfm"`` or with ``FastAttention`` of the package ``"performer-pytorch"``.

        The package needs far more memory and takes the maximum of the keys per head from version 1.1.1 on, so outputs
        have to be asked for with ``key_max="head"`` then.
        """
        for name in STACKS:
            getattr(self.module, name).use_backend(backend)

    def embedding_dim(self, pooling: str | None = None, *, columns: Genes | None = None, **options: Any) -> int:
        """Width of the cell embedding: that of a gene vector, or a number for each position or column."""
        pooling = self.check_pooling(pooling)
        if pooling not in BY_GENE:
            return self.config.dim
        return self.config.n_positions if columns is None or pooling not in BY_COLUMN else len(columns)

    def pooling_options(self, pooling: str, match: GeneMatch) -> dict[str, Any]:
        """The genes of the data, whose order ``"eq11"`` and ``"mean_dims"`` follow."""
        return {"columns": match.ids} if pooling in BY_COLUMN else {}

    def fine_tuning(self, task: str) -> FineTuning:
        """How the authors fine-tune."""
        if task == "gears":
            return FineTuning(
                optimization={"learning_rate": 1e-3},
                batch_size=16,
                accumulate=8,
                max_epochs=16,
                objective={
                    "hidden": _GEARS_WIDTH if self.config.dim >= _RELEASED_WIDTH else self.config.dim,
                    "positions": "none",
                    "indicator": True,
                },
            )
        return super().fine_tuning(task)

    def normalized_input(self, totals: np.ndarray | None = None) -> dict[str, Any]:
        """Values as they are, neither stretched nor cut."""
        return {"normalization": "as_is"}

    @classmethod
    def zero_shot(cls, task: str) -> ZeroShot:
        """For integration a number for each gene (Eq. 11 of the paper)."""
        return ZeroShot(pooling="eq11") if task == "integration" else super().zero_shot(task)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        *,
        normalization: Normalization = "log1p_1e4_max10",
        duplicates: Duplicates | None = None,
    ) -> TokenBatch:
        """Turn expression into tokens: the values of the expressed genes; all other positions are zero.

        Parameters
        ----------
        counts
            Sparse matrix ``(cells, genes)``.
        genes
            Names of the columns, a :class:`scfm.genes.GeneMatch`, or vocabulary ids (-1 for unknown genes).
        normalization
            ``"log1p_1e4_max10"``: ``log1p`` of counts per 10,000, stretched or cut such that no value is above 10 and
            the largest one is 10. ``"log1p_1e4"``: without the last step. ``"paper_literal"``: ``log1p`` of a
            ten-thousandth of the counts, stretched or cut to 10. ``"as_is"``: values that are normalised already.
            Totals and maxima are those of all columns, unknown genes included.
        duplicates
            Columns of one gene are summed, refused, or (``"last"``, as upstream) only the last one counts. By default
            counts are summed and values refused, because a sum of logarithms means nothing.

        Returns
        -------
        Tokens. Cells without any known expressed gene are not ``valid``.

        Raises
        ------
        ValueError
            For an unknown option, negative or missing values, or a wrong number of genes.
        """
        from scipy.sparse import csr_matrix

        tokenizer.check_normalization(normalization)
        counts = csr_matrix(counts)
        match = self._match(genes)
        if counts.shape[1] != len(match):
            msg = f"the matrix has {counts.shape[1]:,} columns, but {len(match):,} genes were given"
            raise ValueError(msg)
        if duplicates is None:
            duplicates = "error" if normalization == "as_is" else "sum"
        return tokenizer.tokenize(
            counts, match, normalization=normalization, duplicates=duplicates, pad_id=self._pad_id
        )

    def expected_values(self, options: Mapping[str, Any]) -> Literal["counts", "normalized"]:
        """Counts, unless ``normalization`` is ``"as_is"``."""
        return "normalized" if options.get("normalization") == "as_is" else "counts"

    def batch(self, rows: Tensor | np.ndarray) -> TokenBatch:
        """Build a token batch from model rows.

        Parameters
        ----------
        rows
            Values of all positions ``(cells, n_positions)`` in the order of the vocabulary, or without PAD at its end:
            zero, positive, or at most ``config.mask_threshold`` for masked genes.
        """
        rows = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        return tokenizer.tokens_of_rows(rows, self.config.n_positions, self._pad_id, self.config.mask_threshold)

    def _match(self, genes: Sequence[str] | np.ndarray | GeneMatch) -> GeneMatch:
        if isinstance(genes, GeneMatch):
            return genes
        names = np.asarray(genes)
        if names.dtype.kind in "iu":
            names = np.append(self.vocab.names, "")[names]
        return self.vocab.match(names)

    @property
    def _pad_id(self) -> int:
        return self.vocab[checkpoint.PAD]

    # -- outputs -----------------------------------------------------------------------------------------------------

    def _embed(
        self,
        tokens: TokenBatch,
        pooling: str,
        *,
        columns: Genes | None = None,
        key_max: KeyMax = "cell",
        tie_break: TieBreak = "index",
    ) -> Tensor:
        """Cell embeddings from the states of all positions, pooled cell by cell.

        Parameters
        ----------
        tokens
            Token batch.
        pooling
            ``"mean_genes"``: mean over all positions. ``"mean_expressed"``: over expressed genes. ``"eq11"``: for each
            gene, the sum of its state and its predicted expression (Eq. 11 of the paper). ``"mean_dims"``: for each
            gene, the mean of its state. ``"sum_dims"``: its sum.
        columns
            Vocabulary ids that the result of ``"eq11"`` and ``"mean_dims"`` consists of, and that ``"mean_genes"`` is
            taken over, such as the genes of the data; -1 for unknown genes, which get the mean over all positions. By
            default all positions.
        key_max
            ``"cell"`` gives each cell the same numbers in every batch. ``"batch"`` is upstream's rule: the cells of a
            batch influence each other through the maximum of the linear attention.
        tie_break
            Which of the genes with equal values go through the large encoder: those that come first (``"index"``), or
            what ``torch.topk`` takes.
        """
        columns = None if columns is None else torch.as_tensor(np.asarray(columns), device=self.device)
        out = []
        for start, states in self._states(tokens, None, key_max, tie_break):
            cells = tokens.select(slice(start, start + len(states)))
            for i, cell in enumerate(states):
                one = cells.select(slice(i, i + 1))
                out.append(pool(cell, self.module.predict, one.flat_ids[one.flat_values > 0], pooling, columns))
        return torch.stack(out)

    @torch.inference_mode()
    def gene_embeddings(self, kind: Literal["position", "go", "sum"] | None = None) -> Tensor:
        """Static gene embeddings, float32, shape ``(n_positions, dim)``.

        Parameters
        ----------
        kind
            ``"position"``: the trained gene2vec table, which the authors use in drug experiments. ``"go"``: the
            convolution over the Gene Ontology graph. ``"sum"``: their sum, as each token has it. By default the table,
            or the convolution for models that have no table.

        Raises
        ------
        ValueError
            If the kind is unknown, or the model has no table.
        """
        table = self.module.gene_table
        kinds = ("go", "sum") if table is None else ("position", "go", "sum")
        kind = kinds[0] if kind is None else kind
        if kind not in kinds:
            msg = f"kind must be one of {', '.join(kinds)}; got {kind!r}"
            raise ValueError(msg)
        if kind == "position":
            return table.weight.float()
        return (self.module.go() if kind == "go" else self.module.gene_vectors()).float()

    @property
    def gene_state_dim(self) -> int:
        """Width of the state of a gene."""
        return self.config.dim

    def _gene_states(
        self,
        tokens: TokenBatch,
        *,
        genes: Genes | None = None,
        key_max: KeyMax = "cell",
        tie_break: TieBreak = "index",
    ) -> Tensor:
        """States of genes, ``(cells, genes, dim)``.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of the wanted genes, which saves work in the last layer; all genes by default.
        key_max, tie_break
            As for cell embeddings.
        """
        rows = self._rows(self.gene_ids(genes))
        out = self._nan(tokens, len(rows), self.config.dim)
        usable, where = self._usable(tokens)
        for start, states in self._states(usable, rows, key_max, tie_break):
            self._fill(out, where, start, states)
        return out

    def _reconstruct(
        self,
        tokens: TokenBatch,
        *,
        genes: Genes | None = None,
        key_max: KeyMax = "cell",
        tie_break: TieBreak = "index",
    ) -> Tensor:
        """Predicted expression on the scale of the input, ``(cells, genes)``; options as for gene states."""
        rows = self._rows(self.gene_ids(genes))
        out = self._nan(tokens, len(rows))
        usable, where = self._usable(tokens)
        for start, states in self._states(usable, rows, key_max, tie_break):
            self._fill(out, where, start, self.module.predict(states))
        return out

    def _iter_gene_states(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        rows = self._rows(genes)
        for start, states in self._states(tokens, rows, "cell", "index"):
            yield GeneRows(torch.full_like(rows, start), rows, states[0].float())

    def _iter_reconstruction(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]:
        for start in range(len(tokens)):
            cell = tokens.select(slice(start, start + 1))
            rows = cell.flat_ids[cell.flat_values > 0] if genes is None else genes
            values = self.module.predict(self.module(cell, rows=rows)[0])
            yield GeneRows(torch.full_like(rows, start), rows, values.float())

    @torch.inference_mode()
    def encode(self, tokens: TokenBatch, *, key_max: KeyMax = "cell", tie_break: TieBreak = "index") -> Encodings:
        """All stages of a few cells, which are in memory together.

        Parameters
        ----------
        tokens
            Token batch; cells without any value are computed, too.
        key_max, tie_break
            As for cell embeddings.
        """
        return self.module.stages(tokens.to(self.device), key_max=key_max, tie_break=tie_break)

    def _attention(
        self,
        tokens: TokenBatch,
        layer: int,
        *,
        kind: Literal["large", "mini", "decoder"] = "large",
        genes: Genes | None = None,
        average_heads: bool = True,
        average_layers: bool = False,
        rank: bool = False,
        upstream_compat: bool = False,
        tie_break: TieBreak = "index",
    ) -> Tensor:
        """Implied weights of the linear attention, ``(cells, queries, keys)``, with heads as second axis if kept apart.

        Parameters
        ----------
        tokens
            Token batch.
        layer
            Layer of the stack, counted from the end if negative.
        kind
            ``"large"``: among the genes with the highest values. ``"mini"``: among the others. ``"decoder"``: among
            all. Each row is part of a distribution over all keys of the stack.
        genes
            Names or ids of genes; NaN where a cell has a gene in the other encoder. For the large encoder all of its
            genes by default, in the order of ``encode(tokens).top_indices``; the other stacks need them.
        average_heads
            Mean over heads.
        average_layers
            Mean over all layers, whatever ``layer`` is.
        rank
            Replace the weights of each query and head by their ranks among the chosen keys, divided by their number.
        upstream_compat
            Evaluate each layer after its own attention update, as the authors' code does.
        tie_break
            As for cell embeddings.
        """
        return attention_map(
            self.module,
            tokens,
            layer,
            kind=kind,
            places=self.gene_ids(genes),
            average_heads=average_heads,
            average_layers=average_layers,
            rank=rank,
            upstream_compat=upstream_compat,
            tie_break=tie_break,
        )

    def _pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .objective import masked_value_loss

        return masked_value_loss(self, tokens, generator, **options)

    def objective_options(self) -> set[str] | None:
        """Names of the options of :meth:`pretraining_loss`."""
        from .objective import masked_value_loss

        return keyword_options(masked_value_loss)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _rows(self, genes: Tensor | None) -> Tensor:
        """Positions of the wanted genes; all genes, but not PAD, by default."""
        if genes is not None:
            return genes
        return torch.as_tensor(np.flatnonzero(self.vocab.is_gene), device=self.device)

    def _states(
        self, tokens: TokenBatch, rows: Tensor | None, key_max: KeyMax, tie_break: TieBreak
    ) -> Iterator[tuple[int, Tensor]]:
        """States cell by cell, or of the whole batch if its cells depend on each other, with the first cell's number."""
        step = max(1, len(tokens)) if key_max == "batch" else 1
        for start in range(0, len(tokens), step):
            cells = tokens.select(slice(start, start + step))
            yield start, self.module(cells, rows=rows, key_max=key_max, tie_break=tie_break)

    def _nan(self, tokens: TokenBatch, *shape: int) -> Tensor:
        return torch.full((len(tokens), *shape), torch.nan, dtype=self.module.stream_dtype, device=self.device)

    @staticmethod
    def _fill(out: Tensor, where: Tensor | None, start: int, values: Tensor) -> None:
        cells = slice(start, start + len(values))
        out[cells if where is None else where[cells]] = values
