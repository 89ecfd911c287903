"""Scores of a benchmark with their spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

_COLORS = {"model": "C0", "baseline": "C1", "ceiling": "C2", "random weights": "0.55", "control": "0.75"}
_MOST_PANELS = 3
_COLUMNS = ("task", "kind", "name", "method", "metric", "value")
_ROW = 0.27


def benchmark(
    table: pd.DataFrame,
    metrics: Sequence[str] | str | None = None,
    *,
    task: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Sequence[Axes] | None:
    """Draw the scores of models beside those of baselines and controls, the best on top.

    Parameters
    ----------
    table
        Result of :func:`scfm.benchmark.cells`.
    metrics
        Scores to draw, one panel each; by default the first three of the table. The first one orders the rows.
    task
        Which task, if the table has several.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, one for each score, unless the figure is shown. A small dot is one run (a group that was held out, with
    one seed), the large dot the mean over runs, the bar their standard deviation.

    Raises
    ------
    KeyError
        If a score is not in the table.
    ValueError
        If the table has several tasks, no rows, or is none with one score in each row.
    """
    if missing := [column for column in _COLUMNS if column not in table]:
        msg = (
            f"the table has no column {', '.join(missing)}: this draws tables with one score in each row, such as those of "
            "scfm.benchmark.cells. Draw one with a column for each score, such as that of scfm.benchmark.enhancement, with "
            "seaborn or table.groupby([...]).mean().plot()"
        )
        raise ValueError(msg)
    tasks = list(dict.fromkeys(table["task"])) if task is None else [task]
    if len(tasks) != 1:
        msg = f"the table has {len(tasks)} tasks ({', '.join(tasks)}); choose one with task="
        raise ValueError(msg)
    table = table[table["task"] == tasks[0]]
    metrics = [metrics] if isinstance(metrics, str) else metrics
    there = list(dict.fromkeys(table["metric"]))
    metrics = there[:_MOST_PANELS] if metrics is None else list(metrics)
    if missing := [metric for metric in metrics if metric not in there]:
        msg = f"the table has no score {', '.join(missing)}; there are {', '.join(there) or 'none'}"
        raise KeyError(msg)
    rows = table.assign(
        row=[_label(*parts) for parts in zip(table["name"], table["method"], table["kind"], strict=True)]
    )
    first = rows[rows["metric"] == metrics[0]].groupby("row")["value"].mean().sort_values()
    kinds = rows.groupby("row")["kind"].first()
    figure, grid = plt.subplots(
        1,
        len(metrics),
        figsize=(2.6 + 2.5 * len(metrics), 1.1 + _ROW * len(first)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    axes = list(grid[0])
    rng = np.random.default_rng(0)
    for ax, metric in zip(axes, metrics, strict=True):
        for place, row in enumerate(first.index):
            values = rows.loc[(rows["metric"] == metric) & (rows["row"] == row), "value"].dropna().to_numpy(dtype=float)
            if not len(values):
                continue
            color = _COLORS.get(kinds[row], "C2")
            jitter = place + rng.uniform(-0.18, 0.18, len(values))
            ax.scatter(values, jitter, s=7, color=color, alpha=0.45, linewidths=0, zorder=2)
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            ax.errorbar(values.mean(), place, xerr=spread, fmt="o", markersize=6, color=color, linewidth=1.6, zorder=3)
        ax.set(title=metric, xlabel="score")
        ax.title.set_fontsize("medium")
        ax.grid(axis="x", color="0.92", zorder=0)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(first)), first.index)
    axes[0].set_ylim(-0.6, len(first) - 0.4)
    used = [kind for kind in _COLORS if kind in set(kinds)]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=_COLORS[kind], label=kind) for kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")
    return finish(figure, axes, show=show, save=save)


def _label(name: str, method: str, kind: str) -> str:
    text = f"{name}, {method}" if method else name
    return f"{text} (random weights)" if kind == "random weights" else text
