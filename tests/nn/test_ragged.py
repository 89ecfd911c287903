"""Ragged batches against one cell at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.nn.attention import attend
from scfm.nn.ragged import attend_ragged, pad, unpad

HEADS, DIM = 2, 4


def draw(tokens, seed):
    return torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_padding_and_back(lengths):
    flat = draw(sum(lengths), 0)
    padded, padding = pad(flat, lengths)
    assert padded.shape == (len(lengths), max(lengths), HEADS, DIM)
    assert (padding is None) == (len(set(lengths)) == 1)
    for i, (row, length) in enumerate(zip(padded, lengths, strict=True)):
        start = sum(lengths[:i])
        assert torch.equal(row[:length], flat[start : start + length])
        assert not row[length:].any()
    assert torch.equal(unpad(padded, padding), flat)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_attention_stays_inside_each_cell(lengths):
    q, k, v = (draw(sum(lengths), seed) for seed in range(3))
    out = attend_ragged(q, k, v, lengths)
    cells = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    alone = [attend(*(x.transpose(0, 1)[None] for x in cell))[0].transpose(0, 1).flatten(1) for cell in cells]
    torch.testing.assert_close(out, torch.cat(alone))


@pytest.mark.parametrize("lengths", [[5, 5], [7, 3]])
def test_gradients_reach_all_inputs(lengths):
    inputs = [draw(10, seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_ragged(q, k, v, lengths), inputs)
