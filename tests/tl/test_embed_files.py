"""Large runs: results on disk, a real kill, and memory that does not grow with the number of cells."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import tracemalloc

import anndata as ad
import numpy as np
import pytest
import zarr
from scipy import sparse

from scfm.data import _transpose
from scfm.tl import embed


def test_out(adata, scgpt, tmp_path):
    out = tmp_path / "embedding.zarr"
    embed(adata, scgpt, out=out, block_size=10)
    stored = zarr.open_array(out, mode="r")
    assert stored.chunks == (10, 16)
    assert isinstance(adata.obsm["X_scgpt"], np.ndarray)
    np.testing.assert_array_equal(stored[...], adata.obsm["X_scgpt"])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    returned = embed(tmp_path / "cells.h5ad", scgpt, out=tmp_path / "other.zarr")
    assert isinstance(returned, zarr.Array)
    np.testing.assert_allclose(returned[...], stored[...], atol=1e-6)


def test_out_of_another_run(adata, scgpt, tmp_path):
    out = tmp_path / "embedding.zarr"
    embed(adata, scgpt, out=out)
    embed(adata, scgpt, out=out)
    for change in ({"rng": 1}, {"pooling": "avg-pool"}, {"tie_break": "left"}):
        with pytest.raises(ValueError, match="another run: .*overwrite=True"):
            embed(adata, scgpt, out=out, **change)
    embed(adata, scgpt, out=out, rng=1, overwrite=True)
    np.testing.assert_array_equal(zarr.open_array(out)[...], adata.obsm["X_scgpt"])


def test_killed_process(adata, scgpt, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    scgpt.save(tmp_path / "model")
    script = """
        import os, signal
        from scfm.engine import _writer
        from scfm.tl import embed

        write = _writer.ZarrWriter.write

        def write_and_die(self, start, values, n_empty):
            write(self, start, values, n_empty)
            if start == 10:
                os.kill(os.getpid(), signal.SIGKILL)

        _writer.ZarrWriter.write = write_and_die
        embed("cells.h5ad", "./model", out="embedding.zarr", block_size=5, device="cpu", precision="float32")
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    half_way = zarr.open_array(tmp_path / "embedding.zarr", mode="r")[...]
    assert np.isfinite(half_way[:15]).all()
    assert np.isnan(half_way[15:]).all()

    arguments = {"device": "cpu", "precision": "float32"}
    finished = embed(tmp_path / "cells.h5ad", tmp_path / "model", out=tmp_path / "embedding.zarr", **arguments)[...]
    np.testing.assert_array_equal(finished[:15], half_way[:15])
    embed(adata, scgpt)
    np.testing.assert_allclose(finished, adata.obsm["X_scgpt"], atol=1e-6)


def peak_bytes(path, model, out) -> int:
    """Most memory that Python and numpy held beyond what they held before."""
    tracemalloc.start()
    try:
        embed(path, model, out=out, block_size=64, progress=False)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("store", ["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_number_of_cells(scgpt, tmp_path, store, monkeypatch):
    monkeypatch.setattr(_transpose, "_VALUES_AT_ONCE", 5000)
    rng = np.random.default_rng(0)
    peaks, sizes = [], []
    for n_cells in (200, 200, 2000):
        counts = rng.poisson(0.3, (n_cells, 400)).astype(np.float32)
        adata = ad.AnnData({"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[store](counts))
        adata.var_names = [f"GENE{i}" for i in range(400)]
        path = tmp_path / f"{store}{len(peaks)}.h5ad"
        adata.write_h5ad(path)
        sizes.append(np.count_nonzero(counts) * 8)
        peaks.append(peak_bytes(path, scgpt, tmp_path / f"{path.stem}.zarr"))
    _, small, large = peaks  # the first run also pays for what is loaded once
    assert large - small < 0.15 * (sizes[2] - sizes[1])
