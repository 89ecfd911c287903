"""Cell embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anndata import AnnData

from .. import _keys, _logging, engine
from ..data import open_source
from ._inputs import (
    InputCheck,
    check_can_hold_results,
    load_backbone,
    match_genes,
    result_name,
    run_record,
    seed_of,
    tokenizer_options,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    import numpy as np
    import zarr
    from torch import Tensor

    from .._settings import Precision
    from ..backbones import Backbone, TokenBatch
    from ._inputs import Aliases, Model

    File = str | os.PathLike[str]


def embed(
    adata: AnnData | File | Sequence[AnnData | File],
    model: Model = "scgpt",
    *,
    layer: str | None = None,
    use_raw: bool = False,
    pooling: str | None = None,
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
    out: File | None = None,
    overwrite: bool = False,
    rng: int | np.random.Generator = 0,
    draws: Any = None,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | np.ndarray | zarr.Array | None:
    """Embed cells with a foundation model.

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
        one that scfm saved, or a model from :func:`scfm.load`.
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
    gene_symbols, gene_ids
        Columns of ``adata.var`` with gene symbols and Ensembl ids; by default they are looked for.
    aliases
        HGNC table of previous and alias symbols: a file, a data frame, or a :class:`scfm.genes.AliasTable`. By default
        ``hgnc_complete_set.txt`` in ``scfm.settings.cachedir`` if it is there; ``False`` uses none.
    duplicates
        Columns of the same gene are summed, kept apart, or refused; by default as the model's ``tokenize`` does,
        which is to sum counts.
    device, precision
        Where and in which floating-point type to compute; ``"auto"`` follows ``scfm.settings``. A model that is loaded
        already stays as it is unless one of them is named.
    batch_size, tokens_per_batch
        Most cells, and most tokens with padding, in one forward pass. By default a token budget that suits the device.
        If memory runs out, the budget is halved and the run goes on.
    block_size
        Cells read at a time.
    out
        Folder of a zarr array, float32 of shape ``(cells, dim)``, to which finished blocks are written. A run that was
        interrupted goes on where it stopped.
    overwrite
        Replace the result of another run at ``out``.
    rng
        Seed of random choices in the tokenizer; a generator gives one seed, which is recorded.
    draws
        Random numbers to use instead, for models whose tokenizer takes them; one entry for each cell.
    progress
        Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2 and the run takes more
        than two seconds.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``; for files and lists the embedding itself, as the zarr array if ``out``
    is given and else as a numpy array. In ``adata`` these are set:

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
        If values are not what the model needs, no gene is known, there are no genes, or ``out`` holds the result of
        another run.
    UnsupportedError
        If the model has no cell embeddings.

    See Also
    --------
    scfm.load : The model itself.

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
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    backbone.require("embeds")
    pooling = backbone.check_pooling(pooling)
    seed = seed_of(rng)

    with open_source(adata, layer=layer, use_raw=use_raw) as source:
        start = _logging.info(f"embedding {source.n_obs:,} cells with {backbone!r}")
        match = match_genes(backbone, source, gene_symbols=gene_symbols, gene_ids=gene_ids, aliases=aliases)
        options = tokenizer_options(
            backbone, tokenize_options, n_obs=source.n_obs, seed=seed, duplicates=duplicates, draws=draws
        )
        result = engine.run(
            backbone,
            source,
            match,
            lambda backbone, tokens: _cells(backbone, tokens, pooling),
            shape=(backbone.embedding_dim(pooling),),
            task={"output": "cell embedding", "pooling": pooling},
            options=options,
            check=InputCheck(backbone, source, match, options),
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            block_size=block_size,
            out=out,
            overwrite=overwrite,
            progress=progress,
        )
        params = {
            "layer": layer,
            "use_raw": use_raw,
            "pooling": pooling,
            "duplicates": duplicates,
            "rng": seed,
            "draws": None if draws is None else "given",
            "tokenize_options": tokenize_options or None,
        }
        record = run_record(backbone, source, match, params)

    if result.n_empty:
        _logging.warning(
            f"{result.n_empty:,} of {source.n_obs:,} cells have no expressed gene that {backbone.name} knows; "
            "their embedding is NaN"
        )
    if not in_memory:
        _logging.info("    finished", time=start)
        return result.array
    name = result_name(backbone)
    key, record_key = (key_added, key_added) if key_added else (_keys.embedding(name), _keys.record(name))
    adata.obsm[key] = result.array if out is None else result.array[...]
    adata.uns[record_key] = record
    _logging.info(
        "    finished",
        time=start,
        deep=f"added\n    {key!r}, cell embedding (adata.obsm)\n    {record_key!r}, record of the run (adata.uns)",
    )
    return adata if copy else None


def _cells(backbone: Backbone, tokens: TokenBatch, pooling: str) -> Tensor:
    return backbone.embed(tokens, pooling=pooling)
