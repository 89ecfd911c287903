"""Codes of cells, between which treatments move them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from .. import _logging, engine
from ..data import open_source
from ..engine._options import options_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_matrix
    from torch import Tensor

BLOCK = 512


class TransportCodes:
    """What the code of a cell is made from: its expression, a slot of ``obsm``, or the embedding of a model."""

    def _dim(self, adata: AnnData) -> int:
        """Width of what codes are made from."""
        if self._made["space"] == "autoencoder":
            return len(self.genes)
        if self._made["space"] == "obsm":
            return self._rep(adata).shape[1]
        match = self._match()
        pooling = self.backbone.check_pooling(self._made["pooling"])
        return self.backbone.embedding_dim(pooling, **self.backbone.pooling_options(pooling, match))

    def _rep(self, adata: AnnData) -> np.ndarray:
        key = self._made["use_rep"]
        if key not in adata.obsm:
            msg = f"obsm has no slot {key!r}; there are {', '.join(map(str, adata.obsm)) or 'none'}"
            raise KeyError(msg)
        values = np.asarray(adata.obsm[key], dtype=np.float32)
        if values.ndim != 2 or np.isinf(values).any():
            msg = f"obsm[{key!r}] needs finite vectors of cells"
            raise ValueError(msg)
        return values

    def _task(self, expression: csr_matrix, totals: np.ndarray | None, names: pd.Index) -> engine.Task:
        """Cells for the engine, with the values that the network sees."""
        cells = AnnData(expression, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=self.genes.astype(str)))
        options = dict(self.backbone.fine_tuning("transport").tokenize) | self.backbone.normalized_input(totals)
        if "rng" in engine.accepted_options(self.backbone):
            options["rng"] = self._made["seed"]
        options |= self._made["tokenize"]
        source = open_source(cells)
        engine.check_options(self.backbone, options, source.n_obs)
        return engine.Task(self.backbone, source, self._match(), options)

    def _cells(self, adata: AnnData) -> tuple[Callable[[np.ndarray], Tensor], csr_matrix, np.ndarray]:
        """What is known about cells, by their numbers; their expression; and whether anything is known."""
        expression, totals = self._expression(adata)
        space, known = self._made["space"], np.ones(adata.n_obs, dtype=bool)
        if space in ("pca", "autoencoder"):
            return lambda rows: self._tensor(expression[rows].toarray()), expression, known
        if space == "obsm":
            values = self._rep(adata)
        else:
            task = self._task(expression, totals, adata.obs_names)
            if self._made["fine_tune"]:
                matched = task.match.ids >= 0
                known = np.asarray((expression[:, matched] > 0).sum(1)).ravel() > 0
                return self._tokens_to_states(task, expression), expression, known
            values = self._embeddings(task)
        return lambda rows: self._tensor(values[rows]), expression, np.isfinite(values).all(1)

    def _embeddings(self, task: engine.Task) -> np.ndarray:
        pooling = self.backbone.check_pooling(self._made["pooling"])
        options = self.backbone.pooling_options(pooling, task.match)
        result = engine.run(
            **task.inputs,
            compute=lambda backbone, tokens: backbone.embed(tokens, pooling=pooling, **options),
            shape=(self.backbone.embedding_dim(pooling, **options),),
            task={"output": "cell embedding", "pooling": pooling},
        )
        return result.array

    def _tokens_to_states(self, task: engine.Task, expression: csr_matrix) -> Callable[[np.ndarray], Tensor]:
        backbone, match = self.backbone, task.match
        pooling = backbone.check_pooling(self._made["pooling"])
        extra = backbone.pooling_options(pooling, match)
        given: set[str] = set()

        def states(rows: np.ndarray) -> Tensor:
            options = {
                name: value[rows] if isinstance(value, np.ndarray) else value
                for name, value in options_for(task.options, 0, expression.shape[0]).items()
            }
            with _logging.each_warning_once(given):
                tokens = backbone.tokenize(expression[rows], match, **options)
            return backbone.cell_states(tokens, pooling=pooling, **extra)

        return states

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self._place)

    @torch.no_grad()
    def _codes(self, cells: Callable[[np.ndarray], Tensor], rows: np.ndarray, size: int = BLOCK) -> Tensor:
        """Codes of cells, some at a time."""
        parts = [self.module["codec"].encode(cells(rows[i : i + size])) for i in range(0, len(rows), size)]
        return torch.cat(parts) if parts else torch.zeros(0, self._made["latent"], device=self._place)
