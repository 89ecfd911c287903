"""The standard deep generative model: its embedding, and its denoised expression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anndata import AnnData

from ._expression import TARGET_SUM, ExpressionPredictor

if TYPE_CHECKING:
    import numpy as np
    from scvi.model import SCVI


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
    return _fit(adata, layer, batch_key, n_top_genes, n_latent, n_layers, max_epochs, random_state)[1]


def scvi_expression(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    n_latent: int = 30,
    n_layers: int = 2,
    max_epochs: int | None = None,
    random_state: int = 0,
) -> ExpressionPredictor:
    """Expression denoised by scVI, trained on the data themselves with all genes.

    The mean of a cell in the latent space is decoded, in the cell's own batch; nothing is sampled.

    Parameters
    ----------
    adata, layer, batch_key, n_latent, n_layers, max_epochs, random_state
        As in :func:`scvi_latent`.
    """
    return _Decoded(*_fit(adata, layer, batch_key, None, n_latent, n_layers, max_epochs, random_state))


class _Decoded(ExpressionPredictor):
    def __init__(self, model: SCVI, latent: np.ndarray) -> None:
        import torch

        super().__init__(model.adata.n_obs, model.adata.var_names)
        self._module = model.module.eval()
        self._latent = torch.from_numpy(latent)
        batch = model.adata_manager.get_from_registry("batch").ravel()
        self._batch = torch.from_numpy(batch.astype("int64"))[:, None]

    def _shares(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        import torch

        device = self._module.device
        latent, batch = self._latent[cells].to(device), self._batch[cells].to(device)
        with torch.inference_mode():
            library = torch.zeros(len(cells), 1, device=device)  # of no effect on shares
            out = self._module.generative(latent, library, batch)["px"]
        return out.scale[:, torch.from_numpy(genes).to(device)].cpu().numpy()


def _fit(
    adata: AnnData,
    layer: str | None,
    batch_key: str | None,
    n_top_genes: int | None,
    n_latent: int,
    n_layers: int,
    max_epochs: int | None,
    random_state: int,
) -> tuple[SCVI, np.ndarray]:
    """Train scVI and embed the cells; the global seeds stay as they were."""
    import numpy as np
    import scanpy as sc
    import scvi
    import torch

    obs = adata.obs[[] if batch_key is None else [batch_key]].copy()
    work = AnnData((adata.X if layer is None else adata.layers[layer]).copy(), obs=obs, var=adata.var[[]].copy())
    if n_top_genes is not None and work.n_vars > n_top_genes:
        normal = work.copy()
        sc.pp.normalize_total(normal, target_sum=TARGET_SUM)
        sc.pp.log1p(normal)
        sc.pp.highly_variable_genes(normal, n_top_genes=n_top_genes)
        work = work[:, normal.var["highly_variable"]].copy()
    # scvi-tools' own split of nine to one would be drawn without a seed
    order = np.random.default_rng(random_state).permutation(work.n_obs)
    n_train = -(-9 * work.n_obs // 10)
    split = [order[:n_train], order[n_train:], order[:0]]
    global_state, verbosity = np.random.get_state(), scvi.settings.verbosity  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            scvi.settings.verbosity = 40
            torch.manual_seed(random_state)
            np.random.seed(random_state)  # noqa: NPY002
            scvi.model.SCVI.setup_anndata(work, batch_key=batch_key)
            model = scvi.model.SCVI(work, n_latent=n_latent, n_layers=n_layers)
            model.train(
                max_epochs=max_epochs,
                datasplitter_kwargs={"external_indexing": split},
                enable_progress_bar=False,
                logger=False,
                enable_checkpointing=False,
            )
            return model, model.get_latent_representation().astype("float32")
        finally:
            scvi.settings.verbosity = verbosity
            np.random.set_state(global_state)  # noqa: NPY002
