from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import scfm
from scfm.checkpoints import LoadReport, _files, store
from scfm.genes import GeneVocab

VOCAB = GeneVocab(["<pad>", "CD3E", "LYZ"], specials=["<pad>"])


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.rand(3, 4, generator=generator),
        "a.bias": torch.rand(3, dtype=torch.float64, generator=generator),
        "count": torch.tensor(7),
        "half": torch.rand(5, generator=generator).to(torch.bfloat16),
    }


def save(path, **values):
    defaults = {
        "kind": "toy",
        "name": "toy-1",
        "config": {"width": 4, "sizes": [1, 2]},
        "vocab": VOCAB,
        "state_dict": state(),
    }
    return store.save(path, **{**defaults, **values})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path):
    report = LoadReport(loaded=["count"], renamed={"old": "count"}, dropped={"x": "not needed"})
    path = save(tmp_path / "deep" / "model", provenance={"id": "toy-1", "licence": "MIT"}, report=report)
    stored = store.read(path)
    assert (stored.kind, stored.name, stored.config) == ("toy", "toy-1", {"width": 4, "sizes": [1, 2]})
    assert stored.vocab == VOCAB
    assert stored.provenance == {"id": "toy-1", "licence": "MIT"}
    assert stored.report.renamed == {"old": "count"}
    assert stored.report.dropped == {"x": "not needed"}
    assert stored.state_dict.keys() == state().keys()
    for key, value in state().items():
        assert stored.state_dict[key].dtype == value.dtype
        assert torch.equal(stored.state_dict[key], value)
    assert stored.sha256 == _files.sha256(path / "model.safetensors")
    assert store.read_vocab(path) == VOCAB
    assert names(path) == ["model.safetensors", "scfm.json", "vocab.json"]


def test_header_is_plain_json_with_versions(tmp_path):
    header = json.loads((save(tmp_path / "model") / "scfm.json").read_text())
    assert header["format"] == 1
    assert header["scfm"] == scfm.__version__
    assert header["files"].keys() == {"model.safetensors", "vocab.json"}


def test_smaller_type_on_disk(tmp_path):
    stored = store.read(save(tmp_path / "model", dtype=torch.float16))
    assert {str(value.dtype) for value in stored.state_dict.values()} == {"torch.float16", "torch.int64"}
    assert torch.allclose(stored.state_dict["a.weight"].float(), state()["a.weight"], atol=1e-3)


def test_tied_transposed_and_sliced_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "tied": base, "transposed": base.T, "slice": base[1:]}
    stored = store.read(save(tmp_path / "model", state_dict=tensors))
    for key, value in tensors.items():
        assert torch.equal(stored.state_dict[key], value)


def test_loaded_tensors_can_be_saved_and_trained(tmp_path):
    """Mapped tensors may be written to without a change of the file."""
    path = save(tmp_path / "model")
    tensors = store.read(path).state_dict
    again = save(tmp_path / "again", state_dict=tensors)
    assert _files.sha256(again / "model.safetensors") == _files.sha256(path / "model.safetensors")
    tensors["a.weight"].zero_()
    assert torch.equal(store.read(path, verify=True).state_dict["a.weight"], state()["a.weight"])


def test_opening_does_not_read_the_weights(tmp_path):
    psutil = pytest.importorskip("psutil")
    size = 64 * 2**20
    path = save(tmp_path / "model", state_dict={"big": torch.zeros(size // 4)})
    process = psutil.Process()
    before = process.memory_info().rss
    stored = store.read(path, verify=False)
    assert process.memory_info().rss - before < size / 4
    assert stored.state_dict["big"].numel() == size // 4


# -- what may be replaced --------------------------------------------------------------------------------------------


def test_existing_path_is_kept_unless_told_otherwise(tmp_path):
    path = save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(path, name="second")
    assert store.read(path).name == "toy-1"
    save(path, name="second", state_dict=state(1), overwrite=True)
    stored = store.read(path)
    assert stored.name == "second"
    assert torch.equal(stored.state_dict["a.weight"], state(1)["a.weight"])
    assert names(tmp_path) == ["model"]


def test_foreign_directory_is_never_replaced(tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="not written by scfm"):
        save(precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert store.is_stored(save(tmp_path / "empty", overwrite=True))


def test_failure_while_writing_leaves_no_trace(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path / "model", config={"not": object()})
    assert names(tmp_path) == []
    path = save(tmp_path / "model")
    with pytest.raises(TypeError):
        save(path, config={"not": object()}, overwrite=True)
    assert store.read(path).name == "toy-1"
    assert names(tmp_path) == ["model"]


_CHILD = """
import os, sys
import torch
from scfm.checkpoints import store
from scfm.genes import GeneVocab
die_before = int(sys.argv[2])
moves, real = 0, os.replace
def replace(source, target):
    global moves
    moves += 1
    if moves == die_before:
        os._exit(9)
    real(source, target)
os.replace = os.rename = replace
store.save(sys.argv[1], kind="toy", name="new", config={}, vocab=GeneVocab(["A"]), state_dict={"w": torch.ones(2)}, overwrite=True)
"""


@pytest.mark.parametrize(("exists", "die_before"), [(False, 1), (True, 1), (True, 2)])
def test_killed_process_leaves_the_old_state(tmp_path, exists, die_before, capsys):
    path = tmp_path / "model"
    if exists:
        save(path)
    command = [sys.executable, "-c", _CHILD, str(path), str(die_before)]
    assert subprocess.run(command, check=False).returncode == 9
    if exists:
        assert store.read(path, verify=True).name == "toy-1"
        assert ("its former content is back" in capsys.readouterr().err) == (die_before == 2)
    else:
        assert not store.is_stored(path)
    save(path, name="next", overwrite=True)
    assert store.read(path, verify=True).name == "next"


def test_two_writers_at_once(tmp_path, monkeypatch):
    """Who comes second to a new directory is told so, and the first result stays."""
    path = tmp_path / "model"
    real = store.sha256
    raced = []

    def slow(file):
        if not raced:
            raced.append(True)
            save(path, name="first")
        return real(file)

    monkeypatch.setattr(store, "sha256", slow)
    with pytest.raises(FileExistsError, match="another process"):
        save(path, name="second")
    assert store.read(path).name == "first"
    assert names(tmp_path) == ["model"]


# -- damage ----------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json", "scfm.json"])
@pytest.mark.parametrize("damage", [cut, os.unlink])
def test_damage_is_named(tmp_path, name, damage):
    path = save(tmp_path / "model")
    damage(path / name)
    with pytest.raises(scfm.CheckpointError, match=rf"{name}.*(damaged|cut off|missing).*[Ff]etch|{name}.*[Ff]etch"):
        store.read(path)


def test_changed_bytes_are_noticed(tmp_path):
    path = save(tmp_path / "model")
    flip(path / "model.safetensors")
    with pytest.raises(scfm.CheckpointError, match=r"model\.safetensors is damaged or was changed"):
        store.read(path)


def test_damaged_tensor_header(tmp_path):
    path = save(tmp_path / "model")
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(scfm.CheckpointError, match="is damaged"):
        store.read(path, verify=False)


def test_newer_format_and_foreign_header(tmp_path):
    path = save(tmp_path / "model")
    header = json.loads((path / "scfm.json").read_text())
    (path / "scfm.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(scfm.CheckpointError, match="format 99.*pip install -U scfm"):
        store.read(path)
    (path / "scfm.json").write_text("[1, 2]")
    with pytest.raises(scfm.CheckpointError, match="not a header written by scfm"):
        store.read(path)


@pytest.mark.skipif(os.name != "posix", reason="rights of files are those of POSIX")
@pytest.mark.parametrize(("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, mask, file, directory):
    before = os.umask(mask)
    try:
        path = save(tmp_path / "model")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == directory
    assert {name: (path / name).stat().st_mode & 0o777 for name in names(path)} == dict.fromkeys(names(path), file)


def test_small_text_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    _files.write_text(path, "old")

    def fail(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            _files.write_text(path, "new")
    assert path.read_text() == "old"
    _files.write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_hash_is_remembered_until_the_file_changes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a")
    first = _files.sha256(path)
    path.write_bytes(b"bc")
    assert _files.sha256(path) != first
