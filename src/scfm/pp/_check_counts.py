"""``scfm.pp.check_counts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import _logging
from .._counts import CountKind, CountStats
from ..data import open_source

if TYPE_CHECKING:
    from anndata import AnnData

    from ..data import CellSource

BLOCK_CELLS = 4096
_LOOK_CELLS = 1000


@dataclass(frozen=True)
class CountCheck:
    """What :func:`check_counts` found.

    Attributes
    ----------
    kind
        ``"counts"``, ``"normalized"``, ``"log-normalized"``, ``"scaled"``, ``"unknown"`` or ``"empty"``.
    source
        Matrix that was looked at, such as ``"adata.X"``.
    integer_share
        Share of whole numbers among the non-zero values.
    min, max
        Smallest and largest finite value.
    n_negative, n_nan, n_infinite
        Number of such values.
    n_empty_cells
        Number of cells without any non-zero value.
    target_sum
        Total per cell that the data was normalised to, where that could be told.
    log_base
        Base of the logarithm that was taken, where that could be told.
    other_counts
        Other matrices of the object that hold counts, judged by their first cells.
    message
        What is wrong and what to do about it, or that nothing is.
    """

    kind: CountKind
    source: str
    integer_share: float
    min: float
    max: float
    n_negative: int
    n_nan: int
    n_infinite: int
    n_empty_cells: int
    target_sum: float | None
    log_base: float | None
    other_counts: tuple[str, ...]
    message: str

    @property
    def ok(self) -> bool:
        """Whether models that need counts can take the matrix."""
        return self.kind in ("counts", "empty")


def check_counts(adata: AnnData, *, layer: str | None = None, raise_error: bool = True) -> CountCheck:
    """Check that a matrix holds raw counts.

    Reads sparse, dense, backed and dask matrices in blocks.

    Parameters
    ----------
    adata
        Annotated data.
    layer
        Layer to look at; ``adata.X`` by default.
    raise_error
        Raise ``ValueError`` if the matrix does not hold counts.

    Returns
    -------
    What was found, with a message that says what to do.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If the matrix does not hold counts and ``raise_error`` is set, or if there is no matrix or no gene.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> scfm.pp.check_counts(sc.datasets.pbmc68k_reduced(), raise_error=False).kind
    'scaled'
    """
    with open_source(adata, layer=layer) as source:
        stats, where = gather(source), source.where
    others = ()
    if problem := stats.problem():
        others = _others_with_counts(adata, layer)
        message = f"{where} does not hold counts: it {problem}. {stats.remedy()}"
        if others:
            message += f" There are counts in {' and '.join(others)}."
    elif stats.kind == "empty":
        message = f"{where} holds nothing but zeros ({stats.n_cells:,} cells x {stats.n_genes:,} genes)."
    else:
        message = f"{where} holds counts up to {stats.max:,.0f}; {stats.n_empty_cells:,} cells have none."
    if raise_error and stats.problem():
        raise ValueError(message)
    _logging.debug(message)
    return CountCheck(
        kind=stats.kind,
        source=where,
        integer_share=stats.integer_share,
        min=stats.min,
        max=stats.max,
        n_negative=stats.n_negative,
        n_nan=stats.n_nan,
        n_infinite=stats.n_infinite,
        n_empty_cells=stats.n_empty_cells,
        target_sum=stats.target_sum,
        log_base=stats.log_base,
        other_counts=others,
        message=message,
    )


def gather(source: CellSource) -> CountStats:
    """Statistics of all values of a source."""
    stats = CountStats()
    for block in source.blocks(BLOCK_CELLS):
        stats.update(block.counts)
    return stats


def _others_with_counts(adata: AnnData, layer: str | None) -> tuple[str, ...]:
    """Names of the other matrices whose first cells are counts."""
    others = [{"layer": name} for name in adata.layers if name != layer]
    if layer is not None and adata.X is not None:
        others.append({})
    if adata.raw is not None:
        others.append({"use_raw": True})
    found = []
    for other in others:
        with open_source(adata, **other) as source:
            if CountStats().update(source.read(0, _LOOK_CELLS)).kind == "counts":
                found.append(source.where)
    return tuple(found)
