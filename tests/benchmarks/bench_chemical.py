"""Chemical perturbations: signatures of drugs that were never seen, and single cells after a treatment, beside baselines.

    python tests/benchmarks/bench_chemical.py FOLDER [--task signatures transport] [--models scgpt-mini ...] [--epochs 10]

FOLDER holds ``tables/l1000/l1000_A375_24h_plate_377x978.h5ad``, ``tables/l1000/deepce_gene_vector_978.parquet`` and
``singlecell/kang2018_ifnb_scgen_subset.h5ad``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

import scfm
from scfm.baselines import mean_signatures, neighbor_signatures, ridge_signatures
from scfm.metrics import signature_scores
from scfm.tasks.molecules import morgan_fingerprints

SHOWN = ["RMSE", "Pearson", "Spearman", "positive precision@100", "negative precision@100"]
# smaller than published, for a processor
SMALL = {"dim": 16, "hidden": 32, "layers": 1, "feedforward": 64}


def signatures(folder: Path, seed: int) -> anndata.AnnData:
    """Wells with a drug, as robust z-scores against the wells without; one fifth of the drugs is set aside to test on."""
    wells = anndata.read_h5ad(folder / "tables" / "l1000" / "l1000_A375_24h_plate_377x978.h5ad")
    values = np.asarray(wells.X.toarray(), dtype=np.float64)
    vehicle = values[(wells.obs["pert_type"] == "ctl_vehicle").to_numpy()]
    centre = np.median(vehicle, 0)
    spread = 1.4826 * np.median(np.abs(vehicle - centre), 0)
    scores = np.clip((values - centre) / np.maximum(spread, 0.1), -10, 10)
    kept = (wells.obs["pert_type"] != "ctl_vehicle").to_numpy() & (wells.obs["smiles"].astype(str) != "").to_numpy()
    data = anndata.AnnData(scores[kept].astype(np.float32), obs=wells.obs.loc[kept].copy(), var=wells.var.copy())
    drugs = np.random.default_rng(seed).permutation(sorted(data.obs["smiles"].astype(str).unique()))
    test, validation = np.split(drugs, [len(drugs) // 5, len(drugs) // 5 + len(drugs) // 10])[:2]
    smiles = data.obs["smiles"].astype(str)
    data.obs["split"] = np.where(smiles.isin(test), "test", np.where(smiles.isin(validation), "validation", "train"))
    return data


def signature_table(folder: Path, models: list[str], epochs: int, seeds: int) -> pd.DataFrame:
    """Scores of held-out drugs, averaged over divisions of the drugs."""
    rows = []
    vectors = pd.read_parquet(folder / "tables" / "l1000" / "deepce_gene_vector_978.parquet")
    for seed in range(seeds):
        data = signatures(folder, seed)
        part, dose = data.obs["split"].to_numpy(), data.obs["pert_dose"].astype(str).to_numpy()
        # baselines need no validation, so that they may learn from these drugs, too
        train, test = part != "test", part == "test"
        values, prints = np.asarray(data.X), morgan_fingerprints(data.obs["smiles"].astype(str).tolist())
        doses = (dose[:, None] == np.unique(dose)).astype(float)
        at = {"conditions": dose[train], "new_conditions": dose[test]}
        features = np.hstack([prints, 3 * doses])
        baselines = {
            "mean": mean_signatures(values[train], int(test.sum())),
            "mean of the dose": mean_signatures(values[train], **at),
            "5 neighbours at the dose": neighbor_signatures(values[train], prints[train], prints[test], **at),
            "ridge": ridge_signatures(values[train], features[train], features[test]),
        }
        for name, predicted in baselines.items():
            rows.append(("baseline", name, seed, signature_scores(values[test], predicted)))
        scfm.models.ChemicalPerturbation.setup_anndata(data, dose_key="pert_dose", split_key="split")
        sources = {"random vectors": {}, "STRING vectors": {"gene_vectors": vectors}}
        sources |= {name: {"model": name} for name in models}
        for name, given in sources.items():
            model = scfm.models.ChemicalPerturbation(data, **given, network=SMALL, seed=seed)
            model.train(epochs, patience=8, lr=1e-3, seed=seed)
            rows.append(("DeepCE", name, seed, model.score()))
            print(rows[-1][:3], {key: round(rows[-1][3][key], 3) for key in SHOWN}, flush=True)
    table = pd.DataFrame([{"kind": kind, "name": name, "seed": seed, **scores} for kind, name, seed, scores in rows])
    return table.groupby(["kind", "name"], sort=False)[SHOWN].mean()


def transport_table(folder: Path, models: list[str], iterations: int, codec_epochs: int) -> pd.DataFrame:
    """Interferon-beta: held-out cells of all types, and a held-out type."""
    data = anndata.read_h5ad(folder / "singlecell" / "kang2018_ifnb_scgen_subset.h5ad")
    drawn = np.random.default_rng(0).random(data.n_obs) < 0.2
    divisions = {"cells": drawn, "CD4T": (data.obs["cell_type"] == "CD4T").to_numpy()}
    tables = []
    for held_out, test in divisions.items():
        data.obs["split"] = np.where(test, "test", "train")
        scfm.models.ChemicalTransport.setup_anndata(data, "condition", split_key="split", total_key="n_counts")
        spaces = {"PCA": {"space": "pca"}, "auto-encoder": {"space": "autoencoder"}}
        spaces |= {name: {"model": name, "potential": (64, 64, 64, 64)} for name in models}
        for name, given in spaces.items():
            model = scfm.models.ChemicalTransport(data, **given, seed=0)
            model.train(iterations, codec_epochs=codec_epochs, seed=0)
            table = model.evaluate()
            print(held_out, name, table.round(3).to_string(), flush=True)
            tables.append(table.assign(held_out=held_out, space=name))
    table = pd.concat(tables)
    return table[["held_out", "space", "method", "genes", "l2", "Pearson", "MMD"]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", nargs="+", default=["signatures", "transport"], choices=["signatures", "transport"])
    parser.add_argument("--models", nargs="*", default=["scgpt-mini", "cellfm-mini"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--codec-epochs", type=int, default=10)
    arguments = parser.parse_args()
    if "signatures" in arguments.task:
        table = signature_table(arguments.folder, arguments.models, arguments.epochs, arguments.seeds)
        print(table.round(3).to_string())
    if "transport" in arguments.task:
        table = transport_table(arguments.folder, arguments.models, arguments.iterations, arguments.codec_epochs)
        print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
