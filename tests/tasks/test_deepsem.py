"""DeepSEM: the scLong reference, the standardisation, and what is trained when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.tasks.deepsem import DeepSEM, StandardExpression, refine

RUN = {
    "batch_size": 16,
    "lr": 1e-3,
    "adjacency_lr": 1e-3,
    "alpha": 0.1,
    "beta": 0.01,
    "small_network_epochs": 1,
    "adjacency_epochs": 2,
    "n_kept": 2,
    "seed": 0,
}


@pytest.fixture
def case(golden):
    return golden("sclong", "grn_deepsem")


def published(case, inverse):
    config = case.case["config"]
    model = DeepSEM(case.input["adj_A"], hidden=config["n_hidden"], inverse=inverse)
    model.load_published(torch.load(case.path / "checkpoint" / "vae_ead.pt", weights_only=True))
    return model


@pytest.mark.parametrize(("inverse", "name"), [("exact", "inverse"), ("cholesky", "cholesky_inverse")])
def test_golden(case, inverse, name):
    model, config, tolerance = published(case, inverse), case.case["config"], case.case["tolerance"]
    x, mask, noise = (torch.from_numpy(case.input[key]) for key in ("x", "mask", "noise"))
    loss = model.loss(x, mask, noise, alpha=config["alpha"], beta=config["beta"])
    loss.total.backward()
    out = model(x, noise)
    found = {
        "total": loss.total,
        "loss": loss.total - loss.sparsity,
        "loss_rec": loss.reconstruction,
        "loss_gauss": loss.gaussian,
        "loss_cat": loss.categorical,
        "sparse": loss.sparsity,
        "x_rec": out.reconstruction,
        "z_mean": out.mean,
        "grad_adj_A": model.adjacency.grad,
    }
    for key, value in found.items():
        np.testing.assert_allclose(value.detach().numpy(), case.expected[f"{name}/{key}"], err_msg=key, **tolerance)


def test_weights_of_another_network_are_refused(case):
    state = torch.load(case.path / "checkpoint" / "vae_ead.pt", weights_only=True)
    state["generative.more.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"wrong or missing"):
        published(case, "exact").load_published(state)


def values(seed=0, n_cells=40, n_genes=6):
    rng = np.random.default_rng(seed)
    first = rng.normal(2, 1, n_cells)
    table = np.column_stack([first, first + rng.normal(0, 0.3, n_cells), *rng.normal(2, 1, (n_genes - 2, n_cells))])
    return np.where(rng.random(table.shape) < 0.2, 0, table)


def test_expression_is_standardised_over_measured_values():
    table = values()
    table[:, 4] = 0
    table[:, 5] = 3
    table[0, 0] = 1000
    x, measured = (part.numpy() for part in StandardExpression.of(sparse.csr_matrix(table)).batch(np.arange(40)))
    np.testing.assert_array_equal(measured, table != 0)
    for gene in range(4):
        own = table[:, gene][table[:, gene] != 0]
        expected = np.clip((table[:, gene] - own.mean()) / own.std(), -10, 10)
        np.testing.assert_allclose(x[:, gene], expected, rtol=1e-5, atol=1e-5)
    assert not x[:, 4:].any(), "genes that do not vary have no scale"
    order = np.array([5, 3, 3])
    np.testing.assert_array_equal(StandardExpression.of(table).batch(order)[0].numpy(), x[order])
    with pytest.raises(ValueError, match="not finite"):
        StandardExpression.of(np.array([[np.nan, 1.0]]))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["exact", "cholesky"]))
def test_order_of_genes_does_not_matter_to_the_exact_inverse(order, inverse):
    order = list(order)
    rng = np.random.default_rng(1)
    adjacency = rng.normal(0, 0.1, (6, 6))
    one, other = (
        DeepSEM(adjacency, hidden=8, inverse=inverse),
        DeepSEM(adjacency[np.ix_(order, order)], hidden=8, inverse=inverse),
    )
    for prior in ("prior_mean", "prior_log_variance"):
        for name in ("weight", "bias"):
            getattr(getattr(other, prior)[2], name).data = getattr(getattr(one, prior)[2], name).data[order]
    x, noise = (torch.from_numpy(rng.normal(size=(5, 6))).float() for _ in range(2))
    losses = []
    for model, columns in ((one, slice(None)), (other, order)):
        losses.append(model.loss(x[:, columns], torch.ones(5, 6), noise[:, columns], alpha=0.1, beta=0.5))
        losses[-1].total.backward()
    np.testing.assert_allclose(losses[0].gaussian.item(), losses[1].gaussian.item(), rtol=1e-4, atol=1e-7)
    if inverse == "exact":
        np.testing.assert_allclose(losses[0].reconstruction.item(), losses[1].reconstruction.item(), rtol=1e-5)
        np.testing.assert_allclose(other.adjacency.grad, one.adjacency.grad[order][:, order], rtol=1e-3, atol=1e-7)


def test_variants_differ_and_the_exact_one_inverts():
    adjacency = np.random.default_rng(0).normal(0, 0.2, (5, 5))
    x, noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5)
    exact, other = (DeepSEM(adjacency, hidden=4, inverse=name) for name in ("exact", "cholesky"))
    assert not torch.allclose(exact(x, noise).reconstruction, other(x, noise).reconstruction)
    structure = torch.eye(5) - exact.network.T
    latent = exact(x, noise).latent
    expected = exact.decoder((latent @ torch.linalg.inv(structure)).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(exact(x, noise).reconstruction, expected)


def test_a_genes_own_weight_plays_no_role():
    adjacency = np.zeros((3, 3))
    x, noise = torch.ones(2, 3), torch.zeros(2, 3)
    with_own = DeepSEM(adjacency + 5 * np.eye(3), hidden=4)
    torch.testing.assert_close(with_own(x, noise).reconstruction, DeepSEM(adjacency, hidden=4)(x, noise).reconstruction)
    assert not with_own.network.diagonal().any()


def test_networks_take_turns():
    model = DeepSEM(np.full((6, 6), 0.05), hidden=8)
    cells = StandardExpression.of(values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    epochs = []
    for epoch in refine(model, cells, max_epochs=6, **RUN):
        now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == ({"adjacency"} if epoch.trains_network else set(now) - {"adjacency"})
        before = now
        epochs.append(epoch)
    assert [epoch.trains_network for epoch in epochs] == [False, True, True] * 2
    assert [epoch.adjacency is not None for epoch in epochs] == [False] * 4 + [True] * 2
    torch.testing.assert_close(epochs[-1].adjacency, model.network.detach())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert sum(epochs[0].losses.values()) == pytest.approx(2 * epochs[0].losses["total"], rel=1e-5)


def test_training_lowers_the_loss_and_changes_the_network():
    model = DeepSEM(np.full((6, 6), 0.05), hidden=16)
    start = model.network.detach().clone()
    losses = [epoch.losses["total"] for epoch in refine(model, StandardExpression.of(values()), max_epochs=60, **RUN)]
    assert losses[-1] < 0.8 * losses[0]
    assert (model.network.detach() - start).abs().max() > 0.01


def test_the_same_seed_gives_the_same_network_whatever_the_global_state():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        state = torch.get_rng_state()
        model = DeepSEM(np.full((6, 6), 0.05), hidden=8, seed=3)
        list(refine(model, StandardExpression.of(values()), max_epochs=3, **RUN))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(model.network.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("adjacency", "options", "message"),
    [
        (np.zeros((2, 3)), {}, r"\(2, 3\)"),
        (np.zeros((1, 1)), {}, "at least two genes"),
        (np.full((2, 2), np.inf), {}, "not finite"),
        (np.zeros((2, 2)), {"inverse": "pseudo"}, "'cholesky'"),
    ],
)
def test_wrong_starts(adjacency, options, message):
    with pytest.raises(ValueError, match=message):
        DeepSEM(adjacency, **options)


def test_a_singular_network_is_explained():
    model = DeepSEM(np.array([[0, 1.0], [1, 0]]), hidden=4)
    with pytest.raises(ValueError, match="scale="):
        list(refine(model, StandardExpression.of(values()[:, :2]), max_epochs=1, **RUN))
