"""Gene programs with the bundled models beside co-expression and random weights; see docs/benchmarks.md.

    python tests/benchmarks/bench_genes.py programs FOLDER --gene-sets FILE.gmt.gz ...
    python tests/benchmarks/bench_genes.py speed

FOLDER holds ``pbmc3k_counts_seurat_labels.h5ad``, on which the bundled models were trained among others, and for ``--data``
another file, for example ``pbmc10k_citeseq_totalvi.h5ad``, which they have not seen. Contextual embeddings take minutes; those that are in ``varm`` already are
used as they are.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData, read_h5ad
from scipy import sparse

import scfm
from scfm.tl._gene_programs import RESOLUTIONS

# what a textbook calls the marker genes of blood cells
KNOWN = {
    "T cells": "CD3D CD3E CD3G CD2 CD7 IL7R LTB IL32 TRAT1",
    "cytotoxic": "NKG7 GNLY PRF1 GZMA GZMB GZMH GZMK CST7 CTSW CCL5 FGFBP2 KLRD1 SPON2",
    "B cells": "CD79A CD79B MS4A1 TCL1A VPREB3 FCER2 BANK1 HVCN1",
    "monocytes": "LYZ S100A8 S100A9 S100A12 CST3 FCN1 CD14 LGALS2 MS4A6A AIF1 TYROBP FCER1G",
    "HLA class II": "HLA-DRA HLA-DRB1 HLA-DRB5 HLA-DPA1 HLA-DPB1 HLA-DQA1 HLA-DQB1 HLA-DMA HLA-DMB CD74",
    "ribosome": "RPS3 RPS3A RPS4X RPS5 RPS8 RPS9 RPS18 RPS27 RPS27A RPL3 RPL8 RPL9 RPL10A RPL11 RPL13 RPL13A RPL18A RPL21 RPL32 RPL34",
    "interferon": "ISG15 IFI6 IFI27 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFITM3 MX1 OAS1 RSAD2",
}


def programs(
    path: Path, models: list[str], gene_sets: list[str], seeds: list[int], *, contextual: bool
) -> pd.DataFrame:
    """How well programs find known groups: one row for each method, seed and group."""
    adata = read_h5ad(path)
    sc.pp.filter_genes(adata, min_cells=10)
    known = {name: genes.split() for name, genes in KNOWN.items()}
    scfm.tl.gene_programs(adata, models[0], score=False)
    # markers that are not among the most variable genes have a chance, too
    wanted = {*adata.uns["gene_programs"]["genes"], *(gene for genes in known.values() for gene in genes)}
    for model in models:
        wanted &= set(scfm.backbones.load_vocab(model).genes)
    genes = [gene for gene in adata.var_names if gene in wanted]
    methods: dict[str, dict[str, object]] = {}
    for model in models:
        if contextual and f"{model}_contextual" not in adata.varm:
            scfm.tl.gene_embeddings(adata, model, contextual=True, genes=genes)
        random = scfm.backbones.random_copy(scfm.load(model))
        methods[f"{model}, static"] = {"model": model}
        if contextual:
            methods[f"{model}, contextual"] = {"use_rep": f"{model}_contextual"}
        methods[f"{model}, static, random weights"] = {"model": random}
    adata.varm["pca"] = loadings(adata)
    methods["PCA loadings of these cells"] = {"use_rep": "pca", "metric": "cosine"}
    methods["co-expression"] = {"model": "coexpression"}
    methods["co-expression, resolution 20"] = {"model": "coexpression", "resolution": 20.0}
    if contextual:
        states = [f"{model}_contextual" for model in models]
        genes = [gene for gene, known in zip(genes, _finite(adata, genes, states), strict=True) if known]
    rows = []
    for name, options in methods.items():
        for seed in seeds:
            scfm.tl.gene_programs(adata, genes=genes, stability_seeds=5, rng=seed, **options)
            result = adata.uns["gene_programs"]
            table = scfm.metrics.program_recovery(result["programs"], known, result["genes"], rng=seed)
            enriched = np.nan
            if gene_sets:
                scfm.tl.enrichment(adata, gene_sets)
                found = adata.uns["enrichment"]["table"]
                enriched = found.loc[found["significant"], "program"].nunique()
            rows.append(
                table.assign(
                    method=name,
                    seed=seed,
                    resolution=result["params"]["resolution_taken"],
                    n_programs=len(result["summary"]),
                    coexpression=result["summary"]["coexpression"].mean(),
                    stability=result["summary"]["stability"].mean(),
                    enriched=enriched,
                    genes=[
                        ", ".join(sorted(set(result["programs"].get(p, ())) & set(known[k])))
                        for k, p in table["program"].items()
                    ],
                ).reset_index()
            )
    print(f"{len(genes):,} genes")
    return pd.concat(rows, ignore_index=True)


def loadings(adata: AnnData) -> np.ndarray:
    """Genes in the space of 50 principal components of the log-normalised cells: co-expression without its noise."""
    work = AnnData(adata.X.copy())
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    sc.pp.pca(work, n_comps=50)
    return (work.varm["PCs"] * np.sqrt(work.uns["pca"]["variance"])).astype(np.float32)


def _finite(adata: AnnData, genes: list[str], slots: list[str]) -> np.ndarray:
    columns = adata.var_names.get_indexer(genes)
    return np.logical_and.reduce([np.isfinite(np.asarray(adata.varm[slot])[columns]).all(1) for slot in slots])


def show(table: pd.DataFrame) -> None:
    """Print the tables as Markdown."""
    groups = list(dict.fromkeys(table["known set"]))
    first = ["resolution", "n_programs", "stability", "coexpression", "enriched"]
    print("| method | " + " | ".join(first) + " |\n|" + " --- |" * (len(first) + 1))
    for method, part in table.groupby("method", sort=False):
        values = part[first].mean()
        print(f"| {method} | " + " | ".join(f"{v:.3g}" for v in values) + " |")
    print("\n| method | " + " | ".join(groups) + " | mean |\n|" + " --- |" * (len(groups) + 2))
    for method, part in table.groupby("method", sort=False):
        mean = part.groupby("known set")[["F1", "F1 z", "F1 p"]].mean()
        cells = [f"{mean.loc[g, 'F1']:.2f} ({mean.loc[g, 'F1 z']:.1f})" for g in groups]
        print(f"| {method} | " + " | ".join(cells) + f" | {mean['F1'].mean():.2f} |")
    print()
    seed = table["seed"].min()
    for method, part in table[table["seed"] == seed].groupby("method", sort=False):
        print(method)
        for row in part.to_dict("records"):
            print(
                f"  {row['known set']}: {row['overlap']} of {row['n_genes']}, program of {row['program_size']}: {row['genes']}"
            )


def speed(n_cells: int, n_genes: int, dim: int) -> None:
    """Seconds for programs of random vectors, scores in random cells, with groups."""
    rng = np.random.default_rng(0)
    counts = sparse.random(n_cells, n_genes, density=0.1, format="csr", rng=rng, dtype=np.float32)
    counts.data = 1 + np.floor(counts.data * 5)
    adata = AnnData(counts, var=pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]))
    adata.obs["group"] = pd.Categorical(rng.integers(10, size=n_cells).astype(str))
    centres = rng.normal(size=(100, dim))
    adata.varm["vectors"] = (centres[rng.integers(100, size=n_genes)] + rng.normal(size=(n_genes, dim))).astype(
        np.float32
    )
    small = adata[:200, :200].copy()
    start = time.perf_counter()
    scfm.tl.gene_programs(small, use_rep="vectors", n_top_genes=None)
    print(f"first call in this process (imports and compilation of umap): {time.perf_counter() - start:.1f} s")
    for resolution in (RESOLUTIONS, 20.0):
        for model, rep in (("vectors", "vectors"), ("coexpression", None)):
            start = time.perf_counter()
            scfm.tl.gene_programs(adata, model, use_rep=rep, groupby="group", n_top_genes=None, resolution=resolution)
            n = len(adata.uns["gene_programs"]["summary"])
            print(f"{model}, resolution {resolution}: {n} programs, {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["programs", "speed"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--data", default="pbmc3k_counts_seurat_labels.h5ad", help="file in FOLDER")
    parser.add_argument("--static", action="store_true", help="leave contextual embeddings out")
    parser.add_argument("--models", nargs="+", help="by default all that are bundled")
    parser.add_argument("--gene-sets", nargs="+", default=[], help="files of gene sets for enrichment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--out", type=Path, help="write the table to this CSV file, too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    scfm.settings.verbosity = 0
    if options.task == "speed":
        speed(options.cells, options.genes, dim=512)
        return
    listed = scfm.checkpoints.list()
    models = options.models or listed.loc[listed["status"] == "bundled", "name"].tolist()
    path = options.folder / options.data
    table = programs(path, models, options.gene_sets, options.seeds, contextual=not options.static)
    if options.out is not None:
        table.to_csv(options.out, index=False)
    show(table)


if __name__ == "__main__":
    main()
