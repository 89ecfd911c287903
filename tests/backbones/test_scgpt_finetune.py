"""Fine-tuning loss of scGPT: against the reference implementation, and what holds for any model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scfm
from scfm.backbones.scgpt.finetune import finetune_loss, random_mask

TENSORS = {"atol": 3e-4, "rtol": 0}


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def names(config):
    """Names of a vocabulary of which only the special tokens are known."""
    out = [f"gene{i}" for i in range(config["ntoken"])]
    out[config["pad_id"]], out[config["cls_id"]], out[config["cls_id"] + 1] = "<pad>", "<cls>", "<eoc>"
    return out


def trainable(backbone):
    backbone.module.train().requires_grad_(requires_grad=True)
    for part in backbone.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for layer in backbone.module.layers:
        layer.dropout.p = 0.0
    return backbone


@pytest.fixture
def integration(golden):
    """Golden case, model, its tokens with true values, and the mask."""
    data = golden("scgpt", "finetune_integration")
    config = {**data.case["config"], "dropout": 0.0}
    backbone = scfm.load(data.path / "checkpoint" / "model.pt", args=config, vocab=names(config))
    given = data.input
    tokens = backbone.batch(given["genes"], given["target"], batch_labels=given["batch_labels"])
    mask = torch.as_tensor(given["values"] == config["mask_value"])[~tokens.padding]
    return data, trainable(backbone), tokens, mask


def test_losses_and_gradients(integration):
    data, backbone, tokens, mask = integration
    assert mask.any()
    loss = finetune_loss(backbone, tokens, mask=mask)
    for part, name in (
        ("gep", "loss_gep"),
        ("gep_zero", "loss_nzlp"),
        ("gepc", "loss_gepc"),
        ("gepc_zero", "loss_gepc_nzlp"),
        ("ecs", "loss_ecs10"),
        ("dar", "loss_dab"),
        ("total", "loss"),
    ):
        close(getattr(loss, part), data.expected[name], rtol=1e-5, err_msg=part)
    loss.total.backward()
    compare_gradients(backbone, data.expected["grad_names"], data.expected["grad_norms"])


def compare_gradients(backbone, names, norms):
    ours = {name: p.grad.norm().item() for name, p in backbone.module.named_parameters() if p.grad is not None}
    renamed = backbone.load_report.renamed
    assert len(names) == len({renamed.get(name, name) for name in names} & ours.keys())
    # a constant added before batch normalisation has no effect, so the gradient of such biases is rounding error
    noise = 1e-6 * norms.max()
    for name, norm in zip(names, norms, strict=True):
        assert ours[renamed.get(name, name)] == pytest.approx(norm, rel=1e-3, abs=noise), name
    assert (norms > 100 * noise).mean() > 0.9


def test_outputs_in_training(integration):
    data, backbone, tokens, _ = integration
    shown = backbone.batch(data.input["genes"], data.input["values"], batch_labels=data.input["batch_labels"])
    out, valid = backbone.forward(shown), ~tokens.padding
    for name, value in (
        ("mlm_output", out.expression.values),
        ("mlm_zero_probs", out.expression.nonzero),
        ("mvc_output", out.cell_expression.values),
        ("mvc_zero_probs", out.cell_expression.nonzero),
    ):
        close(value[valid], data.expected[f"train__{name}"][valid], **TENSORS)
    close(out.cells, data.expected["train__cell_emb"], **TENSORS)
    close(out.batch_logits, data.expected["train__dab_output"], **TENSORS)


def test_embedding_with_the_statistics_of_the_first_cell_of_each_chunk(integration):
    data, backbone, _, _ = integration
    backbone.module.eval()
    labels = data.input["eval_batch_labels"]
    first_of_chunk = labels[np.arange(len(labels)) // 4 * 4]
    arrays = data.input["genes"], data.input["target"]
    expected = data.expected["eval__X_scGPT_bs4"]
    close(
        backbone.embed(backbone.batch(*arrays, batch_labels=labels, domain_labels=first_of_chunk)), expected, **TENSORS
    )
    own = backbone.embed(backbone.batch(*arrays, batch_labels=labels)).numpy()
    straddles = labels != first_of_chunk
    assert straddles.any()
    assert (np.abs(own - expected)[straddles].max(1) > 1e-2).all()
    close(own[~straddles], expected[~straddles], **TENSORS)


def test_one_step_of_training(integration):
    """The fixture holds the parameters and statistics that its training started from, so the step is checked by hand."""
    data, backbone, tokens, mask = integration
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    for name, expected in data.expected.items():
        if name.startswith("after_step__"):
            close(before[backbone.load_report.renamed[name.removeprefix("after_step__")]], expected, atol=0)
        elif name.endswith(("__running_mean", "__running_var")):
            domain, _, what = name.partition("__")
            close(before[f"domain_norms.{domain.removeprefix('bn')}.{what}"], expected, atol=0)
    optimizer = torch.optim.Adam(backbone.module.parameters(), lr=1e-4, eps=1e-4)
    finetune_loss(backbone, tokens, mask=mask).total.backward()
    norm = torch.nn.utils.clip_grad_norm_(backbone.module.parameters(), 1.0)
    assert norm.item() == pytest.approx(data.expected["total_grad_norm"].item(), rel=1e-3)
    optimizer.step()
    after = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    for name, parameter in backbone.module.named_parameters():
        if parameter.grad is not None:
            step = 1e-4 * parameter.grad / (parameter.grad.abs() + 1e-4)
            torch.testing.assert_close(after[name], before[name] - step, atol=1e-7, rtol=1e-5)
    # only the statistics of the batch of the cells move, and padded positions take part in them
    module, domain = backbone.module, data.case["config"]["domain"]
    module.load_state_dict(before)
    shown = tokens.flat_values.masked_fill(mask, backbone.config.mask_value)
    summed = module.embed_genes(tokens.ids) + module.embed_values(tokens.padded(shown, tokens.pad_value))
    assert not tokens.is_rectangular
    for number in range(3):
        prefix = f"domain_norms.{number}."
        for what, now in (("running_mean", summed.mean((0, 1))), ("running_var", summed.flatten(0, 1).var(0))):
            old = before[prefix + what]
            torch.testing.assert_close(after[prefix + what], 0.9 * old + 0.1 * now if number == domain else old)


# -- masks ---------------------------------------------------------------------------------------------------------------


def tokens_of(backbone, lengths, seed=0, cls_value=0.0):
    rng = np.random.default_rng(seed)
    width = max([*lengths, 1])
    genes = np.full((len(lengths), width), backbone.pad_id)
    values = np.zeros((len(lengths), width), dtype=np.float32)
    for row, length in enumerate(lengths):
        genes[row, :length] = [backbone.cls_id, *(3 + rng.permutation(30)[: length - 1])]
        values[row, :length] = [cls_value, *rng.integers(0, 51, length - 1)]
    return backbone.batch(genes, values)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 1000),
    first=st.booleans(),
)
def test_share_of_masked_tokens(tiny_scgpt, lengths, ratio, seed, first):
    tokens = tokens_of(tiny_scgpt(), lengths, seed)
    mask = random_mask(tokens, ratio, torch.Generator().manual_seed(seed), first=first)
    for part, length in zip(mask.split(lengths), lengths, strict=True):
        assert part.sum() == int(ratio * (length - (not first)))
        assert first or not part[0]
    assert torch.equal(mask, random_mask(tokens, ratio, torch.Generator().manual_seed(seed), first=first))


def test_every_token_is_masked_equally_often(tiny_scgpt):
    tokens = tokens_of(tiny_scgpt(), [11] * 2000)
    share = random_mask(tokens, 0.4, torch.Generator().manual_seed(3)).view(2000, 11).double().mean(0)
    assert share[0] == 0
    assert share[1:].sum() == 4
    assert (share[1:] - 0.4).abs().max() < 5 * (0.24 / 2000) ** 0.5


def test_cls_with_the_value_of_padding_is_never_masked(tiny_scgpt):
    tokens = tokens_of(tiny_scgpt(), [11, 5], cls_value=-2.0)
    mask = random_mask(tokens, 1.0, first=True)
    assert mask.tolist() == [False, *[True] * 10, False, *[True] * 4]


def test_given_keys_and_wrong_shares(tiny_scgpt):
    tokens = tokens_of(tiny_scgpt(), [6, 3])
    keys = torch.tensor([0.0, 5, 1, 4, 2, 3, 0, 2, 1])
    assert random_mask(tokens, 0.5, keys=keys).nonzero().flatten().tolist() == [2, 4, 8]
    with pytest.raises(ValueError, match="between 0 and 1"):
        random_mask(tokens, 1.5)


def test_global_random_state_is_not_touched(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = tokens_of(backbone, [9, 4])
    state = torch.get_rng_state()
    first, second = (finetune_loss(backbone, tokens, torch.Generator().manual_seed(1)).total for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


# -- parts ---------------------------------------------------------------------------------------------------------------


def test_parts_that_are_left_out(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = tokens_of(backbone, [9, 4, 12])
    generator = torch.Generator()
    full = finetune_loss(backbone, tokens, generator.manual_seed(0))
    assert full.gep > 0
    assert full.gepc > 0
    assert full.ecs > 0
    assert full.gep_zero == full.gepc_zero == full.dar == 0
    small = finetune_loss(backbone, tokens, generator.manual_seed(0), gepc=False, ecs_weight=0)
    assert small.gep == full.gep
    assert small.total == full.gep
    double = finetune_loss(backbone, tokens, generator.manual_seed(0), ecs_weight=20)
    assert double.ecs == 2 * full.ecs
    assert finetune_loss(tiny_scgpt(mvc=None), tokens).gepc == 0
    nothing = finetune_loss(backbone, tokens, mask_ratio=0.0)
    assert nothing.gep == nothing.gepc == 0


def test_masked_values_are_hidden_from_the_network(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = tokens_of(backbone, [12, 7])
    mask = random_mask(tokens, 0.5, torch.Generator().manual_seed(0))
    other = tokens_of(backbone, [12, 7])
    other.flat_values[mask] = 17.0
    first, second = (finetune_loss(backbone, some, mask=mask) for some in (tokens, other))
    assert first.ecs == second.ecs
    assert first.gep != second.gep


def test_the_discriminator_learns_and_the_encoder_unlearns(tiny_scgpt):
    backbone = trainable(tiny_scgpt(n_batches=2, use_batch_labels=True, discriminator=True))
    plain = tokens_of(backbone, [12] * 8)
    tokens = backbone.batch(plain.ids, plain.values, batch_labels=np.arange(8) % 2)
    mask = random_mask(tokens, 0.4, torch.Generator().manual_seed(0))

    def batch_loss():
        return finetune_loss(backbone, tokens, mask=mask).dar

    before = batch_loss()
    before.backward()
    for owner, better in (("discriminator", True), ("layers", False)):
        state = {name: p.detach().clone() for name, p in backbone.module.named_parameters()}
        with torch.no_grad():
            for name, parameter in backbone.module.named_parameters():
                if name.startswith(owner) and parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
            assert (batch_loss() < before) == better, owner
            for name, parameter in backbone.module.named_parameters():
                parameter.copy_(state[name])


def test_missing_labels_and_wrong_masks(tiny_scgpt):
    backbone = tiny_scgpt(n_batches=2, discriminator=True)
    tokens = tokens_of(backbone, [5, 6])
    with pytest.raises(ValueError, match="pass batch_labels or dar_weight=0"):
        finetune_loss(backbone, tokens)
    assert finetune_loss(backbone, tokens, dar_weight=0).dar == 0
    with pytest.raises(ValueError, match="one entry for each of 11 tokens"):
        finetune_loss(backbone, tokens, mask=torch.zeros(2, 6, dtype=torch.bool))


def test_mixed_precision(tiny_scgpt):
    backbone = trainable(tiny_scgpt(explicit_zeros=True))
    tokens = tokens_of(backbone, [12, 7, 9])
    mask = random_mask(tokens, 0.4, torch.Generator().manual_seed(0))
    exact = finetune_loss(backbone, tokens, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        close = finetune_loss(backbone, tokens, mask=mask)
    close.total.backward()
    assert close.gep_zero.dtype == torch.float32
    for part in ("gep", "gep_zero", "gepc", "gepc_zero"):
        assert getattr(close, part).item() == pytest.approx(getattr(exact, part).item(), rel=0.05)
