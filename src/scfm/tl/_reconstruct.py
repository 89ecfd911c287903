"""Expression as a model predicts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _keys, _logging
from .._docs import shared_parameters
from ..backbones._task_weights import weights_for
from ._inputs import check_can_hold_results, load_backbone, prepared, result_name
from ._predicted import check_wanted, columns_to_predict, predict_into

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    import numpy as np
    from anndata import AnnData

    from .._settings import Precision
    from ._inputs import Aliases, Model


@shared_parameters
def reconstruct(
    adata: AnnData,
    model: Model = "scfoundation",
    *,
    genes: Sequence[str] | Literal["expressed", "all"] = "expressed",
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
    draws: Any = None,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | None:
    """Predict the expression of genes from the cells that a model has seen.

    The scale of the prediction is that of the model: see ``uns["<model>_reconstructed"]["params"]["scale"]``.

    Parameters
    ----------
    adata
        Annotated data, in memory or backed.
    model
        As in :func:`scfm.tl.embed`.
    genes
        What to predict: ``"expressed"``, the genes that each cell expresses; ``"all"`` genes of ``adata`` that the
        model knows; or names of genes of ``adata``, or of the model, in every cell.
    layer
        Layer with the counts; by default ``X``.
    use_raw
        Take the counts from ``adata.raw``, which needs to have the genes of ``adata``.
    key_added
        Name of the slots; by default ``"<model>_reconstructed"``.
    weights
        Which weights of a checkpoint that holds several; by default those the authors take for expression, if ``model`` is
        the name of a released one.
    {genes_of_data}
    {compute}
    out
        Folder of a zarr array, float32 of shape ``(cells, genes)``, to write to instead of ``adata``; needed where the
        prediction is larger than 2 GiB. A run that was interrupted goes on where it stopped.
    overwrite
        Replace the result of another run at ``out``.
    {random}
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``; arrays have one entry for each cell.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set are:

    ``.layers["<model>_reconstructed"]``
        For ``"expressed"`` a sparse matrix that holds a value where the model saw one; for ``"all"`` a dense one with
        NaN for genes that the model does not know, and for cells without any that it does.
    ``.obsm["<model>_reconstructed"]``
        For chosen genes, a data frame with one column for each.
    ``.uns["<model>_reconstructed"]``
        Arguments, checkpoint, share of genes matched and, in ``params``, the ``scale`` and the names of the columns.

    Raises
    ------
    KeyError
        If ``layer`` or a gene does not exist.
    MemoryError
        If the prediction is larger than 2 GiB and ``out`` is not given.
    ValueError
        If values are not what the model needs, or ``out`` is given for expressed genes.
    UnsupportedError
        If the model does not predict expression, or not that of genes it has not seen.
    """
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    check_wanted(genes, out=out, duplicates=duplicates)
    weights = weights_for(model, "expression") if weights is None else weights
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    backbone.require("reconstructs")
    key = key_added or _keys.reconstruction(result_name(backbone))
    with prepared(
        adata,
        backbone,
        what="predicting the expression of",
        layer=layer,
        use_raw=use_raw,
        gene_symbols=gene_symbols,
        gene_ids=gene_ids,
        aliases=aliases,
        duplicates=duplicates,
        rng=rng,
        draws=draws,
        tokenize_options=tokenize_options,
    ) as task:
        columns = columns_to_predict(adata, task, genes, out=out)
        where = predict_into(
            adata,
            task,
            genes,
            columns,
            key,
            out=out,
            overwrite=overwrite,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            block_size=block_size,
            progress=progress,
        )
        adata.uns[key] = task.record(
            {
                "genes": genes if isinstance(genes, str) else list(genes),
                "scale": backbone.expression_scale,
                "out": None if out is None else str(out),
            }
        )
    _logging.info("    finished", time=task.start, deep=f"added\n    {key!r}, predicted expression ({where})")
    return adata if copy else None
