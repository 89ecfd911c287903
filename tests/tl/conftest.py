"""Tiny models with random weights, and cells with genes of which some are unknown to them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from tiny import TINY

from scfm.backbones import Backbone, backbone_class, from_config
from scfm.genes import GeneVocab

N_KNOWN, N_UNKNOWN, N_CELLS = 50, 6, 37
SYMBOLS = [f"GENE{i}" for i in range(N_KNOWN)]
ENSEMBL = [f"ENSG{i:011d}" for i in range(N_KNOWN)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost tiny networks more time than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# scGPT with cells that are too long for it
CONFIGS = TINY | {"scgpt": TINY["scgpt"] | {"max_length": 30}}


def make_backbone(kind: str) -> Backbone:
    specials = list(backbone_class(kind).specials)
    # where a model wants its special tokens first or last is its own affair
    first = kind == "cellfm"
    names = [*specials, *SYMBOLS] if first else [*SYMBOLS, *specials]
    blank = [""] * len(specials)
    ensembl = [*blank, *ENSEMBL] if first else [*ENSEMBL, *blank]
    vocab = GeneVocab(names, specials=specials, ensembl_ids=ensembl)
    config = backbone_class(kind).config_for(CONFIGS[kind], vocab)
    return from_config(kind, config, vocab, name=kind, device="cpu", precision="float32")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Backbone:
    return make_backbone(request.param)


@pytest.fixture(scope="module")
def scgpt() -> Backbone:
    return make_backbone("scgpt")


@pytest.fixture(scope="module")
def scfoundation() -> Backbone:
    return make_backbone("scfoundation")


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """Cells with 3 to 56 expressed genes."""
    rng = np.random.default_rng(5)
    counts = rng.poisson(rng.gamma(0.6, 2.0, (N_CELLS, 1)), (N_CELLS, N_KNOWN + N_UNKNOWN)).astype(np.float32)
    counts[:, [1, 4, 9]] += 1
    return counts


@pytest.fixture
def adata(counts) -> ad.AnnData:
    var = pd.DataFrame(index=SYMBOLS + [f"OTHER{i}" for i in range(N_UNKNOWN)])
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(counts))])
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
