"""What tools ask of a model for perturbations: which genes it can perturb, and predictions, block by block."""

from __future__ import annotations

import os
from dataclasses import dataclass
from inspect import signature
from itertools import combinations
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from .. import _keys, _logging
from ..tasks.perturbation_data import CONTROL, canonical, genes_of, parse_perturbation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_SHOWN = 10
_BLOCK_VALUES = 2**21


class ResponseModel(Protocol):
    """A model for perturbations: :class:`scfm.models.GeneticPerturbation`, or anything with these two.

    One that has an answer for every gene, also for those of which it knows nothing, says so with a true attribute
    ``answers_for_any_gene``.
    """

    @property
    def perturbable(self) -> pd.Index:
        """Genes that the model can perturb."""

    def iter_predictions(
        self, perturbations: Sequence[str], control: AnnData, batch_size: int | None = None, *, seed: int = 0
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Blocks of predictions: name, rows, and log-normalised expression."""


Predictor = ResponseModel | str | os.PathLike[str]


def open_models(model: Predictor | Sequence[Predictor]) -> list[ResponseModel]:
    """The models themselves; a folder is loaded.

    Raises
    ------
    TypeError
        If something is no model for perturbations.
    ValueError
        If there is none.
    """
    given = list(model) if isinstance(model, (list, tuple)) else [model]
    if not given:
        msg = "there is no model to predict with; give model="
        raise ValueError(msg)
    return [_opened(one) for one in given]


def _opened(model: Any) -> ResponseModel:
    if isinstance(model, (str, os.PathLike)):
        from ..models import GeneticPerturbation

        return GeneticPerturbation.load(model, adata=False)
    if not (hasattr(model, "iter_predictions") and hasattr(model, "perturbable")):
        msg = (
            f"{type(model).__name__} is no model for perturbations; train a scfm.models.GeneticPerturbation, or give the folder "
            f"that one was saved to"
        )
        raise TypeError(msg)
    accepted = signature(model.iter_predictions).parameters.values()
    if not any(one.name == "seed" or one.kind is one.VAR_KEYWORD for one in accepted):
        msg = (
            f"{type(model).__name__} is no model for perturbed genes: its iter_predictions takes no seed=. Treatments are predicted "
            f"with model.predict(treatment, control_cells)"
        )
        raise TypeError(msg)
    return model


def named(perturbations: str | Iterable[str], models: Sequence[ResponseModel]) -> list[str]:
    """Canonical names, each once, in the order given.

    Raises
    ------
    ValueError
        If there are none, or a model cannot perturb a gene and does not answer for any.
    """
    given = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    known = set(map(str, models[0].perturbable))
    names = list(dict.fromkeys(canonical(parse_perturbation(name, known=known)) for name in given))
    if not names:
        msg = "there are no perturbations to predict; give names such as ['KLF1', 'CEBPE+KLF1']"
        raise ValueError(msg)
    genes = pd.Index(sorted({gene for name in names for gene in genes_of(name)}))
    for model in models:
        if unable := list(genes[~genes.isin(pd.Index(model.perturbable).astype(str))]):
            shown = ", ".join(unable[:_SHOWN]) + (f" and {len(unable) - _SHOWN} more" if len(unable) > _SHOWN else "")
            if getattr(model, "answers_for_any_gene", False):
                _logging.info(f"    the model knows nothing about {shown}; they have the change that it takes for all")
                continue
            msg = (
                f"the model cannot perturb {shown}; model.perturbable has the {len(model.perturbable):,} "
                f"genes that it can"
            )
            raise ValueError(msg)
    return names


def candidate_names(
    candidates: Sequence[str] | None, genes: Sequence[str] | None, models: Sequence[ResponseModel], adata: AnnData
) -> list[str]:
    """Perturbations to choose among: those given, else all of one and of two of ``genes``, else of genes perturbed in the data.

    Raises
    ------
    ValueError
        If there are none, or a gene cannot be perturbed.
    """
    if candidates is not None:
        return named(candidates, models)
    if genes is None:
        if _keys.PERTURBATION_OF_CELL not in adata.obs:
            msg = (
                "which genes are perturbed in the data is not known; name some, or run scfm.pp.perturbation_setup first"
            )
            raise ValueError(msg)
        able = set.intersection(*({str(gene) for gene in model.perturbable} for model in models))
        names = adata.obs[_keys.PERTURBATION_OF_CELL].astype(str).unique()
        genes = [gene for name in names for gene in genes_of(name) if gene in able]
    genes = sorted(set(map(str, genes)))
    return named([*genes, *(canonical(pair) for pair in combinations(genes, 2))], models)


def control_cells(adata: AnnData, control: AnnData | None) -> AnnData:
    """Control cells: those given, else those of the data.

    Raises
    ------
    ValueError
        If there are none.
    """
    if control is not None:
        chosen = control
    elif _keys.PERTURBATION_OF_CELL not in adata.obs:
        msg = "which cells are controls is not known; give control=, or run scfm.pp.perturbation_setup first"
        raise ValueError(msg)
    else:
        chosen = adata[(adata.obs[_keys.PERTURBATION_OF_CELL].astype(str) == CONTROL).to_numpy()]
    if not chosen.n_obs:
        msg = "there are no control cells; predictions start from them"
        raise ValueError(msg)
    return chosen


def some_cells(cells: AnnData, n: int, rng: np.random.Generator) -> AnnData:
    """At most ``n`` cells, drawn without replacement, in their order."""
    if n < 1:
        msg = f"at least one control cell is needed; got {n!r}"
        raise ValueError(msg)
    if cells.n_obs <= n:
        return cells
    return cells[np.sort(rng.choice(cells.n_obs, n, replace=False))]


def expression(adata: AnnData, models: Sequence[ResponseModel] = (), layer: str | None = None) -> csr_matrix:
    """Log-normalised expression as the models see it: by their own rule, else by that of the setup, else from ``layer``."""
    from ..models._perturbation_data import ExpressionRule

    rule = next((one._rule for one in models if isinstance(getattr(one, "_rule", None), ExpressionRule)), None)
    if layer is not None:
        rule = ExpressionRule(layer)
    elif rule is None:
        rule = ExpressionRule.of(adata) if "params" in adata.uns.get(_keys.PERTURBATION, {}) else ExpressionRule()
    return rule.read(adata)[0]


def block_size(n_vars: int) -> int:
    """Cells of a block, the same for several models."""
    return int(np.clip(_BLOCK_VALUES // max(n_vars, 1), 1, 512))


def predictions(
    models: Sequence[ResponseModel], names: Sequence[str], control: AnnData, *, batch_size: int | None, seed: int
) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Blocks of predictions with one matrix for each model, ``(models, cells, genes)``.

    Raises
    ------
    RuntimeError
        If models do not give the same blocks.
    """
    if len(models) > 1 and batch_size is None:
        batch_size = block_size(control.n_vars)
    runs = [model.iter_predictions(names, control, batch_size, seed=seed) for model in models]
    for parts in zip(*runs, strict=True):
        name, rows, _ = parts[0]
        if any((part[0], part[1]) != (name, rows) for part in parts):
            msg = "the models give their predictions in blocks of different cells"
            raise RuntimeError(msg)
        yield name, rows, np.stack([part[2] for part in parts])


def mean_profiles(
    models: Sequence[ResponseModel],
    names: Sequence[str],
    control: AnnData,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Predicted expression, averaged over cells and models, ``(perturbations, genes)``."""
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(names), control.n_vars))
    for name, _, values in predictions(models, names, control, batch_size=batch_size, seed=seed):
        sums[place[name]] += values.mean(0, dtype=np.float64).sum(0)
    return sums / control.n_obs


@dataclass(frozen=True, eq=False)
class Measured:
    """Mean log-normalised expression of the perturbations of the data.

    Parameters
    ----------
    means
        ``(perturbations, genes)``, with ``"ctrl"``.
    de_genes
        Genes that change most, by perturbation, the first first.
    non_dropout_de_genes
        The same without those that only were not detected.
    """

    means: pd.DataFrame
    de_genes: dict[str, np.ndarray]
    non_dropout_de_genes: dict[str, np.ndarray]

    @classmethod
    def of(cls, adata: AnnData) -> Measured:
        """What :func:`scfm.pp.perturbation_setup` found.

        Raises
        ------
        ValueError
            If it has not been run.
        """
        record = adata.uns.get(_keys.PERTURBATION, {})
        if "means" not in record:
            msg = "measured responses are missing: run scfm.pp.perturbation_setup(adata, perturbation_key=..., control=...)"
            raise ValueError(msg)
        names, genes = (np.asarray(record[name], dtype=str) for name in ("names", "genes"))
        means = pd.DataFrame(np.asarray(record["means"], dtype=np.float64), index=pd.Index(names), columns=genes)
        return cls(means, *(_by_perturbation(record.get(name)) for name in ("de_genes", "non_dropout_de_genes")))


def _by_perturbation(table: pd.DataFrame | None) -> dict[str, np.ndarray]:
    """Genes of a table of the setup by perturbation."""
    if table is None:
        return {}
    groups = table["gene"].astype(str).groupby(table["perturbation"].astype(str).to_numpy(), sort=False)
    return {name: part.to_numpy() for name, part in groups}
