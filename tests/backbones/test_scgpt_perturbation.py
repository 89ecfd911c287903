"""scGPT's network for perturbations: against the reference implementation, and what holds for any such network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab

VARIANTS = ("affine", "affine_softplus_adapt", "legacy_mlp", "affine_mvc")
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def names(config):
    out = [f"gene{i}" for i in range(config["ntoken"])]
    pad = config["pad_id"]
    out[pad : pad + 3] = ["<pad>", "<cls>", "<eoc>"]
    return out


@pytest.fixture(params=VARIANTS)
def official(golden, request):
    """Golden case, name of the variant, and the official file behind :func:`scfm.load`."""
    data = golden("scgpt", "perturbation")
    assert data.case["tolerance"].startswith("atol 2e-4 rtol 1e-4")
    config = dict(data.case["config"])
    args = config | config.pop("variants")[request.param] | {"dropout": 0.0}
    backbone = scfm.load(data.path / "checkpoint" / f"{request.param}.pt", args=args, vocab=names(config), device="cpu")
    assert backbone.load_report.ok
    assert not backbone.load_report.dropped
    inputs = [torch.from_numpy(data.input[name]) for name in ("gene_ids", "ctrl", "pert_flags", "target")]
    return data, request.param, backbone, inputs


def test_training_step(official):
    data, variant, backbone, (ids, values, flags, observed) = official
    some = torch.from_numpy(data.input["train_gene_subset"])
    module = backbone.module.train().requires_grad_(requires_grad=True)
    inputs = ids[some], values[:, some], flags[:, some]
    from scfm.backbones.scgpt.perturbation import responses

    predicted, from_cell = responses(backbone, inputs[0], inputs[1], inputs[2].long())
    close(predicted, data.expected[f"{variant}__train_pred"], **TOLERANCE)
    assert (from_cell is None) == (variant != "affine_mvc")
    if from_cell is not None:
        close(from_cell, data.expected[f"{variant}__mvc_output"], **TOLERANCE)
    loss = backbone.perturbation_loss(*inputs, observed[:, some])
    close(loss.total, data.expected[f"{variant}__loss"], **TOLERANCE)
    loss.total.backward()
    official_names = {ours: theirs for theirs, ours in backbone.load_report.renamed.items()}
    expected = dict(zip(data.expected[f"{variant}__grad_names"], data.expected[f"{variant}__grad_norms"], strict=True))
    found = {official_names.get(n, n): float(p.grad.norm()) for n, p in module.named_parameters() if p.grad is not None}
    close([found[name] for name in expected], list(expected.values()), **TOLERANCE)
    total = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    close(total, data.expected[f"{variant}__total_grad_norm"], **TOLERANCE)
    # the flag of genes that are not perturbed stays what it is
    assert not module.flags.weight.grad[data.case["config"]["pert_pad_id"]].any()


@pytest.mark.parametrize("genes", ["all", "batch-wise"])
def test_predictions(official, genes):
    data, variant, backbone, (ids, values, flags, _) = official
    assert (values == 0).all(0).any() or genes == "all"
    close(
        backbone.predict_perturbed(ids, values, flags, genes=genes),
        data.expected[f"{variant}__pred_{genes}"],
        **TOLERANCE,
    )


def test_official_files_are_saved_and_read_again(official, tmp_path):
    _, _, backbone, (ids, values, flags, _) = official
    again = scfm.load(backbone.save(tmp_path / "model"), device="cpu")
    assert again.config == backbone.config
    assert again.perturbs_already
    assert torch.equal(again.predict_perturbed(ids, values, flags), backbone.predict_perturbed(ids, values, flags))


# -- any model ---------------------------------------------------------------------------------------------------------

FORMS = {
    "affine": {},
    "mlp": {"decoder": "mlp"},
    "softplus": {"activation": "Softplus", "adaptive": True},
    "mvc": {"mvc": True},
    "bins": {"input_bins": 7},
}


@pytest.fixture(scope="module")
def pretrained():
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *(f"G{i}" for i in range(12))], specials=["<pad>", "<cls>", "<eoc>"])
    return from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu", precision="float32")


@pytest.fixture(params=FORMS)
def network(request, pretrained):
    return pretrained.perturbing(seed=3, **FORMS[request.param])


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.poisson(1.0, (5, 10)).astype(np.float32) * 0.7)
    flags = torch.zeros(5, 10)
    flags[:, 4] = 1
    flags[0, 9] = 1
    ids = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, -1, -1])  # the last two are not known
    return ids, values, flags


def test_what_is_kept_and_what_is_new(pretrained, network):
    for name, tensor in pretrained.module.state_dict().items():
        if name.startswith(("genes.", "values.", "layers.")):
            assert torch.equal(network.module.state_dict()[name], tensor), name
    assert not network.module.flags.weight[0].any()
    assert network.module.flags.weight[1].any()
    again = pretrained.perturbing(seed=3)
    assert torch.equal(again.module.flags.weight, network.module.flags.weight)


def test_a_cell_does_not_depend_on_others(network, cells):
    ids, values, flags = cells
    whole = network.predict_perturbed(ids, values, flags)
    assert whole.dtype == torch.float32
    for rows in ([4, 0], [2]):
        close(network.predict_perturbed(ids, values[rows], flags[rows]), whole[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["affine", "bins"])
def test_the_order_of_genes_changes_nothing(pretrained, cells, form):
    network = pretrained.perturbing(seed=3, **FORMS[form])
    ids, values, flags = cells
    order = torch.tensor([7, 1, 0, 9, 8, 2, 3, 6, 5, 4])
    moved = network.predict_perturbed(ids[order], values[:, order], flags[:, order])
    close(moved, network.predict_perturbed(ids, values, flags)[:, order], atol=1e-5, rtol=1e-5)


def test_the_flag_changes_the_prediction(network, cells):
    ids, values, flags = cells
    difference = network.predict_perturbed(ids, values, flags) - network.predict_perturbed(ids, values, 0 * flags)
    assert (difference.abs() > 0).any(1).all()


def test_bins_are_for_the_encoder_and_values_for_the_decoder(pretrained, cells):
    from scfm.backbones.scgpt.tokenizer import bin_values

    ids, values, flags = cells
    values = torch.arange(1.0, 51.0).reshape(5, 10) ** 1.5 * (torch.arange(10) != 3)
    values[2] = 0  # a cell without counts has no bins
    network = pretrained.perturbing(seed=3, input_bins=7)
    found = network.predict_perturbed(ids, values, flags)
    bins = torch.zeros_like(values)
    for row, cell in enumerate(values.numpy()):
        if cell.any():
            bins[row, cell > 0] = torch.from_numpy(
                bin_values(cell[cell > 0], np.array([0, (cell > 0).sum()]), 7)[0]
            ).float()
    assert set(bins.unique().tolist()) == set(range(7))
    plain = pretrained.perturbing(seed=3)
    # the same network that is shown bins as values, and whose decoder is shown the values
    decoder = plain.module.decoder
    shown = decoder.forward
    decoder.forward = lambda hidden, **_: shown(hidden, values=values)
    close(found, plain.predict_perturbed(ids, bins, flags), atol=1e-6, rtol=1e-6)


def test_a_model_of_bins_needs_them(cells):
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *(f"G{i}" for i in range(12))], specials=["<pad>", "<cls>", "<eoc>"])
    config = dict(TINY["scgpt"]) | {"value_style": "category"}
    backbone = from_config("scgpt", config, vocab, device="cpu", precision="float32")
    with pytest.raises(ValueError, match=f"input_bins={backbone.config.n_bins}"):
        backbone.perturbing()
    with pytest.raises(ValueError, match="a number from 3 to"):
        backbone.perturbing(input_bins=10_000)
    network = backbone.perturbing(input_bins=7)
    assert network.config.input_bins == 7
    assert network.predict_perturbed(*cells).isfinite().all()


def test_everything_new_learns(network, cells):
    network.module.requires_grad_(requires_grad=True)
    ids, values, flags = cells
    loss = network.perturbation_loss(ids, values, flags, values + 1, gepc_weight=1.0)
    loss.total.backward()
    for name, parameter in network.module.named_parameters():
        if name.startswith(("flags", "decoder", "mvc")):
            assert parameter.grad.abs().sum() > 0, name
    assert (loss.gepc > 0) == (network.module.mvc is not None)
    assert loss.total.item() == pytest.approx((loss.gep + loss.gepc).item())
    network.module.zero_grad()


def test_wrong_uses(pretrained, network, cells):
    ids, values, flags = cells
    with pytest.raises(scfm.UnsupportedError, match="no network for perturbations yet"):
        pretrained.predict_perturbed(ids, values, flags)
    with pytest.raises(ValueError, match="do not fit together"):
        network.predict_perturbed(ids[:3], values, flags)
    with pytest.raises(ValueError, match="'all' or 'batch-wise'"):
        network.predict_perturbed(ids, values, flags, genes="some")
    with pytest.raises(ValueError, match="'affine' or 'mlp'"):
        pretrained.perturbing(decoder="x")
    with pytest.raises(ValueError, match="module of torch.nn"):
        pretrained.perturbing(activation="Nothing")
    if network.config.affine_decoder:
        tokens = network.tokenize(sparse.csr_matrix(values[:, :8].numpy()), network.vocab.names[3:11])
        with pytest.raises(scfm.UnsupportedError, match="decodes nothing else"):
            network.reconstruct(tokens)


@pytest.mark.parametrize("kind", ["cellfm", "scfoundation", "sclong"])
def test_models_without_such_a_network_say_who_has_one(kind):
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(12))], specials=cls.specials)
    backbone = from_config(kind, cls.config_for(dict(TINY[kind]), vocab), vocab, device="cpu")
    with pytest.raises(scfm.UnsupportedError, match="scgpt"):
        backbone.perturbing()
