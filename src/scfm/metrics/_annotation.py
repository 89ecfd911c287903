"""How well predicted cell types agree with known ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix as count_pairs

from .._label_names import hold_numbers
from ._labels import encode, encode_complete

if TYPE_CHECKING:
    from collections.abc import Sequence

    Labels = Sequence | np.ndarray | pd.Series

REJECTED = "rejected"
# CellFM keeps denominators away from zero with this number of cells
_CELLFM_FLOOR = 0.1


def annotation_scores(
    labels: Labels,
    predicted: Labels,
    *,
    average: Literal["sklearn", "cellfm"] = "sklearn",
    classes: Sequence | None = None,
    unknown: str | None = None,
) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of predicted labels.

    A rejected cell, whose prediction is missing, is never right: it counts in accuracy and in the recall of its class, but
    in no precision.

    Parameters
    ----------
    labels, predicted
        Known and predicted label of each cell, in the same order. Whole numbers are the same label whether they come as
        integers, as floats, or, beside numbers, as text.
    average
        How classes are averaged. ``"sklearn"``: over classes that are among the labels or the predictions, as scikit-learn
        does and the scGPT paper reports; an undefined value is 0. ``"cellfm"``: as the code of CellFM does; the macro F1
        skips classes that occur nowhere, while macro precision and recall are averaged over all ``classes``, with
        denominators of at least 0.1, so that those classes lower them.
    classes
        All classes there are, in the order of choice; by default those that occur.
    unknown
        Prediction that means a rejected cell, beside missing values.

    Returns
    -------
    ``accuracy``, ``balanced accuracy`` (mean recall of the classes of the labels), ``macro precision``, ``macro recall``,
    ``macro F1``, ``weighted F1`` (weights are the cells of a class) and ``rejected`` (share of cells).

    Raises
    ------
    ValueError
        If a known label is missing, the numbers of cells differ, or a label is not among ``classes``.
    """
    counts, rejected, _ = _counts(labels, predicted, classes, unknown)
    right, support, n_predicted = np.diag(counts), counts.sum(1) + rejected, counts.sum(0)
    recall, f1 = _divide(right, support), _divide(2 * right, support + n_predicted)
    if average == "sklearn":
        occurs = support + n_predicted > 0
        precisions, recalls = _divide(right, n_predicted)[occurs], recall[occurs]
    elif average == "cellfm":
        precisions, recalls = (right / np.maximum(total, _CELLFM_FLOOR) for total in (n_predicted, support))
    else:
        msg = f"average is 'sklearn' or 'cellfm', not {average!r}"
        raise ValueError(msg)
    return {
        "accuracy": float(right.sum() / support.sum()),
        "balanced accuracy": float(recall[support > 0].mean()),
        "macro precision": float(precisions.mean()),
        "macro recall": float(recalls.mean()),
        "macro F1": float(f1[support + n_predicted > 0].mean()),
        "weighted F1": float(f1 @ support / support.sum()),
        "rejected": float(rejected.sum() / support.sum()),
    }


def class_scores(
    labels: Labels, predicted: Labels, *, classes: Sequence | None = None, unknown: str | None = None
) -> pd.DataFrame:
    """Precision, recall and F1 of each class.

    Parameters
    ----------
    labels, predicted, classes, unknown
        As in :func:`annotation_scores`.

    Returns
    -------
    One row per class with ``precision``, ``recall``, ``F1``, ``support`` (its cells), ``predicted`` (cells that were given
    its name) and ``rejected`` (its cells without a prediction). Precision is NaN for a class that was never predicted,
    recall for one without cells, F1 where both are.
    """
    counts, rejected, names = _counts(labels, predicted, classes, unknown)
    right, support, n_predicted = np.diag(counts), counts.sum(1) + rejected, counts.sum(0)
    columns = {
        "precision": _divide(right, n_predicted, np.nan),
        "recall": _divide(right, support, np.nan),
        "F1": _divide(2 * right, support + n_predicted, np.nan),
        "support": support,
        "predicted": n_predicted,
        "rejected": rejected,
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="class"))


def confusion_matrix(
    labels: Labels,
    predicted: Labels,
    *,
    normalize: Literal["rows", "columns"] | None = None,
    classes: Sequence | None = None,
    unknown: str | None = None,
) -> pd.DataFrame:
    """Cells of each class (rows) by predicted class (columns).

    Parameters
    ----------
    labels, predicted, classes, unknown
        As in :func:`annotation_scores`.
    normalize
        ``"rows"``: shares of the cells of a class, as the scGPT paper draws it. ``"columns"``: shares of the cells with a
        prediction. Rows and columns without cells are zero.

    Returns
    -------
    Square table, with one more column ``rejected`` (or the name ``unknown``) if cells were rejected.
    """
    counts, rejected, names = _counts(labels, predicted, classes, unknown)
    columns = list(names)
    if rejected.any():
        counts, columns = np.column_stack([counts, rejected]), [*columns, unknown or REJECTED]
        if len(set(columns)) < len(columns):
            msg = f"a class is called {columns[-1]!r} like the rejected cells; name these with unknown="
            raise ValueError(msg)
    if normalize is not None:
        axes = {"rows": 1, "columns": 0}
        if normalize not in axes:
            msg = f"normalize is 'rows', 'columns' or None, not {normalize!r}"
            raise ValueError(msg)
        counts = _divide(counts, np.broadcast_to(counts.sum(axes[normalize], keepdims=True), counts.shape))
    return pd.DataFrame(counts, index=pd.Index(names, name="label"), columns=pd.Index(columns, name="predicted"))


def _counts(
    labels: Labels, predicted: Labels, classes: Sequence | None, unknown: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confusion matrix (labels in rows), rejected cells of each class, names of classes."""
    beside_numbers = hold_numbers(labels) or hold_numbers(predicted)
    guess, guess_names = encode(predicted, "predictions", beside_numbers=beside_numbers)
    true, true_names = encode_complete(labels, "labels", len(guess), beside_numbers=beside_numbers)
    if unknown is not None:
        if unknown in true_names:
            msg = f"cells are labelled {unknown!r}, which stands for a rejected prediction; leave them out first"
            raise ValueError(msg)
        means_rejected = np.append(guess_names == unknown, True)  # the last place is that of code -1
        guess = np.where(means_rejected[guess], -1, guess)
    used = np.union1d(true_names, guess_names[np.unique(guess[guess >= 0])])
    names = used if classes is None else _check_classes(classes, used, beside_numbers=beside_numbers)
    # rejected cells get a class of their own, the last
    position = pd.Index(names)
    true = position.get_indexer(true_names)[true]
    guess = np.append(position.get_indexer(guess_names), len(names))[guess]
    counts = count_pairs(true, guess, labels=np.arange(len(names) + 1))
    return counts[:-1, :-1], counts[:-1, -1], names


def _check_classes(classes: Sequence, used: np.ndarray, *, beside_numbers: bool) -> np.ndarray:
    codes, names = encode_complete(classes, "classes", len(classes), beside_numbers=beside_numbers)
    if len(names) < len(codes):
        msg = "classes holds a name twice"
        raise ValueError(msg)
    extra = np.setdiff1d(used, names)
    if len(extra):
        msg = f"labels or predictions hold {', '.join(map(repr, extra.tolist()))}, which classes does not"
        raise ValueError(msg)
    return names[codes]


def _divide(top: np.ndarray, bottom: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), empty, dtype=float), where=bottom > 0)
