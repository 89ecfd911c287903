"""A network small enough to see through: a weighted bag of gene vectors."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from scfm.backbones import Backbone, TokenBatch
from scfm.checkpoints import LoadReport
from scfm.genes import GeneMatch, GeneVocab


@dataclass(frozen=True)
class BagConfig:
    dim: int = 5


class BagModule(nn.Module):
    def __init__(self, n_genes: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(n_genes, dim, generator=generator) / 20)

    def forward(self, tokens: TokenBatch) -> torch.Tensor:
        weights = torch.where(tokens.padding, 0.0, tokens.values.to(self.table.dtype).log1p())
        return torch.tanh(torch.einsum("cl,cld->cd", weights, self.table[tokens.ids.clamp(min=0)]))


class Bag(Backbone):
    kind = "bag"
    capabilities = frozenset({"embeds"})
    poolings = ("sum",)

    @classmethod
    def recognizes(cls, directory):
        return False

    @classmethod
    def read_official(cls, directory, **options):
        raise AssertionError

    @classmethod
    def config_from_dict(cls, values):
        return BagConfig(**values)

    @classmethod
    def build(cls, config, vocab):
        return BagModule(len(vocab), config.dim)

    def tokenize(self, counts, genes, *, scale: float = 1.0, shift: np.ndarray | None = None, rng: int = 0):
        assert isinstance(genes, GeneMatch)
        counts, ids = genes.collapse(counts)
        values = counts.data * scale
        lengths = np.diff(counts.indptr)
        if shift is not None:
            values = values + np.repeat(shift, lengths)
        return TokenBatch(
            torch.from_numpy(ids[counts.indices]),
            torch.from_numpy(values.astype(np.float32)),
            torch.from_numpy(counts.indptr.astype(np.int64)),
            pad_id=-1,
            pad_value=-5.0,
            valid=torch.from_numpy(lengths > 0),
        )

    def batch(self, ids, values):
        return TokenBatch.from_padded(ids, values, pad_id=-1, pad_value=-5.0)

    def embedding_dim(self, pooling=None):
        return self.config.dim

    def _embed(self, tokens, pooling):
        return self.module(tokens)


N_GENES = 40


@pytest.fixture
def bag() -> Bag:
    vocab = GeneVocab([f"gene{i}" for i in range(N_GENES)])
    config = BagConfig()
    return Bag(Bag.build(config, vocab), config, vocab, name="bag", load_report=LoadReport())


@pytest.fixture
def cells() -> ad.AnnData:
    """Sixty cells with 1 to 40 expressed genes; cells 7 and 8 have none."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, (60, 1))
    counts = rng.poisson(rates, (60, N_GENES)).astype(np.float32)
    counts[:, 3] += 1
    counts[7:9] = 0
    adata = ad.AnnData(sparse.csr_matrix(counts))
    adata.var_names = [f"gene{i}" for i in range(N_GENES)]
    return adata


@pytest.fixture
def expected(bag, cells) -> np.ndarray:
    """Embeddings by the formula, without tokens."""
    table = bag.module.table.detach().double().numpy()
    out = np.tanh(np.log1p(cells.X.toarray()) @ table)
    out[7:9] = np.nan
    return out
