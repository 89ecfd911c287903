"""Key tables that join several tensors of a file into one."""

from __future__ import annotations

import pytest
import torch

import scfm
from scfm.checkpoints.convert import KeyRule, rename

RULES = [KeyRule(rf"(\d+)\.{letter}", r"\1.ab", part=(i, 2)) for i, letter in enumerate("ab")]


def test_tensors_are_joined_in_the_order_of_their_numbers():
    state = {"0.b": torch.full((1, 3), 2.0), "1.a": torch.zeros(2, 3), "0.a": torch.ones(2, 3), "1.b": torch.ones(1, 3)}
    out, report = rename(state, RULES)
    assert out["0.ab"].tolist() == [[1] * 3, [1] * 3, [2] * 3]
    assert out["1.ab"].tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert sorted(report.loaded) == ["0.ab", "1.ab"]
    assert report.renamed == {key: f"{key[0]}.ab" for key in state}
    assert report.ok


def test_a_missing_part_is_refused():
    with pytest.raises(scfm.CheckpointError, match="1 of the 2 tensors that make up '0.ab' are missing"):
        rename({"0.a": torch.ones(1, 2)}, RULES)


def test_parts_of_unlike_width_are_refused():
    with pytest.raises(scfm.CheckpointError, match="differ in shape"):
        rename({"0.a": torch.ones(1, 2), "0.b": torch.ones(1, 3)}, RULES)


def test_the_same_part_twice_is_refused():
    rules = [*RULES, KeyRule("again", "0.ab", part=(0, 2))]
    with pytest.raises(scfm.CheckpointError, match="both map to"):
        rename({"0.a": torch.ones(1, 2), "again": torch.ones(1, 2)}, rules)
