"""The read depth that is asked of a model: the tokenizers of those that can enhance it take its text as ``target``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# fewer counts than any cell that one would keep: a number below is meant as a logarithm or as a fold
_FEWEST_COUNTS = 10


@dataclass(frozen=True)
class DepthTarget:
    """The wanted read depth as a rule: ``t`` log10 itself, ``f`` fold of the input, ``a`` added to its log10.

    Parameters
    ----------
    rule
        ``"t"``, ``"f"`` or ``"a"``.
    number
        The number behind the letter.
    """

    rule: str
    number: float

    @classmethod
    def parse(cls, text: str) -> DepthTarget:
        """Read a text such as ``"t4"`` (10,000 counts), ``"f5"`` (five times the input) or ``"a1"`` (ten times)."""
        try:
            rule, number = text[0], float(text[1:])
        except (TypeError, IndexError, ValueError):
            rule, number = "", 0.0
        if rule not in ("t", "f", "a") or not np.isfinite(number) or (rule != "a" and number <= 0):
            msg = (
                f"target={text!r} is no read depth; write 't4' for 10^4 counts, 'f5' for five times the counts of the "
                "cell, or 'a1' for 10^1 times the counts of the cell"
            )
            raise ValueError(msg)
        return cls(rule, number)

    @classmethod
    def of(cls, target: str | float | None = None, fold: float | None = None) -> DepthTarget:
        """Read a target that is a text, a number of counts, or a fold; five times the input if neither is given.

        Raises
        ------
        TypeError
            If ``target`` is neither text nor number, or ``fold`` no number.
        ValueError
            If both are given, or no depth is meant by them.
        """
        if target is not None and fold is not None:
            msg = f"target={target!r} and fold={fold!r} both name the wanted depth; give one of them"
            raise ValueError(msg)
        if isinstance(target, str):
            return cls.parse(target)
        for name, value in (("target", target), ("fold", fold)):
            if value is not None and (not isinstance(value, Real) or isinstance(value, (bool, np.bool_))):
                msg = f"{name} must be a number{' or a text' * (name == 'target')}; got {type(value).__name__}"
                raise TypeError(msg)
        if target is not None:
            if not np.isfinite(target) or target < _FEWEST_COUNTS:
                msg = (
                    f"target={target!r} as a number is the wanted count of each cell, which no cell could have; write "
                    "target=10_000 or 't4' for 10^4 counts, fold=5 or 'f5' for five times the counts of the cell"
                )
                raise ValueError(msg)
            return cls("t", math.log10(target))
        if fold is not None and not (np.isfinite(fold) and fold > 0):
            msg = f"fold={fold!r} has to be above 0; 5 asks for five times the counts of the cell"
            raise ValueError(msg)
        return cls("f", 5.0 if fold is None else float(fold))

    def __str__(self) -> str:
        return f"{self.rule}{self.number!r}".removesuffix(".0")

    def apply(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log10 of the wanted depth of cells with these total counts."""
        if self.rule == "t":
            return np.full(len(total), self.number)
        return np.log10(total * self.number) if self.rule == "f" else np.log10(total) + self.number
