"""The most specific transcription factors of each cell type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from .. import _keys
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_PANEL = (2.1, 2.3)
_COLUMNS = 5
# height of a name as a share of the range of scores
_LINE = 0.17
_HIGHLIGHT, _OTHER = "#2166ac", "0.75"


def tf_specificity(
    adata: AnnData,
    *,
    key: str = _keys.ACTIVITY,
    groups: Sequence[str] | None = None,
    n_top: int = 5,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Sequence[Axes] | None:
    """Draw, for each cell type, the transcription factors in the order of their regulon specificity score.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.tf_activity` with ``groupby``.
    key
        Slot of ``uns`` with the scores.
    groups
        Which cell types; by default all.
    n_top
        How many factors are named.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, one for each cell type, unless the figure is shown.

    Raises
    ------
    KeyError
        If there are no scores, or a cell type does not exist.
    """
    if key not in adata.uns or "specificity" not in adata.uns[key]:
        msg = f"uns[{key!r}] holds no specificity; run scfm.tl.tf_activity with groupby="
        raise KeyError(msg)
    table = adata.uns[key]["specificity"]
    groups = list(map(str, table.index)) if groups is None else [str(group) for group in groups]
    if missing := [group for group in groups if group not in table.index]:
        msg = f"there is no cell type {', '.join(missing)}; there are {', '.join(map(str, table.index))}"
        raise KeyError(msg)
    n_columns = min(_COLUMNS, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure, grid = plt.subplots(
        n_rows,
        n_columns,
        figsize=(_PANEL[0] * n_columns, _PANEL[1] * n_rows),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    axes = list(grid.ravel())
    for ax, group in zip(axes, groups, strict=False):
        _draw(ax, group, table.loc[group].dropna().sort_values(ascending=False, kind="stable"), n_top)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    figure.supxlabel("rank of the factor", fontsize="small")
    figure.supylabel("regulon specificity score", fontsize="small")
    return finish(figure, axes[: len(groups)], show=show, save=save)


def _draw(ax: Axes, title: str, scores: pd.Series, n_top: int) -> None:
    ranks = np.arange(1, len(scores) + 1)
    ax.scatter(ranks[n_top:], scores.iloc[n_top:], s=5, color=_OTHER, linewidths=0)
    ax.scatter(ranks[:n_top], scores.iloc[:n_top], s=12, color=_HIGHLIGHT, linewidths=0)
    ax.set_title(title, fontsize="small")
    ax.tick_params(labelsize="x-small")
    ax.spines[["top", "right"]].set_visible(False)
    top = scores.iloc[:n_top]
    if not len(top):
        return
    low, high = float(scores.min()), float(scores.max())
    span = max(high - low, 1e-3)
    # names stand below each other above the curve, with a line to each dot
    ax.set_ylim(low - 0.05 * span, high + _LINE * span * len(top))
    # beside the dots that are named, which are all of a few
    right = max(0.3 * len(scores) + 1, len(top) + 0.6)
    ax.set_xlim(0, max(len(scores) + 1, 1.9 * right))
    lines = high + _LINE * span * (len(top) - 0.7 - np.arange(len(top)))
    for rank, (name, score), y in zip(ranks, top.items(), lines, strict=False):
        ax.annotate(
            str(name),
            xy=(rank, score),
            xytext=(right, y),
            fontsize="x-small",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.6",
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
