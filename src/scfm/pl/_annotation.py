"""Predicted labels against known ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np

from .. import _keys
from .._label_names import hold_numbers, label_names
from ..metrics import annotation_scores, confusion_matrix
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELL = 0.34
_MOST_NUMBERS = 20
_REJECTED = "no label"


def annotation(
    adata: AnnData,
    labels_key: str,
    key: str | None = None,
    *,
    normalize: Literal["labels", "none"] = "labels",
    confidence: bool = True,
    cmap: str = "Blues",
    show: bool | None = None,
    save: str | Path | None = None,
) -> Sequence[Axes] | None:
    """Draw the confusion matrix of predicted cell types, and how confident right and wrong predictions are.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.annotate` or :func:`scfm.tl.map_to_reference`, with known labels, too.
    labels_key
        Column of ``obs`` with the known labels; cells without one are left out.
    key
        Column of ``obs`` with the predicted labels; by default what :func:`scfm.tl.annotate` made of ``labels_key``.
    normalize
        ``"labels"`` shows the share of the cells of each known label, ``"none"`` numbers of cells.
    confidence
        Whether to draw the confidences, if there are any.
    cmap
        Colour map of the matrix.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes of the matrix and of the confidences, unless the figure is shown.

    Raises
    ------
    KeyError
        If a column does not exist.
    ValueError
        If no cell has a known label.
    """
    key = key or _keys.predicted(labels_key)
    for column in (labels_key, key):
        if column not in adata.obs:
            msg = f"obs has no column {column!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise KeyError(msg)
    known = adata.obs[labels_key].notna().to_numpy()
    if not known.any():
        msg = f"no cell has a label in obs[{labels_key!r}]"
        raise ValueError(msg)
    truth, predicted = adata.obs[labels_key][known], adata.obs[key][known]
    beside_numbers = hold_numbers(truth) or hold_numbers(predicted)
    truth, predicted = (label_names(column, beside_numbers=beside_numbers) for column in (truth, predicted))
    slot = _keys.confidence(key)
    has_confidence = confidence and slot in adata.obs
    table = confusion_matrix(truth, predicted.fillna(_REJECTED))
    table = _ordered(table)
    shown = table.div(table.sum(axis=1).clip(lower=1), axis=0) if normalize == "labels" else table
    height = max(2.6, _CELL * len(table) + 1.2)
    widths = [max(3.0, _CELL * table.shape[1] + 1.8)] + ([2.6] if has_confidence else [])
    figure, grid = plt.subplots(
        1,
        len(widths),
        figsize=(sum(widths), height),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    axes = list(grid[0])
    _draw_matrix(figure, axes[0], shown, cmap=cmap, share=normalize == "labels")
    scores = annotation_scores(truth, predicted)
    axes[0].set_title(f"accuracy {scores['accuracy']:.2f}, macro F1 {scores['macro F1']:.2f}", fontsize="medium")
    axes[0].set(xlabel=f"predicted ({key})", ylabel=f"known ({labels_key})")
    if has_confidence:
        _draw_confidence(axes[1], adata.obs[slot][known].to_numpy(dtype=float), (predicted == truth).to_numpy())
    return finish(figure, axes, show=show, save=save)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Known labels first in the same order on both axes, then what is only predicted, then cells without a label."""
    rows = [name for name in table.index if table.loc[name].sum() > 0]
    used = [name for name in table.columns if table[name].sum() > 0]
    first = [name for name in rows if name in table.columns]
    others = [name for name in used if name not in first and name != _REJECTED]
    last = [_REJECTED] if _REJECTED in used else []
    return table.loc[rows, [*first, *others, *last]]


def _draw_matrix(figure: plt.Figure, ax: Axes, table: pd.DataFrame, *, cmap: str, share: bool) -> None:
    values = table.to_numpy(dtype=float)
    top = 1.0 if share else max(1.0, values.max(initial=0))
    image = ax.imshow(values, cmap=cmap, vmin=0, vmax=top, aspect="auto")
    ax.set_xticks(range(table.shape[1]), table.columns.astype(str), rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(table)), table.index.astype(str))
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    if max(table.shape) <= _MOST_NUMBERS:
        for row, column in np.argwhere(values > (0.005 if share else 0)):
            value = values[row, column]
            text = f"{value:.2f}".lstrip("0") if share else f"{value:.0f}"
            color = "white" if value > 0.55 * top else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)
    figure.colorbar(image, ax=ax, shrink=0.6, label="share of known label" if share else "cells")


def _draw_confidence(ax: Axes, values: np.ndarray, right: np.ndarray) -> None:
    edges = np.linspace(0, 1, 21)
    for chosen, label, color in ((right, "right", "C0"), (~right, "wrong", "C3")):
        some = values[chosen & np.isfinite(values)]
        ax.hist(some, edges, histtype="stepfilled", alpha=0.55, color=color, label=f"{label} ({len(some):,})")
    ax.set(xlabel="confidence", ylabel="cells", xlim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
