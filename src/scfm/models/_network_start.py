"""Where a regulatory network starts from: what a model, or the expression itself, says about pairs of genes."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .. import _logging, engine
from ..baselines import correlation_matrix
from ..data import open_source
from ..metrics import cosine_adjacency, similarity_adjacency

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData
    from scipy import sparse
    from torch import Tensor

    from ..backbones import Backbone, GeneRows, TokenBatch
    from ..genes import GeneMatch

Start = Literal["paper", "code", "contextual", "static", "correlation", "random"]
OF_MODEL = ("paper", "code", "contextual", "static")
OF_DATA = ("correlation", "random")
_IN_MEMORY_BYTES = 2**30
_NOISE = 2e-4
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Cells:
    """Cells for a model to look at.

    Parameters
    ----------
    adata
        The data.
    layer
        Layer with the counts.
    match
        What each gene is to the model.
    options
        Options of the tokenizer.
    """

    adata: AnnData
    layer: str | None
    match: GeneMatch
    options: Mapping[str, Any]


def start_of_model(kind: Start, backbone: Backbone, cells: Cells) -> np.ndarray:
    """Adjacency from what a model says; see :class:`scfm.models.RegulatoryNetwork`.

    Genes that the model does not know, or has no state of, have the same weight for all others.
    """
    ids = cells.match.ids
    if kind == "static":
        backbone.require("gene_embeddings")
        return cosine_adjacency(engine.by_column(backbone.gene_embeddings().cpu().numpy(), ids))
    backbone.require("gene_states")
    with open_source(cells.adata, layer=cells.layer) as source:
        engine.check_options(backbone, cells.options, source.n_obs)
        start = _logging.info(f"gene states of {source.n_obs:,} cells with {backbone!r}")
        task = engine.Task(backbone, source, cells.match, dict(cells.options))
        if kind == "contextual":
            means = engine.GeneMeans(task, np.zeros(source.n_obs, dtype=np.int64), 1, np.unique(ids[ids >= 0]))
            means.run(None)
            adjacency = cosine_adjacency(means.of_columns()[0])
        elif kind == "paper":
            adjacency = cosine_adjacency(_collected(task, np.zeros((len(ids), source.n_obs), dtype=np.float32)))
        else:
            shape = len(ids), source.n_obs, backbone.gene_state_dim
            with _room(shape) as states:
                adjacency = similarity_adjacency(_collected(task, states), uniform_if_empty=True)
    _logging.info("    finished", time=start)
    return adjacency


def start_of_data(kind: Start, values: sparse.spmatrix, *, seed: int) -> np.ndarray:
    """Adjacency from expression ``(cells, genes)`` or, as in DeepSEM, from nothing: all the same, with a little noise."""
    n_genes = values.shape[1]
    if kind == "correlation":
        adjacency = np.abs(correlation_matrix(values))
    else:
        adjacency = 1 / (n_genes - 1) + np.random.default_rng(seed).random((n_genes, n_genes)) * _NOISE
    np.fill_diagonal(adjacency, 0)
    return adjacency.astype(np.float32)


def _collected(task: engine.Task, states: np.ndarray) -> np.ndarray:
    """States of the genes in each cell, ``(genes, cells, dim)``, or their means over ``dim``; zero where there is none."""
    ids = task.match.ids
    known, first = np.unique(ids[ids >= 0], return_index=True)
    place = np.full(len(task.backbone.vocab), -1)
    place[known] = np.flatnonzero(ids >= 0)[first]

    def compute(backbone: Backbone, tokens: TokenBatch) -> list[GeneRows]:
        return list(backbone.iter_gene_states(tokens, known))

    def consume(cells: np.ndarray, parts: list[GeneRows]) -> None:
        for part in parts:
            values = part.values.float()
            rows, columns = place[part.genes.cpu().numpy()], cells[part.cells.cpu().numpy()]
            states[rows, columns] = (values if states.ndim == 3 else _means(values)).cpu().numpy()

    engine.visit(**task.inputs, compute=compute, consume=consume)
    # two names of the same gene have the same states
    again = np.flatnonzero((ids >= 0) & (place[ids] != np.arange(len(ids))))
    for column in again:
        states[column] = states[place[ids[column]]]
    return states


def _means(values: Tensor) -> Tensor:
    """Mean of each state; a layer norm with fresh weights makes it zero, of which rounding must not make a pattern."""
    mean = values.mean(-1)
    return torch.where(mean.abs() > _ROUNDING * values.abs().mean(-1), mean, 0)


@contextmanager
def _room(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Zeros in memory, or in a temporary file if they are many."""
    if 4 * int(np.prod(shape, dtype=np.int64)) <= _IN_MEMORY_BYTES:
        yield np.zeros(shape, dtype=np.float32)
        return
    with tempfile.TemporaryDirectory(prefix="scfm-") as folder:
        states = np.memmap(Path(folder) / "states", dtype=np.float32, mode="w+", shape=shape)
        yield states
        del states


def scaled(adjacency: np.ndarray, scale: float | None, *, inverse: str, bound: float) -> np.ndarray:
    """A start that leaves ``I - A`` an inverse, with the same order of edges.

    Rows that sum to one, as published, make ``I - A`` singular. With the exact inverse the whole matrix is therefore
    divided by a number, if need be, until the smaller of its largest absolute row sum and column sum (which no eigenvalue
    exceeds) is ``bound``.
    """
    if scale is None:
        size = np.abs(adjacency)
        largest = float(min(size.sum(0).max(), size.sum(1).max()))
        scale = bound / largest if inverse == "exact" and largest > bound else 1.0
    return np.asarray(adjacency * np.float32(scale), dtype=np.float32)
