"""Predicted responses to perturbations beside the measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from ._correlation import centred_rows, constant_rows, pearson_rows
from ._labels import encode_complete

if TYPE_CHECKING:
    from collections.abc import Sequence


def condition_means(
    expression: np.ndarray | sparse.spmatrix,
    conditions: Sequence[str] | np.ndarray,
    *,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Mean expression of the cells of each condition.

    Parameters
    ----------
    expression
        Cells by genes, sparse or dense.
    conditions
        Condition of each cell.
    names
        Conditions to give, in this order; by default all, sorted.

    Returns
    -------
    Conditions by genes, with the conditions as index.

    Raises
    ------
    ValueError
        If a condition has no cells, or a cell no condition.
    """
    expression = expression if sparse.issparse(expression) else np.asarray(expression)
    codes, found = encode_complete(conditions, "conditions", expression.shape[0])
    position, wanted = _positions(found, names)
    shape = len(found), len(codes)
    members = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=shape)
    sums = members @ expression
    sums = sums.toarray() if sparse.issparse(sums) else sums
    means = sums / np.bincount(codes, minlength=len(found))[:, None]
    return pd.DataFrame(means[position], index=pd.Index(wanted, name="condition"))


def de_quantiles(
    expression: np.ndarray | sparse.spmatrix,
    conditions: Sequence[str] | np.ndarray,
    de_genes: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    *,
    names: Sequence[str] | None = None,
    quantiles: tuple[float, float] = (0.45, 0.55),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Quantiles of the expression of changed genes over the cells of each condition.

    Parameters
    ----------
    expression, conditions, names
        As in :func:`condition_means`.
    de_genes
        For each condition, in the order of the result, positions of its most differentially expressed genes.
    quantiles
        The lower and the upper one.

    Returns
    -------
    Lower and upper quantiles, conditions by genes each, NaN for genes that are not among those of the condition.

    Raises
    ------
    ValueError
        If a condition has no cells or no genes, or a cell no condition.
    """
    expression = expression.tocsr() if sparse.issparse(expression) else np.asarray(expression)
    codes, found = encode_complete(conditions, "conditions", expression.shape[0])
    position, wanted = _positions(found, names)
    _mask(de_genes, shape := (len(wanted), expression.shape[1]))
    low, high = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, (code, genes) in enumerate(zip(position, de_genes, strict=True)):
        block = expression[np.flatnonzero(codes == code)][:, np.asarray(genes)]
        block = block.toarray() if sparse.issparse(block) else block
        low[row, genes], high[row, genes] = np.quantile(block.astype(np.float64), quantiles, axis=0)
    index = pd.Index(wanted, name="condition")
    return pd.DataFrame(low, index=index), pd.DataFrame(high, index=index)


def perturbation_scores(
    observed: pd.DataFrame | np.ndarray,
    predicted: pd.DataFrame | np.ndarray,
    control: np.ndarray,
    *,
    paired_control: pd.DataFrame | np.ndarray | None = None,
    centroid: np.ndarray | None = None,
    de_genes: Sequence[Sequence[int] | np.ndarray] | np.ndarray | None = None,
    non_dropout_de_genes: Sequence[Sequence[int] | np.ndarray] | np.ndarray | None = None,
    quantiles: tuple[pd.DataFrame | np.ndarray, pd.DataFrame | np.ndarray] | None = None,
) -> pd.DataFrame:
    """Scores of predicted mean responses, as GEARS, scGPT, scFoundation, scLong and CellFM report them.

    Parameters
    ----------
    observed, predicted
        Mean expression of the cells of each condition, ``(conditions, genes)``, see :func:`condition_means`. Data frames
        must have the same index.
    control
        Mean expression of the control cells, ``(genes,)``.
    paired_control
        For each condition, the mean of the control cells that were given to the model, ``(conditions, genes)``.
    centroid
        Mean of the perturbed cells that were trained on, ``(genes,)``. What all perturbations share is in it, and is no merit of
        a prediction.
    de_genes
        For each condition, positions of its most differentially expressed genes, usually 20.
    non_dropout_de_genes
        The same without genes that no cell of the condition expresses although control cells do, as
        :func:`scfm.pp.perturbation_setup` finds them.
    quantiles
        Lower and upper quantiles of the expression of ``de_genes`` over the cells of each condition, see :func:`de_quantiles`.

    Returns
    -------
    One row per condition; ``.mean()`` gives the figures that papers report.

    ``MSE``
        Mean squared error.
    ``Pearson``
        Correlation of predicted and observed means (PCC1 of CellFM).
    ``Pearson delta``
        Correlation of the changes from ``control`` (PCC3 of CellFM, the one of the scGPT and scLong papers).
    ``Pearson paired delta``
        Correlation of the changes from ``paired_control`` (PCC2 of CellFM); absent without it.
    ``Pearson centroid delta``
        Correlation of the changes from ``centroid``; absent without it.
    ``R2``
        Coefficient of determination, with the observed means as truth.
    ``DE MSE`` ...
        The same over ``de_genes`` only; absent without them.
    ``non-dropout DE MSE`` ...
        The same over ``non_dropout_de_genes`` only; absent without them.
    ``DE within quantiles``
        Share of ``de_genes`` whose predicted mean lies between the two quantiles, both included (45% and 55% in scFoundation); absent
        without ``quantiles``.

    Correlations with a constant profile, and R2 of one, are NaN.

    Raises
    ------
    ValueError
        If shapes or indices differ, or values are missing.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024); for ``centroid``, Viñas Torné et al., Systema, Nature Biotechnology
    (2025).
    """
    index = pd.RangeIndex(len(observed), name="condition")
    if isinstance(observed, pd.DataFrame):
        index = observed.index
        for other in (predicted, paired_control):
            if isinstance(other, pd.DataFrame) and not other.index.equals(index):
                msg = "the tables have different conditions, or in another order; reindex them alike"
                raise ValueError(msg)
    truth = np.asarray(observed, dtype=np.float64)
    guess = _checked(predicted, "predicted", truth.shape)
    deltas = {"Pearson delta": _checked(control, "control", truth.shape[1:])}
    if paired_control is not None:
        deltas["Pearson paired delta"] = _checked(paired_control, "paired_control", truth.shape)
    if centroid is not None:
        deltas["Pearson centroid delta"] = _checked(centroid, "centroid", truth.shape[1:])
    _checked(truth, "observed", truth.shape)
    masks = {"": np.ones(truth.shape, dtype=bool)}
    if de_genes is not None:
        masks["DE "] = _mask(de_genes, truth.shape)
    if non_dropout_de_genes is not None:
        masks["non-dropout DE "] = _mask(non_dropout_de_genes, truth.shape, "non_dropout_de_genes")
    columns = {}
    for prefix, mask in masks.items():
        error = np.where(mask, truth - guess, 0)
        squares = np.einsum("ij,ij->i", error, error)
        columns[f"{prefix}MSE"] = squares / mask.sum(1)
        columns[f"{prefix}Pearson"] = pearson_rows(truth, guess, mask)
        for name, base in deltas.items():
            columns[prefix + name] = pearson_rows(truth - base, guess - base, mask)
        total = np.einsum("ij,ij->i", *2 * [centred_rows(truth, mask)])
        varies = ~constant_rows(truth, mask)
        columns[f"{prefix}R2"] = 1 - np.divide(squares, total, out=np.full(len(total), np.nan), where=varies)
    if quantiles is not None:
        columns["DE within quantiles"] = _within(guess, quantiles, masks.get("DE "))
    return pd.DataFrame(columns, index=index)


def _positions(found: np.ndarray, names: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Where the wanted conditions are among those found, and their names."""
    wanted = found if names is None else np.asarray(names).astype(str)
    position = pd.Index(found).get_indexer(wanted)
    if (position < 0).any():
        msg = f"no cells have the condition {', '.join(map(repr, wanted[position < 0].tolist()))}"
        raise ValueError(msg)
    return position, wanted


def _within(guess: np.ndarray, quantiles: tuple[pd.DataFrame | np.ndarray, ...], mask: np.ndarray | None) -> np.ndarray:
    """Share of the genes of the mask between two limits."""
    if mask is None:
        msg = "quantiles= are those of de_genes; give these, too"
        raise ValueError(msg)
    low, high = (_checked(np.where(mask, side, 0), "quantiles", guess.shape) for side in map(np.asarray, quantiles))
    return (mask & (guess >= low) & (guess <= high)).sum(1) / mask.sum(1)


def _checked(values: pd.DataFrame | np.ndarray, what: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != shape:
        msg = f"{what} has the shape {values.shape}, but {shape} is needed"
        raise ValueError(msg)
    if not np.isfinite(values).all():
        msg = f"{what} holds values that are missing or infinite"
        raise ValueError(msg)
    return values


def _mask(
    genes: Sequence[Sequence[int] | np.ndarray] | np.ndarray, shape: tuple[int, int], what: str = "de_genes"
) -> np.ndarray:
    if len(genes) != shape[0]:
        msg = f"{what} has genes for {len(genes)} conditions, but there are {shape[0]}"
        raise ValueError(msg)
    sizes = np.array([len(chosen) for chosen in genes], dtype=np.int64)
    if not sizes.all():
        msg = f"a condition has no {what}; leave it out, or give it some"
        raise ValueError(msg)
    columns = np.concatenate([np.asarray(chosen) for chosen in genes])
    if columns.dtype.kind not in "iu" or columns.min() < 0 or columns.max() >= shape[1]:
        msg = f"{what} are positions of genes, from 0 to {shape[1] - 1}"
        raise ValueError(msg)
    mask = np.zeros(shape, dtype=bool)
    mask[np.repeat(np.arange(len(sizes)), sizes), columns] = True
    return mask
