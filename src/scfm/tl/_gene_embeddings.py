"""Gene embeddings: those a model has learned, and those it gives genes inside cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys, _logging, engine
from .._docs import shared_parameters
from ._inputs import check_can_hold_results, load_backbone, match_genes, prepared, result_name, run_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ..backbones import Backbone
    from ._inputs import Aliases, Model

_ALL = "contextual"


@shared_parameters
def gene_embeddings(
    adata: AnnData,
    model: Model = "scgpt",
    *,
    contextual: bool | None = None,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    key_added: str | None = None,
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
    draws: Any = None,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | None:
    """Embed genes with a foundation model.

    *Static* embeddings are the vectors that the model has learned for its genes; they do not depend on the cells.
    *Contextual* embeddings are the states of the genes after the network has seen a cell, averaged over the cells of a
    group in which the model has a state of the gene: all cells for models that see all genes, and the cells that
    express it for the others. The averages are collected on the fly; the states of all cells are never in memory.

    Parameters
    ----------
    adata
        Annotated data, in memory or backed.
    model
        As in :func:`scfm.tl.embed`.
    contextual
        Contextual instead of static embeddings; by default if ``groupby`` is given.
    groupby
        Column of ``obs`` with groups of cells to average over; by default all cells are one group.
    groups
        Which groups; by default all. Cells without a group are left out.
    genes
        Names of genes of ``adata`` to restrict contextual embeddings to, which saves memory and, for some models, time.
    layer
        Layer with the counts; by default ``X``.
    use_raw
        Take the counts from ``adata.raw``, which needs to have the genes of ``adata``.
    key_added
        Start of the names of the slots instead of the name of the model.
    weights
        Which weights of a checkpoint that holds several.
    {genes_of_data}
    {compute}
    {random}
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set are, float32 of shape ``(n_vars, dim)`` with NaN for genes without
    an embedding:

    ``.varm["<model>"]``
        Static embeddings.
    ``.varm["<model>_contextual"]`` or ``.varm["<model>_<group>"]``
        Contextual embeddings averaged over all cells, or over those of each group.
    ``.varm["<model>_n_cells"]``
        Number of cells behind each average, one column for each group.
    ``.uns["<model>_genes"]``
        Arguments, checkpoint and share of genes matched.

    Raises
    ------
    KeyError
        If ``layer``, ``groupby``, a group or a gene does not exist.
    MemoryError
        If the averages of all groups would need more than 4 GiB.
    ValueError
        If ``contextual=False`` is combined with groups, or values are not what the model needs.
    UnsupportedError
        If the model has no such embeddings.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.gene_embeddings(adata, "scgpt")  # doctest: +SKIP
    >>> scfm.tl.gene_embeddings(adata, "scgpt", groupby="cell_type")  # doctest: +SKIP
    >>> adata.varm["scgpt_B cell"]  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    contextual = groupby is not None if contextual is None else contextual
    if not contextual and (groupby is not None or groups is not None or genes is not None):
        msg = "groupby=, groups= and genes= choose contextual embeddings; static ones do not depend on cells"
        raise ValueError(msg)
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    key = key_added or result_name(backbone)
    if not contextual:
        _static(adata, backbone, key, gene_symbols=gene_symbols, gene_ids=gene_ids, aliases=aliases)
        return adata if copy else None
    backbone.require("gene_states")
    codes, names = _groups(adata, groupby, groups)
    chosen = codes >= 0
    if draws is not None and not chosen.all():
        msg = "draws= has random numbers for all cells, but some of them are in no group; leave them out of adata"
        raise ValueError(msg)
    per_cell = {name: value for name, value in tokenize_options.items() if engine.is_per_cell(name, value)}
    with prepared(
        adata if chosen.all() else adata[chosen],
        backbone,
        what="averaging gene states of",
        layer=layer,
        use_raw=use_raw,
        gene_symbols=gene_symbols,
        gene_ids=gene_ids,
        aliases=aliases,
        duplicates=duplicates,
        rng=rng,
        draws=draws,
        tokenize_options=tokenize_options | {name: value[chosen] for name, value in per_cell.items()},
    ) as task:
        _check_same_genes(adata, task.source.var_names)
        means = engine.GeneMeans(task, codes[chosen], len(names), engine.genes_to_average(task.match, genes))
        sizes = {"tokens_per_batch": tokens_per_batch, "block_size": block_size, "progress": progress}
        means.run(batch_size, **sizes)
        record = task.record({"contextual": True, "groupby": groupby, "groups": names, "genes": genes})
    slots = [f"{key}_{name}" for name in names]
    for slot, mean in zip(slots, means.of_columns(), strict=True):
        adata.varm[slot] = mean
    adata.varm[f"{key}_n_cells"] = pd.DataFrame(means.n_cells(), index=adata.var_names, columns=names)
    adata.uns[_keys.gene_record(key)] = record
    shown = ", ".join(map(repr, slots[:4])) + (" ..." if len(slots) > 4 else "")
    _logging.info("    finished", time=task.start, deep=f"added\n    {shown}, contextual embeddings (adata.varm)")
    return adata if copy else None


def _static(adata: AnnData, backbone: Backbone, key: str, **names: Any) -> None:
    start = _logging.info(f"static gene embeddings of {backbone!r}")
    match = match_genes(backbone, adata.var, **names)
    adata.varm[key] = engine.by_column(backbone.gene_embeddings().cpu().numpy(), match.ids)
    adata.uns[_keys.gene_record(key)] = run_record(backbone, "adata.var", match, {"contextual": False})
    _logging.info("    finished", time=start, deep=f"added\n    {key!r}, static gene embeddings (adata.varm)")


def _groups(adata: AnnData, groupby: str | None, groups: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Number of the group of each cell, -1 for none, and the names of the groups."""
    if groupby is None:
        if groups is not None:
            msg = "groups= needs groupby=, the column of obs that they are in"
            raise ValueError(msg)
        return np.zeros(adata.n_obs, dtype=np.int64), [_ALL]
    if groupby not in adata.obs:
        msg = f"obs has no column {groupby!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise KeyError(msg)
    labels = pd.Categorical(adata.obs[groupby].astype(object).map(str, na_action="ignore"))
    names = list(labels.categories) if groups is None else [str(group) for group in groups]
    if unknown := [name for name in names if name not in labels.categories]:
        msg = f"obs[{groupby!r}] has no group {', '.join(unknown)}; there are {', '.join(labels.categories)}"
        raise KeyError(msg)
    return np.asarray(pd.Categorical(labels, categories=names).codes, dtype=np.int64), names


def _check_same_genes(adata: AnnData, names: pd.Index) -> None:
    if len(names) != adata.n_vars or not (names == adata.var_names).all():
        msg = "adata.raw has other genes than adata, so that its gene embeddings do not fit into adata.varm"
        raise ValueError(msg)
