"""Cell embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anndata import AnnData

from .. import _keys, _logging, engine
from .._docs import shared_parameters
from ..backbones import random_copy
from ._inputs import check_can_hold_results, load_backbone, prepared, result_name, seed_of

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    import numpy as np
    import zarr

    from .._settings import Precision
    from ._inputs import Aliases, Model, Task

    File = str | os.PathLike[str]
    Embedding = np.ndarray | zarr.Array


@shared_parameters
def embed(
    adata: AnnData | File | Sequence[AnnData | File],
    model: Model | Sequence[Model] = "scgpt",
    *,
    layer: str | None = None,
    use_raw: bool = False,
    pooling: str | None = None,
    key_added: str | None = None,
    weights: str | None = None,
    random_weights: bool = False,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    duplicates: Literal["sum", "keep", "error"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    out: File | None = None,
    overwrite: bool = False,
    rng: int | np.random.Generator = 0,
    draws: Any = None,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | Embedding | dict[str, Embedding] | None:
    """Embed cells with one or several foundation models.

    The embedding of a cell depends on its own counts only: not on the other cells, their order, the order of the
    genes, how the matrix is stored, or the sizes of blocks and batches. The matrix is read in blocks, never changed
    and never made dense.

    Parameters
    ----------
    adata
        Annotated data, in memory or backed; or the path of an ``.h5ad`` file or ``.zarr`` store, or a list of these
        whose cells are put below each other.
    model
        Name of a released checkpoint (see :func:`scfm.checkpoints.list`), a folder with an official checkpoint or
        one that scfm saved, or a model from :func:`scfm.load`; or a list of these, which are loaded one at a time.
    layer
        Layer with the counts; by default ``X``.
    use_raw
        Take the counts from ``adata.raw``.
    pooling
        How token states become one vector per cell; by default as the authors do it.
    key_added
        Name of the slots in ``obsm`` and ``uns``; by default ``"X_<model>"`` and ``"<model>"``.
    weights
        Which weights of a checkpoint that holds several.
    random_weights
        Use a copy of the model with fresh weights, called ``"<model>-random"``: the control that tells what is due to
        pre-training. ``rng`` is its seed.
    {genes_of_data}
    {compute}
    out
        Folder of a zarr array, float32 of shape ``(cells, dim)``, to which finished blocks are written; with several
        models a folder of such folders. A run that was interrupted goes on where it stopped.
    overwrite
        Replace the result of another run at ``out``.
    {random}
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``; for files and lists of data the embedding itself, as the zarr array if
    ``out`` is given and else as a numpy array, by name if there are several models. In ``adata`` these are set:

    ``.obsm["X_<model>"]``
        Embedding, float32, shape ``(n_obs, dim)``. Cells without any gene that the model knows have NaN.
    ``.uns["<model>"]``
        Arguments (``params``), ``checkpoint`` (id, SHA-256, licence, citation), share of ``genes`` matched, and
        ``scfm_version``.

    Raises
    ------
    KeyError
        If ``layer`` or a column of ``var`` does not exist.
    MemoryError
        If not even one cell fits into memory.
    TypeError
        If the model's tokenizer has no such option.
    ValueError
        If values are not what the model needs, no gene is known, there are no genes, ``out`` holds the result of
        another run, or several models have the same name.
    UnsupportedError
        If the model has no cell embeddings.

    See Also
    --------
    scfm.load : The model itself.
    scfm.tl.compare_embeddings : Scores of several embeddings.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> adata = sc.read_h5ad("pbmc.h5ad")  # doctest: +SKIP
    >>> scfm.tl.embed(adata, model="scgpt")  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_scgpt")  # doctest: +SKIP
    """
    in_memory = isinstance(adata, AnnData)
    if in_memory:
        check_can_hold_results(adata)
        adata = adata.copy() if copy else adata
    several = isinstance(model, (list, tuple))
    if several and key_added is not None:
        msg = "key_added= names the slot of one model; with several models the slots are called after them"
        raise ValueError(msg)
    shared = {
        "layer": layer,
        "use_raw": use_raw,
        "gene_symbols": gene_symbols,
        "gene_ids": gene_ids,
        "aliases": aliases,
        "duplicates": duplicates,
        "rng": seed_of(rng),
        "draws": draws,
        "tokenize_options": tokenize_options,
    }
    sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
    writing = {**sizes, "overwrite": overwrite, "progress": progress}
    arrays = {}
    for each in model if several else [model]:
        backbone = load_backbone(each, device=device, precision=precision, weights=weights)
        if random_weights:
            backbone = random_copy(backbone, seed=shared["rng"])
        name = result_name(backbone)
        if name in arrays:
            msg = f"two of the models are called {name!r}; embed them one by one, with key_added="
            raise ValueError(msg)
        place = Path(out) / name if several and out is not None else out
        with prepared(adata, backbone, what="embedding", **shared) as task:
            arrays[name], record = _embed_one(task, pooling, out=place, **writing)
        if in_memory:
            key, record_key = (key_added, key_added) if key_added else (_keys.embedding(name), _keys.record(name))
            adata.obsm[key] = arrays[name] if out is None else arrays[name][...]
            adata.uns[record_key] = record
            added = (
                f"added\n    {key!r}, cell embedding (adata.obsm)\n    {record_key!r}, record of the run (adata.uns)"
            )
        _logging.info("    finished", time=task.start, deep=added if in_memory else None)
    if not in_memory:
        return arrays if several else arrays[name]
    return adata if copy else None


def _embed_one(task: Task, pooling: str | None, **writing: Any) -> tuple[np.ndarray | zarr.Array, dict[str, Any]]:
    """Embedding of all cells by one model, and the record of the run."""
    backbone = task.backbone
    backbone.require("embeds")
    pooling = backbone.check_pooling(pooling)
    options = backbone.pooling_options(pooling, task.match)
    result = engine.run(
        **task.inputs,
        compute=lambda backbone, tokens: backbone.embed(tokens, pooling=pooling, **options),
        shape=(backbone.embedding_dim(pooling, **options),),
        task={"output": "cell embedding", "pooling": pooling},
        **writing,
    )
    if result.n_empty:
        _logging.warning(
            f"{result.n_empty:,} of {task.source.n_obs:,} cells have no expressed gene that {backbone.name} knows; "
            "their embedding is NaN"
        )
    return result.array, task.record({"pooling": pooling})
