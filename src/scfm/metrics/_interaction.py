"""Genetic interactions: what two perturbations do together, beside what each does alone."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist, squareform
from sklearn.linear_model import TheilSenRegressor

# the limits with which GEARS fits
_MAX_SUBPOPULATION, _MAX_ITER = 100_000, 1000


def genetic_interaction(
    first: np.ndarray, second: np.ndarray, double: np.ndarray, *, random_state: int = 1000
) -> dict[str, float]:
    """Interaction parameters of a pair of perturbations, from a robust fit of ``double ~ c1 first + c2 second``.

    All arguments are changes of mean expression from control, gene by gene.

    Parameters
    ----------
    first, second
        Effect of each perturbation alone, ``(genes,)``.
    double
        Effect of both together, ``(genes,)``.
    random_state
        Seed of the subsets of genes, which matters for more than 447 genes; GEARS uses 1000.

    Returns
    -------
    ``c1``, ``c2``
        Coefficients of the Theil-Sen regression without an intercept.
    ``magnitude``
        Length of ``(c1, c2)``; large for synergy, small where one effect suppresses the other.
    ``dominance``
        Absolute logarithm (base 10) of ``c1 / c2``; NaN if their signs differ.
    ``model fit``
        Pearson correlation of the fit with the double effect.
    ``similarity``, ``similarity singles``, ``similarity first``, ``similarity second``
        Distance correlations: both singles with the double effect, the singles with each other, each with the double.
    ``equality of contribution``
        The smaller of the last two divided by the larger.

    References
    ----------
    Norman et al., Science 365, 786 (2019); Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024).
    """
    first, second, double = _effects(first, second, double)
    singles = np.column_stack([first, second])
    model = TheilSenRegressor(
        fit_intercept=False, max_subpopulation=_MAX_SUBPOPULATION, max_iter=_MAX_ITER, random_state=random_state
    ).fit(singles, double)
    c1, c2 = model.coef_
    alone = [distance_correlation(single, double) for single in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        fit = np.corrcoef(singles @ model.coef_, double)[0, 1]
        dominance = np.abs(np.log10(c1 / c2))
        equality = np.min(alone) / np.max(alone)
    return {
        "c1": float(c1),
        "c2": float(c2),
        "magnitude": float(np.hypot(c1, c2)),
        "dominance": float(dominance),
        "model fit": float(fit),
        "similarity": distance_correlation(singles, double),
        "similarity singles": distance_correlation(first, second),
        "similarity first": alone[0],
        "similarity second": alone[1],
        "equality of contribution": float(equality),
    }


def interaction_magnitude(first: np.ndarray, second: np.ndarray, double: np.ndarray) -> dict[str, float]:
    """Magnitude of an interaction by least squares with an intercept, as the scLong evaluation takes it.

    That evaluation uses the 50 most differentially expressed genes of the pair, and the measured single effects for every
    model.

    Parameters
    ----------
    first, second, double
        As in :func:`genetic_interaction`.

    Returns
    -------
    ``c1``, ``c2``, ``intercept`` and ``magnitude``, the length of ``(c1, c2)``.
    """
    first, second, double = _effects(first, second, double)
    design = np.column_stack([first, second, np.ones_like(first)])
    c1, c2, intercept = np.linalg.lstsq(design, double)[0]
    return {"c1": float(c1), "c2": float(c2), "intercept": float(intercept), "magnitude": float(np.hypot(c1, c2))}


def distance_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Distance correlation of Székely et al. (Annals of Statistics 2007), between 0 (independent) and 1.

    Parameters
    ----------
    first, second
        Observations in rows, ``(n,)`` or ``(n, variables)``. Takes memory for a few matrices ``(n, n)``.

    Returns
    -------
    The correlation; NaN if one of them is constant.
    """
    first, second = (np.asarray(values, dtype=np.float64).reshape(len(values), -1) for values in (first, second))
    if len(first) != len(second):
        msg = f"there are {len(first)} and {len(second)} observations"
        raise ValueError(msg)
    first, second = _centred_distances(first), _centred_distances(second)
    norm = np.sqrt(np.vdot(first, first) * np.vdot(second, second))
    return float(np.sqrt(max(np.vdot(first, second), 0) / norm)) if norm > 0 else np.nan


def _centred_distances(values: np.ndarray) -> np.ndarray:
    distances = squareform(pdist(values))
    means = distances.mean(0)
    return distances - means - means[:, None] + means.mean()


def _effects(*effects: np.ndarray) -> tuple[np.ndarray, ...]:
    out = tuple(np.asarray(effect, dtype=np.float64).ravel() for effect in effects)
    sizes = [len(effect) for effect in out]
    if len(set(sizes)) > 1 or sizes[0] < 3:
        msg = f"effects need the same genes, at least three; there are {', '.join(map(str, sizes))}"
        raise ValueError(msg)
    if not all(np.isfinite(effect).all() for effect in out):
        msg = "effects hold values that are missing or infinite"
        raise ValueError(msg)
    return out
