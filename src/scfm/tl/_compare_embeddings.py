"""Embeddings side by side, scored against labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

from .. import _keys, _logging
from ..metrics import clustering_agreement, label_silhouette

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BISECTIONS = 20


def compare_embeddings(
    adata: AnnData,
    keys: Sequence[str] | Mapping[str, str],
    labels_key: str,
    *,
    resolution: float | None = None,
    n_neighbors: int = 15,
    umap: bool = True,
    shuffled: bool = True,
    random_state: int = 0,
    key_added: str | None = None,
) -> pd.DataFrame:
    """Score embeddings by how well their clusters and distances agree with known labels.

    Every embedding gets the same pipeline: neighbours, Leiden, and (for plots) UMAP.

    Parameters
    ----------
    adata
        Annotated data with the embeddings in ``obsm``.
    keys
        Slots of ``obsm`` to compare; as a mapping, from the name to show to the slot.
    labels_key
        Column of ``obs`` with the labels; cells with a missing label are left out of the scores.
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
    Table with one row per embedding and the columns ``ARI``, ``NMI``, ``silhouette``, ``clusters``; also set:

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
    ValueError
        If the labelled cells have fewer than two labels.
    """
    names = dict(keys) if not isinstance(keys, (list, tuple)) else {key.removeprefix("X_"): key for key in keys}
    if labels_key not in adata.obs:
        msg = f"obs has no column {labels_key!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise KeyError(msg)
    for key in names.values():
        if key not in adata.obsm:
            msg = f"obsm has no slot {key!r}; there are {', '.join(adata.obsm) or 'none'}"
            raise KeyError(msg)
    labels = adata.obs[labels_key]
    labelled = labels.notna().to_numpy()
    if labels[labelled].nunique() < 2:
        msg = f"obs[{labels_key!r}] has fewer than two labels, so there is nothing to compare with"
        raise ValueError(msg)
    start = _logging.info(f"comparing {len(names)} embeddings with obs[{labels_key!r}]")
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
        _cluster(work, labels[labelled].nunique(), resolution, random_state)
        scored = labelled[usable]
        truth = labels[usable][scored].astype(str).to_numpy()
        rows[name] = {
            **clustering_agreement(truth, work.obs["leiden"].to_numpy()[scored]),
            "silhouette": label_silhouette(work.obsm["X"][scored], truth),
            "clusters": work.obs["leiden"].nunique(),
        }
        slot = names.get(name, name).removeprefix("X_")
        adata.obs[_keys.clusters(slot)] = work.obs["leiden"].reindex(adata.obs_names)
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
            "resolution": "matched" if resolution is None else resolution,
            "n_neighbors": n_neighbors,
            "random_state": random_state,
        },
    }
    _logging.info("    finished", time=start, deep=f"added\n    {key!r}, scores of the embeddings (adata.uns)")
    return table


def _cluster(work: AnnData, n_labels: int, resolution: float | None, random_state: int) -> None:
    """Leiden at a resolution, or at the one whose number of clusters comes closest to the number of labels."""

    def leiden(value: float) -> int:
        sc.tl.leiden(work, resolution=value, random_state=random_state, flavor="igraph", n_iterations=2, directed=False)
        return work.obs["leiden"].nunique()

    if resolution is not None:
        leiden(resolution)
        return
    low, high = 0.0, 2.0
    best = (np.inf, 1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        n = leiden(middle)
        best = min(best, (abs(n - n_labels), middle))
        if n == n_labels:
            return
        low, high = (middle, high) if n < n_labels else (low, middle)
    leiden(best[1])
