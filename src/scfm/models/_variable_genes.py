"""Highly variable genes, to which integration restricts the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

from .. import _logging

if TYPE_CHECKING:
    from ..data import CellSource
    from ..engine import Task
    from ..genes import GeneMatch

# batches with fewer cells say nothing about the variance of a gene
_FEWEST_CELLS = 10


@dataclass(frozen=True)
class GeneChoice:
    """Which genes were chosen, and how.

    Parameters
    ----------
    genes
        Their names in the vocabulary of the model, sorted.
    how
        ``"seurat_v3"`` or ``"cell_ranger"`` (flavours of :func:`scanpy.pp.highly_variable_genes`), ``"given"``, or
        ``"all"`` if the model knows no more genes than were asked for.
    """

    genes: np.ndarray
    how: str


def variable_genes(source: CellSource, match: GeneMatch, batches: np.ndarray, n_top_genes: int) -> GeneChoice:
    """The genes known to a model that vary most within batches; the matrix is read into memory.

    As upstream's integration script of scGPT does: ``"seurat_v3"`` on raw counts, ``"cell_ranger"`` on log-normalised
    values; the second on logarithms of normalised counts where scikit-misc is not installed, or its fit fails.

    Parameters
    ----------
    source
        All cells.
    match
        Which gene of the model each column is.
    batches
        Batch of each cell.
    n_top_genes
        How many genes.

    Raises
    ------
    ValueError
        If the number is not positive.
    """
    if n_top_genes < 1:
        msg = f"n_top_genes must be positive; got {n_top_genes}"
        raise ValueError(msg)
    counts, ids = match.collapse(source.read(0, source.n_obs))
    names = match.vocab.names[ids]
    expressed = counts.getnnz(0) > 0
    if expressed.sum() <= n_top_genes:
        return GeneChoice(np.sort(names), "all")
    names, counts = names[expressed], counts[:, expressed]
    labels, sizes = np.unique(batches, return_counts=True)
    large = labels[sizes >= _FEWEST_CELLS]
    rows = np.isin(batches, large) if len(large) else np.ones(len(batches), dtype=bool)
    obs = pd.DataFrame({"batch": pd.Categorical(batches[rows])}, index=np.arange(rows.sum()).astype(str))
    work = AnnData(counts[rows], obs=obs, var=pd.DataFrame(index=names))
    is_raw = not (counts.data % 1).any()
    how = "seurat_v3" if is_raw and find_spec("skmisc") else "cell_ranger"
    options = {"n_top_genes": n_top_genes, "batch_key": "batch" if obs["batch"].nunique() > 1 else None}
    try:
        table = _table(work, how, is_raw=is_raw, **options)
    except ValueError as error:
        if how == "cell_ranger":
            raise
        _logging.warning(
            f"the variance of genes could not be fitted ({_reason(error)}); taking the flavour 'cell_ranger' instead"
        )
        how = "cell_ranger"
        table = _table(work, how, is_raw=is_raw, **options)
    chosen = np.sort(names[table["highly_variable"].to_numpy()])
    _logging.info(f"    {len(chosen):,} highly variable genes ({how})")
    return GeneChoice(chosen, how)


def _reason(error: Exception) -> str:
    """What an error says; compiled code gives its messages as bytes."""
    parts = [part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in error.args]
    return " ".join(parts).strip().rstrip(".")


def _table(work: AnnData, flavor: str, *, is_raw: bool, **options: object) -> pd.DataFrame:
    if flavor == "cell_ranger" and is_raw:
        sc.pp.normalize_total(work, target_sum=1e4)
        sc.pp.log1p(work)
    return sc.pp.highly_variable_genes(work, flavor=flavor, inplace=False, **options)


def given_genes(match: GeneMatch, genes: list[str]) -> GeneChoice:
    """Genes named by the user, by their names in the data or in the vocabulary.

    Raises
    ------
    KeyError
        If a gene is not in the data, or the model does not know it.
    """
    by_name = dict(zip([*match.vocab_names, *match.names], [*match.ids, *match.ids], strict=True))
    ids = np.array([by_name.get(name, -1) for name in genes], dtype=np.int64)
    if (ids < 0).any():
        unknown = [name for name, i in zip(genes, ids, strict=True) if i < 0]
        msg = (
            f"{', '.join(unknown[:10])} ({len(unknown):,} of {len(genes):,} genes) are not in the data or not known to the "
            "model"
        )
        raise KeyError(msg)
    return GeneChoice(np.unique(match.vocab.names[ids]), "given")


def restricted(match: GeneMatch, choice: GeneChoice | None) -> GeneMatch:
    """The match in which genes that were not chosen count as unknown."""
    if choice is None:
        return match
    kept = np.isin(match.vocab_names, choice.genes) & (match.ids >= 0)
    return replace(match, ids=np.where(kept, match.ids, -1), how=np.where(kept, match.how, ""))


def among_chosen(task: Task, choice: GeneChoice | None) -> Task:
    """A run on chosen genes only; whether genes are known is still asked of all of them."""
    if choice is None:
        return task
    chosen = replace(task, match=restricted(task.match, choice))
    chosen.__dict__["check"] = task.check
    return chosen
