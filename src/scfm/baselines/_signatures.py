"""Expression signatures of drugs without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances

if TYPE_CHECKING:
    from collections.abc import Sequence


def mean_signatures(
    signatures: np.ndarray,
    n_samples: int | None = None,
    *,
    conditions: Sequence[object] | np.ndarray | None = None,
    new_conditions: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """The mean signature, whatever the drug; or that of all drugs at the same dose (and in the same cell line).

    Parameters
    ----------
    signatures
        Known signatures, ``(samples, genes)``.
    n_samples
        Number of samples to predict, without conditions.
    conditions, new_conditions
        Condition of each known sample, and of each sample to predict; the mean of all serves where a condition is new.

    Returns
    -------
    Predicted signatures, ``(new samples, genes)``.

    Raises
    ------
    ValueError
        If there are no signatures, or shapes do not fit.
    """
    signatures = _checked(signatures)
    if (conditions is None) != (new_conditions is None) or (conditions is None) == (n_samples is None):
        msg = "give n_samples, or conditions and new_conditions"
        raise ValueError(msg)
    everything = signatures.mean(0)
    if conditions is None:
        return np.repeat(everything[None], n_samples, 0)
    conditions, new_conditions = (np.asarray(values).astype(str) for values in (conditions, new_conditions))
    if len(conditions) != len(signatures):
        msg = f"there are {len(conditions)} conditions for {len(signatures)} signatures"
        raise ValueError(msg)
    names, codes = np.unique(conditions, return_inverse=True)
    sums = np.zeros((len(names), signatures.shape[1]))
    np.add.at(sums, codes, signatures)
    means = np.vstack([sums / np.bincount(codes)[:, None], everything])
    place = np.searchsorted(names, new_conditions)
    known = (place < len(names)) & (names[np.minimum(place, len(names) - 1)] == new_conditions)
    return means[np.where(known, place, len(names))]


def neighbor_signatures(
    signatures: np.ndarray,
    fingerprints: np.ndarray,
    new_fingerprints: np.ndarray,
    *,
    conditions: Sequence[object] | np.ndarray | None = None,
    new_conditions: Sequence[object] | np.ndarray | None = None,
    n_neighbors: int = 5,
) -> np.ndarray:
    """Mean signature of the samples whose molecules are most alike (Tanimoto), of the same condition where there are any.

    Parameters
    ----------
    signatures
        Known signatures, ``(samples, genes)``.
    fingerprints, new_fingerprints
        Zeros and ones for each known sample and for each one to predict, such as
        :func:`scfm.tasks.molecules.morgan_fingerprints`.
    conditions, new_conditions
        Their conditions, such as doses.
    n_neighbors
        Number of neighbours. Equally distant ones are taken in the order of the samples.

    Returns
    -------
    Predicted signatures, ``(new samples, genes)``.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    signatures = _checked(signatures)
    fingerprints, new_fingerprints = (np.asarray(values, dtype=bool) for values in (fingerprints, new_fingerprints))
    if len(fingerprints) != len(signatures) or n_neighbors < 1:
        msg = f"{len(signatures)} signatures need as many fingerprints, not {len(fingerprints)}, and at least one neighbour"
        raise ValueError(msg)
    if not len(new_fingerprints):
        return np.zeros((0, signatures.shape[1]))
    distances = pairwise_distances(new_fingerprints, fingerprints, metric="jaccard")
    usable = np.ones(distances.shape, dtype=bool)
    if conditions is not None:
        usable = np.asarray(new_conditions).astype(str)[:, None] == np.asarray(conditions).astype(str)[None]
        usable |= ~usable.any(1, keepdims=True)
    order = np.argsort(np.where(usable, distances, np.inf), axis=1, kind="stable")[:, :n_neighbors]
    weights = np.take_along_axis(usable, order, 1).astype(np.float64)
    return np.einsum("ij,ijg->ig", weights / weights.sum(1, keepdims=True), signatures[order])


def ridge_signatures(
    signatures: np.ndarray, features: np.ndarray, new_features: np.ndarray, *, alpha: float = 100.0
) -> np.ndarray:
    """Signatures by ridge regression on features of the samples, such as fingerprints beside indicators of the dose.

    Parameters
    ----------
    signatures
        Known signatures, ``(samples, genes)``.
    features, new_features
        Features of the known samples, and of those to predict.
    alpha
        Weight of the penalty.

    Returns
    -------
    Predicted signatures, ``(new samples, genes)``.
    """
    signatures = _checked(signatures)
    return (
        Ridge(alpha=alpha)
        .fit(np.asarray(features, dtype=np.float64), signatures)
        .predict(np.asarray(new_features, dtype=np.float64))
    )


def _checked(signatures: np.ndarray) -> np.ndarray:
    signatures = np.asarray(signatures, dtype=np.float64)
    if signatures.ndim != 2 or not len(signatures) or not np.isfinite(signatures).all():
        msg = f"signatures need finite values (samples, genes), not the shape {signatures.shape}"
        raise ValueError(msg)
    return signatures
