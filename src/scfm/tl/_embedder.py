"""Embeddings of several objects by one model with the same options; those that exist are not computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys, _logging, engine
from ._embed import _embed_one
from ._inputs import prepared, result_name, storable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from ..backbones import Backbone


class Embedded(NamedTuple):
    """Embedding of all cells of an object, its record, and whether it was computed just now."""

    array: NDArray
    record: dict[str, Any]
    fresh: bool


@dataclass(frozen=True)
class Embedder:
    """A model and how it is to embed.

    Parameters
    ----------
    backbone
        The model.
    pooling
        How token states become one vector; by default as the authors do it.
    layer
        Layer with the counts.
    seed
        Seed of the tokenizer.
    duplicates, tokenize_options
        What else the tokenizer is told.
    names
        Where names of genes are: ``gene_symbols``, ``gene_ids`` and ``aliases``.
    sizes
        Sizes of batches and blocks.
    progress
        Whether to show a progress bar.
    """

    backbone: Backbone
    pooling: str | None
    layer: str | None
    seed: int
    duplicates: str | None
    tokenize_options: Mapping[str, Any]
    names: Mapping[str, Any]
    sizes: Mapping[str, Any]
    progress: bool | None

    def __post_init__(self) -> None:
        self.backbone.require("embeds")
        object.__setattr__(self, "pooling", self.backbone.check_pooling(self.pooling))

    @property
    def slots(self) -> tuple[str, str]:
        """Slots of ``obsm`` and ``uns`` in which :func:`scfm.tl.embed` puts the results of this model."""
        name = result_name(self.backbone)
        return _keys.embedding(name), _keys.record(name)

    def __call__(self, adata: AnnData, what: str) -> Embedded:
        """Take the embedding that is in ``adata`` if it is what would be computed, else compute it; ``what`` is for the log."""
        slot, record_slot = self.slots
        if slot in adata.obsm:
            record = adata.uns.get(record_slot)
            if not (problem := self.difference(record, layer=self.layer)):
                _logging.info(f"    taking obsm[{slot!r}] of {what}")
                return Embedded(embedding_of(adata, slot, what), record, fresh=False)
            _logging.info(f"    obsm[{slot!r}] of {what} is not used: {problem}")
        with prepared(
            adata,
            self.backbone,
            what=f"embedding {what},",
            layer=self.layer,
            use_raw=False,
            duplicates=self.duplicates,
            rng=self.seed,
            draws=None,
            tokenize_options=self.tokenize_options,
            **self.names,
        ) as task:
            array, record = _embed_one(task, self.pooling, progress=self.progress, **self.sizes)
        return Embedded(array, record, fresh=True)

    def check_comparable(self, adata: AnnData, reference: AnnData) -> None:
        """Raise ``ValueError`` if the pooling gives a number for each gene and the objects have other genes."""
        if adata.var_names.equals(reference.var_names):
            return
        if self.backbone.pooling_options(self.pooling, self.backbone.vocab.match(adata.var_names)):
            msg = (
                f"pooling={self.pooling!r} gives a number for each gene of the data, so that both need the same genes in "
                "the same order; choose another pooling, or take the genes that they share"
            )
            raise ValueError(msg)

    def difference(self, record: Any, *, layer: str | None = None) -> str:
        """How an embedding differs from that of this model with these options, by its record; nothing if it does not.

        Parameters
        ----------
        record
            What :func:`scfm.tl.embed` left in ``uns``.
        layer
            Layer it must come from; by default from any.
        """
        try:
            checkpoint, params = _plain(record["checkpoint"]), _plain(record["params"])
        except (KeyError, TypeError):
            return "no record says how it was made"
        origin = self.backbone.provenance
        for name in ("id", "sha256", "weights"):
            if checkpoint.get(name, "") != getattr(origin, name):
                return f"it was made by the checkpoint {checkpoint.get('id')!r}, whose {name} is another"
        if not origin.sha256:
            return "the weights have no checksum by which they could be recognised"
        wanted = {
            "pooling": self.pooling,
            "duplicates": self.duplicates,
            "draws": None,
            "tokenize_options": dict(self.tokenize_options) or None,
        }
        if "rng" in engine.accepted_options(self.backbone):
            wanted["rng"] = self.seed
        if layer is not None:
            wanted["layer"] = layer
        for name, value in wanted.items():
            expected = None if value is None else _plain(storable(value))
            if params.get(name) != expected:
                return f"it was made with {name}={params.get(name)!r} instead of {expected!r}"
        return ""


def embedding_of(adata: AnnData, slot: str, what: str) -> NDArray:
    """An embedding from ``obsm`` as an array.

    Raises
    ------
    KeyError
        If there is no such slot.
    TypeError
        If it does not hold numbers, or is sparse.
    """
    if slot not in adata.obsm:
        msg = f"obsm of {what} has no slot {slot!r}; there are {', '.join(map(str, adata.obsm)) or 'none'}"
        raise KeyError(msg)
    values = adata.obsm[slot]
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy()
    array = None if sparse.issparse(values) else np.asarray(values)
    if array is None or array.ndim != 2 or array.dtype.kind not in "fiu":
        msg = f"obsm[{slot!r}] of {what} must be a dense array of numbers with one row per cell"
        raise TypeError(msg)
    return array


def _plain(value: Any) -> Any:
    """The same as before it was written to a file and read again."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
