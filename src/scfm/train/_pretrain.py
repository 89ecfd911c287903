"""A pre-training loop for one process, on counts that fit into memory as a sparse matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from .. import _logging as logg
from .._settings import settings
from ..backbones import from_config
from ..backbones._base import backbone_class
from ..data import open_source
from ..genes import GeneVocab
from ._recipe import frequent_genes

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ._recipe import Recipe

_BLOCK = 2048
_VALIDATE_EVERY = 100
_VALIDATION_CELLS = 256


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of :func:`pretrain`.

    Parameters
    ----------
    backbone
        The trained model, ready for inference.
    history
        Loss of training (mean over the steps since the last row) and of held-out cells, indexed by step.
    n_cells, n_validation
        Cells trained on, and cells held out.
    """

    backbone: Backbone
    history: pd.DataFrame
    n_cells: int
    n_validation: int


def pretrain(recipe: Recipe, *, device: str = "auto") -> TrainingResult:
    """Train a backbone from scratch with the objective of its paper.

    Parameters
    ----------
    recipe
        What to train, on what, and how.
    device
        Device to train on.

    Returns
    -------
    The trained backbone and its loss curve.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    cls = backbone_class(recipe.kind)
    config = cls.config_from_dict(recipe.config)
    vocab = GeneVocab([*cls.specials, *frequent_genes(recipe.sources, recipe.n_genes)], specials=cls.specials)
    counts = _read(recipe, vocab)
    columns = np.flatnonzero(vocab.is_gene)
    backbone = from_config(
        recipe.kind, config, vocab, name=recipe.name, seed=recipe.seed, device=device, precision="float32"
    )
    module = backbone.module.requires_grad_(requires_grad=True)

    order = torch.randperm(counts.shape[0], generator=generator).numpy()
    n_validation = round(recipe.validation_share * len(order))
    held_out, training = np.sort(order[:n_validation]), np.sort(order[n_validation:])
    start = logg.info(
        f"training {recipe.name}: {len(training):,} cells, {len(columns):,} genes, {recipe.max_steps} steps"
    )

    def loss_of(rows: np.ndarray, source: torch.Generator) -> torch.Tensor:
        tokens = backbone.tokenize_for_training(counts[rows], columns, source)
        return backbone.pretraining_loss(tokens, source, **recipe.objective).total

    @torch.no_grad()
    def validate() -> float:
        if not n_validation:
            return math.nan
        module.eval()
        fixed = torch.Generator().manual_seed(recipe.seed + 1)
        rows = held_out[:_VALIDATION_CELLS]
        parts = [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
        loss = float(np.mean([float(loss_of(part, fixed)) for part in parts]))
        module.train()
        return loss

    torch.manual_seed(recipe.seed)  # dropout draws from the global generator
    optimizer = torch.optim.Adam(module.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    module.train()
    history, recent = [(0, math.nan, validate())], []
    for step in tqdm(range(1, recipe.max_steps + 1), desc=recipe.name, unit="step", disable=settings.verbosity < 2):
        rows = training[torch.randint(len(training), (recipe.batch_size,), generator=generator).numpy()]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(rows, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if step % _VALIDATE_EVERY == 0 or step == recipe.max_steps:
            history.append((step, float(np.mean(recent)), validate()))
            recent = []
    module.eval().requires_grad_(requires_grad=False)
    logg.info("    finished", time=start)
    table = pd.DataFrame(history, columns=["step", "loss", "validation_loss"]).set_index("step")
    return TrainingResult(backbone, table, len(training), n_validation)


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.max_steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _read(recipe: Recipe, vocab: GeneVocab) -> sparse.csr_matrix:
    """Counts of all sources, cells x genes of the vocabulary (special tokens left out)."""
    position = np.cumsum(vocab.is_gene) - 1
    parts = []
    for path in recipe.sources:
        with open_source(path) as source:
            columns = vocab.match(source.var_names).column_map()
            where = sparse.csr_matrix(
                (np.ones(len(columns.ids), np.float32), (np.arange(len(columns.ids)), position[columns.ids])),
                shape=(len(columns.ids), int(vocab.is_gene.sum())),
            )
            parts += [columns.apply(block.counts) @ where for block in source.blocks(_BLOCK)]
    counts = sparse.vstack(parts, format="csr")
    counts.sort_indices()
    return counts[np.diff(counts.indptr) > 1]
