"""Genetic interactions of pairs of perturbations, predicted and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import __version__, _keys, _logging
from ..metrics import genetic_interaction, interaction_magnitude
from ..tasks.perturbation_data import CONTROL, canonical, genes_of, parse_perturbation
from ._inputs import check_can_hold_results, seed_of
from ._responses import Measured, control_cells, expression, mean_profiles, named, open_models, some_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from ._responses import Predictor

_SHOWN = 10
_MIN_MEAN = 0.1
_CALLS = ("synergy", "suppressor")
_MAGNITUDES = {"theil-sen": "magnitude", "least squares": "magnitude (least squares)"}


def genetic_interactions(
    adata: AnnData,
    model: Predictor | Sequence[Predictor] | None = None,
    *,
    pairs: Sequence[str] | None = None,
    singles: Literal["measured", "predicted"] = "measured",
    control: AnnData | None = None,
    n_cells: int = 300,
    genes: Sequence[str] | None = None,
    min_mean: float | None = None,
    n_de_genes: int = 50,
    n_calls: int = 15,
    key_added: str = _keys.INTERACTIONS,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Compare what two perturbations do together with what each does alone.

    The change that a pair causes is written as a weighted sum of the changes of its genes alone,
    ``ab ~ c1 a + c2 b``. The magnitude ``sqrt(c1^2 + c2^2)`` is near ``sqrt(2)`` where effects add up; pairs of the largest
    magnitude are called synergy, those of the smallest suppressor. It is found in two ways: by a robust fit without an intercept
    over all genes (Theil-Sen; Norman et al., GEARS), with the other measures of these authors, and by least squares with an
    intercept over the genes that change most (scLong).

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.pp.perturbation_setup`, with cells of single perturbations.
    model
        A trained model or several, as in :func:`scfm.tl.perturb`; without one, measured pairs only.
    pairs
        Pairs to look at; by default those that are measured, with both genes measured alone (others are named in a warning).
    singles
        Whether predicted pairs are compared with ``"measured"`` single effects (as scLong does for all methods), or with
        ``"predicted"`` ones (as GEARS does, and for pairs of genes that are not measured alone).
    control
        Control cells to predict from; by default those of ``adata``.
    n_cells
        At most so many of them, drawn at random.
    genes
        Genes for the robust fit; by default all with ``min_mean``. GEARS uses 2,967 with many counts.
    min_mean
        Leave genes with a smaller mean in control cells out of the robust fit; by default 0.1, and no limit for ``genes`` that are
        given. Genes that hardly any cell expresses draw it to zero: where they are the most, the magnitudes of all pairs vanish.
    n_de_genes
        At most so many genes that change most for least squares, as far as :func:`scfm.pp.perturbation_setup` kept them
        (``n_de_genes=50`` there, for the published form); all genes for pairs that are not measured.
    n_calls
        How many pairs to call synergy, and how many suppressor; at most half of the pairs each. (scLong 15, GEARS 20.)
    key_added
        Name of the results.
    rng
        Seed or generator of the control cells that are drawn.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Sets ``.uns["genetic_interactions"]``:

    ``table``
        For each pair and ``source`` (``"measured"``, ``"predicted"``): all measures of :func:`scfm.metrics.genetic_interaction`,
        those of :func:`scfm.metrics.interaction_magnitude`, and ``call`` and ``call (least squares)``.
    ``agreement``
        For each way of finding magnitudes: Pearson and Spearman correlation of predicted and measured magnitudes, and how many
        pairs are called synergy or suppressor in both; absent without a model, or without measured pairs.

    Raises
    ------
    ValueError
        If there is no pair to look at, one of ``pairs`` has a gene that was not measured alone (without ``singles="predicted"``) or
        is neither measured nor predicted, or a gene cannot be perturbed.
    KeyError
        If a gene is not in the data.

    References
    ----------
    Norman et al., Science 365, 786 (2019); Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024); Bai et al., scLong, Nature
    Communications 17, 2380 (2026).
    """
    if singles not in ("measured", "predicted") or (singles == "predicted" and model is None):
        msg = f"singles must be 'measured', or 'predicted' with a model; got {singles!r}"
        raise ValueError(msg)
    if n_calls < 1 or n_de_genes < 3:
        msg = f"n_calls must be at least 1 and n_de_genes at least 3; got {n_calls!r} and {n_de_genes!r}"
        raise ValueError(msg)
    measured = Measured.of(adata)
    models = [] if model is None else open_models(model)
    there = set(measured.means.index)
    chosen = _pairs(pairs, there, {str(gene) for one in models for gene in one.perturbable}, singles)
    if not models and (missing := [name for name in chosen if name not in there]):
        msg = f"without a model only measured pairs can be looked at; these are not: {', '.join(missing[:_SHOWN])}"
        raise ValueError(msg)
    if min_mean is None:
        min_mean = _MIN_MEAN if genes is None else 0.0
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    seed = seed_of(rng)
    start = _logging.info(f"genetic interactions of {len(chosen):,} pairs")
    effects = {"measured": measured.means - measured.means.loc[CONTROL]}
    if models:
        wanted = named([*chosen, *(_singles(chosen) if singles == "predicted" else ())], models)
        cells = some_cells(control_cells(adata, control), n_cells, np.random.default_rng(seed))
        base = np.asarray(expression(cells, models).mean(0), dtype=np.float64).ravel()
        means = mean_profiles(models, wanted, cells, seed=seed)
        frame = pd.DataFrame(means - base, index=wanted, columns=cells.var_names.astype(str))
        effects["predicted"] = frame[measured.means.columns]
    robust = _robust_genes(measured, genes, min_mean)

    rows = []
    for source, table in effects.items():
        alone = table if source == "predicted" and singles == "predicted" else effects["measured"]
        for name in chosen:
            first, second = genes_of(name)
            if name not in table.index or first not in alone.index or second not in alone.index:
                continue
            parts = [alone.loc[first], alone.loc[second], table.loc[name]]
            few = measured.de_genes.get(name, np.zeros(0, dtype=str))[:n_de_genes]
            few = few if len(few) >= 3 else measured.means.columns
            squares = interaction_magnitude(*(part[few].to_numpy() for part in parts))
            rows.append(
                {"pair": name, "first": first, "second": second, "source": source}
                | genetic_interaction(*(part.to_numpy()[robust] for part in parts))
                | {f"{measure} (least squares)": value for measure, value in squares.items()}
            )
    table = _called(pd.DataFrame(rows), n_calls)
    params: dict[str, Any] = {
        "singles": singles,
        "n_cells": n_cells,
        "n_genes": int(robust.sum()),
        "n_de_genes": n_de_genes,
    }
    params |= {"n_calls": n_calls, "min_mean": min_mean, "n_models": len(models), "rng": seed}
    adata.uns[key_added] = {"params": params, "table": table, "scfm_version": __version__}
    agreement = _agreement(table)
    if len(agreement):
        adata.uns[key_added]["agreement"] = agreement
    _logging.info("    finished", time=start, deep=f"added\n    {key_added!r}, interactions (adata.uns)")
    return adata if copy else None


def _singles(pairs: Sequence[str]) -> list[str]:
    return sorted({gene for name in pairs for gene in genes_of(name)})


def _pairs(pairs: Sequence[str] | None, measured: set[str], known: set[str], singles: str) -> list[str]:
    """Canonical names of the pairs, or the measured ones."""
    if pairs is None:
        chosen = sorted(name for name in measured if len(genes_of(name)) == 2)
    else:
        chosen = list(dict.fromkeys(canonical(parse_perturbation(name, known=known | measured)) for name in pairs))
    if wrong := [name for name in chosen if len(genes_of(name)) != 2]:
        msg = f"an interaction has two genes; these have not: {', '.join(wrong[:_SHOWN])}"
        raise ValueError(msg)
    lost = [name for name in chosen if singles == "measured" and not set(genes_of(name)) <= measured]
    if lost:
        what = f"a gene that was not measured alone: {', '.join(lost[:_SHOWN])}{' ...' if len(lost) > _SHOWN else ''}"
        if pairs is not None:
            msg = f"these pairs have {what}; compare them with singles='predicted' and a model, or leave them out"
            raise ValueError(msg)
        _logging.warning(f"{len(lost):,} measured pairs are left out, because they have {what}")
        chosen = [name for name in chosen if name not in lost]
    if not chosen:
        msg = (
            "there is no measured pair with both genes measured alone; give pairs= and singles='predicted' with a model"
        )
        raise ValueError(msg)
    return chosen


def _robust_genes(measured: Measured, genes: Sequence[str] | None, min_mean: float) -> np.ndarray:
    names = measured.means.columns
    kept = (measured.means.loc[CONTROL] >= min_mean).to_numpy()
    if genes is not None:
        if unknown := sorted(set(map(str, genes)) - set(names)):
            msg = f"the data have no gene {', '.join(unknown[:_SHOWN])}"
            raise KeyError(msg)
        kept &= names.isin(list(map(str, genes)))
    if kept.sum() < 3:
        msg = f"{int(kept.sum())} genes are left for the fit, and three are needed; lower min_mean= or give more genes="
        raise ValueError(msg)
    return kept


def _called(table: pd.DataFrame, n_calls: int) -> pd.DataFrame:
    """Add the calls: pairs of the largest and smallest magnitudes of each source."""
    for magnitude in _MAGNITUDES.values():
        column = magnitude.replace("magnitude", "call")
        table[column] = ""
        for _, part in table.groupby("source", sort=False):
            order = part[magnitude].sort_values(kind="stable").index
            n = min(n_calls, len(order) // 2)
            table.loc[order[len(order) - n :], column] = _CALLS[0]
            table.loc[order[:n], column] = _CALLS[1]
    return table


def _agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How predicted magnitudes and calls agree with measured ones."""
    if not {"measured", "predicted"} <= set(table["source"]):
        return pd.DataFrame()
    rows = []
    for method, magnitude in _MAGNITUDES.items():
        wide = table.pivot_table(index="pair", columns="source", values=magnitude).dropna()
        calls = table.pivot_table(
            index="pair", columns="source", values=magnitude.replace("magnitude", "call"), aggfunc="first"
        ).loc[wide.index]
        enough = len(wide) > 2
        row = {"method": method, "n_pairs": len(wide)}
        for name in ("pearson", "spearman"):
            row[name] = wide["measured"].corr(wide["predicted"], method=name) if enough else np.nan
        for call in _CALLS:
            row[call] = int(((calls["measured"] == call) & (calls["predicted"] == call)).sum())
            row[f"{call} (measured)"] = int((calls["measured"] == call).sum())
        rows.append(row)
    return pd.DataFrame(rows)
