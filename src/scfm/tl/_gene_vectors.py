"""Vectors of genes for the tools that compare genes: from a slot of ``varm``, or what a model has learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import __version__
from ._inputs import load_backbone, match_genes, run_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from ._inputs import Aliases, Model


@dataclass(frozen=True)
class GeneVectors:
    """Genes of a data set with a vector each.

    Parameters
    ----------
    names
        Names of the genes, each once, in the order of the data set or in the order that was asked for.
    values
        Their vectors, float32, finite, ``(genes, dim)``.
    record
        Where they come from, to be stored in ``uns``.
    """

    names: pd.Index
    values: np.ndarray
    record: dict[str, Any]


def gene_vectors(
    adata: AnnData,
    model: Model | None,
    *,
    use_rep: str | None = None,
    genes: Sequence[str] | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    device: str = "auto",
    precision: str = "auto",
    weights: str | None = None,
) -> GeneVectors:
    """Vectors of the genes of ``adata``; genes without one are left out.

    Parameters
    ----------
    model
        Model whose static gene embeddings are taken; not loaded if ``use_rep`` is given.
    use_rep
        Slot of ``varm`` to take instead, for example contextual or fine-tuned embeddings.
    genes
        Names of genes of ``adata`` to restrict to; the result is in this order.

    Raises
    ------
    KeyError
        If ``use_rep`` or a gene does not exist.
    ValueError
        If there are not at least two genes with a vector.
    """
    columns = np.arange(adata.n_vars) if genes is None else _columns(adata, genes)
    if use_rep is not None:
        if use_rep not in adata.varm:
            msg = (
                f"varm has no slot {use_rep!r}; there are {', '.join(map(str, adata.varm)) or 'none'}. "
                "scfm.tl.gene_embeddings writes some"
            )
            raise KeyError(msg)
        values = np.asarray(adata.varm[use_rep], dtype=np.float32)[columns]
        record: dict[str, Any] = {"params": {"use_rep": use_rep}, "scfm_version": __version__}
        known = np.isfinite(values).all(1)
    elif model is None:
        msg = "name a model, or a slot of varm with use_rep="
        raise ValueError(msg)
    else:
        backbone = load_backbone(model, device=device, precision=precision, weights=weights)
        match = match_genes(backbone, adata.var, gene_symbols=gene_symbols, gene_ids=gene_ids, aliases=aliases)
        ids = match.ids[columns]
        # two columns of one gene have the same vector; the second would be the first one's perfect neighbour
        known = (ids >= 0) & ~pd.Series(ids).duplicated().to_numpy()
        table = backbone.gene_embeddings().float().cpu().numpy()
        values = np.zeros((len(ids), table.shape[1]), dtype=np.float32)
        values[known] = table[ids[known]]
        record = run_record(backbone, "adata.var", match, {})
    names = adata.var_names[columns]
    if known.sum() < 2:
        msg = f"{int(known.sum())} of {len(names):,} genes have a vector; at least two are needed"
        raise ValueError(msg)
    return GeneVectors(names[known], values[known], record)


def _columns(adata: AnnData, genes: Sequence[str]) -> np.ndarray:
    if isinstance(genes, str):
        msg = f"genes= needs a list of names, not the text {genes!r}"
        raise TypeError(msg)
    wanted = pd.Index(pd.unique(np.asarray(list(genes), dtype=object)))
    if not adata.var_names.is_unique:
        msg = "names of genes are not unique; call adata.var_names_make_unique() first"
        raise ValueError(msg)
    columns = adata.var_names.get_indexer(wanted)
    if (columns < 0).any():
        missing = wanted[columns < 0]
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        msg = f"adata has no gene {shown}"
        raise KeyError(msg)
    return columns
