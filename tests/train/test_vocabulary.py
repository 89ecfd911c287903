"""Which genes a new network knows, and the vectors from which it starts."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from tests.tiny import TINY

from scfm import UnsupportedError
from scfm.backbones import backbone_class, from_config
from scfm.genes import GeneVocab
from scfm.train import coexpression_vectors, pretrain, variable_genes

GENES = [f"G{i}" for i in range(12)]


def write(path, counts, genes):
    adata = AnnData(sparse.csr_matrix(np.asarray(counts, dtype=np.float32)))
    adata.var_names = list(genes)
    adata.write_h5ad(path)
    return path


@pytest.fixture
def two_programs(tmp_path):
    """Genes 0-3 and genes 4-7 follow one hidden number each; a second source knows only some genes, ten times deeper."""
    rng = np.random.default_rng(0)
    activity = rng.gamma(1.0, 4.0, (400, 2))
    rates = np.concatenate([np.repeat(activity, 4, axis=1), np.full((400, 4), 3.0)], axis=1)
    counts = rng.poisson(rates)
    deeper = 10 * counts[:150, :9]
    return [write(tmp_path / "a.h5ad", counts, GENES), write(tmp_path / "b.h5ad", deeper, GENES[:9])]


def test_vectors_of_genes_expressed_together_are_close(two_programs):
    vectors = coexpression_vectors(two_programs, [*GENES, "absent"], 4)
    assert vectors.shape == (13, 4)
    assert not vectors[-1].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:-1], axis=1).mean(), 1)
    unit = vectors[:8] / np.linalg.norm(vectors[:8], axis=1, keepdims=True)
    cosine = unit @ unit.T
    together = np.kron(np.eye(2, dtype=bool), np.ones((4, 4), dtype=bool))
    assert cosine[together].min() > 0.8
    assert cosine[~together].max() < 0.3


def test_scalar_products_are_the_correlations_within_sources(two_programs):
    vectors = coexpression_vectors(two_programs[:1], GENES, 12)
    counts = anndata.read_h5ad(two_programs[0]).X.toarray()
    expression = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    products = vectors @ vectors.T
    expected = np.corrcoef(expression.T)
    np.testing.assert_allclose(products / products[0, 0], expected / expected[0, 0], atol=1e-6)


def test_too_few_genes_for_the_width_are_refused(two_programs):
    with pytest.raises(ValueError, match="vectors of width 20 need as many"):
        coexpression_vectors(two_programs, GENES, 20)


def test_variable_genes_are_those_that_vary_where_they_are_measured(tmp_path):
    rng = np.random.default_rng(1)
    counts = np.full((200, 4), 10.0)
    counts[:, 1] = rng.choice([0, 60], 200)
    counts[:, 3] = rng.choice([0, 20], 200)
    sources = [write(tmp_path / "a.h5ad", counts, "abcd"), write(tmp_path / "b.h5ad", counts[:, :3], "abc")]
    assert variable_genes(sources, 1) == ["b"]
    assert variable_genes(sources, 2, measured_share=0.5) == ["b", "d"]
    with pytest.raises(ValueError, match="only 3 genes are measured in 95% of the cells"):
        variable_genes(sources, 4)


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_model_can_start_from_given_vectors(kind):
    cls = backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *GENES], specials=cls.specials)
    backbone = from_config(kind, cls.config_for(TINY[kind], vocab), vocab, device="cpu", precision="float32")
    table = backbone.gene_tables[0]
    before, rows = table.detach().clone(), torch.from_numpy(vocab.is_gene.copy())
    vectors = np.random.default_rng(0).normal(size=(len(GENES), table.shape[1]))
    backbone.set_gene_vectors(vectors)
    after = table.detach()[: len(rows)][rows].double()
    scale = after.norm(dim=1).mean() / np.linalg.norm(vectors, axis=1).mean()
    torch.testing.assert_close(after, float(scale) * torch.from_numpy(vectors), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.norm(dim=1).mean(), before[: len(rows)][rows].double().norm(dim=1).mean())
    with pytest.raises(ValueError, match="the vectors have the shape"):
        backbone.set_gene_vectors(vectors[:, :3])
    backbone.vocab_tables = ()
    with pytest.raises(UnsupportedError, match="leave gene_vectors out"):
        backbone.set_gene_vectors(vectors)


def test_a_recipe_may_start_from_coexpression(recipe):
    started = pretrain(recipe(max_steps=1, gene_vectors="coexpression", gene_choice="variable", n_genes=20))
    fresh = pretrain(recipe(max_steps=1, gene_choice="variable", n_genes=20))
    assert started.backbone.vocab.n_genes == 20
    assert not torch.allclose(started.backbone.gene_tables[0], fresh.backbone.gene_tables[0], atol=1e-2)
