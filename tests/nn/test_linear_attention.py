"""Linear attention against its definition, written out naively."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm._errors import MissingExtraError
from scfm.nn.linear_attention import (
    KeySums,
    default_features,
    favor_attention,
    key_features,
    orthogonal_random_features,
    query_features,
    shared_maxima,
)
from scfm.nn.linear_attention_gradient import ragged_attention

CELLS, HEADS, LENGTH, DIM, FEATURES = 3, 2, 23, 6, 10
KEY_MAX = ["cell", "batch", "head"]


def draw(*shape, seed=0, dtype=torch.float64, scale=1.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


@pytest.fixture
def qkv():
    return [draw(CELLS, HEADS, LENGTH, DIM, seed=seed) for seed in range(3)]


@pytest.fixture
def projection():
    return orthogonal_random_features(FEATURES, DIM, torch.Generator().manual_seed(7), torch.float64)


def naive_attention(q, k, v, projection, key_max):
    """The formulas of the paper and of performer-pytorch, one cell, head and token at a time."""
    q, k, v, projection = (x.numpy() for x in (q, k, v, projection))
    c = q.shape[-1] ** -0.25
    u = {name: np.einsum("bhld,md->bhlm", c * x, projection) for name, x in (("q", q), ("k", k))}
    out = np.zeros_like(v)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            chosen = {"cell": u["k"][b], "batch": u["k"], "head": u["k"][b, h]}[key_max]
            g = {name: (c * x[b, h] ** 2 * c).sum(-1, keepdims=True) / 2 for name, x in (("q", q), ("k", k))}
            phi_k = np.exp(u["k"][b, h] - g["k"] - chosen.max()) + 1e-4
            for i in range(q.shape[2]):
                phi_q = np.exp(u["q"][b, h, i] - g["q"][i] - u["q"][b, h, i].max()) + 1e-4
                weights = phi_k @ phi_q
                out[b, h, i] = weights @ v[b, h] / weights.sum()
    return out


def streamed(q, k, v, projection, key_max, sizes):
    """The same through :class:`KeySums`, with keys and queries in pieces of the given sizes."""
    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    sums = [KeySums.empty(q.shape[1], projection) for _ in q]
    for total, cell_k, cell_v in zip(sums, tokens[1], tokens[2], strict=True):
        for piece_k, piece_v in zip(cell_k.split(sizes), cell_v.split(sizes), strict=True):
            total.add(piece_k, piece_v)
    out = []
    for total, maximum, cell_q in zip(sums, shared_maxima(sums, key_max), tokens[0], strict=True):
        context = total.context(maximum)
        out.append(torch.cat([context.read(piece) for piece in cell_q.split(sizes)]))
    return torch.stack(out).transpose(1, 2)


@pytest.mark.parametrize("key_max", KEY_MAX)
def test_attention_follows_the_definition(qkv, projection, key_max):
    expected = naive_attention(*qkv, projection, key_max)
    np.testing.assert_allclose(favor_attention(*qkv, projection, key_max=key_max), expected, rtol=1e-10)


@pytest.mark.parametrize("key_max", KEY_MAX)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5, unique=True), scale=st.floats(0.1, 8))
def test_pieces_give_the_same_as_the_whole(key_max, cuts, scale):
    q, k, v = (draw(CELLS, HEADS, LENGTH, DIM, seed=seed, scale=scale) for seed in range(3))
    projection = orthogonal_random_features(FEATURES, DIM, torch.Generator().manual_seed(7), torch.float64)
    sizes = np.diff([0, *sorted(cuts), LENGTH]).tolist()
    whole = favor_attention(q, k, v, projection, key_max=key_max)
    np.testing.assert_allclose(streamed(q, k, v, projection, key_max, sizes), whole, rtol=1e-9, atol=1e-12)


def test_a_late_large_key_does_not_overflow(projection):
    k = draw(4, 1, DIM, scale=0.1)
    k[3] *= 3000
    sums = KeySums.empty(1, projection.float())
    for key in k.float():
        sums.add(key[None], torch.ones(1, 1, DIM))
    out = sums.context(sums.maximum).read(draw(5, 1, DIM).float())
    torch.testing.assert_close(out, torch.ones(5, 1, DIM))


def test_cells_do_not_see_each_other_unless_asked(qkv, projection):
    q, k, v = qkv
    k = k.clone()
    k[1] *= 4
    together = favor_attention(q, k, v, projection)
    alone = torch.cat([favor_attention(q[[i]], k[[i]], v[[i]], projection) for i in range(CELLS)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    by_batch = favor_attention(q, k, v, projection, key_max="batch")
    assert (by_batch[0] - alone[0]).abs().max() > 1e-6


def test_padding_counts_for_nothing(qkv, projection):
    q, k, v = qkv
    padding = torch.zeros(CELLS, LENGTH, dtype=torch.bool)
    padding[0, 15:] = True
    k = k.masked_fill(padding[:, None, :, None], 50.0)
    padded = favor_attention(q, k, v, projection, padding=padding)
    short = favor_attention(q[:1], k[:1, :, :15], v[:1, :, :15], projection)
    torch.testing.assert_close(padded[:1], short)


def test_maps_apply_like_the_attention_and_sum_to_one(qkv, projection):
    q, k, v = (x[0].transpose(0, 1) for x in qkv)
    sums = KeySums.empty(HEADS, projection)
    sums.add(k, v)
    context = sums.context(sums.maximum.amax())
    weights = context.map(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(HEADS, LENGTH, dtype=torch.float64))
    torch.testing.assert_close((weights @ v.transpose(0, 1)).transpose(0, 1), context.read(q))
    rows, columns = [3, 5], [0, 9, 22]
    torch.testing.assert_close(context.map(q[rows], k[columns]), weights[:, rows][:, :, columns])


def test_features_estimate_the_softmax_kernel():
    dim, features = 8, 20_000
    projection = draw(features, dim, seed=5, scale=1)
    q, k = draw(1, 1, 4, dim, scale=0.3), draw(1, 1, 5, dim, seed=1, scale=0.3)
    estimate = query_features(q, projection) @ key_features(k, projection).transpose(-1, -2)
    exact = torch.exp(q @ k.transpose(-1, -2) * dim**-0.5)
    ratio = estimate / exact
    # each query row carries its own factor exp(-max), the keys share one
    ratio = ratio / ratio[..., :1]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.05, atol=0)


def test_gradients_flow_through_the_maxima(qkv, projection):
    small = [x[:2, :1, :4].clone().requires_grad_() for x in qkv]
    for key_max in KEY_MAX:
        assert torch.autograd.gradcheck(
            lambda q, k, v, how=key_max: favor_attention(q, k, v, projection, key_max=how), small
        )


@pytest.mark.parametrize(("features", "dim"), [(10, 6), (12, 6), (5, 4), (266, 64)])
def test_random_features_are_orthogonal_in_blocks(features, dim):
    projection = orthogonal_random_features(features, dim, torch.Generator().manual_seed(0), torch.float64)
    assert projection.shape == (features, dim)
    directions = torch.nn.functional.normalize(projection, dim=1)
    for block in directions.split(dim):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64))
    again = orthogonal_random_features(features, dim, torch.Generator().manual_seed(0), torch.float64)
    assert torch.equal(projection, again)


def test_norms_of_random_features_are_those_of_normal_vectors():
    norms = orthogonal_random_features(4096, 16, torch.Generator().manual_seed(0)).norm(dim=1)
    assert norms.square().mean() == pytest.approx(16, rel=0.03)
    assert norms.std() == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_number_of_features_of_the_released_models():
    assert default_features(64) == 266
    assert default_features(8) == 16


def test_bfloat16_input_is_accumulated_in_float32(qkv, projection):
    q, k, v = (x.float() for x in qkv)
    low = [x.bfloat16() for x in (q, k, v)]
    out = favor_attention(*low, projection.float())
    assert out.dtype == torch.bfloat16
    exact = favor_attention(*(x.float() for x in low), projection.float())
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)
    pieces = streamed(*low, projection.float(), "cell", 7)
    assert pieces.dtype == torch.bfloat16
    torch.testing.assert_close(pieces.float(), exact, rtol=1e-2, atol=1e-2)


def test_mixed_precision_training_keeps_the_exponents_exact(qkv, projection):
    q, k, v = (x.float() for x in qkv)
    expected = favor_attention(q, k, v, projection.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(favor_attention(q, k, v, projection.float()), expected)


def test_unknown_convention_is_named(qkv, projection):
    with pytest.raises(ValueError, match="key_max must be one of cell, batch, head"):
        favor_attention(*qkv, projection, key_max="token")


# -- performer-pytorch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_attention(monkeypatch):
    """``fast_attention(convention)``: the installed package, or one whose keys share a maximum over the batch."""
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    backend = pytest.importorskip("scfm.nn._performer_pytorch")
    backend._convention.cache_clear()
    installed = backend._convention()

    def over_the_batch(data, *, projection_matrix, is_query, eps=1e-4, device=None):
        u = data @ (projection_matrix * data.shape[-1] ** -0.25).T
        g = (data**2).sum(-1, keepdim=True) * data.shape[-1] ** -0.5 / 2
        maximum = u.amax(-1, keepdim=True) if is_query else u.max()
        return (torch.exp(u - g - maximum) + eps) * len(projection_matrix) ** -0.5

    def use(convention):
        if convention == "batch" and installed == "head":
            monkeypatch.setattr(package, "softmax_kernel", over_the_batch)
        elif convention != installed:
            pytest.skip(f"the installed performer-pytorch takes the maximum over the {installed}")
        backend._convention.cache_clear()

    yield use
    monkeypatch.undo()
    backend._convention.cache_clear()


@pytest.mark.parametrize(("convention", "able"), [("head", ["head"]), ("batch", ["batch", "cell"])])
def test_performer_pytorch_gives_the_same_where_it_has_the_convention(
    fast_attention, qkv, projection, convention, able
):
    fast_attention(convention)
    for key_max in KEY_MAX:
        options = {"key_max": key_max, "backend": "performer-pytorch"}
        if key_max in able:
            theirs = favor_attention(*qkv, projection, **options)
            np.testing.assert_allclose(theirs, naive_attention(*qkv, projection, key_max), rtol=1e-10)
            torch.testing.assert_close(theirs, favor_attention(*qkv, projection, key_max=key_max))
        else:
            with pytest.raises(ValueError, match=f"cannot give key_max='{key_max}'"):
                favor_attention(*qkv, projection, **options)


def test_performer_pytorch_has_no_padding(qkv, projection):
    padding = torch.ones(CELLS, LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="no padding"):
        favor_attention(*qkv, projection, padding=padding, backend="performer-pytorch")


def test_a_missing_package_is_named_with_its_command(qkv, projection, monkeypatch):
    monkeypatch.setitem(sys.modules, "performer_pytorch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'scfm\[performer\]'"):
        favor_attention(*qkv, projection, key_max="cell", backend="performer-pytorch")


def test_unknown_backend_is_named(qkv, projection):
    with pytest.raises(ValueError, match="backend must be one of scfm, performer-pytorch"):
        favor_attention(*qkv, projection, backend="flash")


# -- with gradients, in steps --------------------------------------------------------------------------------------------


def ragged(parts, lengths):
    """Cells of different lengths, one after the other, as ``(tokens, heads, dim)``."""
    return [torch.cat([cell[:, :n].transpose(0, 1) for cell, n in zip(part, lengths, strict=True)]) for part in parts]


def padded_attention(q, k, v, projection, lengths, key_max):
    """The same numbers by the definition, with autograd."""
    cells = [part.split(lengths) for part in (q, k, v)]
    padded = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True).transpose(1, 2) for part in cells]
    padding = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    out = favor_attention(*padded, projection, key_max=key_max, padding=padding).transpose(1, 2)
    return out[~padding]


@pytest.mark.parametrize("key_max", KEY_MAX)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=3, max_size=3), scale=st.floats(0.1, 4), seed=st.integers(0, 99)
)
def test_gradients_in_steps_are_those_of_autograd(key_max, lengths, scale, seed):
    parts = [draw(CELLS, HEADS, LENGTH, DIM, seed=seed + i, scale=scale) for i in range(3)]
    projection = orthogonal_random_features(FEATURES, DIM, torch.Generator().manual_seed(7), torch.float64)
    found = [part.requires_grad_() for part in ragged(parts, lengths)]
    expected = [part.detach().clone().requires_grad_() for part in found]
    with pytest.MonkeyPatch.context() as patch:
        # a few steps for each cell
        patch.setattr("scfm.nn.linear_attention_gradient.tokens_per_step", lambda *_: 4)
        out = ragged_attention(*found, projection, lengths, key_max=key_max)
        weight = draw(*out.shape, seed=seed + 9)
        (out * weight).sum().backward()
    theirs = padded_attention(*expected, projection, lengths, key_max)
    (theirs * weight).sum().backward()
    np.testing.assert_allclose(out.detach(), theirs.detach(), rtol=1e-9, atol=1e-12)
    for ours, reference in zip(found, expected, strict=True):
        bound = max(1e-9 * float(reference.grad.abs().max()), 1e-12)
        np.testing.assert_allclose(ours.grad, reference.grad, rtol=1e-8, atol=bound)


@pytest.mark.parametrize("key_max", KEY_MAX)
def test_gradients_in_steps_by_differences(projection, key_max):
    parts = [draw(2, 2, 4, DIM, seed=seed) for seed in range(3)]
    small = [part.requires_grad_() for part in ragged(parts, [4, 3])]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ragged_attention(q, k, v, projection, [4, 3], key_max=key_max), small
    )


def test_steps_keep_types_and_are_exact_under_autocast(projection):
    parts = ragged([draw(2, HEADS, 8, DIM, seed=seed).float() for seed in range(3)], [8, 5])
    low = [part.bfloat16().requires_grad_() for part in parts]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ragged_attention(*low, projection.float(), [8, 5])
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    exact = [part.detach().float().requires_grad_() for part in low]
    expected = padded_attention(*exact, projection.float(), [8, 5], "cell")
    expected.square().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    for ours, reference in zip(low, exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.float(), reference.grad, rtol=2e-2, atol=2e-2)


def test_nothing_of_the_size_of_the_features_is_kept(projection):
    n_tokens, n_features = 4000, 200
    wide = orthogonal_random_features(n_features, DIM, torch.Generator().manual_seed(1))
    parts = [draw(n_tokens, HEADS, DIM, seed=seed).float().requires_grad_() for seed in range(3)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        ragged_attention(*parts, wide, [n_tokens])
    assert max(sizes) <= n_tokens * HEADS * DIM
