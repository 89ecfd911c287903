"""What a model for perturbations reads from data that ``scfm.pp.perturbation_setup`` has prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys
from .._counts import CountStats
from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_READ_ROWS = 4096
_TARGET_SUM = 1e4
CONTROL = "ctrl"
SEPARATOR = "+"


@dataclass(frozen=True)
class ExpressionRule:
    """How log-normalised expression comes out of the data.

    Parameters
    ----------
    layer
        Layer to read; ``""`` for ``X``.
    total_key
        Column of ``obs`` with the counts of each cell before genes were chosen; ``""`` where it is the sum over the genes.
    target_sum
        Counts that each cell is scaled to.
    """

    layer: str = ""
    total_key: str = ""
    target_sum: float = _TARGET_SUM

    @classmethod
    def of(cls, adata: AnnData) -> ExpressionRule:
        """What the setup recorded."""
        params = adata.uns[_keys.PERTURBATION]["params"]
        return cls(
            str(params.get("layer") or ""),
            str(params.get("total_key") or ""),
            float(params.get("target_sum") or _TARGET_SUM),
        )

    def read(self, adata: AnnData) -> tuple[csr_matrix, np.ndarray | None]:
        """Log-normalised expression, float32, and the counts of each cell where they are known.

        Whole numbers are counts and are normalised; other values count as log-normalised already.

        Raises
        ------
        KeyError
            If the layer or the column does not exist.
        ValueError
            If values are negative, missing or infinite.
        """
        layer = self.layer or None
        if layer is not None and layer not in adata.layers:
            msg = f"there is no layer {layer!r}, from which the model was set up; there are {', '.join(adata.layers) or 'none'}"
            raise KeyError(msg)
        stats, blocks = CountStats(), []
        with open_source(adata, layer=layer) as source:
            for block in source.blocks(_READ_ROWS):
                stats.update(block.counts)
                blocks.append(block.counts)
            where = source.where
        if stats.n_negative or stats.n_nan or stats.n_infinite:
            msg = f"{where} {stats.problem()}; perturbations need counts or log-normalised values"
            raise ValueError(msg)
        values = sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, adata.n_vars))
        counted = not stats.n_noninteger
        totals = np.asarray(values.sum(1), dtype=np.float64).ravel() if counted else None
        if self.total_key:
            if self.total_key not in adata.obs:
                msg = f"obs has no column {self.total_key!r} with the counts of each cell, with which the model was set up"
                raise KeyError(msg)
            totals = adata.obs[self.total_key].to_numpy(dtype=np.float64)
            if not (np.isfinite(totals).all() and (totals >= 0).all()):
                msg = f"obs[{self.total_key!r}] holds values that are no numbers of counts"
                raise ValueError(msg)
        if counted:
            scale = np.divide(self.target_sum, totals, out=np.zeros(len(totals)), where=totals > 0)
            values = (sparse.diags(scale) @ values.astype(np.float64)).tocsr()
            values.data = np.log1p(values.data)
        return values.astype(np.float32).tocsr(), totals


@dataclass(frozen=True)
class SplitNames:
    """Names of the perturbations to train on, to choose the best epoch by, and to leave alone."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @classmethod
    def of(cls, split: Any) -> SplitNames:
        """From an object or mapping with ``train``, ``validation`` and ``test``.

        Raises
        ------
        TypeError
            If it is something else.
        ValueError
            If a perturbation is in two parts.
        """
        get = split.get if isinstance(split, Mapping) else lambda name, default=None: getattr(split, name, default)
        train = get("train")
        if train is None:
            msg = "split= needs train, validation and test, as scfm.tasks.perturbation_data.split_perturbations gives them"
            raise TypeError(msg)
        parts = [tuple(canonical(name) for name in get(part) or ()) for part in ("train", "validation", "test")]
        parts = [tuple(dict.fromkeys(name for name in part if name != CONTROL)) for part in parts]
        together = [name for part in parts for name in part]
        if len(set(together)) < len(together):
            twice = pd.Index(together)[pd.Index(together).duplicated()]
            msg = f"these perturbations are in two parts of the split: {', '.join(twice[:10])}"
            raise ValueError(msg)
        return cls(*parts)

    @property
    def known(self) -> set[str]:
        """All of them."""
        return {*self.train, *self.validation, *self.test}

    def to_dict(self) -> dict[str, list[str]]:
        """As JSON values."""
        return {"train": list(self.train), "validation": list(self.validation), "test": list(self.test)}


def canonical(name: str) -> str:
    """Genes of a perturbation in the order of their names, joined by ``+``; ``"ctrl"`` for none."""
    genes = sorted({gene for gene in map(str.strip, str(name).split(SEPARATOR)) if gene not in ("", CONTROL)})
    return SEPARATOR.join(genes) or CONTROL


def genes_in(names: Sequence[str]) -> list[str]:
    """Genes that occur in perturbations, sorted."""
    return sorted({gene for name in names for gene in name.split(SEPARATOR) if gene != CONTROL})


def require_setup(adata: AnnData) -> None:
    """Raise ``ValueError`` unless :func:`scfm.pp.perturbation_setup` has prepared the data."""
    there = _keys.PERTURBATION_OF_CELL in adata.obs and _keys.CONTROL_OF_CELL in adata.obs
    if not there or "params" not in adata.uns.get(_keys.PERTURBATION, {}):
        msg = (
            "the data are not prepared: run scfm.pp.perturbation_setup(adata, perturbation_key=..., control=...), which says "
            "which cells are controls, and pairs the others with them"
        )
        raise ValueError(msg)


def de_positions(adata: AnnData, genes: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of the most changed genes of each perturbation, as the setup found them."""
    table = adata.uns[_keys.PERTURBATION].get("de_genes")
    if not isinstance(table, pd.DataFrame) or table.empty:
        return {}
    place = pd.Index(genes).get_indexer(table["gene"].astype(str))
    kept = place >= 0
    return (
        pd.Series(place[kept]).groupby(table["perturbation"].astype(str).to_numpy()[kept]).apply(np.asarray).to_dict()
    )
