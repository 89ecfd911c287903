"""A map of predicted perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from .. import _keys
from ._figure import finish

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_MANY = 20


def perturbation_atlas(
    atlas: AnnData,
    *,
    size: float | None = None,
    min_share: float = 0.0,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the map of perturbations with the dominant gene of each cluster.

    Parameters
    ----------
    atlas
        Result of :func:`scfm.tl.perturbation_atlas`.
    size
        Area of the dots; by default it fits their number.
    min_share
        Clusters whose dominant gene is in a smaller share of their perturbations have no name.
    ax
        Axes to draw on.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown. Dots are pairs, triangles single perturbations; colours are clusters.

    Raises
    ------
    KeyError
        If it is no such result.
    """
    if _keys.ATLAS not in atlas.uns or "X_umap" not in atlas.obsm:
        msg = "this is no map of perturbations; make one with scfm.tl.perturbation_atlas"
        raise KeyError(msg)
    points = np.asarray(atlas.obsm["X_umap"])
    clusters = atlas.uns[_keys.ATLAS]["clusters"]
    codes = atlas.obs["cluster"].astype(str).to_numpy()
    single = (atlas.obs["n_genes"] == 1).to_numpy()
    if ax is None:
        _, ax = plt.subplots(figsize=(6.2, 5.6), layout="constrained")
    area = float(np.clip(6000 / len(points), 5, 45)) if size is None else size
    palette = plt.get_cmap("tab20" if len(clusters) <= _MANY else "gist_ncar")
    names = []
    for number, (cluster, gene, share) in enumerate(
        zip(clusters["cluster"].astype(str), clusters["dominant_gene"].astype(str), clusters["share"], strict=True)
    ):
        color = palette(number if len(clusters) <= _MANY else 0.95 * number / len(clusters))
        for kind, marker, scale in ((~single, "o", 1.0), (single, "^", 1.6)):
            here = points[(codes == cluster) & kind]
            ax.scatter(
                *here.T, s=area * scale, marker=marker, color=color, linewidths=0.3, edgecolors="white", zorder=2
            )
        if share >= min_share:
            middle = np.median(points[codes == cluster], axis=0)
            names.append(
                ax.annotate(
                    gene,
                    middle,
                    fontsize=8,
                    fontweight="bold",
                    ha="center",
                    va="center",
                    zorder=4,
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": color, "alpha": 0.85},
                )  # fmt: skip
            )
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.set_title(f"{len(points):,} perturbations, {len(clusters)} clusters", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    kinds = [("pair", "o", ~single), ("single", "^", single)]
    handles = [
        plt.Line2D([], [], marker=marker, linestyle="", color="0.5", label=label)
        for label, marker, there in kinds
        if there.any()
    ]
    ax.legend(handles=handles, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _apart(ax, names)
    return finish(ax.figure, ax, show=show, save=save)


def _apart(ax: Axes, names: list) -> None:
    """Move names apart until none covers another."""
    from ._graph_layout import push_apart

    if len(names) < 2:
        return
    ax.figure.canvas.draw()
    boxes = [name.get_window_extent() for name in names]
    middles = np.array([(box.min + box.max) / 2 for box in boxes])
    sizes = np.array([box.size for box in boxes]) + 4
    moved = push_apart(middles, sizes)
    moved = moved + (middles - moved).mean(0)
    for name, place in zip(names, ax.transData.inverted().transform(moved), strict=True):
        name.set_position(place)
