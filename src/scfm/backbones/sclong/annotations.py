"""Gene Ontology annotations from the files in which they are published, as a table of genes and terms."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

AnnotationFormat = Literal["gene2go", "gaf", "table"]

_GAF_COLUMNS = {1: "id", 2: "symbol", 3: "qualifier", 4: "term", 12: "taxon"}
_GENE2GO_COLUMNS = {0: "taxon", 1: "gene", 2: "term", 4: "qualifier"}


def from_mapping(terms_of: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    """Table with the columns ``gene`` and ``term`` from a mapping of genes to their terms."""
    lists = {str(gene): list(terms) for gene, terms in terms_of.items()}
    genes = np.repeat(np.array(list(lists), dtype=object), [len(terms) for terms in lists.values()])
    return _tidy(pd.DataFrame({"gene": genes, "term": [term for terms in lists.values() for term in terms]}))


def read_annotations(
    path: str | Path,
    format: AnnotationFormat | None = None,
    *,
    taxon: int = 9606,
    names: Mapping[Any, str] | None = None,
    gene_column: Literal["symbol", "id"] = "symbol",
) -> pd.DataFrame:
    """Read annotations of all three ontologies; those with the qualifier NOT are left out.

    Parameters
    ----------
    path
        File, also gzipped.
    format
        ``"gene2go"`` (NCBI), ``"gaf"`` (GO annotation file, version 2) or ``"table"`` (gene and term in the first two
        columns, separated by tabs or commas, no header). By default by the name: ``gene2go*``, ``*.gaf*``, or a table.
    taxon
        NCBI number of the species; files that hold several are cut to it.
    names
        Names of genes by what the file calls them; genes that it lacks are left out. Needed for gene2go, whose genes
        are numbers of NCBI.
    gene_column
        What a GAF calls a gene: its symbol, or the accession of the database.

    Returns
    -------
    Table with the columns ``gene`` and ``term``, each pair once.

    Raises
    ------
    ValueError
        If the format is unknown, or gene2go is read without ``names``.
    """
    path = Path(path)
    format = format or _format_of(path)
    if format == "gene2go":
        if names is None:
            msg = "gene2go calls genes by numbers of NCBI; give names={number: name in the model}"
            raise ValueError(msg)
        table = _read(path, _GENE2GO_COLUMNS, "#")
        table = table[table["taxon"] == str(taxon)]
    elif format == "gaf":
        table = _read(path, _GAF_COLUMNS, "!")
        # a second number is that of an interacting organism
        table = table[table["taxon"].str.partition("|")[0] == f"taxon:{taxon}"].assign(gene=table[gene_column])
    elif format == "table":
        table = _read(path, {0: "gene", 1: "term"}, "#", sep=None).assign(qualifier="")
    else:
        msg = f"format must be 'gene2go', 'gaf' or 'table'; got {format!r}"
        raise ValueError(msg)
    table = table[~table["qualifier"].str.upper().str.contains(r"\bNOT\b")]
    if names is not None:
        names = {str(key): name for key, name in names.items()}
        table = table.assign(gene=table["gene"].map(names)).dropna(subset="gene")
    return _tidy(table)


def _format_of(path: Path) -> AnnotationFormat:
    name = path.name.lower()
    if name.startswith("gene2go"):
        return "gene2go"
    return "gaf" if ".gaf" in name else "table"


def _read(path: Path, columns: dict[int, str], comment: str, sep: str | None = "\t") -> pd.DataFrame:
    """Columns of a file by their number, all as text; lines that start with ``comment`` are no data."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        lines = 0
        while (line := file.readline()).startswith(comment):
            lines += 1
    if sep is None:
        sep = "\t" if "\t" in line else ","
    # "NA" and the like are gene names here, not missing values
    table = pd.read_csv(
        path, sep=sep, header=None, skiprows=lines, usecols=list(columns), dtype=str, keep_default_na=False, quoting=3
    )
    return table.rename(columns=columns)


def _tidy(table: pd.DataFrame) -> pd.DataFrame:
    return table[["gene", "term"]].drop_duplicates(ignore_index=True)
