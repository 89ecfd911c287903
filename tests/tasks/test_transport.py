"""Input-convex networks, the codec around them, and how both are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.checkpoints import mindspore
from scfm.metrics import kernel_discrepancy
from scfm.tasks.panel_codec import PUBLISHED_KEYS, CodecTraining, LinearCodec, PanelCodec, train_codec
from scfm.tasks.transport import (
    CodeScale,
    ConvexPotential,
    TransportMap,
    TransportTraining,
    start_from_identity,
    train_transport,
)


def close(actual, expected, tolerance):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    limit = tolerance["atol"] + tolerance["rtol"] * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= limit


def test_golden_transport(golden):
    data = golden("cellfm", "cellot_icnn")
    state = torch.load(data.path / "checkpoint" / "model.pt", weights_only=True)
    transport = TransportMap(6, (16, 16, 16, 16))
    transport.f.load_state_dict(state["f_state"])
    transport.g.load_state_dict(state["g_state"])
    source, target = (torch.from_numpy(data.input[name]) for name in ("source", "target"))
    tolerance = data.case["tolerance"]
    moved = transport(source)
    actual = {
        "f_source": transport.f(source),
        "g_source": transport.g(source),
        "transport": moved,
        "loss_g": transport.loss_g(source, penalty=0),
        "penalty_g": transport.g.penalty(),
        "loss_f": transport.loss_f(source, target),
        "w2": transport.distance(source, target),
        "mmd": kernel_discrepancy(data.input["target"], moved.numpy()),
    }
    for name, value in actual.items():
        close(value, data.expected[name], tolerance)
    for name, loss in (("g", transport.loss_g(source)), ("f", transport.loss_f(source, target))):
        transport.zero_grad()
        loss.backward()
        for of, parameter in getattr(transport, name).named_parameters():
            if (key := f"gradnorm/{name}/{of}") in data.expected:
                norm = float(data.expected[key])
                assert parameter.grad.norm().item() == pytest.approx(norm, rel=tolerance["grad_rtol"], abs=1e-6), key


def test_golden_codec(golden):
    data = golden("cellfm", "ms_chemical_perturbation")
    file = data.path / "checkpoint" / "sciplex_trametinib.ckpt"
    backbone = scfm.load(data.path / "checkpoint", genes=[f"G{i}" for i in range(1, 71)], n_heads=3, device="cpu")
    codec = PanelCodec(24, 35, 5, hidden=12, dropout=0.0)
    weights = mindspore.read(file)
    names = {
        key: key.replace(theirs, ours) for key in weights for theirs, ours in PUBLISHED_KEYS.items() if theirs in key
    }
    codec.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
    tolerance = data.case["tolerance"]
    values = data.input["value"]
    nothing = np.zeros(values.shape, dtype=bool)
    tokens = backbone.batch(data.input["gene"], values, padding=nothing, panel=True)
    backbone.module.requires_grad_(requires_grad=True)
    cells = backbone.cell_states(tokens)
    codes = codec.encode(cells)
    predicted = codec.decode(codes)
    loss = torch.nn.functional.mse_loss(predicted, torch.from_numpy(values))
    for name, value in {"hidden_cls": cells, "latent": codes, "prediction": predicted, "loss": loss}.items():
        close(value, data.expected[name], tolerance)
    close(loss, data.expected["train/loss"], tolerance)
    loss.backward()
    gradients = dict(tolerance, rtol=tolerance["grad_rtol"])
    for name, gradient in {
        "cls_token": backbone.module.cls_token.grad,
        "cellwise_dec.map.3.weight": codec.decoder[3].weight.grad,
        "proj2.0.weight": codec.encoder[0].weight.grad,
    }.items():
        close(gradient, data.expected[f"train/grad/{name}"], gradients)
    ours = {f"{names[f'{part}.weight']}": part for part in PUBLISHED_KEYS} | {
        f"{n}.bias": f"proj2.{i}" for n, i in (("encoder.0", 0), ("encoder.2", 2))
    }
    for name, parameter in codec.named_parameters():
        kind = name.rpartition(".")[2]
        norm = float(data.expected[f"train/gradnorm/{ours[name]}.{kind}"])
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=tolerance["grad_rtol"]), name
    table = backbone.module.gene_embedding.weight.grad.norm().item()
    assert table == pytest.approx(float(data.expected["train/gradnorm/gene_emb"]), rel=tolerance["grad_rtol"])


def test_recipe_of_cellfm():
    recipe = scfm.load("cellfm-mini", device="cpu").fine_tuning("transport")
    assert recipe.tokenize == {"include_zeros": True, "unknown": "pad"}
    assert recipe.optimization["learning_rate"] == 1e-5
    assert (recipe.batch_size, recipe.max_epochs) == (32, 100)
    assert recipe.objective == {"latent": 50, "hidden": 512, "potential": (512, 512, 512, 512)}


# -- potentials ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_potentials_are_convex(seed, share):
    potential = ConvexPotential(3, (8, 8), seed=seed % 100).double()
    potential.clamp()
    a, b = torch.from_numpy(np.random.default_rng(seed).normal(scale=3, size=(2, 20, 3)))
    with torch.no_grad():
        between = potential(share * a + (1 - share) * b)
        assert (between <= share * potential(a) + (1 - share) * potential(b) + 1e-9).all()


def test_transport_is_the_gradient():
    potential = ConvexPotential(3, (8, 8), seed=1).double()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3)))
    moved, step = potential.transport(x), 1e-6
    with torch.no_grad():
        for i in range(3):
            shift = torch.zeros(3, dtype=torch.float64)
            shift[i] = step
            slope = (potential(x + shift) - potential(x - shift))[:, 0] / (2 * step)
            np.testing.assert_allclose(moved[:, i], slope, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_array_equal(potential.transport(x[2:3]), moved[2:3])


def gaussians(n: int = 200):
    rng = np.random.default_rng(5)
    source = rng.normal(size=(n, 2)).astype(np.float32)
    target = (rng.normal(size=(n, 2)) * [0.5, 1.5] + [2.0, -1.0]).astype(np.float32)
    return torch.from_numpy(source), torch.from_numpy(target)


def test_training_moves_one_gaussian_onto_another():
    source, target = gaussians()
    transport = TransportMap(2, (16, 16), seed=3)
    left = start_from_identity(transport, torch.cat([source, target]), n_steps=150, batch_size=64, lr=3e-3)
    assert left < 0.5
    before = kernel_discrepancy(target.numpy(), transport(source).numpy(), relative=True)
    options = TransportTraining(max_iter=60, batch_size=64, lr=2e-3, check_every=10, inner_iter=5)
    history = list(
        train_transport(transport, source[:150], target[:150], options, held_out=(source[150:], target[150:]))
    )
    assert [row["iteration"] for row in history] == [10, 20, 30, 40, 50, 60]
    assert all(float(layer.weight.detach().min()) >= 0 for layer in transport.f.W)
    after = kernel_discrepancy(target.numpy(), transport(source).numpy(), relative=True)
    assert after < 0.5 * before
    best = min(row["MMD_validation"] for row in history)
    score = kernel_discrepancy(target[150:].numpy(), transport(source[150:]).numpy(), relative=True)
    assert score == pytest.approx(best, rel=1e-4)


def test_training_repeats_and_leaves_the_global_state_alone():
    source, target = gaussians(40)
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        transport = TransportMap(2, (4,), seed=3)
        list(train_transport(transport, source, target, TransportTraining(max_iter=4, batch_size=16, check_every=2)))
        runs.append(transport.state_dict())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_patience_ends_the_training():
    source, target = gaussians(40)
    options = TransportTraining(max_iter=50, batch_size=16, check_every=1, patience=2, lr=1e-9, inner_iter=1)
    history = list(
        train_transport(TransportMap(2, (4,)), source, target, options, held_out=(source, torch.zeros_like(target)))
    )
    assert len(history) < 50


def test_wrong_input():
    source, target = gaussians(10)
    with pytest.raises(ValueError, match="there are 10 and 0"):
        next(train_transport(TransportMap(2, (4,)), source, target[:0], TransportTraining()))
    with pytest.raises(ValueError, match="no longer finite"):
        next(train_transport(TransportMap(2, (4,)), source * np.inf, target, TransportTraining(max_iter=1)))
    with pytest.raises(ValueError, match="check_every must be"):
        TransportTraining(check_every=0)
    with pytest.raises(ValueError, match="at least one hidden"):
        ConvexPotential(2, ())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_units_of_codes(seed):
    codes = torch.from_numpy(np.random.default_rng(seed).normal(3, 20, size=(30, 4)))
    units = CodeScale.of(codes)
    inside = units(codes)
    assert float(inside.square().mean()) == pytest.approx(1)
    np.testing.assert_allclose(inside.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(units.back(inside), codes)
    equal = CodeScale.of(torch.ones(3, 2))
    assert torch.equal(equal.back(equal(torch.ones(3, 2))), torch.ones(3, 2))


# -- codecs --------------------------------------------------------------------------------------------------------------


def low_rank(n: int = 80, n_genes: int = 20):
    rng = np.random.default_rng(0)
    dense = np.maximum(rng.normal(size=(n, 3)) @ rng.normal(size=(3, n_genes)), 0)
    return sparse.csr_matrix(dense.astype(np.float32))


def test_codec_learns_and_keeps_the_best_epoch():
    expression = low_rank()
    values = torch.from_numpy(expression.toarray())
    rows = np.arange(80)
    runs = []
    for _ in range(2):
        codec = PanelCodec(20, 20, 4, hidden=32, dropout=0.1, seed=1)
        options = CodecTraining(max_epochs=15, batch_size=16, lr=5e-3, seed=4)
        history = list(train_codec(codec, lambda some: values[some], expression, rows[:60], rows[60:], options))
        runs.append(codec.eval())
    assert all(
        torch.equal(a, b) for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True)
    )
    errors = [row["codec_loss_validation"] for row in history]
    assert min(errors) < 0.5 * errors[0]
    with torch.no_grad():
        error = float((runs[0](values[60:]) - values[60:]).square().mean())
    assert error == pytest.approx(min(errors), rel=1e-5)


def test_principal_components_restore_what_has_their_rank():
    rng = np.random.default_rng(0)
    dense = (rng.normal(size=(30, 3)) @ rng.normal(size=(3, 12)) + 5).astype(np.float32)
    codec = LinearCodec.fitted(sparse.csr_matrix(dense), 3)
    np.testing.assert_allclose(codec(torch.from_numpy(dense)), dense, atol=1e-4)
    assert LinearCodec.fitted(sparse.csr_matrix(dense), 50).components.shape == (11, 12)
    with pytest.raises(ValueError, match="at least two cells"):
        LinearCodec.fitted(sparse.csr_matrix(dense[:1]), 3)
