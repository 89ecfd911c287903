"""Predicted functions of genes beside known ones."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

# the thresholds of CellFM's code
_THRESHOLDS = np.arange(0, 100) / 100


def gene_function_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Scores of yes-or-no questions about genes, over all questions and genes together.

    Parameters
    ----------
    labels
        1 where a gene has a function, 0 where it has not; ``(genes,)`` or ``(genes, functions)``.
    probabilities
        Predicted probabilities of the same shape.

    Returns
    -------
    ``AUPR``
        Area under the precision-recall curve, by trapezoids.
    ``AUROC``
        Area under the receiver operating characteristic; NaN where all labels are the same.
    ``Fmax``
        Largest macro F1 (mean of the F1 of yes and of no) over thresholds 0, 0.01, ..., 0.99. CellFM reports it under this
        name; it is not the Fmax of CAFA, which averages precision and recall over genes.

    Raises
    ------
    ValueError
        If shapes differ, labels are neither 0 nor 1, or probabilities are missing.

    References
    ----------
    Zeng et al., CellFM, Nature Communications 16, 4679 (2025).
    """
    truth, score = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if truth.shape != score.shape or not truth.size:
        msg = f"labels have the shape {truth.shape} and probabilities {score.shape}; both need a value for each gene"
        raise ValueError(msg)
    if not np.isin(truth, (0, 1)).all() or not np.isfinite(score).all():
        msg = "labels have to be 0 or 1, and probabilities finite"
        raise ValueError(msg)
    truth, score = truth.ravel().astype(bool), score.ravel()
    both = truth.any() and not truth.all()
    precision, recall, _ = precision_recall_curve(truth, score) if truth.any() else (np.nan, np.nan, None)
    return {
        "AUPR": float(auc(recall, precision)) if truth.any() else np.nan,
        "AUROC": float(roc_auc_score(truth, score)) if both else np.nan,
        "Fmax": _largest_f1(truth, score),
    }


def _largest_f1(truth: np.ndarray, score: np.ndarray) -> float:
    """Largest mean of the F1 of both answers over the thresholds; an F1 without any case is 0."""
    yes, no = np.sort(score[truth]), np.sort(score[~truth])
    right_yes = len(yes) - np.searchsorted(yes, _THRESHOLDS, side="right")
    wrong_yes = len(no) - np.searchsorted(no, _THRESHOLDS, side="right")
    f1 = [
        2 * right / np.maximum(n_predicted + n_known, 1)
        for right, n_predicted, n_known in (
            (right_yes, right_yes + wrong_yes, len(yes)),
            (len(no) - wrong_yes, len(score) - right_yes - wrong_yes, len(no)),
        )
    ]
    return float(np.mean(f1, axis=0).max())
