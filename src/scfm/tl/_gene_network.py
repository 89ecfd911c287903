"""Networks of genes: from the vectors of a model, or from its attention in groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys, _logging
from .._docs import shared_parameters
from ._attention_maps import Cells, attention_maps
from ._gene_vectors import gene_vectors
from ._inputs import check_can_hold_results, load_backbone, seed_of, storable
from ._network_edges import Edges, cosine_blocks, select_edges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model

    Method = Literal["cosine", "attention"]

METHODS = ("cosine", "attention")
_TOP_K = 5


@shared_parameters
def gene_network(
    adata: AnnData,
    model: Model | None = "scgpt",
    *,
    method: Method = "cosine",
    genes: Sequence[str] | None = None,
    program: str | None = None,
    programs_key: str = _keys.PROGRAMS,
    threshold: float | None = None,
    top_k: int | None = None,
    self_loops: bool = False,
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
    key_added: str = _keys.NETWORK,
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
    """Connect genes that a model holds to be alike, or that attend to each other in its layers.

    *Cosine*: similarity of gene vectors, those that the model has learned or those in a slot of ``varm``, such as
    fine-tuned ones or the contextual ones of :func:`scfm.tl.gene_embeddings`. The network has no direction; each pair is
    listed once. scGPT takes similarities above 0.5 (HLA genes) or 0.4 (CD genes), scFoundation the five highest of each
    gene.

    *Attention*: the scores of the cells of each group are averaged, as the authors do it: ranks among keys and queries in
    the last layer (scGPT), ranks among keys (CellFM), and, where attention is linear, the weights that it implies, of all
    layers of the large encoder (scLong) or of the last layer of the decoder (scFoundation, whose authors publish no such
    network). An edge goes from the gene that is attended to (the key) to the gene that attends (the query), so that the
    targets of a regulator are those that look at it.

    A pair of genes is averaged over the cells in which both are tokens. For models that see expressed genes only, these are
    the cells that express both, unless zeros become tokens, too (``include_zeros=True``). The network of the paper on scGPT
    is that of a model tuned on 1,200 highly variable genes: restrict ``adata`` to them, since ranks are those among all
    tokens. With zeros a model takes all genes of ``adata``, whatever its limit of tokens (unless you give
    ``max_length``). Without them a cell with more genes than the limit shows a part of them, and a pair of rarely expressed
    genes may be in too few cells: see ``min_cells``. No more than one map of genes by genes is in memory for each group.

    Parameters
    ----------
    adata
        Annotated data.
    model
        As in :func:`scfm.tl.embed`. Not needed with ``use_rep``.
    method
        ``"cosine"`` or ``"attention"``.
    genes
        Names of genes of ``adata``; by default those of ``program``, those marked in ``.var["highly_variable"]``, or all.
        Genes that the model does not know are left out.
    program
        Name of a gene program of :func:`scfm.tl.gene_programs`, to which the network is restricted.
    programs_key
        Slot of ``uns`` with the programs.
    threshold
        Edges have larger weights than this.
    top_k
        Most edges of a gene: to its most similar genes, or to those that attend most to it. 5 if neither this nor a
        threshold is given.
    self_loops
        Keep edges of genes with themselves.
    use_rep
        Slot of ``varm`` with vectors of genes (``"cosine"``).
    groupby
        Column of ``obs`` with groups of cells that get a network each (``"attention"``).
    groups
        Which groups; by default all. Cells without a group are left out.
    control, perturbed
        Two groups of ``groupby``: networks of both, and of what the second has more than the first.
    attention_layer
        Layer whose attention is taken.
    attention_options
        Further options of the ``attention`` of the model, which replace those of its authors.
    min_cells
        Pairs of genes that fewer cells of a group have are left out; by default a tenth of its cells.
    mean
        ``"upstream_mean"`` leaves the first cell of each group out of the sum, but not out of the number of cells, as the
        authors' notebook of scGPT does by mistake.
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
        Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2 and the run takes more
        than two seconds.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.uns["gene_network"]``
        ``edges``, a table with ``source``, ``target`` and ``weight``, the strongest first, and ``condition`` where there
        are groups; ``nodes``, the genes that could have edges; and what was done.
    ``.varp["gene_network"]``
        The weights, sparse, sources in rows; symmetric for cosines. With groups, one for each:
        ``"gene_network_<condition>"``.

    Raises
    ------
    KeyError
        If a gene, program, slot or column does not exist, or a group has no cells.
    MemoryError
        If the maps need more than 4 GiB, or there are more than 20 million edges.
    TypeError
        If the model's tokenizer has no such option.
    ValueError
        If arguments do not go together, fewer than two genes are known, or no cell has a group.
    UnsupportedError
        If the model has no gene embeddings, or no attention.

    See Also
    --------
    scfm.pl.gene_network : The picture.
    scfm.tl.tf_targets : Targets of regulators.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.gene_network(adata, "scgpt", genes=hla_genes, threshold=0.5)  # doctest: +SKIP
    >>> scfm.pl.gene_network(adata)  # doctest: +SKIP
    >>> scfm.tl.gene_network(  # doctest: +SKIP
    ...     adata, "scgpt", method="attention", groupby="condition", control="ctrl", perturbed="DDIT3"
    ... )
    """
    check_can_hold_results(adata)
    check_method(method, use_rep, groupby, groups, control, perturbed, tokenize_options)
    if top_k is not None and top_k < 1:
        msg = f"top_k must be a positive whole number; got {top_k!r}"
        raise ValueError(msg)
    if threshold is None and top_k is None:
        top_k = _TOP_K
    genes = _genes(adata, genes, program, programs_key)
    adata = adata.copy() if copy else adata
    chosen = {"threshold": threshold, "top_k": top_k, "self_loops": self_loops}
    params = {"method": method, "program": program, **chosen}
    names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    networks: Iterator[tuple[str | None, Edges]]
    if method == "cosine":
        start = _logging.info("connecting genes with similar vectors")
        vectors = gene_vectors(
            adata, model, use_rep=use_rep, genes=genes, device=device, precision=precision, weights=weights, **names
        )
        nodes, record = vectors.names, vectors.record
        record["params"] |= {name: storable(value) for name, value in params.items() if value is not None}
        edges = select_edges(cosine_blocks(vectors.values), **chosen).undirected(len(nodes))
        networks = iter([(None, edges)])
    else:
        start = _logging.info("connecting genes that attend to each other")
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
        nodes, record = maps.names, maps.record
        networks = ((name, select_edges(maps.blocks(name), **chosen)) for name in cells.conditions or [None])
    added = _write(adata, key_added, nodes, networks, record, directed=method == "attention")
    _logging.info("    finished", time=start, deep=f"added{added}")
    return adata if copy else None


def check_method(
    method: str,
    use_rep: str | None,
    groupby: str | None,
    groups: Sequence[str] | None,
    control: str | None,
    perturbed: str | None,
    tokenize_options: Mapping[str, Any],
) -> None:
    """Raise if arguments do not go with the method."""
    if method not in METHODS:
        msg = f"method must be one of {', '.join(METHODS)}; got {method!r}"
        raise ValueError(msg)
    if method == "attention":
        if use_rep is not None:
            msg = "use_rep= names vectors, of which method='cosine' makes a network; attention needs the model"
            raise ValueError(msg)
        return
    if any(value is not None for value in (groupby, groups, control, perturbed)):
        msg = (
            "groups of cells play a role with method='attention' only. For the vectors of genes in a group, run "
            "scfm.tl.gene_embeddings(groupby=...) and name its slot with use_rep="
        )
        raise ValueError(msg)
    if tokenize_options:
        msg = f"method='cosine' reads no cells, so that there is no option {', '.join(map(repr, tokenize_options))}"
        raise TypeError(msg)


def _genes(adata: AnnData, genes: Sequence[str] | None, program: str | None, programs_key: str) -> Sequence[str] | None:
    """Names of the wanted genes; ``None`` for all."""
    if program is not None:
        if genes is not None:
            msg = "give either genes= or program=, not both"
            raise ValueError(msg)
        programs = adata.uns.get(programs_key, {}).get("programs")
        if programs is None:
            msg = f"uns has no gene programs {programs_key!r}; run scfm.tl.gene_programs first"
            raise KeyError(msg)
        if program not in programs:
            msg = f"there is no gene program {program!r}; there are {', '.join(map(str, programs))}"
            raise KeyError(msg)
        return [str(gene) for gene in programs[program]]
    if genes is None and "highly_variable" in adata.var:
        genes = adata.var_names[adata.var["highly_variable"].to_numpy(dtype=bool)]
        _logging.info(f"    among {len(genes):,} highly variable genes")
    return genes


def _write(
    adata: AnnData,
    key: str,
    nodes: pd.Index,
    networks: Iterator[tuple[str | None, Edges]],
    record: dict[str, Any],
    *,
    directed: bool,
) -> str:
    """Store edges and matrices, and say for the log what was added."""
    for slot in np.atleast_1d(_earlier(adata, key)):
        adata.varp.pop(str(slot), None)
    columns = adata.var_names.get_indexer(nodes) if adata.var_names.is_unique else _first_columns(adata, nodes)
    labels = np.asarray(nodes.astype(str), dtype=object)
    tables, slots = [], []
    for condition, found in networks:
        edges = found.strongest_first()
        slot = key if condition is None else _keys.network_of(key, condition)
        adata.varp[slot] = edges.matrix(columns, adata.n_vars, symmetric=not directed)
        slots.append(slot)
        table = pd.DataFrame({"source": labels[edges.source], "target": labels[edges.target], "weight": edges.weight})
        if condition is not None:
            table["condition"] = np.full(len(table), condition, dtype=object)
        tables.append(table)
        if not len(table):
            where = "" if condition is None else f" in {condition!r}"
            few = (
                ""
                if record["params"]["method"] != "attention"
                else (
                    "; pairs that fewer than min_cells= cells have are left out, which are many where a model sees a part of the "
                    "genes of a cell (max_length=)"
                )
            )
            _logging.warning(f"no edge is strong enough{where}{few}")
    adata.uns[key] = {
        **record,
        "edges": pd.concat(tables, ignore_index=True).set_index(_index(sum(map(len, tables)))),
        "nodes": labels.astype(str),
        "directed": directed,
        "varp": np.asarray(slots),
    }
    return f"\n    {key!r}, edges (adata.uns)\n    {', '.join(map(repr, slots[:4]))}, weights (adata.varp)"


def _index(n: int) -> pd.Index:
    # HDF5 stores the labels of rows as text
    return pd.Index(np.arange(n).astype(str))


def _earlier(adata: AnnData, key: str) -> np.ndarray:
    record = adata.uns.get(key)
    return record.get("varp", np.empty(0, dtype=str)) if hasattr(record, "get") else np.empty(0, dtype=str)


def _first_columns(adata: AnnData, nodes: pd.Index) -> np.ndarray:
    first = ~adata.var_names.duplicated()
    return np.flatnonzero(first)[adata.var_names[first].get_indexer(nodes)]
