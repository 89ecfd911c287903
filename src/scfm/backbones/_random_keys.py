"""Random numbers that belong to a gene of a cell, whatever stands beside it."""

from __future__ import annotations

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of the splitmix64 generator: spreads every input bit over all 64 output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def content_keys(ids: np.ndarray, values: np.ndarray, offsets: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """A 64-bit random key for each gene of each cell, from the seed, the cell's content and the gene.

    Keys depend neither on the order of cells or genes nor on which cells are processed together.
    """
    with np.errstate(over="ignore"):
        gene = _mix((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        token = _mix(gene ^ np.ascontiguousarray(values, dtype=np.float64).view(np.uint64))
        # a sum is the same for every order of the genes
        sums = np.concatenate([[np.uint64(0)], np.cumsum(token, dtype=np.uint64)])
        cell = _mix(sums[offsets[1:]] - sums[offsets[:-1]] + np.uint64(seed % 2**63) * np.uint64(0xD1342543DE82EF95))
        return _mix(np.repeat(cell, np.diff(offsets)) + gene + np.uint64(stream) * np.uint64(0xA0761D6478BD642F))
