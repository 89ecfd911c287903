"""How well a model restores what shallow sequencing missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .. import _logging, engine
from .._depth import DepthTarget
from .._docs import shared_parameters
from ..backbones import random_copy
from ..backbones._task_weights import weights_for
from ..data import open_source
from ..genes import GeneMatch
from ..metrics import recovery_scores
from ..tl._inputs import load_backbone, match_genes, result_name, tokenizer_options
from ._imputation import IMPUTATIONS, log_normalised
from ._thinning import thin_counts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Literal

    from numpy.typing import NDArray

    from .._settings import Precision
    from ..backbones import Backbone
    from ..tl._inputs import Aliases, Model

_BLOCK_CELLS = 2048
# column of the table by what scfm.metrics.recovery_scores calls it
_COLUMNS = {"MAE": "MAE", "MRE": "MRE", "Pearson": "PCC", "Pearson per cell": "PCC per cell"}


@shared_parameters
def enhancement(
    adata: AnnData,
    model: Model = "scfoundation",
    *,
    rates: Sequence[float] = (0.01, 0.05, 0.1, 0.2),
    seeds: Sequence[int] = (0, 1, 2),
    baselines: Sequence[Literal["observed", "gene_mean", "knn", "scvi"]] = ("observed", "gene_mean", "knn"),
    random_weights: bool = True,
    n_cells: int | None = 1000,
    min_counts: int = 1000,
    layer: str | None = None,
    use_raw: bool = False,
    weights: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    random_state: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Thin the counts of cells, let a model enhance them, and compare the result with what was taken away.

    This is the expression recovery of Hao et al. (Nature Methods 2024). Every read of a cell is kept with a
    probability; the model is asked for the depth before (fold 1 / rate) and compared, at the genes that the cell
    expressed before, with ``log1p`` of its counts per 10,000. Only genes that the model knows take part. Predictions
    below zero count as zero, as in :func:`scfm.tl.enhance`.

    Zeros of the original cell take no part, as in the paper: a method that predicts too much everywhere is not
    punished for it.

    Parameters
    ----------
    adata
        Annotated data with raw counts, in memory or backed.
    model
        A model that can enhance read depth; given as in :func:`scfm.tl.embed`.
    rates
        Shares of the reads that are kept, above 0 and up to 1.
    seeds
        Seeds of the thinning, which is repeated with each; the spread over them is that of the draw of reads.
    baselines
        What the model is compared with: ``"observed"``, the thinned cell as it is; ``"gene_mean"``, the mean of the
        gene over cells (:func:`scfm.baselines.gene_mean`); ``"knn"``, the counts of the cell and its 14 nearest
        neighbours together (:func:`scfm.baselines.knn_smoothing`); ``"scvi"``, scVI trained on the cells, which takes a
        while for each rate and seed (:func:`scfm.baselines.scvi_expression`). They see all cells of ``adata``, thinned.
    random_weights
        Add a copy of the model with random weights: what is due to pre-training is the difference to it.
    n_cells
        Number of cells to score, drawn at random; ``None`` takes all.
    min_counts
        Cells to score have more counts than this, over the genes that the model knows.
    layer
        Layer with the counts; by default ``X``.
    use_raw
        Take the counts from ``adata.raw``.
    weights
        Which weights of a checkpoint that holds several; by default those the authors take for expression, if ``model`` is
        the name of a released one.
    gene_symbols, gene_ids
        Columns of ``adata.var`` with gene symbols and Ensembl ids; by default they are looked for.
    aliases
        As in :func:`scfm.tl.embed`. Counts of columns that are the same gene are summed.
    {compute}
    random_state
        Seed of the choice of cells, of random weights, and of baselines.
    progress
        Whether to show progress bars; by default if ``scfm.settings.verbosity`` is at least 2 and a pass over the cells
        takes more than two seconds.

    Returns
    -------
    Table with one row for each ``method``, ``rate`` and ``seed``, and the columns

    ``MAE``
        Mean absolute error.
    ``MRE``
        Mean of the squared error divided by the true value, which the paper calls mean relative error.
    ``PCC``, ``PCC per cell``
        Pearson correlation over all values, and its mean over cells; NaN where it is undefined.
    ``n_cells``
        Number of cells that were scored: those for which all methods predict something.

    The scores are those of :func:`scfm.metrics.recovery_scores`, over the genes that each cell expressed before.

    Raises
    ------
    KeyError
        If ``layer`` does not exist.
    ValueError
        If a rate or baseline is unknown, a method, rate or seed is given twice, the values are not counts, or no cell
        has more than ``min_counts``.
    UnsupportedError
        If the model cannot enhance read depth.

    See Also
    --------
    scfm.benchmark.thin_counts : The thinning.
    scfm.tl.enhance : The enhancement.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> adata = sc.read_h5ad("pbmc.h5ad")  # doctest: +SKIP
    >>> table = scfm.benchmark.enhancement(adata, "scfoundation", n_cells=200)  # doctest: +SKIP
    >>> table.groupby(["rate", "method"])[["MAE", "MRE", "PCC"]].agg(["mean", "std"])  # doctest: +SKIP
    """
    rates = _checked("rates", [float(rate) for rate in rates])
    seeds, baselines = _checked("seeds", [int(seed) for seed in seeds]), _checked("baselines", baselines, least=0)
    if wrong := [rate for rate in rates if not 0 < rate <= 1]:
        msg = f"rates are shares of the reads that are kept, above 0 and up to 1; got {wrong[0]!r}"
        raise ValueError(msg)
    if unknown := [name for name in baselines if name not in IMPUTATIONS]:
        msg = f"there is no baseline {', '.join(map(repr, unknown))}; choose among {', '.join(IMPUTATIONS)}"
        raise ValueError(msg)
    if n_cells is not None and n_cells < 1:
        msg = f"n_cells must be a positive whole number, or None for all cells; got {n_cells!r}"
        raise ValueError(msg)
    weights = weights_for(model, "expression") if weights is None else weights
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    for capability in ("enhances_depth", "reconstructs"):
        backbone.require(capability)
    naming = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    start = _logging.info(f"restoring thinned counts with {backbone!r}")
    counts, ids = _known_counts(adata, backbone, layer=layer, use_raw=use_raw, **naming)
    names = backbone.vocab.names[ids]
    cells = _choose(counts, n_cells, min_counts, random_state)
    _logging.info(f"    scoring {len(cells):,} of {counts.shape[0]:,} cells")
    truth = log_normalised(counts[cells])
    networks = {result_name(backbone): backbone}
    if random_weights:
        control = random_copy(backbone, seed=random_state)
        networks[result_name(control)] = control
    options = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
    options |= {"seed": random_state, "progress": progress}
    rows = []
    for seed in seeds:
        for rate in rates:
            thinned = thin_counts(counts, rate, seed=seed, genes=names)
            shallow = AnnData(thinned, var=pd.DataFrame(index=names))
            predicted = {name: IMPUTATIONS[name](shallow, cells, truth, random_state) for name in baselines}
            for name, network in networks.items():
                predicted[name] = _enhanced(network, thinned[cells], ids, rate, truth, **options)
            scores = _scores(truth, predicted)
            rows += [{"method": name, "rate": rate, "seed": seed} | scores[name] for name in predicted]
    _logging.info("    finished", time=start)
    return pd.DataFrame(rows)


def _checked(name: str, values: Sequence[Any], *, least: int = 1) -> list[Any]:
    """The values as a list; raises if one stands there twice, or none where one is needed."""
    if isinstance(values, str):
        msg = f"{name} must be a list; got {values!r}"
        raise ValueError(msg)
    values = list(values)
    if len(values) < least or len(set(values)) < len(values):
        msg = f"{name} must be different from each other, and at least {least}; got {values}"
        raise ValueError(msg)
    return values


def _known_counts(
    adata: AnnData, backbone: Backbone, *, layer: str | None, use_raw: bool, **names: Any
) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Counts of the genes that the model knows, and their vocabulary ids, ascending."""
    with open_source(adata, layer=layer, use_raw=use_raw) as source:
        match = match_genes(backbone, source.var, **names)
        task = engine.Task(backbone, source, match, {})
        parts = [sparse.csr_matrix((0, len(match.column_map().ids)))]
        for block in source.blocks(_BLOCK_CELLS):
            task.check(block)
            parts.append(match.collapse(block.counts)[0])
    order = np.argsort(match.column_map().ids)
    counts = sparse.vstack(parts, format="csr")[:, order]
    counts.sort_indices()
    return counts, match.column_map().ids[order]


def _choose(counts: sparse.csr_matrix, n_cells: int | None, min_counts: int, seed: int) -> NDArray[np.intp]:
    """Cells to score, in their order."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    cells = np.flatnonzero(totals > max(0, min_counts))
    if not len(cells):
        msg = (
            f"no cell has more than {min_counts:,} counts of genes that the model knows (the deepest has "
            f"{totals.max(initial=0):,.0f}); choose a smaller min_counts="
        )
        raise ValueError(msg)
    if n_cells is None or n_cells >= len(cells):
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, n_cells, replace=False))


def _enhanced(
    network: Backbone,
    counts: sparse.csr_matrix,
    ids: NDArray[np.int64],
    rate: float,
    where: sparse.csr_matrix,
    *,
    seed: int,
    **options: Any,
) -> NDArray[np.float32]:
    """What a model predicts for thinned cells at the stored entries of ``where``, zero where that is negative."""
    vocab = network.vocab
    names = vocab.names[ids]
    target = {"target": str(DepthTarget("f", 1 / rate))}
    choices = tokenizer_options(network, target, n_obs=counts.shape[0], seed=seed, duplicates=None, draws=None)
    wanted = sparse.csr_matrix((where.data, ids[where.indices], where.indptr), shape=(where.shape[0], len(vocab)))
    cells = AnnData(counts.astype(np.float32), var=pd.DataFrame(index=names))
    match = GeneMatch(ids, np.full(len(ids), "symbol", dtype=object), names, vocab)
    with open_source(cells) as source:
        values = engine.predict_at(engine.Task(network, source, match, choices), wanted, **options)
    return np.maximum(values, np.float32(0))


def _scores(truth: sparse.csr_matrix, predicted: dict[str, NDArray[np.floating]]) -> dict[str, dict[str, float]]:
    """Scores of each method, over the cells for which all methods predict something."""
    missing = sum(np.isnan(values) for values in predicted.values())
    scored = np.add.reduceat(missing, truth.indptr[:-1]) == 0
    if not scored.any():
        return {name: dict.fromkeys(_COLUMNS.values(), np.nan) | {"n_cells": 0} for name in predicted}
    out = {}
    for name, values in predicted.items():
        table = sparse.csr_matrix((values, truth.indices, truth.indptr), shape=truth.shape)
        scores = recovery_scores(truth[scored], table[scored])
        out[name] = {column: scores[score] for score, column in _COLUMNS.items()} | {"n_cells": int(scored.sum())}
    return out
