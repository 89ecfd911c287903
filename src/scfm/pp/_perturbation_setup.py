"""``scfm.pp.perturbation_setup``."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from .. import __version__, _keys, _logging
from ..genes import resolve_gene_names
from ..metrics import condition_means
from ..tasks.perturbation_data import CONTROL, SEPARATOR, SEPARATORS, canonical, genes_of, parse_perturbation

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from anndata import AnnData
    from scipy import sparse

_TARGET_SUM = 1e4
_SHOWN = 10
_DE_COLUMNS = ("perturbation", "rank", "gene", "score", "change", "std")


def perturbation_setup(
    adata: AnnData,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    total_key: str | None = None,
    target_sum: float = _TARGET_SUM,
    cell_type_key: str | None = None,
    gene_symbols: str | None = None,
    separators: Sequence[str] = SEPARATORS,
    n_de_genes: int = 20,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Say which cells are perturbed how, pair each with a control cell, and find the genes that change.

    All spellings of a perturbation become one name (``"A+ctrl"``, ``"ctrl+A"`` and ``"A"``; ``"B+A"``, ``"A_B"`` and
    ``"A+B"``), with the genes of a pair in the order of their names, and ``"ctrl"`` for control. Models, tools, plots and
    benchmarks of perturbations take their data from here.

    Parameters
    ----------
    adata
        Annotated data with control cells and perturbed cells.
    perturbation_key
        Column of ``obs`` with the perturbation of each cell.
    control
        Name or names of control in it; by default the usual ones, such as ``"control"``, ``"ctrl"`` or ``"non-targeting"``.
    layer
        Layer with counts or log-normalised values; by default ``X``. Whole numbers are counts; they are scaled to
        ``target_sum`` for each cell, and ``log1p`` is taken.
    total_key
        Column of ``obs`` with all counts of each cell, for data with some of the genes only.
    target_sum
        Counts that each cell is scaled to.
    cell_type_key
        Column of ``obs`` with cell types; cells are then paired and compared with control cells of their own type.
    gene_symbols
        Column of ``var`` with the names by which genes are perturbed; by default ``var_names``, or if these are Ensembl ids or
        numbers, the first of the usual columns, such as ``"gene_name"`` in the files of GEARS.
    separators
        Characters between the genes of a label. Names that are known (genes of ``adata``, perturbations of one gene) are not
        taken apart.
    n_de_genes
        How many of the genes that change most to keep for each perturbation.
    rng
        Seed or generator of the pairs.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.obs["scfm_perturbation"]``
        Name of the perturbation, categorical, ``"ctrl"`` first.
    ``.obs["scfm_control"]``
        Position of the control cell that the cell is paired with, drawn once; control cells are paired with themselves. It
        counts cells of this object: run the function again after cells are taken away.
    ``.uns["perturbation"]``
        ``params``; ``control``; ``labels``, the spelling and number of cells of each perturbation; ``genes``, ``names`` and
        ``means``, the mean log-normalised expression of each perturbation; ``de_genes``, the genes that change most against
        control by Scanpy's t-test, whatever the direction, with change and standard deviation; ``non_dropout_de_genes``, the
        same without genes that no cell of the perturbation expresses, unless no control cell does either (as GEARS). Genes are
        named as in ``var_names``. With ``cell_type_key``, each type is tested by itself where it has two cells of the perturbation
        and two control cells, and score, change and standard deviation are means over the types, weighted by their perturbed
        cells (the authors of GEARS keep a ranking for each type instead).

    Raises
    ------
    KeyError
        If a column or layer does not exist.
    ValueError
        If there are no perturbed cells, no control cells (of a cell type), labels are missing, or values are no expression.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024).

    Examples
    --------
    >>> import scfm
    >>> scfm.pp.perturbation_setup(adata, "condition", control="ctrl")  # doctest: +SKIP
    """
    from ..models._perturbation_data import ExpressionRule
    from ..tl._inputs import check_can_hold_results, seed_of

    for column in (perturbation_key, cell_type_key):
        if column is not None and column not in adata.obs:
            msg = (
                f"obs has no column {column!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}. Name the column "
                f"with the perturbation of each cell with perturbation_key="
            )
            raise KeyError(msg)
    if n_de_genes < 1:
        msg = f"n_de_genes must be at least 1; got {n_de_genes!r}"
        raise ValueError(msg)
    control = [control] if isinstance(control, str) else control
    labels = adata.obs[perturbation_key]
    if labels.isna().any():
        msg = (
            f"{int(labels.isna().sum()):,} of {adata.n_obs:,} cells have no label in obs[{perturbation_key!r}]; give them one, or "
            f"leave them out with adata[adata.obs[{perturbation_key!r}].notna()].copy()"
        )
        raise ValueError(msg)
    found = resolve_gene_names(adata.var, gene_symbols)
    genes = {*map(str, adata.var_names), *map(str, found.symbols)}
    names, table = _named(labels.astype(str), control, separators, genes, perturbation_key)
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    start = _logging.info(f"preparing {adata.n_obs:,} cells with {len(table) - 1:,} perturbations")
    rule = ExpressionRule(layer or "", total_key or "", float(target_sum))
    expression = rule.read(adata)[0]
    types = None if cell_type_key is None else adata.obs[cell_type_key].astype(str).to_numpy()
    pairs = _paired(names, types, np.random.default_rng(seed := seed_of(rng)))
    means = condition_means(expression, names, names=table["perturbation"])
    de_genes, non_dropout = _de_genes(expression, names, types, means, adata.var_names, n_de_genes)

    adata.obs[_keys.PERTURBATION_OF_CELL] = pd.Categorical(names, categories=table["perturbation"])
    adata.obs[_keys.CONTROL_OF_CELL] = pairs
    params = {
        "perturbation_key": perturbation_key,
        "layer": layer,
        "total_key": total_key,
        "target_sum": float(target_sum),
    }
    params |= {"cell_type_key": cell_type_key, "n_de_genes": n_de_genes, "rng": seed}
    params |= {"controls": None if control is None else np.asarray(control, dtype=str)}
    params |= {"gene_symbols": None if found.symbols_from == "index" else found.symbols_from}
    params |= {"separators": np.asarray(tuple(separators), dtype=str)}
    adata.uns[_keys.PERTURBATION] = {
        "params": {name: value for name, value in params.items() if value is not None},
        "control": CONTROL,
        "labels": table,
        "genes": adata.var_names.to_numpy(dtype=str),
        "names": table["perturbation"].to_numpy(dtype=str),
        "means": means.to_numpy(dtype=np.float32),
        "de_genes": de_genes,
        "non_dropout_de_genes": non_dropout,
        "scfm_version": __version__,
    }
    n_double = sum(len(genes_of(name)) > 1 for name in table["perturbation"])
    _logging.info(
        f"    {int((names == CONTROL).sum()):,} control cells; {len(table) - 1 - n_double:,} perturbations of one gene, "
        f"{n_double:,} of several",
        time=start,
        deep=f"added\n    {_keys.PERTURBATION_OF_CELL!r} and {_keys.CONTROL_OF_CELL!r} (adata.obs)\n    "
        f"{_keys.PERTURBATION!r} (adata.uns)",
    )
    return adata if copy else None


def _named(
    labels: pd.Series, control: Sequence[str] | None, separators: Sequence[str], genes: Collection[str], column: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """Canonical name of each cell, and the table of names with their first spelling and number of cells."""
    spellings = pd.unique(labels)
    shown = f"{', '.join(map(repr, sorted(spellings)[:_SHOWN]))}{' ...' if len(spellings) > _SHOWN else ''}"
    # labels without a separator are names, also where other labels could be read in two ways
    marks = tuple(separators)
    known = {*genes, *(text for text in spellings if not any(mark in text for mark in marks))}
    parsed = {text: parse_perturbation(text, control, marks, known=known) for text in spellings}
    if unnameable := sorted({gene for some in parsed.values() for gene in some if SEPARATOR in gene}):
        msg = f"names of genes with '+' cannot be told from pairs: {', '.join(unnameable[:_SHOWN])}; rename them"
        raise ValueError(msg)
    name_of = {text: canonical(some) for text, some in parsed.items()}
    if CONTROL not in name_of.values():
        how = "no usual name of control" if control is None else f"none of {', '.join(map(repr, control))}"
        msg = f"obs[{column!r}] has {how}; name it with control=. There are {shown}"
        raise ValueError(msg)
    if set(name_of.values()) == {CONTROL}:
        msg = f"obs[{column!r}] has control cells only, and nothing was perturbed; there are {shown}"
        raise ValueError(msg)
    if absent := [name for name in control or () if not _occurs(name, spellings, marks)]:
        _logging.warning(
            f"obs[{column!r}] has no label {', '.join(map(repr, absent))}, which control= names; control is "
            f"{', '.join(repr(text) for text, name in name_of.items() if name == CONTROL)}"
        )
    names = labels.map(name_of).to_numpy(dtype=object).astype(str)
    order = [CONTROL, *sorted(set(names) - {CONTROL})]
    counts = pd.Series(names).value_counts()
    first: dict[str, str] = {}
    for text, name in name_of.items():
        first.setdefault(name, text)
    table = pd.DataFrame(
        {
            "perturbation": order,
            "label": [first[name] for name in order],
            "n_cells": counts.reindex(order).to_numpy(dtype=np.int64),
        }
    )
    return names, table


def _occurs(name: str, spellings: Sequence[str], marks: Sequence[str]) -> bool:
    """Whether a name is a label or stands between separators of one, without regard to capitals."""
    edge = "|".join(map(re.escape, marks)) or r"(?!)"
    found = re.compile(rf"(^|{edge})\s*{re.escape(name.strip())}\s*($|{edge})", re.IGNORECASE)
    return any(found.search(text.strip()) for text in spellings)


def _paired(names: np.ndarray, types: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Position of a control cell for each cell, of its own type if there are types."""
    out = np.arange(len(names), dtype=np.int64)
    is_ctrl = names == CONTROL
    groups = np.zeros(len(names), dtype=str) if types is None else types
    for group in np.unique(groups):
        here = groups == group
        controls, perturbed = np.flatnonzero(is_ctrl & here), np.flatnonzero(~is_ctrl & here)
        if not len(perturbed):
            continue
        if not len(controls):
            msg = (
                f"there are {len(perturbed):,} perturbed cells but no control cells of the type {group!r}; leave these cells out, "
                "or leave cell_type_key= out"
            )
            raise ValueError(msg)
        out[perturbed] = rng.choice(controls, len(perturbed))
    return out


def _de_genes(
    expression: sparse.csr_matrix,
    names: np.ndarray,
    types: np.ndarray | None,
    means: pd.DataFrame,
    genes: pd.Index,
    n_top: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Genes that change most against control, and the same without those that only were not detected."""
    groups = np.zeros(len(names), dtype=str) if types is None else types
    tests: dict[str, list[_Test]] = {}
    for group in np.unique(groups):
        for name, test in _tested(expression, names, np.flatnonzero(groups == group)).items():
            tests.setdefault(name, []).append(test)
    perturbations = [name for name in means.index if name != CONTROL]
    if few := [name for name in perturbations if name not in tests]:
        _logging.warning(f"too few cells for a test, so that no changed genes are known: {', '.join(few[:_SHOWN])}")
    if not tests:
        empty = pd.DataFrame(
            {name: pd.Series(dtype=str if name in ("perturbation", "gene") else float) for name in _DE_COLUMNS}
        )
        return empty, empty
    control = means.loc[CONTROL].to_numpy()
    columns = np.asarray(genes, dtype=str)
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for name in perturbations:
        if name not in tests:
            continue
        of_name = tests[name]
        weights = np.array([len(test.cells) for test in of_name], dtype=np.float64)
        score, change = (
            np.average([getattr(test, part) for test in of_name], axis=0, weights=weights)
            for part in ("score", "change")
        )
        # of genes with equal scores, Scanpy's order stays where there is one test
        order = of_name[0].order if len(of_name) == 1 else np.argsort(-np.abs(score), kind="stable")
        detected = (means.loc[name].to_numpy() != 0) | (control == 0)
        for part, kept in zip(parts, (np.ones(len(order), dtype=bool), detected[order]), strict=True):
            top = order[kept][:n_top]
            spread = [expression[test.cells][:, top].toarray().std(0, ddof=1) for test in of_name]
            part.append(
                pd.DataFrame(
                    {
                        "perturbation": name,
                        "rank": np.arange(1, len(top) + 1),
                        "gene": columns[top],
                        "score": score[top],
                        "change": change[top],
                        "std": np.average(spread, axis=0, weights=weights),
                    }
                )
            )
    return tuple(pd.concat(part, ignore_index=True) for part in parts)


class _Test(NamedTuple):
    """How the genes of a perturbation change in the cells of a type: cells, genes by score, and score and change of each gene."""

    cells: np.ndarray
    order: np.ndarray
    score: np.ndarray
    change: np.ndarray


def _tested(expression: sparse.csr_matrix, names: np.ndarray, rows: np.ndarray) -> dict[str, _Test]:
    """Scanpy's t-test against control in some cells, for perturbations with at least two of them."""
    import scanpy as sc
    from anndata import AnnData

    n_cells = pd.Series(names[rows]).value_counts()
    enough = sorted(n_cells.index[n_cells >= 2])
    groups = [name for name in enough if name != CONTROL]
    if not groups or CONTROL not in enough:
        return {}
    rows = rows[np.isin(names[rows], enough)]
    there = names[rows]
    cells = AnnData(
        expression[rows],
        obs=pd.DataFrame({"group": pd.Categorical(there)}, index=np.arange(len(rows)).astype(str)),
        var=pd.DataFrame(index=np.arange(expression.shape[1]).astype(str)),
        uns={"log1p": {"base": None}},
    )
    with warnings.catch_warnings():  # Scanpy adds its columns one by one
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)
        sc.tl.rank_genes_groups(
            cells, "group", groups=groups, reference=CONTROL, rankby_abs=True, method="t-test", use_raw=False
        )
    found = cells.uns["rank_genes_groups"]
    means = condition_means(cells.X, there, names=enough)
    out = {}
    for name in groups:
        order, score = found["names"][name].astype(np.int64), np.zeros(expression.shape[1])
        score[order] = found["scores"][name].astype(np.float64)
        change = (means.loc[name] - means.loc[CONTROL]).to_numpy()
        out[name] = _Test(rows[there == name], order, score, change)
    return out
