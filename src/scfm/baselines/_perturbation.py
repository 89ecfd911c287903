"""Responses to perturbations without a network: no change, means, sums, and a linear model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from ..metrics import condition_means

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData
    from scipy import sparse

_CONTROL, _SEPARATOR = "ctrl", "+"
_BLOCK_VALUES = 2**22


@dataclass(frozen=True, eq=False)
class PerturbationBaseline:
    """Predicts the mean response to any perturbation; what it cannot know about has the response that it has for all.

    Parameters
    ----------
    name
        What it is.
    control
        Mean expression of the control cells, a series over genes.
    profile
        Gives the mean expression of the cells of a perturbation, ``(genes,)``, for its genes.
    perturbable
        Genes that the baseline knows something about.
    """

    name: str
    control: pd.Series
    profile: Callable[[tuple[str, ...]], np.ndarray]
    perturbable: pd.Index

    def predict_means(self, names: Sequence[str]) -> pd.DataFrame:
        """Mean expression after perturbations, ``(perturbations, genes)``; genes of a perturbation are joined by ``+``."""
        rows = [self.profile(_genes(name)) if _genes(name) else self.control.to_numpy() for name in names]
        shape = len(rows), len(self.control)
        return pd.DataFrame(
            np.asarray(rows, dtype=np.float64).reshape(shape),
            index=pd.Index(list(map(str, names)), name="condition"),
            columns=self.control.index,
        )


@dataclass(frozen=True, eq=False)
class ShiftedCells:
    """A baseline for single cells: each control cell is shifted by the predicted mean change, and stays above zero.

    Has the interface of :class:`scfm.models.GeneticPerturbation`, so that tools take it as a model. A gene that the baseline
    knows nothing about has the change that the baseline takes for all.

    Parameters
    ----------
    baseline
        The baseline.
    read
        Gives the log-normalised expression of cells, sparse, ``(cells, genes)``; by default ``X`` holds it.

    Attributes
    ----------
    answers_for_any_gene
        Tells tools not to refuse genes outside ``perturbable``.
    """

    baseline: PerturbationBaseline
    read: Callable[[AnnData], sparse.spmatrix | np.ndarray] | None = None
    answers_for_any_gene: ClassVar[bool] = True

    @property
    def perturbable(self) -> pd.Index:
        """Genes that the baseline knows something about."""
        return self.baseline.perturbable

    def iter_predictions(
        self, perturbations: Sequence[str] | str, control: AnnData, batch_size: int | None = None, *, seed: int = 0
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Predict a block at a time, as :meth:`scfm.models.GeneticPerturbation.iter_predictions`; nothing is random."""
        names = [perturbations] if isinstance(perturbations, str) else list(map(str, perturbations))
        genes = self.baseline.control.index
        place = genes.get_indexer(control.var_names)
        if (place < 0).any() or len(place) != len(genes):
            msg = "the baseline was made from other genes than these cells have; choose them with adata[:, genes]"
            raise ValueError(msg)
        means = self.baseline.predict_means(names)
        shifts = (means - self.baseline.control).to_numpy()[:, place].astype(np.float32)
        values = control.X if self.read is None else self.read(control)
        step = batch_size or max(1, _BLOCK_VALUES // max(len(place), 1))
        for start in range(0, control.n_obs, step):
            rows = slice(start, min(start + step, control.n_obs))
            block = values[rows]
            block = np.asarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float32)
            for name, shift in zip(names, shifts, strict=True):
                yield name, rows, np.maximum(block + shift, 0)


def no_change(means: pd.DataFrame) -> PerturbationBaseline:
    """Nothing happens.

    Parameters
    ----------
    means
        Mean expression of the cells of each perturbation that is trained on, and of control (``"ctrl"``), ``(perturbations,
        genes)``, see :func:`scfm.metrics.condition_means`. So for all baselines here.
    """
    control, _ = _parts(means)
    return _made("no change", means, lambda genes: control)


def perturbed_mean(means: pd.DataFrame) -> PerturbationBaseline:
    """Every perturbation has the mean of all that are trained on. Hard to beat by correlations of changes from control.

    Parameters
    ----------
    means
        As in :func:`no_change`.
    """
    _, rest = _parts(means)
    mean = rest.to_numpy().mean(0)
    return _made("perturbed mean", means, lambda genes: mean)


def matching_mean(means: pd.DataFrame) -> PerturbationBaseline:
    """Mean over the genes of a perturbation of what is known about each of them.

    What is known about a gene is its single perturbation; without one, the mean of the perturbations that it is part of; and
    without these, the mean of all.

    Parameters
    ----------
    means
        As in :func:`no_change`.

    References
    ----------
    Viñas Torné et al., Systema, Nature Biotechnology (2025).
    """
    _, rest = _parts(means)
    known, mean = _of_genes(rest, combined=True), rest.to_numpy().mean(0)
    return _made(
        "matching mean", means, lambda genes: np.mean([known.get(gene, mean) for gene in genes], axis=0), known
    )


def additive(means: pd.DataFrame) -> PerturbationBaseline:
    """Sum of the changes that the genes of a perturbation cause alone; none for a gene that training has not seen alone.

    Parameters
    ----------
    means
        As in :func:`no_change`.

    References
    ----------
    Ahlmann-Eltze et al., Nature Methods 22, 1657 (2025).
    """
    control, rest = _parts(means)
    known = {gene: values - control for gene, values in _of_genes(rest, combined=False).items()}
    none = np.zeros_like(control)
    return _made(
        "additive", means, lambda genes: control + np.sum([known.get(gene, none) for gene in genes], axis=0), known
    )


def ridge_linear(
    means: pd.DataFrame,
    perturbation_vectors: pd.DataFrame | None = None,
    *,
    n_components: int = 10,
    ridge: float = 0.1,
    name: str = "ridge-linear",
) -> PerturbationBaseline:
    """A linear model ``Y ~ G W P^T + b`` of mean expression, with vectors of genes G and vectors of perturbations P.

    ``b`` is the mean over the perturbations that are trained on, G has the principal components of the rest, and W is found by
    ridge regression. The vector of a perturbation is the sum of those of its genes; where none of them has one, ``b`` is
    predicted.

    Parameters
    ----------
    means
        As in :func:`no_change`.
    perturbation_vectors
        Vectors of genes, with the genes as index: of a foundation model, or random ones
        (:func:`scfm.baselines.random_gene_vectors`); reduced to ``n_components`` if they are wider. By default the principal
        components G, which only genes have that are measured.
    n_components
        Number of components.
    ridge
        Penalty, on both sides.
    name
        What to call it.

    Raises
    ------
    ValueError
        If no perturbation that is trained on has a vector.

    References
    ----------
    Ahlmann-Eltze et al., Nature Methods 22, 1657 (2025).
    """
    _, rest = _parts(means)
    targets = rest.to_numpy().T
    offset = targets.mean(1, keepdims=True)
    left, sizes, _ = np.linalg.svd(targets - offset, full_matrices=False)
    n_kept = min(n_components, int((sizes > 1e-9 * max(sizes[0], 1e-300)).sum()))
    basis = left[:, :n_kept] * sizes[:n_kept]
    table = pd.DataFrame(basis, index=means.columns)
    if perturbation_vectors is not None:
        table = _reduced(perturbation_vectors, n_components)
    table = table[~table.index.duplicated()]
    rows, names = table.to_numpy(dtype=np.float64), pd.Index(table.index.astype(str))

    def vector(genes: tuple[str, ...]) -> np.ndarray:
        place = names.get_indexer(list(genes))
        return rows[place[place >= 0]].sum(0)

    members = [_genes(condition) for condition in rest.index]
    usable = np.array([bool(names.isin(genes).any()) for genes in members])
    if not usable.any():
        msg = (
            "no perturbation that is trained on has a vector; give perturbation_vectors= that hold the perturbed genes"
        )
        raise ValueError(msg)
    right = np.array([vector(genes) for genes, use in zip(members, usable, strict=True) if use])
    residual = (targets - offset)[:, usable]
    inner = np.linalg.solve(basis.T @ basis + ridge * np.eye(n_kept), basis.T @ residual @ right)
    weights = np.linalg.solve(right.T @ right + ridge * np.eye(right.shape[1]), inner.T).T
    return _made(name, means, lambda genes: offset[:, 0] + basis @ (weights @ vector(genes)), dict.fromkeys(names))


def half_split(
    expression: np.ndarray | sparse.spmatrix, conditions: Sequence[str], *, random_state: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means of two random halves of the cells of each condition, the noise ceiling: one half predicts the other.

    Parameters
    ----------
    expression
        Log-normalised expression, ``(cells, genes)``.
    conditions
        Condition of each cell.
    random_state
        Seed.

    Returns
    -------
    Means of both halves, conditions with at least two cells by genes.
    """
    conditions = np.asarray(conditions).astype(str)
    names, codes, counts = np.unique(conditions, return_inverse=True, return_counts=True)
    order = np.random.default_rng(random_state).permutation(len(codes))
    ranks = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy()
    second = np.empty(len(codes), dtype=bool)
    second[order] = ranks % 2 == 1
    usable = counts[codes] >= 2
    kept = names[counts >= 2]
    return tuple(
        condition_means(
            expression[np.flatnonzero(usable & (second == half))], conditions[usable & (second == half)], names=kept
        )
        for half in (False, True)
    )


# -- parts ---------------------------------------------------------------------------------------------------------------


def _genes(name: str) -> tuple[str, ...]:
    return tuple(gene for gene in str(name).split(_SEPARATOR) if gene != _CONTROL)


def _parts(means: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    if _CONTROL not in means.index:
        msg = f"the means need a row {_CONTROL!r} with that of the control cells"
        raise ValueError(msg)
    rest = means.drop(index=_CONTROL).astype(np.float64)
    if rest.empty:
        msg = "the means have control only; baselines learn from perturbations"
        raise ValueError(msg)
    return means.loc[_CONTROL].to_numpy(dtype=np.float64), rest


def _of_genes(rest: pd.DataFrame, *, combined: bool) -> dict[str, np.ndarray]:
    """Mean expression for each gene: of its single perturbation, else (``combined``) of those that it is part of."""
    out = {
        genes[0]: row for genes, row in zip(map(_genes, rest.index), rest.to_numpy(), strict=True) if len(genes) == 1
    }
    if combined:
        parts: dict[str, list[np.ndarray]] = {}
        for name, row in zip(rest.index, rest.to_numpy(), strict=True):
            for gene in _genes(name):
                parts.setdefault(gene, []).append(row)
        out = {gene: np.mean(rows, axis=0) for gene, rows in parts.items()} | out
    return out


def _reduced(vectors: pd.DataFrame, n_components: int) -> pd.DataFrame:
    """Principal components of vectors that are wider, with a mean square of 1."""
    values = vectors.to_numpy(dtype=np.float64)
    values = values - values.mean(0)
    if values.shape[1] > n_components:
        left, sizes, _ = np.linalg.svd(values, full_matrices=False)
        values = left[:, :n_components] * sizes[:n_components]
    scale = np.sqrt(np.square(values).mean())
    return pd.DataFrame(values / (scale or 1.0), index=vectors.index)


def _made(
    name: str, means: pd.DataFrame, profile: Callable[[tuple[str, ...]], np.ndarray], known: dict | None = None
) -> PerturbationBaseline:
    genes = {gene for condition in means.index for gene in _genes(condition)} if known is None else known
    control = means.loc[_CONTROL].astype(np.float64)
    return PerturbationBaseline(name, control, profile, pd.Index(sorted(genes), name="gene"))
