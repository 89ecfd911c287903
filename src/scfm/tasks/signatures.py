"""Expression signatures of drugs: replicates, and cell line and dose as numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-zµμ/]*)", re.IGNORECASE)
_SHOWN = 10


def central_replicates(signatures: np.ndarray, groups: Sequence[object] | np.ndarray) -> np.ndarray:
    """The most central signature of each group of replicates, as DeepCE takes it.

    For each gene the replicates of a group are ranked; the one whose mean rank over all genes is closest to the middle is taken.

    Parameters
    ----------
    signatures
        Signatures, ``(samples, genes)``.
    groups
        Group of each sample: what its replicates have in common (drug, cell line and dose).

    Returns
    -------
    Row of the chosen sample of each group, in ascending order. Of equally central ones it is the first.

    Raises
    ------
    ValueError
        If shapes do not fit, or values are missing.

    References
    ----------
    Pham et al., DeepCE, Nature Machine Intelligence 3, 247 (2021).
    """
    signatures = np.asarray(signatures)
    codes, _ = pd.factorize(np.asarray(groups, dtype=object), use_na_sentinel=False)
    if signatures.ndim != 2 or len(signatures) != len(codes):
        msg = f"one group is needed for each of {len(signatures)} signatures (samples, genes), not {len(codes)}"
        raise ValueError(msg)
    if not np.isfinite(signatures).all():
        msg = "signatures hold values that are missing or infinite"
        raise ValueError(msg)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    chosen = []
    for rows in np.split(order, starts[1:]):
        ranks = signatures[rows].argsort(0, kind="stable").argsort(0, kind="stable").mean(1)
        chosen.append(rows[np.argmin((ranks - (len(rows) - 1) / 2) ** 2)])
    return np.sort(np.array(chosen, dtype=np.int64))


@dataclass(frozen=True)
class Categories:
    """Names, such as cell lines or doses, as indicators.

    Parameters
    ----------
    names
        The names.
    what
        What they name, for messages.
    amounts
        Whether they are amounts, such as ``10`` or ``"3.33 um"``, of which others may lie in between.
    """

    names: tuple[str, ...]
    what: str
    amounts: bool = False

    @classmethod
    def of(cls, values: Sequence[object] | np.ndarray, what: str, *, amounts: bool = False) -> Categories:
        """Names that occur: amounts by size, other names in the order of the alphabet.

        Raises
        ------
        ValueError
            If a value is missing.
        """
        names = sorted(set(_texts(values, what)))
        if amounts and len({_parsed(name)[1] for name in names}) == 1:
            names.sort(key=lambda name: _parsed(name)[0])
        return cls(tuple(names), what, amounts)

    def indicators(self, values: Sequence[object] | np.ndarray) -> np.ndarray:
        """One column for each name, float32, ``(values, names)``.

        An amount between two known ones is divided among them by its logarithm.

        Raises
        ------
        ValueError
            If a name is unknown, or an amount lies outside of the known ones.
        """
        texts, inverse = np.unique(np.asarray(_texts(values, self.what), dtype=str), return_inverse=True)
        rows = np.zeros((len(texts), len(self.names)), dtype=np.float32)
        unknown = []
        for row, text in zip(rows, texts.tolist(), strict=True):
            if text in self.names:
                row[self.names.index(text)] = 1
            elif not (self.amounts and self._divide(row, text)):
                unknown.append(text)
        if unknown:
            known = ", ".join(self.names[:_SHOWN]) + (" ..." if len(self.names) > _SHOWN else "")
            msg = f"the model knows no {self.what} {', '.join(unknown[:_SHOWN])}; it has seen {known}"
            raise ValueError(msg)
        return rows[inverse.ravel()]

    def _divide(self, row: np.ndarray, text: str) -> bool:
        """Put an amount between its neighbours; whether it has any."""
        known, (amount, unit) = [_parsed(name) for name in self.names], _parsed(text)
        if not amount or {unit} != {of for _, of in known} or not all(value for value, _ in known):
            return False
        amounts = [value for value, _ in known]
        if amount in amounts:
            row[amounts.index(amount)] = 1
            return True
        above = int(np.searchsorted(amounts, amount))
        if above in (0, len(amounts)):
            return False
        low, high = (math.log(value) for value in amounts[above - 1 : above + 1])
        share = (math.log(amount) - low) / (high - low)
        row[above - 1], row[above] = 1 - share, share
        return True


def _texts(values: Sequence[object] | np.ndarray, what: str) -> list[str]:
    values = pd.Series(np.asarray(values), dtype=object)
    if values.isna().any():
        msg = f"{int(values.isna().sum()):,} samples have no {what}; leave them out"
        raise ValueError(msg)
    # 10 and 10.0 are one dose, whatever type the column has
    return [f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value).strip() for value in values]


def _parsed(text: str) -> tuple[float | None, str]:
    """Number and unit of an amount, with u for micro; no number where it is none."""
    found = _AMOUNT.fullmatch(text)
    # the sign for micro and the Greek letter are the same when case is folded
    return (float(found[1]), found[2].casefold().replace("\N{GREEK SMALL LETTER MU}", "u")) if found else (None, text)
