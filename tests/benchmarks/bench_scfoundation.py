"""Share of the machine's float32 matmul peak that scFoundation reaches, encoder and decoder apart.

    python tests/benchmarks/bench_scfoundation.py
    python tests/benchmarks/bench_scfoundation.py --threads 1 --cpu-time   # on a machine that others use too

Released size, random weights. FLOPs are the necessary ones, two per multiply-add: all encoder layers; six decoder
layers over all genes, the last one's queries included; inputs of the decoder for expressed genes only, because those
of the others are the same for all cells. Norms, exponentials, softmax and copies count as nothing. The peak is
measured again beside every run, and the larger of the two neighbours counts.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from scfm.backbones import TokenBatch, from_config
from scfm.backbones.scfoundation import PRESETS, SCFoundationBackbone, SCFoundationConfig
from scfm.genes import GeneVocab

LENGTHS = (1000, 2000, 3000)


def encoder_flops(length: int, config: SCFoundationConfig) -> float:
    """Needed for the states of one cell with this many tokens."""
    d, bins = config.encoder_dim, config.n_bins
    layers = config.encoder_depth * (24 * length * d**2 + 4 * length**2 * d)
    return layers + length * (2 * bins**2 + 2 * bins * d)


def decoder_flops(length: int, config: SCFoundationConfig) -> float:
    """Needed for the states of all genes of one cell with this many tokens."""
    n, e, inner = config.n_positions, config.decoder_dim, config.decoder_heads * config.decoder_dim_head
    features = int(config.decoder_dim_head * np.log(config.decoder_dim_head))
    layer = 8 * n * e * inner + 16 * n * e**2 + 8 * n * inner * features
    return config.decoder_depth * layer + 2 * length * config.encoder_dim * e


def cell(length: int, config: SCFoundationConfig) -> TokenBatch:
    """Tokens of one cell with random genes."""
    rng = np.random.default_rng(length)
    genes = np.sort(rng.choice(config.n_genes, length - 2, replace=False))
    ids = torch.from_numpy(np.append(genes, [config.target_id, config.source_id]))
    values = torch.from_numpy(rng.uniform(0.1, 5, length).astype(np.float32))
    return TokenBatch(ids, values, torch.tensor([0, length]), config.pad_id, config.pad_value)


class Meter:
    """Times functions against the matmul peak of the moment."""

    def __init__(self, clock: Callable[[], float], repeats: int) -> None:
        self.clock, self.repeats = clock, repeats
        self.a, self.b, self.out = (torch.randn(2048, 2048) for _ in range(3))

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Shortest of several runs."""
        best = np.inf
        for _ in range(repeats or self.repeats):
            start = self.clock()
            run()
            best = min(best, self.clock() - start)
        return best

    def peak(self) -> float:
        """Float32 matrix product of the machine, FLOP/s."""
        return 2 * 2048**3 / self.seconds(lambda: torch.mm(self.a, self.b, out=self.out), 8)

    def report(self, name: str, run: Callable[[], object], flops: float) -> float:
        """Print one line and return the seconds."""
        run()
        before = self.peak()
        seconds = self.seconds(run)
        peak = max(before, self.peak())
        rate = flops / seconds
        print(
            f"{name:<34}{seconds:8.2f} s {rate / 1e9:8.1f} GFLOP/s {rate / peak:6.2f} of {peak / 1e9:.0f} GFLOP/s",
            flush=True,
        )
        return seconds


def measure(backbone: SCFoundationBackbone, meter: Meter) -> dict[str, float]:
    """Encoder at three lengths, decoder at one."""
    config, out = backbone.config, {}
    label = str(backbone.dtype).removeprefix("torch.")
    for length in LENGTHS:
        tokens = cell(length, config)
        name = f"embed, {length} tokens, {label}"
        out[f"embed {length}"] = meter.report(
            name, lambda tokens=tokens: backbone.embed(tokens), encoder_flops(length, config)
        )
    tokens = cell(1500, config)
    with torch.inference_mode():
        hidden = backbone.module.encode(tokens)

        def decode() -> None:
            for _ in backbone.module.decode(tokens, hidden):
                pass

        out["decode"] = meter.report(f"decode all genes, {label}", decode, decoder_flops(1500, config))
    return out


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall seconds (one thread only)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="measure bfloat16 too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = PRESETS["scfoundation"]
    vocab = GeneVocab([f"GENE{i}" for i in range(config.n_genes)])
    backbone = from_config("scfoundation", config, vocab, device="cpu", precision="float32")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    meter = Meter(time.process_time if options.cpu_time else time.perf_counter, options.repeats)
    exact = measure(backbone, meter)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    print(f"peak memory above the loaded model: {used / 1024:.0f} MiB")
    if options.bfloat16:
        reduced = measure(backbone.to("cpu", "bfloat16"), meter)
        for name, seconds in exact.items():
            print(f"{name}: bfloat16 is {seconds / reduced[name]:.2f} times as fast as float32")


if __name__ == "__main__":
    main()
