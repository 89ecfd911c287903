from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import scfm
from scfm.backbones import Backbone, Checkpoint, _kinds, from_config, load_vocab, random_copy
from scfm.checkpoints import KeyRule, _registry, store
from scfm.checkpoints._registry import Citation, Entry, Licence, RemoteFile
from scfm.checkpoints.convert import rename
from scfm.genes import GeneVocab

RULES = (KeyRule("embed", "genes.weight"), KeyRule(r"body\.(.+)", r"body.\1"), KeyRule(r"adam\..*", None, "optimiser"))
NAMES = ["<pad>", "CD3E", "LYZ"]


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4
    shift: float = 1.0


class ToyModule(nn.Module):
    def __init__(self, config: ToyConfig, n_genes: int) -> None:
        super().__init__()
        self.config = config
        self.genes = nn.Embedding(n_genes, config.width)
        self.body = nn.Linear(config.width, config.width)
        self.register_buffer("scale", torch.empty(config.width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.scale = torch.full((self.config.width,), self.config.shift)


class Toy(Backbone):
    kind = "toy"
    capabilities = frozenset({"gene_embeddings"})
    poolings = ("cls",)
    reads = 0

    @classmethod
    def recognizes(cls, directory: Path) -> bool:
        return (directory / "toy.pt").is_file()

    @classmethod
    def read_official(cls, directory, *, weights=None, shift=1.0):
        Toy.reads += 1
        file = {None: "toy.pt", "first": "toy.pt", "second": "toy_second.pt"}.get(weights, weights)
        state = torch.load(directory / file, map_location="cpu", weights_only=True)
        state, report = rename(state, RULES)
        vocab = GeneVocab((directory / "genes.txt").read_text().split(), specials=["<pad>"])
        return Checkpoint(
            ToyConfig(state["genes.weight"].shape[1], shift), vocab, state, report, weights or "first", file
        )

    @classmethod
    def config_from_dict(cls, values):
        return ToyConfig(**values)

    @classmethod
    def build(cls, config, vocab):
        return ToyModule(config, len(vocab))

    def tokenize(self, counts, genes, **options):
        raise AssertionError

    def batch(self, *arrays, **options):
        raise AssertionError

    def embedding_dim(self, pooling=None):
        return self.config.width

    def _gene_embeddings(self):
        return self.module.genes.weight * self.module.scale


class Double(Toy):
    """Recognises the same files."""

    kind = "double"


class Point:
    def __init__(self, cls):
        self.load = lambda: cls


@pytest.fixture(autouse=True)
def install(monkeypatch):
    """``install(Toy, ...)`` sets the installed backbone classes; Toy alone at the start."""

    def put(*classes):
        monkeypatch.setattr(_kinds, "_entry_points", lambda: {cls.kind: Point(cls) for cls in classes})
        _kinds.backbone_class.cache_clear()

    put(Toy)
    Toy.reads = 0
    yield put
    _kinds.backbone_class.cache_clear()


@pytest.fixture
def register(monkeypatch):
    """``register(**values)`` makes a released checkpoint "toy-released" whose files lie in the cache."""

    def put(**values):
        files = tuple(RemoteFile(*row) for row in (("toy.pt", "weights"), ("genes.txt", "vocabulary")))
        entry = Entry(
            **{
                "name": "toy-released",
                "backbone": "toy",
                "title": "a toy",
                "files": files,
                "licence": Licence("Research only", "https://example.org", "no", "No commercial use."),
                "citation": Citation("Nobody. A toy. 2020.", "10.1000/toy"),
                **values,
            }
        )
        monkeypatch.setattr(_registry, "_released", lambda: [entry])
        _registry.entries.cache_clear()
        _registry._names.cache_clear()
        if not entry.directory.exists():
            write_official(entry.directory)
        return entry

    yield put
    monkeypatch.undo()
    _registry.entries.cache_clear()
    _registry._names.cache_clear()


def official_state(seed=0, width=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.rand(3, width, generator=generator),
        "body.weight": torch.rand(width, width, generator=generator),
        "body.bias": torch.rand(width, generator=generator),
        "adam.moment": torch.zeros(2),
    }


def write_official(directory, seed=0, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({**official_state(seed), **changes}, directory / "toy.pt")
    torch.save(official_state(seed + 1), directory / "toy_second.pt")
    (directory / "genes.txt").write_text("\n".join(NAMES))
    return directory


@pytest.fixture
def official(tmp_path):
    return write_official(tmp_path / "official")


def weights_of(backbone):
    return {key: value.clone() for key, value in backbone.module.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# -- official directories --------------------------------------------------------------------------------------------


def test_official_directory(official):
    backbone = scfm.load(official)
    assert (backbone.kind, backbone.name, len(backbone.vocab)) == ("toy", "toy", 3)
    assert torch.equal(backbone.module.genes.weight, official_state()["embed"])
    assert torch.equal(backbone.module.scale, torch.ones(4))
    assert torch.equal(backbone.gene_embeddings(), official_state()["embed"])
    assert backbone.load_report.ok
    assert backbone.load_report.renamed == {"embed": "genes.weight"}
    assert backbone.load_report.dropped == {"adam.moment": "optimiser"}
    assert backbone.provenance.id == "official"
    assert backbone.provenance.path == str(official / "toy.pt")
    assert len(backbone.provenance.sha256) == 64
    assert not backbone.module.training
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert sorted(path.name for path in official.iterdir()) == ["genes.txt", "toy.pt", "toy_second.pt"]


def test_weight_set_options_and_single_file(official):
    second = official_state(1)["embed"]
    assert torch.equal(scfm.load(official, weights="second").module.genes.weight, second)
    by_file = scfm.load(official / "toy_second.pt")
    assert torch.equal(by_file.module.genes.weight, second)
    assert by_file.provenance.path == str(official / "toy_second.pt")
    assert torch.equal(scfm.load(str(official), shift=3.0).module.scale, torch.full((4,), 3.0))
    with pytest.raises(ValueError, match="give the directory instead"):
        scfm.load(official / "toy_second.pt", weights="first")


@pytest.mark.parametrize(("gain", "told"), [(0.5, True), (2.0, False)])
def test_slow_reduced_precision_is_told(official, monkeypatch, capsys, gain, told):
    monkeypatch.setattr("scfm.backbones._device.matmul_gain", lambda dtype: gain)
    scfm.load(official, device="cpu", precision="bfloat16")
    assert ("2.0 times slower in it than in float32" in capsys.readouterr().err) == told


def test_device_and_precision(official):
    backbone = scfm.load(official, device="cpu", precision="bfloat16")
    assert backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown device 'tpu9'"):
        scfm.load(official, device="tpu9")
    with pytest.raises(ValueError, match="unknown precision"):
        scfm.load(official, precision="int3")


def test_loading_leaves_the_random_state_alone(official):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_copy(scfm.load(official))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stranger": torch.zeros(1)}, "keys that no rule knows: stranger"),
        ({"body.bias": torch.zeros(9)}, r"shapes that differ: body\.bias is \(9,\) in the file, \(4,\) in the model"),
    ],
)
def test_strict_keys(tmp_path, changes, text):
    with pytest.raises(scfm.CheckpointError, match=rf"toy\.pt does not fit the model.*{text}"):
        scfm.load(write_official(tmp_path / "model", **changes))


def test_missing_key(official):
    state = official_state()
    del state["body.bias"]
    torch.save(state, official / "toy.pt")
    with pytest.raises(scfm.CheckpointError, match=r"weights missing from the file: body\.bias"):
        scfm.load(official)


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_cut_off_file(official, keep):
    path = official / "toy.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(scfm.CheckpointError, match="official cannot be read.*fetch it again"):
        scfm.load(official)


def test_pickled_code_is_not_executed(official, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"embed": Evil()}, official / "toy.pt")
    with pytest.raises(scfm.CheckpointError, match="cannot be read"):
        scfm.load(official)
    assert not (tmp_path / "pwned").exists()


def test_module_without_buffer_hook(official, install):
    class Forgetful(ToyModule):
        def __getattribute__(self, name):
            if name == "reset_buffers":
                raise AttributeError(name)
            return super().__getattribute__(name)

        def __init__(self, config, n_genes):
            nn.Module.__init__(self)
            self.genes = nn.Embedding(n_genes, config.width)
            self.body = nn.Linear(config.width, config.width)
            self.register_buffer("scale", torch.ones(config.width), persistent=False)

    class Other(Toy):
        @classmethod
        def build(cls, config, vocab):
            return Forgetful(config, len(vocab))

    install(Other)
    with pytest.raises(scfm.CheckpointError, match=r"does not fill scale of Other.*reset_buffers\(\)"):
        scfm.load(official)


# -- what a name or a path means -------------------------------------------------------------------------------------


def test_unknown_names_and_paths(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint called 'scgtp'.*'scgpt'.*scfm\.checkpoints\.list"):
        scfm.load("scgtp")
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "nothing.pt"):
        with pytest.raises(FileNotFoundError, match="nothing.*does not exist"):
            scfm.load(path)


def test_unrecognised_directory_says_what_was_looked_for(tmp_path, register):
    register()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(scfm.CheckpointError, match=r"scfm\.json.*toy\.pt, genes\.txt \(toy\).*Found: .*readme\.txt"):
        scfm.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(scfm.CheckpointError, match="Found: nothing"):
        scfm.load(tmp_path / "empty")


def test_two_kinds_recognise(official, install):
    install(Toy, Double)
    with pytest.raises(scfm.CheckpointError, match="checkpoint of toy and of double|checkpoint of double and of toy"):
        scfm.load(official)


def test_broken_plugin_does_not_stop_the_others(official, install, capsys):
    class Broken(Toy):
        kind = "broken"

        @classmethod
        def recognizes(cls, directory):
            msg = "no module named 'plugin'"
            raise ImportError(msg)

    install(Broken, Toy)
    assert scfm.load(official).kind == "toy"
    assert "'broken'" in capsys.readouterr().err


def test_released_but_no_network(register):
    entry = register(backbone="other")
    with pytest.raises(
        scfm.UnsupportedError, match=r"has no network for 'other'; it has toy\. .*fetch\('toy-released'\)"
    ):
        scfm.load(entry.name)


# -- released checkpoints --------------------------------------------------------------------------------------------


def test_released_checkpoint_is_converted_once(register, capsys):
    entry = register(weights=("first", "second"))
    first = scfm.load("toy-released")
    assert "Research only" in capsys.readouterr().err
    assert Toy.reads == 1
    again = scfm.load("Toy-Released")
    assert Toy.reads == 1
    assert_same_weights(weights_of(first), weights_of(again))
    for backbone in (first, again):
        provenance = backbone.provenance
        assert backbone.name == provenance.id == "toy-released"
        assert provenance.path == str(entry.directory / "toy.pt")
        assert (provenance.licence, provenance.weights) == ("Research only", "first")
        assert "10.1000/toy" in provenance.citation
        assert backbone.load_report.renamed == {"embed": "genes.weight"}
        assert backbone.load_report.dropped == {"adam.moment": "optimiser"}
    converted = scfm.settings.cachedir / "converted" / f"toy-released-first-{first.provenance.sha256[:12]}"
    assert store.is_stored(converted)
    assert torch.equal(scfm.load("toy-released", weights="second").module.genes.weight, official_state(1)["embed"])
    assert Toy.reads == 2


def test_options_bypass_the_converted_copy(register):
    register()
    scfm.load("toy-released")
    assert scfm.load("toy-released", shift=2.0).config.shift == 2.0
    assert scfm.load("toy-released").config.shift == 1.0


def test_converted_copy_is_renewed(register):
    register()
    scfm.load("toy-released")
    (converted,) = (scfm.settings.cachedir / "converted").iterdir()
    (converted / "model.safetensors").write_bytes(b"damaged")
    assert torch.equal(scfm.load("toy-released").module.genes.weight, official_state()["embed"])
    header = json.loads((converted / "scfm.json").read_text())
    header["config"] = {"width_of_an_older_version": 4}
    (converted / "scfm.json").write_text(json.dumps(header))
    scfm.load("toy-released")
    assert Toy.reads == 3
    scfm.load("toy-released")
    assert Toy.reads == 3


def test_read_only_cache_is_usable(register, monkeypatch):
    register()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("scfm.checkpoints._files.tempfile.mkdtemp", refuse)
    monkeypatch.setattr("scfm.checkpoints._files.tempfile.mkstemp", refuse)
    backbone = scfm.load("toy-released")
    assert torch.equal(backbone.module.genes.weight, official_state()["embed"])
    assert not any((scfm.settings.cachedir / "converted").glob("*"))


def test_local_copy_of_released_files_is_identified(official, register):
    digest = scfm.load(official).provenance.sha256
    files = (RemoteFile("toy.pt", "weights", sha256=digest), RemoteFile("genes.txt", "vocabulary"))
    register(files=files)
    backbone = scfm.load(official)
    assert (backbone.name, backbone.provenance.licence) == ("toy-released", "Research only")
    torch.save(official_state(9), official / "toy.pt")
    backbone = scfm.load(official)
    assert backbone.name == "toy"
    assert backbone.provenance.licence == "Research only (if these are the released weights)"


# -- directories that scfm saved -------------------------------------------------------------------------------------


def test_save_and_load(official, tmp_path):
    backbone = scfm.load(official, shift=2.0)
    backbone.name = "mine"
    path = backbone.save(tmp_path / "saved")
    again = scfm.load(path)
    assert (again.name, again.config) == ("mine", backbone.config)
    assert_same_weights(weights_of(backbone), weights_of(again))
    assert torch.equal(again.module.scale, torch.full((4,), 2.0))
    assert again.provenance.extra["source"] == {"id": "official", "sha256": backbone.provenance.sha256}
    assert again.provenance.sha256 == store.read(path).sha256
    assert scfm.load(path / "model.safetensors").name == "mine"
    with pytest.raises(ValueError, match="weights, shift can be given for official checkpoints only"):
        scfm.load(path, weights="first", shift=1.0)


def test_half_precision_on_disk_becomes_float32(official, tmp_path):
    backbone = scfm.load(official)
    store.save_backbone(backbone, tmp_path / "small", dtype=torch.float16)
    again = scfm.load(tmp_path / "small", precision="float32")
    assert again.module.genes.weight.dtype == torch.float32
    assert torch.allclose(again.module.genes.weight, backbone.module.genes.weight, atol=1e-3)


def test_saved_by_a_kind_that_is_not_installed(official, tmp_path, install):
    path = scfm.load(official).save(tmp_path / "saved")
    install(Double)
    with pytest.raises(scfm.UnsupportedError, match="holds a 'toy' model; installed are double"):
        scfm.load(path)


def test_saved_weights_of_another_model(official, tmp_path):
    path = scfm.load(official).save(tmp_path / "saved")
    header = json.loads((path / "scfm.json").read_text())
    header["config"]["width"] = 8
    (path / "scfm.json").write_text(json.dumps(header))
    with pytest.raises(scfm.CheckpointError, match="does not fit the model.*shapes that differ"):
        scfm.load(path)


def test_bundled_checkpoint_is_found(official, tmp_path, monkeypatch, capsys):
    bundled = tmp_path / "bundled"
    backbone = scfm.load(official)
    backbone.name = "toy-mini"
    backbone.save(bundled / "toy-mini")
    (bundled / "notes").mkdir()
    monkeypatch.setattr(_registry, "bundled_directory", lambda: bundled)
    _registry.entries.cache_clear()
    _registry._names.cache_clear()
    try:
        entry = scfm.checkpoints.info("toy-mini")
        assert entry.status == "bundled"
        assert scfm.checkpoints.list()["name"].iloc[0] == "toy-mini"
        assert scfm.checkpoints.fetch("toy-mini") == bundled / "toy-mini"
        assert_same_weights(weights_of(scfm.load("toy-mini")), weights_of(backbone))
        assert load_vocab("toy-mini") == backbone.vocab
        names = sorted(path.name for path in (bundled / "toy-mini").iterdir())
        assert names == ["model.safetensors", "scfm.json", "vocab.json"]
    finally:
        monkeypatch.undo()
        _registry.entries.cache_clear()
        _registry._names.cache_clear()


# -- genes only, and fresh weights -----------------------------------------------------------------------------------


def test_vocab_only(official, tmp_path, register, install):
    path = scfm.load(official).save(tmp_path / "saved")
    for source in (official, path):
        assert list(load_vocab(source)) == NAMES

    class Light(Toy):
        @classmethod
        def read_vocab(cls, directory, **options):
            return GeneVocab((directory / "genes.txt").read_text().split(), specials=["<pad>"])

    install(Light)
    entry = register()
    (entry.directory / "toy.pt").unlink()
    assert list(load_vocab("toy-released")) == NAMES


def test_random_copy(official):
    backbone = scfm.load(official, shift=2.0)
    one, same, other = random_copy(backbone), random_copy(backbone, 0), random_copy(backbone, 1)
    assert one.name == "toy-random"
    assert (one.config, one.vocab) == (backbone.config, backbone.vocab)
    assert_same_weights(weights_of(one), weights_of(same))
    for different in (backbone, other):
        assert not torch.equal(one.module.genes.weight, different.module.genes.weight)
    assert one.provenance.extra == {"seed": 0}
    assert random_copy(backbone.to("cpu", "bfloat16")).dtype == torch.bfloat16


def test_from_config():
    vocab = GeneVocab(NAMES, specials=["<pad>"])
    one = from_config("toy", {"width": 6}, vocab, seed=3, device="cpu")
    same = from_config("toy", ToyConfig(6), vocab, seed=3, name="mine", device="cpu")
    assert one.config == ToyConfig(6)
    assert (one.name, same.name) == ("toy-random", "mine")
    assert_same_weights(weights_of(one), weights_of(same))
    with pytest.raises(KeyError, match="no backbone class 'tyo'"):
        from_config("tyo", {}, vocab)
