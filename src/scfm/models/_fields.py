"""What scvi-tools' AnnDataManager keeps about data for a foundation model: counts, and genes by name."""

from __future__ import annotations

import warnings
from collections import UserDict
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.table
from scvi import settings
from scvi.data.fields import BaseAnnDataField, LayerField

from .._counts import CountStats
from ..data import open_source
from ..genes import resolve_gene_names

if TYPE_CHECKING:
    from anndata import AnnData

GENES_KEY = "genes"
_SAMPLES = 16
_SAMPLE_ROWS = 128


class CountsField(LayerField):
    """Counts in ``X`` or a layer; other data may have other genes, because genes are matched by name.

    Values are looked at in a sample of the cells when data are set up, and in all cells when they are used.

    Parameters
    ----------
    registry_key
        Key of the field.
    layer
        Layer with the counts; ``None`` for ``X``.
    """

    def __init__(self, registry_key: str, layer: str | None) -> None:
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)

    def validate_field(self, adata: AnnData) -> None:
        """Raise ``ValueError`` for negative, missing or infinite values, and warn about fractions."""
        stats = CountStats()
        with open_source(adata, layer=self.attr_key) as source:
            starts = np.unique(np.linspace(0, max(0, source.n_obs - _SAMPLE_ROWS), _SAMPLES).astype(int))
            for start in starts:
                stats.update(source.read(int(start), int(start) + _SAMPLE_ROWS))
            where = source.where
        if stats.n_negative or stats.n_nan or stats.n_infinite:
            msg = f"{where} does not hold counts: it {stats.problem()}. {stats.remedy()}"
            raise ValueError(msg)
        if stats.n_noninteger:
            msg = f"{where} does not hold counts: it {stats.problem()}. {stats.remedy()}"
            warnings.warn(msg, UserWarning, stacklevel=settings.warnings_stacklevel)

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register the counts of other data, whatever genes these have."""
        return self.register_field(adata_target)


class MatchedNames(UserDict):
    """What each name of a gene was taken for. It is no ``dict``, because scvi-tools allows no dots in the keys of those."""


class GeneField(BaseAnnDataField):
    """Names of the genes, and which genes of the model they were taken for.

    The second part is written by the model. It goes along when a setup is transferred, so that a name means the same
    gene in all data, in whatever order they hold it and whatever tables of gene names are at hand.

    Parameters
    ----------
    gene_symbols, gene_ids
        Columns of ``var`` with gene symbols and Ensembl ids; by default they are looked for.
    """

    NAMES = "names"
    ENSEMBL_IDS = "ensembl_ids"
    SYMBOLS_FROM = "symbols_from"
    IDS_FROM = "ids_from"
    MATCHED = "matched"

    def __init__(self, gene_symbols: str | None = None, gene_ids: str | None = None) -> None:
        super().__init__()
        self._columns = (gene_symbols, gene_ids)

    @property
    def registry_key(self) -> str:
        """Key of the field."""
        return GENES_KEY

    @property
    def attr_name(self) -> str:
        """Attribute of AnnData."""
        return "var"

    @property
    def attr_key(self) -> None:
        """The whole table is used."""
        return

    @property
    def is_empty(self) -> bool:
        """Data always have genes."""
        return False

    def validate_field(self, adata: AnnData) -> None:
        """Raise ``KeyError`` if a column that was asked for does not exist."""
        super().validate_field(adata)
        resolve_gene_names(adata.var, *self._columns)

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Names of the genes."""
        super().register_field(adata)
        names = resolve_gene_names(adata.var, *self._columns)
        return {
            self.NAMES: names.symbols,
            self.ENSEMBL_IDS: names.ensembl_ids,
            self.SYMBOLS_FROM: names.symbols_from,
            self.IDS_FROM: names.ids_from,
            self.MATCHED: MatchedNames(),
        }

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Names of other data, with what names were matched before."""
        return {**self.register_field(adata_target), self.MATCHED: MatchedNames(state_registry[self.MATCHED])}

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Nothing beyond what the counts tell."""
        return {}

    def view_state_registry(self, state_registry: dict[str, Any]) -> rich.table.Table:
        """Where names come from, and how many were matched."""
        known = sum(bool(gene) for gene in state_registry[self.MATCHED].values())
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Symbols from", "Ensembl ids from", "Genes", "Known to the model"):
            table.add_column(column, justify="center", no_wrap=True, overflow="fold")
        table.add_row(
            str(state_registry[self.SYMBOLS_FROM]),
            str(state_registry[self.IDS_FROM] or "-"),
            str(len(state_registry[self.NAMES])),
            str(known),
        )
        return table
