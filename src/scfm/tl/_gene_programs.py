"""Gene programs: genes that a model, or their expression, holds for alike."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from .. import __version__, _keys, _logging
from ..baselines._coexpression import correlation_of_blocks
from ..tasks.gene_graph import CorrelationSpace, GeneGraph, GeneMetric, VectorSpace
from ..tasks.gene_programs import find_programs
from ..tasks.program_scores import scaled_scores, score_weights
from ._gene_vectors import GeneVectors, gene_vectors
from ._inputs import check_can_hold_results, seed_of, storable
from ._labels import Labels
from ._log_expression import most_variable, open_log_expression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .._settings import Precision
    from ..tasks.gene_programs import GenePrograms
    from ._inputs import Aliases, Model
    from ._log_expression import GeneMoments, LogExpression

COEXPRESSION = "coexpression"
RESOLUTIONS = (1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_N_TOP_GENES = 2000
_FEWEST_CELLS = 3
_SHOWN = 5


def gene_programs(
    adata: AnnData,
    model: Model | Literal["coexpression"] = "scgpt",
    *,
    use_rep: str | None = None,
    genes: Sequence[str] | None = None,
    n_top_genes: int | None = _N_TOP_GENES,
    n_neighbors: int = 15,
    metric: GeneMetric = "euclidean",
    resolution: float | Sequence[float] = RESOLUTIONS,
    min_genes: int = 5,
    stability_seeds: int = 5,
    score: bool = True,
    ctrl_size: int = 50,
    groupby: str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    weights: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    device: str = "auto",
    precision: Precision = "auto",
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Find programs of genes, score them in every cell, and say which group of cells each is active in.

    Genes are joined to their nearest neighbours among the vectors of a model, as :func:`scanpy.pp.neighbors` joins cells; Leiden
    clusters with enough genes are the programs. With ``model="coexpression"`` the neighbours of a gene are those of the
    largest Pearson correlation over cells instead, and everything else is the same: the baseline of any model.

    Parameters
    ----------
    adata
        Annotated data, in memory or backed.
    model
        Model whose static gene embeddings are taken, as in :func:`scfm.tl.embed`, or ``"coexpression"``.
    use_rep
        Slot of ``varm`` with other vectors, for example the contextual or fine-tuned ones of
        :func:`scfm.tl.gene_embeddings`.
    genes
        Names of genes of ``adata`` to cluster. By default those that are known to the model and expressed in at least 3
        cells, restricted to ``n_top_genes``.
    n_top_genes
        How many of them are taken by default: those whose log-normalised expression varies most. Scanpy's dispersions would
        leave out genes that a cell type expresses steadily, such as CD3 in T cells. ``None`` takes all.
    n_neighbors
        Neighbours of the graph, the gene itself included.
    metric
        Distance of vectors; that of co-expression is 1 minus the correlation.
    resolution
        Resolution of Leiden. Of several, the one with the largest ``gain`` is taken: the coherence of the programs
        above that of all genes, averaged over all genes, with zero for those that are in no program.
    min_genes
        Smallest number of genes of a program.
    stability_seeds
        How many times to cluster again, with other seeds, to see how much of each program comes back; 0 for not at all.
    score
        Whether to score programs in cells.
    ctrl_size
        Control genes from each bin of expression, as in :func:`scanpy.tl.score_genes`.
    groupby
        Column of ``obs`` with groups of cells, for the activity of each program in each group.
    layer
        Layer with counts or log-normalised values; by default ``X``. Counts are log-normalised on the fly (to 10,000 per cell),
        ``adata`` keeps them as they are.
    key_added
        Name of the results instead of ``"gene_programs"``; then also that of the column of ``var``.
    weights
        Which weights of a checkpoint that holds several.
    gene_symbols, gene_ids, aliases
        As in :func:`scfm.tl.gene_embeddings`.
    device, precision
        As in :func:`scfm.tl.embed`.
    rng
        Seed of clusters and control genes; a generator gives one seed, which is recorded.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set are:

    ``.uns["gene_programs"]``
        ``programs``, the genes of each program, the one closest to the others first; programs are numbered from ``"1"``, the
        largest. ``summary``, one row for each program: ``n_genes``, ``coherence`` (mean cosine, or correlation, of its pairs of
        genes), ``coexpression`` (mean Pearson correlation of these pairs over cells), ``stability`` (mean Jaccard index of the most
        similar cluster of other seeds), ``top_genes``. ``sweep``, one row for each resolution. ``genes``, all genes
        that were clustered. With groups, ``activity`` (groups by programs: mean of the scores, which are
        scaled from 0 to 1 over cells) and ``markers`` (programs whose scores are higher in a group than in the other cells, by
        a Wilcoxon test). And ``params``, ``checkpoint``, ``gene_match``.
    ``.var["gene_program"]``
        Program of each gene; missing for genes in none.
    ``.obsm["X_gene_programs"]``
        Scores, a table of cells by programs; NaN for cells without any counts.
    ``.varp["gene_programs_distances"]``, ``.varp["gene_programs_connectivities"]``
        The neighbour graph.

    Raises
    ------
    KeyError
        If a gene, a slot or a column does not exist.
    ValueError
        If there are no programs, names of genes are not unique, or values are neither counts nor log-normalised.

    References
    ----------
    Cui et al., scGPT, Nature Methods 21, 1470 (2024); Zeng et al., CellFM, Nature Communications 16, 4679 (2025).

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.gene_programs(adata, "scgpt", groupby="cell_type")  # doctest: +SKIP
    >>> adata.uns["gene_programs"]["programs"]["1"]  # doctest: +SKIP
    >>> scfm.pl.gene_programs(adata)  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    _check_names(adata)
    labels = None if groupby is None else Labels.of(adata.obs, groupby, "adata")
    if labels is not None and not score:
        msg = "groupby= needs the scores of programs in cells; leave score=True"
        raise ValueError(msg)
    if n_top_genes is not None and n_top_genes < 2:
        msg = f"n_top_genes must be at least 2, or None for all genes; got {n_top_genes}"
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    key, seed = key_added or _keys.PROGRAMS, seed_of(rng)
    by_expression = isinstance(model, str) and model == COEXPRESSION and use_rep is None
    start = _logging.info("finding gene programs" + (" by co-expression" if by_expression else ""))
    vectors = (
        _all_genes(adata, genes)
        if by_expression
        else gene_vectors(
            adata,
            model,
            use_rep=use_rep,
            genes=genes,
            gene_symbols=gene_symbols,
            gene_ids=gene_ids,
            aliases=aliases,
            device=device,
            precision=precision,
            weights=weights,
        )
    )
    needed = score or by_expression or (genes is None and n_top_genes is not None)
    with open_log_expression(adata, layer) if needed else nullcontext() as expression:
        moments = expression.moments() if needed else None
        vectors = _chosen(adata, vectors, moments, None if genes is not None else n_top_genes, all_genes=genes is None)
        columns = adata.var_names.get_indexer(vectors.names)
        space = CorrelationSpace(_correlation(expression, columns)) if by_expression else VectorSpace(vectors.values)
        graph = GeneGraph.of(space, n_neighbors=n_neighbors, metric=metric)
        resolutions = [float(resolution)] if np.isscalar(resolution) else [float(value) for value in resolution]
        found = find_programs(
            space, graph.connectivities, resolutions, min_genes=min_genes, stability_seeds=stability_seeds, seed=seed
        )
        names = [str(number) for number in range(1, len(found) + 1)]
        scored = _scored(adata, expression, moments, found, columns, ctrl_size, seed) if score else None
    params = {
        "use_rep": use_rep,
        "n_genes": len(vectors.names),
        "n_top_genes": n_top_genes if genes is None else None,
        "n_neighbors": n_neighbors,
        "metric": "correlation" if by_expression else metric,
        "resolution": resolutions,
        "resolution_taken": found.resolution,
        "min_genes": min_genes,
        "stability_seeds": stability_seeds,
        "ctrl_size": ctrl_size if score else None,
        "groupby": groupby,
        "layer": layer,
        "rng": seed,
    }
    record = dict(vectors.record)
    record["gene_match"] = record.pop("genes", {})
    record["params"] = {**record["params"], **{k: storable(v) for k, v in params.items() if v is not None}}
    programs = _programs(vectors.names, found, names)
    record |= {
        "programs": programs,
        "summary": _summary(programs, found, scored),
        "sweep": found.sweep,
        "genes": np.asarray(vectors.names, dtype=str),
    }
    column = _keys.GENE_PROGRAM if key_added is None else key
    codes = np.full(adata.n_vars, -1)
    codes[columns] = found.codes
    adata.var[column] = pd.Categorical.from_codes(codes, categories=names)
    for name, matrix in (("distances", graph.distances), ("connectivities", graph.connectivities)):
        adata.varp[_keys.gene_graph(key, name)] = _among_all(matrix, columns, adata.n_vars)
    added = f"\n    {key!r}, programs (adata.uns)\n    {column!r}, program of each gene (adata.var)"
    if scored is not None:
        slot = _keys.embedding(key)
        adata.obsm[slot] = pd.DataFrame(scored.scores, index=adata.obs_names, columns=names)
        added += f"\n    {slot!r}, scores of the programs (adata.obsm)"
        if labels is not None:
            record |= _by_group(scored.scores, labels, names)
    adata.uns[key] = record
    _logging.info(
        f"    {len(found)} programs of {int((found.codes >= 0).sum()):,} genes (of {len(vectors.names):,}), "
        f"resolution {found.resolution:g}"
    )
    _logging.info("    finished", time=start, deep=f"added{added}")
    return adata if copy else None


def _check_names(adata: AnnData) -> None:
    if not adata.var_names.is_unique:
        msg = "names of genes are not unique; call adata.var_names_make_unique() first"
        raise ValueError(msg)


def _all_genes(adata: AnnData, genes: Sequence[str] | None) -> GeneVectors:
    """Genes without vectors, for co-expression."""
    names = adata.var_names if genes is None else pd.Index(pd.unique(np.asarray(list(genes), dtype=object)))
    if (absent := ~names.isin(adata.var_names)).any():
        msg = f"adata has no gene {', '.join(map(str, names[absent][:10]))}"
        raise KeyError(msg)
    record = {"params": {"model": COEXPRESSION}, "scfm_version": __version__}
    return GeneVectors(names, np.ones((len(names), 1), dtype=np.float32), record)


def _chosen(
    adata: AnnData, vectors: GeneVectors, moments: GeneMoments | None, n_top: int | None, *, all_genes: bool
) -> GeneVectors:
    """The genes to cluster, sorted by name: clusters must not depend on the order of the data."""
    columns = adata.var_names.get_indexer(vectors.names)
    kept = vectors.values.any(1)  # zeros have no direction
    if moments is not None:
        # a gene that does not vary has no correlation; one that is not expressed says nothing about these cells
        kept &= (moments.n_cells[columns] >= _FEWEST_CELLS) if all_genes else True
        kept &= (moments.std[columns] > 0) if vectors.values.shape[1] == 1 else True
        if n_top is not None:
            candidates = np.zeros(adata.n_vars, dtype=bool)
            candidates[columns[kept]] = True
            order = np.argsort(np.asarray(adata.var_names, dtype=str), kind="stable")
            sorted_moments = type(moments)(*(values[order] for values in moments))
            best = np.zeros(adata.n_vars, dtype=bool)
            best[order] = most_variable(sorted_moments, candidates[order], n_top)
            if candidates.sum() > n_top:
                _logging.info(
                    f"    the {n_top:,} most variable of {int(candidates.sum()):,} genes that are known and expressed; "
                    "genes= or n_top_genes= choose others"
                )
            kept &= best[columns]
    if kept.sum() < 3:
        msg = f"{int(kept.sum())} of {len(kept):,} genes can be clustered; at least three are needed"
        raise ValueError(msg)
    places = np.flatnonzero(kept)
    places = places[np.argsort(np.asarray(vectors.names[places], dtype=str), kind="stable")]
    return replace(vectors, names=vectors.names[places], values=vectors.values[places])


def _correlation(expression: LogExpression, columns: NDArray) -> NDArray:
    return correlation_of_blocks((values[:, columns] for _, values in expression.blocks()), len(columns))


@dataclass(frozen=True, eq=False)
class _Scored:
    """Scores ``(cells, programs)``, and the mean correlation of the genes of each program."""

    scores: NDArray[np.float32]
    coexpression: NDArray[np.float64]


def _scored(
    adata: AnnData,
    expression: LogExpression,
    moments: GeneMoments,
    found: GenePrograms,
    columns: NDArray,
    ctrl_size: int,
    seed: int,
) -> _Scored:
    """One pass over the cells; products with sparse weights give scores and correlations of all programs."""
    members = found.members.tocoo()
    members = sparse.csr_matrix((members.data, (members.row, columns[members.col])), (len(found), adata.n_vars))
    # sorted by name, so that the draw of control genes does not depend on the order of the data
    order = np.argsort(np.asarray(adata.var_names, dtype=str), kind="stable")
    back = np.argsort(order)
    weights = score_weights(members[:, order], moments.mean[order], ctrl_size=ctrl_size, seed=seed)[back]
    scale = np.divide(1, moments.std, out=np.zeros(adata.n_vars), where=moments.std > 0)
    standard = members.multiply(scale).T.tocsr()
    n, centre = adata.n_obs, np.asarray(moments.mean @ standard).ravel()
    scores = np.full((n, len(found)), np.nan, dtype=np.float32)
    squares = np.zeros(len(found))
    both = sparse.hstack([weights, standard]).toarray()
    for rows, values in expression.blocks():
        product = values @ both
        scores[rows] = product[:, : len(found)]
        squares += ((product[:, len(found) :] - centre) ** 2).sum(0)
    scores[expression.empty] = np.nan
    sizes = np.asarray(members @ (scale > 0)[:, None].astype(float)).ravel()
    pairs = sizes * (sizes - 1)
    within = squares / max(n - 1, 1) - sizes
    return _Scored(scores, np.divide(within, pairs, out=np.full(len(found), np.nan), where=pairs > 0))


def _programs(genes: pd.Index, found: GenePrograms, names: list[str]) -> dict[str, NDArray]:
    """Genes of each program, the one that is closest to the others first."""
    order = np.lexsort((-found.closeness, found.codes))
    order = order[found.codes[order] >= 0]
    starts = np.searchsorted(found.codes[order], np.arange(len(names) + 1))
    text = np.asarray(genes, dtype=str)
    return {name: text[order[starts[i] : starts[i + 1]]] for i, name in enumerate(names)}


def _summary(programs: dict[str, NDArray], found: GenePrograms, scored: _Scored | None) -> pd.DataFrame:
    table = pd.DataFrame(
        {"n_genes": [len(members) for members in programs.values()], "coherence": found.coherence},
        index=pd.Index(list(programs), name="program"),
    )
    if scored is not None:
        table["coexpression"] = scored.coexpression
    if np.isfinite(found.stability).any():
        table["stability"] = found.stability
    table["top_genes"] = [", ".join(members[:_SHOWN]) for members in programs.values()]
    return table


def _among_all(matrix: sparse.csr_matrix, columns: NDArray, n: int) -> sparse.csr_matrix:
    """A matrix of the clustered genes as one of all genes."""
    matrix = matrix.tocoo()
    return sparse.csr_matrix((matrix.data, (columns[matrix.row], columns[matrix.col])), shape=(n, n))


def _by_group(scores: NDArray, labels: Labels, names: list[str]) -> dict[str, pd.DataFrame]:
    """Activity of each program in each group, and the programs that mark a group."""
    usable = np.isfinite(scores).all(1) & (labels.codes >= 0)
    codes, groups = labels.codes[usable], np.asarray(labels.categories.astype(str))
    n_cells = np.bincount(codes, minlength=len(groups))
    present = np.flatnonzero(n_cells)
    scaled = scaled_scores(scores)[usable].astype(np.float64)
    average = sparse.csr_matrix((1 / n_cells[codes], (codes, np.arange(len(codes)))), shape=(len(groups), len(codes)))
    activity = pd.DataFrame((average @ scaled)[present], index=pd.Index(groups[present], name="group"), columns=names)
    tested = present[n_cells[present] > 1]
    if len(present) < 2 or not len(tested):
        _logging.warning("programs that mark a group need two groups and one with several cells; there are none")
        return {"activity": activity}
    if len(tested) < len(present):
        lone = ", ".join(groups[np.setdiff1d(present, tested)])
        _logging.warning(f"groups of one cell are not tested for programs that mark them: {lone}")
    return {"activity": activity, "markers": _markers(scores[usable], codes, groups, tested, names)}


def _markers(scores: NDArray, codes: NDArray, groups: NDArray, tested: NDArray, names: list[str]) -> pd.DataFrame:
    work = AnnData(scores, var=pd.DataFrame(index=names))
    work.obs["group"] = pd.Categorical.from_codes(codes, categories=groups).remove_unused_categories()
    wanted = [str(group) for group in groups[tested]]
    with np.errstate(all="ignore"):  # the fold change of scores, which are no logarithms, is not used
        sc.tl.rank_genes_groups(
            work, "group", groups=wanted, method="wilcoxon", tie_correct=True, use_raw=False, n_genes=len(names)
        )
    found = work.uns["rank_genes_groups"]
    tables = []
    for group in wanted:
        inside = (work.obs["group"] == group).to_numpy()
        higher = pd.Series(scores[inside].mean(0) - scores[~inside].mean(0), index=names)
        order = np.asarray(found["names"][group], dtype=str)
        tables.append(
            pd.DataFrame(
                {
                    "group": group,
                    "program": order,
                    "score": found["scores"][group].astype(np.float64),
                    "difference": higher[order].to_numpy(dtype=np.float64),
                    "p_value": found["pvals"][group].astype(np.float64),
                    "p_adjusted": found["pvals_adj"][group].astype(np.float64),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
