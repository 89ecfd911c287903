"""Genes that the token of a cell attends to, in each type of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys, _logging, engine
from .._docs import shared_parameters
from ._attention_maps import Cells
from ._gene_embeddings import _check_same_genes
from ._gene_vectors import _columns
from ._inputs import check_can_hold_results, load_backbone, prepared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model

_SHARE_OF_CELLS = 0.1


@shared_parameters
def cell_type_genes(
    adata: AnnData,
    model: Model = "cellfm",
    *,
    groupby: str,
    groups: Sequence[str] | None = None,
    n_genes: int = 100,
    genes: Sequence[str] | None = None,
    feature_key: str | None = None,
    min_cells: int | None = None,
    attention_options: Mapping[str, Any] | None = None,
    layer: str | None = None,
    key_added: str = _keys.CELL_TYPE_GENES,
    weights: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    duplicates: Literal["sum", "keep", "error"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    rng: int | np.random.Generator = 0,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | None:
    """Find the genes that matter most to the token that stands for the cell, in each type of cells.

    CellFM looks for genes, and long non-coding RNAs among them, that are specific to a cell type in this way: the genes of
    each cell are ranked by the attention of its token to them, and the ranks are averaged over the cells of a type that
    express the gene. With a model that was fine-tuned to classify cells, the attention is that of its classifier;
    otherwise that of the last layer, which knows nothing of the cell types.

    Parameters
    ----------
    adata
        Annotated data.
    model
        As in :func:`scfm.tl.embed`.
    groupby
        Column of ``obs`` with the types.
    groups
        Which types; by default all. Cells without one are left out.
    n_genes
        Genes of each type.
    genes
        Names of genes of ``adata`` to choose from; by default all that the model knows. The ranks are among all genes of
        a cell in any case.
    feature_key
        Column of ``var`` with the kind of each gene, such as ``"protein coding"``, to be shown beside it.
    min_cells
        Genes in fewer cells of a type are left out; by default a tenth of its cells.
    attention_options
        Options of the model's ``cell_attention``.
    layer
        Layer with the counts; by default ``X``.
    key_added
        Name of the result.
    weights
        Which weights of a checkpoint that holds several.
    {genes_of_data}
    {compute}
    rng
        Seed of random choices in the tokenizer; a generator gives one seed, which is recorded.
    progress
        Whether to show a progress bar.
    copy
        Return a copy of ``adata`` with the result instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set is ``.uns["cell_type_genes"]`` with ``table`` with columns ``group``,
    ``gene``, ``score`` (mean rank, from 0 to 1), ``specificity`` (how much higher it is than the mean of the other types),
    ``n_cells``, ``rank`` and perhaps ``feature``, and with what was done.

    Raises
    ------
    KeyError
        If a column or gene does not exist, or a group has no cells.
    ValueError
        If no cell has a group, or the number of genes is not positive.
    UnsupportedError
        If the model has no token of the cell whose attention is known.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.cell_type_genes(adata, "my_tuned_cellfm", groupby="cell_type", feature_key="feature")  # doctest: +SKIP
    >>> table = adata.uns["cell_type_genes"]["table"]  # doctest: +SKIP
    >>> table[table["feature"] != "protein coding"]  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    if n_genes < 1:
        msg = f"n_genes must be a positive whole number; got {n_genes!r}"
        raise ValueError(msg)
    if min_cells is not None and min_cells < 1:
        msg = f"min_cells must be a positive whole number; got {min_cells!r}"
        raise ValueError(msg)
    if feature_key is not None and feature_key not in adata.var:
        msg = f"var has no column {feature_key!r}; there are {', '.join(map(str, adata.var.columns)) or 'none'}"
        raise KeyError(msg)
    cells = Cells.of(adata, groupby, groups, None, None)
    wanted = None if genes is None else _columns(adata, genes)
    adata = adata.copy() if copy else adata
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    backbone.require("cell_attends")
    chosen = cells.codes >= 0
    per_cell = {name: value for name, value in tokenize_options.items() if engine.is_per_cell(name, value)}
    with prepared(
        adata if chosen.all() else adata[chosen],
        backbone,
        what="ranking the genes of",
        layer=layer,
        use_raw=False,
        gene_symbols=gene_symbols,
        gene_ids=gene_ids,
        aliases=aliases,
        duplicates=duplicates,
        rng=rng,
        draws=None,
        tokenize_options=tokenize_options | {name: value[chosen] for name, value in per_cell.items()},
    ) as task:
        _check_same_genes(adata, task.source.var_names)
        ids = task.match.ids
        known = (ids >= 0) & ~pd.Series(ids).duplicated().to_numpy()
        if wanted is not None:
            known &= np.isin(np.arange(adata.n_vars), wanted)
        columns = np.flatnonzero(known)
        means = engine.CellAttentionMeans(
            task, cells.codes[chosen], len(cells.groups), ids[columns], options=attention_options
        )
        means.run(batch_size, tokens_per_batch=tokens_per_batch, block_size=block_size, progress=progress)
        record = task.record(
            {
                "groupby": groupby,
                "groups": cells.groups,
                "n_genes": n_genes,
                "min_cells": min_cells,
                "attention_options": dict(attention_options or {}) or None,
            }
        )
        start = task.start
    table = _table(*means.means(), np.bincount(cells.codes[chosen]), cells.groups, n_genes, min_cells)
    columns = columns[table.pop("place").to_numpy()]
    table.insert(1, "gene", adata.var_names[columns].to_numpy(dtype=object))
    if feature_key is not None:
        table["feature"] = adata.var[feature_key].astype(str).to_numpy(dtype=object)[columns]
    table.index = table.index.astype(str)
    adata.uns[key_added] = {**record, "table": table}
    _logging.info("    finished", time=start, deep=f"added\n    {key_added!r}, genes of each group (adata.uns)")
    return adata if copy else None


def _table(
    means: np.ndarray, counts: np.ndarray, sizes: np.ndarray, groups: list[str], n_genes: int, min_cells: int | None
) -> pd.DataFrame:
    """The genes with the highest mean ranks of each group."""
    fewest = np.ceil(_SHARE_OF_CELLS * sizes) if min_cells is None else np.full(len(groups), min_cells)
    scores = np.where(counts >= np.maximum(fewest, 1)[:, None], means, np.nan)
    total, number = np.nansum(scores, 0), np.isfinite(scores).sum(0)
    parts = []
    for group, name in enumerate(groups):
        own = scores[group]
        place = np.argsort(-own, kind="stable")[: min(n_genes, int(np.isfinite(own).sum()))]
        with np.errstate(invalid="ignore", divide="ignore"):
            others = (total - own)[place] / (number - 1)[place]
        parts.append(
            pd.DataFrame(
                {
                    "group": np.full(len(place), name, dtype=object),
                    "place": place,
                    "score": own[place],
                    "specificity": own[place] - others,
                    "n_cells": counts[group, place],
                    "rank": np.arange(1, len(place) + 1),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
