"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("SCFM_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

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


class Golden:
    """One golden case: what the reference implementation was given and what it returned."""

    def __init__(self, path: Path) -> None:
        import json

        import numpy as np

        self.path = path
        self.case = json.loads((path / "case.json").read_text())
        self.input = np.load(path / "input.npz", allow_pickle=False)
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
