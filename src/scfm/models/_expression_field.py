"""Expression on any scale as a field of scvi-tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._counts import CountStats
from ..data import open_source
from ._fields import CountsField

if TYPE_CHECKING:
    from anndata import AnnData

_READ_ROWS = 4096


class ExpressionField(CountsField):
    """Expression on any scale in which zero means that nothing was measured."""

    def validate_field(self, adata: AnnData) -> None:
        """Raise ``ValueError`` for missing or infinite values, in a sample of the cells."""
        stats = CountStats()
        with open_source(adata, layer=self.attr_key) as source:
            stats.update(source.read(0, min(source.n_obs, _READ_ROWS)))
            where = source.where
        if stats.n_nan or stats.n_infinite:
            msg = f"{where} {stats.problem()}; take these cells or genes out first"
            raise ValueError(msg)
