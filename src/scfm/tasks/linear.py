"""Labels from a linear classifier on embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from .neighbors import Votes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def linear_votes(
    reference: NDArray,
    codes: ArrayLike,
    query: NDArray,
    n_labels: int,
    *,
    C: float = 1.0,
    class_weight: Literal["balanced"] | None = None,
    max_iter: int = 1000,
) -> Votes:
    """Fit a multinomial logistic regression on standardised embeddings, and label the query.

    Parameters
    ----------
    reference
        Embedding of the labelled cells, shape ``(cells, dim)``.
    codes
        Number of the label of each of them; cells with -1, or without an embedding, are left out.
    query
        Embedding of the cells to label.
    n_labels
        Number of labels.
    C
        Inverse strength of the penalty.
    class_weight
        ``"balanced"`` gives all labels the same weight.
    max_iter
        Most iterations of the solver.

    Returns
    -------
    Labels, confidence and probabilities; cells without an embedding have none, labels without cells the probability 0.

    Raises
    ------
    ValueError
        If fewer than two labels have cells, or widths differ.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    codes = np.asarray(codes)
    if reference.shape[1] != query.shape[1]:
        msg = f"the reference has {reference.shape[1]} columns and the query {query.shape[1]}; embed both alike"
        raise ValueError(msg)
    usable = (codes >= 0) & np.isfinite(reference).all(1)
    present = np.unique(codes[usable])
    if len(present) < 2:
        msg = f"{len(present)} labels of the reference have cells with an embedding; a classifier needs at least two"
        raise ValueError(msg)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight=class_weight, max_iter=max_iter))
    model.fit(reference[usable].astype(np.float64), codes[usable])
    sought = np.isfinite(query).all(1)
    out = Votes(
        np.full(len(query), -1, dtype=np.int64),
        np.full(len(query), np.nan),
        np.full((len(query), n_labels), np.nan, dtype=np.float32),
    )
    if sought.any():
        table = np.zeros((int(sought.sum()), n_labels))
        table[:, present] = model.predict_proba(query[sought].astype(np.float64))
        out.codes[sought] = table.argmax(1)
        out.confidence[sought] = table.max(1)
        out.probabilities[sought] = table
    return out
