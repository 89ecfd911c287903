"""Gene function: vectors of models beside vectors that come from anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _logging
from ..backbones import random_copy
from ..baselines import coexpression_vectors, expression_statistics, random_gene_vectors
from ..models import GeneClassifier
from ..models._gene_table import gene_table
from ..tl._inputs import load_backbone, result_name
from ._cells import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData

    from ..models._gene_table import GeneTable
    from ..tl._inputs import Model

_TASK = "gene function"
_STATES = ("static", "contextual")
_BASELINES = ("random", "expression", "coexpression")
_NAMES = {
    "random": "random vectors",
    "expression": "expression statistics",
    "coexpression": "co-expression (PMI + SVD)",
}


def gene_function(
    labels: pd.Series | pd.DataFrame,
    models: Model | Sequence[Model] = (),
    *,
    adata: AnnData | None = None,
    layer: str | None = None,
    states: Sequence[str] = ("static",),
    head: str | None = None,
    standardize: bool = True,
    baselines: Sequence[str] | None = None,
    random_weights: bool = True,
    shuffled: bool = True,
    n_folds: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    aliases: Any = None,
    train: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Compare what models know about the function of genes with each other, and with what needs no foundation model.

    Vectors of all kinds go through the same head and the same folds, over the labelled genes for which all of them have a
    vector.

    Parameters
    ----------
    labels
        Known answers by gene symbol, as in :class:`scfm.models.GeneClassifier`.
    models
        Model or models, as in :func:`scfm.tl.embed`.
    adata
        Cells with raw counts, for states of genes in cells and for the baselines ``"expression"`` and ``"coexpression"``.
        Its ``var_names`` or a column of ``var`` have to hold gene symbols.
    layer
        Layer of ``adata`` with counts; by default ``X``.
    states
        ``"static"`` (vectors that the model has learned) and ``"contextual"`` (states in the cells of ``adata``, averaged).
    head
        Head for all, see :class:`scfm.models.GeneClassifier`.
    standardize
        Whether to standardise vectors, so that no kind of vectors wins by its scale.
    baselines
        ``"random"`` (random vectors), ``"expression"`` (mean, variance and share of cells), ``"coexpression"`` (in the
        manner of gene2vec); by default all, without ``adata`` the first.
    random_weights
        Whether to add copies of the models with random weights.
    shuffled
        Whether to add the vectors of the first model with shuffled labels.
    n_folds
        Number of folds.
    seeds
        Seeds of everything random; the folds stay the same.
    aliases
        HGNC table of other names of genes.
    train
        Further arguments of :meth:`scfm.models.GeneClassifier.cross_validate`, such as ``{"max_epochs": 60}``.
    device
        Where to compute.

    Returns
    -------
    Tidy table in the form of :func:`scfm.benchmark.cells`; ``held_out`` is the fold.

    Raises
    ------
    ValueError
        If a baseline or state is unknown, cells are needed and missing, or fewer genes have all vectors than there are folds.

    Examples
    --------
    >>> import scfm
    >>> table = scfm.benchmark.gene_function(sensitive, ["scgpt"], adata=adata)  # doctest: +SKIP
    >>> scfm.benchmark.summary(table, ["AUROC", "macro F1"])  # doctest: +SKIP
    """
    models = list(models) if isinstance(models, (list, tuple)) else [models]
    if baselines is None:
        baselines = ("random",) if adata is None else _BASELINES
    for what, chosen, there in (("state", states, _STATES), ("baseline", baselines, _BASELINES)):
        if unknown := [name for name in chosen if name not in there]:
            msg = f"there is no {what} {', '.join(map(repr, unknown))}; choose among {', '.join(there)}"
            raise ValueError(msg)
    if adata is None and ("contextual" in states or set(baselines) - {"random"}):
        msg = "states in cells and the baselines 'expression' and 'coexpression' need cells; give adata="
        raise ValueError(msg)
    start = _logging.info(f"comparing vectors of {len(labels):,} labelled genes")
    labels = labels[~labels.index.duplicated()] if isinstance(labels, pd.DataFrame) else labels.dropna()
    tables = _tables(models, states, adata, layer, random_weights, tuple(seeds), aliases, device)
    names = pd.Index(labels.index.astype(str)).unique()
    common = np.ones(len(names), dtype=bool)
    for _, _, _, table, _ in tables:
        common &= table.rows(names) >= 0
    from_cells = {
        "expression": lambda: expression_statistics(_logged(adata, layer)),
        "coexpression": lambda: coexpression_vectors(adata, layer=layer),
    }
    extra = {}
    for baseline in baselines:
        if baseline != "random":
            extra[baseline] = gene_table(None, embeddings=from_cells[baseline](), aliases=aliases)
            common &= extra[baseline].rows(names) >= 0
    if common.sum() < n_folds:
        msg = f"{int(common.sum())} of {len(names):,} labelled genes have a vector of each kind, too few for {n_folds} folds"
        raise ValueError(msg)
    labels = labels[labels.index.astype(str).isin(names[common])]
    _logging.info(f"    {int(common.sum()):,} genes have a vector of each kind")
    rows: list[tuple[Any, ...]] = []

    def add(kind: str, name: str, method: str, seed: int, vectors: pd.DataFrame, answers: Any = labels) -> None:
        model = GeneClassifier(
            None, answers, embeddings=vectors, head=head, standardize=standardize, device=device, seed=seed
        )
        scores = model.cross_validate(n_folds, **{"seed": seed} | dict(train or {}))
        rows.extend(
            (_TASK, kind, name, method, str(fold), seed, metric, value)
            for fold, metric, value in zip(scores["fold"], scores["metric"], scores["value"], strict=True)
        )

    genes = names[common]
    for kind, name, method, table, chosen in tables:
        for seed in chosen:
            add(kind, name, method, seed, _vectors(table, genes))
    for seed in seeds:
        if "random" in baselines:
            dim = tables[0][3].values.shape[1] if tables else 64
            add("baseline", _NAMES["random"], "", seed, random_gene_vectors(genes, dim, random_state=seed))
        for baseline, table in extra.items():
            add("baseline", _NAMES[baseline], "", seed, _vectors(table, genes))
        if shuffled:
            vectors = (
                _vectors(tables[0][3] if tables else next(iter(extra.values())), genes) if tables or extra else None
            )
            if vectors is not None:
                order = np.random.default_rng(seed).permutation(len(labels))
                other = labels.iloc[order].set_axis(labels.index)
                add("control", "shuffled labels", "", seed, vectors, other)
    _logging.info("    finished", time=start)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _tables(
    models: Sequence[Model],
    states: Sequence[str],
    adata: AnnData | None,
    layer: str | None,
    random_weights: bool,
    seeds: tuple[int, ...],
    aliases: Any,
    device: str,
) -> list[tuple[str, str, str, GeneTable, tuple[int, ...]]]:
    """Kind, name, state and vectors of each model, and the seeds to train heads with."""
    out = []
    for model in models:
        backbone = load_backbone(model, device=device, precision="auto", weights=None)
        name = result_name(backbone)
        for state in states:
            cells = {"adata": adata, "layer": layer} if state == "contextual" else {}
            make: Callable[[Any], GeneTable] = lambda network, cells=cells: gene_table(
                network, aliases=aliases, **cells
            )
            out.append(("model", name, state, make(backbone), seeds))
            if random_weights:
                out += [
                    ("random weights", name, state, make(random_copy(backbone, seed=seed)), (seed,)) for seed in seeds
                ]
    return out


def _vectors(table: GeneTable, genes: pd.Index) -> pd.DataFrame:
    return pd.DataFrame(table.take(table.rows(genes)), index=genes)


def _logged(adata: AnnData, layer: str | None) -> AnnData:
    """Counts as logarithms of counts per 10,000."""
    import scanpy as sc
    from anndata import AnnData

    values = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32, copy=True)
    work = AnnData(values, var=adata.var[[]].copy())
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    return work
