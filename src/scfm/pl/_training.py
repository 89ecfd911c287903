"""Loss curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from ._figure import finish

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes


def training_curve(
    history: pd.DataFrame,
    *,
    log: bool = True,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the loss of a training run.

    Parameters
    ----------
    history
        Table indexed by step, one column per curve, such as ``TrainingResult.history``.
    log
        Logarithmic loss axis.
    ax
        Axes to draw on.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for name, values in history.items():
        values = values.dropna()
        ax.plot(values.index, values, label=str(name).replace("_", " "), linewidth=1.5)
    ax.set(xlabel=history.index.name or "step", ylabel="loss")
    if log:
        ax.set_yscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return finish(ax.figure, ax, show=show, save=save)
