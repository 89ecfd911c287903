"""Memory and time of predicting 100 perturbations of 5,000 cells into a file, beside a tenth of them.

    python tests/benchmarks/bench_predictions.py [--cells 5000] [--perturbations 100] [--genes 2000] [--model scgpt-mini]

Counts and annotations are synthetic; GEARS is trained for one epoch, alone or on states of a bundled model. The file is deleted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from bench_embed import PeakMemory
from scipy import sparse

import scfm


def cells(n_controls: int, genes: np.ndarray, perturbed: np.ndarray, rng: np.random.Generator) -> AnnData:
    """Control cells, and a few cells of some perturbations."""
    labels = np.repeat(["control", *perturbed], [n_controls] + [10] * len(perturbed))
    rates = rng.gamma(0.3, 2.0, len(genes))
    # one thousand cells at a time, so that the matrix itself does not count
    blocks = [
        sparse.csr_matrix(rng.poisson(rates, (min(1000, len(labels) - start), len(genes))).astype(np.float32))
        for start in range(0, len(labels), 1000)
    ]
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"cell{i}" for i in range(len(labels))])
    return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=genes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--model", help="a bundled model for GEARS to look at; by default none")
    parser.add_argument("--folder", type=Path, help="where the file goes for the time being")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    scfm.settings.verbosity = 1
    rng = np.random.default_rng(0)
    known = [] if options.model is None else [name for name in scfm.load(options.model).vocab if name.isupper()]
    genes = np.array([*known, *(f"GENE{i}" for i in range(options.genes))][: options.genes])
    perturbed = genes[: options.perturbations]
    adata = cells(options.cells, genes, perturbed[:20], rng)
    scfm.pp.perturbation_setup(adata, "perturbation", control="control")
    scfm.models.GeneticPerturbation.setup_anndata(adata)
    go = {gene: [f"GO:{term}" for term in rng.integers(0, 40, 6)] for gene in perturbed}
    model = scfm.models.GeneticPerturbation(
        adata, model=options.model, route="gears", go=go, perturbable=list(perturbed), network={"hidden": 64}, seed=0
    )
    model.train(max_epochs=1, progress=False)
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    print(f"{torch.get_num_threads()} threads; {len(genes):,} genes, GEARS on {options.model or 'learned vectors'}")
    for n_cells, n_perturbations in (
        (options.cells // 10, options.perturbations // 10),
        (options.cells, options.perturbations // 10),
        (options.cells, options.perturbations),
    ):
        some = controls[:n_cells].copy()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = Path(folder) / "predicted.h5ad"
            start = time.perf_counter()
            with PeakMemory() as memory:
                scfm.tl.perturb(some, list(perturbed[:n_perturbations]), model, out=file)
            seconds, size = time.perf_counter() - start, file.stat().st_size
        print(
            f"{n_perturbations:4d} perturbations x {n_cells:,} cells: {seconds:6.1f} s, file {size / 2**30:.2f} GiB, "
            f"peak memory +{memory.peak - memory.before:.0f} MiB over {memory.before:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
