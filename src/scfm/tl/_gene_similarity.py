"""How alike genes are to a model, among the genes that are most alike to all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys, _logging
from ..tasks.gene_graph import VectorSpace
from ._gene_embeddings import gene_embeddings
from ._gene_vectors import gene_vectors
from ._inputs import check_can_hold_results, load_backbone, result_name, seed_of, storable
from ._labels import Labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model

_MOST_BYTES = 4 * 2**30


def gene_similarity(
    adata: AnnData,
    model: Model = "scgpt",
    *,
    use_rep: str | None = None,
    genes: Sequence[str] | None = None,
    n_genes: int | None = 50,
    markers: Sequence[str] | None = None,
    groupby: str | None = None,
    group: str | None = None,
    n_cells: int | None = 50,
    layer: str | None = None,
    key_added: str | None = None,
    weights: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    progress: bool | None = None,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Cosine similarity of genes, for the genes whose similarity to all others is largest.

    With ``groupby`` and ``group``, genes are compared by their mean states in some cells of that group, as the scLong paper does for
    marker genes of cell types. Otherwise the static embeddings of the model, or a slot of ``varm``, are compared.

    Parameters
    ----------
    adata
        Annotated data.
    model
        As in :func:`scfm.tl.embed`.
    use_rep
        Slot of ``varm`` with vectors to compare instead.
    genes
        Names of genes of ``adata`` to restrict to.
    n_genes
        Genes that are kept: those with the largest sum of similarities. ``None`` keeps all.
    markers
        Genes to name in the plot; those that have a vector are kept in any case, beside the ``n_genes``.
    groupby, group
        Column of ``obs``, and the group of cells in which genes are compared.
    n_cells
        Cells of the group that are drawn at random; ``None`` takes all.
    layer
        Layer with the counts, for a group of cells; by default ``X``.
    key_added
        Slot of ``uns`` instead of ``"gene_similarity"``.
    weights
        Which weights of a checkpoint that holds several.
    gene_symbols, gene_ids, aliases
        As in :func:`scfm.tl.gene_embeddings`.
    device, precision, batch_size, tokens_per_batch, block_size, progress
        As in :func:`scfm.tl.embed`.
    rng
        Seed of the draw of cells, and of random choices in the tokenizer; a generator gives one seed, which is recorded.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set is:

    ``.uns["gene_similarity"]``
        ``genes``, the kept ones, the one with the largest sum first; ``similarity``, their cosines ``(genes, genes)``, float32;
        ``markers``, those of ``markers`` that were found; and ``params``, ``checkpoint``.

    Raises
    ------
    KeyError
        If a gene, a slot, a column or a group does not exist.
    ValueError
        If only one of ``groupby`` and ``group`` is given, or both and ``use_rep``.
    UnsupportedError
        If the model has no states of genes in cells.

    References
    ----------
    Bai et al., scLong, Nature Communications (2026), Fig. 8.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.gene_similarity(adata, "sclong", groupby="cell_type", group="B", markers=["CD79A"])  # doctest: +SKIP
    >>> scfm.pl.gene_similarity(adata)  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    if (groupby is None) != (group is None):
        msg = "groupby= and group= go together: a column of obs, and which of its groups"
        raise ValueError(msg)
    if groupby is not None and use_rep is not None:
        msg = "use_rep= takes vectors that are there, groupby= computes new ones; give one of them"
        raise ValueError(msg)
    if n_genes is not None and n_genes < 2:
        msg = f"n_genes must be at least 2, or None for all genes; got {n_genes}"
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    seed = seed_of(rng)
    start = _logging.info("comparing genes" + ("" if group is None else f" in cells of the group {group!r}"))
    names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    drawn = None
    if groupby is None:
        compute = {"device": device, "precision": precision, "weights": weights}
        vectors = gene_vectors(adata, model, use_rep=use_rep, genes=genes, **names, **compute)
        record = vectors.record
    else:
        backbone = load_backbone(model, device=device, precision=precision, weights=weights)
        drawn = _draw(adata, groupby, str(group), n_cells, seed)
        cells = adata[drawn].to_memory() if adata.isbacked else adata[drawn].copy()
        gene_embeddings(
            cells,
            backbone,
            contextual=True,
            layer=layer,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            block_size=block_size,
            progress=progress,
            rng=seed,
            **names,
        )
        slot = f"{result_name(backbone)}_contextual"
        vectors = gene_vectors(cells, None, use_rep=slot, genes=genes)
        record = cells.uns[_keys.gene_record(result_name(backbone))]
    kept, found = _kept(vectors.names, vectors.values, n_genes, markers)
    if len(kept) ** 2 * 8 > _MOST_BYTES:
        msg = f"the similarity of {len(kept):,} genes needs {len(kept) ** 2 * 8 / 2**30:.0f} GiB; choose fewer with n_genes="
        raise MemoryError(msg)
    units = VectorSpace(vectors.values[kept]).units
    params: dict[str, Any] = {
        "use_rep": use_rep,
        "n_genes": n_genes,
        "groupby": groupby,
        "group": None if group is None else str(group),
        "n_cells": None if drawn is None else len(drawn),
        "layer": layer,
        "rng": seed,
        "n_compared": len(vectors.names),
    }
    key = key_added or _keys.GENE_SIMILARITY
    adata.uns[key] = {
        **{name: value for name, value in record.items() if name in ("checkpoint", "scfm_version")},
        "params": {name: storable(value) for name, value in params.items() if value is not None},
        "genes": np.asarray(vectors.names[kept], dtype=str),
        "markers": np.asarray(found, dtype=str),
        "similarity": (units @ units.T).astype(np.float32),
    }
    _logging.info("    finished", time=start, deep=f"added\n    {key!r}, similarity of {len(kept)} genes (adata.uns)")
    return adata if copy else None


def _draw(adata: AnnData, groupby: str, group: str, n_cells: int | None, seed: int) -> np.ndarray:
    """Cells of a group, in the order of the data; the draw depends on their names and not on their order."""
    labels = Labels.of(adata.obs, groupby, "adata")
    categories = labels.categories.astype(str)
    if group not in categories:
        msg = f"obs[{groupby!r}] has no group {group!r}; there are {', '.join(categories)}"
        raise KeyError(msg)
    cells = np.flatnonzero(labels.codes == categories.get_loc(group))
    if not len(cells):
        msg = f"no cell is in the group {group!r} of obs[{groupby!r}]"
        raise ValueError(msg)
    if n_cells is not None and n_cells < len(cells):
        cells = cells[np.argsort(np.asarray(adata.obs_names[cells], dtype=str), kind="stable")]
        cells = np.sort(np.random.default_rng(seed).choice(cells, n_cells, replace=False))
    return cells


def _kept(
    names: pd.Index, values: np.ndarray, n_genes: int | None, markers: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Places of the genes to keep, and the markers among all genes."""
    units = VectorSpace(values).units
    # of equal sums the gene whose name comes first
    order = np.lexsort((np.asarray(names, dtype=str), -np.round(units @ units.sum(0), 9)))
    if markers is None:
        return order[:n_genes], []
    if isinstance(markers, str):
        msg = f"markers= needs a list of genes, not the text {markers!r}"
        raise TypeError(msg)
    places = names.get_indexer(pd.unique(np.asarray(list(markers), dtype=object)))
    if (places < 0).any():
        _logging.info(f"    {int((places < 0).sum())} of {len(places)} markers have no vector and are left out")
    places = places[places >= 0]
    kept = np.zeros(len(names), dtype=bool)
    kept[order[:n_genes]] = kept[places] = True
    return order[kept[order]], [str(name) for name in names[places]]
