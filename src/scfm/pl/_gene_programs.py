"""Activity of gene programs in groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

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

_ROW, _COLUMN, _LETTER = 0.27, 0.36, 0.075
_MOST_ROWS = 25
_LONG_GROUP = 16
_LARGEST_DOT = 110


def gene_programs(
    adata: AnnData,
    programs: Sequence[str] | None = None,
    *,
    key: str | None = None,
    kind: Literal["dotplot", "heatmap"] = "dotplot",
    n_programs: int = 3,
    n_genes: int = 4,
    scale: bool = True,
    cmap: str = "Reds",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw how active gene programs are in groups of cells, each named by its genes.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.gene_programs`. Without groups (``groupby=``), the coherence of the programs
        is drawn instead.
    programs
        Names of programs, in the order in which to draw them. By default those that mark the groups best, group after group.
    key
        Slot of ``uns`` with the programs.
    kind
        ``"dotplot"`` gives dots the size of the test statistic with which a program marks a group, ``"heatmap"`` shows the activity
        alone.
    n_programs
        Programs of each group to draw by default; 25 programs at most.
    n_genes
        Genes in the name of a program.
    scale
        Whether colours go from the group of the lowest to that of the highest activity, for each program. Otherwise they are
        the activity itself.
    cmap
        Colour map.
    ax
        Axes to draw on.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown.

    Raises
    ------
    KeyError
        If there are no programs, or one does not exist.
    ValueError
        If ``kind`` is unknown.
    """
    if kind not in ("dotplot", "heatmap"):
        msg = f"kind must be dotplot or heatmap; got {kind!r}"
        raise ValueError(msg)
    result = _result(adata, key or _keys.PROGRAMS)
    summary = result["summary"]
    if programs is not None:
        programs = [str(name) for name in programs]
        if missing := [name for name in programs if name not in summary.index]:
            msg = f"there is no program {', '.join(missing)}; programs are numbered 1 to {len(summary)}"
            raise KeyError(msg)
    if "activity" not in result:
        shown = programs or list(summary.index[:_MOST_ROWS])
        return _draw_coherence(result, shown, n_genes, ax, show=show, save=save)
    shown = programs or _marking(result, n_programs)
    activity = result["activity"][shown]
    names = [_label(result, name, n_genes) for name in shown]
    if ax is None:
        ax = _axes(names, list(map(str, activity.index)))
    low, high = activity.min(), activity.max()
    # one group has nothing to be compared with
    scale = scale and len(activity) > 1
    values = ((activity - low) / (high - low).where(high > low, 1.0) if scale else activity).to_numpy().T
    limits = {"vmin": 0, "vmax": 1 if scale else float(activity.to_numpy().max())}
    if kind == "heatmap" or "markers" not in result:
        image = ax.imshow(values, cmap=cmap, aspect="auto", **limits)
        ax.grid(visible=False)
    else:
        image = _draw_dots(ax, result["markers"], activity, values, cmap=cmap, **limits)
    groups = list(map(str, activity.index))
    turn = 60 if max(map(len, groups)) <= _LONG_GROUP else 90
    ax.set_xticks(range(len(groups)), groups, rotation=turn, ha="right", va="center", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelsize="small")
    ax.set(xlim=(-0.6, len(activity) - 0.4), ylim=(len(names) - 0.4, -0.6))
    ax.spines[:].set_visible(False)
    label = "activity (row scaled)" if scale else "activity"
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.5, aspect=12, pad=0.02, anchor=(0, 0.0))
    bar.set_label(label, size="small")
    bar.ax.tick_params(labelsize="small")
    bar.ax.grid(visible=False)
    bar.outline.set_visible(False)
    return finish(ax.figure, ax, show=show, save=save)


def _result(adata: AnnData, key: str) -> dict[str, Any]:
    if key not in adata.uns or "programs" not in adata.uns[key]:
        msg = f"uns has no programs {key!r}; run scfm.tl.gene_programs first"
        raise KeyError(msg)
    return adata.uns[key]


def _label(result: dict[str, Any], name: str, n_genes: int) -> str:
    members = result["programs"][name]
    text = ", ".join(map(str, members[:n_genes]))
    more = f" +{len(members) - n_genes}" if len(members) > n_genes else ""
    return f"{text}{more}  ({name})"


def _axes(names: list[str], groups: list[str]) -> Axes:
    width = 1.9 + _LETTER * max(map(len, names)) + _COLUMN * len(groups)
    height = 0.5 + max(2.2, _ROW * len(names)) + 0.06 * max(map(len, groups))
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _marking(result: dict[str, Any], n_programs: int) -> list[str]:
    """The programs that mark each group best, group after group, each once."""
    if "markers" not in result:
        return list(result["summary"].index[:_MOST_ROWS])
    markers = result["markers"]
    higher = markers[(markers["difference"] > 0) & (markers["p_adjusted"] < 0.05)]
    best = higher.sort_values(["group", "score"], ascending=[True, False], kind="stable").groupby("group", sort=False)
    # first of each group before second of any, so that no group is left out when there are too many
    ranked = [(rank, group, name) for group, part in best for rank, name in enumerate(part["program"][:n_programs])]
    taken: dict[str, str] = {}
    for _, group, name in sorted(ranked, key=lambda item: item[0]):
        if len(taken) < _MOST_ROWS:
            taken.setdefault(str(name), str(group))
    groups = list(map(str, result["activity"].index))
    found = sorted(taken, key=lambda name: groups.index(taken[name]))
    return found or list(result["summary"].index[:_MOST_ROWS])


def _draw_dots(
    ax: Axes, markers: pd.DataFrame, activity: pd.DataFrame, values: np.ndarray, *, cmap: str, **limits: float
) -> Any:
    table = markers.pivot_table(index="program", columns="group", values="score", observed=True)
    strength = table.reindex(index=activity.columns, columns=activity.index.astype(str)).to_numpy()
    strength = np.clip(np.nan_to_num(strength), 0, None)
    largest = strength.max() or 1.0
    rows, columns = np.indices(values.shape)
    sizes = 4 + _LARGEST_DOT * strength / largest
    image = ax.scatter(
        columns.ravel(),
        rows.ravel(),
        s=sizes.ravel(),
        c=values.ravel(),
        cmap=cmap,
        edgecolors="0.6",
        linewidths=0.4,
        **limits,
    )
    ax.set_axisbelow(True)
    ax.grid(color="0.94")
    steps = [step for step in np.unique(np.round(largest * np.array([0.25, 0.5, 1.0]))) if step > 0]
    handles = [
        plt.Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color="0.6",
            markersize=np.sqrt(4 + _LARGEST_DOT * step / largest),
            label=f"{step:.0f}",
        )
        for step in steps
    ]
    legend = ax.legend(
        handles=handles,
        title="marks group\n(Wilcoxon z)",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize="small",
        title_fontsize="small",
    )
    legend.set_in_layout(True)
    return image


def _draw_coherence(
    result: dict[str, Any], shown: list[str], n_genes: int, ax: Axes | None, **options: Any
) -> Axes | None:
    summary = result["summary"].loc[shown]
    names = [_label(result, name, n_genes) for name in shown]
    if ax is None:
        size = (3.4 + _LETTER * max(map(len, names)), 0.8 + _ROW * len(names))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    place = np.arange(len(names))
    ax.barh(place, summary["coherence"], color="C0", alpha=0.85, height=0.7, label="in the embedding")
    if "coexpression" in summary:
        ax.scatter(summary["coexpression"], place, color="C1", s=22, zorder=3, label="in the expression of cells")
    ax.set_yticks(place, names)
    ax.set(xlabel="mean similarity of two genes", ylim=(len(names) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0, labelsize="small")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return finish(ax.figure, ax, **options)
