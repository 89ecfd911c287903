"""The contract of every backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from .._errors import UnsupportedError
from ._device import resolve_device, resolve_dtype, warn_if_slow
from ._keywords import keyword_options
from ._kinds import kinds_with
from ._tasks import TaskMethods

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor, nn

    from .._settings import Precision
    from ..checkpoints.convert import LoadReport
    from ..genes import GeneMatch, GeneVocab
    from ._tokens import TokenBatch

    Genes = Sequence[str] | Sequence[int] | np.ndarray | Tensor

CAPABILITIES = {
    "embeds": "cell embeddings",
    "gene_embeddings": "static gene embeddings",
    "gene_states": "contextual gene embeddings",
    "reconstructs": "reconstructed expression",
    "attends": "attention maps",
    "cell_attends": "attention of the token of a cell to genes",
    "generates": "generation of expression from a prompt",
    "enhances_depth": "read-depth enhancement",
    "pretrains": "a pre-training objective",
    "multiomics": "a network for several modalities",
    "perturbs": "responses to perturbations",
}


@dataclass(frozen=True)
class Provenance:
    """Where weights come from; stored with every result."""

    id: str
    path: str = ""
    sha256: str = ""
    licence: str = ""
    citation: str = ""
    weights: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def start_sha256(self) -> str:
        """Checksum of the file that weights come from which were trained or given another form since."""
        origins = (self.extra.get(name, {}) for name in ("rebuilt", "source"))
        return next((origin["sha256"] for origin in origins if origin.get("sha256")), self.sha256)


@dataclass
class Checkpoint:
    """What a backbone's reader returns: everything needed to build the network and fill it.

    ``weights`` names the weight set that was read, ``file`` the file it lies in; both go into the provenance.
    """

    config: Any
    vocab: GeneVocab
    state_dict: dict[str, Tensor]
    report: LoadReport
    weights: str = ""
    file: str = ""


@dataclass(frozen=True)
class GeneRows:
    """Something about genes of some cells, one row for each pair of cell and gene.

    Parameters
    ----------
    cells
        Number of the cell in its token batch, shape ``(rows,)``.
    genes
        Vocabulary id of the gene, shape ``(rows,)``.
    values
        What is known about the pair, shape ``(rows,)`` or ``(rows, dim)``.
    """

    cells: Tensor
    genes: Tensor
    values: Tensor


class Backbone(TaskMethods, ABC):
    """A foundation model ready for inference.

    Built by :func:`scfm.load`. All methods are batched and give the same numbers for a cell whatever other cells
    are in the batch.

    Attributes
    ----------
    config
        Frozen dataclass with every hyper-parameter.
    vocab
        The genes of the model, :class:`scfm.genes.GeneVocab`.
    module
        The :class:`torch.nn.Module`.
    load_report
        Which keys of the checkpoint went where, :class:`scfm.checkpoints.LoadReport`.
    provenance
        Checkpoint id, SHA-256, licence, citation.
    """

    kind: ClassVar[str]
    capabilities: ClassVar[frozenset[str]]
    poolings: ClassVar[tuple[str, ...]]
    specials: ClassVar[tuple[str, ...]] = ()
    expression_scale: ClassVar[str] = ""
    # the option of the tokenizer that says that values are normalised already
    normalized_option: ClassVar[str] = ""
    # entries of the state dict that are data, such as a graph; copies with fresh weights keep them
    constants: ClassVar[tuple[str, ...]] = ()
    # entries of the state dict with a row for each entry of the vocabulary, in its order; further rows may follow
    vocab_tables: ClassVar[tuple[str, ...]] = ()
    # regular expressions for whole names of submodules: where low-rank adapters go, and what embeds genes and values
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    embedding_modules: ClassVar[tuple[str, ...]] = ()
    # names of the lists of layers, each in the order in which data pass through them
    layer_stacks: ClassVar[tuple[str, ...]] = ("layers",)
    # classifiers that a network of this kind can hold, the one of the paper first; other heads lie outside of it
    class_heads: ClassVar[tuple[str, ...]] = ()
    # those of them that can be trained along with the prediction of hidden genes, in one forward pass
    joint_heads: ClassVar[tuple[str, ...]] = ()
    # names of the submodules that belong to a task, not to the pre-trained model
    head_modules: ClassVar[tuple[str, ...]] = ()
    # names of the weights, of a checkpoint that holds several, that the authors take for "annotation" (fine-tuning),
    # "expression" and "integration"
    task_weights: ClassVar[Mapping[str, str]] = {}
    # whether the authors fine-tune for the integration of batches: integration_config and _integration_loss do it
    integrates: ClassVar[bool] = False
    # names of the submodules with weights for single batches of the data
    batch_modules: ClassVar[tuple[str, ...]] = ()
    # options of attention() with which scores become a network of genes, as the authors do it where they do
    network_attention: ClassVar[Mapping[str, Any]] = {}
    # regular expressions for whole names of parameters that a training pass changes by itself, beside the optimiser
    self_changing: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        vocab: GeneVocab,
        *,
        name: str,
        load_report: LoadReport,
        provenance: Provenance | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(requires_grad=False)
        self.config = config
        self.vocab = vocab
        self.name = name
        self.load_report = load_report
        self.provenance = provenance or Provenance(id=name)

    # -- what a backbone class implements ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether ``path`` is a folder with an official checkpoint of this model, or the weight file of one."""

    @classmethod
    @abstractmethod
    def read_official(cls, directory: Path, **options: Any) -> Checkpoint:
        """Read an official checkpoint without executing code from it."""

    @classmethod
    def read_vocab(cls, directory: Path, **options: Any) -> GeneVocab:
        """Read only the genes of an official checkpoint; override it where that works without the weights."""
        return cls.read_official(directory, **options).vocab

    @classmethod
    @abstractmethod
    def config_from_dict(cls, values: dict[str, Any]) -> Any:
        """Rebuild the config from what :meth:`config_to_dict` wrote."""

    @classmethod
    def config_for(cls, values: dict[str, Any], vocab: GeneVocab) -> Any:
        """Config of a new network for the genes of ``vocab``; override it where their number is a hyper-parameter."""
        return cls.config_from_dict(values)

    def config_to_dict(self) -> dict[str, Any]:
        """Config as JSON-writable values."""
        return asdict(self.config)

    @classmethod
    @abstractmethod
    def build(cls, config: Any, vocab: GeneVocab) -> nn.Module:
        """Make the network with fresh (random) weights."""

    @abstractmethod
    def tokenize(self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, **options: Any) -> TokenBatch:
        """Turn counts of known genes into tokens."""

    @abstractmethod
    def batch(self, *arrays: Any, **options: Any) -> TokenBatch:
        """Build a token batch from arrays for people who tokenise themselves."""

    @abstractmethod
    def embedding_dim(self, pooling: str | None = None, **options: Any) -> int:
        """Width of :meth:`embed` with the same pooling and options."""

    def pooling_options(self, pooling: str, match: GeneMatch) -> dict[str, Any]:
        """Options of :meth:`embed` for poolings whose result depends on the genes of the data."""
        return {}

    def tokenize_for_training(
        self, counts: csr_matrix, genes: Sequence[str] | np.ndarray | GeneMatch, generator: torch.Generator
    ) -> TokenBatch:
        """Tokens as the pre-training objective expects them; ``generator`` drives what is random about them."""
        return self.tokenize(counts, genes)

    def set_gene_annotations(self, annotations: str | Path) -> None:
        """Give a new network what is known about its genes, from a file; for models that learn from such."""
        msg = f"{self.kind} learns nothing from annotations of genes; leave them out"
        raise UnsupportedError(msg)

    @property
    def gene_tables(self) -> list[torch.nn.Parameter]:
        """Learned vectors of the vocabulary entries, of those tables that hold one for each."""
        parameters = dict(self.module.named_parameters())
        return [parameters[name] for name in self.vocab_tables if name in parameters and parameters[name].ndim == 2]

    def set_gene_vectors(self, vectors: np.ndarray, *, norm: float | None = None) -> None:
        """Let a new network start from given vectors of its genes instead of random ones.

        Parameters
        ----------
        vectors
            Array ``(n_genes, dim)`` in the order of ``vocab.genes``, as wide as the :attr:`gene_tables`.
        norm
            Mean length to which they are scaled, by default that of the random ones.

        Raises
        ------
        UnsupportedError
            If the model has no table of gene vectors.
        ValueError
            If the shape is another one.
        """
        if not self.gene_tables:
            msg = f"{self.kind} has no table of gene vectors; leave gene_vectors out"
            raise UnsupportedError(msg)
        values, genes = np.asarray(vectors, dtype=np.float64), torch.from_numpy(np.flatnonzero(self.vocab.is_gene))
        for table in self.gene_tables:
            if values.shape != (self.vocab.n_genes, table.shape[1]):
                msg = f"the vectors have the shape {values.shape}, not {(self.vocab.n_genes, table.shape[1])}"
                raise ValueError(msg)
            rows = genes.to(table.device)
            with torch.no_grad():
                wanted = float(table[rows].double().norm(dim=1).mean()) if norm is None else norm
                scaled = torch.from_numpy(values * (wanted / np.linalg.norm(values, axis=1).mean()))
                table[rows] = scaled.to(table.device, table.dtype)

    def expected_values(self, options: Mapping[str, Any]) -> Literal["counts", "normalized", "any"]:
        """What a matrix has to hold for these tokenizer options.

        ``"normalized"`` if the options say that the values are normalised already, ``"any"`` if counts and other
        values both serve. Negative, missing and infinite values are never allowed.
        """
        return "counts"

    def prepare(self, blocks: Any, match: GeneMatch, options: dict[str, Any]) -> dict[str, Any]:
        """Complete tokenizer options that depend on the whole data set; ``blocks`` yields CSR blocks."""
        return options

    # what a class says it can do in `capabilities`, it implements here
    def _embed(self, tokens: TokenBatch, pooling: str, **options: Any) -> Tensor: ...
    def _gene_embeddings(self) -> Tensor: ...
    def _gene_states(self, tokens: TokenBatch, **options: Any) -> Any: ...
    def _iter_gene_states(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]: ...
    def _reconstruct(self, tokens: TokenBatch, **options: Any) -> Tensor: ...
    def _iter_reconstruction(self, tokens: TokenBatch, genes: Tensor | None) -> Iterator[GeneRows]: ...
    def _attention(self, tokens: TokenBatch, layer: int, **options: Any) -> Tensor: ...
    def _cell_attention(self, tokens: TokenBatch, genes: Tensor | None, **options: Any) -> Tensor: ...
    def _pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator, **options: Any) -> Any: ...

    def _cell_states(self, tokens: TokenBatch, pooling: str, **options: Any) -> Tensor:
        return self._embed(tokens, pooling, **options)

    # -- what everybody calls ------------------------------------------------------------------------------------

    @property
    def default_pooling(self) -> str:
        """The pooling the authors use."""
        return self.poolings[0]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    def to(self, device: str = "auto", precision: Precision = "auto") -> Backbone:
        """Move to a device and floating-point type, in place; returns the backbone itself."""
        device = resolve_device(device)
        dtype = resolve_dtype(precision, device)
        warn_if_slow(device, dtype)
        self.module.to(device=device, dtype=dtype)
        return self

    def check_pooling(self, pooling: str | None) -> str:
        """Return a valid pooling name or raise ``ValueError``."""
        pooling = self.default_pooling if pooling is None else pooling
        if pooling not in self.poolings:
            msg = f"{self.kind} has no pooling {pooling!r}; choose one of {', '.join(self.poolings)}"
            raise ValueError(msg)
        return pooling

    def require(self, capability: str) -> None:
        """Raise :class:`scfm.UnsupportedError` unless the model has ``capability``."""
        if capability not in self.capabilities:
            able = ", ".join(kinds_with(lambda cls: capability in cls.capabilities)) or "none"
            msg = f"{self.name} ({self.kind}) cannot give {CAPABILITIES.get(capability, capability)}. Models that can: {able}."
            raise UnsupportedError(msg)

    @torch.inference_mode()
    def embed(self, tokens: TokenBatch, *, pooling: str | None = None, **options: Any) -> Tensor:
        """Cell embeddings, float32, shape ``(cells, dim)``; NaN rows for cells without any usable token."""
        self.require("embeds")
        pooling = self.check_pooling(pooling)
        dim = self.embedding_dim(pooling, **options)
        return self._with_nan(tokens, lambda valid: self._embed(valid, pooling, **options), dim)

    @torch.inference_mode()
    def gene_embeddings(self) -> Tensor:
        """Static gene embeddings, float32, shape ``(len(vocab), dim)``; row ``i`` belongs to id ``i``."""
        self.require("gene_embeddings")
        return self._gene_embeddings().float()

    @torch.inference_mode()
    def gene_states(self, tokens: TokenBatch, **options: Any) -> Any:
        """Contextual gene embeddings; see the documentation of the model for the shape."""
        self.require("gene_states")
        return self._gene_states(tokens.to(self.device), **options)

    @property
    def gene_state_dim(self) -> int:
        """Width of contextual gene embeddings; override it where they are not as wide as the static ones."""
        return self.gene_embeddings().shape[1]

    @torch.inference_mode()
    def iter_gene_states(self, tokens: TokenBatch, genes: Genes | None = None) -> Iterator[GeneRows]:
        """Contextual gene embeddings a few cells at a time, in one form for all models.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or vocabulary ids of the wanted genes; all by default.

        Yields
        ------
        Rows of width :attr:`gene_state_dim` for the genes of a cell that the model has a state of. Which these are
        depends on the model: those expressed, or all. Cells that are not valid have none.
        """
        self.require("gene_states")
        tokens, rows = self._usable(tokens.to(self.device))
        if len(tokens):
            yield from _renumbered(self._iter_gene_states(tokens, self.gene_ids(genes)), rows)

    @torch.inference_mode()
    def iter_reconstruction(self, tokens: TokenBatch, genes: Genes | None = None) -> Iterator[GeneRows]:
        """Predicted expression a few cells at a time, in one form for all models.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or vocabulary ids of genes to predict in every cell; by default the expressed genes of each cell.

        Yields
        ------
        One number per row, on the scale that ``expression_scale`` names. Cells that are not valid have no rows.
        """
        self.require("reconstructs")
        tokens, rows = self._usable(tokens.to(self.device))
        if len(tokens):
            yield from _renumbered(self._iter_reconstruction(tokens, self.gene_ids(genes)), rows)

    def gene_ids(self, genes: Genes | None, n_ids: int | None = None) -> Tensor | None:
        """Vocabulary ids of genes given by name or id, on the device of the model; ``None`` stays ``None``.

        Parameters
        ----------
        genes
            Names or ids.
        n_ids
            Ids have to be smaller than this, by default the size of the vocabulary.

        Raises
        ------
        KeyError
            If a name is not in the vocabulary.
        ValueError
            If ids are out of range, or ``genes`` is no list of names or ids.
        """
        if genes is None:
            return None
        n_ids = len(self.vocab) if n_ids is None else n_ids
        ids = genes.cpu().numpy() if isinstance(genes, torch.Tensor) else np.asarray(genes)
        if ids.ndim == 1 and ids.dtype.kind in "UOT":
            ids = np.array([self.vocab[name] for name in ids], dtype=np.int64)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
            msg = "genes must be a list of gene names or of vocabulary ids"
            raise ValueError(msg)
        if len(ids) and (ids.min() < 0 or ids.max() >= n_ids):
            msg = f"gene ids must lie between 0 and {n_ids - 1}"
            raise ValueError(msg)
        return torch.as_tensor(ids.astype(np.int64), device=self.device)

    @torch.inference_mode()
    def reconstruct(self, tokens: TokenBatch, **options: Any) -> Any:
        """Predicted expression; see the documentation of the model for the shape and the scale."""
        self.require("reconstructs")
        return self._reconstruct(tokens.to(self.device), **options)

    @torch.inference_mode()
    def attention(self, tokens: TokenBatch, layer: int = -1, **options: Any) -> Any:
        """Attention maps of one layer; see the documentation of the model for the shape."""
        self.require("attends")
        return self._attention(tokens.to(self.device), layer, **options)

    @torch.inference_mode()
    def cell_attention(self, tokens: TokenBatch, genes: Genes | None = None, **options: Any) -> Tensor:
        """Ranks of the genes in the attention of the token that stands for the cell.

        Parameters
        ----------
        tokens
            Token batch.
        genes
            Names or ids of wanted genes; all tokens in their order by default.
        **options
            See the documentation of the model.

        Returns
        -------
        Shape ``(cells, genes)``, float32; NaN where a cell has no such token.
        """
        self.require("cell_attends")
        return self._cell_attention(tokens.to(self.device), self.gene_ids(genes), **options)

    def pretraining_loss(self, tokens: TokenBatch, generator: torch.Generator | None = None, **options: Any) -> Any:
        """The paper's pre-training objective; the random part is drawn from ``generator``."""
        self.require("pretrains")
        return self._pretraining_loss(tokens.to(self.device), generator, **options)

    @property
    def objective_schedule(self) -> dict[int, dict[str, Any]]:
        """Options of :meth:`pretraining_loss` in the published pre-training, by the first step they are for."""
        return {}

    @property
    def needs_batch_labels(self) -> bool:
        """Whether the network can only be trained on cells whose batch is known."""
        return False

    def objective_options(self) -> set[str] | None:
        """Names of the options of :meth:`pretraining_loss`; ``None`` if only a call can tell."""
        return keyword_options(self._pretraining_loss)

    def check_objective(self, options: Iterable[str]) -> None:
        """Raise unless :meth:`pretraining_loss` has options of these names.

        Raises
        ------
        UnsupportedError
            If the model has no pre-training objective.
        ValueError
            If a name is unknown.
        """
        self.require("pretrains")
        known = self.objective_options()
        if known is not None and (unknown := [name for name in options if name not in known]):
            msg = (
                f"the objective of {self.kind} has no option {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
            raise ValueError(msg)

    def cell_states(self, tokens: TokenBatch, *, pooling: str | None = None, **options: Any) -> Tensor:
        """Cell embeddings with gradients if they are enabled, before any normalisation, ``(cells, dim)``.

        Heads that are fine-tuned start from them. All cells have to be valid.
        """
        self.require("embeds")
        return self._cell_states(tokens.to(self.device), self.check_pooling(pooling), **options)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Save weights, config, vocabulary and provenance to a directory that :func:`scfm.load` reads."""
        from ..checkpoints import store

        return store.save_backbone(self, path, overwrite=overwrite)

    def _token_rows(self, tokens: TokenBatch, values: Tensor, genes: Tensor | None) -> GeneRows:
        """Rows of the tokens that are genes (and among ``genes``), from one value or vector per token."""
        wanted = torch.zeros(len(self.vocab), dtype=torch.bool, device=self.device)
        wanted[torch.tensor(self.vocab.is_gene, device=self.device) if genes is None else genes] = True
        kept = wanted[tokens.flat_ids]
        return GeneRows(tokens.flat_cells[kept], tokens.flat_ids[kept], values[kept])

    @staticmethod
    def _usable(tokens: TokenBatch) -> tuple[TokenBatch, Tensor | None]:
        """The valid cells, and their numbers unless they are all."""
        if tokens.valid is None or bool(tokens.valid.all()):
            return tokens, None
        rows = torch.nonzero(tokens.valid).squeeze(1)
        return tokens.select(rows.cpu()), rows

    def _with_nan(self, tokens: TokenBatch, run: Any, dim: int) -> Tensor:
        tokens = tokens.to(self.device)
        usable, rows = self._usable(tokens)
        if rows is None:
            return run(tokens).float() if len(tokens) else torch.empty(0, dim, device=self.device)
        out = torch.full((len(tokens), dim), torch.nan, device=self.device)
        if len(usable):
            out[rows] = run(usable).float()
        return out

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}: {self.n_parameters / 1e6:.1f} M parameters, "
            f"{len(self.vocab):,} vocabulary entries, {self.dtype}, {self.device})".replace("torch.", "")
        )


def _renumbered(parts: Iterator[GeneRows], rows: Tensor | None) -> Iterator[GeneRows]:
    for part in parts:
        yield part if rows is None else replace(part, cells=rows[part.cells])
