"""Low-rank adapters and frozen weights, for each installed backbone."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import backbone_class, backbone_kinds, from_config
from scfm.genes import GeneVocab
from scfm.nn.low_rank import adapted_layers, effective_weight
from scfm.train import (
    add_lora,
    freeze,
    has_lora,
    load_adapters,
    merge_lora,
    save_adapters,
    set_training_mode,
)

N_GENES = 40
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def make(kind, **changes):
    cls = backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *GENES], specials=cls.specials)
    config = cls.config_for({**TINY[kind], **changes}, vocab)
    return from_config(kind, config, vocab, seed=1, device="cpu", precision="float32")


@pytest.fixture(params=backbone_kinds())
def backbone(request):
    assert request.param in TINY, f"add a tiny config for {request.param} to tests/tiny.py"
    return make(request.param)


@pytest.fixture
def adapted(backbone):
    """With adapters that do something."""
    pytest.importorskip("peft")
    return stir(add_lora(backbone, rank=2))


def stir(backbone, layers=None):
    """Draw ``B`` of all adapters, or of some, which is zero at first."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in adapted_layers(backbone.module):
        if layers is None or name in layers:
            layer.lora_B["default"].weight.data.normal_(std=0.2, generator=generator)
    return backbone


def tokens_of(backbone):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 1.5, size=(1, N_GENES)), size=(5, N_GENES)) + np.eye(5, N_GENES) * 3
    return backbone.tokenize(sparse.csr_matrix(counts.astype(np.float32)), GENES)


def outputs(backbone):
    """Everything that a backbone says about a few cells."""
    tokens = tokens_of(backbone)
    out = {f"embed {pooling}": backbone.embed(tokens, pooling=pooling) for pooling in backbone.poolings}
    for name in ("gene_states", "reconstruction"):
        out[name] = torch.cat([part.values.flatten() for part in getattr(backbone, f"iter_{name}")(tokens)])
    out["attention"] = backbone.attention(tokens, genes=["GENE1", "GENE2", "GENE3"]).nan_to_num()
    return {name: value.float().numpy() for name, value in out.items()}


def predicted(backbone):
    return torch.cat([part.values for part in backbone.iter_reconstruction(tokens_of(backbone))]).numpy()


def loss_of(backbone):
    counts = np.random.default_rng(1).poisson(3, size=(5, N_GENES)) + 1
    generator = torch.Generator().manual_seed(3)
    tokens = backbone.tokenize_for_training(sparse.csr_matrix(counts.astype(np.float32)), GENES, generator)
    torch.manual_seed(0)
    return backbone.pretraining_loss(tokens, generator).total


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_leave_the_random_state_alone(backbone):
    pytest.importorskip("peft")
    before, state = outputs(backbone), torch.get_rng_state()
    n_parameters = backbone.n_parameters
    assert add_lora(backbone, rank=3) is backbone
    assert has_lora(backbone)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in outputs(backbone).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    trained = {name: p for name, p in backbone.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == backbone.n_parameters - n_parameters
    again = add_lora(make(backbone.kind), rank=3)
    for (_, one), (_, other) in zip(adapted_layers(backbone.module), adapted_layers(again.module), strict=True):
        assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)


def test_merged_and_saved_models_give_the_numbers_of_the_adapted_one(backbone, tmp_path):
    pytest.importorskip("peft")
    before = outputs(backbone)
    keys = set(backbone.module.state_dict())
    stir(add_lora(backbone, rank=2))
    expected = outputs(backbone)
    assert all(np.abs(expected[name] - before[name]).max() > 1e-3 for name in ("gene_states", "reconstruction"))
    assert np.abs(expected[f"embed {backbone.poolings[0]}"] - before[f"embed {backbone.poolings[0]}"]).max() > 1e-3
    saved = scfm.load(backbone.save(tmp_path / "whole"), device="cpu")
    assert not has_lora(saved)
    assert has_lora(backbone), "saving merges in the file only"
    assert merge_lora(backbone) is backbone
    assert not has_lora(backbone)
    assert set(backbone.module.state_dict()) == keys
    for model in (saved, backbone):
        for name, value in outputs(model).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match="has no adapters"):
        merge_lora(backbone)


def test_no_adapter_is_bypassed(backbone):
    """Each adapter by itself changes what the network says, in inference and in training."""
    pytest.importorskip("peft")
    add_lora(backbone, rank=2)
    names = [name for name, _ in adapted_layers(backbone.module)]
    plain, plain_loss = predicted(backbone), float(loss_of(backbone).detach())
    for name in names:
        stir(backbone, [name])
        assert np.abs(predicted(backbone) - plain).max() > 1e-6, name
        assert float(loss_of(backbone).detach()) != plain_loss, name
        dict(adapted_layers(backbone.module))[name].lora_B["default"].weight.data.zero_()


def test_each_map_of_scgpt_reaches_the_cell_embedding():
    """The last layer runs for one token only there, straight from the packed weight."""
    pytest.importorskip("peft")
    for changes in ({}, {"pre_norm": True}):
        backbone = add_lora(make("scgpt", **changes), rank=2)
        tokens = tokens_of(backbone)
        plain = backbone.embed(tokens, pooling="cls")
        for name, layer in adapted_layers(backbone.module):
            stir(backbone, [name])
            assert (backbone.embed(tokens, pooling="cls") - plain).abs().max() > 1e-6, name
            layer.lora_B["default"].weight.data.zero_()
        last = backbone.module.layers[1].qkv
        assert torch.equal(effective_weight(last), last.weight)


def test_only_adapters_are_trained(adapted):
    before = {name: tensor.clone() for name, tensor in adapted.module.state_dict().items()}
    set_training_mode(adapted.module)
    optimizer = torch.optim.Adam([p for p in adapted.module.parameters() if p.requires_grad], lr=1e-2)
    loss_of(adapted).backward()
    optimizer.step()
    moved = {name for name, tensor in adapted.module.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {name for name in moved if "calls_since_redraw" not in name} == {name for name in before if ".lora_" in name}


def test_adapters_alone_are_saved_and_put_onto_the_same_model(adapted, tmp_path):
    expected = outputs(adapted)
    path = save_adapters(adapted, tmp_path / "adapters")
    assert sorted(file.name for file in path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    with pytest.raises(FileExistsError):
        save_adapters(adapted, path)
    save_adapters(adapted, path, overwrite=True)
    other = load_adapters(make(adapted.kind), path)
    for name, value in outputs(other).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    with pytest.raises(ValueError, match="adapters already"):
        load_adapters(other, path)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(make(adapted.kind), tmp_path / "none")
    header = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**header, "kind": "other"}))
    with pytest.raises(scfm.CheckpointError, match="adapters of other"):
        load_adapters(make(adapted.kind), path)
    (path / "adapter.json").write_text(json.dumps({**header, "lora": {**header["lora"], "rank": 3}}))
    untouched = make(adapted.kind)
    with pytest.raises(scfm.CheckpointError, match="another shape"):
        load_adapters(untouched, path)
    assert not has_lora(untouched)
    (tmp_path / "own").mkdir()
    with pytest.raises(FileExistsError, match="holds no adapters"):
        save_adapters(adapted, tmp_path / "own", overwrite=True)


def test_targets(backbone):
    pytest.importorskip("peft")
    everywhere = {name for name, _ in adapted_layers(add_lora(make(backbone.kind)).module)}
    parts = [
        {name for name, _ in adapted_layers(add_lora(make(backbone.kind), targets=[part]).module)}
        for part in ("attention", "ffn")
    ]
    assert parts[0] | parts[1] == everywhere
    assert not parts[0] & parts[1]
    one = sorted(everywhere)[0]
    for targets in ([one], one):
        assert [name for name, _ in adapted_layers(add_lora(make(backbone.kind), targets=targets).module)] == [one]
    with pytest.raises(ValueError, match="match no linear map"):
        add_lora(backbone, targets=["attention_of_another_model"])
    packed = not isinstance(backbone.module.get_submodule(one), torch.nn.Linear)
    if packed:
        with pytest.raises(scfm.UnsupportedError, match="no dropout"):
            add_lora(backbone, dropout=0.1)
    else:
        add_lora(backbone, dropout=0.5)
        stir(backbone)
        first = outputs(backbone)
        np.testing.assert_array_equal(outputs(backbone)["reconstruction"], first["reconstruction"])


def test_a_backbone_without_named_maps(backbone, monkeypatch):
    monkeypatch.setattr(type(backbone), "lora_targets", {})
    with pytest.raises(scfm.UnsupportedError, match="lora_targets"):
        add_lora(backbone)


def test_without_peft_the_command_is_named(backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(scfm.MissingExtraError, match=r"pip install 'scfm\[lora\]'"):
        add_lora(backbone)


def test_results_are_not_taken_for_those_of_the_file(backbone, tmp_path):
    pytest.importorskip("peft")
    loaded = scfm.load(backbone.save(tmp_path / "base"), device="cpu")
    digest = loaded.provenance.sha256
    add_lora(loaded)
    assert not loaded.provenance.sha256
    assert loaded.provenance.extra["source"]["sha256"] == digest
    path = save_adapters(loaded, tmp_path / "adapters")
    assert json.loads((path / "adapter.json").read_text())["base"]["sha256"] == digest


# -- frozen weights ----------------------------------------------------------------------------------------------------


def test_embeddings_and_early_layers_can_be_frozen(backbone):
    assert freeze(backbone) is backbone
    frozen = {name for name, p in backbone.module.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in backbone.module.named_parameters() if name.split(".")[0] in backbone.embedding_modules
    }
    assert frozen
    freeze(backbone, last_n_layers=1, embeddings=False)
    frozen = {name for name, p in backbone.module.named_parameters() if not p.requires_grad}
    for stack in backbone.layer_stacks:
        layers = backbone.module.get_submodule(stack)
        assert all(f"{stack}.0.{name}" in frozen for name, _ in layers[0].named_parameters())
        last = len(layers) - 1
        assert not any(f"{stack}.{last}.{name}" in frozen for name, _ in layers[last].named_parameters())
    assert all(name.startswith(tuple(f"{stack}.0." for stack in backbone.layer_stacks)) for name in frozen)
    freeze(backbone, "norm", embeddings=False)
    for name, parameter in backbone.module.named_parameters():
        assert parameter.requires_grad == ("norm" not in name), name


def test_what_cannot_be_frozen(backbone):
    with pytest.raises(ValueError, match="matches 'transformer_of_another'"):
        freeze(backbone, ["transformer_of_another"])
    with pytest.raises(ValueError, match="nothing of"):
        freeze(backbone, ".")
    with pytest.raises(ValueError, match="must not be negative"):
        freeze(backbone, last_n_layers=-1)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="merge them first"):
        freeze(add_lora(backbone))


def test_frozen_parts_stay_as_in_inference(backbone):
    freeze(backbone, last_n_layers=1)
    set_training_mode(backbone.module)
    assert backbone.module.training
    for stack in backbone.layer_stacks:
        layers = backbone.module.get_submodule(stack)
        assert not any(part.training for part in layers[0].modules())
        assert layers[-1].training
    for name in backbone.embedding_modules:
        part = getattr(backbone.module, name, None)
        if part is not None and any(True for _ in part.parameters()):
            assert not any(child.training for child in part.modules())
    backbone.module.requires_grad_(requires_grad=True)
    set_training_mode(backbone.module)
    assert all(part.training for part in backbone.module.modules())


def test_random_features_of_frozen_layers_are_never_drawn_anew(backbone):
    stacks = [part for part in backbone.module.modules() if hasattr(part, "redraw_projections")]
    if not stacks:
        pytest.skip("no random features")

    def drawn(seed):
        """For each layer, whether its features are new; one list for each stack."""
        before = [[layer.projection.clone() for layer in stack.layers] for stack in stacks]
        for stack in stacks:
            stack.redraw_projections(torch.Generator().manual_seed(seed))
        return [
            [not torch.equal(old, layer.projection) for old, layer in zip(some, stack.layers, strict=True)]
            for some, stack in zip(before, stacks, strict=True)
        ]

    freeze(backbone, last_n_layers=0)
    assert not any(sum(drawn(1), []))
    freeze(backbone, last_n_layers=1)
    assert all(some == [False] * (len(some) - 1) + [True] for some in drawn(2))
    freeze(backbone)
    assert all(sum(drawn(3), []))
    pytest.importorskip("peft")
    add_lora(backbone)
    assert not any(sum(drawn(4), []))
