"""Regulatory networks: models beside correlation, DeepSEM alone, random weights and shuffled networks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import _logging
from ..backbones import random_copy
from ..baselines import correlation_network, grnboost2_network, shuffled_network
from ..metrics import network_scores
from ..metrics._network import edges_between
from ..models import RegulatoryNetwork
from ..models._network_start import OF_MODEL
from ..tl._inputs import load_backbone, result_name
from ._cells import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from anndata import AnnData

    from ..backbones import Backbone
    from ..tl._inputs import Model

_TASK = "networks"
_BASELINES = ("pearson", "spearman", "deepsem", "grnboost2")
_REFINED = "DeepSEM"
_NAMES = {"pearson": "Pearson correlation", "spearman": "Spearman correlation", "grnboost2": "GRNBoost2"}


def networks(
    adata: AnnData,
    known: pd.DataFrame,
    models: Model | Sequence[Model] = (),
    *,
    starts: Sequence[str] = ("static", "paper"),
    refine: bool = True,
    baselines: Sequence[str] | None = None,
    random_weights: bool = True,
    shuffled: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    layer: str | None = None,
    counts_layer: str | None = None,
    inverse: str = "exact",
    train: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Compare regulatory networks from models with each other, and with what needs no foundation model.

    Parameters
    ----------
    adata
        Annotated data with the genes of the network. It is not changed.
    known
        Known network, with the columns ``source`` and ``target``. Names of genes have to be those of ``adata``.
    models
        Model or models, as in :func:`scfm.tl.embed`.
    starts
        What is taken from each model, see ``init`` of :class:`scfm.models.RegulatoryNetwork`.
    refine
        Whether to refine each start by DeepSEM, too.
    baselines
        ``"pearson"`` and ``"spearman"`` (absolute correlation), ``"deepsem"`` (DeepSEM from its own start, without a
        model) and ``"grnboost2"``; by default all but the last, and the last if arboreto is installed.
    random_weights
        Whether to add copies of the models with random weights.
    shuffled
        Whether to add the known network with its edges exchanged so that each gene keeps its numbers of targets and sources,
        and the same for the strongest edges of each model (as many as are known).
    seeds
        Seeds of everything random.
    layer
        Layer with normalised expression; by default ``X``.
    counts_layer
        Layer with counts for the models to look at; by default ``layer``.
    inverse
        See :class:`scfm.models.RegulatoryNetwork`.
    train
        Further arguments of :meth:`scfm.models.RegulatoryNetwork.train`, such as ``{"max_epochs": 15}``.
    device
        Where to compute.

    Returns
    -------
    Tidy table in the form of :func:`scfm.benchmark.cells`, with the metrics of :func:`scfm.metrics.network_scores`. The column
    ``method`` says what was done: the start, ``"<start> + DeepSEM"``, or ``"<start>, shuffled"``. Steps without chance have
    one row for each metric, all others one for each seed.

    Raises
    ------
    KeyError
        If a layer does not exist.
    MissingExtraError
        If a baseline that was asked for is not installed.
    ValueError
        If a start or baseline is unknown, or the known network has no edge between genes of ``adata``.

    Examples
    --------
    >>> import scfm
    >>> table = scfm.benchmark.networks(adata, known, ["scgpt"], counts_layer="counts")  # doctest: +SKIP
    >>> scfm.benchmark.summary(table, ["AUPR ratio", "EPR"])  # doctest: +SKIP
    """
    models = list(models) if isinstance(models, (list, tuple)) else [models]
    if baselines is None:
        baselines = [name for name in _BASELINES if name != "grnboost2" or find_spec("arboreto")]
    for what, chosen, there in (("start", starts, OF_MODEL), ("baseline", baselines, _BASELINES)):
        if unknown := [name for name in chosen if name not in there]:
            msg = f"there is no {what} {', '.join(map(repr, unknown))}; choose among {', '.join(there)}"
            raise ValueError(msg)
    bench = _Bench(
        _registered(adata, layer, counts_layer),
        edges_between(known, adata.var_names, "adata"),
        layer,
        tuple(starts),
        refine,
        tuple(seeds),
        inverse,
        dict(train or {}),
        device,
    )
    start = _logging.info(f"comparing networks of {adata.n_vars:,} genes with {len(bench.known):,} known edges")
    for model in models:
        bench.add_model(model, random_weights=random_weights, shuffled=shuffled)
    for name in baselines:
        bench.add_baseline(name)
    if shuffled:
        for seed in bench.seeds:
            edges = shuffled_network(bench.known, random_state=seed).assign(weight=1.0)
            bench.score("control", "known network", "shuffled", seed, edges)
    _logging.info("    finished", time=start)
    return pd.DataFrame(bench.rows, columns=list(COLUMNS))


def _registered(adata: AnnData, layer: str | None, counts_layer: str | None) -> AnnData:
    work = adata.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        RegulatoryNetwork.setup_anndata(work, layer=layer, counts_layer=counts_layer)
    return work


@dataclass
class _Bench:
    """What is compared with, and the scores so far."""

    adata: AnnData
    known: pd.DataFrame
    layer: str | None
    starts: tuple[str, ...]
    refine: bool
    seeds: tuple[int, ...]
    inverse: str
    train: dict[str, Any]
    device: str
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def tfs(self) -> np.ndarray:
        return self.known["source"].unique()

    def score(self, kind: str, name: str, method: str, seed: int, edges: pd.DataFrame) -> None:
        for metric, value in network_scores(self.known, edges).items():
            self.rows.append((_TASK, kind, name, method, "none", seed, metric, value))

    def add_model(self, model: Model, *, random_weights: bool, shuffled: bool) -> None:
        backbone = load_backbone(model, device=self.device, precision="auto", weights=None)
        name = result_name(backbone)
        for start in self.starts:
            edges = self._from(start, "model", name, {0: backbone})
            if shuffled:
                # the same edges that count as early ones: pairs outside of the known network are not scored
                scored = edges["target"].isin([*self.known["source"], *self.known["target"]])
                strongest = edges[scored].head(len(self.known))
                for seed in self.seeds:
                    other = shuffled_network(strongest, random_state=seed)
                    self.score("control", name, f"{start}, shuffled", seed, other)
            if random_weights:
                self._from(
                    start, "random weights", name, {seed: random_copy(backbone, seed=seed) for seed in self.seeds}
                )

    def _from(self, start: str, kind: str, name: str, backbones: dict[int, Backbone]) -> pd.DataFrame:
        """Score a start, and what DeepSEM makes of it; returns the edges of the last start."""
        edges = pd.DataFrame()
        for seed, backbone in backbones.items():
            network = self._network(seed, model=backbone, init=start)
            edges = network.get_edges()
            self.score(kind, name, start, seed, edges)
            if self.refine:
                # a model with trained weights has one start, refined with each seed
                self._refined(kind, name, start, network, self.seeds if kind == "model" else (seed,))
        return edges

    def _network(self, seed: int, **options: Any) -> RegulatoryNetwork:
        return RegulatoryNetwork(
            self.adata, tfs=self.tfs, inverse=self.inverse, device=self.device, seed=seed, **options
        )

    def _refined(self, kind: str, name: str, start: str, network: RegulatoryNetwork, seeds: Sequence[int]) -> None:
        adjacency = network.get_adjacency()
        for seed in seeds:
            # the start has its final scale
            refined = self._network(seed, adjacency=adjacency, scale=1.0)
            refined.train(**{"seed": seed, "progress": False} | self.train)
            self.score(kind, name, f"{start} + {_REFINED}" if start else "", seed, refined.get_edges())

    def add_baseline(self, baseline: str) -> None:
        if baseline == "deepsem":
            for seed in self.seeds:
                self._refined("baseline", _REFINED, "", self._network(seed, init="random"), (seed,))
        elif baseline == "grnboost2":
            for seed in self.seeds:
                edges = grnboost2_network(self.adata, layer=self.layer, tfs=self.tfs, random_state=seed)
                self.score("baseline", _NAMES[baseline], "", seed, edges)
        else:
            edges = correlation_network(self.adata, layer=self.layer, method=baseline, tfs=self.tfs)
            self.score("baseline", _NAMES[baseline], "", 0, edges)
