"""Predicted responses to perturbations: models beside means, sums, linear models and the noise of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from sklearn.decomposition import TruncatedSVD

from .. import _keys, _logging
from ..baselines import (
    ShiftedCells,
    additive,
    half_split,
    matching_mean,
    no_change,
    perturbed_mean,
    random_gene_vectors,
    ridge_linear,
)
from ..metrics import (
    condition_means,
    de_overlap,
    de_quantiles,
    discrimination_scores,
    e_distance,
    perturbation_scores,
)
from ..models._perturbation_data import ExpressionRule, default_split, gene_symbols_of, require_setup, settled_split
from ..tasks.perturbation_data import CONTROL, PerturbationSplit, genes_of
from ..tl._responses import Measured, open_models
from ._cells import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from ..baselines import PerturbationBaseline
    from ..tl._responses import Predictor, ResponseModel

    Fit = Callable[[AnnData, PerturbationSplit, int], ResponseModel]

_TASK = "perturbation"
_BASELINES = ("no_change", "perturbed_mean", "matching_mean", "additive", "ridge_pca", "ridge_random")
_MEANS = {
    "no_change": no_change,
    "perturbed_mean": perturbed_mean,
    "matching_mean": matching_mean,
    "additive": additive,
}
_CEILING = "half of the cells"
_COMPONENTS = 30
_RANDOM_DIM = 10
_FLAT = 1e-9
_UNSEEN_TYPE = "unseen_cell_type"
# of published splits
_SPLIT_SEED = 1


def perturbation(
    adata: AnnData,
    models: Mapping[str, Predictor | Sequence[Predictor] | Fit] | None = None,
    *,
    split: PerturbationSplit | Mapping[str, Iterable[str]] | None = None,
    baselines: Sequence[str] | None = None,
    gene_vectors: Mapping[str, pd.DataFrame] | None = None,
    ceiling: bool = True,
    n_cells: int = 300,
    by: Literal["subgroup", "condition"] = "subgroup",
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Compare predictions of perturbations that training has not seen, all methods on the same perturbations and cells.

    A perturbation that a model cannot predict counts as no change, and the share of those that it can is in the table. Where no
    change is predicted, its correlation with the measured change is 0.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.pp.perturbation_setup`. It is not changed.
    models
        For each name: a trained :class:`scfm.models.GeneticPerturbation` or its folder, one of them for each seed, or a function
        that trains one from ``(data, split, seed)``. They must not have been trained on what is tested.
    split
        Which perturbations are tested on, also as a mapping with ``"train"``, ``"validation"`` and ``"test"``; by default that of
        the first model, without models the one of GEARS with seed 1. Splits that hold out cell types test on the
        trained perturbations in cells of these types; the setup then needs ``cell_type_key``. Baselines take shifts from the cells
        of the other types, and add them to control cells of these.
    baselines
        ``"no_change"``, ``"perturbed_mean"``, ``"matching_mean"``, ``"additive"``, ``"ridge_pca"`` and ``"ridge_random"`` (the
        linear model with principal components, and with random vectors); by default all that the data allow. See
        ``scfm.baselines``.
    gene_vectors
        Vectors of genes for further linear models, by the name of where they come from, such as the gene embeddings of a model.
    ceiling
        Whether to add how well one half of the cells of a perturbation predicts the other.
    n_cells
        At most so many control cells to predict from, and cells of a perturbation to compare with by E-distance.
    by
        Average over the perturbations of each ``"subgroup"``, or give each ``"condition"``.
    seeds
        Seeds of everything random.
    batch_size
        Cells of a block of predictions.

    Returns
    -------
    Tidy table in the form of :func:`scfm.benchmark.cells`; ``held_out`` is the subgroup (``unseen_single``, ``combo_seen0`` ...)
    or the perturbation, ``kind`` also ``"ceiling"``. Scores are those of :func:`scfm.metrics.perturbation_scores` (over the changed
    genes of the setup, those without dropouts, and quantiles of 45% and 55% over the cells of a perturbation),
    :func:`~scfm.metrics.discrimination_scores` (over all test perturbations), :func:`~scfm.metrics.de_overlap` and
    :func:`~scfm.metrics.e_distance` (30 principal components of the training cells); ``conditions`` counts perturbations, and
    ``predicted`` is the share that the model can predict.

    Raises
    ------
    ValueError
        If the data are not prepared, no test perturbation has cells, a model was trained on one, or a baseline or option is
        unknown.

    References
    ----------
    Ahlmann-Eltze et al., Nature Methods 22, 1657 (2025); Viñas Torné et al., Systema, Nature Biotechnology (2025); Wu et al.,
    PerturBench, arXiv 2408.10609 (2024).

    Examples
    --------
    >>> import scfm
    >>> table = scfm.benchmark.perturbation(adata, {"GEARS": model}, split=model.split)  # doctest: +SKIP
    >>> scfm.pl.benchmark(table, ["DE MSE", "Pearson delta", "centroid accuracy"])  # doctest: +SKIP
    """
    require_setup(adata)
    if by not in ("subgroup", "condition"):
        msg = f"by must be 'subgroup' or 'condition'; got {by!r}"
        raise ValueError(msg)
    if n_cells < 2:
        msg = f"n_cells must be at least 2; got {n_cells!r}"
        raise ValueError(msg)
    chosen = _BASELINES if baselines is None else tuple(baselines)
    if unknown := [name for name in chosen if name not in _BASELINES]:
        msg = f"there is no baseline {', '.join(map(repr, unknown))}; choose among {', '.join(_BASELINES)}"
        raise ValueError(msg)
    if split is None:
        split = _default_split(adata, models or {})
    elif isinstance(split, Mapping):
        split = settled_split(split, adata, _SPLIT_SEED)
    bench = _Bench.of(adata, split, n_cells, by)
    start = _logging.info(f"comparing predictions of {len(bench.names):,} perturbations")
    rows: list[tuple[Any, ...]] = []
    for seed in seeds:
        draw = bench.drawn(seed)
        made: dict[str, tuple[str, Callable[[], ResponseModel]]] = {}
        for name in chosen:
            made[_label(name)] = ("baseline", partial(_shifted, bench, name, None, seed))
        for name, vectors in (gene_vectors or {}).items():
            made[_label(f"ridge_{name}")] = ("baseline", partial(_shifted, bench, f"ridge_{name}", vectors, seed))
        for name, model in (models or {}).items():
            made[name] = ("model", partial(_fitted, model, adata, split, seed, list(seeds).index(seed)))
        for name, (kind, make) in made.items():
            try:
                one = make()
            except _NoVectorsError as error:
                if baselines is not None:
                    raise ValueError(str(error)) from None
                _logging.info(f"    {name} is left out: {error}")
                continue
            if not split.held_out_cell_types:
                _check_unseen(name, one, bench.names)
            rows += bench.scored((_TASK, kind, name, ""), seed, *bench.predicted(one, draw, batch_size, kind), draw)
        if ceiling:
            rows += bench.ceiling((_TASK, "ceiling", _CEILING, ""), seed)
    _logging.info("    finished", time=start)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def perturbation_baseline(
    adata: AnnData,
    baseline: str,
    *,
    split: PerturbationSplit | Mapping[str, Iterable[str]] | None = None,
    vectors: pd.DataFrame | None = None,
    seed: int = 0,
) -> ShiftedCells:
    """A baseline as a model, for :func:`scfm.tl.perturb` and the other tools, and for plots beside a model.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.pp.perturbation_setup`.
    baseline
        ``"no_change"``, ``"perturbed_mean"``, ``"matching_mean"``, ``"additive"``, ``"ridge_pca"``, ``"ridge_random"``, or any
        name with ``vectors``.
    split
        What may be learned from; by default all perturbations of the data. Nothing is learned from cell types that are held out.
    vectors
        Vectors of genes for the linear model.
    seed
        Seed of random vectors.

    Raises
    ------
    ValueError
        If the data are not prepared, the baseline is unknown, no perturbation of ``split.train`` has cells, or no perturbed gene
        has a vector.
    """
    require_setup(adata)
    if baseline not in _BASELINES and vectors is None:
        msg = f"there is no baseline {baseline!r}; choose among {', '.join(_BASELINES)}, or give vectors="
        raise ValueError(msg)
    if split is None:
        split = PerturbationSplit([name for name in Measured.of(adata).means.index if name != CONTROL])
    elif isinstance(split, Mapping):
        split = settled_split(split, adata, _SPLIT_SEED)
    values, rule = _read(adata)
    means = _training_means(adata, values, split)
    made = _baseline(means, baseline, vectors, seed, gene_symbols_of(adata).astype(str))
    return ShiftedCells(made, lambda cells: rule.read(cells)[0])


class _NoVectorsError(ValueError):
    """No perturbed gene has a vector."""


def _default_split(adata: AnnData, models: Mapping[str, Any]) -> PerturbationSplit:
    """That of the first model, else the one of GEARS for the spelling of the data."""
    for model in models.values():
        for one in model if isinstance(model, (list, tuple)) else [model]:
            if isinstance(getattr(one, "split", None), PerturbationSplit):
                return one.split
    return default_split(adata, _SPLIT_SEED)


def _check_unseen(name: str, model: ResponseModel, tested: Sequence[str]) -> None:
    """Raise ``ValueError`` if a model says that it was trained on what is tested."""
    split = getattr(model, "split", None)
    if isinstance(split, PerturbationSplit) and (seen := {*split.train, *split.validation} & set(tested)):
        msg = f"{name} was trained on {', '.join(sorted(seen)[:10])}, which are tested; give the split that it was trained on"
        raise ValueError(msg)


def _label(name: str) -> str:
    if name.startswith("ridge_"):
        rest = name.removeprefix("ridge_")
        return f"linear, {'PCA' if rest == 'pca' else rest} vectors"
    return name.replace("_", " ")


def _labels(adata: AnnData) -> np.ndarray:
    return adata.obs[_keys.PERTURBATION_OF_CELL].to_numpy(dtype=str)


def _types(adata: AnnData, split: PerturbationSplit) -> np.ndarray | None:
    if not split.held_out_cell_types:
        return None
    key = adata.uns[_keys.PERTURBATION]["params"].get("cell_type_key")
    if key is None:
        msg = "the split holds out cell types; run scfm.pp.perturbation_setup with cell_type_key="
        raise ValueError(msg)
    return adata.obs[str(key)].to_numpy(dtype=str)


def _placed(known: Mapping[str, np.ndarray], names: Sequence[str], genes: pd.Index) -> list[np.ndarray] | None:
    """Positions of the changed genes of perturbations; ``None`` unless all have some."""
    chosen = [genes.get_indexer(known.get(name, [])) for name in names]
    chosen = [places[places >= 0] for places in chosen]
    return chosen if all(map(len, chosen)) else None


def _read(adata: AnnData) -> tuple[csr_matrix, ExpressionRule]:
    rule = ExpressionRule.of(adata)
    return rule.read(adata)[0], rule


def _training_means(adata: AnnData, values: csr_matrix, split: PerturbationSplit) -> pd.DataFrame:
    """Mean expression of control and of each perturbation in the cells that baselines learn from.

    Control cells of held-out types are not among them: none of their perturbed cells are, so that the difference between types
    would be part of every shift.
    """
    labels, types = _labels(adata), _types(adata, split)
    fit = split.of_cells(labels, types) == "train"
    if types is not None:
        fit &= ~np.isin(types, list(split.held_out_cell_types))
    if not set(labels[fit]) - {CONTROL}:
        msg = "no perturbation of split.train has cells"
        raise ValueError(msg)
    means = condition_means(values[np.flatnonzero(fit)], labels[fit])
    means.columns = adata.var_names.astype(str)
    return means


def _baseline(
    means: pd.DataFrame, name: str, vectors: pd.DataFrame | None, seed: int, symbols: np.ndarray
) -> PerturbationBaseline:
    """A baseline over the genes of ``means``, which perturbations name by ``symbols``."""
    genes = means.columns
    made = _made(means.set_axis(symbols, axis=1), name, vectors, seed)
    return replace(made, control=made.control.set_axis(genes))


def _made(means: pd.DataFrame, name: str, vectors: pd.DataFrame | None, seed: int) -> PerturbationBaseline:
    if name in _MEANS:
        return _MEANS[name](means)
    if vectors is None and name == "ridge_random":
        genes = sorted({gene for condition in means.index for gene in genes_of(condition)})
        vectors = random_gene_vectors(genes, _RANDOM_DIM, random_state=seed)
    perturbed = {gene for condition in means.index for gene in genes_of(condition)}
    there = means.columns if vectors is None else vectors.index.astype(str)
    if not perturbed & set(there):
        msg = "no gene that is perturbed in training has a vector"
        raise _NoVectorsError(msg)
    return ridge_linear(means, vectors, name=_label(name))


def _shifted(bench: _Bench, name: str, vectors: pd.DataFrame | None, seed: int) -> ShiftedCells:
    if name == "ridge_random":
        # genes that are tested on have vectors, too, as those of a model do
        genes = sorted({gene for condition in [*bench.train.index, *bench.names] for gene in genes_of(condition)})
        vectors = random_gene_vectors(genes, _RANDOM_DIM, random_state=seed)
    return ShiftedCells(_baseline(bench.train, name, vectors, seed, gene_symbols_of(bench.adata).astype(str)))


def _fitted(model: Any, adata: AnnData, split: PerturbationSplit, seed: int, number: int) -> ResponseModel:
    if isinstance(model, (list, tuple)):
        model = model[number]
    if callable(model) and not hasattr(model, "iter_predictions"):
        model = model(adata, split, seed)
    return open_models(model)[0]


@dataclass(frozen=True, eq=False)
class _Draw:
    """Control cells that predictions start from, and cells that they are compared with, by group of cells."""

    seed: int
    controls: dict[str, np.ndarray]
    observed: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class _Bench:
    """Test perturbations, what is known of them, and how they are scored."""

    adata: AnnData
    values: csr_matrix
    train: pd.DataFrame
    names: list[str]
    groups: list[str]
    subgroups: list[str]
    cells: list[np.ndarray]
    controls: dict[str, np.ndarray]
    de_genes: list[np.ndarray] | None
    non_dropout: list[np.ndarray] | None
    quantiles: tuple[np.ndarray, np.ndarray] | None
    components: TruncatedSVD
    n_cells: int
    by: str

    @classmethod
    def of(cls, adata: AnnData, split: PerturbationSplit, n_cells: int, by: str) -> _Bench:
        values, _ = _read(adata)
        labels, types = _labels(adata), _types(adata, split)
        part = split.of_cells(labels, types)
        fit = np.flatnonzero(part == "train")
        train = _training_means(adata, values, split)
        groups: dict[str, np.ndarray] = {"": np.ones(len(labels), dtype=bool)}
        wanted = [(name, "") for name in split.test]
        if types is not None:
            groups = {name: types == name for name in split.held_out_cell_types}
            wanted = [(name, group) for group in groups for name in (*split.train, *split.test)]
        subgroup = {name: key for key, members in split.subgroups.items() for name in members}
        units = []
        for name, group in wanted:
            cells = np.flatnonzero((labels == name) & groups[group])
            if len(cells) >= 2:
                units.append((name, group, f"{_UNSEEN_TYPE}: {group}" if group else subgroup.get(name, "test"), cells))
        if not units:
            msg = "no perturbation that is tested on has two cells; look at split.test"
            raise ValueError(msg)
        controls = {group: np.flatnonzero((labels == CONTROL) & there) for group, there in groups.items()}
        if few := [group for group, cells in controls.items() if len(cells) < 2]:
            msg = f"there are fewer than two control cells{' of ' + ', '.join(few) if types is not None else ''}"
            raise ValueError(msg)
        measured = Measured.of(adata)
        chosen, non_dropout = (
            _placed(known, [name for name, *_ in units], adata.var_names.astype(str))
            for known in (measured.de_genes, measured.non_dropout_de_genes)
        )
        n_components = min(_COMPONENTS, min(len(fit), adata.n_vars) - 1)
        components = TruncatedSVD(n_components, random_state=0).fit(values[fit])
        names, of_group, of_subgroup, cells = map(list, zip(*units, strict=True))
        quantiles = None
        if chosen is not None:
            which = np.char.mod("%06d", np.repeat(np.arange(len(cells)), list(map(len, cells))))
            quantiles = tuple(side.to_numpy() for side in de_quantiles(values[np.concatenate(cells)], which, chosen))
        return cls(
            adata, values, train, names, of_group, of_subgroup, cells, controls, chosen, non_dropout, quantiles, components,
            n_cells, by,
        )  # fmt: skip

    def drawn(self, seed: int) -> _Draw:
        """Cells of a seed."""
        rng = np.random.default_rng(seed)

        def some(cells: np.ndarray) -> np.ndarray:
            if len(cells) <= self.n_cells:
                return cells
            return np.sort(rng.choice(cells, self.n_cells, replace=False))

        return _Draw(
            seed, {group: some(cells) for group, cells in self.controls.items()}, [some(c) for c in self.cells]
        )

    def predicted(
        self, model: ResponseModel, draw: _Draw, batch_size: int | None, kind: str
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Mean and principal components of the predicted cells of each test perturbation, and which are predicted."""
        known = {str(gene) for gene in model.perturbable}
        shape = len(self.names), self.values.shape[1]
        means, parts = np.zeros(shape), [[] for _ in self.names]
        # baselines say what they take for all where they know nothing
        anything = getattr(model, "answers_for_any_gene", False)
        able = np.array([anything or set(genes_of(name)) <= known for name in self.names])
        for group, cells in draw.controls.items():
            places = {name: n for n, (name, of) in enumerate(zip(self.names, self.groups, strict=True)) if of == group}
            asked = [name for name, n in places.items() if able[n]]
            control = self._controls(cells, kind)
            for name, _, values in model.iter_predictions(asked, control, batch_size, seed=draw.seed) if asked else ():
                n = places[name]
                means[n] += values.sum(0, dtype=np.float64) / len(cells)
                parts[n].append(self.components.transform(values))
            for name, n in places.items():
                if name not in asked:
                    means[n] = np.asarray(self.values[cells].mean(0)).ravel()
                    parts[n].append(self.components.transform(self.values[cells]))
        if isinstance(model, ShiftedCells):
            # cells that are cut off at zero have other means
            changes = model.baseline.predict_means(self.names) - model.baseline.control
            means = changes.to_numpy() + np.stack([self._control_mean(group) for group in self.groups])
        return means, [np.concatenate(blocks) for blocks in parts], able

    def _control_mean(self, group: str) -> np.ndarray:
        return np.asarray(self.values[self.controls[group]].mean(0), dtype=np.float64).ravel()

    def _controls(self, cells: np.ndarray, kind: str) -> AnnData:
        """Control cells as a model reads them; baselines take log-normalised values."""
        if kind != "baseline":
            return self.adata[cells]
        from anndata import AnnData

        return AnnData(self.values[cells], var=self.adata.var[[]].copy())

    def scored(
        self,
        key: tuple[str, ...],
        seed: int,
        means: np.ndarray,
        projected: list[np.ndarray],
        able: np.ndarray,
        draw: _Draw,
    ) -> list[tuple[Any, ...]]:
        """Rows of the table."""
        observed = np.stack([np.asarray(self.values[cells].mean(0)).ravel() for cells in self.cells])
        distances = [
            e_distance(ours, self.components.transform(self.values[cells]))
            for ours, cells in zip(projected, draw.observed, strict=True)
        ]
        extra = {"E-distance": np.array(distances), "predicted": able.astype(float)}
        return self._rows(key, seed, self._scores(observed, means, np.ones(len(means), dtype=bool)), extra)

    def ceiling(self, key: tuple[str, ...], seed: int) -> list[tuple[Any, ...]]:
        """One half of the cells of a perturbation, in place of a prediction of the other."""
        which = np.repeat(np.arange(len(self.cells)), list(map(len, self.cells)))
        labels = np.char.mod("%06d", which)
        all_cells = np.concatenate(self.cells)
        first, second = half_split(self.values[all_cells], labels, random_state=seed)
        rng = np.random.default_rng(seed)
        distances = []
        for cells in self.cells:
            halves = np.array_split(rng.permutation(cells)[: 2 * self.n_cells], 2)
            ours = [self.components.transform(self.values[half]) for half in halves]
            distances.append(e_distance(*ours) if min(map(len, halves)) > 1 else np.nan)
        scores = self._scores(second.to_numpy(), first.to_numpy(), np.ones(len(first), dtype=bool))
        return self._rows(key, seed, scores, {"E-distance": np.array(distances)})

    def _scores(self, observed: np.ndarray, means: np.ndarray, there: np.ndarray) -> pd.DataFrame:
        centroid = self.train.drop(index=CONTROL).to_numpy().mean(0)
        parts = []
        for group in self.controls:
            rows = np.flatnonzero(there & (np.asarray(self.groups) == group))
            if not len(rows):
                continue
            control = self._control_mean(group)
            few, others = (
                None if genes is None else [genes[row] for row in rows] for genes in (self.de_genes, self.non_dropout)
            )
            changed = {"de_genes": few, "non_dropout_de_genes": others}
            if self.quantiles is not None:
                changed["quantiles"] = tuple(side[rows] for side in self.quantiles)
            tables = [
                perturbation_scores(observed[rows], means[rows], control, centroid=centroid, **changed),
                *([] if few is None else [de_overlap(observed[rows], means[rows], control, few)]),
                *(
                    []
                    if others is None
                    else [de_overlap(observed[rows], means[rows], control, others).add_prefix("non-dropout ")]
                ),
                *([discrimination_scores(observed[rows], means[rows])] if len(rows) > 1 else []),
            ]
            table = pd.concat(tables, axis=1).set_axis(rows)
            # who predicts the same change for all genes has told nothing about their order
            flat = np.ptp(means[rows] - control, axis=1) <= _FLAT
            table.loc[flat, [name for name in table if name.endswith("Pearson delta")]] = 0.0
            parts.append(table)
        return pd.concat(parts).sort_index()

    def _rows(
        self, key: tuple[str, ...], seed: int, scores: pd.DataFrame, extra: Mapping[str, np.ndarray]
    ) -> list[tuple[Any, ...]]:
        scores = scores.assign(**extra)
        out: list[tuple[Any, ...]] = []
        if self.by == "condition":
            held_out: Iterable[tuple[str, np.ndarray]] = (
                (f"{name}, {group}" if group else name, np.array([n]))
                for n, (name, group) in enumerate(zip(self.names, self.groups, strict=True))
            )
        else:
            held_out = (
                (group, np.flatnonzero(np.asarray(self.subgroups) == group)) for group in dict.fromkeys(self.subgroups)
            )
        for name, rows in held_out:
            means = scores.iloc[rows].mean()
            out += [(*key, name, seed, metric, float(value)) for metric, value in means.items()]
            out.append((*key, name, seed, "conditions", float(len(rows))))
        return out
