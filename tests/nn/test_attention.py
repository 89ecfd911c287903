"""Softmax attention: whichever kernel is picked, the result is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scfm.backbones.scfoundation.layers import TransformerLayer
from scfm.backbones.scgpt import SCGPTConfig
from scfm.backbones.scgpt.module import EncoderLayer
from scfm.nn import attention


def test_blockwise_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 700, 8) for _ in range(3))
    mask = torch.ones(3, 1, 1, 700, dtype=torch.bool)
    mask[1, ..., 50:] = False
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        np.testing.assert_allclose(attention._attend_chunked(q, k, v, m), expected, atol=1e-5)


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_kernels_are_near_float32(monkeypatch, chunks, dtype):
    monkeypatch.setattr(attention, "_chunks_win", lambda dtype: chunks)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 64) for _ in range(3))
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[1, 100:] = True
    expected = attention.attend(q, k, v, padding)
    with torch.no_grad():
        found = attention.attend(*(x.to(dtype) for x in (q, k, v)), padding)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.float(), expected, atol=0.02)


def test_the_kernel_is_chosen_by_its_time(monkeypatch):
    seconds = iter([2.0, 1.0, 1.1, 1.0])
    monkeypatch.setattr(attention, "best_time", lambda run: next(seconds))
    choose = attention._chunks_win.__wrapped__
    assert choose(torch.bfloat16)
    assert not choose(torch.bfloat16)  # no clear difference


def scgpt_layer(x):
    layer = EncoderLayer(SCGPTConfig(dim=16, n_heads=2, ffn_dim=24)).eval()
    return lambda: layer(x[None])[0]


def scfoundation_layer(x):
    layer = TransformerLayer(16, 2, 0.0).eval()
    return lambda: layer(x, [len(x)])


@pytest.mark.parametrize("make", [scgpt_layer, scfoundation_layer])
def test_residuals_keep_their_precision_under_autocast(make):
    """Validation has no gradients, training has; with mixed precision both must add to the same float32 stream."""
    torch.manual_seed(0)
    run = make(torch.randn(9, 16) * 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run().detach()
        with torch.no_grad():
            np.testing.assert_allclose(run(), expected, atol=1e-6)
