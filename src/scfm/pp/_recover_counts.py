"""``scfm.pp.recover_counts``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import _keys, _logging
from .._count_recovery import LOG_BASES, Recovered, common_total, recover_block
from ..data import open_source
from ._check_counts import BLOCK_CELLS, gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from .._counts import CountStats
    from ..data import CellSource

# float32 holds all whole numbers up to here
_EXACT_IN_FLOAT32 = 2**24


def recover_counts(
    adata: AnnData,
    *,
    layer: str | None = None,
    use_raw: bool | None = None,
    size_factors: str | Sequence[float] | np.ndarray | None = None,
    key_added: str = _keys.RECOVERED_LAYER,
    copy: bool = False,
) -> AnnData | None:
    """Get whole-number counts back from normalised or log-normalised data.

    Within a cell all normalised values are multiples of one number, the value of a single count. For every cell the
    largest such number that fits all its values is looked for, so that nothing needs to be known about the
    normalisation; data that are no such multiples, because they were imputed, corrected or scaled, are refused. The
    logarithm (``log1p``, base e, 2 or 10) is recognised by the same test. Values that were written with few decimals
    are taken for what they can tell.

    Counts of a cell are found up to a common divisor. A cell all of whose counts are even, or a cell with a single
    expressed gene, comes out too small unless ``size_factors`` are given.

    Parameters
    ----------
    adata
        Annotated data.
    layer
        Layer with the normalised values; ``adata.X`` by default.
    use_raw
        Take the values of ``adata.raw``. Its genes may be more than those of ``adata``; all of them are used to find
        the counts, those of ``adata`` are kept.
    size_factors
        What the counts of each cell were divided by, up to a factor common to all cells, such as total counts: a column
        of ``adata.obs`` or one number per cell.
    key_added
        Layer to write.
    copy
        Work on a copy and return it.

    Returns
    -------
    ``None``, or the copy. Sets the following fields:

    ``adata.layers['counts' | key_added]``
        Counts (CSR, float32 unless a count is above 2^24), in memory.
    ``adata.uns['recover_counts']``
        Evidence: ``kind``, ``log_base``, ``decimals`` the values were rounded to (-1: not rounded), ``share_recovered``
        of the cells, ``n_empty_cells``, ``max_deviation`` from a whole number, ``n_uncertain`` values too large for the
        precision of the input, ``target_sum`` (NaN if totals differ), ``scale_min``, ``scale_median``, ``scale_max``
        (value of one count), ``source``, ``size_factors``.

    Raises
    ------
    KeyError
        If the layer or the column of ``adata.obs`` does not exist.
    ValueError
        If the values are negative, not finite, or not multiples of one number per cell.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> scfm.settings.verbosity = 1
    >>> adata = sc.datasets.pbmc68k_reduced()  # scaled values in .X, log-normalised values in .raw
    >>> scfm.pp.recover_counts(adata, use_raw=True)
    >>> scfm.pp.check_counts(adata, layer="counts").kind
    'counts'
    """
    start = _logging.info("recovering counts")
    adata = adata.copy() if copy else adata
    factors = _size_factors(adata, size_factors)
    with open_source(adata, layer=layer, use_raw=bool(use_raw)) as source:
        columns = _columns_of(adata, source)
        stats = gather(source)
        _refuse_other_values(stats, source, adata)
        found = _find(source, stats, factors)
    _refuse_failures(found, adata, source.where, with_factors=factors is not None)

    counts = found.counts if columns is None else found.counts[:, columns]
    if key_added in adata.layers and _keys.RECOVERED_RECORD not in adata.uns:
        _logging.warning(f"layers[{key_added!r}] is overwritten")
    adata.layers[key_added] = counts
    record = _evidence(found, stats)
    record |= {
        "source": source.where,
        "size_factors": size_factors if isinstance(size_factors, str) else factors is not None,
    }
    adata.uns[_keys.RECOVERED_RECORD] = record
    _logging.info(
        f"    finished: {record['kind']} values of {adata.n_obs:,} cells, at most {found.deviation_max:.2g} from a "
        f"whole number, written to layers[{key_added!r}]",
        time=start,
    )
    if found.n_uncertain:
        _logging.warning(f"{found.n_uncertain:,} counts are too large to be exact to the last digit")
    return adata if copy else None


@dataclass
class _Known:
    """Value of one count in each cell, and its relative error."""

    values: np.ndarray
    error: float = 1e-6


@dataclass
class _Found:
    counts: csr_matrix
    scale: np.ndarray
    totals: np.ndarray
    deviation: np.ndarray
    failed: np.ndarray
    n_uncertain: int

    @property
    def deviation_max(self) -> float:
        return float(np.nanmax(self.deviation, initial=0.0))


def _columns_of(adata: AnnData, source: CellSource) -> np.ndarray | None:
    """Which columns of the source are the genes of ``adata``; ``None`` if it is all of them, in order."""
    names = source.var_names
    if names.equals(adata.var_names):
        return None
    if not names.is_unique:
        msg = "adata.raw has duplicate gene names and other genes than adata; take adata.raw.to_adata() and use its X"
        raise ValueError(msg)
    columns = names.get_indexer(adata.var_names)
    if (columns < 0).any():
        missing = adata.var_names[columns < 0]
        msg = (
            f"{len(missing):,} genes of adata are not in adata.raw, the first is {missing[0]!r}; "
            "recover the counts of adata.raw.to_adata() instead"
        )
        raise ValueError(msg)
    return columns


def _size_factors(adata: AnnData, size_factors: str | Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    if size_factors is None:
        return None
    if isinstance(size_factors, str):
        if size_factors not in adata.obs:
            msg = (
                f"size_factors={size_factors!r} is not a column of adata.obs; there are {', '.join(adata.obs.columns)}"
            )
            raise KeyError(msg)
        size_factors = adata.obs[size_factors]
    factors = np.asarray(size_factors, dtype=np.float64)
    if factors.shape != (adata.n_obs,) or not (np.isfinite(factors).all() and (factors >= 0).all()):
        msg = f"size_factors must be {adata.n_obs} non-negative numbers, one per cell; got shape {factors.shape}"
        raise ValueError(msg)
    return factors


def _refuse_other_values(stats: CountStats, source: CellSource, adata: AnnData) -> None:
    kind = stats.kind
    if kind in ("counts", "normalized", "log-normalized", "empty"):
        return
    msg = f"counts cannot be recovered from {source.where}: it {stats.problem()}."
    if kind == "scaled":
        msg += " Centring and scaling cannot be undone."
        if adata.raw is not None and not source.where.startswith("adata.raw"):
            msg += " adata.raw may hold the values from before scaling: use_raw=True."
        else:
            msg += " Go back to the data from before sc.pp.scale."
    elif not (stats.n_negative or stats.n_nan or stats.n_infinite):
        msg += (
            " They are not multiples of one number per cell with any usual logarithm undone, as values are that were "
            "rounded coarsely, imputed, batch-corrected or regressed. Go back to the original counts."
        )
    raise ValueError(msg)


def _find(source: CellSource, stats: CountStats, factors: np.ndarray | None) -> _Found:
    """Cell by cell; then, where the cells are tied together, with one factor for all of them."""
    alone = _recover(source, stats)
    if stats.kind == "counts" or not (alone.scale > 0).any():
        return alone
    if factors is not None:
        return _recover(source, stats, _scale_from(factors, alone, stats.n_empty_cells))
    if _is_common(alone.scale):
        together = _recover(source, stats, _scale_from(np.ones(source.n_obs), alone, stats.n_empty_cells))
        return alone if together.failed.any() else together
    return alone


def _recover(source: CellSource, stats: CountStats, scale: _Known | None = None) -> _Found:
    decimals = None if stats.transform is None else stats.transform.decimals
    blocks, parts = [], []
    for start, stop, block in source.blocks(BLOCK_CELLS):
        known = {} if scale is None else {"scale": scale.values[start:stop], "scale_error": scale.error}
        if stats.kind == "counts":
            part = _unchanged(block)
        else:
            part = recover_block(block, stats.log_base, decimals=decimals, **known)
        dtype = np.float32 if part.counts.max(initial=0) <= _EXACT_IN_FLOAT32 else np.float64
        # copies, because the block may share its arrays with the input
        arrays = (part.counts.astype(dtype), block.indices.copy(), block.indptr.copy())
        blocks.append(sparse.csr_matrix(arrays, shape=block.shape))
        parts.append(part)
    counts = sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix(source.reader.shape, dtype=np.float32)
    joined = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts]) if parts else np.zeros(0)
        for f in fields(_Found)
        if f.name not in ("counts", "n_uncertain")
    }
    return _Found(counts, n_uncertain=sum(part.n_uncertain for part in parts), **joined)


def _unchanged(counts: csr_matrix) -> Recovered:
    filled = np.diff(counts.indptr) > 0
    one = np.where(filled, 1.0, np.nan)
    totals = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    return Recovered(counts.data, one, totals, np.where(filled, 0.0, np.nan), np.zeros(len(filled), dtype=bool), 0)


def _is_common(scale: np.ndarray) -> bool:
    """Whether nearly all cells have one scale, so that they were not normalised one by one."""
    scale = scale[scale > 0]
    return len(scale) > 0 and bool(np.mean(np.abs(scale / np.median(scale) - 1) < 1e-3) > 0.9)


def _scale_from(factors: np.ndarray, found: _Found, n_empty: int) -> _Known:
    """Value of one count in each cell, when it is inversely proportional to the size factors."""
    if (factors == 0).sum() > n_empty:
        msg = "size_factors holds zeros for cells that have counts"
        raise ValueError(msg)
    known = found.scale > 0
    # a cell whose counts have a common divisor has too large a scale, so most cells, not all, agree on the factor
    constants = (found.scale * factors)[known]
    constant = np.median(constants)
    with np.errstate(divide="ignore"):
        return _Known(constant / factors, 1e-6 + float(np.median(np.abs(constants / constant - 1))))


def _refuse_failures(found: _Found, adata: AnnData, where: str, *, with_factors: bool) -> None:
    n_failed = int(found.failed.sum())
    if not n_failed:
        return
    some = ", ".join(adata.obs_names[found.failed][:5])
    why = (
        "their values times size_factors are not multiples of one number; check that these are the factors the counts "
        "were divided by"
        if with_factors
        else "their values are not multiples of one number, or their smallest count is above 20. Their values may have "
        "been changed after normalisation (coarse rounding, correction, averaging of cells). Remove these cells, give "
        "size_factors= if you have them, or go back to the original counts"
    )
    msg = f"the counts of {n_failed:,} of {adata.n_obs:,} cells in {where} cannot be recovered ({some} ...): {why}."
    raise ValueError(msg)


def _evidence(found: _Found, stats: CountStats) -> dict[str, Any]:
    filled = found.scale[found.scale > 0]
    low, middle, high = np.quantile(filled, [0, 0.5, 1]) if len(filled) else (np.nan,) * 3
    target = common_total(found.totals)
    return {
        "kind": stats.kind,
        "log_base": next((name for name, value in LOG_BASES.items() if value == stats.log_base), "none"),
        "decimals": -1 if stats.transform is None or stats.transform.decimals is None else stats.transform.decimals,
        "share_recovered": float(1.0 - found.failed.mean()) if len(found.failed) else 1.0,
        "n_empty_cells": stats.n_empty_cells,
        "max_deviation": found.deviation_max,
        "n_uncertain": found.n_uncertain,
        "target_sum": np.nan if target is None else target,
        "scale_min": float(low),
        "scale_median": float(middle),
        "scale_max": float(high),
    }
