"""Networks for responses to perturbations, made for the genes of data, and how they are trained."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from .. import _logging
from .._errors import UnsupportedError
from ..tasks.gears import annotated_genes, annotation_table, gears_loss, go_graph
from ..tasks.gears_network import GearsConfig, Graph, fresh_network
from ..tasks.perturbation_fit import MONITORS, FitOptions
from ..tasks.perturbation_learners import GearsLearner, GeneratorLearner
from ..train._presets import Optimization

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..backbones import Backbone, FineTuning
    from ..genes import GeneMatch

_SHOWN = 10
# fields of GearsConfig that follow from the data
_OF_DATA = ("n_genes", "n_perturbations")
# GEARS itself, and GEARS on states of models whose authors have not tried it
_ALONE = {"hidden": 128, "positions": "table"}
_ON_STATES = {"hidden": 128, "entry": "mlp", "entry_hidden": 256, "positions": "none"}
_USUAL = {"batch_size": 32, "accumulate": 1, "max_epochs": 15}
_ALONE_BATCH = 30
# of all networks of GEARS; the rate is halved after every epoch
_OPTIMIZATION = {
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "clip": "value",
    "clip_value": 1.0,
    "schedule": "steps",
    "unit": "epoch",
    "step_size": 1,
    "gamma": 0.5,
}


@dataclass(frozen=True)
class PerturbedGenes:
    """Genes that a network knows.

    Parameters
    ----------
    names
        Genes that have a place in the network as perturbed ones.
    usable
        Which of them can be predicted: those that are trained on, and those of which something is known.
    extra
        Perturbed genes that are not measured but need a place among those that are; they follow these with the value 0.
    """

    names: np.ndarray
    usable: np.ndarray
    extra: tuple[str, ...] = ()

    @property
    def usable_names(self) -> np.ndarray:
        """Names of those that can be predicted."""
        return self.names[self.usable]

    def numbers(self, genes: Sequence[str]) -> np.ndarray:
        """Numbers of genes, -1 for those without a place."""
        return pd.Index(self.names).get_indexer(list(genes)).astype(np.int64)


def choose_route(route: str | None, backbone: Backbone | None) -> str:
    """The route that is given, or that of the model.

    Raises
    ------
    ValueError
        If there is no such route, or it needs a model.
    UnsupportedError
        If the model cannot go it.
    """
    if route not in (None, "gears", "scgpt"):
        msg = f"route must be 'gears' or 'scgpt'; got {route!r}"
        raise ValueError(msg)
    if route is None:
        return "scgpt" if backbone is not None and "perturbs" in backbone.capabilities else "gears"
    if route == "scgpt":
        if backbone is None:
            msg = "route='scgpt' needs a model; give model=, or take route='gears'"
            raise ValueError(msg)
        backbone.require("perturbs")
    elif backbone is not None:
        backbone.require("gene_states")
        if backbone.perturbs_already:
            msg = f"{backbone.name} is a network for perturbations; use route='scgpt', or the model it was fine-tuned from"
            raise UnsupportedError(msg)
    return route


def check_loss(loss: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` if the loss of GEARS has no such options."""
    parameters = inspect.signature(gears_loss).parameters.values()
    _check_names("loss", loss, [one.name for one in parameters if one.kind is one.KEYWORD_ONLY])


def _check_names(argument: str, given: Mapping[str, Any], accepted: Sequence[str]) -> None:
    if unknown := [str(name) for name in given if name not in accepted]:
        msg = f"{argument}= has no option {', '.join(map(repr, unknown))}; there are {', '.join(accepted)}"
        raise TypeError(msg)


def gears_learner(
    backbone: Backbone | None,
    measured: Sequence[str],
    seen: Sequence[str],
    trained: Sequence[str],
    *,
    go: Any,
    perturbable: Sequence[str] | None,
    form: Mapping[str, Any],
    coexpression: Callable[[], Graph],
    first_cell_only: bool,
    seed: int,
) -> tuple[GearsLearner, PerturbedGenes]:
    """GEARS for the genes of data, in the form of the authors of a model.

    Parameters
    ----------
    backbone
        The model; ``None`` for GEARS itself.
    measured, seen, trained
        Genes of the data, genes that are perturbed in them, and those of them that are trained on.
    go, perturbable
        As in :class:`scfm.models.GeneticPerturbation`.
    form
        Fields of :class:`GearsConfig` that differ from the form of the authors.
    coexpression
        Makes the graph of co-expression, if it is needed.
    first_cell_only, seed
        As in :class:`scfm.models.GeneticPerturbation`.

    Raises
    ------
    TypeError
        If ``form`` has a field that does not exist, or one that follows from the data.
    ValueError
        If states are asked for without a model.
    """
    _check_names("network", form, [name for name in inspect.signature(GearsConfig).parameters if name not in _OF_DATA])
    usual = _ALONE if backbone is None else dict(backbone.fine_tuning("gears").objective) or _ON_STATES
    form = dict(usual) | ({} if backbone is None else {"states": backbone.gene_state_dim}) | dict(form)
    if backbone is None and form.get("states"):
        msg = "network= asks for states of genes, but there is no model to give them; give model="
        raise ValueError(msg)
    table = None if go is None else annotation_table(go)
    known = np.zeros(0, dtype=str) if table is None else annotated_genes(table)
    marks = bool(form.get("indicator", False))
    wanted = {*seen, *(map(str, perturbable) if perturbable is not None else () if marks else known)}
    extra = tuple(sorted(wanted - set(measured))) if marks else ()
    names = np.array([*measured, *extra] if marks else sorted(wanted), dtype=object)
    if table is None:
        _logging.warning("without annotations of genes (go=), GEARS predicts only genes that it was trained on")
    elif lost := sorted(set(seen) - set(known)):
        _logging.warning(
            f"go= says nothing about {', '.join(lost[:_SHOWN])}; what is learned of them comes from their own cells"
        )
    genes = PerturbedGenes(names, np.isin(names.astype(str), [*known, *trained]), extra)
    config = GearsConfig(n_genes=len(measured) + len(extra), n_perturbations=len(names), **form)
    go_edges = Graph.empty() if table is None else go_graph(table, names)
    near = coexpression() if config.positions != "none" else None
    places = torch.arange(len(names)) if marks else None
    network = fresh_network(config, seed, go_edges, near, places)
    return GearsLearner(network, first_cell_only=first_cell_only), genes


def generator_learner(
    backbone: Backbone,
    measured: Sequence[str],
    seen: Sequence[str],
    trained: Sequence[str],
    *,
    perturbable: Sequence[str] | None,
    form: Mapping[str, Any],
    match: Callable[[Sequence[str]], GeneMatch],
    most_genes: int | None,
    always_include_perturbed: bool,
    seed: int,
) -> tuple[GeneratorLearner, PerturbedGenes]:
    """A model's own network for perturbations; arguments as in :func:`gears_learner`.

    Parameters
    ----------
    match
        Says what genes are to the model.
    most_genes, always_include_perturbed
        As in :class:`GeneratorLearner`.

    Raises
    ------
    TypeError
        If the model's networks for perturbations have no option of ``form``.
    ValueError
        If the network is one for perturbations already and ``form`` is given, or no gene is known to it.
    """
    if not backbone.perturbs_already:
        parameters = inspect.signature(backbone._perturbing).parameters.values()
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            _check_names("network", form, [one.name for one in parameters if one.name != "seed"])
        backbone = backbone.perturbing(seed=seed, **form)
    elif form:
        msg = f"{backbone.name} is a network for perturbations already; leave network= out"
        raise ValueError(msg)
    extra = tuple(sorted({*seen, *map(str, perturbable or ())} - set(measured)))
    names = np.array([*measured, *extra], dtype=object)
    found = match(extra)
    found.require_any(backbone.name)
    _logging.info(found.summary())
    if len(unknown := names[found.ids < 0]):
        _logging.warning(
            f"{len(unknown):,} genes are not in the vocabulary of {backbone.name} and all have the vector of padding, among them "
            f"{', '.join(map(str, unknown[:_SHOWN]))}"
        )
    if most_genes is None:
        most_genes = backbone.fine_tuning("responses").objective.get("most_genes")
    learner = GeneratorLearner(
        backbone,
        found.ids,
        np.arange(len(names)),
        most_genes=most_genes,
        always_include_perturbed=always_include_perturbed,
        loss={"gepc_weight": 1.0} if form.get("mvc") else None,
    )
    return learner, PerturbedGenes(names, (found.ids >= 0) | np.isin(names.astype(str), trained), extra)


def recipe_of(backbone: Backbone | None, route: str) -> FineTuning | None:
    """How the authors of a model train such a network; ``None`` without a model."""
    return None if backbone is None else backbone.fine_tuning("gears" if route == "gears" else "responses")


def fit_options(
    recipe: FineTuning | None,
    route: str,
    *,
    has_de_genes: bool,
    optimization: Optimization | Mapping[str, Any] | None,
    lr: float | None,
    weight_decay: float | None,
    monitor: str | None,
    patience: int | None,
    **given: Any,
) -> FitOptions:
    """What is given, and the rest as the authors do it.

    Parameters
    ----------
    recipe, route
        Of the model.
    has_de_genes
        Whether scores over the most changed genes can be computed.
    optimization, lr, weight_decay, monitor, patience
        As in :meth:`scfm.models.GeneticPerturbation.train`.
    given
        Further fields of :class:`FitOptions`; those that are ``None`` were not given.
    """
    published = recipe is not None and bool(recipe.objective)
    usual: dict[str, Any] = {name: getattr(recipe, name) for name in _USUAL} if published else dict(_USUAL)
    if recipe is None:
        usual["batch_size"] = _ALONE_BATCH
    fields = dict(_OPTIMIZATION) if route == "gears" else {}
    if published:
        fields |= dict(recipe.optimization)
        patience = recipe.objective.get("patience") if patience is None else patience
    if not isinstance(optimization, Optimization):
        fields = fields if optimization is None else dict(optimization)
        chosen = {"learning_rate": lr, "weight_decay": weight_decay}
        optimization = Optimization.from_dict(
            fields | {key: value for key, value in chosen.items() if value is not None}
        )
    elif lr is not None or weight_decay is not None:
        msg = "lr= and weight_decay= are part of optimization=; give one or the other"
        raise ValueError(msg)
    if monitor is None:
        monitor = recipe.monitor if published and recipe.monitor in set(MONITORS) - {"loss"} else "DE MSE"
    if monitor.startswith("DE ") and not has_de_genes:
        _logging.warning(
            f"no held-out perturbation has changed genes for {monitor!r}; {monitor.removeprefix('DE ')!r} is used"
        )
        monitor = monitor.removeprefix("DE ")
    usual |= {name: value for name, value in given.items() if value is not None}
    return FitOptions(optimization, monitor=monitor, patience=patience, **usual)
