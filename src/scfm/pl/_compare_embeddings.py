"""UMAPs of several embeddings with their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .. import _keys
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_MOST_BARS = 4
_PANEL = 3.1
_PANELS_IN_ROW = 3


def compare_embeddings(
    adata: AnnData,
    *,
    color: str | None = None,
    key: str | None = None,
    size: float | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Sequence[Axes] | None:
    """Draw the UMAP of each embedding and a chart of the scores.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.compare_embeddings`.
    color
        Column of ``obs`` to colour cells by; by default the labels that were compared with.
    key
        Slot of ``uns`` with the comparison.
    size
        Size of the points.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, one for each embedding and one for the scores, unless the figure is shown.

    Raises
    ------
    KeyError
        If the comparison, or its UMAPs, do not exist.
    """
    key = key or _keys.COMPARISON
    if key not in adata.uns:
        msg = f"uns has no comparison {key!r}; run scfm.tl.compare_embeddings first"
        raise KeyError(msg)
    scores, params = adata.uns[key]["scores"], adata.uns[key]["params"]
    color = color or str(params["labels_key"])
    panels = [(str(name), _keys.umap(str(slot))) for name, slot in zip(params["names"], params["slots"], strict=True)]
    if missing := [slot for _, slot in panels if slot not in adata.obsm]:
        msg = f"obsm has no {', '.join(missing)}; run scfm.tl.compare_embeddings with umap=True"
        raise KeyError(msg)
    labels = pd.Categorical(adata.obs[color])
    palette = plt.get_cmap("tab20" if len(labels.categories) > 10 else "tab10")
    figure, grid, score_ax = _panels(len(panels), len(scores))
    axes = [*grid.ravel()[: len(panels)], score_ax]
    size = 12_000 / max(adata.n_obs, 1_000) if size is None else size
    order = np.random.default_rng(0).permutation(adata.n_obs)
    colors = np.array([palette(code % palette.N) if code >= 0 else (0.85, 0.85, 0.85, 1.0) for code in labels.codes])
    for ax, (name, slot) in zip(axes, panels, strict=False):
        points = np.asarray(adata.obsm[slot])
        ax.scatter(*points[order].T, c=colors[order], s=size, linewidths=0, rasterized=True)
        ax.set(title=name, xticks=[], yticks=[], xlabel="UMAP1", ylabel="UMAP2")
        ax.spines[["top", "right"]].set_visible(False)
    _draw_scores(score_ax, scores)
    for ax in grid.ravel()[len(panels) :]:
        if ax is not score_ax:
            ax.set_axis_off()
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", markersize=5, color=palette(code % palette.N), label=str(label))
        for code, label in enumerate(labels.categories)
    ]
    top = grid.ravel()[0].figure
    top.legend(handles=handles, loc="outside right upper", frameon=False, title=color, fontsize="small")
    return finish(figure, axes, show=show, save=save)


def _panels(n_panels: int, n_scored: int) -> tuple[Figure, NDArray, Axes]:
    """Axes for the embeddings and one for their scores: beside a few, in a row of its own below many."""
    if n_panels < _PANELS_IN_ROW:
        size = (_PANEL * (n_panels + 1) + 1.8, _PANEL)
        figure, grid = plt.subplots(1, n_panels + 1, figsize=size, layout="constrained", squeeze=False)
        return figure, grid, grid[0, -1]
    n_rows, height = -(-n_panels // _PANELS_IN_ROW), max(_PANEL, 0.4 * n_scored)
    size = (_PANEL * _PANELS_IN_ROW + 1.8, _PANEL * n_rows + height)
    figure = plt.figure(figsize=size, layout="constrained")
    # long names of scored embeddings would push the columns above apart if they shared a grid with them
    top, bottom = figure.subfigures(2, 1, height_ratios=[_PANEL * n_rows, height])
    return figure, top.subplots(n_rows, _PANELS_IN_ROW, squeeze=False), bottom.subplots()


def _draw_scores(ax: Axes, scores: pd.DataFrame) -> None:
    shown = scores.drop(columns="clusters", errors="ignore").astype(float)
    if shown.shape[1] > _MOST_BARS:
        _draw_table(ax, shown)
        return
    position = np.arange(len(shown))[::-1]
    width = 0.8 / shown.shape[1]
    for i, score in enumerate(shown):
        ax.barh(
            position + ((shown.shape[1] - 1) / 2 - i) * width,
            shown[score],
            width,
            label=score,
            color=f"C{i}",
            alpha=0.85,
        )
    ax.set_yticks(position, shown.index.astype(str))
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(title="agreement with labels", xlim=(min(-0.1, float(shown.min().min()) - 0.02), 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_table(ax: Axes, scores: pd.DataFrame) -> None:
    """Numbers on a ground that is the darker the better a score is within its column."""
    low, high = scores.min(), scores.max()
    shade = (scores - low) / (high - low).where(high > low, 1.0)
    ax.imshow(shade, cmap="Blues", vmin=-0.15, vmax=1.4, aspect="auto")
    for row, column in np.ndindex(scores.shape):
        best = scores.iloc[row, column] == high.iloc[column]
        text = f"{scores.iloc[row, column]:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, fontweight="bold" if best else "normal")
    ax.set_xticks(range(scores.shape[1]), scores.columns, rotation=40, ha="right", fontsize="small")
    ax.set_yticks(range(len(scores)), scores.index.astype(str), fontsize="small")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(title="scores (higher is better)")
