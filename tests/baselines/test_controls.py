"""Labels that know nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from scfm.baselines import majority_labels, shuffled_labels


@pytest.mark.parametrize("kind", [list, pd.Series, pd.Categorical, np.array])
def test_shuffling_keeps_frequencies(kind):
    labels = ["a"] * 30 + ["b"] * 20 + ["c"]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    out = shuffled_labels(kind(labels), random_state=1)
    assert Counter(out.tolist()) == Counter(labels)
    assert out.tolist() != labels
    np.testing.assert_array_equal(out, shuffled_labels(kind(labels), random_state=1))
    assert out.tolist() != shuffled_labels(kind(labels), random_state=2).tolist()
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_majority():
    assert majority_labels(["b", "a", "b", None, None, None], 3).tolist() == ["b"] * 3
    assert majority_labels(["b", "a"], 1).tolist() == ["a"]
    assert majority_labels(pd.Categorical(["b"], categories=["a", "b"]), 2).tolist() == ["b", "b"]
    assert len(majority_labels(["a"], 0)) == 0
    with pytest.raises(ValueError, match="no labels"):
        majority_labels([None], 2)
