"""Time of a training step at released sizes with random weights: forward, backward and optimiser.

    python tests/benchmarks/bench_train.py scgpt scfoundation cellfm-80m
    python tests/benchmarks/bench_train.py cellfm-800m sclong --cells 1
    python tests/benchmarks/bench_train.py sclong --cells 1 --depth 6      # fewer layers in the large encoder

Each step is one micro-batch through the objective of the paper, with its optimiser and clipping. The yardstick is the
machine's own float32 matrix product, measured before and after each step; the larger one counts. FLOPs are three times
those that a forward pass needs (two per multiply-add; a backward pass takes two products for each of the forward
pass): last layers count only for the rows that the loss looks at, layers that are computed again in the backward pass
count once, and layer norms, exponentials, softmax, random draws, copies and the optimiser count as nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

import numpy as np
import torch
from bench_embed import SEED, PeakMemory, cells, matmul_peak, released
from bench_scfoundation import decoder_flops

import scfm
from scfm.backbones import from_config
from scfm.nn.linear_attention import default_features
from scfm.train import OPTIMIZATIONS, MicroBatch, PretrainingPlan, build_optimizer
from scfm.train._presets import clip_gradients
from scfm.train._recompute import recomputed_layers

CELLS = {"scgpt": 4, "scfoundation": 1, "cellfm-80m": 4, "cellfm-800m": 1, "sclong": 1}
OPTIONS = {"scgpt": {"ratio": 0.5}}


def scgpt_flops(lengths: np.ndarray, config) -> float:
    """Both passes: half of the genes known, half asked for. Known genes need keys and values alone in the last layer."""
    dim, ffn = config.dim, config.ffn_dim
    lengths = np.minimum(lengths, config.max_length)
    asked = np.floor((lengths - 1) / 2)
    known = lengths - asked
    layer = (8 * dim**2 + 4 * dim * ffn) * lengths + 4 * dim * (known**2 + asked * known)
    last = (8 * dim**2 + 4 * dim * ffn) * asked + 4 * dim**2 * known + 4 * dim * asked * known
    # value embedding, and expression decoders of two layers of full width
    ends = 2 * dim**2 * known + 4 * dim**2 * asked
    return float((2 * ((config.n_layers - 1) * layer + last + ends) + 2 * dim**2 * asked).sum())


def scfoundation_flops(lengths: np.ndarray, config) -> float:
    """Encoder of the genes that are not masked; the decoder's last layer needs queries at masked genes alone."""
    dim, e, n = config.encoder_dim, config.decoder_dim, config.n_positions
    inner = config.decoder_heads * config.decoder_dim_head
    features = default_features(config.decoder_dim_head)
    seen = lengths * (1 - config.value_mask_prob) + 2
    masked = lengths * config.value_mask_prob + (config.n_genes - lengths) * config.zero_mask_prob
    encoder = config.encoder_depth * (24 * seen * dim**2 + 4 * seen**2 * dim)
    encoder += seen * (2 * config.n_bins**2 + 2 * config.n_bins * dim)
    # of each layer 4 e inner + 16 e^2 + 4 inner features belong to the queries
    spared = (n - masked) * (4 * e * inner + 16 * e**2 + 4 * inner * features)
    decoder = np.array([decoder_flops(int(length), config) for length in seen])
    # the inputs of unexpressed genes are the same for all cells
    return float((encoder + decoder - spared).sum() + 2 * n * dim * e)


def cellfm_flops(lengths: np.ndarray, config) -> float:
    """The last layer in full for CLS and the genes in the loss, for the others keys and values alone."""
    dim, dim_head = config.dim, config.dim // config.n_heads
    tokens = lengths + 1 + 2 * config.has_depth_tokens
    asked = 1 + config.mask_ratio * lengths
    layer = 16 * dim**2 + 4 * dim * dim_head
    last = tokens * (4 * dim**2 + 2 * dim * dim_head) + asked * (12 * dim**2 + 2 * dim * dim_head)
    ends = lengths * (2 * config.n_bins**2 + 2 * config.n_bins * dim) + asked * 4 * dim**2
    return float(((config.n_layers - 1) * tokens * layer + last + ends).sum())


def sclong_flops(lengths: np.ndarray, config) -> float:
    """All three Performers; the decoder's last layer needs queries at the genes to predict alone."""
    n, top = config.n_positions, config.top_length
    total = 4.0 * top * config.dim * config.large_dim * np.ones_like(lengths)
    for name, tokens in {"large": top, "mini": n - top, "decoder": n}.items():
        sizes = config.stack_sizes(name)
        dim, inner = sizes["dim"], sizes["heads"] * sizes["dim_head"]
        queries = 4 * dim * inner + 16 * dim**2 + 4 * default_features(sizes["dim_head"]) * inner
        keys = 4 * dim * inner + 4 * default_features(sizes["dim_head"]) * inner
        total += sizes["depth"] * tokens * (queries + keys)
        if name == "decoder":
            total -= (n - config.target_share * lengths) * queries
    return float(total.sum())


FLOPS = {
    "scgpt": scgpt_flops,
    "scfoundation": scfoundation_flops,
    "cellfm": cellfm_flops,
    "sclong": sclong_flops,
}


def trainable(what: str, depth: int | None):
    """A backbone of released size with random weights, ready to learn."""
    backbone, _ = released(what)
    if depth is not None:
        name = {"scfoundation": "encoder_depth", "sclong": "large_depth"}.get(backbone.kind, "n_layers")
        config, vocab = replace(backbone.config, **{name: depth}), backbone.vocab
        backbone = None  # two large networks need not be in memory together
        backbone = from_config(what.split("-")[0], config, vocab, name=what, seed=SEED)
    backbone.module.requires_grad_(requires_grad=True).train()
    return backbone


def steps(what: str, n_cells: int, depth: int | None, repeats: int, recompute: bool) -> None:
    backbone = trainable(what, depth)
    adata = cells(n_cells)
    genes = backbone.vocab.match(adata.var_names.to_numpy())
    optimization = OPTIMIZATIONS[backbone.kind]
    plan = PretrainingPlan(backbone, optimization, genes=genes, objective=OPTIONS.get(backbone.kind), seed=SEED)
    tokens = plan.tokens(MicroBatch(0, adata.X))
    necessary = 3 * FLOPS[backbone.kind](tokens.lengths.numpy().astype(float), backbone.config)
    optimizer = build_optimizer(plan.named_parameters(), optimization)
    print(
        f"\n{what}{'' if depth is None else f' with {depth} layers'}: {backbone.n_parameters / 1e6:,.0f} M parameters, "
        f"{n_cells} cells of {int(tokens.lengths.float().mean())} tokens, {necessary / 1e12:.2f} TFLOP"
        f"{', layers computed again' if recompute else ''}",
        flush=True,
    )
    best, peak = 0.0, matmul_peak()
    with PeakMemory() as memory, recomputed_layers(backbone, wanted=recompute):
        for number in range(repeats + 1):
            start = time.perf_counter()
            loss = plan.loss(MicroBatch(number, tokens)).total
            loss.backward()
            learned = time.perf_counter()
            clip_gradients(plan, optimization)
            optimizer.step()
            optimizer.zero_grad()
            end = time.perf_counter()
            before, peak = peak, matmul_peak()
            rate, machine = necessary / (end - start) / 1e9, max(before, peak)
            if number == 0 and repeats:
                continue  # moments of the optimiser are made, memory is asked for
            best = max(best, rate / machine)
            print(
                f"  {end - start:7.2f} s, optimiser {(end - learned) / (end - start):.0%}  {rate:5.0f} GFLOP/s of "
                f"{machine:.0f} (float32 matmul): share {rate / machine:.2f}  loss {float(loss.detach()):.3g}",
                flush=True,
            )
    print(f"  best share {best:.2f}, peak memory {memory.peak / 1024:.1f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*CELLS])
    parser.add_argument("--cells", type=int, help="cells of a micro-batch")
    parser.add_argument("--depth", type=int, help="layers of the (large) encoder instead of the released number")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps after a first one that does not count")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, to save memory")
    args = parser.parse_args()
    scfm.settings.verbosity = 1
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}")
    for what in args.what:
        steps(what, args.cells or CELLS[what], args.depth, args.repeats, args.recompute)


if __name__ == "__main__":
    main()
