"""Which genes a new network knows: those that the training data have most to say about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BLOCK = 2048
_TARGET_SUM = 1e4


def frequent_genes(sources: Sequence[str | Path], n_genes: int, *, layer: str | None = None) -> list[str]:
    """Names of the genes that are detected in the largest share of the cells that measure them, sorted by name."""
    detected, measured = pd.Series(dtype=float), pd.Series(dtype=float)
    for path in sources:
        with open_source(path, layer=layer) as source:
            counts = np.zeros(source.n_vars)
            for block in source.blocks(_BLOCK):
                counts += np.bincount(block.counts.indices, minlength=source.n_vars)
            names = pd.Index(source.var_names)
            detected = detected.add(pd.Series(counts, index=names).groupby(level=0).sum(), fill_value=0)
            cells = pd.Series(float(source.n_obs), index=names.unique())
            measured = measured.add(cells, fill_value=0)
    # a gene measured in few cells only is not frequent, however often it is seen there
    share = detected / np.maximum(measured, measured.max() / 4)
    return sorted(share.sort_values(ascending=False, kind="stable").index[:n_genes])


def variable_genes(
    sources: Sequence[str | Path], n_genes: int, *, layer: str | None = None, measured_share: float = 0.95
) -> list[str]:
    """Names of the genes whose log-normalised counts vary most within the sources that measure them, sorted by name.

    A network that learns from sources with different genes can tell the sources apart by what they do not measure; genes
    that nearly all cells have in common avoid that.

    Parameters
    ----------
    sources
        Files with raw counts.
    n_genes
        Number of genes.
    layer
        Layer with the counts.
    measured_share
        Share of the cells that have to come from sources that measure the gene.

    Raises
    ------
    ValueError
        If fewer genes are measured by so many cells.
    """
    variance, measured, n_cells = pd.Series(dtype=float), pd.Series(dtype=float), 0
    for path in sources:
        with open_source(path, layer=layer) as source:
            total, squares = np.zeros(source.n_vars), np.zeros(source.n_vars)
            for block in source.blocks(_BLOCK):
                counts = block.counts.astype(np.float64)
                depth = np.repeat(np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr))
                values = np.log1p(counts.data * (_TARGET_SUM / np.where(depth > 0, depth, 1)))
                total += np.bincount(counts.indices, weights=values, minlength=source.n_vars)
                squares += np.bincount(counts.indices, weights=values**2, minlength=source.n_vars)
            names, n = pd.Index(source.var_names), max(1, source.n_obs)
            spread = pd.Series(n * (squares / n - (total / n) ** 2), index=names)
            variance = variance.add(spread.groupby(level=0).max(), fill_value=0)
            measured = measured.add(pd.Series(float(source.n_obs), index=names.unique()), fill_value=0)
            n_cells += source.n_obs
    variance = (variance / measured)[measured >= measured_share * n_cells]
    if len(variance) < n_genes:
        msg = (
            f"only {len(variance):,} genes are measured in {measured_share:.0%} of the cells, {n_genes:,} are wanted; lower "
            "measured_share or n_genes"
        )
        raise ValueError(msg)
    return sorted(variance.sort_values(ascending=False, kind="stable").index[:n_genes])
