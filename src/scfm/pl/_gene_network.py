"""Networks of genes as labelled graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Polygon
from matplotlib.textpath import TextPath

from .. import _keys
from ..tl._attention_maps import DIFFERENCE
from ..tl._known_edges import known_edges
from ._figure import finish
from ._graph_layout import layout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

    from ..tl._known_edges import Known

_INCH = 72
_PAD = (0.05, 0.035)
_PLAIN, _EDGE, _KNOWN = "#e3e6ea", "#8a93a0", "#d1495b"
_MOST_COLORS = 12
_LINES = (0.5, 3.0)
_EDGES_PER_GENE = 3
_NO_EDGE = "the network has no edge to draw; lower the threshold of scfm.tl.gene_network, or give it more genes"


def gene_network(
    adata: AnnData,
    *,
    key: str = _keys.NETWORK,
    condition: str | None = None,
    genes: Sequence[str] | None = None,
    max_genes: int = 100,
    max_edges: int | None = None,
    color: str | None = None,
    tfs: Sequence[str] | None = None,
    known: Known | None = None,
    font_size: float | None = None,
    palette: str = "tab20",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw a network of genes as a graph whose nodes are the names.

    Lines are the wider and darker the larger the weight is. A network with a direction has arrows from the gene that is
    attended to to the one that attends.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.gene_network`.
    key
        Slot of ``uns`` with the network.
    condition
        Which one, if there are several; by default the difference where there is one, else the first.
    genes
        Draw only edges between these.
    max_genes
        Most genes to draw: of a larger network, those that the strongest edges connect.
    max_edges
        Most edges to draw, the strongest first; by default the strongest of each gene, known ones, and others up to 3 for
        each gene.
    color
        Column of ``var`` that colours the genes; by default the gene programs if there are any.
    tfs
        Names of transcription factors, which get a frame.
    known
        Known edges, which are drawn in red: as ``prior`` of :func:`scfm.tl.tf_targets`. They have no direction here.
    font_size
        Size of the names; by default it follows their number.
    palette
        Colour map for the values of ``color``.
    ax
        Axes to draw on, with the legend inside; names become smaller so that they fit, unless there is a ``font_size``. By
        default a figure that is as large as the network needs.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown.

    Raises
    ------
    KeyError
        If the network, a condition, a gene or a column does not exist.
    ValueError
        If there is no edge to draw.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.gene_network(adata, "scgpt", program="1")  # doctest: +SKIP
    >>> scfm.pl.gene_network(adata, tfs=["SPI1", "CEBPA"])  # doctest: +SKIP
    """
    edges, title = _edges(adata, key, condition)
    edges = _among(edges, adata.uns[key]["nodes"], genes)
    edges, n_all = _strongest(edges, max_genes)
    is_known = np.zeros(len(edges), dtype=bool) if known is None else _is_known(edges, known)
    shown = _enough(edges, is_known) if max_edges is None else np.arange(len(edges)) < max_edges
    edges, is_known = edges[shown], is_known[shown]
    names = _names(edges)
    directed = bool(adata.uns[key]["directed"])
    size = font_size or float(np.clip(10.5 - len(names) / 25, 6.5, 9.5))
    boxes = np.array([_box(name, size) for name in names])
    source, target = (names.get_indexer(edges[end]) for end in ("source", "target"))
    places = layout(len(names), source, target, boxes)
    wide, high = (places + boxes / 2).max(0)
    groups = _groups(adata, names, color)
    colors = _colors(groups, palette)
    legend = _legend_width(colors, tfs, known)
    given = ax is not None
    if ax is None:
        figure, ax = plt.subplots(figsize=(max(wide, 2.5) + 0.3 + legend, max(high, 1.8) + 0.6))
        figure.subplots_adjust(
            left=0.15 / figure.get_figwidth(),
            right=1 - (0.15 + legend) / figure.get_figwidth(),
            bottom=0.15 / figure.get_figheight(),
            top=1 - 0.4 / figure.get_figheight(),
        )
    scale, limits = (
        _fitted(ax, wide, high, legend)
        if given
        else (1.0, (-0.08, max(wide, 0.1) + 0.08, -0.08, max(high, 0.1) + 0.08))
    )
    _draw_edges(ax, edges["weight"].to_numpy(), places, boxes, source, target, is_known, directed=directed)
    regulators = np.isin(names, [] if tfs is None else list(tfs))
    _draw_nodes(
        ax,
        names,
        places,
        boxes,
        size * (1.0 if font_size else scale),
        [colors.get(group, _PLAIN) for group in groups],
        regulators,
    )
    ax.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[])
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)
    shown = f"{len(names):,} of {n_all:,} genes" if n_all > len(names) else f"{len(names):,} genes"
    ax.set_title(f"{title}{shown}, {len(edges):,} edges", fontsize="medium")
    handles = _draw_legend(
        ax, colors, edges["weight"].to_numpy(), color or _keys.GENE_PROGRAM, regulators.any(), is_known.any()
    )
    if given:
        handles.set_loc("upper right")
    return finish(ax.figure, ax, show=show, save=save)


def _edges(adata: AnnData, key: str, condition: str | None) -> tuple[pd.DataFrame, str]:
    """Edges of one condition, the strongest first, and the start of the title."""
    if key not in adata.uns:
        msg = f"uns has no gene network {key!r}; run scfm.tl.gene_network first"
        raise KeyError(msg)
    edges = adata.uns[key]["edges"]
    edges = edges.assign(source=edges["source"].astype(str), target=edges["target"].astype(str))
    if "condition" not in edges:
        if condition is not None:
            msg = f"the network in uns[{key!r}] has no conditions; leave condition= out"
            raise KeyError(msg)
        return edges, ""
    if edges.empty:
        raise ValueError(_NO_EDGE)
    conditions = list(dict.fromkeys(edges["condition"].astype(str)))
    if condition is None:
        condition = DIFFERENCE if DIFFERENCE in conditions else conditions[0]
    if condition not in conditions:
        msg = f"the network has no edges in {condition!r}; there are {', '.join(conditions)}"
        raise KeyError(msg)
    return edges[edges["condition"].astype(str) == condition], f"{condition}: "


def _among(edges: pd.DataFrame, nodes: np.ndarray, genes: Sequence[str] | None) -> pd.DataFrame:
    """Edges between two different genes, of chosen ones if some are chosen."""
    edges = edges[edges["source"] != edges["target"]]
    if genes is not None:
        if missing := [gene for gene in genes if gene not in set(map(str, nodes))]:
            msg = f"the network has no gene {', '.join(missing[:10])}"
            raise KeyError(msg)
        edges = edges[edges["source"].isin(list(genes)) & edges["target"].isin(list(genes))]
    if edges.empty:
        raise ValueError(_NO_EDGE)
    return edges.sort_values("weight", ascending=False, kind="stable")


def _strongest(edges: pd.DataFrame, max_genes: int) -> tuple[pd.DataFrame, int]:
    """Edges among the genes that the strongest edges connect, and how many genes there are in all."""
    if max_genes < 2:
        msg = f"max_genes must be at least 2; got {max_genes!r}"
        raise ValueError(msg)
    ends = edges[["source", "target"]].to_numpy().ravel()
    codes, names = pd.factorize(ends)
    # genes are numbered in the order in which edges bring them in
    newest = np.maximum.accumulate(codes).reshape(-1, 2).max(1)
    last = newest[newest < max_genes].max(initial=1)
    kept = edges["source"].isin(names[: last + 1]) & edges["target"].isin(names[: last + 1])
    return edges[kept], len(names)


def _enough(edges: pd.DataFrame, is_known: np.ndarray) -> np.ndarray:
    """Which edges to draw: the first one of each gene, known ones, and then the strongest."""
    codes, names = pd.factorize(edges[["source", "target"]].to_numpy().ravel())
    first = pd.Series(np.arange(len(codes)) // 2).groupby(codes).min().to_numpy()
    needed = is_known.copy()
    needed[first] = True
    n_more = max(0, _EDGES_PER_GENE * len(names) - int(needed.sum()))
    needed[np.flatnonzero(~needed)[:n_more]] = True
    return needed


def _fitted(ax: Axes, wide: float, high: float, legend: float) -> tuple[float, tuple[float, float, float, float]]:
    """Scale of a picture in inches on given axes, and the limits of these, with the legend on the right."""
    # only a drawn figure knows what its layout engine does to the axes
    ax.figure.draw_without_rendering()
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    room = max(0.3 * box.width, box.width - legend)
    scale = min(1.0, room / (wide + 0.16), box.height / (high + 0.16))
    left = -(room / scale - wide) / 2
    low = -(box.height / scale - high) / 2
    return scale, (left, left + box.width / scale, low, low + box.height / scale)


def _names(edges: pd.DataFrame) -> pd.Index:
    return pd.Index(pd.unique(edges[["source", "target"]].to_numpy().ravel()))


def _box(name: str, font_size: float) -> tuple[float, float]:
    """Width and height of a name with its frame, in inches."""
    width = TextPath((0, 0), name, size=font_size).get_extents().width / _INCH
    return width + 2 * _PAD[0] + 0.02, font_size / _INCH + 2 * _PAD[1]


def _groups(adata: AnnData, names: pd.Index, color: str | None) -> list[str | None]:
    """Value of the column of ``var`` for each gene."""
    if color is None:
        color = _keys.GENE_PROGRAM
        if color not in adata.var:
            return [None] * len(names)
    elif color not in adata.var:
        msg = f"var has no column {color!r}; there are {', '.join(map(str, adata.var.columns)) or 'none'}"
        raise KeyError(msg)
    values = adata.var[color][~adata.var_names.duplicated()].reindex(names)
    return [None if pd.isna(value) else str(value) for value in values]


def _colors(groups: list[str | None], palette: str) -> dict[str, tuple[float, float, float]]:
    """Colour of each group, the largest ones if there are too many."""
    sizes = pd.Series([group for group in groups if group is not None], dtype=object).value_counts(sort=False)
    largest = list(sizes.sort_values(ascending=False, kind="stable").index[:_MOST_COLORS])
    largest.sort(key=lambda group: (len(group) if group.isdigit() else 0, group))
    colors = plt.get_cmap(palette)
    # the strong and the light colours of tab20 take turns; all of them are made lighter, so that names can be read
    order = (
        [*range(0, colors.N, 2), *range(1, colors.N, 2)]
        if colors.N <= 20
        else np.linspace(0, colors.N - 1, _MOST_COLORS).astype(int)
    )
    return {group: _light(colors(int(order[i % len(order)]))) for i, group in enumerate(largest)}


def _light(color: tuple[float, ...]) -> tuple[float, float, float]:
    return tuple(0.45 + 0.55 * part for part in to_rgb(color))


def _is_known(edges: pd.DataFrame, known: Known) -> np.ndarray:
    table = known_edges(known)
    pairs = set(zip(table["source"], table["target"], strict=True))
    ends = zip(edges["source"], edges["target"], strict=True)
    return np.array([(a, b) in pairs or (b, a) in pairs for a, b in ends], dtype=bool)


def _strength(weights: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 within the picture."""
    low, high = weights.min(), weights.max()
    return np.ones_like(weights) if high == low else (weights - low) / (high - low)


def _draw_edges(
    ax: Axes,
    weights: np.ndarray,
    places: np.ndarray,
    boxes: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    is_known: np.ndarray,
    *,
    directed: bool,
) -> None:
    strength = _strength(weights)
    widths = _LINES[0] + (_LINES[1] - _LINES[0]) * strength
    colors = np.array([(*to_rgb(_KNOWN if one else _EDGE), 0) for one in is_known])
    colors[:, 3] = np.where(is_known, 0.95, 0.3 + 0.6 * strength)
    start, end = places[source], places[target]
    if directed:
        # an arrow ends at the frame of the name, and the line at the arrow
        along = end - start
        length = np.linalg.norm(along, axis=1, keepdims=True)
        unit = along / np.maximum(length, 1e-9)
        with np.errstate(divide="ignore"):
            inside = np.min(boxes[target] / 2 / np.abs(unit), axis=1, keepdims=True)
        tip = end - unit * np.minimum(inside + 0.01, 0.8 * length)
        head = 0.055 + 0.035 * strength[:, None]
        side = np.column_stack([-unit[:, 1], unit[:, 0]]) * head * 0.42
        corners = np.stack([tip, tip - unit * head + side, tip - unit * head - side], axis=1)
        end = tip - unit * head * 0.8
        arrows = PatchCollection([Polygon(corner) for corner in corners], facecolors=colors, linewidths=0, zorder=2)
        arrows.set_gid("arrows")
        ax.add_collection(arrows)
    # weak edges first, known ones on top
    order = np.lexsort((strength, is_known))
    lines = LineCollection(
        np.stack([start, end], axis=1)[order], linewidths=widths[order], colors=colors[order], zorder=1, capstyle="butt"
    )
    lines.set_gid("edges")
    ax.add_collection(lines)


def _draw_nodes(
    ax: Axes,
    names: pd.Index,
    places: np.ndarray,
    boxes: np.ndarray,
    font_size: float,
    colors: list[str | tuple[float, float, float]],
    regulators: np.ndarray,
) -> None:
    for name, place, box, color, regulator in zip(names, places, boxes, colors, regulators, strict=True):
        patch = FancyBboxPatch(
            place - box / 2,
            *box,
            boxstyle=f"round,pad=0,rounding_size={box[1] / 2.4}",
            facecolor=color,
            edgecolor="black" if regulator else "white",
            linewidth=1.3 if regulator else 0.6,
            zorder=3,
        )
        ax.add_patch(patch)
        weight = "bold" if regulator else "normal"
        ax.text(*place, name, fontsize=font_size, weight=weight, ha="center", va="center_baseline", zorder=4)


def _legend_width(colors: dict, tfs: Sequence[str] | None, known: Known | None) -> float:
    longest = max(
        map(len, [*colors, "known" if known is not None else "", "factor" if tfs is not None else "", "0.123"])
    )
    return 0.55 + 0.075 * max(longest, 9)


def _draw_legend(
    ax: Axes, colors: dict, weights: np.ndarray, title: str, has_regulators: bool, has_known: bool
) -> Legend:
    handles = []
    if colors:
        handles.append(plt.Line2D([], [], linestyle="", label=title.replace("_", " ")))
        handles += [
            plt.Line2D([], [], marker="s", linestyle="", markersize=8, color=shade, label=group)
            for group, shade in colors.items()
        ]
    if has_regulators:
        handles.append(
            plt.Line2D(
                [],
                [],
                marker="s",
                linestyle="",
                markersize=8,
                markerfacecolor="white",
                markeredgecolor="black",
                label="factor",
            )
        )
    if has_known:
        handles.append(plt.Line2D([], [], color=_KNOWN, linewidth=2, label="known edge"))
    handles.append(plt.Line2D([], [], linestyle="", label="weight"))
    for share in (1, 0.5, 0) if weights.max() > weights.min() else (1,):
        value = weights.min() + share * (weights.max() - weights.min())
        width = _LINES[0] + (_LINES[1] - _LINES[0]) * share
        handles.append(plt.Line2D([], [], color=_EDGE, alpha=0.3 + 0.6 * share, linewidth=width, label=f"{value:.2g}"))
    legend = ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small", handlelength=1.2
    )
    headings = {"weight", title.replace("_", " ")} if colors else {"weight"}
    for text in legend.get_texts():
        if text.get_text() in headings:
            text.set_weight("bold")
            text.set_x(-18)
    return legend
