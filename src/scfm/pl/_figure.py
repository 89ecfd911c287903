"""Show, save and return figures as Scanpy does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def finish(
    figure: Figure, axes: Axes | Sequence[Axes], *, show: bool | None, save: str | Path | None
) -> Axes | Sequence[Axes] | None:
    """Save if asked, then show (and return nothing) or return the axes.

    ``show=None`` follows ``scanpy.settings.autoshow``, but does not show a figure that was saved.
    """
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show is None:
        import scanpy as sc

        show = sc.settings.autoshow and save is None
    if show:
        plt.show()
        return None
    return axes
