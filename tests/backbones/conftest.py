"""Small networks with random weights."""

from __future__ import annotations

import json

import pytest

from scfm.backbones import from_config
from scfm.backbones.scgpt import SCGPTConfig
from scfm.genes import GeneVocab

SPECIALS = ("<pad>", "<cls>", "<eoc>")


@pytest.fixture(scope="session")
def tiny_scgpt():
    """``tiny_scgpt(names_or_vocab_file, **config)``: an untrained scGPT."""

    def make(source=30, **config):
        if isinstance(source, int):
            names = [*SPECIALS, *(f"GENE{i}" for i in range(source))]
        else:
            mapping = json.loads(source.read_text())
            names = sorted(mapping, key=mapping.get)
        vocab = GeneVocab(names, specials=[token for token in SPECIALS if token in names])
        settings = {"dim": 16, "n_heads": 2, "ffn_dim": 24, "n_layers": 2, "n_classes": 0, **config}
        return from_config("scgpt", SCGPTConfig(**settings), vocab, name="tiny", seed=0)

    return make
