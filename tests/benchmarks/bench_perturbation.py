"""Perturbations that training has not seen: every route with the bundled models, beside all baselines; see docs/benchmarks.md.

    python tests/benchmarks/bench_perturbation.py FOLDER

FOLDER holds ``singlecell/norman2019_subset_perturbseq.h5ad`` and
``tables/gene_sets/go_human_direct_experimental_2018.parquet``. With two cores and all cells, GEARS takes minutes and the routes
with a model tens of minutes; ``--cells`` and ``--epochs`` make it shorter, ``--routes`` chooses.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd
from anndata import AnnData, read_h5ad

import scfm
from scfm.tasks.perturbation_data import CONTROL, split_perturbations

# name: model, and further arguments
ROUTES = {
    "GEARS": None,
    "scgpt-mini": "scgpt-mini",
    "scfoundation-mini, GEARS": "scfoundation-mini",
    "cellfm-mini, GEARS": "cellfm-mini",
    "sclong-mini, GEARS": "sclong-mini",
}
MINIS = ("scgpt-mini", "scfoundation-mini", "cellfm-mini", "sclong-mini")
METRICS = ["MSE", "DE MSE", "Pearson delta", "DE Pearson delta", "Pearson centroid delta", "centroid accuracy", "rank"]
METRICS += ["DE overlap", "E-distance", "predicted"]


def cells(folder: Path, n_cells: int | None) -> AnnData:
    """The data, with at most so many cells of each perturbation."""
    adata = read_h5ad(folder / "singlecell" / "norman2019_subset_perturbseq.h5ad")
    if n_cells is not None:
        labels = adata.obs["perturbation"].astype(str)
        rank = labels.groupby(labels).cumcount()
        adata = adata[((rank < n_cells) | (labels == "control")).to_numpy()].copy()
    scfm.pp.perturbation_setup(adata, "perturbation", control="control", total_key="ncounts")
    return adata


def vectors(model: str) -> pd.DataFrame:
    """Static vectors of the genes of a model."""
    backbone = scfm.load(model)
    return pd.DataFrame(backbone.gene_embeddings().float().cpu().numpy(), index=list(backbone.vocab))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--routes", nargs="*", default=list(ROUTES), choices=list(ROUTES))
    parser.add_argument("--cells", type=int, help="cells of each perturbation")
    parser.add_argument("--epochs", type=int, help="by default as the authors train each network")
    parser.add_argument("--hidden", type=int, help="width of GEARS; by default as the authors")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split-seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the tidy table there, as CSV")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    adata = cells(options.folder, options.cells)
    split = split_perturbations(adata.obs["perturbation"].unique(), seed=options.split_seed)
    go = options.folder / "tables" / "gene_sets" / "go_human_direct_experimental_2018.parquet"
    needed = [name for name in adata.obs["scfm_perturbation"].cat.categories if name != CONTROL]
    genes = sorted({gene for name in needed for gene in name.split("+")})
    scfm.models.GeneticPerturbation.setup_anndata(adata)

    def route(model: str | None, name: str):
        def fit(data: AnnData, parts: object, seed: int):
            start = time.perf_counter()
            gears = model is None or name.endswith("GEARS")
            further = {"go": go, "perturbable": genes} if gears else {}
            if gears and options.hidden is not None:
                further["network"] = {"hidden": options.hidden}
            learner = scfm.models.GeneticPerturbation(
                data, model=model, route="gears" if gears else "scgpt", split=parts, seed=seed, **further
            )
            learner.train(max_epochs=options.epochs, progress=False)
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
            return learner

        return fit

    models = {name: route(ROUTES[name], name) for name in options.routes}
    table = scfm.benchmark.perturbation(
        adata,
        models,
        split=split,
        gene_vectors={name: vectors(name) for name in MINIS},
        seeds=options.seeds,
    )
    if options.out is not None:
        table.to_csv(options.out, index=False)
    wide = table[table["metric"].isin(METRICS)].pivot_table(index="name", columns="metric", values="value")
    print(f"{adata.n_obs:,} cells; tested on { ({name: len(part) for name, part in split.subgroups.items()}) }")
    print(wide[METRICS].sort_values("DE MSE").round(3).to_string())
    for metric in ("DE MSE", "Pearson delta"):
        parts = table[table["metric"] == metric].pivot_table(index="name", columns="held_out", values="value")
        print(f"\n{metric} by subgroup\n{parts.round(3).to_string()}")


if __name__ == "__main__":
    main()
