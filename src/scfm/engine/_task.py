"""What a run is made of, and the check of every block before it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _logging
from .._counts import CountStats

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..data import Block, CellSource
    from ..genes import GeneMatch


@dataclass(frozen=True)
class Task:
    """A model, the cells, and what else a run of one over the other needs.

    Parameters
    ----------
    backbone
        The model.
    source
        The cells.
    match
        Which gene of the model each column of the source is.
    options
        Options of the tokenizer.
    """

    backbone: Backbone
    source: CellSource
    match: GeneMatch
    options: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """First arguments of :func:`scfm.engine.run` and :func:`scfm.engine.visit`."""
        names = ("backbone", "source", "match", "options", "check")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def check(self) -> InputCheck:
        """Looks at every block; one for all passes over the cells, so that nothing is said twice."""
        return InputCheck(self.backbone, self.source, self.match, self.options)


@dataclass
class InputCheck:
    """Looks at every block before it is used: are the values right, are the expressed genes known?

    Parameters
    ----------
    backbone, source, match, options
        The run.
    """

    backbone: Backbone
    source: CellSource
    match: GeneMatch
    options: dict[str, Any]
    _stats: CountStats = field(default_factory=CountStats, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def __call__(self, block: Block) -> None:
        """Raise ``ValueError`` at the first block with wrong values, naming the matrix and the remedy."""
        stats = self._stats.update(block.counts)
        expected = self.backbone.expected_values(self.options)
        where, name = self.source.where, self.backbone.name
        refused = stats.n_negative or stats.n_nan or stats.n_infinite
        if refused or (stats.n_noninteger and expected == "counts"):
            msg = f"{where} does not hold what {name} needs: it {stats.problem()}. {stats.remedy()}"
            if not refused and self.backbone.normalized_option:
                msg += f" If these are the values that {name} itself would make of counts, say so: {self.backbone.normalized_option}."
            raise ValueError(msg)
        if stats.n_noninteger and expected == "any" and self._once("fractions"):
            _logging.info(
                f"    {where} {stats.problem()}; {name} takes them, but gives counts other embeddings: do not mix"
            )
        if block.counts.nnz and self._once("first cells"):
            self._warn_if_few_known(block)
            if expected == "normalized" and not stats.n_noninteger:
                _logging.warning(
                    f"{where} holds whole numbers, although the options of {name} say that it is normalised"
                )

    def _once(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def _warn_if_few_known(self, block: Block) -> None:
        expressed = np.zeros(self.source.n_vars, dtype=bool)
        expressed[block.counts.indices] = True
        share = float((self.match.ids[expressed] >= 0).mean())
        if share < 0.5:
            hint = self.match.hint or "Are these symbols of human genes? See gene_symbols=, gene_ids= and aliases=."
            _logging.warning(f"only {share:.1%} of the expressed genes are known to {self.backbone.name}. {hint}")
