"""A model class in two processes does what it does in one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import TINY

from scfm.models import CellFM

SCRIPT = """
import sys, anndata, numpy as np, torch
torch.set_num_threads(1)
from scfm.models import CellFM
from tiny import TINY
adata = anndata.read_h5ad(sys.argv[1])
CellFM.setup_anndata(adata)
model = CellFM(adata, config=TINY["cellfm"], seed=0, device="cpu")
run = {"accelerator": "cpu", "batch_size": 8, "enable_progress_bar": False, "seed": 0, "lr": 1e-3}
model.train(2, devices=2, strategy=sys.argv[3], early_stopping=True, early_stopping_patience=5, **run)
if model.trainer.is_global_zero:
    np.save(sys.argv[2], model.get_latent_representation())
"""


@pytest.mark.parametrize("strategy", ["auto", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_equal_one_that_accumulates(strategy, make_data, tmp_path, pytestconfig):
    """CellFM, whose loss leaves parameters out."""
    adata = make_data()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "run.py").write_text(SCRIPT)
    arguments = [str(tmp_path / "run.py"), str(tmp_path / "cells.h5ad"), str(tmp_path / "two.npy"), strategy]
    path = {"PYTHONPATH": str(pytestconfig.rootpath / "tests")}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    CellFM.setup_anndata(adata)
    alone = CellFM(adata, config=TINY["cellfm"], seed=0, device="cpu")
    run = {"accelerator": "cpu", "batch_size": 8, "enable_progress_bar": False, "seed": 0, "lr": 1e-3}
    alone.train(2, accumulate_grad_batches=2, **run)
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), alone.get_latent_representation(), atol=1e-4)
