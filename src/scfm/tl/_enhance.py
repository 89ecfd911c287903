"""Expression as deeper sequencing would have shown it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import _keys, _logging
from .._depth import DepthTarget
from .._docs import shared_parameters
from ..backbones._task_weights import weights_for
from ._inputs import check_can_hold_results, load_backbone, prepared, result_name
from ._predicted import check_wanted, columns_to_predict, predict_into

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model, Task

_BLOCK_CELLS = 2048
# share of cells that may be deeper than the wanted depth before a word is said
_DEEPER = 0.1
_ROUNDING = 1e-9


@shared_parameters
def enhance(
    adata: AnnData,
    model: Model = "scfoundation",
    *,
    target: str | float | None = None,
    fold: float | None = None,
    genes: Sequence[str] | Literal["expressed", "all"] = "all",
    clip: bool = True,
    layer: str | None = None,
    use_raw: bool = False,
    key_added: str | None = None,
    weights: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    duplicates: Literal["sum", "error"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    rng: int | np.random.Generator = 0,
    progress: bool | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of each cell as if it had been sequenced to another depth.

    Genes that were missed for want of reads get a value, too. These are predictions of a model, not measurements: they
    are smoother than counts, so tests of differential expression on them find too much.

    Parameters
    ----------
    adata
        Annotated data with raw counts, in memory or backed.
    model
        A model that can enhance read depth; given as in :func:`scfm.tl.embed`.
    target
        Wanted depth: a number of counts for every cell, such as ``10_000``; or a letter and a number: ``"t4"`` for
        10^4 counts, ``"f5"`` for five times and ``"a1"`` for 10^1 times the counts of each cell. By default ``"f5"``.
    fold
        Wanted depth as a multiple of the counts of each cell; ``fold=5`` is ``target="f5"``.
    genes
        What to predict: ``"all"`` genes of ``adata`` that the model knows; ``"expressed"``, the genes that each cell
        expresses; or names of genes of ``adata``, or of the model, in every cell.
    clip
        Set predictions below zero, which no count can give, to zero; ``False`` keeps what the network says.
    layer
        Layer with the counts; by default ``X``.
    use_raw
        Take the counts from ``adata.raw``, which needs to have the genes of ``adata``.
    key_added
        Name of the slots; by default ``"enhanced"``.
    weights
        Which weights of a checkpoint that holds several; by default those the authors take for expression (``"gene"`` for
        scFoundation), if ``model`` is the name of a released one.
    {genes_of_data}
    {compute}
    out
        Folder of a zarr array, float32 of shape ``(cells, genes)``, to write to instead of ``adata``; needed where the
        prediction is larger than 2 GiB. A run that was interrupted goes on where it stopped.
    overwrite
        Replace the result of another run at ``out``.
    rng
        Seed of random choices in the tokenizer, if it makes any.
    progress
        Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2 and the run takes more
        than two seconds.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set are:

    ``.layers["enhanced"]``
        ``log1p`` of counts per 10,000 of a cell that was sequenced to the wanted depth, float32. For ``"all"`` a dense
        matrix with NaN for genes that the model does not know, and for cells with too few counts; for ``"expressed"``
        a sparse one that holds a value where the model saw one.
    ``.obsm["enhanced"]``
        For chosen genes, a data frame with one column for each.
    ``.obs["enhanced_depth_share"]``
        Counts of each cell, over the genes that the model knows, as a share of the wanted depth; NaN for empty cells.
    ``.uns["enhanced"]``
        Arguments (``params``, with the ``target`` as letter and number), medians of the actual and the wanted depth and
        the share of cells that are deeper than wanted (``depth``), checkpoint, share of genes matched.

    Raises
    ------
    KeyError
        If ``layer`` or a gene does not exist.
    MemoryError
        If the prediction is larger than 2 GiB and ``out`` is not given.
    TypeError
        If ``target`` or ``fold`` is of the wrong type.
    ValueError
        If ``target`` and ``fold`` name no depth or both are given, the values are not counts, or ``out`` is given for
        expressed genes.
    UnsupportedError
        If the model cannot enhance read depth; the message names models that can.

    See Also
    --------
    scfm.benchmark.enhancement : How good this is, beside simple methods.
    scfm.tl.reconstruct : Predictions of any model, on its own scale.

    References
    ----------
    Hao et al., Large-scale foundation model on single-cell transcriptomics, Nature Methods 21, 1481 (2024).

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> adata = sc.read_h5ad("pbmc.h5ad")  # doctest: +SKIP
    >>> scfm.tl.enhance(adata, model="scfoundation", fold=5)  # doctest: +SKIP
    >>> known = ~np.isnan(adata.layers["enhanced"]).all(0)  # doctest: +SKIP
    >>> sc.pp.pca(adata[:, known].copy(), layer="enhanced")  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    depth = DepthTarget.of(target, fold)
    check_wanted(genes, out=out, duplicates=duplicates)
    weights = weights_for(model, "expression") if weights is None else weights
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    for capability in ("enhances_depth", "reconstructs"):
        backbone.require(capability)
    key = key_added or _keys.ENHANCED
    with prepared(
        adata,
        backbone,
        what=f"enhancing to read depth {depth}",
        layer=layer,
        use_raw=use_raw,
        gene_symbols=gene_symbols,
        gene_ids=gene_ids,
        aliases=aliases,
        duplicates=duplicates,
        rng=rng,
        draws=None,
        tokenize_options={"target": str(depth)},
    ) as task:
        columns = columns_to_predict(adata, task, genes, out=out)
        totals = _known_totals(task)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = 10 ** depth.apply(totals)
            shares = np.where(totals > 0, totals / wanted, np.nan)
        summary = _summary(totals, wanted, shares)
        where = predict_into(
            adata,
            task,
            genes,
            columns,
            key,
            minimum=0.0 if clip else None,
            out=out,
            overwrite=overwrite,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            block_size=block_size,
            progress=progress,
        )
        params = {
            "model": result_name(backbone),
            "target": str(depth),
            "genes": genes if isinstance(genes, str) else list(genes),
            "clip": clip,
            "scale": backbone.expression_scale,
            "out": None if out is None else str(out),
        }
        adata.obs[_keys.depth_share(key)] = shares.astype(np.float32)
        adata.uns[key] = task.record(params) | {"depth": summary}
    _logging.info(
        "    finished",
        time=task.start,
        deep=f"added\n    {key!r}, expression at the wanted depth ({where})\n"
        f"    {_keys.depth_share(key)!r}, counts as a share of the wanted depth (adata.obs)",
    )
    return adata if copy else None


def _known_totals(task: Task) -> np.ndarray:
    """Total count of each cell over the genes that the model knows: the depth that it goes by."""
    known = (task.match.ids >= 0).astype(np.float64)
    totals = np.zeros(task.source.n_obs)
    for block in task.source.blocks(_BLOCK_CELLS):
        task.check(block)
        totals[block.start : block.stop] = block.counts @ known
    return totals


def _summary(totals: np.ndarray, wanted: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Depths in a few numbers; says so where the model is asked to take counts away."""
    filled = totals > 0
    if not filled.any():
        return {"median": 0.0, "median_wanted": float("nan"), "share_deeper": 0.0}
    deeper = float((shares[filled] > 1 + _ROUNDING).mean())
    summary = {
        "median": float(np.median(totals[filled])),
        "median_wanted": float(np.median(wanted[filled])),
        "share_deeper": deeper,
    }
    if deeper > _DEEPER:
        _logging.warning(
            f"{deeper:.0%} of the cells have more counts than the wanted depth (median {summary['median']:,.0f}, wanted "
            f"{summary['median_wanted']:,.0f}): the model is asked to down-sample them. A larger target= or fold= enhances"
        )
    return summary
