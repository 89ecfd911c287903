"""Classifiers on top of CellFM."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.batch_norm import BatchNorm
from ...nn.retention import BilinearFFN, GatedRetention

if TYPE_CHECKING:
    from collections.abc import Sequence


class ClassScores(NamedTuple):
    """Logits of a classifier, each ``(cells, classes)``.

    Parameters
    ----------
    logits
        What classes are predicted from.
    by_cell
        Second logits of the retention head, from the CLS token alone, which only training uses; else ``None``.
    """

    logits: Tensor
    by_cell: Tensor | None = None


class CrossRetentionLayer(nn.Module):
    """Retention among CLS and classes, retention from these to the genes, and a feed-forward network."""

    def __init__(self, dim: int, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = GatedRetention(dim, heads)
        self.gene_attention = GatedRetention(dim, heads)
        self.ffn = BilinearFFN(dim)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Sequence[int], genes: Tensor, n_genes: Sequence[int]) -> Tensor:
        """Apply the layer to CLS and classes ``(cells * (1 + classes), dim)``, given gene states ``(tokens, dim)``."""
        sums = self.self_attention.sums(x, lengths)
        x = self.norm1(x + self.dropout(self.self_attention.read(x, sums, lengths)))
        sums = self.gene_attention.sums(genes, n_genes)
        x = self.norm2(x + self.dropout(self.gene_attention.read(x, sums, lengths)))
        return self.norm3(x + self.dropout(self.ffn(x)))


class CrossRetentionHead(nn.Module):
    """The authors' classifier: one learned token per class, refined together with CLS by looking at the genes.

    Parameters
    ----------
    dim
        Width of the states.
    heads
        Number of heads.
    n_classes
        Number of classes.
    n_layers
        Number of layers.
    dropout
        Dropout in training.
    eps
        Constant of the LayerNorms.
    """

    def __init__(self, dim: int, heads: int, n_classes: int, n_layers: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.empty(n_classes, dim))
        self.layers = nn.ModuleList(CrossRetentionLayer(dim, heads, dropout, eps) for _ in range(n_layers))
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.xavier_normal_(self.classes, 0.5)
        for layer in self.layers:
            layer.self_attention.init_weights(1.0)
            layer.gene_attention.init_weights(1.0)
            layer.ffn.init_weights(1.0)

    def refine(self, cls: Tensor, genes: Tensor, n_genes: Sequence[int], n_layers: int | None = None) -> Tensor:
        """States of CLS and classes after some layers, ``(cells * (1 + classes), dim)``."""
        x = torch.cat([cls[:, None], self.classes.to(cls.dtype).expand(len(cls), -1, -1)], 1)
        lengths = [x.shape[1]] * len(x)
        x = x.flatten(0, 1)
        for layer in self.layers[:n_layers]:
            x = layer(x, lengths, genes, n_genes)
        return x

    def forward(self, cls: Tensor, genes: Tensor, n_genes: Sequence[int]) -> ClassScores:
        """Score classes.

        Parameters
        ----------
        cls
            CLS states, ``(cells, dim)``.
        genes
            States of the gene tokens, cell after cell, ``(tokens, dim)``.
        n_genes
            Gene tokens of each cell.
        """
        x = self.refine(cls, genes, n_genes).unflatten(0, (len(cls), -1))
        return ClassScores(self.score(x[:, 1:]).squeeze(-1), x[:, 0] @ self.classes.to(x.dtype).T)

    def cls_scores(self, cls: Tensor, genes: Tensor, n_genes: Sequence[int]) -> list[Tensor]:
        """Attention of CLS to the genes in the last layer, ``(heads, genes)`` for each cell.

        The query is the CLS token as that layer gets it, although within the layer it first attends to the classes:
        this is what the authors rank.
        """
        x = self.refine(cls, genes, n_genes, len(self.layers) - 1)
        cells = zip(x.unflatten(0, (len(cls), -1))[:, :1], genes.split(list(n_genes)), strict=True)
        attention = self.layers[-1].gene_attention
        features = (attention.features(query, keys) for query, keys in cells)
        return [(q @ k.transpose(1, 2))[:, 0] for q, k in features]


class MLPHead(nn.Sequential):
    """Classifier of the PyTorch port: a network with one hidden layer on the CLS state."""

    def __init__(self, dim: int, n_classes: int, hidden: int = 128) -> None:
        super().__init__(nn.Linear(dim, hidden), BatchNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, n_classes))


def classification_loss(scores: ClassScores, labels: Tensor) -> Tensor:
    """Cross entropy, summed over both kinds of logits where there are two."""
    return sum(F.cross_entropy(logits, labels) for logits in scores if logits is not None)
