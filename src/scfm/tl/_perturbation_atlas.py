"""A map of all predicted perturbations of some genes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from .. import __version__, _keys, _logging
from ..tasks.perturbation_data import genes_of
from ._inputs import seed_of
from ._responses import candidate_names, control_cells, expression, mean_profiles, open_models, some_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._responses import Predictor

_MOST_COMPONENTS = 50
_LEAST = 5


def perturbation_atlas(
    adata: AnnData,
    model: Predictor | Sequence[Predictor],
    genes: Sequence[str] | None = None,
    *,
    perturbations: Sequence[str] | None = None,
    control: AnnData | None = None,
    n_cells: int = 20,
    drop_perturbed: bool = True,
    n_neighbors: int = 15,
    resolution: float = 0.5,
    batch_size: int | None = None,
    rng: int | np.random.Generator = 0,
) -> AnnData:
    """Predict all single and pairwise perturbations of some genes, and arrange them by the response.

    Responses are averaged over control cells, changes from control are reduced to principal components, and these give a UMAP and
    Leiden clusters by Scanpy. The dominant gene of a cluster is the one in most of its perturbations; where one gene rules the
    response of a pair, its pairs lie together.

    Parameters
    ----------
    adata
        Annotated data with control cells; it is not changed.
    model
        A trained model or several, as in :func:`scfm.tl.perturb`.
    genes
        Genes to combine; by default those that are perturbed in the data and that the model can perturb.
    perturbations
        Perturbations to arrange, instead of all of ``genes``.
    control
        Control cells; by default those of ``adata``.
    n_cells
        Control cells to average over, drawn at random. (The authors of scGPT predict from the mean of all control cells.)
    drop_perturbed
        Leave the perturbed genes themselves out of the map, as the authors of CellFM do.
    n_neighbors, resolution
        Neighbours of the graph, and resolution of the clusters.
    batch_size
        Cells of a block of predictions.
    rng
        Seed or generator of everything random.

    Returns
    -------
    New annotated data, with a row for each perturbation: ``X``, the predicted mean change of each gene; ``obs``, ``n_genes``,
    ``cluster``, and ``dominant_gene`` of the cluster with its ``dominant_share``; ``obsm["X_pca"]`` and ``obsm["X_umap"]``;
    ``uns["perturbation_atlas"]``, with arguments and a table of ``clusters``.

    Raises
    ------
    ValueError
        If a gene cannot be perturbed, or there are fewer than five perturbations.

    References
    ----------
    Cui et al., scGPT, Nature Methods 21, 1470 (2024); Zeng et al., CellFM, Nature Communications 16, 4679 (2025).

    Examples
    --------
    >>> import scfm
    >>> atlas = scfm.tl.perturbation_atlas(adata, predictor)  # doctest: +SKIP
    >>> scfm.pl.perturbation_atlas(atlas)  # doctest: +SKIP
    """
    if perturbations is not None and genes is not None:
        msg = "give genes= or perturbations=, not both"
        raise ValueError(msg)
    models, seed = open_models(model), seed_of(rng)
    names = candidate_names(perturbations, genes, models, adata)
    if len(names) < _LEAST:
        msg = f"{len(names)} perturbations are too few for a map; at least {_LEAST} are needed"
        raise ValueError(msg)
    start = _logging.info(f"a map of {len(names):,} perturbations")
    cells = some_cells(control_cells(adata, control), n_cells, np.random.default_rng(seed))
    base = np.asarray(expression(cells, models).mean(0), dtype=np.float64).ravel()
    change = mean_profiles(models, names, cells, batch_size=batch_size, seed=seed) - base
    members = [genes_of(name) for name in names]
    atlas = AnnData(
        change.astype(np.float32),
        obs=pd.DataFrame({"n_genes": [len(some) for some in members]}, index=names),
        var=pd.DataFrame(index=cells.var_names),
    )
    used = np.ones(atlas.n_vars, dtype=bool)
    if drop_perturbed:
        perturbed = sorted({gene for some in members for gene in some})
        used = ~(cells.var_names.isin(perturbed) | np.isin(_symbols(adata, cells).astype(str), perturbed))
    if not used.any():
        msg = "all genes of the data are perturbed, so that nothing is left to arrange by; use drop_perturbed=False"
        raise ValueError(msg)
    _arrange(atlas, used, min(n_neighbors, len(names) - 1), resolution, seed)
    clusters = _dominant(atlas.obs["cluster"], members)
    atlas.obs["dominant_gene"] = (
        atlas.obs["cluster"].map(clusters.set_index("cluster")["dominant_gene"]).astype("category")
    )
    atlas.obs["dominant_share"] = atlas.obs["cluster"].map(clusters.set_index("cluster")["share"]).astype(float)
    params = {"n_cells": cells.n_obs, "drop_perturbed": drop_perturbed, "n_neighbors": n_neighbors}
    params |= {"resolution": resolution, "n_models": len(models), "rng": seed}
    atlas.uns[_keys.ATLAS] = {"params": params, "clusters": clusters, "scfm_version": __version__}
    _logging.info(f"    {len(clusters):,} clusters", time=start)
    return atlas


def _symbols(adata: AnnData, cells: AnnData) -> np.ndarray:
    """Names by which the genes of control cells are perturbed; cells from elsewhere need not know how they were set up."""
    from ..models._perturbation_data import gene_symbols_of

    return gene_symbols_of(adata if cells.var_names.equals(adata.var_names) else cells)


def _arrange(atlas: AnnData, used: np.ndarray, n_neighbors: int, resolution: float, seed: int) -> None:
    """Principal components, UMAP and clusters."""
    import scanpy as sc

    values = AnnData(atlas.X[:, used], obs=atlas.obs[[]].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of umap about seeds and threads, and of Scanpy about igraph
        sc.pp.pca(values, n_comps=min(_MOST_COMPONENTS, min(values.shape) - 1), random_state=seed)
        sc.pp.neighbors(values, n_neighbors=n_neighbors, use_rep="X_pca", random_state=seed)
        sc.tl.umap(values, random_state=seed)
        sc.tl.leiden(values, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=-1, directed=False)
    for name in ("X_pca", "X_umap"):
        atlas.obsm[name] = values.obsm[name]
    atlas.obs["cluster"] = values.obs["leiden"]


def _dominant(clusters: pd.Series, members: list[tuple[str, ...]]) -> pd.DataFrame:
    """The gene in most perturbations of each cluster; of equal ones the first by name."""
    pairs = [(cluster, gene) for cluster, some in zip(clusters, members, strict=True) for gene in some]
    counts = pd.DataFrame(pairs, columns=["cluster", "gene"]).value_counts().reset_index(name="n")
    counts = counts.sort_values(["n", "gene"], ascending=[False, True], kind="stable").drop_duplicates("cluster")
    sizes = clusters.value_counts()
    table = counts.set_index("cluster").loc[list(clusters.cat.categories)].reset_index()
    return pd.DataFrame(
        {
            "cluster": table["cluster"].astype(str),
            "n_perturbations": sizes[table["cluster"]].to_numpy(),
            "dominant_gene": table["gene"].astype(str),
            "share": table["n"].to_numpy() / sizes[table["cluster"]].to_numpy(),
        }
    )
