"""Cells of several batches in one embedding."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import _keys, _logging
from .._docs import shared_parameters
from .._optional import require
from ..backbones._task_weights import tell_other_weights, weights_for
from ..models import BatchIntegrator
from ..models._batch_field import batch_names, check_several
from ..models._variable_genes import among_chosen, variable_genes
from ._embed import _embed_one
from ._inputs import check_can_hold_results, load_backbone, prepared, result_name, run_record, seed_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from typing import Literal

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from .._settings import Precision
    from ..backbones import Backbone
    from ..tasks.integration import Objective
    from ._inputs import Aliases, Model

_METHODS = ("zero-shot", "bbknn", "finetune")
_NEIGHBORS_WITHIN_BATCH = 3
# up to this size neighbours are exact, beyond it they are what bbknn finds by default
_EXACT_CELLS = 5000


@shared_parameters
def integrate(
    adata: AnnData,
    model: Model = "scgpt",
    *,
    batch_key: str,
    method: Literal["zero-shot", "bbknn", "finetune"] = "zero-shot",
    key_added: str | None = None,
    n_top_genes: int | None = None,
    objective: Objective | None = None,
    integrator: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    save_model: str | os.PathLike[str] | None = None,
    bbknn: Mapping[str, Any] | None = None,
    layer: str | None = None,
    pooling: str | None = None,
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
    """Embed cells of several batches such that cells of one kind lie together.

    Three ways, from cheap to dear. ``"zero-shot"``: the embedding of the model as it is, made as its authors do for
    this purpose (scLong: Eq. 11 of the paper, a number for each gene; scFoundation: the weights ``"rde"`` and a wanted
    depth of 10^4.5). ``"bbknn"``: the same, and a graph in which each cell has neighbours in every batch (BBKNN;
    Polański et al. 2020), as the authors of scFoundation integrate. ``"finetune"``: the model itself is trained on the
    data in float32, see :class:`scfm.models.BatchIntegrator`.

    Whether batches are mixed and cell types kept apart is measured by :func:`scfm.benchmark.cells`, beside simpler
    methods.

    Parameters
    ----------
    adata
        Annotated data with several batches, in memory or backed.
    model
        As in :func:`scfm.tl.embed`.
    batch_key
        Column of ``obs`` with the batch of each cell.
    method
        See above.
    key_added
        Name of the results; by default ``"X_<model>_integrated"`` in ``obsm`` and ``"<model>_integrated"`` in ``uns``.
    n_top_genes
        Restrict the data to so many highly variable genes, chosen within batches. By default all genes count, and for
        ``"finetune"`` as many as in the paper of the model.
    objective
        ``"paper"`` or ``"adversarial"``, what the model is trained with (``"finetune"``).
    integrator
        Further arguments of :class:`scfm.models.BatchIntegrator`, such as ``{{"lora": 8}}`` (``"finetune"``).
    train
        Further arguments of :meth:`scfm.models.BatchIntegrator.train`, such as ``{{"max_epochs": 5}}``
        (``"finetune"``).
    save_model
        Folder to save the trained :class:`scfm.models.BatchIntegrator` to (``"finetune"``).
    bbknn
        Further arguments of ``bbknn.matrix.bbknn``, such as ``{{"neighbors_within_batch": 5}}`` (``"bbknn"``). By
        default neighbours are exact for up to 5,000 cells.
    layer
        Layer with the counts; by default ``X``.
    pooling
        How token states become one vector per cell; by default as the authors integrate.
    weights
        Which weights of a checkpoint that holds several; by default those the authors integrate with, if ``model`` is
        the name of a released checkpoint.
    {genes_of_data}
    {compute}
    rng
        Seed of everything random.
    progress
        Whether to show a progress bar.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set are:

    ``.obsm["X_<model>_integrated"]``
        Embedding, float32. Cells without any gene that the model knows have NaN.
    ``.uns["<model>_integrated"]``
        Arguments (``params``), checkpoint (the one that training started from), share of genes matched, package version.
    ``.obsp["<model>_integrated_neighbors_connectivities"]``, ``.obsp["<model>_integrated_neighbors_distances"]``, \
    ``.uns["<model>_integrated_neighbors"]``
        For ``"bbknn"``, the graph, as :func:`scanpy.pp.neighbors` writes it with ``key_added``; to be named as
        ``neighbors_key`` in :func:`scanpy.tl.umap` and :func:`scanpy.tl.leiden`. Cells with a NaN embedding have no
        neighbours.

    Raises
    ------
    KeyError
        If ``layer`` or a column does not exist.
    MissingExtraError
        If bbknn is not installed (``"bbknn"``).
    TypeError
        If the model's tokenizer has no such option.
    ValueError
        If there is one batch only, a cell has none, an argument makes no sense or belongs to another method, or values
        are not what the model needs.
    UnsupportedError
        If the model has no cell embeddings, or nothing to be trained with (``"finetune"``).

    See Also
    --------
    scfm.models.BatchIntegrator : The model behind ``"finetune"``, which can be saved and applied to other cells.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> scfm.tl.integrate(adata, "scfoundation", batch_key="donor", method="bbknn")  # doctest: +SKIP
    >>> sc.tl.umap(adata, neighbors_key="scfoundation_integrated_neighbors")  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    _check_arguments(
        method, objective=objective, integrator=integrator, train=train, save_model=save_model, bbknn=bbknn
    )
    batches = batch_names(adata.obs, batch_key)
    check_several(np.unique(batches), batch_key)
    if method == "bbknn":
        require("bbknn.matrix", purpose="integration by a balanced graph")
        _check_sizes(batches, batch_key, (bbknn or {}).get("neighbors_within_batch", _NEIGHBORS_WITHIN_BATCH))
    seed = seed_of(rng)
    adata = adata.copy() if copy else adata
    names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    params = {"batch_key": batch_key, "method": method, "n_batches": len(np.unique(batches))}
    if method == "finetune":
        if weights is not None:
            model = load_backbone(model, device=device, precision="float32", weights=weights)
        if duplicates is not None:
            tokenize_options["duplicates"] = duplicates
        start = _logging.info(f"integrating {len(np.unique(batches))} batches by fine-tuning")
        with _set_up(adata, batch_key=batch_key, layer=layer, **names) as data:
            trained = BatchIntegrator(
                data,
                checkpoint=model,
                **{
                    "objective": objective,
                    "n_top_genes": n_top_genes,
                    "pooling": pooling,
                    "tokenize": tokenize_options or None,
                    "device": device,
                    "seed": seed,
                    **(integrator or {}),
                },
            )
            trained.train(**{"seed": seed, "enable_progress_bar": bool(progress), **(train or {})})
            array = trained.get_latent_representation(batch_size=batch_size)
            params |= {"rng": seed, "train": dict(train or {}) or None, "integrator": dict(integrator or {}) or None}
            name, record = _trained_record(trained, layer, params)
            if save_model is not None:
                trained.save(save_model, overwrite=True)
    else:
        backbone = _load(model, device=device, precision=precision, weights=weights)
        recipe = backbone.zero_shot("integration")
        with prepared(
            adata,
            backbone,
            what="integrating",
            layer=layer,
            use_raw=False,
            duplicates=duplicates,
            rng=seed,
            draws=None,
            tokenize_options={**recipe.tokenize, **tokenize_options},
            **names,
        ) as task:
            start = task.start
            choice = None if n_top_genes is None else variable_genes(task.source, task.match, batches, n_top_genes)
            pooling = recipe.pooling if pooling is None else pooling
            sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
            array, record = _embed_one(among_chosen(task, choice), pooling, progress=progress, **sizes)
            name = result_name(backbone)
            record["params"] |= params
            if choice is not None:
                record["params"] |= {"n_top_genes": n_top_genes, "flavor": choice.how}
    key, record_key = (key_added, key_added) if key_added else (_keys.integrated(name), _keys.integrated_record(name))
    adata.obsm[key], adata.uns[record_key] = array, record
    added = (
        f"added\n    {key!r}, integrated cell embedding (adata.obsm)\n    {record_key!r}, record of the run (adata.uns)"
    )
    if method == "bbknn":
        added += _add_graph(adata, batch_key, key, _keys.neighbors(record_key), bbknn or {})
    _logging.info("    finished", time=start, deep=added)
    return adata if copy else None


def _check_arguments(method: str, *, bbknn: Any, **of_training: Any) -> None:
    if method not in _METHODS:
        msg = f"method must be one of {', '.join(map(repr, _METHODS))}; got {method!r}"
        raise ValueError(msg)
    belongs = {"bbknn": {"bbknn": bbknn}, "finetune": of_training}
    for other, values in belongs.items():
        given = [name for name, value in values.items() if value is not None]
        if other != method and given:
            msg = f"{', '.join(f'{name}=' for name in given)} belongs to method={other!r}; the method is {method!r}"
            raise ValueError(msg)


def _check_sizes(batches: NDArray, batch_key: str, wanted: int) -> None:
    labels, sizes = np.unique(batches, return_counts=True)
    if (small := sizes < wanted).any():
        msg = (
            f"batch {labels[small][0]} in obs[{batch_key!r}] has {sizes[small][0]} cells, fewer than the {wanted} "
            "neighbours that each cell gets there; leave it out, or use bbknn={'neighbors_within_batch': ...}"
        )
        raise ValueError(msg)


def _load(model: Model, *, device: str, precision: str, weights: str | None) -> Backbone:
    """The model, with the weights its authors integrate with where that can be chosen."""
    chosen = weights_for(model, "integration") if weights is None else weights
    backbone = load_backbone(model, device=device, precision=precision, weights=chosen)
    if weights is None:
        tell_other_weights(backbone, "integration", "integrate")
    return backbone


# -- fine-tuning ---------------------------------------------------------------------------------------------------------


@contextmanager
def _set_up(adata: AnnData, **arguments: Any) -> Iterator[AnnData]:
    """The data, set up for training inside the block; a view is copied."""
    data = adata.copy() if adata.is_view else adata
    before = {name: value for name, value in data.uns.items() if name.startswith("_scvi")}
    try:
        BatchIntegrator.setup_anndata(data, **arguments)
        yield data
    finally:
        for name in [name for name in data.uns if name.startswith("_scvi")]:
            del data.uns[name]
        data.uns.update(before)


def _trained_record(model: BatchIntegrator, layer: str | None, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of the model, and what was done."""
    backbone, learner, choice = model.backbone, model.learner, model.gene_choice
    losses = model.history["train_loss_epoch"]
    params |= {
        "objective": learner.objective,
        "pooling": backbone.check_pooling(learner.pooling),
        "epochs": len(losses),
        "train_loss": float(losses.iloc[-1, 0]),
        "layer": layer,
        "n_top_genes": None if choice is None else len(choice.genes),
        "flavor": None if choice is None else choice.how,
        "tokenize_options": learner.tokenize or None,
        "loss_options": learner.options or None,
    }
    where = "adata.X" if layer is None else f"layer {layer!r}"
    record = run_record(backbone, where, model._align(model.adata), params)
    record["checkpoint"]["sha256"] = backbone.provenance.start_sha256
    return result_name(backbone), record


# -- graph ---------------------------------------------------------------------------------------------------------------


def _add_graph(adata: AnnData, batch_key: str, key: str, name: str, options: Mapping[str, Any]) -> str:
    """Write the balanced graph of cells as Scanpy does, and say for the log what was added."""
    array, batches = adata.obsm[key], batch_names(adata.obs, batch_key)
    embedded = np.isfinite(array).all(1)
    _check_sizes(batches[embedded], batch_key, options.get("neighbors_within_batch", _NEIGHBORS_WITHIN_BATCH))
    distances, connectivities, params = _balanced_neighbors(array, batches, **options)
    slots = {"connectivities_key": f"{name}_connectivities", "distances_key": f"{name}_distances"}
    adata.obsp[slots["connectivities_key"]], adata.obsp[slots["distances_key"]] = connectivities, distances
    adata.uns[name] = {**slots, "params": {**params, "use_rep": key}}
    return f"\n    {name!r}, neighbours in every batch (adata.obsp and adata.uns)"


def _balanced_neighbors(
    embedding: NDArray, batches: NDArray, **options: Any
) -> tuple[csr_matrix, csr_matrix, dict[str, Any]]:
    """Distances, connectivities and parameters of a graph in which cells have neighbours in every batch.

    Parameters
    ----------
    embedding
        One row per cell; cells with NaN have no neighbours.
    batches
        Batch of each cell.
    options
        Arguments of ``bbknn.matrix.bbknn``.
    """
    bbknn = require("bbknn.matrix", purpose="integration by a balanced graph")
    usable = np.flatnonzero(np.isfinite(embedding).all(1))
    options = {"n_pcs": embedding.shape[1], **options}
    if len(usable) <= _EXACT_CELLS:
        options.setdefault("computation", "cKDTree")
    distances, connectivities, params = bbknn.bbknn(embedding[usable], batches[usable], **options)
    if len(usable) < len(embedding):
        distances, connectivities = (_spread(graph, usable, len(embedding)) for graph in (distances, connectivities))
    return distances, connectivities, {**params, "n_pcs": int(params["n_pcs"])}


def _spread(graph: csr_matrix, rows: NDArray, n: int) -> csr_matrix:
    """A graph of some cells as one of all cells."""
    entries = graph.tocoo()
    return sparse.csr_matrix((entries.data, (rows[entries.row], rows[entries.col])), shape=(n, n))
