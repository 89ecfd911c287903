"""Pickles: what is read, and that nothing in one is ever run."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from scfm import CheckpointError
from scfm.checkpoints import restricted_pickle


@pytest.fixture
def write(tmp_path):
    def to(content, name="some.pkl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return path

    return to


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_tensors_are_read(write, protocol):
    content = {
        "number": 3, "text": "cuda", "yes": True, "nothing": None, "list": [1.5, (2,)], "ordered": OrderedDict(a=1),
        "edges": torch.arange(10).view(2, 5), "weight": torch.rand(5), "view": torch.arange(12.0)[3:9:2],
        "narrow": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    read = restricted_pickle.read(write(pickle.dumps(content, protocol)))
    assert read.keys() == content.keys()
    for key, value in content.items():
        if torch.is_tensor(value):
            assert read[key].dtype == value.dtype
            assert torch.equal(read[key], value)
        else:
            assert read[key] == value


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (getattr, "getattr"), (torch.load, "load"), (pickle.loads, "loads")],
)
def test_functions_are_refused_by_name_and_not_run(write, tmp_path, function, name):
    trace = tmp_path / "trace"
    arguments = {"system": f"touch {trace}", "eval": f"open({str(trace)!r}, 'w')"}.get(name, "x")
    path = write({"max_seq_len": 3, "inner": [Runs(function, arguments)]})
    with pytest.raises(
        CheckpointError, match=rf"some\.pkl: the pickle asks for \w+(\.\w+)*\.{name}, which scfm does not"
    ):
        restricted_pickle.read(path)
    assert not trace.exists()


def test_classes_are_refused(write):
    with pytest.raises(CheckpointError, match="asks for pathlib"):
        restricted_pickle.read(write({"path": tmp_path_of_another_kind()}))


def tmp_path_of_another_kind():
    from pathlib import PurePosixPath

    return PurePosixPath("x")


def test_a_pickle_inside_a_storage_is_not_run_either(write, tmp_path):
    trace = tmp_path / "trace"
    inner = pickle.dumps(Runs(os.system, f"touch {trace}"))
    path = write({"G_go": Runs(torch.storage._load_from_bytes, inner)})
    with pytest.raises(CheckpointError, match="no pickle of plain values and tensors"):
        restricted_pickle.read(path)
    assert not trace.exists()


def test_names_cannot_be_reached_through_an_allowed_module(write):
    stolen = b"\x80\x04\x8c\x0ctorch._utils\x8c\x0aos.system_\x93."
    with pytest.raises(CheckpointError, match=r"asks for torch\._utils\.os\.system_"):
        restricted_pickle.read(write(stolen))


def test_references_to_the_outside_are_refused(write):
    class Refers(pickle.Pickler):
        def persistent_id(self, obj):
            return "elsewhere" if obj == "x" else None

    buffer = io.BytesIO()
    Refers(buffer).dump({"a": "x"})
    with pytest.raises(CheckpointError, match="outside of itself"):
        restricted_pickle.read(write(buffer.getvalue()))


@pytest.mark.parametrize("content", [b"", b"no pickle at all", pickle.dumps({"a": list(range(100))})[:50]])
def test_damaged_files_are_named(write, content):
    with pytest.raises(CheckpointError, match=r"some\.pkl is no pickle"):
        restricted_pickle.read(write(content))


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        restricted_pickle.read(tmp_path / "none.pkl")
