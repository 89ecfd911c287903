"""Clustered similarity of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from seaborn.matrix import ClusterGrid

_CELL = 0.165
_MOST_LABELS = 120
# inches of a figure in which only markers have names
_LARGE = 10.0
_FONT = 7


def gene_similarity(
    adata: AnnData,
    *,
    key: str | None = None,
    markers: Sequence[str] | None = None,
    cmap: str | None = None,
    marker_color: str = "crimson",
    show: bool | None = None,
    save: str | Path | None = None,
    **options: Any,
) -> ClusterGrid | None:
    """Draw the similarity of genes with both sides clustered, and the names of marker genes highlighted.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.gene_similarity`.
    key
        Slot of ``uns`` with the similarity.
    markers
        Genes to highlight; by default those that were given to :func:`scfm.tl.gene_similarity`.
    cmap
        Colour map; by default one of two colours around zero if there are negative similarities, and one of a single
        sweep if there are none.
    marker_color
        Colour of the names of markers.
    show, save
        Show the figure, or the file to save it to.
    **options
        Options of :func:`seaborn.clustermap`.

    Returns
    -------
    The grid of seaborn, unless the figure is shown; ``.ax_heatmap`` are the axes of the matrix.

    Raises
    ------
    KeyError
        If there is no similarity.

    References
    ----------
    Bai et al., scLong, Nature Communications (2026), Fig. 8.
    """
    import seaborn as sns

    key = key or _keys.GENE_SIMILARITY
    if key not in adata.uns or "similarity" not in adata.uns[key]:
        msg = f"uns has no similarity of genes {key!r}; run scfm.tl.gene_similarity first"
        raise KeyError(msg)
    result = adata.uns[key]
    genes = np.asarray(result["genes"], dtype=str)
    table = pd.DataFrame(np.asarray(result["similarity"], dtype=float), index=genes, columns=genes)
    chosen = set(map(str, result["markers"] if markers is None else markers))
    named = len(genes) <= _MOST_LABELS
    size = max(4.5, _CELL * len(genes) + 1.8) if named else _LARGE
    others = table.to_numpy()[~np.eye(len(genes), dtype=bool)]
    # similarities of one sign fill a colour map of two signs badly
    # the diagonal, which is 1, does not decide about the colours
    limits = {"center": 0} if others.min() < 0 else {"vmin": float(others.min())}
    ratio = min(0.2, 1.0 / size)
    settings = {
        "cmap": cmap or ("RdBu_r" if others.min() < 0 else "viridis"),
        "figsize": (size, size),
        "xticklabels": named,
        "yticklabels": named,
        "vmax": float(others.max()),
        "dendrogram_ratio": ratio,
        "cbar_pos": (0.15 * ratio, 1 - 0.85 * ratio, 0.16 * ratio, 0.65 * ratio),
        **limits,
    }
    grid = sns.clustermap(table, **(settings | options))
    ax = grid.ax_heatmap
    if not named:
        ax.set(xticks=[], yticks=[])
        order = genes[_order(grid, len(genes))]
        _name_markers(ax, [place for place, gene in enumerate(order) if gene in chosen], order, marker_color)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        for label in labels:
            is_marker = label.get_text() in chosen
            label.set(
                fontsize=_FONT,
                color=marker_color if is_marker else "0.25",
                fontweight="bold" if is_marker else "normal",
            )
    ax.grid(visible=False)  # which Scanpy switches on for all figures
    ax.tick_params(length=0)
    ax.set(xlabel="", ylabel="")
    if grid.ax_cbar is not None:
        grid.ax_cbar.set_title("cosine", fontsize=8)
        grid.ax_cbar.tick_params(labelsize=7)
    return finish(grid.figure, grid, show=show, save=save)


def _order(grid: ClusterGrid, n: int) -> np.ndarray:
    """Order of the genes from top to bottom."""
    tree = grid.dendrogram_row
    return np.arange(n) if tree is None else np.asarray(tree.reordered_ind)


def _name_markers(ax: Axes, places: list[int], genes: np.ndarray, color: str) -> None:
    """Names of some of many genes beside their rows, pushed apart where they would overlap."""
    height = ax.get_window_extent().height / ax.figure.dpi * 72
    gap = 1.25 * _FONT / height * len(genes)
    rows = np.array(places, dtype=float) + 0.5
    lines = rows.copy()
    for i in range(1, len(lines)):
        lines[i] = max(lines[i], lines[i - 1] + gap)
    # what was pushed below the last row moves up again
    for i in reversed(range(len(lines))):
        below = lines[i + 1] - gap if i + 1 < len(lines) else len(genes) - 0.5 * gap
        lines[i] = min(lines[i], below)
    for place, row, line in zip(places, rows, lines, strict=True):
        ax.annotate(
            str(genes[place]),
            xy=(1, row),
            xytext=(1.03, line),
            xycoords=ax.get_yaxis_transform(),
            textcoords=ax.get_yaxis_transform(),
            fontsize=_FONT,
            color=color,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
