"""The standard deep generative embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anndata import AnnData

if TYPE_CHECKING:
    import numpy as np


def scvi_latent(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    n_top_genes: int = 2000,
    n_latent: int = 30,
    n_layers: int = 2,
    max_epochs: int | None = None,
    random_state: int = 0,
) -> np.ndarray:
    """Latent space of scVI (Lopez et al., Nature Methods 2018), trained on the data themselves.

    Parameters
    ----------
    adata
        Annotated data; it is not changed.
    layer
        Layer with raw counts; by default ``X``.
    batch_key
        Column of ``obs`` with the batches that scVI corrects for.
    n_top_genes
        Highly variable genes (all genes if there are fewer).
    n_latent, n_layers
        Width of the latent space and depth of the networks.
    max_epochs
        Training epochs; by default scvi-tools' rule, at most 400 and fewer for more than 20,000 cells.
    random_state
        Seed; the global seeds are set for the training and put back afterwards.

    Returns
    -------
    Array ``(n_obs, n_latent)`` of float32.
    """
    import numpy as np
    import scanpy as sc
    import scvi
    import torch

    obs = adata.obs[[] if batch_key is None else [batch_key]].copy()
    work = AnnData((adata.X if layer is None else adata.layers[layer]).copy(), obs=obs, var=adata.var[[]].copy())
    if work.n_vars > n_top_genes:
        normal = work.copy()
        sc.pp.normalize_total(normal, target_sum=1e4)
        sc.pp.log1p(normal)
        sc.pp.highly_variable_genes(normal, n_top_genes=n_top_genes)
        work = work[:, normal.var["highly_variable"]].copy()
    global_state, verbosity = np.random.get_state(), scvi.settings.verbosity  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            scvi.settings.verbosity = 40
            torch.manual_seed(random_state)
            np.random.seed(random_state)  # noqa: NPY002
            scvi.model.SCVI.setup_anndata(work, batch_key=batch_key)
            model = scvi.model.SCVI(work, n_latent=n_latent, n_layers=n_layers)
            model.train(max_epochs=max_epochs, enable_progress_bar=False, logger=False, enable_checkpointing=False)
            return model.get_latent_representation().astype("float32")
        finally:
            scvi.settings.verbosity = verbosity
            np.random.set_state(global_state)  # noqa: NPY002
