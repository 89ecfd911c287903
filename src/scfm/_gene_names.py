"""What gene names look like: Ensembl ids inside names, the columns of ``var`` that hold names, signs of a wrong species."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SYMBOL_COLUMNS = ("feature_name", "gene_name", "gene_symbols", "gene_symbol")
ID_COLUMNS = ("gene_ids", "ensembl_id", "feature_id", "gene_id", "ensembl_gene_id")

# GENCODE marks the copies of pseudo-autosomal genes on chromosome Y; they share the id of the copy on X
_HUMAN_ID = re.compile(r"(?:.*_)?(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?")
_ANY_ENSEMBL_ID = re.compile(r"ENS[A-Z]{0,6}G\d{11}(?:\.\d+)?(?:_PAR_Y)?")
_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z0-9]*[a-z][a-z0-9.-]*")
_SPECIES = {"ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig", "ENSMMUG": "macaque"}


def as_names(values: Iterable[object]) -> np.ndarray:
    """Object array of ``str``; missing values become empty strings, which match nothing."""
    names = pd.Series(values, dtype=object) if not isinstance(values, pd.Series) else values.astype(object)
    return names.where(names.notna(), "").map(str).to_numpy(dtype=object)


def ensembl_ids_in(names: np.ndarray) -> np.ndarray:
    """Human Ensembl gene id inside each name, without version; empty where there is none.

    Understands ``ENSG00000141510``, ``ENSG00000141510.18`` and the ``SYMBOL_ENSG00000141510`` that CELLxGENE uses for
    symbols that several genes share.
    """
    out = np.full(len(names), "", dtype=object)
    for i in [i for i, name in enumerate(names) if "ENSG" in name]:
        if found := _HUMAN_ID.fullmatch(names[i]):
            out[i] = found[1]
    return out


def _share(names: np.ndarray, test: Callable[[str], object]) -> float:
    """Share of the non-empty names that pass a test, looking at no more than about 2,000 of them."""
    filled = [name for name in names[:: max(1, len(names) // 2000)] if name]
    return sum(bool(test(name)) for name in filled) / max(1, len(filled))


def some(names: Iterable[object], n: int = 5) -> str:
    """The first names of many, for messages."""
    names = list(names)
    more = f" and {len(names) - n:,} more" if len(names) > n else ""
    return ", ".join(map(str, names[:n])) + more


class GeneNames(NamedTuple):
    """Names of the genes of a data set, and where in ``var`` they were found."""

    symbols: np.ndarray
    ensembl_ids: np.ndarray | None
    symbols_from: str
    ids_from: str | None


def resolve_gene_names(var: pd.DataFrame, gene_symbols: str | None = None, gene_ids: str | None = None) -> GeneNames:
    """Find gene symbols and Ensembl ids in ``adata.var``.

    Parameters
    ----------
    var
        The table, indexed by ``var_names``.
    gene_symbols
        Column with gene symbols. By default the index; if that holds Ensembl ids or numbers, the first of
        ``feature_name``, ``gene_name``, ``gene_symbols``, ``gene_symbol`` that exists.
    gene_ids
        Column with Ensembl gene ids. By default the first of ``gene_ids``, ``ensembl_id``, ``feature_id``,
        ``gene_id``, ``ensembl_gene_id`` that holds human Ensembl ids, else the index if that does.

    Returns
    -------
    Symbols (a gene without a symbol keeps its index entry), Ensembl ids or ``None``, and the name of the column each
    came from (``"index"`` for ``var_names``).

    Raises
    ------
    KeyError
        If a column that was asked for does not exist.
    """
    for argument, column in (("gene_symbols", gene_symbols), ("gene_ids", gene_ids)):
        if column is not None and column not in var:
            msg = f"{argument}={column!r} is not a column of adata.var; there are {', '.join(map(str, var.columns)) or 'none'}"
            raise KeyError(msg)

    index = as_names(var.index)
    if gene_symbols is None and _share(index, lambda name: _ANY_ENSEMBL_ID.fullmatch(name) or name.isdigit()) > 0.5:
        gene_symbols = next((column for column in SYMBOL_COLUMNS if column in var), None)
    symbols = index
    if gene_symbols is not None:
        symbols = as_names(var[gene_symbols])
        symbols = np.where(symbols == "", index, symbols)

    ids = None
    if gene_ids is not None:
        ids = as_names(var[gene_ids])
    else:
        for column in ID_COLUMNS:
            if column in var and _share(values := as_names(var[column]), _HUMAN_ID.fullmatch) > 0.5:
                gene_ids, ids = column, values
                break
        else:
            if _share(index, _HUMAN_ID.fullmatch) > 0.5:
                gene_ids, ids = "index", index
    return GeneNames(symbols, ids, gene_symbols or "index", gene_ids)


def mismatch_hint(names: np.ndarray) -> str:
    """Say what may be wrong with names of which hardly any is known to a human model; empty if nothing stands out."""
    if _share(names, str.isdigit) > 0.5:
        return (
            "The gene names are numbers. Put gene symbols into adata.var_names or name their column with gene_symbols=."
        )
    if _share(names, _HUMAN_ID.fullmatch) > 0.5:
        return (
            "The gene names are human Ensembl ids that the model's vocabulary does not hold. Name a column with "
            "gene symbols (gene_symbols=) or pass an HGNC table (aliases=)."
        )
    if _share(names, _ANY_ENSEMBL_ID.fullmatch) > 0.5:
        shares = {prefix: _share(names, lambda name, prefix=prefix: name.startswith(prefix)) for prefix in _SPECIES}
        prefix = max(shares, key=shares.get)
        species = _SPECIES[prefix] if shares[prefix] > 0.5 else "another species"
        return f"The gene names are Ensembl ids of {species}, the model knows human genes. {_ORTHOLOGS}"
    if _share(names, _MOUSE_SYMBOL.fullmatch) > 0.5:
        return (
            "The gene names look like mouse symbols (Actb, not ACTB), the model knows human genes. "
            f"Changing the case is not enough: {_ORTHOLOGS[0].lower()}{_ORTHOLOGS[1:]}"
        )
    return ""


_ORTHOLOGS = "Translate the genes to their human orthologs first (for example with Ensembl BioMart), one to one."
