"""Expression as a model predicts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from .. import _keys, _logging, engine
from .._docs import shared_parameters
from ._inputs import check_can_hold_results, load_backbone, prepared, result_name

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Literal

    from anndata import AnnData

    from .._settings import Precision
    from ..backbones import Backbone, TokenBatch
    from ..genes import GeneMatch
    from ._inputs import Aliases, Model, Task

_MEMORY_BYTES = 2 * 2**30


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
        Which weights of a checkpoint that holds several.
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
    if isinstance(genes, str) and genes not in ("expressed", "all"):
        msg = f"genes must be 'expressed', 'all' or a list of names; got {genes!r}"
        raise ValueError(msg)
    if duplicates == "keep":
        msg = "a gene has one prediction per cell, so that its columns cannot be kept apart; use duplicates='sum'"
        raise ValueError(msg)
    chosen = not isinstance(genes, str)
    if not chosen and genes == "expressed" and out is not None:
        msg = "out= is for the same genes in all cells; give genes='all' or a list of names"
        raise ValueError(msg)
    backbone = load_backbone(model, device=device, precision=precision, weights=weights)
    backbone.require("reconstructs")
    key = key_added or _keys.reconstruction(result_name(backbone))
    sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
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
        params = {"genes": genes if not chosen else list(genes), "scale": backbone.expression_scale}
        if not chosen and len(task.match) != adata.n_vars:
            msg = "adata.raw has other genes than adata; name the genes to predict with genes=[...]"
            raise ValueError(msg)
        if not chosen and genes == "expressed":
            adata.layers[key] = _expressed(task, progress=progress, **sizes)
        else:
            columns = _columns(task.match, genes)
            if out is None:
                _check_size(task.source.n_obs, len(columns))
            values = _everywhere(task, columns, out=out, overwrite=overwrite, progress=progress, **sizes)
            if out is not None:
                params["out"] = str(out)
            elif chosen:
                adata.obsm[key] = pd.DataFrame(values, index=adata.obs_names, columns=list(genes))
            else:
                adata.layers[key] = values
        adata.uns[key] = task.record(params)
    where = str(out) if out is not None else "adata.obsm" if chosen else "adata.layers"
    _logging.info("    finished", time=task.start, deep=f"added\n    {key!r}, predicted expression ({where})")
    return adata if copy else None


def _columns(match: GeneMatch, genes: Sequence[str] | str) -> np.ndarray:
    """Vocabulary ids of the genes to predict; -1 for genes of the data that the model does not know."""
    if isinstance(genes, str):
        return match.ids
    names = np.asarray(list(genes), dtype=object)
    where = pd.Index(match.names).get_indexer_for(names) if pd.Index(match.names).is_unique else None
    by_data = np.full(len(names), -1, dtype=np.int64) if where is None else np.where(where >= 0, match.ids[where], -1)
    ids = np.where(by_data >= 0, by_data, match.vocab.get_ids(names))
    if (ids < 0).any():
        msg = f"the model does not know {', '.join(map(str, names[ids < 0][:10]))}"
        raise KeyError(msg)
    return ids


def _check_size(n_cells: int, n_genes: int) -> None:
    n_bytes = 4 * n_cells * n_genes
    if n_bytes > _MEMORY_BYTES:
        msg = (
            f"{n_genes:,} genes in {n_cells:,} cells would need {n_bytes / 2**30:.1f} GiB; give a folder with out=, "
            "choose genes, or predict the expressed ones only (genes='expressed')"
        )
        raise MemoryError(msg)


def _everywhere(task: Task, columns: np.ndarray, **writing: Any) -> Any:
    """Predictions of the same genes in all cells, ``(cells, genes)``."""
    wanted, place = np.unique(columns[columns >= 0], return_inverse=True)

    def compute(backbone: Backbone, tokens: TokenBatch) -> torch.Tensor:
        table = torch.full((len(tokens), len(wanted)), torch.nan, device=backbone.device)
        position = torch.full((len(backbone.vocab),), -1, device=backbone.device)
        position[torch.as_tensor(wanted, device=backbone.device)] = torch.arange(len(wanted), device=backbone.device)
        for part in backbone.iter_reconstruction(tokens, wanted):
            table[part.cells, position[part.genes]] = part.values.float()
        values = torch.full((len(tokens), len(columns)), torch.nan, device=backbone.device)
        values[:, torch.as_tensor(columns >= 0)] = table[:, torch.as_tensor(place)]
        return values

    result = engine.run(
        **task.inputs,
        compute=compute,
        shape=(len(columns),),
        task={"output": "expression", "genes": columns.tolist()},
        **writing,
    )
    return result.array


def _expressed(task: Task, **options: Any) -> sparse.csr_matrix:
    """Predictions of the expressed genes of each cell, in the columns of the data."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def consume(cells: np.ndarray, rows: list) -> None:
        for part in rows:
            values = part.values.float().cpu().numpy()
            parts.append((cells[part.cells.cpu().numpy()], part.genes.cpu().numpy(), values))

    compute = lambda backbone, tokens: list(backbone.iter_reconstruction(tokens))
    engine.visit(**task.inputs, compute=compute, consume=consume, **options)
    ids, n_vocab = task.match.ids, len(task.backbone.vocab)
    empty = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    cells, genes, values = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    table = sparse.csr_matrix((values, (cells, genes)), shape=(task.source.n_obs, n_vocab), dtype=np.float32)
    # a gene that several columns of the data share has its prediction in each of them
    known = np.flatnonzero(ids >= 0)
    spread = sparse.csr_matrix((np.ones(len(known), np.float32), (ids[known], known)), shape=(n_vocab, len(ids)))
    return (table @ spread).tocsr()
