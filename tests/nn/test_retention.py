"""Gated retention against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scfm.nn import retention
from scfm.nn.retention import BilinearFFN, GatedRetention, PackedLinear, blocks, merge_low_rank, rms_normalize

DIM, HEADS = 12, 3


@pytest.fixture
def layer():
    torch.manual_seed(0)
    out = GatedRetention(DIM, HEADS).double()
    out.init_weights(0.7)
    return out


def by_definition(layer, x, keys, weights=None):
    """One cell, with the whole matrix of scores."""
    k, v, *_ = layer.kvqu(keys).unflatten(1, (4, HEADS, -1)).transpose(0, 2).unbind(1)
    *_, q, u = layer.kvqu(x).unflatten(1, (4, HEADS, -1)).transpose(0, 2).unbind(1)
    scores = F.relu(q) @ F.relu(k).transpose(1, 2) / layer.dim_head
    if weights is not None:
        scores = scores * weights
    out = scores @ v
    out = out / out.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return layer.out((out * F.silu(u)).transpose(0, 1).flatten(1))


LENGTHS = [5, 1, 9, 2]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [3, 7, 100])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_ragged_batches_are_the_cells_one_by_one(layer, monkeypatch, weighted, block, grad, padded):
    monkeypatch.setattr(retention, "_CPU_BLOCK", block)
    if padded:  # as on an accelerator
        monkeypatch.setattr(retention, "_one_by_one", lambda x: False)
    x = torch.randn(sum(LENGTHS), DIM, dtype=torch.float64)
    weights = torch.randint(0, 4, (len(x),)) if weighted else None
    with torch.set_grad_enabled(grad):
        sums = layer.sums(x, LENGTHS, weights)
        parts = [layer.read(x[b.rows], sums[b.cells], b.lengths) for b in blocks(LENGTHS, x)]
    assert len(parts) == (1 if grad or block == 100 else -(-len(x) // block))
    cells = x.split(LENGTHS)
    factors = weights.split(LENGTHS) if weighted else [None] * 4
    expected = [by_definition(layer, cell, cell, w) for cell, w in zip(cells, factors, strict=True)]
    torch.testing.assert_close(torch.cat(parts), torch.cat(expected))


def test_queries_of_other_tokens(layer):
    x, keys = (torch.randn(n, DIM, dtype=torch.float64) for n in (4, 11))
    out = layer.read(x, layer.sums(keys, [4, 7]), [1, 3])
    expected = by_definition(layer, x[:1], keys[:4]), by_definition(layer, x[1:], keys[4:])
    torch.testing.assert_close(out, torch.cat(expected))


def test_cells_without_tokens_read_nothing(layer):
    x = torch.randn(3, DIM, dtype=torch.float64)
    sums = layer.sums(x, [0, 3, 0])
    assert not sums[[0, 2]].any()
    out = layer.read(x, sums, [1, 1, 1])
    assert not out[[0, 2]].any()
    assert not layer.sums(x[:0], [0, 0]).any()


def test_features_multiply_to_the_scores(layer):
    x, keys = (torch.randn(n, DIM, dtype=torch.float64) for n in (4, 6))
    q, k = layer.features(x, keys)
    k_full = layer.project(keys, 0, 1)[0]
    q_full = layer.project(x, 2, 3)[0]
    expected = torch.einsum("qhd,khd->hqk", F.relu(q_full), F.relu(k_full)) / layer.dim_head
    torch.testing.assert_close(q @ k.transpose(1, 2), expected)


def test_gradients(layer):
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: layer.read(x, layer.sums(x, [4, 3]), [4, 3]), x)


def test_a_dead_head_has_no_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    out = rms_normalize(x)
    out.sum().backward()
    assert not out.any()
    assert not x.grad.any()


def test_bfloat16_sums_do_not_lose_small_terms():
    k = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    assert retention.sum_keys_values(k, k, [4096]).item() == 4096
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = retention.sum_keys_values(k.float(), k.float() / 3, [4096])
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.item(), 4096 / 3, rtol=1e-4, atol=0)


def test_low_rank_updates_merge_into_the_weights():
    torch.manual_seed(0)
    layer = PackedLinear(DIM, 3, rank=2).double()
    layer.init_weights([1.0, 0.5, 2.0])
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, DIM, dtype=torch.float64)
    merged = F.linear(x, merge_low_rank(layer.weight, layer.lora_a, layer.lora_b))
    torch.testing.assert_close(layer(x), merged)
    torch.testing.assert_close(layer(x, 1, 2), merged[:, DIM : 2 * DIM])
    second = layer.weight[DIM : 2 * DIM] + layer.lora_b[DIM : 2 * DIM] @ layer.lora_a[2:4]
    torch.testing.assert_close(layer(x, 1, 2), x @ second.T)


def test_bilinear_network():
    torch.manual_seed(0)
    ffn = BilinearFFN(DIM)
    ffn.init_weights(1.0)
    x = torch.randn(4, DIM)
    u, v = ffn.uv.weight.chunk(2)
    torch.testing.assert_close(ffn(x), ((x @ u.T) * (x @ v.T)) @ ffn.out.weight.T)
    torch.testing.assert_close(ffn(-x), ffn(x))
