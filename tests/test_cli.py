"""The command line, in processes of its own where the process matters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse

import scfm
from scfm.cli import main


@pytest.fixture
def cells(tmp_path):
    vocab = scfm.load("scgpt-mini").vocab
    rng = np.random.default_rng(0)
    adata = AnnData(sparse.csr_matrix(rng.poisson(1.0, (12, 50)).astype(np.float32)))
    adata.var_names = vocab.genes[:50]
    adata.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def test_embed(cells, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    assert main(["-q", "embed", str(cells), "-m", "scgpt-mini", "-o", str(out)]) == 0
    adata = read_h5ad(out)
    assert adata.obsm["X_scgpt-mini"].shape == (12, 64)
    assert list(tmp_path.glob("*.partial*")) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["embed", "missing.h5ad", "-o", "a.h5ad"], "no file missing.h5ad"),
        (["embed", "IN", "-m", "scgtp-mini", "-o", "a.h5ad"], "scgpt-mini"),
        (["embed", "IN", "-m", "scgpt-mini", "-o", "a.csv"], ".h5ad"),
        (["embed", "IN", "-m", "scgpt-mini", "-o", "a.h5ad", "--layer", "raw"], "raw"),
        (["models", "nothing-like-this"], "nothing-like-this"),
    ],
)
def test_errors_are_one_line_and_set_the_exit_status(cells, capsys, arguments, text):
    assert main([str(cells) if a == "IN" else a for a in arguments]) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_models(capsys):
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("scgpt-mini", "scgpt-blood", "scfoundation", "cellfm-800m", "sclong"))
    assert main(["models", "scfoundation"]) == 0
    assert "licen" in capsys.readouterr().out.lower()


def test_version_and_help_are_quick_and_need_no_torch():
    code = "import sys\nfrom scfm.cli import main\ntry:\n    main(['--version'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == scfm.__version__


def test_module_is_the_script():
    done = subprocess.run([sys.executable, "-m", "scfm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == scfm.__version__
    done = subprocess.run(
        [sys.executable, "-m", "scfm", "embed", "missing.h5ad", "-o", "out.h5ad"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "missing.h5ad" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert main(["-q", "demo", "-o", str(tmp_path)]) == 0
    assert "random weights" in capsys.readouterr().out
    adata = read_h5ad(tmp_path / "scfm_demo.h5ad")
    scores = adata.uns["compare_embeddings"]["scores"]
    assert scores.loc["scgpt-mini", "NMI"] > scores.loc["random weights", "NMI"] + 0.1
    assert scores.loc["shuffled", "ARI"] < 0.1
    assert (tmp_path / "scfm_demo.png").stat().st_size > 20_000
    assert {"leiden", "counts"} <= {*adata.obs, *adata.layers}
