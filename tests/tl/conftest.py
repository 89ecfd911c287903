"""Tiny models with random weights, and cells with genes of which some are unknown to them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scfm.backbones import Backbone, from_config
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


def make_backbone(kind: str) -> Backbone:
    if kind == "scgpt":
        config = {"dim": 16, "n_heads": 2, "ffn_dim": 16, "n_layers": 2, "max_length": 30}
        specials = ["<pad>", "<cls>", "<eoc>"]
    else:
        config = {"n_genes": N_KNOWN, "encoder_dim": 16, "encoder_depth": 2, "encoder_heads": 2, "decoder_dim": 12}
        config |= {"decoder_depth": 1, "decoder_heads": 2, "decoder_dim_head": 6, "n_bins": 10}
        specials = []
    vocab = GeneVocab(SYMBOLS + specials, specials=specials, ensembl_ids=ENSEMBL + [""] * len(specials))
    return from_config(kind, config, vocab, name=kind, device="cpu", precision="float32")


@pytest.fixture(scope="module", params=["scgpt", "scfoundation"])
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
