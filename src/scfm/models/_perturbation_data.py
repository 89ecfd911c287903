"""What a model for perturbations reads from data that ``scfm.pp.perturbation_setup`` has prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys, _logging
from .._counts import CountStats
from ..data import open_source
from ..genes import resolve_gene_names
from ..tasks.perturbation_data import (
    CONTROL,
    SEPARATOR,
    SEPARATORS,
    PerturbationSplit,
    canonical,
    genes_of,
    parse_perturbation,
    split_perturbations,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_READ_ROWS = 4096
_TARGET_SUM = 1e4
_SHOWN = 10
_PARTS = ("train", "validation", "test", "held_out_cell_types")


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


def default_split(adata: AnnData, seed: int) -> PerturbationSplit:
    """The split of GEARS, drawn from the labels of the file: the order of genes inside a label decides what is drawn.

    Parameters
    ----------
    adata
        Data that :func:`scfm.pp.perturbation_setup` has prepared.
    seed
        Seed of the split.
    """
    record = adata.uns[_keys.PERTURBATION]
    controls, marks = stored_controls(adata), record["params"].get("separators")
    marks = SEPARATORS if marks is None else tuple(map(str, marks))
    there = sorted(set(labels_of(adata)) - {CONTROL})
    known = frozenset(genes_in(there))
    labels = dict(zip(record["labels"]["perturbation"].astype(str), record["labels"]["label"].astype(str), strict=True))
    spelled = []
    for name in there:
        genes = parse_perturbation(labels.get(name, name), controls, marks, known=known)
        spelled.append(SEPARATOR.join(genes) if canonical(genes) == name else name)
    return split_perturbations(spelled, seed=seed, control=controls, known=known)


def settled_split(split: Any, adata: AnnData, seed: int) -> PerturbationSplit:
    """A split in one form, or the default one; what the data lack of it is said.

    Parameters
    ----------
    split
        A split, a mapping with ``"train"``, ``"validation"`` and ``"test"``, or ``None``.
    adata
        Data that :func:`scfm.pp.perturbation_setup` has prepared.
    seed
        Seed of the default split.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If there is nothing to train on, or a perturbation is in two parts.
    """
    there = set(labels_of(adata)) - {CONTROL}
    if split is None:
        split = default_split(adata, seed)
        if not split.train:
            msg = (
                f"the default split left nothing to train on, because the data have few perturbations "
                f"({', '.join(sorted(there)[:_SHOWN])}); name those to train on with split=, such as split={{'train': {sorted(there)[:1]}}}"
            )
            raise ValueError(msg)
    elif isinstance(split, Mapping):
        if unknown := set(split) - set(_PARTS):
            msg = f"split= has the parts {', '.join(_PARTS)}; got {', '.join(map(repr, sorted(unknown)))}"
            raise TypeError(msg)
        known = {*genes_in(there), *gene_symbols_of(adata)}
        split = PerturbationSplit.from_lists(**split, control=stored_controls(adata), known=known)
    elif not isinstance(split, PerturbationSplit):
        msg = f"split= needs what scfm.tasks.perturbation_data.split_perturbations gives, not {type(split).__name__}"
        raise TypeError(msg)
    if not set(split.train) & there:
        msg = f"no perturbation of split.train is in the data, which have {', '.join(sorted(there)[:_SHOWN]) or 'controls only'}"
        raise ValueError(msg)
    if absent := sorted({*split.train, *split.validation} - there):
        _logging.warning(f"the data have no cells for {', '.join(absent[:_SHOWN])} of the split")
    if left := sorted(there - {*split.train, *split.validation, *split.test}):
        _logging.info(f"    in no part of the split, and left alone: {', '.join(left[:_SHOWN])}")
    return split


def parts_of_cells(adata: AnnData, split: PerturbationSplit) -> np.ndarray:
    """Part of the split of each cell, see :meth:`PerturbationSplit.of_cells`."""
    key = adata.uns[_keys.PERTURBATION]["params"].get("cell_type_key")
    types = None if not key else adata.obs[key].astype(str).to_numpy()
    return split.of_cells(labels_of(adata), types)


def labels_of(adata: AnnData) -> np.ndarray:
    """Canonical name of the perturbation of each cell."""
    return adata.obs[_keys.PERTURBATION_OF_CELL].astype(str).to_numpy(dtype=object)


def symbol_column(adata: AnnData) -> str | None:
    """Column of ``var`` with the symbols that the setup used; ``None`` where that was the index, or is not there."""
    column = adata.uns.get(_keys.PERTURBATION, {}).get("params", {}).get("gene_symbols")
    return str(column) if column in adata.var else None


def gene_symbols_of(adata: AnnData) -> np.ndarray:
    """Names by which genes are perturbed: the symbols that the setup used, which need not be ``var_names``.

    Parameters
    ----------
    adata
        The data, or control cells from elsewhere.
    """
    return resolve_gene_names(adata.var, symbol_column(adata)).symbols


def stored_controls(adata: AnnData) -> list[str] | None:
    """Names of control that the setup was given; ``None`` for the usual ones."""
    controls = adata.uns[_keys.PERTURBATION]["params"].get("controls")
    return None if controls is None else [str(name) for name in np.atleast_1d(controls)]


def genes_in(names: Iterable[str]) -> list[str]:
    """Genes that occur in perturbations, sorted."""
    return sorted({gene for name in names for gene in genes_of(name)})


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
    """Positions of the most changed genes of each perturbation, as the setup found them.

    Parameters
    ----------
    adata
        The data; the setup names genes as ``var_names`` do.
    genes
        Symbols of the genes, in the order of the data, for data whose index has changed to these since.
    """
    table = adata.uns[_keys.PERTURBATION].get("de_genes")
    if not isinstance(table, pd.DataFrame) or table.empty:
        return {}
    names, symbols = adata.var_names.astype(str), pd.Index(np.asarray(genes).astype(str))
    known = names.isin(table["gene"].astype(str)).any() and names.is_unique
    place = (names if known else symbols).get_indexer(table["gene"].astype(str))
    kept = place >= 0
    return (
        pd.Series(place[kept]).groupby(table["perturbation"].astype(str).to_numpy()[kept]).apply(np.asarray).to_dict()
    )
