"""Targets of regulators, ranked by a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys, _logging
from .._docs import shared_parameters
from ._attention_maps import Cells, attention_maps
from ._gene_network import check_method
from ._gene_vectors import _columns, gene_vectors
from ._inputs import check_can_hold_results, load_backbone, seed_of, storable
from ._known_edges import known_edges, present, regulators
from ._network_edges import cosine_blocks, select_edges

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model
    from ._known_edges import Known


@shared_parameters
def tf_targets(
    adata: AnnData,
    model: Model | None = "scgpt",
    *,
    tfs: Sequence[str] | str | os.PathLike[str] | None = None,
    top_n: int = 1_000,
    method: Literal["cosine", "attention"] = "cosine",
    prior: Known | None = None,
    use_prior: Literal["mark", "restrict"] = "mark",
    genes: Sequence[str] | None = None,
    use_rep: str | None = None,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    control: str | None = None,
    perturbed: str | None = None,
    attention_layer: int = -1,
    attention_options: Mapping[str, Any] | None = None,
    min_cells: int | None = None,
    mean: Literal["true_mean", "upstream_mean"] = "true_mean",
    layer: str | None = None,
    key_added: str = _keys.TARGETS,
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
    """Rank the genes that each transcription factor may regulate.

    By the *cosine* of vectors of genes, as in the regulons of scFoundation (the 1,000 most similar genes of each factor;
    each factor is compared by its own vector, whereas the loop of the authors' notebook takes that of the first for all).
    Or by *attention*, as in scGPT: how much a gene attends to the factor, in each group of cells or in perturbed cells
    beyond control; see :func:`scfm.tl.gene_network`.

    Neither says which way regulation goes, nor whether it is direct. Compare with what is known (``prior``), or prune by
    motifs with pySCENIC, for which :func:`scfm.tl.write_adjacencies` writes the table.

    Parameters
    ----------
    adata
        Annotated data.
    model
        As in :func:`scfm.tl.embed`. Not needed with ``use_rep``.
    tfs
        Names of the factors, or a file with one name a line; by default all regulators of ``prior``. Those that are no
        genes of ``adata`` are left out.
    top_n
        Targets of each factor.
    method
        ``"cosine"`` or ``"attention"``.
    prior
        Known edges: a table or a file with ``source`` and ``target`` (or ``tf`` and ``target``), or ``"collectri"`` or
        ``"dorothea"``, which decoupler downloads.
    use_prior
        ``"mark"`` says which targets are known; ``"restrict"`` ranks known targets only.
    genes
        Names of genes of ``adata`` that may be targets; by default all that the model knows (for attention, those marked
        in ``.var["highly_variable"]`` where there is this column).
    use_rep
        Slot of ``varm`` with vectors of genes (``"cosine"``).
    groupby, groups, control, perturbed, attention_layer, attention_options, min_cells, mean
        As in :func:`scfm.tl.gene_network` (``"attention"``).
    layer
        Layer with the counts; by default ``X``.
    key_added
        Name of the results.
    weights
        Which weights of a checkpoint that holds several.
    {genes_of_data}
    {compute}
    rng
        Seed of random choices in the tokenizer; a generator gives one seed, which is recorded.
    progress
        Whether to show a progress bar.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set is ``.uns["tf_targets"]`` with ``targets``, a table with ``tf``,
    ``target``, ``score`` and ``rank`` (from 1), with ``known`` if there is a prior and ``condition`` if there are groups,
    and with what was done.

    Raises
    ------
    KeyError
        If a gene, slot, column or group does not exist.
    OfflineError
        If a resource is to be downloaded while scfm is offline.
    ValueError
        If no factor is known, or arguments do not go together.
    UnsupportedError
        If the model has no gene embeddings, or no attention.

    See Also
    --------
    scfm.tl.tf_activity : Activity of the factors in each cell, and their specificity for cell types.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.tf_targets(adata, "scfoundation", tfs="allTFs_hg38.txt")  # doctest: +SKIP
    >>> adata.uns["tf_targets"]["targets"].query("tf == 'SPIB'")  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    check_method(method, use_rep, groupby, groups, control, perturbed, tokenize_options)
    if top_n < 1:
        msg = f"top_n must be a positive whole number; got {top_n!r}"
        raise ValueError(msg)
    if use_prior not in ("mark", "restrict") or (use_prior == "restrict" and prior is None):
        msg = f"use_prior must be 'mark', or 'restrict' with known edges in prior=; got {use_prior!r}"
        raise ValueError(msg)
    known = None if prior is None else known_edges(prior)
    wanted = present(regulators(tfs, known), adata.var_names)
    if method == "attention" and genes is None and "highly_variable" in adata.var:
        genes = list(adata.var_names[adata.var["highly_variable"].to_numpy(dtype=bool)])
    if genes is not None:
        _columns(adata, genes)
        genes = [*genes, *(name for name in wanted if name not in set(genes))]
    adata = adata.copy() if copy else adata
    start = _logging.info(f"ranking targets of {len(wanted):,} transcription factors")
    params = {"method": method, "top_n": top_n, "use_prior": None if known is None else use_prior}
    names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    rankings: Iterable[tuple[str | None, Iterator[tuple[np.ndarray, np.ndarray]]]]
    if method == "cosine":
        vectors = gene_vectors(
            adata, model, use_rep=use_rep, genes=genes, device=device, precision=precision, weights=weights, **names
        )
        targets, record = vectors.names, vectors.record
        record["params"] |= {name: storable(value) for name, value in params.items() if value is not None}
        rows = _rows(targets, wanted)
        rankings = [(None, cosine_blocks(vectors.values, rows))]
    else:
        cells = Cells.of(adata, groupby, groups, control, perturbed)
        params |= {"groupby": groupby, "groups": cells.groups if groupby else None}
        params |= {"control": control, "perturbed": perturbed}
        maps = attention_maps(
            adata,
            load_backbone(model, device=device, precision=precision, weights=weights),
            genes,
            cells,
            attention_layer=attention_layer,
            attention_options=attention_options,
            min_cells=min_cells,
            mean=mean,
            layer=layer,
            names=names,
            duplicates=duplicates,
            rng=seed_of(rng),
            sizes={
                "batch_size": batch_size,
                "tokens_per_batch": tokens_per_batch,
                "block_size": block_size,
                "progress": progress,
            },
            tokenize_options=tokenize_options,
            params=params,
        )
        targets, record = maps.names, maps.record
        rows = _rows(targets, wanted)
        rankings = ((name, maps.blocks(name, rows)) for name in cells.conditions or [None])
    table = pd.concat(
        [_ranked(blocks, targets, known, use_prior, top_n, condition) for condition, blocks in rankings],
        ignore_index=True,
    )
    if table.empty:
        _logging.warning("no factor has a target; are they expressed together, and are the known edges of these genes?")
    table.index = table.index.astype(str)
    adata.uns[key_added] = {**record, "targets": table, "tfs": np.asarray(targets[rows], dtype=str)}
    _logging.info("    finished", time=start, deep=f"added\n    {key_added!r}, targets (adata.uns)")
    return adata if copy else None


def _rows(genes: pd.Index, tfs: Sequence[str]) -> np.ndarray:
    rows = genes.get_indexer(tfs)
    if not (rows >= 0).any():
        msg = f"the model knows none of the {len(tfs):,} transcription factors"
        raise ValueError(msg)
    return rows[rows >= 0]


def _ranked(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]],
    genes: pd.Index,
    known: pd.DataFrame | None,
    use_prior: str,
    top_n: int,
    condition: str | None,
) -> pd.DataFrame:
    """The best targets of each factor; factors in the order in which they were named."""
    pairs = None if known is None else _pairs(genes, known)
    if use_prior == "restrict":
        blocks = ((rows, np.where(np.isin(_codes(rows, genes), pairs), scores, np.nan)) for rows, scores in blocks)
    edges = select_edges(blocks, top_k=top_n)
    # the edges of a source come in the order of their weight, and sources one after the other
    first = np.flatnonzero(np.diff(edges.source, prepend=-1))
    lengths = np.diff(np.append(first, len(edges)))
    names = genes.to_numpy(dtype=object)
    table = pd.DataFrame(
        {
            "tf": names[edges.source],
            "target": names[edges.target],
            "score": edges.weight.astype(np.float64),
            "rank": np.arange(len(edges)) - np.repeat(first, lengths) + 1,
        }
    )
    if pairs is not None:
        table["known"] = np.isin(edges.source.astype(np.int64) * len(genes) + edges.target, pairs)
    if condition is not None:
        table["condition"] = np.full(len(table), condition, dtype=object)
    return table


def _pairs(genes: pd.Index, known: pd.DataFrame) -> np.ndarray:
    """Known edges between ``genes`` as single numbers."""
    source, target = genes.get_indexer(known["source"]), genes.get_indexer(known["target"])
    inside = (source >= 0) & (target >= 0)
    return source[inside].astype(np.int64) * len(genes) + target[inside]


def _codes(rows: np.ndarray, genes: pd.Index) -> np.ndarray:
    return rows[:, None].astype(np.int64) * len(genes) + np.arange(len(genes))
