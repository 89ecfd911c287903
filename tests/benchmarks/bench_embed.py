"""Speed and memory of ``scfm.tl.embed`` at released sizes with random weights.

    python tests/benchmarks/bench_embed.py scgpt scfoundation cellfm-80m        # speed, float32 and bfloat16
    python tests/benchmarks/bench_embed.py cellfm-800m --cells 8                # 20 s per cell on two cores
    python tests/benchmarks/bench_embed.py sclong --cells 2                     # 80 s per cell on two cores
    python tests/benchmarks/bench_embed.py memory                               # peak memory against the number of cells

The yardstick is the machine's own float32 matrix product, measured again before and after each run. FLOPs are those
that remain necessary after the exact savings (two per multiply-add); tokenising, layer norms, softmax and copies count
as nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.nn.linear_attention import default_features

MATMUL_SIZE = 2048
CELLS = {"scgpt": 48, "scfoundation": 48, "cellfm-80m": 48, "cellfm-800m": 8, "sclong": 2}
SEED = 0


def matmul_peak(dtype: torch.dtype = torch.float32, seconds: float = 1.5) -> float:
    """Best matrix product of this machine in GFLOP/s."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best / 1e9


def scgpt_flops(lengths: np.ndarray, config) -> float:
    """Encoder without its last layer, of which only the ``<cls>`` row is computed."""
    dim, ffn, heads = config.dim, config.ffn_dim, config.n_heads
    full = lengths * (8 * dim**2 + 4 * dim * ffn) + 4 * lengths**2 * dim
    last = 4 * heads * lengths * dim + 8 * dim**2 + 4 * dim * ffn
    return float(((config.n_layers - 1) * full + last).sum())


def scfoundation_flops(lengths: np.ndarray, config) -> float:
    """All encoder layers in full: pooling needs the states of all genes."""
    dim = config.encoder_dim
    return float((config.encoder_depth * (24 * lengths * dim**2 + 4 * lengths**2 * dim)).sum())


def cellfm_flops(lengths: np.ndarray, config) -> float:
    """Last layer: keys and values of all tokens, the rest for ``<cls>`` only. ``lengths`` are without ``<cls>``."""
    dim, dim_head = config.dim, config.dim // config.n_heads
    tokens = lengths + 1
    full = tokens * (16 * dim**2 + 4 * dim * dim_head)
    last = tokens * (4 * dim**2 + 2 * dim * dim_head) + 12 * dim**2
    return float(((config.n_layers - 1) * full + last).sum())


def sclong_flops(lengths: np.ndarray, config) -> float:
    """All three Performers in full, for every position of every cell."""
    n, top = config.n_positions, config.top_length
    total = 4 * top * config.dim * config.large_dim
    for name, tokens in {"large": top, "mini": n - top, "decoder": n}.items():
        sizes = config.stack_sizes(name)
        dim, inner = sizes["dim"], sizes["heads"] * sizes["dim_head"]
        linear = 2 * (4 * dim * inner + 8 * dim**2)
        total += sizes["depth"] * tokens * (linear + 8 * default_features(sizes["dim_head"]) * inner)
    return float(total * len(lengths))


def released(kind: str):
    """A backbone of released size with random weights, and its necessary FLOPs."""
    if kind == "scgpt":
        from scfm.backbones.scgpt import PRESETS

        specials = ["<pad>", "<cls>", "<eoc>"]
        vocab = GeneVocab([*(f"GENE{i}" for i in range(60_694)), *specials], specials=specials)
        return from_config(kind, PRESETS["scgpt"], vocab, name=kind, seed=SEED), scgpt_flops
    if kind == "scfoundation":
        from scfm.backbones.scfoundation import PRESETS

        vocab = GeneVocab([f"GENE{i}" for i in range(19_264)])
        return from_config(kind, PRESETS["scfoundation"], vocab, name=kind, seed=SEED), scfoundation_flops
    if kind.startswith("cellfm"):
        from scfm.backbones.cellfm import PRESETS, CellFMBackbone

        n_genes = {"cellfm-80m": 27_855, "cellfm-800m": 24_078}[kind]
        specials = CellFMBackbone.specials
        vocab = GeneVocab([*specials, *(f"GENE{i}" for i in range(n_genes))], specials=specials)
        return from_config("cellfm", PRESETS[kind], vocab, name=kind, seed=SEED), cellfm_flops
    from scfm.backbones.sclong import PRESETS, SCLongBackbone

    specials = SCLongBackbone.specials
    vocab = GeneVocab([*(f"GENE{i}" for i in range(27_874)), *specials], specials=specials)
    return from_config(kind, PRESETS["sclong"], vocab, name=kind, seed=SEED), sclong_flops


def cells(n: int, n_genes: int = 19_264, low: int = 1000, high: int = 3000) -> AnnData:
    """Counts with ``low`` to ``high`` expressed genes per cell."""
    rng = np.random.default_rng(SEED)
    expressed = rng.integers(low, high + 1, size=n)
    indices = np.concatenate([np.sort(rng.choice(n_genes, size=k, replace=False)) for k in expressed])
    data = (1 + rng.geometric(0.5, size=len(indices)) // 2).astype(np.float32)
    counts = sparse.csr_matrix((data, indices, np.concatenate([[0], np.cumsum(expressed)])), shape=(n, n_genes))
    adata = AnnData(counts)
    adata.var_names = [f"GENE{i}" for i in range(n_genes)]
    return adata


class PeakMemory:
    """Largest resident memory while the context is open, sampled, in MiB."""

    def __enter__(self) -> PeakMemory:
        self._process, self._running = psutil.Process(), True
        self.before = self.peak = self._process.memory_info().rss / 2**20
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, self._process.memory_info().rss / 2**20)
            time.sleep(0.01)

    def __exit__(self, *_) -> None:
        self._running = False
        self._thread.join()


def speed(kind: str, n_cells: int) -> None:
    backbone, flops = released(kind)
    adata = cells(n_cells)
    start = time.perf_counter()
    tokens = backbone.tokenize(adata.X, adata.var_names.to_numpy())
    tokenising = time.perf_counter() - start
    necessary = flops(tokens.lengths.numpy().astype(float), backbone.config)
    weights = sum(p.numel() * p.element_size() for p in backbone.module.parameters()) / 2**20
    reference, rate = None, None
    print(
        f"\n{kind}: {n_cells} cells, {int(tokens.lengths.float().mean())} tokens on average, {weights:.0f} MiB weights"
    )
    for precision in ("float32", "bfloat16"):
        backbone.to("cpu", precision)
        scfm.tl.embed(adata[: 1 + (n_cells > 8)].copy(), backbone, progress=False)
        before = matmul_peak()
        with PeakMemory() as memory:
            start = time.perf_counter()
            scfm.tl.embed(adata, backbone, key_added=precision, progress=False)
            seconds = time.perf_counter() - start
        peak = max(before, matmul_peak())
        line = (
            f"  {precision:9s} {n_cells / seconds:6.2f} cells/s  {necessary / seconds / 1e9:6.0f} GFLOP/s of "
            f"{peak:.0f} (float32 matmul): share {necessary / seconds / 1e9 / peak:.2f}  "
            f"tokenising {tokenising / seconds:.1%}  peak memory above start +{memory.peak - memory.before:.0f} MiB"
        )
        embedding = adata.obsm[precision]
        if reference is None:
            reference, rate = embedding, n_cells / seconds
        else:
            norms = np.linalg.norm(embedding, axis=1) * np.linalg.norm(reference, axis=1)
            cosine = (embedding * reference).sum(1) / norms
            own = matmul_peak(torch.bfloat16)
            line += (
                f"  {n_cells / seconds / rate:.2f} x float32 where a bfloat16 matmul is {own / peak:.2f} x float32 "
                f"({own:.0f} GFLOP/s): share of that {necessary / seconds / 1e9 / own:.2f}, "
                f"lowest cosine {cosine.min():.5f}"
            )
        print(line, flush=True)


def memory() -> None:
    """Embed backed files of growing size with the bundled model, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for n in (5_000, 50_000):
            path = Path(folder) / f"{n}.h5ad"
            backbone = scfm.load("scgpt-mini")
            adata = cells(n, n_genes=2000, low=60, high=120)
            adata.var_names = backbone.vocab.genes[:2000]
            adata.write_h5ad(path)
            code = f"import bench_embed as b; b.memory_of({str(path)!r}, {str(Path(folder) / f'{n}.zarr')!r})"
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
            subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def memory_of(path: str, out: str) -> None:
    scfm.settings.verbosity = 1
    backbone = scfm.load("scgpt-mini")
    with PeakMemory() as peak:
        start = time.perf_counter()
        result = scfm.tl.embed(path, backbone, out=out, progress=False)
    n = result.shape[0]
    seconds = time.perf_counter() - start
    print(f"{n:7,d} cells: peak +{peak.peak - peak.before:.0f} MiB, {n / seconds:.0f} cells/s", flush=True)
    assert n == read_h5ad(path, backed="r").n_obs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*CELLS, "memory"])
    parser.add_argument("--cells", type=int, help="cells of the speed runs")
    args = parser.parse_args()
    scfm.settings.verbosity = 1
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for what in args.what:
        memory() if what == "memory" else speed(what, args.cells or CELLS[what])


if __name__ == "__main__":
    main()
