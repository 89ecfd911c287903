"""Whether a matrix holds counts: statistics that are gathered block by block while it is read."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from ._count_recovery import Transform, guess_transform

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CountKind = Literal["counts", "normalized", "log-normalized", "scaled", "unknown", "empty"]

_SAMPLE_CELLS = 100


class CountStats:
    """Running statistics of the values of a matrix.

    Feed it with :meth:`update`; it costs a few passes over the values of each block.

    Attributes
    ----------
    n_cells, n_genes
        Shape of what was seen.
    n_empty_cells
        Cells without any non-zero value.
    n_nonzero
        Number of values other than zero, NaN and infinite ones included.
    n_noninteger, n_negative, n_nan, n_infinite
        Numbers of such values.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> CountStats().update(csr_matrix([[0, 3], [1, 0]])).kind
    'counts'
    """

    def __init__(self) -> None:
        self.n_cells = self.n_genes = self.n_empty_cells = self.n_nonzero = 0
        self.n_noninteger = self.n_negative = self.n_nan = self.n_infinite = 0
        self._min, self._max = np.inf, -np.inf
        self._sample: list[csr_matrix] = []

    def update(self, block: csr_matrix | np.ndarray) -> CountStats:
        """Add a block of cells, sparse or dense, of shape ``(cells, genes)``."""
        block = sparse.csr_matrix(block)
        values = block.data
        n_nonzero = np.count_nonzero(values)
        if n_nonzero < len(values):
            block = block.copy()
            block.eliminate_zeros()
            values = block.data
        self.n_cells += block.shape[0]
        self.n_genes = block.shape[1]
        self.n_empty_cells += int((np.diff(block.indptr) == 0).sum())
        self.n_nonzero += int(n_nonzero)
        if n_nonzero < block.shape[0] * block.shape[1]:
            self._min, self._max = min(self._min, 0), max(self._max, 0)
        if not n_nonzero:
            return self
        smallest, largest = values.min(), values.max()
        if not np.isfinite(smallest) or not np.isfinite(largest):
            self.n_nan += int(np.isnan(values).sum())
            self.n_infinite += int(np.isinf(values).sum())
            finite = values[np.isfinite(values)]
            smallest, largest = finite.min(initial=np.inf), finite.max(initial=-np.inf)
        self._min, self._max = min(self._min, smallest), max(self._max, largest)
        if smallest < 0:
            self.n_negative += int((values < 0).sum())
        if np.issubdtype(values.dtype, np.floating):
            n_noninteger = len(values) - int(np.count_nonzero(np.rint(values) == values))
            self.n_noninteger += n_noninteger
            if n_noninteger:
                self._keep_sample(block)
        self.__dict__.pop("transform", None)
        return self

    def _keep_sample(self, block: csr_matrix) -> None:
        room = _SAMPLE_CELLS - sum(part.shape[0] for part in self._sample)
        rows = np.flatnonzero(np.diff(block.indptr))
        if room > 0:
            self._sample.append(block[rows[:: -(-len(rows) // room)]])

    @property
    def min(self) -> float:
        """Smallest finite value, zeros included; NaN if there is none."""
        return float(self._min) if np.isfinite(self._min) else np.nan

    @property
    def max(self) -> float:
        """Largest finite value, zeros included; NaN if there is none."""
        return float(self._max) if np.isfinite(self._max) else np.nan

    @property
    def integer_share(self) -> float:
        """Share of whole numbers among the non-zero values; 1 if there are none."""
        return 1.0 - self.n_noninteger / self.n_nonzero if self.n_nonzero else 1.0

    @cached_property
    def transform(self) -> Transform | None:
        """How the values were made from counts; ``None`` for whole, negative or missing values."""
        if not self._sample or self.n_negative or self.n_nan or self.n_infinite:
            return None
        return guess_transform(sparse.vstack(self._sample, format="csr"))

    @property
    def kind(self) -> CountKind:
        """What the values are.

        ``"counts"``: whole numbers. ``"normalized"``, ``"log-normalized"``: multiples of one number per cell, or equal
        cell totals, without and with a logarithm. ``"scaled"``: negative fractions. ``"empty"``: nothing but zeros.
        ``"unknown"``: anything else, such as NaN, negative whole numbers, or estimated counts with fractions.
        """
        if not self.n_nonzero:
            return "empty"
        if self.n_nan or self.n_infinite:
            return "unknown"
        if self.n_negative:
            return "scaled" if self.n_noninteger else "unknown"
        if not self.n_noninteger:
            return "counts"
        transform = self.transform
        if transform is not None and (transform.share > 0.5 or transform.target_sum is not None):
            return transform.kind
        return "unknown"

    @property
    def target_sum(self) -> float | None:
        """Total of each cell before a logarithm, where normalisation made it the same for all cells."""
        return self.transform.target_sum if self.kind in ("normalized", "log-normalized") else None

    @property
    def log_base(self) -> float | None:
        """Base of the logarithm that was taken, where one was recognised."""
        return self.transform.base if self.kind == "log-normalized" else None

    def problem(self) -> str:
        """What keeps the values from being counts, as the end of a sentence; empty if nothing does."""
        shape = f"of {self.n_nonzero:,} non-zero values"
        if self.n_nan or self.n_infinite:
            return f"holds {self.n_nan:,} NaN and {self.n_infinite:,} infinite values ({shape})"
        if self.n_negative:
            what = "they look scaled or centred" if self.n_noninteger else "counts are never negative"
            return f"holds {self.n_negative:,} negative values ({shape}, smallest {self.min:.4g}); {what}"
        if self.n_noninteger:
            kind = self.kind
            what = {
                "normalized": "they look normalised",
                "log-normalized": "they look log-normalised",
            }.get(kind, "they are neither counts nor plainly normalised counts")
            if self.target_sum is not None:
                what += f" to {self.target_sum:,.6g} per cell"
            return f"holds {self.n_noninteger:,} values that are not whole numbers ({shape}, largest {self.max:.4g}); {what}"
        return ""

    def remedy(self) -> str:
        """What to do about :meth:`problem`; empty if there is none."""
        if self.n_nan or self.n_infinite:
            return "Find out where they come from; zero is right only for genes that were looked for and not found."
        if self.n_negative:
            return "Name the layer with raw counts (layer=), or recover them from adata.raw: scfm.pp.recover_counts(adata, use_raw=True)."
        if self.kind in ("normalized", "log-normalized"):
            return "Name the layer with raw counts (layer=), or recover them with scfm.pp.recover_counts."
        if self.n_noninteger:
            return (
                "Name the layer with raw counts (layer=). Counts estimated by RSEM, Salmon, alevin or SoupX can be "
                "rounded first; imputed or corrected values cannot be turned back."
            )
        return ""
