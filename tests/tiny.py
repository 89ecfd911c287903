"""Hyper-parameters of a tiny network of each kind, without the number of genes; a new backbone adds its own here."""

from __future__ import annotations

TINY = {
    "cellfm": {"dim": 16, "n_heads": 2, "n_layers": 2, "n_bins": 8},
    "scgpt": {"dim": 16, "n_heads": 2, "ffn_dim": 24, "n_layers": 2},
    "scfoundation": {
        "encoder_dim": 12,
        "encoder_depth": 2,
        "encoder_heads": 3,
        "decoder_dim": 10,
        "decoder_depth": 2,
        "decoder_heads": 2,
        "decoder_dim_head": 6,
        "n_bins": 8,
    },
    "sclong": {
        "top_length": 9,
        "dim": 12,
        "value_hidden": 8,
        "n_edges": 5,
        "large_dim": 16,
        "large_depth": 2,
        "large_heads": 2,
        "large_dim_head": 6,
        "mini_depth": 2,
        "mini_heads": 2,
        "mini_dim_head": 6,
        "decoder_depth": 2,
        "decoder_heads": 2,
        "decoder_dim_head": 6,
    },
}
