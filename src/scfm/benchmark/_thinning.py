"""Binomial thinning: a cell as shallower sequencing would have shown it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.special import bdtr

from ..backbones._random_keys import content_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# counts up to here are looked up in tables of their distributions, which is many times faster than solving for each
_TABLE_COUNTS = 1000
_STREAM = 17


def thin_counts(
    counts: sparse.csr_matrix | np.ndarray,
    rate: float,
    *,
    seed: int = 0,
    genes: Sequence[str] | np.ndarray | None = None,
) -> sparse.csr_matrix:
    """Keep each read with the same probability: every count ``n`` becomes a draw from ``Binomial(n, rate)``.

    The draw belongs to the cell's own counts, the gene and the seed: it depends neither on the other cells nor on the
    order of cells or genes. With the same seed, a higher rate keeps at least what a lower one keeps. Cells with exactly
    the same counts get the same draws.

    Parameters
    ----------
    counts
        Counts, ``(cells, genes)``, sparse or dense.
    rate
        Probability that a read is kept, from 0 to 1.
    seed
        Seed; the global random state is neither used nor changed.
    genes
        Names of the columns, so that their order does not matter; by default genes are told apart by their place.

    Returns
    -------
    Counts of the same shape and type as CSR, without stored zeros.

    Raises
    ------
    ValueError
        If ``rate`` is no probability, the values are not counts, or there is not one name for each column.

    Examples
    --------
    >>> import numpy as np
    >>> from scfm.benchmark import thin_counts
    >>> thin_counts(np.array([[10, 0, 1000]]), 0.1, seed=1).toarray().sum() < 200
    True
    """
    if not 0 <= rate <= 1:
        msg = f"rate={rate!r} is the probability that a read is kept, between 0 and 1"
        raise ValueError(msg)
    block = sparse.csr_matrix(counts, copy=True)
    block.sum_duplicates()
    block.eliminate_zeros()
    values = block.data.astype(np.float64)
    if len(values) and not (np.isfinite(values).all() and values.min() >= 0 and (values == np.rint(values)).all()):
        msg = "only counts can be thinned; the matrix holds negative, missing or fractional values"
        raise ValueError(msg)
    ids = np.arange(block.shape[1], dtype=np.uint64)
    if genes is not None:
        if len(genes) != block.shape[1]:
            msg = f"there are {len(genes)} names of genes for {block.shape[1]} columns"
            raise ValueError(msg)
        ids = pd.util.hash_array(np.asarray(genes, dtype=object))
    keys = content_keys(ids[block.indices], values, block.indptr, seed, _STREAM)
    # 53 bits are what a double holds; the half keeps zero out
    uniform = ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    block.data = _binomial(uniform, values.astype(np.int64), rate).astype(block.dtype)
    block.eliminate_zeros()
    return block


def _binomial(uniform: NDArray[np.float64], n: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Smallest ``k`` at which the distribution function of ``Binomial(n, rate)`` reaches ``uniform``."""
    if rate in (0, 1):
        return n * int(rate)
    out = np.empty(len(n), dtype=np.int64)
    small = n <= _TABLE_COUNTS
    sizes = np.flatnonzero(np.bincount(n[small], minlength=1))
    place = np.zeros(_TABLE_COUNTS + 1, dtype=np.int64)
    place[sizes] = np.arange(len(sizes))
    which = place[n[small]]
    # the tables of all sizes one after the other, the i-th between i and i + 1, so that one search serves them all
    first = np.cumsum(sizes + 1) - (sizes + 1)
    table = np.repeat(np.arange(len(sizes)), sizes + 1)
    k = np.arange(len(table)) - first[table]
    reached = table + bdtr(k.astype(np.float64), sizes[table], rate)
    out[small] = np.searchsorted(reached, which + uniform[small]) - first[which]
    out[~small] = stats.binom.ppf(uniform[~small], n[~small], rate)
    return np.clip(out, 0, n)
