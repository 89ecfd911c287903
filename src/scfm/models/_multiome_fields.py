"""What scvi-tools' AnnDataManager keeps about MuData: its modalities, the names of its genes, and batches if there are."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.table
from scvi import REGISTRY_KEYS, settings
from scvi.data.fields import BaseAnnDataField

from .. import _logging
from ._batch_field import BatchField, batch_names
from ._fields import GENES_KEY, CountsField, GeneField, MatchedNames
from ._multiome_data import RNA, check_linked, rows_of

if TYPE_CHECKING:
    from mudata import MuData

    from ._multiome_data import Modalities


class ModalitiesField(BaseAnnDataField):
    """Counts of several modalities, and the names of the genes.

    Values are looked at in a sample of the cells when data are set up, and in all cells when they are used. Data to
    which a setup is transferred may lack modalities.

    Parameters
    ----------
    modalities
        Which modality is what.
    gene_symbols, gene_ids
        Columns of the RNA modality's ``var`` with gene symbols and Ensembl ids; by default they are looked for.
    """

    N_FEATURES = "n_features"
    SOURCES = "sources"

    def __init__(self, modalities: Modalities, gene_symbols: str | None = None, gene_ids: str | None = None) -> None:
        super().__init__()
        self._modalities = modalities
        self._genes = GeneField(gene_symbols, gene_ids)

    @property
    def registry_key(self) -> str:
        """Key of the field."""
        return GENES_KEY

    @property
    def attr_name(self) -> str:
        """Attribute of MuData."""
        return "mod"

    @property
    def attr_key(self) -> None:
        """All modalities are used."""
        return

    @property
    def is_empty(self) -> bool:
        """There always are modalities."""
        return False

    def validate_field(self, mdata: MuData) -> None:
        """Raise an error for modalities, layers or columns that do not exist, and for values that are no counts."""
        for kind, name in self._modalities.names.items():
            if name not in mdata.mod:
                msg = f"there is no modality {name!r}; there are {', '.join(map(repr, mdata.mod)) or 'none'}"
                raise KeyError(msg)
            rows_of(mdata, name)
            check_counts(mdata, self._modalities, kind)
        self._genes.validate_field(mdata.mod[self._modalities.names[RNA]])

    def register_field(self, mdata: MuData) -> dict[str, Any]:
        """Names of the genes, and what the modalities are.

        Raises
        ------
        ValueError
            If no cells link two modalities.
        """
        super().register_field(mdata)
        check_linked(mdata, self._modalities)
        return {**self._genes.register_field(mdata.mod[self._modalities.names[RNA]]), **self._sizes(mdata)}

    def transfer_field(self, state_registry: dict[str, Any], mdata: MuData, **kwargs: Any) -> dict[str, Any]:
        """Names of other data, with what names were matched before.

        Raises
        ------
        ValueError
            If the data have none of the modalities.
        """
        present = require_some(mdata, self._modalities)
        for kind in present:
            check_counts(mdata, self._modalities, kind)
        if RNA in present:
            genes = self._genes.transfer_field(state_registry, present[RNA])
        else:
            empty = {GeneField.NAMES: np.zeros(0, dtype=object), GeneField.ENSEMBL_IDS: None}
            genes = {**state_registry, **empty, GeneField.MATCHED: MatchedNames(state_registry[GeneField.MATCHED])}
        return {**genes, **self._sizes(mdata)}

    def _sizes(self, mdata: MuData) -> dict[str, Any]:
        present = self._modalities.of(mdata)
        return {
            self.N_FEATURES: {kind: int(part.n_vars) for kind, part in present.items()},
            self.SOURCES: dict(self._modalities.names),
        }

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Numbers of features."""
        return {f"n_{kind}_features": n for kind, n in state_registry[self.N_FEATURES].items()}

    def view_state_registry(self, state_registry: dict[str, Any]) -> rich.table.Table:
        """The modalities in a table."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for column in ("Modality", "Source Location", "Features"):
            table.add_column(column, justify="center", overflow="fold")
        for kind, n in state_registry[self.N_FEATURES].items():
            table.add_row(kind, f"mdata.mod[{state_registry[self.SOURCES][kind]!r}]", str(n))
        return table


class SampleField(BatchField):
    """Column of ``obs`` with the batch of each cell; one batch will do."""

    def register_field(self, adata: MuData) -> dict[str, Any]:
        """The batches."""
        self.validate_field(adata)
        return {self.COLUMN: self._column, self.CATEGORIES: np.unique(batch_names(adata.obs, self._column))}

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: MuData, extend_categories: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The batches that there were; those of other data behind them, if ``extend_categories``.

        Raises
        ------
        ValueError
            If there are new batches and they may not be added.
        """
        new = np.setdiff1d(batch_names(adata_target.obs, self._column), state_registry[self.CATEGORIES])
        if len(new) and not extend_categories:
            msg = (
                f"{', '.join(map(str, new[:10]))} in obs[{self._column!r}] are batches that the model does not know. Its "
                "embeddings do not depend on the batch: load it with adata=False and give the data to "
                "get_latent_representation, or go on training with MultiomeIntegrator.load_query_data"
            )
            raise ValueError(msg)
        return super().transfer_field(state_registry, adata_target, extend_categories=extend_categories)


def check_counts(mdata: MuData, modalities: Modalities, kind: str) -> None:
    """Look at the values of a modality in a sample of the cells.

    Raises
    ------
    KeyError
        If the layer does not exist.
    ValueError
        If there are negative, missing or infinite values, or no features.
    """
    modalities.open(mdata, kind).close()
    name = modalities.names[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CountsField(REGISTRY_KEYS.X_KEY, modalities.layers[kind]).validate_field(mdata.mod[name])
        except ValueError as error:
            msg = f"modality {name!r}: {error}"
            raise ValueError(msg) from None
    for warning in caught:
        msg = f"modality {name!r}: {warning.message}"
        warnings.warn(msg, warning.category, stacklevel=settings.warnings_stacklevel)


def require_some(mdata: MuData, modalities: Modalities) -> dict[str, Any]:
    """Those modalities of the setup that the data have, by kind.

    Raises
    ------
    ValueError
        If there are none.
    """
    present = modalities.of(mdata)
    if not present:
        msg = (
            f"the data have none of the modalities that the model was set up with ({', '.join(modalities.names.values())}); "
            f"there are {', '.join(map(repr, mdata.mod)) or 'none'}"
        )
        raise ValueError(msg)
    if missing := [name for kind, name in modalities.names.items() if kind not in present]:
        _logging.warning(
            f"the data have no modality {', '.join(map(repr, missing))}; all cells count as not measured there"
        )
    return present
