"""Predicted expression signatures of drugs beside measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._correlation import pearson_rows, spearman_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


def signature_scores(
    observed: np.ndarray, predicted: np.ndarray, *, ks: Sequence[int] = (10, 20, 50, 100), n_true: int = 100
) -> dict[str, float]:
    """Scores of predicted L1000 signatures, as DeepCE and scLong report them.

    Parameters
    ----------
    observed, predicted
        Signatures, ``(samples, genes)``.
    ks
        Numbers of top predicted genes for the precision.
    n_true
        Top observed genes that count as right.

    Returns
    -------
    ``RMSE``
        Root of the mean squared error over all values.
    ``Pearson``, ``Spearman``
        Correlation over genes, averaged over samples; samples where it is undefined are left out.
    ``positive precision@k``, ``negative precision@k``
        Share of the ``k`` genes with the largest (smallest) prediction that are among the ``n_true`` largest (smallest)
        observed, averaged over samples. Ties go to the gene that comes first.

    Raises
    ------
    ValueError
        If shapes differ, values are missing, or there are fewer genes than ``n_true`` or ``k``.

    References
    ----------
    Pham et al., DeepCE, Nature Machine Intelligence 3, 247 (2021).
    """
    observed, predicted = np.asarray(observed, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if observed.shape != predicted.shape or observed.ndim != 2 or not observed.size:
        msg = f"signatures need one shape (samples, genes), not {observed.shape} and {predicted.shape}"
        raise ValueError(msg)
    if not (np.isfinite(observed).all() and np.isfinite(predicted).all()):
        msg = "signatures hold values that are missing or infinite"
        raise ValueError(msg)
    if not 1 <= min(*ks, n_true) <= max(*ks, n_true) <= observed.shape[1]:
        msg = f"ks and n_true must lie between 1 and the number of genes, {observed.shape[1]}"
        raise ValueError(msg)
    scores = {
        "RMSE": float(np.sqrt(np.mean((observed - predicted) ** 2))),
        "Pearson": _mean(pearson_rows(observed, predicted)),
        "Spearman": _mean(spearman_rows(observed, predicted)),
    }
    for name, sign in {"positive": -1, "negative": 1}.items():
        top = np.zeros(observed.shape, dtype=bool)
        np.put_along_axis(top, np.argsort(sign * observed, axis=1, kind="stable")[:, :n_true], values=True, axis=1)
        right = np.take_along_axis(top, np.argsort(sign * predicted, axis=1, kind="stable")[:, : max(ks)], axis=1)
        scores |= {f"{name} precision@{k}": float(right[:, :k].mean()) for k in ks}
    return scores


def _mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else np.nan
