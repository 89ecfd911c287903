"""How specific a score of cells is for groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import xlogy

if TYPE_CHECKING:
    from collections.abc import Sequence


def regulon_specificity(
    scores: np.ndarray | pd.DataFrame, groups: Sequence[str] | np.ndarray | pd.Series, *, base: float | None = None
) -> pd.DataFrame:
    """Regulon specificity scores: 1 minus the Jensen-Shannon distance of activity and membership over the cells.

    The activity of a regulon, and the membership in a group, become distributions over cells. The square root of their
    Jensen-Shannon divergence is a distance; a regulon that is active evenly in all cells of a group and nowhere else has
    the score 1.

    Parameters
    ----------
    scores
        Activity of each regulon, not negative, ``(cells, regulons)``.
    groups
        Group of each cell; cells without one count as cells of no group.
    base
        Base of the logarithm: e by default, as in pySCENIC, where the lowest score is 0.17; 2 gives scores from 0 to 1.

    Returns
    -------
    Table of groups by regulons; NaN for a regulon that is active in no cell.

    Raises
    ------
    ValueError
        If numbers of cells differ, no cell has a group, or activities are negative or not finite.

    References
    ----------
    Suo et al., Cell Reports 25 (2018); Van de Sande et al., Nature Protocols 15 (2020).
    """
    names = scores.columns if isinstance(scores, pd.DataFrame) else pd.RangeIndex(np.shape(scores)[1])
    values = np.asarray(scores, dtype=np.float64)
    labels = pd.Categorical(pd.Series(np.asarray(groups, dtype=object)).map(str, na_action="ignore"))
    if len(values) != len(labels):
        msg = f"there are scores of {len(values)} cells, but groups of {len(labels)}"
        raise ValueError(msg)
    if not len(labels.categories):
        msg = "no cell has a group"
        raise ValueError(msg)
    if not np.isfinite(values).all() or (values < 0).any():
        msg = "activities must be finite and not negative"
        raise ValueError(msg)
    total = values.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(total > 0, values / total, np.nan)
    own = xlogy(share, share).sum(0)
    out = np.empty((len(labels.categories), values.shape[1]))
    for group in range(len(out)):
        inside = share[labels.codes == group]
        member = 1 / len(inside)
        middle = (inside + member) / 2
        # outside of the group the mixture is half of the activity
        outside = (1 - inside.sum(0)) * np.log(2)
        mixed = xlogy(middle, middle).sum(0) + (own - xlogy(inside, inside).sum(0) - outside) / 2
        out[group] = (own + np.log(member)) / 2 - mixed
    divergence = np.clip(out, 0, None) / (1 if base is None else np.log(base))
    return pd.DataFrame(1 - np.sqrt(divergence), index=pd.Index(labels.categories.astype(str)), columns=names)
