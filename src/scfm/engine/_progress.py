"""The progress bar of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from .._settings import settings

if TYPE_CHECKING:
    from tqdm import tqdm as Tqdm

_PATIENCE = 2.0


def progress_bar(total: int, *, done: int = 0, label: str = "", show: bool | None = None) -> Tqdm:
    """A bar with cells per second and time left that appears only when a run takes longer than two seconds.

    Parameters
    ----------
    total, done
        Number of cells, and how many an earlier run has finished.
    label
        Text before the bar.
    show
        Default: whether ``settings.verbosity`` is at least 2.
    """
    if show is None:
        show = settings.verbosity >= 2
    # long cells come first within a block, so only the mean speed over the whole run predicts the end
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=" cells",
        delay=_PATIENCE,
        smoothing=0,
        disable=not show,
        leave=False,
    )
