"""Performer layers against the definition of the layer, and streaming against the code with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scfm.nn import linear_attention, performer, steps
from scfm.nn.linear_attention import favor_attention
from scfm.nn.performer import PerformerLayer, PerformerStack

LENGTHS = [17, 9, 23]


def make(seed=0, dtype=torch.float64, **options):
    sizes = {"dim": 12, "depth": 2, "heads": 3, "dim_head": 6, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PerformerStack(**sizes).to(dtype).eval()


def draw(length, dim=12, seed=0, dtype=torch.float64):
    return torch.randn(length, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[{}, {"qkv_bias": False, "final_norm": False}, {"heads": 5, "dim_head": 4}], ids=str)
def stack(request):
    return make(**request.param)


def by_definition(stack, x):
    """Two residual blocks for each layer, one cell."""
    for layer in stack.layers:
        h = F.layer_norm(x, x.shape[-1:], layer.norm1.weight, layer.norm1.bias)
        heads = [
            linear(h).view(len(x), layer.heads, -1).transpose(0, 1) for linear in (layer.query, layer.key, layer.value)
        ]
        attended = favor_attention(*(part[None] for part in heads), layer.projection)[0]
        x = x + layer.out(attended.transpose(0, 1).reshape(len(x), -1))
        h = F.layer_norm(x, x.shape[-1:], layer.norm2.weight, layer.norm2.bias)
        x = x + layer.linear2(F.gelu(layer.linear1(h)))
    return stack.norm(x)


def test_layers_follow_the_definition(stack):
    x = draw(20)
    with torch.inference_mode():
        torch.testing.assert_close(stack(x.clone(), [20]), by_definition(stack, x))


@pytest.mark.parametrize("key_max", ["cell", "batch", "head"])
def test_streaming_and_gradient_code_agree(stack, key_max):
    x = draw(sum(LENGTHS))
    expected = stack(x, LENGTHS, key_max=key_max).detach()
    with torch.inference_mode():
        torch.testing.assert_close(stack(x.clone(), LENGTHS, key_max=key_max), expected)


def test_sizes_of_steps_change_nothing(stack, monkeypatch):
    x = draw(150)
    with torch.inference_mode():
        expected = stack(x.clone(), [150])
        monkeypatch.setattr(steps, "MIN_ROWS", 7)
        monkeypatch.setattr(performer, "_STEP_PER_THREAD", {8: 1})
        monkeypatch.setattr(linear_attention, "_STEP_PER_THREAD", 1)
        torch.testing.assert_close(stack(x.clone(), [150]), expected)


def test_chosen_rows_are_those_of_the_whole(stack):
    x, rows = draw(20), torch.tensor([3, 0, 19])
    with torch.inference_mode():
        whole = stack(x.clone(), [20])
        torch.testing.assert_close(stack(x.clone(), [20], rows=rows), whole[rows])


def test_options_decide_which_parameters_there_are():
    plain, full = make(qkv_bias=False, final_norm=False), make()
    names = {name.partition(".0.")[2] for name in plain.state_dict() if ".0." in name}
    assert "query.weight" in names
    assert "query.bias" not in names
    missing = {name for name in full.state_dict() if name not in plain.state_dict()}
    biases = {f"layers.{i}.{part}.bias" for i in range(2) for part in ("query", "key", "value")}
    assert missing == {"norm.weight", "norm.bias", *biases}
    assert plain.layers[0].query.weight.shape == (18, 12)
    assert plain.layers[0].projection.shape == (10, 6)


def test_streams_keep_their_type_beside_narrow_weights():
    exact = make(dtype=torch.float32, dim=64, heads=4, dim_head=16, final_norm=False)
    narrow = make(dtype=torch.float32, dim=64, heads=4, dim_head=16, final_norm=False).to(torch.bfloat16)
    assert narrow.layers[0].linear1.weight.dtype == torch.bfloat16
    assert narrow.layers[0].projection.dtype == torch.float32
    x = draw(40, 64, dtype=torch.float32)
    with torch.inference_mode():
        expected = exact(x.clone(), [40])
        wide, low = narrow(x.clone(), [40]), narrow(x.bfloat16(), [40])
    assert wide.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(wide.flatten(), expected.flatten(), 0) > 0.9999
    # what the stream carried unchanged is not rounded
    assert (wide - expected).abs().mean() < 0.7 * (low - expected).abs().mean()


def test_maps_are_those_of_the_attention_and_come_in_pieces(stack):
    layer, x, places = stack.layers[0], draw(20), torch.arange(20)
    with torch.inference_mode():
        weights = layer.attention_map(x, places)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        values = layer.split_heads(layer.value(layer.norm1(x))).transpose(0, 1)
        attended = layer.out((weights @ values).transpose(0, 1).flatten(1))
        after = x.clone()
        sums = layer.key_sums(after)
        layer.attend_(after, sums, sums.maximum.amax())
        torch.testing.assert_close(after, x + attended)
        pieces = torch.cat(list(layer.iter_attention_map(x, places, 7)), 1)
        torch.testing.assert_close(pieces, weights)


def test_random_features_are_drawn_anew_after_enough_calls():
    stack = make()
    before = [layer.projection.clone() for layer in stack.layers]
    for _ in range(3):
        stack.count_call(3)
    assert int(stack.calls_since_redraw) == 3
    assert all(torch.equal(layer.projection, old) for layer, old in zip(stack.layers, before, strict=True))
    stack.count_call(3, torch.Generator().manual_seed(1))
    assert int(stack.calls_since_redraw) == 0, "the call that draws does not count"
    drawn = [layer.projection.clone() for layer in stack.layers]
    assert not any(torch.equal(new, old) for new, old in zip(drawn, before, strict=True))
    stack.redraw_projections(torch.Generator().manual_seed(1))
    assert all(torch.equal(layer.projection, old) for layer, old in zip(stack.layers, drawn, strict=True))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend must be one of scfm, performer-pytorch"):
        make().use_backend("flash")


def test_short_and_long_cells_learn_the_same(monkeypatch):
    layer = PerformerLayer(12, 2, 8)
    lengths = [9, 4]
    grads = []
    for step in (100, 3):
        monkeypatch.setattr("scfm.nn.performer.tokens_per_step", lambda *_, n=step: n)
        x = torch.randn(13, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer.zero_grad()
        layer(x, lengths, "cell").square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for together, in_steps in zip(*grads, strict=True):
        torch.testing.assert_close(together, in_steps, rtol=1e-4, atol=1e-5)
