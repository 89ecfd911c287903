"""Over-representation of gene sets in gene programs."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from .. import __version__, _keys, _logging
from .._errors import OfflineError
from .._optional import require
from .._settings import settings
from ._inputs import check_can_hold_results, storable

if TYPE_CHECKING:
    from types import ModuleType

    from anndata import AnnData

    GeneSets = str | os.PathLike[str] | Mapping[str, Iterable[str]]

Method = Literal["hypergeometric", "enrichr"]
Correction = Literal["bonferroni", "fdr_bh"]

_COLUMNS = {
    "Term": "term",
    "Overlap": "overlap",
    "Odds Ratio": "odds_ratio",
    "Combined Score": "combined_score",
    "P-value": "p_value",
    "Genes": "genes",
}


def enrichment(
    adata: AnnData,
    gene_sets: GeneSets | Sequence[GeneSets],
    *,
    programs: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    key: str | None = None,
    background: Sequence[str] | None = None,
    method: Method = "hypergeometric",
    correction: Correction = "bonferroni",
    alpha: float = 0.05,
    min_size: int = 2,
    max_size: int | None = None,
    organism: str = "human",
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find the gene sets that have more genes in a program than chance gives, through gseapy.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.gene_programs`.
    gene_sets
        Files (``.gmt``, ``.gmt.gz``), mappings from the name of a set to its genes, names of Enrichr libraries such as
        ``"Reactome_2022"`` (which are downloaded), or a list of these.
    programs
        Genes to test instead of the programs of ``adata``: a mapping from names to genes, or one list of genes.
    key
        Slot of ``uns`` with the programs; ``"gene_programs"`` by default.
    background
        The genes that could have been in a program. By default those that were clustered, and for ``programs`` of your own
        all of ``adata``. Genes that are not among them count nowhere, neither in programs nor in sets.
    method
        ``"hypergeometric"`` tests here, with the background. ``"enrichr"`` asks the server of Enrichr, which needs names of
        libraries and has a background of its own.
    correction
        ``"bonferroni"`` multiplies P by the number of programs and of sets, so that a result is significant below
        ``alpha / (programs x sets)``, as in the scGPT paper. ``"fdr_bh"`` controls the false discovery rate by
        Benjamini and Hochberg among the sets tested for one program, as in the CellFM paper.
    alpha
        Corrected P below which a result is called significant.
    min_size, max_size
        Sets with fewer or more genes of the background are not tested.
    organism
        Organism of the libraries of Enrichr.
    key_added
        Slot of ``uns`` instead of ``"enrichment"``.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Set is:

    ``.uns["enrichment"]``
        ``table``, one row for each program and set that share a gene, the smallest P of a program first: ``program``, ``library``,
        ``term``, ``overlap`` (shared genes), ``program_size`` and ``term_size`` (both within the background; -1 where Enrichr does
        not tell), ``odds_ratio``, ``combined_score``, ``p_value``, ``p_adjusted``, ``significant``, ``genes`` (separated by ``;``).
        And ``params``, with ``n_programs``, ``n_terms`` and ``n_background``.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    KeyError
        If there are no programs in ``uns``.
    MissingExtraError
        If gseapy is not installed.
    OfflineError
        If a library is needed and scfm is offline, or the server cannot be reached.
    ValueError
        If no set has enough genes of the background, or an option is unknown.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.enrichment(adata, "c2.cp.reactome.gmt")  # doctest: +SKIP
    >>> scfm.tl.enrichment(adata, {"T cell": ["CD3D", "CD3E", "CD3G"]}, correction="fdr_bh")  # doctest: +SKIP
    """
    for name, value, choices in (("method", method, Method), ("correction", correction, Correction)):
        if value not in get_args(choices):
            msg = f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}"
            raise ValueError(msg)
    check_can_hold_results(adata)
    key = key or _keys.PROGRAMS
    tested, possible = _programs(adata, programs, key)
    gseapy = require("gseapy", purpose="tl.enrichment")
    start = _logging.info(f"testing {len(tested)} gene programs for enrichment")
    if method == "enrichr":
        table, n_terms, n_background = _ask_enrichr(gseapy, tested, gene_sets, background, organism)
    else:
        genes = pd.unique(np.asarray(list(possible if background is None else background), dtype=object))
        inside = set(map(str, genes))
        libraries = _libraries(gseapy, gene_sets, organism)
        sets = {
            name: _restricted(terms, inside, min_size, max_size or len(inside)) for name, terms in libraries.items()
        }
        n_terms, n_background = sum(map(len, sets.values())), len(inside)
        if not n_terms:
            total = sum(map(len, libraries.values()))
            if not total:
                msg = "gene_sets= holds no gene set"
                raise ValueError(msg)
            msg = (
                f"none of the {total:,} gene sets has {min_size} to {max_size or len(inside):,} of the {len(inside):,} genes of "
                "the background; are the names symbols in both?"
            )
            raise ValueError(msg)
        tested = {name: [gene for gene in members if gene in inside] for name, members in tested.items()}
        if outside := [name for name, members in tested.items() if not members]:
            if len(outside) == len(tested):
                msg = f"no gene of the programs is in the background of {len(inside):,} genes; are the names the same kind in both?"
                raise ValueError(msg)
            _logging.warning(
                f"no gene of {', '.join(map(repr, outside[:5]))}{' ...' if len(outside) > 5 else ''} is in the background; not tested"
            )
            tested = {name: members for name, members in tested.items() if members}
        table = _test(gseapy, tested, sets, n_background)
    table["p_adjusted"] = _corrected(table, correction, len(tested), n_terms)
    table["significant"] = table["p_adjusted"] < alpha
    order = pd.Index(list(tested)).get_indexer(table["program"])
    table = table.iloc[np.lexsort((table["term"], table["p_value"], order))].reset_index(drop=True)
    table = table[[name for name in table if name != "genes"] + ["genes"]]
    adata = adata.copy() if copy else adata
    params = {
        "key": key if programs is None else "given",
        "method": method,
        "correction": correction,
        "alpha": alpha,
        "min_size": min_size,
        "max_size": max_size,
        "n_programs": len(tested),
        "n_terms": n_terms,
        "n_background": n_background,
    }
    added = key_added or _keys.ENRICHMENT
    adata.uns[added] = {
        "table": table,
        "params": {name: storable(value) for name, value in params.items() if value is not None},
        "scfm_version": __version__,
    }
    n_found = table.loc[table["significant"], "program"].nunique()
    _logging.info(
        f"    {int(table['significant'].sum()):,} significant results, in {n_found} of {len(tested)} programs"
    )
    _logging.info("    finished", time=start, deep=f"added\n    {added!r}, results (adata.uns)")
    return adata if copy else None


def _programs(
    adata: AnnData, programs: Mapping[str, Sequence[str]] | Sequence[str] | None, key: str
) -> tuple[dict[str, list[str]], Iterable[str]]:
    """Programs to test, and the genes that could have been in them."""
    if programs is not None:
        if isinstance(programs, str):
            msg = f"programs= needs a list of genes or a mapping from names to genes, not the text {programs!r}"
            raise TypeError(msg)
        given = programs if isinstance(programs, Mapping) else {"genes": programs}
        found = {str(name): list(dict.fromkeys(map(str, members))) for name, members in given.items()}
        possible = adata.var_names
    else:
        if key not in adata.uns or "programs" not in adata.uns[key]:
            msg = f"uns has no programs {key!r}; run scfm.tl.gene_programs first, or give programs="
            raise KeyError(msg)
        stored = adata.uns[key]
        # reading a file sorts keys as text; the summary keeps the order
        found = {name: [str(gene) for gene in stored["programs"][name]] for name in stored["summary"].index.astype(str)}
        possible = stored["genes"]
    if not found or not all(found.values()):
        msg = "there are no programs to test, or one has no genes"
        raise ValueError(msg)
    return found, possible


# -- gene sets ---------------------------------------------------------------------------------------------------------------


def _listed(gene_sets: GeneSets | Sequence[GeneSets]) -> list[GeneSets]:
    return [gene_sets] if isinstance(gene_sets, (str, os.PathLike, Mapping)) else list(gene_sets)


def _is_file(name: object) -> bool:
    if isinstance(name, os.PathLike):
        return True
    return isinstance(name, str) and (name.endswith((".gmt", ".gmt.gz")) or os.sep in name)


def _libraries(
    gseapy: ModuleType, gene_sets: GeneSets | Sequence[GeneSets], organism: str
) -> dict[str, dict[str, list[str]]]:
    libraries: dict[str, dict[str, list[str]]] = {}
    for number, one in enumerate(_listed(gene_sets)):
        if isinstance(one, Mapping):
            name, terms = (
                f"given_{number + 1}",
                {str(term): [str(gene) for gene in genes] for term, genes in one.items()},
            )
        elif _is_file(one):
            name, terms = Path(one).name.removesuffix(".gz").removesuffix(".gmt"), _read_gmt(Path(one))
        else:
            name, terms = str(one), _download(gseapy, str(one), organism)
        libraries[name if name not in libraries else f"{name}_{number + 1}"] = terms
    if not libraries:
        msg = "gene_sets names no gene sets"
        raise ValueError(msg)
    return libraries


def _read_gmt(path: Path) -> dict[str, list[str]]:
    """Sets of a file with one set a line: name, description, genes, separated by tabs."""
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if len(rest) < 2:
            msg = f"line {number} of {path} is no gene set: a name, a description and genes, separated by tabs"
            raise ValueError(msg)
        # some libraries give genes weights, after a comma
        sets.setdefault(name, []).extend(gene.split(",")[0].strip() for gene in rest[1:] if gene.strip())
    return sets


def _check_online(what: str) -> None:
    if settings.offline:
        msg = (
            f"{what} has to be asked of the server of Enrichr, and scfm is offline (scfm.settings.offline). Download the library "
            "as a .gmt file elsewhere (https://maayanlab.cloud/Enrichr/#libraries) and give its path"
        )
        raise OfflineError(msg)


def _download(gseapy: ModuleType, name: str, organism: str) -> dict[str, list[str]]:
    _check_online(f"the library {name!r}")
    try:
        return gseapy.get_library(name, organism=organism)
    except Exception as error:
        msg = f"the library {name!r} could not be had from Enrichr ({error}); a path of a .gmt file works without a network"
        raise OfflineError(msg) from error


def _restricted(sets: Mapping[str, list[str]], inside: set[str], low: int, high: int) -> dict[str, list[str]]:
    found = {term: sorted(inside.intersection(genes)) for term, genes in sets.items()}
    return {term: genes for term, genes in found.items() if low <= len(genes) <= high}


# -- tests -------------------------------------------------------------------------------------------------------------------


def _test(
    gseapy: ModuleType, programs: dict[str, list[str]], libraries: dict[str, dict[str, list[str]]], n_background: int
) -> pd.DataFrame:
    parts = []
    for name, members in programs.items():
        wanted = set(members)
        for library, sets in libraries.items():
            # sets that share no gene have P = 1; gseapy complains if there is no other
            sharing = {term: genes for term, genes in sets.items() if not wanted.isdisjoint(genes)}
            if not sharing:
                continue
            found = gseapy.enrich(members, sharing, background=n_background, outdir=None, no_plot=True).results
            part = _tidy(found, name, library)
            part["program_size"] = len(members)
            part["term_size"] = [len(sets[term]) for term in part["term"]]
            parts.append(part)
    return _joined(parts)


def _ask_enrichr(
    gseapy: ModuleType,
    programs: dict[str, list[str]],
    gene_sets: GeneSets | Sequence[GeneSets],
    background: Sequence[str] | None,
    organism: str,
) -> tuple[pd.DataFrame, int, int]:
    names = _listed(gene_sets)
    if background is not None or any(isinstance(name, Mapping) or _is_file(name) for name in names):
        msg = "the server of Enrichr tests its own libraries with its own background; use method='hypergeometric'"
        raise ValueError(msg)
    _check_online("method='enrichr'")
    parts, terms = [], dict.fromkeys(names, 0)
    try:
        for name in names:
            terms[name] = len(gseapy.get_library(name, organism=organism))
        for program, members in programs.items():
            found = gseapy.enrichr(members, names, organism=organism, outdir=None, no_plot=True).results
            for library, part in found.groupby("Gene_set") if len(found) else ():
                tidy = _tidy(part, program, str(library))
                tidy["program_size"], tidy["term_size"] = len(members), -1
                parts.append(tidy)
    except Exception as error:
        msg = f"Enrichr did not answer ({error}); a .gmt file and method='hypergeometric' work without a network"
        raise OfflineError(msg) from error
    return _joined(parts), sum(terms.values()), -1


def _tidy(found: pd.DataFrame, program: str, library: str) -> pd.DataFrame:
    table = found[list(_COLUMNS)].rename(columns=_COLUMNS).reset_index(drop=True)
    table["overlap"] = [int(str(text).partition("/")[0]) for text in table["overlap"]]
    table["genes"] = [";".join(sorted(str(text).split(";"))) for text in table["genes"]]
    table.insert(0, "library", library)
    table.insert(0, "program", program)
    return table


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    if parts:
        return pd.concat(parts, ignore_index=True)
    text, number = ["program", "library", "term", "genes"], ["odds_ratio", "combined_score", "p_value"]
    kinds = (
        dict.fromkeys(text, str)
        | dict.fromkeys(number, float)
        | dict.fromkeys(["overlap", "program_size", "term_size"], int)
    )
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})


def _corrected(table: pd.DataFrame, correction: str, n_programs: int, n_terms: int) -> pd.Series:
    """Corrected P; sets that share no gene with a program are tests, too, with P = 1."""
    if correction == "bonferroni":
        return (table["p_value"] * n_programs * n_terms).clip(upper=1.0)

    def adjusted(p: pd.Series) -> pd.Series:
        rank = p.rank(method="first").astype(int)
        scaled = pd.Series((p * n_terms / rank).to_numpy(), index=rank.to_numpy()).sort_index()
        lowest = scaled[::-1].cummin().clip(upper=1.0)
        return pd.Series(lowest[rank.to_numpy()].to_numpy(), index=p.index)

    if not len(table):
        return table["p_value"]
    return table.groupby("program", sort=False)["p_value"].transform(adjusted)
