"""What a pre-training run is made of, as a YAML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ._numbers import integer, real
from ._presets import OPTIMIZATIONS, Optimization
from ._trainer import choose_precision

_PATHS = ("genes", "annotations")
_LEAST = {
    **dict.fromkeys(("n_genes", "max_steps", "max_epochs", "batch_size", "tokens_per_batch", "accumulate"), 1),
    **dict.fromkeys(("log_every", "validate_every", "save_every", "block_size", "buffer_cells"), 1),
    **dict.fromkeys(("validation_cells", "min_genes", "readers", "seed"), 0),
}
_REALS = ("measured_share", "gene_vector_norm", "validation_share")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of :func:`scfm.train.pretrain`.

    Parameters
    ----------
    name
        Name of the new checkpoint.
    sources
        Files with raw counts (``.h5ad`` or ``.zarr``).
    kind
        Backbone class of a network with fresh weights.
    checkpoint
        Name or path of a checkpoint whose training goes on, instead of ``kind``; it brings its own genes and config.
    config
        Hyper-parameters of the network.
    n_genes
        Size of the vocabulary.
    gene_choice
        ``"frequent"`` for the genes detected in the largest share of cells, ``"variable"`` for those whose log-normalised
        counts vary most; see :func:`scfm.train.frequent_genes` and :func:`scfm.train.variable_genes`.
    measured_share
        Share of the cells that have to come from sources that measure a variable gene.
    genes
        Text file with the genes of the vocabulary, one in a line, instead of a choice.
    annotations
        File of genes and their Gene Ontology terms, from which scLong's graph is made for the vocabulary; see
        ``scfm.backbones.sclong.read_annotations``.
    gene_vectors
        ``"coexpression"`` lets the network start from vectors that :func:`scfm.train.coexpression_vectors` makes of the
        sources, as scLong starts from gene2vec, instead of random ones.
    gene_vector_norm
        Mean length of these vectors; by default that of random ones.
    layer
        Layer with the counts; ``X`` by default.
    max_steps, max_epochs
        Length of the run; ``max_steps`` counts if both are given.
    batch_size
        Cells in a micro-batch, which passes through the network at once.
    tokens_per_batch
        Most tokens in a micro-batch, padding included; ``batch_size`` then is an upper bound.
    accumulate
        Micro-batches of each process in an optimiser step.
    optimization
        Optimiser, clipping and schedule: fields of :class:`Optimization`, among them ``preset``, by default the kind of
        the network.
    objective
        Options of the backbone's objective, see the page of the model.
    objective_from
        Options that change on the way, by the first step they are for, counted from 0, such as
        ``{1001: {cell_prompt: true}}``. Without ``objective`` and ``objective_from``, a network with fresh weights is
        trained with the published changes: scGPT is generated from the cell embedding after the first 1,001 steps.
    validation_share
        Share of cells that are never trained on.
    validation_cells
        Most of them that are looked at for the loss curve.
    log_every, validate_every, save_every
        Optimiser steps between rows of the loss curve, losses of held-out cells, and saved states of the run.
    precision
        ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; weights are float32 in all of them.
    gradient_checkpointing
        Compute activations again in the backward pass, to save memory.
    min_genes
        Cells with fewer expressed genes of the vocabulary are left out.
    in_memory
        Whether to read all counts at once; by default if they fit into about a gigabyte.
    block_size
        Cells that are read together from files; by default 1 in memory, 128 otherwise. More is faster and shuffles
        less thoroughly.
    buffer_cells
        Cells that are in memory to be shuffled, over all processes.
    readers
        Processes that read files, for each process that trains.
    seed
        Seed of weights, order of cells, masks and dropout.

    Raises
    ------
    ValueError
        If neither or both of ``kind`` and ``checkpoint`` are given, there is no source, a checkpoint is to get another
        config, other genes or annotations, a field of ``optimization`` is unknown, or a number makes no sense.
    """

    name: str
    sources: tuple[str, ...]
    kind: str | None = None
    checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    n_genes: int = 8000
    gene_choice: Literal["frequent", "variable"] = "frequent"
    measured_share: float = 0.95
    genes: str | None = None
    annotations: str | None = None
    gene_vectors: str | None = None
    gene_vector_norm: float | None = None
    layer: str | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    batch_size: int = 32
    tokens_per_batch: int | None = None
    accumulate: int = 1
    optimization: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    objective_from: dict[int, dict[str, Any]] = field(default_factory=dict)
    validation_share: float = 0.05
    validation_cells: int = 256
    log_every: int = 100
    validate_every: int = 100
    save_every: int = 1000
    precision: str = "32-true"
    gradient_checkpointing: bool = False
    min_genes: int = 2
    in_memory: bool | None = None
    block_size: int | None = None
    buffer_cells: int = 16_384
    readers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(name, getattr(self, name), least=least))
        for name in _REALS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real(name, getattr(self, name)))
        sources = (self.sources,) if isinstance(self.sources, (str, Path)) else self.sources
        object.__setattr__(self, "sources", tuple(str(source) for source in sources))
        steps = {
            integer("objective_from", step, least=0): dict(options) for step, options in self.objective_from.items()
        }
        object.__setattr__(self, "objective_from", steps)
        object.__setattr__(self, "precision", choose_precision(self.precision))
        if (self.kind is None) == (self.checkpoint is None):
            msg = "a recipe needs either kind (a new network) or checkpoint (one that is trained further)"
            raise ValueError(msg)
        if self.checkpoint is not None and (self.config or self.genes or self.annotations or self.gene_vectors):
            msg = "config, genes, annotations and gene_vectors come with the checkpoint; leave them out"
            raise ValueError(msg)
        if self.gene_choice not in ("frequent", "variable"):
            msg = f"gene_choice must be 'frequent' or 'variable'; got {self.gene_choice!r}"
            raise ValueError(msg)
        if self.gene_vectors not in (None, "coexpression"):
            msg = f"gene_vectors must be 'coexpression' or left out; got {self.gene_vectors!r}"
            raise ValueError(msg)
        if not 0 <= self.validation_share < 1:
            msg = f"validation_share must be at least 0 and less than 1; got {self.validation_share}"
            raise ValueError(msg)
        Optimization.from_dict(self.optimization)
        if not self.sources:
            msg = "there is nothing to train on: a recipe needs sources, files with raw counts"
            raise ValueError(msg)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file; relative paths are taken from the folder of the file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no YAML, or no recipe.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"there is no recipe at {path}; give a YAML file, see scfm.train.Recipe"
            raise FileNotFoundError(msg)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            msg = f"{path} is no valid YAML: {error}"
            raise ValueError(msg) from error
        if not isinstance(values, dict):
            msg = f"{path} holds no mapping of recipe fields"
            raise ValueError(msg)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            msg = f"{path}: unknown fields {', '.join(unknown)}; a recipe has {', '.join(sorted(known))}"
            raise ValueError(msg)
        if missing := [name for name in ("name", "sources") if values.get(name) is None]:
            msg = f"{path}: a recipe needs {' and '.join(missing)}"
            raise ValueError(msg)
        sources = values.pop("sources")
        sources = [sources] if isinstance(sources, str) else sources
        values |= {name: str(path.parent / values[name]) for name in _PATHS if values.get(name) is not None}
        try:
            return cls(sources=tuple(str(path.parent / source) for source in sources), **values)
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from error

    def write(self, path: str | Path) -> None:
        """Write a YAML file that :meth:`read` understands, without fields that have their default."""
        defaults = {f.name: f.default if f.default_factory is dict else f.default for f in fields(self)}
        values = {name: value for name, value in asdict(self).items() if value not in (defaults[name], {})}
        values["sources"] = [str(Path(source).resolve()) for source in self.sources]
        values |= {name: str(Path(values[name]).resolve()) for name in _PATHS if name in values}
        Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def changed(self, **values: Any) -> Recipe:
        """A copy with the fields that are not ``None``; a new ``checkpoint`` takes the place of ``kind``."""
        values = {name: value for name, value in values.items() if value is not None}
        if "checkpoint" in values:
            values |= {
                "kind": None,
                "config": {},
                "genes": None,
                "annotations": None,
                "gene_vectors": None,
                "gene_vector_norm": None,
            }
        if "max_epochs" in values and "max_steps" not in values:
            values["max_steps"] = None
        return replace(self, **values)

    def optimization_for(self, kind: str) -> Optimization:
        """Optimiser and schedule for a network of this kind."""
        base = {"preset": kind} if kind in OPTIMIZATIONS else {}
        return Optimization.from_dict({**base, **self.optimization})
