"""Small perturbed data and a learner for the tests of tools, benchmarks and plots of perturbations."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scfm import pp

SINGLES = ("A", "B", "C", "D")
PAIRS = ("A+B", "A+C", "B+D", "C+D")


def make_cells(n_cells: int = 12, n_genes: int = 40, seed: int = 0, types: bool = False) -> ad.AnnData:
    """Log-normalised cells in which each gene has its own response, and pairs the sum."""
    rng = np.random.default_rng(seed)
    effects = {name: np.where(rng.random(n_genes) < 0.4, rng.normal(0, 1.2, n_genes), 0) for name in SINGLES}
    base = rng.uniform(2.0, 5.0, n_genes)
    labels = np.repeat(["control", *SINGLES, *PAIRS], [3 * n_cells, *[n_cells] * 8])
    shift = np.array([sum((effects.get(gene, 0) for gene in name.split("+")), np.zeros(n_genes)) for name in labels])
    values = np.maximum(base + shift + rng.normal(0, 0.5, (len(labels), n_genes)), 0)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    if types:
        obs["type"] = np.array(["x", "y"])[np.arange(len(labels)) % 2]
    adata = ad.AnnData(
        sparse.csr_matrix(values.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    )
    pp.perturbation_setup(adata, control="control", cell_type_key="type" if types else None)
    return adata


class Learner:
    """Adds a pattern of its own for each gene, scaled by what the cell expresses; counts the blocks that it is asked for."""

    def __init__(self, genes=SINGLES, seed: int = 0, scale: float = 1.0) -> None:
        self.perturbable = pd.Index(list(genes))
        self.seed, self.scale, self.n_blocks, self.largest = seed, scale, 0, 0

    def iter_predictions(self, perturbations, control, batch_size=None, *, seed=0):
        step = batch_size or 5
        for start in range(0, control.n_obs, step):
            rows = slice(start, min(start + step, control.n_obs))
            block = control.X[rows]
            block = np.asarray(block.toarray() if sparse.issparse(block) else block, dtype=np.float32)
            for name in perturbations:
                out = block.copy()
                for gene in name.split("+"):
                    number = self.perturbable.get_loc(gene)
                    pattern = np.random.default_rng([self.seed, number]).normal(size=block.shape[1])
                    out = out + self.scale * pattern.astype(np.float32) * (0.5 + block / 4)
                self.n_blocks += 1
                self.largest = max(self.largest, out.nbytes)
                yield name, rows, out.astype(np.float32)
