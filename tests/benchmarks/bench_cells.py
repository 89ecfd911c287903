"""Cell types and integration with the bundled models, fine-tuned, beside their baselines; see docs/benchmarks.md.

    python tests/benchmarks/bench_cells.py annotation FOLDER
    python tests/benchmarks/bench_cells.py integration FOLDER

FOLDER holds ``pbmc_3tech_symphony_1200.h5ad`` (annotation: each chemistry is labelled with the two others) and
``pancreas_panc8_5tech_500.h5ad`` (integration of five technologies; counts that are not whole are rounded).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import read_h5ad

import scfm

# few epochs at a higher rate than in the papers: small networks on few cells
TRAIN = {"scgpt-mini": {"max_epochs": 10, "lr": 1e-3}, "cellfm-mini": {"max_epochs": 10, "lr": 1e-3}}
INTEGRATION = {"max_epochs": 5, "lr": 1e-3, "batch_size": 32}


def annotation(folder: Path, models: list[str], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Leave one chemistry out."""
    adata = read_h5ad(folder / "pbmc_3tech_symphony_1200.h5ad")
    return scfm.benchmark.cells(
        adata,
        models,
        labels_key="cell_type",
        batch_key="batch",
        methods=("knn", "linear", "finetune"),
        seeds=seeds,
        train={name: TRAIN.get(name, {"max_epochs": 10}) for name in models},
    )


def integration(folder: Path, models: list[str], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Five technologies of pancreas."""
    adata = read_h5ad(folder / "pancreas_panc8_5tech_500.h5ad")
    adata.X = adata.X.copy()
    adata.X.data = np.rint(adata.X.data)
    return scfm.benchmark.cells(
        adata,
        models,
        labels_key="cell_type",
        batch_key="batch",
        task="integration",
        methods=("zero-shot", "finetune"),
        seeds=seeds,
        train=dict.fromkeys(models, INTEGRATION),
    )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["annotation", "integration"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", help="by default all that are bundled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="write the tidy table to this CSV file, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scfm.settings.verbosity = 0
    listed = scfm.checkpoints.list()
    models = options.models or listed.loc[listed["status"] == "bundled", "name"].tolist()
    start = time.perf_counter()
    table = {"annotation": annotation, "integration": integration}[options.task](
        options.folder, models, tuple(options.seeds)
    )
    if options.out is not None:
        table.to_csv(options.out, index=False)
    metrics = ["macro F1", "accuracy"] if options.task == "annotation" else ["Overall", "AvgBIO", "AvgBATCH"]
    for row, scores in scfm.benchmark.summary(table, metrics).iterrows():
        shown = [
            f"{scores[m]:.3f}" + ("" if np.isnan(scores[f"{m} ±"]) else f" ± {scores[f'{m} ±']:.3f}") for m in metrics
        ]
        print(f"| {row[2]} | {row[3]} | {row[1]} | {' | '.join(shown)} |")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
