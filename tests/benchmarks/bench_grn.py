"""Regulatory networks and gene function with the bundled models, beside their baselines; see docs/benchmarks.md.

    python tests/benchmarks/bench_grn.py networks FOLDER
    python tests/benchmarks/bench_grn.py function FOLDER

FOLDER holds, for ``networks``, ``grn/scode_hesc_de_100tf.h5ad`` (758 cells between embryonic stem cells and endoderm, 100
transcription factors, with their known network), ``grn/beeline_mDC_TFs500_expression.h5ad`` (383 dendritic cells) and
``grn/beeline_reference_networks.parquet``; for ``function``, ``gene_labels/geneformer_gene_labels.parquet``,
``gene_sets/human_go_mf_v2025.gmt.gz`` and, beside FOLDER, ``singlecell/pbmc3k_counts_seurat_labels.h5ad``.
"""

from __future__ import annotations

import argparse
import gzip
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

import scfm

Tables = Iterator[tuple[str, pd.DataFrame]]

# the authors of scLong score epochs 10 to 14
TRAIN = {"max_epochs": 15}
STARTS = ("static", "paper", "code")


def with_counts(adata: AnnData, inverse_log: np.ufunc) -> AnnData:
    """Whole numbers for the models, from logarithms of transcripts per million."""
    counts = adata.X.copy()
    counts.data = np.rint(inverse_log(counts.data))
    counts.eliminate_zeros()
    adata.layers["counts"] = counts
    return adata


def known_to_all(adata: AnnData, models: list[str]) -> AnnData:
    """The genes that all models know."""
    known = [scfm.load(name).vocab.match(adata.var_names).ids >= 0 for name in models]
    return adata[:, np.all(known, axis=0)].copy()


def networks(folder: Path, models: list[str], seeds: tuple[int, ...]) -> Tables:
    """SCODE's cells, with all genes and with those that the models know, and BEELINE's dendritic cells."""
    scode = with_counts(read_h5ad(folder / "grn" / "scode_hesc_de_100tf.h5ad"), np.expm1)
    of_scode = scode.uns["reference_network"].rename(columns={"tf": "source"})
    beeline = pd.read_parquet(folder / "grn" / "beeline_reference_networks.parquet").rename(columns={"tf": "source"})
    chosen = (beeline["cell_type"] == "mDC") & (beeline["network"] == "Specific") & (beeline["gene_set"] == "TFs+500")
    beeline = beeline[chosen]
    mdc = with_counts(
        read_h5ad(folder / "grn" / "beeline_mDC_TFs500_expression.h5ad"), lambda values: np.exp2(values) - 1
    )
    # only genes with a known edge can be scored
    mdc = mdc[:, mdc.var_names.isin([*beeline["source"], *beeline["target"]])].copy()
    for name, cells, known in (
        ("SCODE hESC, all genes", scode, of_scode),
        ("SCODE hESC, genes that the models know", known_to_all(scode, models), of_scode),
        ("BEELINE mDC", mdc, beeline),
    ):
        table = scfm.benchmark.networks(
            cells, known, models, starts=STARTS, seeds=seeds, counts_layer="counts", train=TRAIN
        )
        yield f"{name} ({cells.n_vars})", table


def gmt(file: Path, n_terms: int) -> pd.DataFrame:
    """Genes by the terms with most genes, 1 where a gene has a term; genes without any are left out."""
    with gzip.open(file, "rt") as lines:
        sets = {name: genes for name, _, *genes in (line.rstrip("\n").split("\t") for line in lines)}
    largest = sorted(sets, key=lambda name: (-len(sets[name]), name))[:n_terms]
    table = pd.DataFrame({name: pd.Series(1, index=pd.unique(np.array(sets[name]))) for name in largest})
    return table.fillna(0).astype(int)


def function(folder: Path, models: list[str], seeds: tuple[int, ...]) -> Tables:
    """Dosage sensitivity, states of promoters, and the ten largest terms of molecular function."""
    adata = read_h5ad(folder.parent / "singlecell" / "pbmc3k_counts_seurat_labels.h5ad")[::5].copy()
    labels = pd.read_parquet(folder / "gene_labels" / "geneformer_gene_labels.parquet").set_index("symbol")
    dosage = labels.loc[labels["label_set"] == "dosage_sensitivity_TF", "class"]
    promoters = labels.loc[labels["label_set"] == "bivalent_promoters", "class"]
    few = {"batch_size": 32, "lr": 1e-3, "max_epochs": 30}
    tasks = {
        "dosage sensitivity": (dosage, few),
        "bivalent and Lys4-only promoters": (promoters[promoters != "no_methylation"], few),
        "molecular function": (
            # every third gene, to save time
            gmt(folder / "gene_sets" / "human_go_mf_v2025.gmt.gz", 10)[::3],
            {"batch_size": 256, "lr": 1e-3, "max_epochs": 10},
        ),
    }
    for name, (answers, train) in tasks.items():
        # the ten terms have many genes, for which states in cells take long
        states = ("static", "contextual") if isinstance(answers, pd.Series) else ("static",)
        table = scfm.benchmark.gene_function(answers, models, adata=adata, states=states, seeds=seeds, train=train)
        yield name, table


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["networks", "function"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", help="by default all that are bundled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the tidy tables to this CSV file, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    scfm.settings.verbosity = 0
    listed = scfm.checkpoints.list()
    models = options.models or listed.loc[listed["status"] == "bundled", "name"].tolist()
    start = time.perf_counter()
    run = {"networks": networks, "function": function}[options.task]
    metrics = ["AUPR ratio", "EPR"] if options.task == "networks" else ["AUROC", "AUPR", "macro F1"]
    tables = []
    for name, table in run(options.folder, models, tuple(options.seeds)):
        tables.append(table.assign(data=name))
        print(f"\n{name}\n", flush=True)
        for row, scores in scfm.benchmark.summary(table, metrics).iterrows():
            shown = [
                f"{scores[m]:.3f}" + ("" if np.isnan(scores[f"{m} ±"]) else f" ± {scores[f'{m} ±']:.3f}")
                for m in metrics
            ]
            print(f"| {row[1]} | {row[2]} | {row[3]} | {' | '.join(shown)} |")
    if options.out is not None:
        pd.concat(tables).to_csv(options.out, index=False)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
