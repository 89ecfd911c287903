"""Tiny networks and data for the tests of model classes."""

from __future__ import annotations

import warnings

import pytest
from tiny import TINY

from scfm.backbones import backbone_kinds


@pytest.fixture(autouse=True)
def _quiet_lightning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


@pytest.fixture(scope="module", params=backbone_kinds())
def kind(request):
    assert request.param in TINY, f"add a tiny config for {request.param} to tests/tiny.py"
    return request.param


@pytest.fixture(scope="module")
def tiny():
    """Hyper-parameters by kind."""
    return TINY
