"""Training data from a large store: cells per second, and the memory that streaming takes.

python tests/benchmarks/bench_stream.py [--cells 1000000] [--genes-per-cell 60] [--format h5ad] [--readers 0]

Writes a synthetic store of sparse counts in chunks to a temporary folder (0.3 GB for a million cells) and streams one
epoch of micro-batches of it, in shuffled blocks, as ``scfm pretrain`` does. The peak is that of the resident memory of
this process, without the processes of ``--readers`` and the one that writes the store.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem

from scfm.genes import GeneVocab
from scfm.train._cells import Cells
from scfm.train._order import Order
from scfm.train._stream import Stream

N_GENES = 20_000
STEP = 50_000


def write_store(path: Path, n_cells: int, per_cell: int) -> None:
    """Write counts of random genes, chunk by chunk."""
    root = zarr.open_group(path, mode="w") if path.suffix == ".zarr" else h5py.File(path, "w")
    obs, var = (
        pd.DataFrame(index=[f"{letter}{i}" for i in range(n)]) for letter, n in (("c", n_cells), ("G", N_GENES))
    )
    for name, table in (("obs", obs), ("var", var)):
        write_elem(root, name, table)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    group = root.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]})
    shape, chunks = (n_cells * per_cell,), (256 * per_cell,)
    make = group.create_array if isinstance(group, zarr.Group) else group.create_dataset
    data, indices = (
        make(name, shape=shape, chunks=chunks, dtype=kind) for name, kind in (("data", "f4"), ("indices", "i4"))
    )
    rng = np.random.default_rng(0)
    for start in range(0, n_cells, STEP):
        n = min(STEP, n_cells - start)
        # increasing genes: sorted draws from shrinking ranges, made distinct by their rank
        genes = np.sort(rng.integers(N_GENES - per_cell, size=(n, per_cell)), axis=1) + np.arange(per_cell)
        where = slice(start * per_cell, (start + n) * per_cell)
        indices[where] = genes.astype(np.int32).ravel()
        data[where] = rng.geometric(0.5, n * per_cell).astype(np.float32)
    write_elem(group, "indptr", np.arange(n_cells + 1) * per_cell)
    if isinstance(root, h5py.File):
        root.close()


def peak_memory() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes-per-cell", type=int, default=60)
    parser.add_argument("--format", choices=("h5ad", "zarr"), default="h5ad")
    parser.add_argument("--readers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cells.{args.format}"
        writer = get_context("spawn").Process(target=write_store, args=(path, args.cells, args.genes_per_cell))
        writer.start()
        writer.join()
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        before = peak_memory()
        start = time.perf_counter()
        cells = Cells([path], GeneVocab([f"G{i}" for i in range(N_GENES)]), in_memory=False)
        order = Order(np.arange(args.cells), lanes=1, batch_size=args.batch_size, block_size=128)
        stream = Stream(cells, order, readers=args.readers)
        opened = time.perf_counter()
        n_cells = sum(len(batch) for batch in islice(stream, order.steps_per_epoch))
        stream.close()
        seconds = time.perf_counter() - opened
    peak = peak_memory()
    print(f"anndata {version('anndata')}, {args.format}, {args.readers} readers, store {size / 1e9:.2f} GB")
    print(f"opened in {opened - start:.1f} s; {n_cells:,} cells in {seconds:.1f} s: {n_cells / seconds:,.0f} cells/s")
    print(f"peak memory {peak:.0f} MiB, of which imports {before:.0f} MiB")


if __name__ == "__main__":
    main()
