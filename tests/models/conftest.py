"""Tiny networks and data for the tests of model classes."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from tiny import TINY

from scfm.backbones import backbone_kinds

N_GENES = 40


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def make_data():
    """``make_data(n_cells)``: counts of which cell 3 has none, with batches and labels."""

    def make(n_cells: int = 50, seed: int = 0) -> anndata.AnnData:
        rng = np.random.default_rng(seed)
        means = rng.gamma(1.0, 1.5, size=(3, N_GENES))[np.arange(n_cells) % 3]
        counts = rng.poisson(means).astype(np.float32)
        counts[3] = 0
        obs = pd.DataFrame(
            {
                "batch": np.array(["a", "b"])[np.arange(n_cells) % 2],
                "label": np.array(list("xyz"))[np.arange(n_cells) % 3],
            },
            index=[f"cell{i}" for i in range(n_cells)],
        )
        var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
        return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)

    return make
