"""Tiny models with random weights, and cells with genes of which some are unknown to them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

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


CONFIGS = {
    "scgpt": {"dim": 16, "n_heads": 2, "ffn_dim": 16, "n_layers": 2, "max_length": 30},
    "scfoundation": {
        "n_genes": N_KNOWN,
        "encoder_dim": 16,
        "encoder_depth": 2,
        "encoder_heads": 2,
        "decoder_dim": 12,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "decoder_dim_head": 6,
        "n_bins": 10,
    },
    "cellfm": {"n_genes": N_KNOWN, "dim": 16, "n_heads": 2, "n_layers": 2, "n_bins": 8},
    "sclong": {
        "n_positions": N_KNOWN + 1,
        "top_length": 12,
        "dim": 12,
        "value_hidden": 8,
        "large_dim": 16,
        "large_depth": 2,
        "large_heads": 2,
        "large_dim_head": 6,
        "mini_depth": 1,
        "mini_heads": 2,
        "mini_dim_head": 6,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "decoder_dim_head": 6,
    },
}


def make_backbone(kind: str) -> Backbone:
    specials = list(backbone_class(kind).specials)
    # where a model wants its special tokens first or last is its own affair
    first = kind == "cellfm"
    names = [*specials, *SYMBOLS] if first else [*SYMBOLS, *specials]
    blank = [""] * len(specials)
    ensembl = [*blank, *ENSEMBL] if first else [*ENSEMBL, *blank]
    vocab = GeneVocab(names, specials=specials, ensembl_ids=ensembl)
    return from_config(kind, CONFIGS[kind], vocab, name=kind, device="cpu", precision="float32")


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
