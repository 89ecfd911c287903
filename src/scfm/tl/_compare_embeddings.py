"""Embeddings side by side, scored against labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

from .. import _keys, _logging
from ..metrics import (
    clustering_agreement,
    clusters_by_bisection,
    has_scib,
    label_silhouette,
    leiden_clusters,
    scib_scores,
)
from ._controls import add_baselines, add_random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._inputs import Model


def compare_embeddings(
    adata: AnnData,
    keys: Sequence[str] | Mapping[str, str],
    labels_key: str,
    *,
    batch_key: str | None = None,
    baselines: Sequence[str] | None = None,
    random_weights: bool | Sequence[Model] = False,
    layer: str | None = None,
    scib: bool | None = None,
    resolution: float | None = None,
    n_neighbors: int = 15,
    umap: bool = True,
    shuffled: bool = True,
    random_state: int = 0,
    key_added: str | None = None,
) -> pd.DataFrame:
    """Score embeddings by how well their clusters and distances agree with known labels, beside baselines.

    Every embedding gets the same pipeline: neighbours, Leiden, and (for plots) UMAP. If scib-metrics is installed its
    scores are added, with ``batch_key`` those of the mixing of batches too.

    Parameters
    ----------
    adata
        Annotated data with the embeddings in ``obsm``.
    keys
        Slots of ``obsm`` to compare, or names of the models that made them; as a mapping, from the name to show to the
        slot.
    labels_key
        Column of ``obs`` with the labels; cells with a missing label are left out of the scores.
    batch_key
        Column of ``obs`` with the batches.
    baselines
        Embeddings to compute from the counts and to put beside the others: ``"hvg_pca"``, and ``"scvi"``, which is
        trained on these cells and takes a while. By default HVG + PCA, if there are counts. Slots that exist already
        (``X_hvg_pca``, ``X_scvi``) are used as they are.
    random_weights
        Embed the cells once more with copies of the models whose weights are random: ``True`` for the models whose
        records are in ``uns``, or a list of models.
    layer
        Layer with the counts for baselines and random weights; by default ``X``.
    scib
        Whether to add the scores of scib-metrics; by default if it is installed.
    resolution
        Leiden resolution; by default it is searched, for each embedding, so that there are as many clusters as labels.
    n_neighbors
        Neighbours of the graph.
    umap
        Whether to compute a UMAP for each embedding, for :func:`scfm.pl.compare_embeddings`.
    shuffled
        Add a control: the first embedding with its rows shuffled among cells.
    random_state
        Seed of neighbours, clusters, UMAP and the shuffled control.
    key_added
        Slot of ``uns``; ``"compare_embeddings"`` by default.

    Returns
    -------
    Table with one row per embedding and the columns ``ARI``, ``NMI``, ``silhouette``, ``clusters`` and those of
    :func:`scfm.metrics.scib_scores`; also set:

    ``.uns["compare_embeddings"]``
        The table (``scores``) and the parameters (``params``).
    ``.obs["leiden_<key>"]``
        Clusters of each embedding.
    ``.obsm["X_umap_<key>"]``
        UMAP of each embedding.

    Raises
    ------
    KeyError
        If a slot or column does not exist.
    MissingExtraError
        If ``scib=True`` and scib-metrics is not installed.
    ValueError
        If the labelled cells have fewer than two labels, or a baseline is unknown or has no counts to start from.
    """
    keys = dict(keys) if not isinstance(keys, (list, tuple)) else {key.removeprefix("X_"): key for key in keys}
    names = {name: _slot(adata, key) for name, key in keys.items()}
    for column in (labels_key, batch_key):
        if column is not None and column not in adata.obs:
            msg = f"obs has no column {column!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise KeyError(msg)
    labels = adata.obs[labels_key]
    labelled = labels.notna().to_numpy()
    if labels[labelled].nunique() < 2:
        msg = f"obs[{labels_key!r}] has fewer than two labels, so there is nothing to compare with"
        raise ValueError(msg)
    scib = has_scib() if scib is None else scib
    start = _logging.info(f"comparing {len(names)} embeddings with obs[{labels_key!r}]")
    control = {"layer": layer, "random_state": random_state}
    names |= add_random_weights(adata, random_weights, list(names.values()), **control)
    names |= add_baselines(adata, baselines, batch_key=batch_key, taken=list(names.values()), **control)
    embeddings = {name: np.asarray(adata.obsm[key]) for name, key in names.items()}
    if shuffled:
        first = next(iter(embeddings.values()))
        embeddings["shuffled"] = first[np.random.default_rng(random_state).permutation(len(first))]
    rows = {}
    for name, embedding in embeddings.items():
        usable = np.isfinite(embedding).all(1)
        work = AnnData(obs=adata.obs[[]].loc[usable].copy())
        work.obsm["X"] = embedding[usable]
        sc.pp.neighbors(work, n_neighbors=n_neighbors, use_rep="X", random_state=random_state)
        graph = work.obsp["connectivities"]
        if resolution is None:
            clusters, _ = clusters_by_bisection(graph, labels[labelled].nunique(), random_state=random_state)
        else:
            clusters = leiden_clusters(graph, resolution, random_state=random_state)
        scored = labelled[usable]
        truth = labels[usable][scored].astype(str).to_numpy()
        rows[name] = {
            **clustering_agreement(truth, clusters[scored]),
            "silhouette": label_silhouette(work.obsm["X"][scored], truth),
            "clusters": len(np.unique(clusters)),
        }
        if scib:
            batches = None if batch_key is None else adata.obs[batch_key][usable][scored]
            rows[name] |= scib_scores(work.obsm["X"][scored], truth, batches, random_state=random_state)
        slot = names.get(name, name).removeprefix("X_")
        names_of_clusters = np.unique(clusters).astype(str)
        found = pd.Series(pd.Categorical.from_codes(clusters, names_of_clusters), index=work.obs_names)
        adata.obs[_keys.clusters(slot)] = found.reindex(adata.obs_names)
        if umap:
            sc.tl.umap(work, random_state=random_state)
            layout = np.full((adata.n_obs, 2), np.nan, dtype=np.float32)
            layout[usable] = work.obsm["X_umap"]
            adata.obsm[_keys.umap(slot)] = layout
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("embedding")
    key = key_added or _keys.COMPARISON
    adata.uns[key] = {
        "scores": table,
        "params": {
            "names": list(rows),
            "slots": [names.get(name, name).removeprefix("X_") for name in rows],
            "labels_key": labels_key,
            "batch_key": batch_key or "",
            "resolution": "matched" if resolution is None else resolution,
            "n_neighbors": n_neighbors,
            "random_state": random_state,
        },
    }
    _logging.info("    finished", time=start, deep=f"added\n    {key!r}, scores of the embeddings (adata.uns)")
    return table


def _slot(adata: AnnData, key: str) -> str:
    for slot in (key, _keys.embedding(key)):
        if slot in adata.obsm:
            return slot
    msg = f"obsm has no slot {key!r}; there are {', '.join(adata.obsm) or 'none'}"
    raise KeyError(msg)
