"""Predicted expression: which genes are wanted, and where the result goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import engine

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData

    from ._inputs import Task


def check_wanted(genes: Sequence[str] | str, *, out: object, duplicates: str | None) -> None:
    """Raise ``ValueError`` for arguments that cannot be met, before a model is loaded."""
    if isinstance(genes, str) and genes not in ("expressed", "all"):
        msg = f"genes must be 'expressed', 'all' or a list of names; got {genes!r}"
        raise ValueError(msg)
    if duplicates == "keep":
        msg = "a gene has one prediction per cell, so that its columns cannot be kept apart; use duplicates='sum'"
        raise ValueError(msg)
    if isinstance(genes, str) and genes == "expressed" and out is not None:
        msg = "out= is for the same genes in all cells; give genes='all' or a list of names"
        raise ValueError(msg)


def columns_to_predict(adata: AnnData, task: Task, genes: Sequence[str] | str, *, out: object) -> np.ndarray | None:
    """Vocabulary ids of the genes to predict in all cells, or ``None`` for the expressed genes of each cell.

    Raises
    ------
    KeyError
        If a gene is not known.
    MemoryError
        If the result is too large for memory and there is no ``out``.
    ValueError
        If the matrix has other genes than ``adata`` and none are named.
    """
    if isinstance(genes, str) and len(task.match) != adata.n_vars:
        msg = "adata.raw has other genes than adata; name the genes to predict with genes=[...]"
        raise ValueError(msg)
    if isinstance(genes, str) and genes == "expressed":
        return None
    columns = engine.genes_to_predict(task.match, genes)
    if out is None:
        engine.check_size(task.source.n_obs, len(columns))
    return columns


def predict_into(
    adata: AnnData,
    task: Task,
    genes: Sequence[str] | str,
    columns: np.ndarray | None,
    key: str,
    *,
    minimum: float | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """Predict, and store the result under ``key``.

    Parameters
    ----------
    columns
        Result of :func:`columns_to_predict`.
    minimum
        What smaller predictions are set to.
    **options
        Sizes, and ``progress``.

    Returns
    -------
    Where the result went, for the log.
    """
    if columns is None:
        adata.layers[key] = engine.predict_expressed(task, minimum=minimum, **options)
        return "adata.layers"
    values = engine.predict_everywhere(task, columns, minimum=minimum, out=out, overwrite=overwrite, **options)
    if out is not None:
        return str(out)
    if isinstance(genes, str):
        adata.layers[key] = values
        return "adata.layers"
    adata.obsm[key] = pd.DataFrame(values, index=adata.obs_names, columns=list(genes))
    return "adata.obsm"
