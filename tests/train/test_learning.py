"""Two hundred steps on real cells teach more than the mean of each gene."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import read_h5ad

from scfm.backbones.scfoundation import objective as scfoundation
from scfm.backbones.scgpt import objective as scgpt
from scfm.train import Recipe, pretrain
from scfm.train._cells import Cells
from scfm.train._pretrain import _divided

N_GENES = 200


def variable_genes(adata) -> np.ndarray:
    """Genes whose counts vary most, in relation to their mean."""
    mean = np.asarray(adata.X.mean(axis=0)).ravel()
    square = np.asarray(adata.X.multiply(adata.X).mean(axis=0)).ravel()
    spread = np.divide(square - mean**2, mean, out=np.zeros_like(mean), where=mean > 0)
    return adata.var_names[np.argsort(-spread)[:N_GENES]].to_numpy()


@pytest.fixture
def trained(shared, tmp_path):
    """``trained("scgpt", config)``: the model, and counts of cells it saw and of cells it did not see."""
    source = shared("data", "singlecell", "pbmc3k_counts_seurat_labels.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(variable_genes(read_h5ad(source))))

    def train(kind: str, config: dict, **changes):
        recipe = Recipe(
            name="real",
            kind=kind,
            sources=(str(source),),
            genes=str(tmp_path / "genes.txt"),
            config=config,
            max_steps=200,
            batch_size=64,
            validation_share=0.1,
            optimization={"learning_rate": 5e-3, "warmup_steps": 20, "schedule": "cosine"},
            **changes,
        )
        backbone = pretrain(recipe, progress=False, accelerator="cpu").backbone
        cells = Cells(recipe.sources, backbone.vocab)
        seen, unseen = (cells.read(np.sort(rows)) for rows in _divided(cells.n_cells, recipe))
        return backbone, cells.genes, seen, unseen

    return train


def mean_by_gene(values: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    """Mean of the values of each gene; of all values for genes that have none."""
    size = int(genes.max()) + 1
    n = torch.bincount(genes, minlength=size)
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, genes, values.double())
    return torch.where(n > 0, sums / n.clamp(min=1), values.double().mean())


@pytest.mark.slow
def test_scgpt_beats_the_mean_of_each_gene(trained):
    config = {"dim": 64, "n_heads": 4, "ffn_dim": 64, "n_layers": 2, "dropout": 0.0}
    backbone, genes, seen, unseen = trained("scgpt", config)

    def hidden(counts, seed: int):
        generator = torch.Generator().manual_seed(seed)
        tokens = backbone.tokenize_for_training(counts, genes, generator)
        return scgpt.split_prompt(tokens, 0.5, generator, max_length=1200)

    reference = hidden(seen, 0).queries
    means = mean_by_gene(reference.flat_values, reference.flat_ids)
    tokens = hidden(unseen, 1)
    predicted = backbone.generate(tokens)[~tokens.queries.padding]
    target = tokens.queries.flat_values
    by_mean = ((means[tokens.queries.flat_ids] - target) ** 2).mean()
    assert ((predicted - target) ** 2).mean() < 0.9 * by_mean


@pytest.mark.slow
def test_scfoundation_beats_the_mean_of_each_gene(trained):
    config = {
        "encoder_dim": 48,
        "encoder_depth": 2,
        "encoder_heads": 4,
        "n_bins": 16,
        "decoder_dim": 32,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "decoder_dim_head": 8,
    }
    backbone, genes, seen, unseen = trained("scfoundation", config)

    def corrupted(counts, seed: int):
        generator = torch.Generator().manual_seed(seed)
        tokens = backbone.tokenize_for_training(counts, genes, generator)
        raw = scfoundation.raw_counts(tokens.select(torch.nonzero(tokens.valid).squeeze(1)), backbone.config)
        return scfoundation.corrupt(raw, scfoundation.draw(raw, backbone.config, generator), backbone.config)

    reference = corrupted(seen, 0)
    places = torch.nonzero(reference.mask, as_tuple=True)[1]
    means = mean_by_gene(reference.target[reference.mask], places)
    batch = corrupted(unseen, 1)
    by_mean = ((means[torch.nonzero(batch.mask, as_tuple=True)[1]] - batch.target[batch.mask]) ** 2).mean()
    with torch.no_grad():
        assert scfoundation.masked_loss(backbone, batch).total < 0.95 * by_mean
