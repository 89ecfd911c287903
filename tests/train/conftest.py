"""Small counts in files, and recipes of small networks."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from scfm.train import Recipe

N_GENES = 35
SMALL = {
    "scgpt": {
        "config": {"dim": 16, "n_heads": 2, "ffn_dim": 16, "n_layers": 2, "dropout": 0.1},
        "objective": {"cell_prompt": False},
        "objective_from": {4: {"cell_prompt": True}},
    },
    "scfoundation": {
        "config": {
            "encoder_dim": 12,
            "encoder_depth": 2,
            "encoder_heads": 3,
            "n_bins": 8,
            "decoder_dim": 10,
            "decoder_depth": 2,
            "decoder_heads": 2,
            "decoder_dim_head": 6,
        },
    },
    "cellfm": {"config": {"dim": 64, "n_heads": 2, "n_layers": 2, "n_bins": 8}},
    "sclong": {
        "config": {
            "n_positions": N_GENES + 1,
            "top_length": 9,
            "dim": 12,
            "value_hidden": 8,
            "n_edges": 0,
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
    },
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Two files of 80 cells from three programs; each lacks some genes of the other."""
    folder = tmp_path_factory.mktemp("counts")
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.3, 4.0, size=(3, 40))
    for number in range(2):
        adata = AnnData(sparse.csr_matrix(rng.poisson(programs[rng.integers(3, size=80)]).astype(np.float32)))
        adata.var_names = [f"G{i + 5 * number}" for i in range(40)]
        adata.write_h5ad(folder / f"{number}.h5ad")
    return tuple(str(folder / f"{number}.h5ad") for number in range(2))


@pytest.fixture
def recipe(files):
    """``recipe("scgpt", max_steps=3)``: eight steps of a small network, with a row for each."""

    def make(kind: str = "scgpt", **changes) -> Recipe:
        values = {
            "name": "tiny",
            "sources": files,
            "kind": kind,
            "n_genes": N_GENES,
            "max_steps": 8,
            "batch_size": 8,
            "log_every": 1,
            "validate_every": 3,
            "save_every": 2,
            "validation_share": 0.2,
            "optimization": {"learning_rate": 0.01, "unit": "step", "warmup_steps": 3, "redraw_every": 3},
            **SMALL[kind],
        }
        return Recipe(**values | changes)

    return make
