"""The demonstration behind ``scfm demo``: embed bundled cells with a bundled model and compare with baselines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import scanpy as sc

from . import _logging
from .backbones import load, random_copy
from .baselines import hvg_pca
from .pl import compare_embeddings as draw_comparison
from .pp import recover_counts
from .tl import compare_embeddings, embed

if TYPE_CHECKING:
    import pandas as pd

LABELS = "bulk_labels"


def run(directory: str | Path = ".", *, model: str = "scgpt-mini", seed: int = 0) -> pd.DataFrame:
    """Run the demonstration: 700 blood cells that ship with Scanpy, no network.

    Parameters
    ----------
    directory
        Where ``scfm_demo.h5ad`` and ``scfm_demo.png`` are written.
    model
        Model to demonstrate.
    seed
        Seed of every random choice.

    Returns
    -------
    Scores of the model, of PCA, of a copy of the model with random weights, and of shuffled cells.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    adata = sc.datasets.pbmc68k_reduced()
    recover_counts(adata, use_raw=True)

    backbone = load(model)
    embed(adata, model=backbone, layer="counts", rng=seed)
    embed(adata, model=random_copy(backbone, seed=seed), layer="counts", rng=seed, key_added="X_random_weights")
    adata.obsm["X_hvg_pca"] = hvg_pca(adata, layer="counts", random_state=seed)

    slot = f"X_{backbone.name}"
    sc.pp.neighbors(adata, use_rep=slot, random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    keys = {backbone.name: slot, "HVG + PCA": "X_hvg_pca", "random weights": "X_random_weights"}
    scores = compare_embeddings(adata, keys, LABELS, random_state=seed)
    adata.obs["leiden"] = adata.obs[f"leiden_{backbone.name}"]

    draw_comparison(adata, save=directory / "scfm_demo.png", show=False)
    adata.write_h5ad(directory / "scfm_demo.h5ad", compression="gzip")
    _logging.info(f"demo finished in {time.perf_counter() - began:.0f} s")
    return scores
