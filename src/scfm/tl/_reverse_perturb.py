"""Which perturbation leads to cells like these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import __version__, _keys, _logging
from ..tasks.neighbors import find_neighbors
from ..tasks.perturbation_data import CONTROL, canonical_of, genes_of
from ._inputs import check_can_hold_results, seed_of
from ._responses import candidate_names, control_cells, expression, mean_profiles, open_models, predictions, some_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from ._responses import Predictor, ResponseModel

_MOST_BYTES = 4 * 2**30


def reverse_perturb(
    adata: AnnData,
    model: Predictor | Sequence[Predictor],
    candidates: Sequence[str] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    groupby: str = _keys.PERTURBATION_OF_CELL,
    genes: Sequence[str] | None = None,
    control: AnnData | None = None,
    method: Literal["vote", "mean"] = "vote",
    n_profiles: int = 40,
    k: int = 10,
    n_top: int = 10,
    batch_size: int | None = None,
    key_added: str = _keys.REVERSE_PERTURB,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Rank perturbations by how much cells after them would look like the cells of a group.

    Every candidate is predicted for the same control cells. With ``method="vote"`` (scGPT) each cell of the group looks for the
    ``k`` nearest of all predicted profiles, exactly and by Euclidean distance, and these vote for their candidates; with
    ``"mean"`` (CellFM) candidates are ranked by the distance of their mean profile to that of the group.

    Parameters
    ----------
    adata
        Annotated data with the cells of the groups, and control cells unless ``control`` is given.
    model
        A trained model or several, as in :func:`scfm.tl.perturb`.
    candidates
        Perturbations to choose among; by default all of one and of two of ``genes``.
    target
        Groups to explain; by default all perturbations of the data, which can be named in any usual spelling. A group can be
        anything, such as a healthy state.
    groupby
        Column of ``obs`` with the groups. With the one of :func:`scfm.pp.perturbation_setup`, answers are compared with what was
        done.
    genes
        Genes whose perturbations are candidates; by default those that are perturbed in the data and that the model can perturb.
    control
        Control cells; by default those of ``adata``.
    method
        ``"vote"`` or ``"mean"``.
    n_profiles
        Control cells that each candidate is predicted for, drawn at random. (Mean profiles use them, too.)
    k
        Neighbours of each cell that vote.
    n_top
        Ranks to report, and to count hits for.
    batch_size
        Cells of a block of predictions.
    key_added
        Name of the results.
    rng
        Seed or generator of the control cells that are drawn, and of what a model draws.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. Sets ``.uns["reverse_perturb"]``:

    ``ranking``
        For each target the best candidates: ``rank``, ``candidate``, ``votes`` and ``share`` of all votes (or ``distance``), and
        where the answer is known, whether it is ``exact`` or ``relevant`` (shares a gene).
    ``hits``
        Share of the targets with an exact, or relevant, candidate among the first K; targets that are no candidate cannot be hit
        and do not count. Absent where no answer is known.
    ``params``, ``candidates``
        Arguments, and all candidates.

    Raises
    ------
    KeyError
        If a column or group does not exist.
    ValueError
        If a gene cannot be perturbed, there are no candidates or control cells, or a number makes no sense.
    MemoryError
        If the profiles of all candidates would not fit.

    References
    ----------
    Cui et al., scGPT, Nature Methods 21, 1470 (2024); Zeng et al., CellFM, Nature Communications 16, 4679 (2025).
    """
    if method not in ("vote", "mean"):
        msg = f"method must be 'vote' or 'mean'; got {method!r}"
        raise ValueError(msg)
    if min(n_profiles, k, n_top) < 1:
        msg = "n_profiles, k and n_top must be at least 1"
        raise ValueError(msg)
    if groupby not in adata.obs:
        msg = f"obs has no column {groupby!r}; run scfm.pp.perturbation_setup first, or name a column with groupby="
        raise KeyError(msg)
    models, seed = open_models(model), seed_of(rng)
    labels = adata.obs[groupby].astype(str).to_numpy()
    targets = _targets(target, labels, groupby)
    names = candidate_names(candidates, genes, models, adata)
    check_can_hold_results(adata)
    adata = adata.copy() if copy else adata
    start = _logging.info(f"ranking {len(names):,} perturbations for {len(targets):,} groups of cells")
    cells = some_cells(control_cells(adata, control), n_profiles, np.random.default_rng(seed))
    _check_same_genes(adata, cells)
    if method == "vote":
        profiles = _profiles(models, names, cells, batch_size, seed)
        k = min(k, len(profiles))
    else:
        profiles = mean_profiles(models, names, cells, batch_size=batch_size, seed=seed)
    parts = []
    for group in targets:
        query = expression(adata[labels == group], models)
        if method == "vote":
            scores = _votes(profiles, query, k, len(names))
        else:
            mean = np.asarray(query.mean(0), dtype=np.float64).ravel()
            scores = pd.DataFrame({"distance": np.linalg.norm(profiles - mean, axis=1)})
            scores = scores.sort_values("distance", kind="stable")
        best = scores.iloc[:n_top]
        parts.append(
            pd.DataFrame(
                {
                    "target": group,
                    "rank": np.arange(1, len(best) + 1),
                    "candidate": np.asarray(names, dtype=str)[best.index],
                }
                | {name: best[name].to_numpy() for name in best}
            )
        )
    ranking = pd.concat(parts, ignore_index=True)
    params: dict[str, Any] = {
        "groupby": groupby,
        "method": method,
        "n_profiles": cells.n_obs,
        "n_top": n_top,
        "rng": seed,
    }
    params |= {"n_models": len(models)} | ({"k": k} if method == "vote" else {})
    adata.uns[key_added] = {"params": params, "candidates": np.asarray(names, dtype=str), "scfm_version": __version__}
    if groupby == _keys.PERTURBATION_OF_CELL:
        ranking = _judged(ranking)
        hits = _hits(ranking, set(names), n_top)
        if len(hits):
            adata.uns[key_added]["hits"] = hits
    adata.uns[key_added]["ranking"] = ranking
    _logging.info("    finished", time=start, deep=f"added\n    {key_added!r}, ranked perturbations (adata.uns)")
    return adata if copy else None


def _targets(target: str | Sequence[str] | None, labels: np.ndarray, groupby: str) -> list[str]:
    there = sorted(set(labels) - {CONTROL})
    if target is None:
        return there
    chosen = [target] if isinstance(target, str) else list(map(str, target))
    if groupby == _keys.PERTURBATION_OF_CELL:
        known = {gene for name in there for gene in genes_of(name)}
        chosen = [name if name in there else canonical_of(name, known) for name in chosen]
    if unknown := [name for name in chosen if name not in set(labels)]:
        msg = f"obs[{groupby!r}] has no group {', '.join(unknown[:10])}; there are {', '.join(there[:10])}"
        raise KeyError(msg)
    return list(dict.fromkeys(chosen))


def _check_same_genes(adata: AnnData, cells: AnnData) -> None:
    if not adata.var_names.equals(cells.var_names):
        msg = "control cells and the cells of the groups need the same genes in the same order"
        raise ValueError(msg)


def _profiles(
    models: list[ResponseModel], names: list[str], cells: AnnData, batch_size: int | None, seed: int
) -> np.ndarray:
    """Predicted profiles of all candidates, those of a candidate together, ``(candidates * cells, genes)``."""
    size = 4 * len(names) * cells.n_obs * cells.n_vars
    if size > _MOST_BYTES:
        msg = f"profiles of all candidates need {size / 2**30:,.1f} GiB; lower n_profiles=, choose candidates=, or method='mean'"
        raise MemoryError(msg)
    out = np.empty((len(names), cells.n_obs, cells.n_vars), dtype=np.float32)
    place = {name: number for number, name in enumerate(names)}
    for name, rows, values in predictions(models, names, cells, batch_size=batch_size, seed=seed):
        out[place[name], rows] = values.mean(0)
    return out.reshape(-1, cells.n_vars)


def _votes(profiles: np.ndarray, query: Any, k: int, n_candidates: int) -> pd.DataFrame:
    """Votes for each candidate, most first; of equal ones, the one with the nearest profile first."""
    found = find_neighbors(profiles, query.toarray(), k)
    codes = found.indices // (len(profiles) // n_candidates)
    votes = np.bincount(codes[codes >= 0], minlength=n_candidates)
    nearest = np.full(n_candidates, np.inf)
    np.minimum.at(nearest, codes[codes >= 0], found.distances[codes >= 0])
    table = pd.DataFrame({"votes": votes, "share": votes / max(votes.sum(), 1), "nearest": nearest})
    order = np.lexsort((np.arange(n_candidates), nearest, -votes))
    return table.iloc[order].drop(columns="nearest")


def _judged(ranking: pd.DataFrame) -> pd.DataFrame:
    """Add whether candidates are what was done, or share a gene with it."""
    pairs = list(zip(ranking["target"], ranking["candidate"], strict=True))
    return ranking.assign(
        exact=[target == name for target, name in pairs],
        relevant=[bool(set(genes_of(target)) & set(genes_of(name))) for target, name in pairs],
    )


def _hits(ranking: pd.DataFrame, candidates: set[str], n_top: int) -> pd.DataFrame:
    """Share of targets with a hit among the first K, over targets that can be hit."""
    usable = ranking[ranking["target"].isin(candidates - {CONTROL})]
    if usable.empty:
        return pd.DataFrame()
    first = {
        kind: usable[usable[kind]].groupby("target")["rank"].min().reindex(usable["target"].unique())
        for kind in ("exact", "relevant")
    }
    ranks = np.arange(1, n_top + 1)
    shares = {kind: [(places <= top).mean() for top in ranks] for kind, places in first.items()}
    return pd.DataFrame({"K": ranks, **shares, "n_targets": usable["target"].nunique()})
