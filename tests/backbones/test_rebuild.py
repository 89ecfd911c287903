"""A model in another form keeps the weights that fit, whatever its kind."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny import TINY

import scfm
from scfm.backbones import backbone_class, backbone_kinds, from_config, rebuilt
from scfm.genes import GeneVocab

N_GENES = 20
WIDER_HEADS = {"n_batches": 3, "use_batch_labels": True}
# a hyper-parameter that decides the shape of some tensors but not of all
CHANGED = {
    "scgpt": {"ffn_dim": 32},
    "scfoundation": {"n_bins": 9},
    "cellfm": {"n_bins": 9},
    "sclong": {"value_hidden": 10},
}


def make(kind, names=None):
    cls = backbone_class(kind)
    names = [f"GENE{i}" for i in range(N_GENES)] if names is None else names
    vocab = GeneVocab([*cls.specials, *names], specials=cls.specials)
    return from_config(kind, cls.config_for(TINY[kind], vocab), vocab, seed=1, precision="float32")


@pytest.fixture(params=backbone_kinds())
def backbone(request):
    return make(request.param)


def changed_config(backbone):
    if backbone.kind not in CHANGED:
        pytest.skip(f"no other form of a tiny {backbone.kind} is given here")
    return type(backbone).config_from_dict({**asdict(backbone.config), **CHANGED[backbone.kind]})


def weights(backbone):
    return {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}


def test_the_same_form_is_the_same_model(backbone):
    before, state = weights(backbone), torch.get_rng_state()
    copy = rebuilt(backbone, backbone.config)
    assert torch.equal(state, torch.get_rng_state())
    assert copy.config == backbone.config
    assert copy.load_report.loaded == list(before)
    assert copy.load_report.ok
    assert not copy.load_report.fresh
    assert not copy.load_report.dropped
    for name, tensor in copy.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        tensor.add_(1)
    for name, tensor in backbone.module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the original changed"


def test_what_does_not_fit_is_made_anew_from_the_seed(backbone):
    config = changed_config(backbone)
    copy, again, other = (rebuilt(backbone, config, seed=seed) for seed in (5, 5, 6))
    old, new = weights(backbone), weights(copy)
    report = copy.load_report
    assert report.dropped
    assert set(report.dropped) == set(report.fresh)
    assert set(report.fresh).isdisjoint(report.loaded)
    assert set(report.loaded) == {name for name in old if old[name].shape == new[name].shape}
    for name in report.loaded:
        assert torch.equal(new[name], old[name])
    changed = [name for name in report.fresh if not torch.equal(new[name], weights(other)[name])]
    assert changed
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in new.items())


def test_genes_by_name(backbone, capsys):
    names = ["GENE7", "GENE3", "NEW1", "GENE0", "GENE19", *(f"NEW{i}" for i in range(2, 9))]
    other = make(backbone.kind, names)
    copy = rebuilt(backbone, other.config, vocab=other.vocab, seed=2)
    assert copy.vocab == other.vocab
    new, old = weights(copy), weights(backbone)
    tables = [name for name in backbone.vocab_tables if name in old]
    assert tables
    source = backbone.vocab.get_ids(copy.vocab.names)
    for name in tables:
        known = np.flatnonzero(source >= 0)
        assert torch.equal(new[name][known], old[name][source[known]])
        assert not torch.isin(new[name][np.flatnonzero(source < 0)], old[name][: len(source)]).any()
        rows, total = copy.load_report.partly[name]
        extra = min(len(old[name]) - len(backbone.vocab), total - len(copy.vocab))
        assert rows == len(known) + extra
        assert torch.equal(new[name][len(source) :][:extra], old[name][len(backbone.vocab) :][:extra])
    rest = set(old) - {*tables, *backbone.constants}
    assert all(torch.equal(new[name], old[name]) for name in rest)
    assert set(copy.load_report.dropped) == set(backbone.constants) & set(old)
    assert ("belongs to other genes" in capsys.readouterr().err) == bool(copy.load_report.dropped)
    back = rebuilt(copy, backbone.config, vocab=backbone.vocab)
    found = backbone.vocab.get_ids([*names[:2], *names[3:5]])
    for name in tables:
        assert torch.equal(weights(back)[name][found], old[name][found])


def test_include_and_exclude(backbone):
    some = next(iter(backbone.module.state_dict()))
    only = rebuilt(backbone, backbone.config, include=[some.replace(".", r"\.")], seed=9)
    assert only.load_report.loaded == [some]
    without = rebuilt(backbone, backbone.config, exclude=[some.replace(".", r"\.")], seed=9)
    assert without.load_report.fresh == [some]
    assert without.load_report.dropped == {some: "left out on request"}
    assert rebuilt(backbone, backbone.config, include=[".*"], exclude=[".*"]).load_report.loaded == []
    for choice in ({"include": ["nothing"]}, {"exclude": ["nothing"]}):
        with pytest.raises(ValueError, match="no tensor of the model has a name like 'nothing'"):
            rebuilt(backbone, backbone.config, **choice)


def test_saved_and_loaded(backbone, tmp_path):
    copy = rebuilt(backbone, asdict(changed_config(backbone)), name="other form")
    loaded = scfm.load(copy.save(tmp_path / "saved"))
    assert loaded.name == "other form"
    assert loaded.load_report.ok
    for part in ("fresh", "dropped", "partly"):
        assert getattr(loaded.load_report, part) == getattr(copy.load_report, part)
    assert loaded.provenance.extra["rebuilt"]["id"] == backbone.provenance.id
    assert all(torch.equal(tensor, weights(copy)[name]) for name, tensor in weights(loaded).items())


def test_types_become_float32(backbone):
    exact = weights(backbone)
    backbone.to("cpu", "float64")
    copy = rebuilt(backbone, backbone.config)
    assert copy.dtype == torch.float32
    assert backbone.dtype == torch.float64
    assert all(torch.equal(tensor, exact[name]) for name, tensor in weights(copy).items())


def test_batch_labels_for_scgpt_drop_two_tensors_only():
    backbone = make("scgpt")
    wide = replace(backbone.config, **WIDER_HEADS, discriminator=True, input_norm="dsbn", explicit_zeros=True)
    report = rebuilt(backbone, wide).load_report
    assert set(report.dropped) == {"decoder.fc.0.weight", "mvc.W.weight"}
    heads = {name.split(".")[0] for name in report.fresh}
    assert heads == {"domain_norms", "batches", "decoder", "mvc", "discriminator"}


def test_adapters_are_merged():
    pytest.importorskip("peft")
    from scfm.train import add_lora, merge_lora

    backbone = add_lora(make("scgpt"), rank=2)
    torch.manual_seed(0)
    for name, parameter in backbone.module.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data)
    copy = rebuilt(backbone, backbone.config)
    expected = weights(merge_lora(backbone))
    assert weights(copy).keys() == expected.keys()
    for name, tensor in weights(copy).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_class_without_tables_refuses_other_genes(monkeypatch):
    backbone = make("scgpt")
    monkeypatch.setattr(type(backbone), "vocab_tables", ())
    rebuilt(backbone, backbone.config)
    with pytest.raises(ValueError, match="vocab_tables"):
        rebuilt(backbone, backbone.config, vocab=make("scgpt", ["A", "B"]).vocab)
