"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("SCFM_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # for good, also in processes that tests start; numba gives torch as many threads as it takes itself
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

SHARED = Path(os.environ.get("SCFM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(*parts: str) -> Path:
    """Path inside the developers' shared folder; skips the test when it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the developers' shared folder (set SCFM_SHARED): {'/'.join(parts)}")
    return path


@pytest.fixture(scope="session")
def shared():
    """``shared("golden", "scgpt", "binning")`` gives a path or skips the test."""
    return shared_path


@pytest.fixture(autouse=True)
def _isolated_settings(tmp_path, monkeypatch):
    """Every test has its own cache and leaves the settings as it found them."""
    import scfm

    before = {name: getattr(scfm.settings, name) for name in scfm.settings.__dataclass_fields__}
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    scfm.settings.cachedir = tmp_path / "cache"
    yield
    for name, value in before.items():
        setattr(scfm.settings, name, value)


@pytest.fixture(autouse=True, scope="module")
def _one_thread_for_tiny_networks(request):
    """Threads cost more than they save where all tensors are tiny, above all beside other workers."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if request.path.parent.name not in ("benchmark", "models", "tasks", "tl"):
        yield
        return

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Golden:
    """One golden case: what the reference implementation was given and what it returned."""

    def __init__(self, path: Path) -> None:
        import json

        import numpy as np

        self.path = path
        self.case = json.loads((path / "case.json").read_text())
        given = path / "input.npz"  # some cases are given a file of another kind
        self.input = np.load(given, allow_pickle=False) if given.is_file() else {}
        self.expected = np.load(path / "expected.npz", allow_pickle=False)


@pytest.fixture(scope="session")
def golden():
    """``golden("scgpt", "binning")``: from the shared folder, else from the copies in ``tests/golden``, else skip."""
    copies = Path(__file__).parent / "golden"

    def find(model: str, case: str) -> Golden:
        for root in (SHARED / "golden", copies):
            if (root / model / case / "expected.npz").is_file():
                return Golden(root / model / case)
        return Golden(shared_path("golden", model, case))

    return find


class MindSporeWriter:
    """Writes MindSpore checkpoints as the library does, field by field."""

    KINDS = {
        "torch.float16": "Float16",
        "torch.float32": "Float32",
        "torch.float64": "Float64",
        "torch.bfloat16": "BFloat16",
        "torch.int8": "Int8",
        "torch.int16": "Int16",
        "torch.int32": "Int32",
        "torch.int64": "Int64",
        "torch.uint8": "UInt8",
        "torch.uint16": "UInt16",
        "torch.uint32": "UInt32",
        "torch.uint64": "UInt64",
        "torch.bool": "Bool",
    }

    @staticmethod
    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])

    @classmethod
    def field(cls, number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return cls.varint(number << 3) + cls.varint(content)
        return cls.varint(number << 3 | 2) + cls.varint(len(content)) + content

    @classmethod
    def record(
        cls, tag: str, dims: list[int], kind: str, content: bytes, *, packed: bool = False, extra: bytes = b""
    ) -> bytes:
        sizes = b"".join(map(cls.varint, dims) if packed else (cls.field(1, dim) for dim in dims))
        sizes = cls.field(1, sizes) if packed else sizes
        tensor = sizes + cls.field(2, kind.encode()) + extra + cls.field(3, content)
        return cls.field(1, cls.field(1, tag.encode()) + cls.field(2, tensor) + extra)

    @classmethod
    def write(cls, path, tensors, *, crc: bool = False, slice_bytes: int | None = None, **options) -> Path:
        import zlib

        import torch

        out = b""
        for tag, tensor in tensors.items():
            if isinstance(tensor, str):
                out += cls.record(tag, [0], "str", tensor.encode("utf-32-le"), **options)
                continue
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            step = slice_bytes or max(len(content), 1)
            for start in range(0, max(len(content), 1), step):
                kind = cls.KINDS[str(tensor.dtype)]
                out += cls.record(tag, list(tensor.shape), kind, content[start : start + step], **options)
        if crc:
            out += b"crc_num" + zlib.crc32(out).to_bytes(10, "big")
        path.write_bytes(out)
        return path


@pytest.fixture(scope="session")
def mindspore_writer():
    """Writer of MindSpore checkpoints, see :class:`MindSporeWriter`."""
    return MindSporeWriter


@pytest.fixture(scope="session")
def make_data():
    """``make_data(n_cells)``: counts of which cell 3 has none, with batches and labels."""

    def make(n_cells: int = 50, seed: int = 0, n_genes: int = 40):
        import anndata
        import numpy as np
        import pandas as pd
        from scipy import sparse

        rng = np.random.default_rng(seed)
        means = rng.gamma(1.0, 1.5, size=(3, n_genes))[np.arange(n_cells) % 3]
        counts = rng.poisson(means).astype(np.float32)
        counts[3] = 0
        obs = pd.DataFrame(
            {
                "batch": np.array(["a", "b"])[np.arange(n_cells) % 2],
                "label": np.array(list("xyz"))[np.arange(n_cells) % 3],
            },
            index=[f"cell{i}" for i in range(n_cells)],
        )
        var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
        return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)

    return make
