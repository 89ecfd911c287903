"""The demonstration behind ``scfm demo``: embed bundled cells with bundled models and compare with baselines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import scanpy as sc

from . import _logging
from ._keys import embedding
from .backbones import load, random_copy
from .baselines import hvg_pca
from .checkpoints import list as list_checkpoints
from .pl import compare_embeddings as draw_comparison
from .pp import recover_counts
from .tl import compare_embeddings, embed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

LABELS = "bulk_labels"


def run(
    directory: str | Path = ".", *, models: Sequence[str] | Literal["all"] = ("scgpt-mini",), seed: int = 0
) -> pd.DataFrame:
    """Run the demonstration: 700 blood cells that ship with Scanpy, no network.

    Parameters
    ----------
    directory
        Where ``scfm_demo.h5ad`` and ``scfm_demo.png`` are written.
    models
        Models to demonstrate; ``"all"`` for all that are bundled.
    seed
        Seed of every random choice.

    Returns
    -------
    Scores of the models, of PCA, of copies of the models with random weights, and of shuffled cells.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    adata = sc.datasets.pbmc68k_reduced()
    recover_counts(adata, use_raw=True)

    if models == "all":
        table = list_checkpoints()
        models = table.loc[table["status"] == "bundled", "name"].tolist()
    keys, controls = {}, {}
    for name in models:
        backbone = load(name)
        embed(adata, model=backbone, layer="counts", rng=seed)
        keys[name] = embedding(name)
        slot = embedding(f"{name}-random")
        embed(adata, model=random_copy(backbone, seed=seed), layer="counts", rng=seed, key_added=slot)
        controls["random weights" if len(models) == 1 else f"{name}, random"] = slot
    adata.obsm["X_hvg_pca"] = hvg_pca(adata, layer="counts", random_state=seed)

    first = next(iter(keys))
    sc.pp.neighbors(adata, use_rep=keys[first], random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    shown = keys | {"HVG + PCA": "X_hvg_pca"} | controls
    scores = compare_embeddings(adata, shown, LABELS, random_state=seed)
    adata.obs["leiden"] = adata.obs[f"leiden_{first}"]

    draw_comparison(adata, save=directory / "scfm_demo.png", show=False)
    adata.write_h5ad(directory / "scfm_demo.h5ad", compression="gzip")
    _logging.info(f"demo finished in {time.perf_counter() - began:.0f} s")
    return scores
