"""Cell types and integration: models beside their baselines, over held-out batches and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .. import _logging
from .._columns import ColumnMap
from .._label_names import label_names
from .._optional import require
from ..backbones import random_copy
from ..backbones._task_weights import weights_for
from ..baselines import harmony, hvg_pca, knn_labels, logistic_labels, majority_labels, scvi_latent, shuffled_labels
from ..metrics import annotation_scores, integration_scores
from ..models import BatchIntegrator, CellTypeClassifier
from ..models._splits import held_out_within
from ..tasks.linear import linear_votes
from ..tasks.neighbors import find_neighbors, vote
from ..tl import embed, integrate
from ..tl._inputs import load_backbone, result_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ..backbones import Backbone
    from ..tl._inputs import Model

Task = Literal["annotation", "integration"]
Method = Literal["knn", "linear", "finetune", "zero-shot"]

COLUMNS = ("task", "kind", "name", "method", "held_out", "seed", "metric", "value")
_TASKS = ("annotation", "integration")
_SPLITS = ("groups", "within")
_WITHIN = "within (optimistic)"
_METHODS = {"annotation": ("knn", "linear", "finetune"), "integration": ("zero-shot", "finetune")}
_BASELINES = {
    "annotation": ("hvg_pca", "knn", "logistic", "majority", "shuffled"),
    "integration": ("hvg_pca", "harmony", "scvi", "shuffled"),
}
_DEFAULT_BASELINES = {
    "annotation": ("hvg_pca", "logistic", "majority", "shuffled"),
    "integration": ("hvg_pca", "harmony", "shuffled"),
}
_NAMES = {
    "hvg_pca": "HVG + PCA",
    "knn": "HVG",
    "logistic": "HVG",
    "majority": "largest class",
    "shuffled": "shuffled labels",
    "harmony": "Harmony",
    "scvi": "scVI",
}
_K = 10


def cells(
    adata: AnnData,
    models: Model | Sequence[Model],
    *,
    labels_key: str,
    batch_key: str | None = None,
    task: Task = "annotation",
    methods: Sequence[Method] | None = None,
    split_by: str | None = None,
    held_out: Sequence[str] | None = None,
    split: Literal["groups", "within"] = "groups",
    baselines: Sequence[str] | None = None,
    random_weights: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    layer: str | None = None,
    train: Mapping[str, Any] | Mapping[str, Mapping[str, Any]] | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Compare models with each other and with what needs no foundation model.

    For annotation, each batch (donor, study) in turn is labelled with the cells of the others; no cell of a batch that
    is predicted is ever trained on. Cells of a type that the others do not have cannot be labelled; they are left out of
    the scores, and their share is in the table. For integration, all cells are embedded, and the scores are those of
    :func:`scfm.metrics.integration_scores`.

    Parameters
    ----------
    adata
        Annotated data with counts and labels. It is not changed. Columns with the same gene name are summed.
    models
        Model or models, as in :func:`scfm.tl.embed`.
    labels_key
        Column of ``obs`` with the cell types; cells without one are left out.
    batch_key
        Column of ``obs`` with the batches. Integration needs it.
    task
        ``"annotation"`` or ``"integration"``.
    methods
        What is done with each model: ``"knn"``, ``"linear"`` and ``"finetune"`` for annotation, ``"zero-shot"`` and
        ``"finetune"`` for integration. By default everything but fine-tuning, which takes long.
    split_by
        Column of ``obs`` whose groups are held out for annotation; by default ``batch_key``.
    held_out
        Which of the groups; by default all, one after the other.
    split
        ``"groups"`` holds out whole groups. ``"within"`` tests on 30 % of the cells of each type in each group, as CellFM
        does within a data set (seed 0). The model has then seen cells of the same donors and batches, so that the scores are
        too good for cells of new ones; the table calls this ``"within (optimistic)"``.
    baselines
        ``"hvg_pca"``, ``"knn"`` and ``"logistic"`` (both on log-normalised variable genes), ``"majority"`` and
        ``"shuffled"`` for annotation; ``"hvg_pca"``, ``"harmony"``, ``"scvi"`` and ``"shuffled"`` for integration. By
        default those that are fast and installed.
    random_weights
        Whether to add copies of the models with random weights, for every method: what is due to pre-training is the
        difference to them. For ``"finetune"`` they are trained, too, which doubles the time.
    seeds
        Seeds of everything random: fine-tuning, random weights, shuffling, clusters.
    layer
        Layer with the counts; by default ``X``.
    train
        Further arguments of ``train`` of the fine-tuned classes, such as ``{"max_epochs": 5}``; or a mapping from the
        name of each model to its own.
    device
        Where to compute.

    Returns
    -------
    Tidy table with one row for each score: ``task``, ``kind`` (``"model"``, ``"random weights"``, ``"baseline"`` or
    ``"control"``), ``name``, ``method``, ``held_out`` (the group, ``"within (optimistic)"``, or
    ``"none"`` for integration), ``seed``, ``metric`` and
    ``value``. :func:`scfm.benchmark.summary` gives means and spreads, :func:`scfm.pl.benchmark` a picture.

    Raises
    ------
    KeyError
        If a column or group does not exist.
    MissingExtraError
        If a baseline that was asked for is not installed.
    ValueError
        If there is one group or label only, a task, method, baseline or split is unknown, or ``split="within"`` is asked for
        beside ``held_out`` or for integration.

    Examples
    --------
    >>> import scfm
    >>> table = scfm.benchmark.cells(adata, ["scgpt"], labels_key="cell_type", batch_key="donor")  # doctest: +SKIP
    >>> scfm.benchmark.summary(table)  # doctest: +SKIP
    """
    methods, baselines = _choices(task, methods, baselines)
    if split not in _SPLITS or (split == "within" and (held_out is not None or task == "integration")):
        msg = (
            f"split must be one of {', '.join(_SPLITS)}; 'within' is for annotation without held_out=. It is {split!r}"
        )
        raise ValueError(msg)
    groups = split_by or batch_key
    for column in (labels_key, groups, batch_key):
        if column is not None and column not in adata.obs:
            msg = f"obs has no column {column!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise KeyError(msg)
    if groups is None or (task == "integration" and batch_key is None):
        needed = "batch_key=" if task == "integration" else "split_by= or batch_key="
        msg = f"{needed} has to name the groups of cells: cells at random would make the scores too good"
        raise ValueError(msg)
    work = _labelled(
        adata, labels_key, groups if task == "annotation" else batch_key, layer, fewest=1 if split == "within" else 2
    )
    models = [models] if not isinstance(models, (list, tuple)) else list(models)
    bench = _Bench(
        work, labels_key, groups, batch_key, methods, tuple(seeds), dict(train or {}), device, split == "within"
    )
    start = _logging.info(f"comparing {len(models)} models on {work.n_obs:,} cells ({task})")
    for model in models:
        bench.add_model(model, task, random_weights=random_weights, held_out=held_out)
    for name in baselines:
        bench.add_baseline(name, task, held_out=held_out)
    _logging.info("    finished", time=start)
    return pd.DataFrame(bench.rows, columns=list(COLUMNS))


def summary(table: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean and spread of the scores of :func:`cells`, the best first.

    Parameters
    ----------
    table
        Result of :func:`cells`, or several of them below each other.
    metrics
        Which scores; by default all. The first one orders the rows.

    Returns
    -------
    One row for each ``task``, ``kind``, ``name`` and ``method``; for each score its mean over groups and seeds, in
    ``"<score> ±"`` the standard deviation, and in ``runs`` how many values there are.
    """
    metrics = list(dict.fromkeys(table["metric"])) if metrics is None else list(metrics)
    chosen = table[table["metric"].isin(metrics)]
    keys = ["task", "kind", "name", "method"]
    grouped = chosen.groupby([*keys, "metric"], sort=False)["value"]
    # one run has a mean and no spread
    mean, spread, runs = (values.unstack("metric") for values in (grouped.mean(), grouped.std(), grouped.size()))
    columns = {}
    for metric in metrics:
        columns |= {metric: mean[metric], f"{metric} ±": spread[metric]}
    result = pd.DataFrame({**columns, "runs": runs[metrics[0]]})
    return result.sort_values(metrics[0], ascending=False)


def _choices(
    task: str, methods: Sequence[str] | None, baselines: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if task not in _TASKS:
        msg = f"task must be one of {', '.join(_TASKS)}; got {task!r}"
        raise ValueError(msg)
    if methods is None:
        methods = tuple(method for method in _METHODS[task] if method != "finetune")
    if baselines is None:
        baselines = tuple(name for name in _DEFAULT_BASELINES[task] if name != "harmony" or find_spec("harmonypy"))
    for what, chosen, known in (("method", methods, _METHODS[task]), ("baseline", baselines, _BASELINES[task])):
        if unknown := [name for name in chosen if name not in known]:
            msg = f"there is no {what} {', '.join(map(repr, unknown))} for {task}; choose among {', '.join(known)}"
            raise ValueError(msg)
    if "harmony" in baselines:
        require("harmonypy", purpose="the baseline 'harmony'")
    return tuple(methods), tuple(baselines)


def _labelled(adata: AnnData, labels_key: str, groups: str, layer: str | None, *, fewest: int) -> AnnData:
    """Counts of the cells that have a label and a group, as ``X`` of a new object."""
    if layer is not None and layer not in adata.layers:
        msg = f"there is no layer {layer!r}; there are {', '.join(adata.layers) or 'none'}"
        raise KeyError(msg)
    usable = (adata.obs[labels_key].notna() & adata.obs[groups].notna()).to_numpy()
    for column, what, least in ((labels_key, "label", 2), (groups, "group", fewest)):
        if adata.obs.loc[usable, column].nunique() < least:
            msg = f"obs[{column!r}] has fewer than {'two' if least == 2 else 'one'} {what}s, so there is nothing to compare"
            raise ValueError(msg)
    counts = adata.X if layer is None else adata.layers[layer]
    counts, var = counts[usable], adata.var.copy()
    if not adata.var_names.is_unique:
        counts, var = _summed(counts, var)
    work = AnnData(counts, obs=adata.obs[usable].copy(), var=var)
    for column in (labels_key, groups):
        work.obs[column] = label_names(work.obs[column]).astype("category")
    return work


def _summed(counts: Any, var: pd.DataFrame) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Counts with one column for each name, and the table of genes with the first row of each."""
    columns = ColumnMap.from_ids(pd.factorize(var.index)[0])
    kept = var[~var.index.duplicated()]
    _logging.warning(f"{len(var) - len(kept):,} columns have the name of another gene; their counts are summed")
    return columns.apply(sparse.csr_matrix(counts)), kept


@dataclass
class _Bench:
    """What is compared on, and the scores so far."""

    adata: AnnData
    labels_key: str
    groups: str
    batch_key: str | None
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    train: dict[str, Any]
    device: str
    within: bool = False
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        return self.adata.obs[self.labels_key].to_numpy(dtype=str)

    # -- models ------------------------------------------------------------------------------------------------------

    def add_model(self, model: Model, task: str, *, random_weights: bool, held_out: Sequence[str] | None) -> None:
        # embeddings that cells are annotated from are made with other weights than fine-tuning starts from
        backbone = self._load(model, None if task == "annotation" else task)
        name = result_name(backbone)
        embed_all = self._annotate if task == "annotation" else self._integrate
        frozen = [method for method in self.methods if method != "finetune"]
        if frozen:
            embedding, seeds = self._embedding(backbone, task), self.seeds if task == "integration" else (0,)
            embed_all("model", name, frozen, lambda _: embedding, seeds, held_out)
        if frozen and random_weights:
            embed_all(
                "random weights",
                name,
                frozen,
                lambda seed: self._embedding(random_copy(backbone, seed=seed), task),
                self.seeds,
                held_out,
            )
        if "finetune" not in self.methods:
            return
        if task == "annotation" and weights_for(model, task) is not None:
            backbone = self._load(model, task)
        kinds: dict[str, Callable[[int], Backbone]] = {"model": lambda _: backbone}
        if random_weights:
            kinds["random weights"] = lambda seed: random_copy(backbone, seed=seed)
        for kind, make in kinds.items():
            if task == "annotation":
                self._fine_tune(kind, make, name, held_out)
            else:
                tuned = {seed: self._integrated(make(seed), name, seed) for seed in self.seeds}
                self._integrate(kind, name, ["finetune"], tuned.__getitem__, self.seeds, None)

    def _load(self, model: Model, task: str | None) -> Backbone:
        """The model, with the weights that its authors take for a task where that can be chosen."""
        weights = None if task is None else weights_for(model, task)
        return load_backbone(model, device=self.device, precision="auto", weights=weights)

    def _embedding(self, backbone: Any, task: str) -> np.ndarray:
        """Embedding of all cells; for integration as the model is used for it."""
        work = AnnData(self.adata.X, obs=self.adata.obs.copy(), var=self.adata.var)
        if task == "integration":
            integrate(work, backbone, batch_key=self.batch_key, method="zero-shot", key_added="X_bench")
        else:
            embed(work, backbone, key_added="X_bench")
        return np.asarray(work.obsm["X_bench"])

    def _options(self, name: str) -> dict[str, Any]:
        own = self.train.get(name)
        if hasattr(own, "keys"):
            return dict(own)
        return {key: value for key, value in self.train.items() if not hasattr(value, "keys")}

    def _fine_tune(self, kind: str, make: Callable[[int], Backbone], name: str, held_out: Sequence[str] | None) -> None:
        for group, query in self._folds(held_out):
            reference = self.adata[~query].copy()
            CellTypeClassifier.setup_anndata(reference, labels_key=self.labels_key, batch_key=self.groups)
            for seed in self.seeds:
                model = CellTypeClassifier(reference, checkpoint=make(seed), device=self.device, seed=seed)
                model.train(**{"seed": seed, "enable_progress_bar": False} | self._options(name))
                predicted = model.predict(self.adata, np.flatnonzero(query))
                self._score(("annotation", kind, name, "finetune", group, seed), query, predicted)

    def _integrated(self, backbone: Any, name: str, seed: int) -> np.ndarray:
        work = AnnData(self.adata.X, obs=self.adata.obs.copy(), var=self.adata.var.copy())
        BatchIntegrator.setup_anndata(work, batch_key=self.batch_key)
        model = BatchIntegrator(work, checkpoint=backbone, device=self.device, seed=seed)
        model.train(**{"seed": seed, "enable_progress_bar": False} | self._options(name))
        return model.get_latent_representation()

    # -- baselines and controls --------------------------------------------------------------------------------------

    def add_baseline(self, baseline: str, task: str, *, held_out: Sequence[str] | None) -> None:
        name = _NAMES[baseline]
        if task == "integration":
            self._add_embedding(baseline, name)
        elif baseline == "hvg_pca":
            embedding = hvg_pca(self.adata)
            methods = [method for method in self.methods if method != "finetune"] or ["knn"]
            self._annotate("baseline", name, methods, lambda _: embedding, (0,), held_out)
        elif baseline in ("knn", "logistic"):
            classify = knn_labels if baseline == "knn" else logistic_labels
            method = "knn" if baseline == "knn" else "logistic regression"
            for group, query in self._folds(held_out):
                result = classify(self.adata[~query], self.adata[query], self.labels_key)
                self._score(("annotation", "baseline", name, method, group, 0), query, result.labels.to_numpy())
        elif baseline == "majority":
            for group, query in self._folds(held_out):
                predicted = majority_labels(self.labels[~query], int(query.sum()))
                self._score(("annotation", "control", name, "", group, 0), query, predicted)
        else:
            for group, query in self._folds(held_out):
                for seed in self.seeds:
                    reference = self.adata[~query].copy()
                    reference.obs[self.labels_key] = shuffled_labels(self.labels[~query], random_state=seed)
                    result = logistic_labels(reference, self.adata[query], self.labels_key)
                    key = ("annotation", "control", name, "logistic regression", group, seed)
                    self._score(key, query, result.labels.to_numpy())

    def _add_embedding(self, baseline: str, name: str) -> None:
        make: Callable[[int], np.ndarray] = {
            "hvg_pca": lambda seed: hvg_pca(self.adata, random_state=seed),
            "harmony": lambda seed: harmony(self.adata, self.batch_key, random_state=seed),
            "scvi": lambda seed: scvi_latent(self.adata, batch_key=self.batch_key, random_state=seed),
            "shuffled": lambda seed: np.random.default_rng(seed).permutation(hvg_pca(self.adata)),
        }[baseline]
        if baseline == "shuffled":
            self._integrate("control", "shuffled cells", ["HVG + PCA"], make, self.seeds, None)
        else:
            self._integrate("baseline", name, [""], make, self.seeds, None)

    # -- scores ------------------------------------------------------------------------------------------------------

    def _folds(self, held_out: Sequence[str] | None) -> Iterator[tuple[str, np.ndarray]]:
        """Each group that is held out, and which cells it has."""
        groups = self.adata.obs[self.groups]
        if self.within:
            yield _WITHIN, held_out_within(groups.to_numpy(dtype=str), self.labels)
            return
        chosen = list(groups.cat.categories) if held_out is None else label_names(list(held_out)).to_list()
        if unknown := sorted(set(chosen) - set(groups.cat.categories)):
            msg = f"obs[{self.groups!r}] has no group {', '.join(unknown)}"
            raise KeyError(msg)
        for group in chosen:
            yield group, (groups == group).to_numpy()

    def _annotate(
        self,
        kind: str,
        name: str,
        methods: Sequence[str],
        embedding_of: Callable[[int], np.ndarray],
        seeds: Sequence[int],
        held_out: Sequence[str] | None,
    ) -> None:
        names, codes = np.unique(self.labels, return_inverse=True)
        for seed in seeds:
            embedding = embedding_of(seed)
            usable = np.isfinite(embedding).all(1)
            for group, query in self._folds(held_out):
                known = ~query & usable
                for method in methods:
                    if method == "knn":
                        neighbors = find_neighbors(embedding[known], embedding[query], min(_K, int(known.sum())))
                        votes = vote(neighbors, codes[known], len(names))
                    else:
                        votes = linear_votes(embedding[known], codes[known], embedding[query], len(names))
                    predicted = np.where(votes.codes >= 0, names[votes.codes].astype(object), None)
                    self._score(("annotation", kind, name, method, group, seed), query, predicted)

    def _score(self, key: tuple[Any, ...], query: np.ndarray, predicted: np.ndarray) -> None:
        """Scores over the cells whose type the reference has."""
        truth = self.labels[query]
        known = np.isin(truth, self.labels[~query])
        values = {"unseen": float(1 - known.mean())}
        if known.any():
            scores = annotation_scores(truth[known], pd.Series(predicted, dtype=object)[known])
            values = {name: scores[name] for name in ("macro F1", "balanced accuracy", "accuracy", "rejected")} | values
        self.rows += [(*key, metric, value) for metric, value in values.items()]

    def _integrate(
        self,
        kind: str,
        name: str,
        methods: Sequence[str],
        embedding_of: Callable[[int], np.ndarray],
        seeds: Sequence[int],
        held_out: Sequence[str] | None,
    ) -> None:
        batches = self.adata.obs[self.batch_key].to_numpy(dtype=str)
        for seed in seeds:
            embedding = embedding_of(seed)
            usable = np.isfinite(embedding).all(1)
            scores = integration_scores(embedding[usable], self.labels[usable], batches[usable], random_state=seed)
            order = ("Overall", "AvgBIO", "AvgBATCH", *scores)
            for method in methods:
                self.rows += [
                    ("integration", kind, name, method, "none", seed, metric, scores[metric])
                    for metric in dict.fromkeys(order)
                ]
