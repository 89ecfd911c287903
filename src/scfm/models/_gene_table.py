"""Genes with a vector each, found by any of their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _logging, engine
from ..backbones import Backbone, load
from ..data import open_source
from ..genes import AliasTable, GeneVocab, resolve_gene_names

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData


@dataclass(frozen=True)
class GeneTable:
    """Genes and their vectors.

    Parameters
    ----------
    vocab
        The genes.
    values
        Their vectors, float32, ``(len(vocab), dim)``; NaN for genes without one.
    origin
        Where the vectors come from.
    aliases
        Table of other names.
    """

    vocab: GeneVocab
    values: np.ndarray
    origin: str
    aliases: AliasTable | None = None

    @property
    def names(self) -> np.ndarray:
        """Names of the genes that have a vector."""
        return self.vocab.names[self.vocab.is_gene & np.isfinite(self.values).all(1)]

    def rows(self, genes: Sequence[str] | np.ndarray | pd.Index) -> np.ndarray:
        """Row of each gene, given as symbol or Ensembl id; -1 for those without a vector."""
        ids = self.vocab.match(genes, aliases=self.aliases).ids
        usable = (ids >= 0) & np.isfinite(self.values[ids]).all(1)
        return np.where(usable, ids, -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows; NaN where the row is -1."""
        return engine.by_column(self.values, rows)


def gene_table(
    model: str | os.PathLike[str] | Backbone | None,
    *,
    embeddings: pd.DataFrame | None = None,
    adata: AnnData | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Any = None,
    tokenize: Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
) -> GeneTable:
    """Vectors of genes from what is given; see :class:`scfm.models.GeneClassifier`.

    Raises
    ------
    KeyError
        If ``adata`` has no slot ``use_rep``.
    ValueError
        If not exactly one source of vectors is given.
    """
    table = AliasTable.resolve(aliases) or None
    given = [
        name
        for name, value in (("model=", model), ("embeddings=", embeddings), ("use_rep=", use_rep))
        if value is not None
    ]
    if len(given) != 1:
        msg = f"give one source of gene vectors: model=, embeddings=, or adata= with use_rep=; got {' and '.join(given) or 'none'}"
        raise ValueError(msg)
    if embeddings is not None:
        names = pd.Index(embeddings.index.astype(str))
        return _of_names(names, None, embeddings.to_numpy(dtype=np.float32), "embeddings", table)
    if use_rep is not None:
        if adata is None or use_rep not in adata.varm:
            there = "none" if adata is None else ", ".join(map(str, adata.varm)) or "none"
            msg = f"varm has no slot {use_rep!r}; there are {there}. scfm.tl.gene_embeddings writes some"
            raise KeyError(msg)
        found = resolve_gene_names(adata.var, gene_symbols, gene_ids)
        values = np.asarray(adata.varm[use_rep], dtype=np.float32)
        return _of_names(pd.Index(found.symbols), found.ensembl_ids, values, f"varm[{use_rep!r}]", table)
    backbone = model if isinstance(model, Backbone) else load(model, device=device)
    if adata is None:
        values = backbone.gene_embeddings().cpu().numpy().copy()
        values[~backbone.vocab.is_gene] = np.nan
        return GeneTable(backbone.vocab, values, backbone.provenance.id, table)
    backbone.require("gene_states")
    found = resolve_gene_names(adata.var, gene_symbols, gene_ids)
    match = backbone.vocab.match(found.symbols, ensembl_ids=found.ensembl_ids, aliases=table)
    match.require_any(backbone.name)
    options = {"rng": seed} if "rng" in engine.accepted_options(backbone) else {}
    options |= dict(tokenize or {})
    with open_source(adata, layer=layer) as source:
        engine.check_options(backbone, options, source.n_obs)
        start = _logging.info(f"gene states of {source.n_obs:,} cells with {backbone!r}", deep=match.summary())
        task = engine.Task(backbone, source, match, options)
        means = engine.GeneMeans(task, np.zeros(source.n_obs, dtype=np.int64), 1, np.unique(match.ids[match.ids >= 0]))
        means.run(None)
        _logging.info("    finished", time=start)
    values = means.of_columns()[0]
    return _of_names(
        pd.Index(found.symbols), found.ensembl_ids, values, f"{backbone.provenance.id} (contextual)", table
    )


def _of_names(
    names: pd.Index, ensembl_ids: np.ndarray | None, values: np.ndarray, origin: str, aliases: AliasTable | None
) -> GeneTable:
    if values.ndim != 2 or len(values) != len(names):
        msg = f"vectors of genes need one row for each of {len(names)} genes, not the shape {values.shape}"
        raise ValueError(msg)
    kept = (~names.duplicated()) & (names != "")
    ids = None if ensembl_ids is None else ensembl_ids[kept]
    return GeneTable(GeneVocab(names[kept], ensembl_ids=ids), values[kept], origin, aliases)
