"""Classifiers of cells on top of any backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import rebuilt
from ..nn.batch_norm import BatchNorm
from .learner import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..backbones import Backbone, TokenBatch
    from ..backbones._fine_tuning import ClassWeights

PLAIN_HEADS = ("mlp", "linear")
_HIDDEN = 128
_MOST_WEIGHT = 50.0
LABEL = "label"


@dataclass(frozen=True)
class ClassLoss:
    """Loss of a mini-batch of labelled cells.

    Parameters
    ----------
    total
        Cross entropy, summed over all logits of the head.
    accuracy
        Share of the labelled cells whose class is right.
    """

    total: Tensor
    accuracy: Tensor


def plain_head(style: str, dim: int, n_classes: int) -> nn.Sequential:
    """Head for models without a published one: standardised embeddings, then a linear map or a small network."""
    if style == "linear":
        return nn.Sequential(BatchNorm(dim, affine=False), nn.Linear(dim, n_classes))
    return nn.Sequential(
        BatchNorm(dim, affine=False), nn.Linear(dim, _HIDDEN), nn.LeakyReLU(), nn.Linear(_HIDDEN, n_classes)
    )


def class_weights(n_cells: np.ndarray, rule: ClassWeights | None) -> np.ndarray | None:
    """Weights of the classes in the loss, which sum to 1.

    Parameters
    ----------
    n_cells
        Cells of each class, shape ``(classes,)``. Classes without cells have the weight 0.
    rule
        ``"balanced"``: inversely proportional to the number of cells. ``"capped"``: the same, but at most 50 times the
        weight of the largest class (scFoundation; the paper prints a maximum where a minimum must be meant). ``None``:
        all the same.

    Returns
    -------
    Weights, or ``None`` if all are the same.

    Raises
    ------
    ValueError
        If the rule is unknown.
    """
    if rule is None:
        return None
    if rule not in ("balanced", "capped"):
        msg = f"class_weights must be 'balanced', 'capped' or None; got {rule!r}"
        raise ValueError(msg)
    n_cells = np.asarray(n_cells, dtype=np.float64)
    weights = np.divide(n_cells.max(initial=0), n_cells, out=np.zeros_like(n_cells), where=n_cells > 0)
    if rule == "capped":
        weights = np.minimum(weights, _MOST_WEIGHT)
    return weights / weights.sum()


class ClassLearner(Learner):
    """A classifier of cells.

    Parameters
    ----------
    backbone
        The model. With a head of its own kind a new model is made of it; else it is trained in place.
    n_classes
        Number of classes.
    head
        One of ``backbone.class_heads``, or ``"mlp"`` or ``"linear"`` for a plain head on the cell embedding. By default
        the head of the paper, else ``"mlp"``.
    pooling
        Cell embedding that a plain head starts from.
    seed
        Seed of the weights of the head.
    tokenize
        Options of the tokenizer; by default those of the paper's fine-tuning.

    Raises
    ------
    ValueError
        If the head is unknown, or there are fewer than two classes.
    """

    weights: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        head: str | None = None,
        *,
        pooling: str | None = None,
        seed: int = 0,
        tokenize: Mapping[str, Any] | None = None,
    ) -> None:
        backbone.require("embeds")
        style = (*backbone.class_heads, *PLAIN_HEADS)[0] if head is None else head
        if style not in (*backbone.class_heads, *PLAIN_HEADS):
            choices = ", ".join(dict.fromkeys((*backbone.class_heads, *PLAIN_HEADS)))
            msg = f"{backbone.kind} has no class head {style!r}; choose one of {choices}"
            raise ValueError(msg)
        if n_classes < 2:
            msg = f"a classifier needs at least two classes; got {n_classes}"
            raise ValueError(msg)
        outside = None
        if style in backbone.class_heads:
            if getattr(backbone.config, "n_classes", 0) != n_classes or head is not None:
                backbone = rebuilt(backbone, backbone.config_with_classes(n_classes, style), seed=seed)
        else:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                outside = plain_head(style, backbone.embedding_dim(pooling), n_classes)
        recipe = backbone.fine_tuning("annotation")
        if outside is not None:
            # the tokens of the authors are those for their own head
            recipe = replace(recipe, tokenize={})
        super().__init__(backbone, outside, recipe, tokenize=tokenize)
        self.style, self.n_classes, self.pooling = style, n_classes, pooling
        self.register_buffer("weights", None, persistent=False)

    def set_weights(self, weights: np.ndarray | None) -> None:
        """Set the weights of the classes in the loss."""
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)

    def logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        """Logits, with gradients if they are enabled; classes are predicted from the first."""
        if self.head is None:
            return self.backbone.class_logits(tokens)
        return (self.head(self.backbone.cell_states(tokens, pooling=self.pooling)),)

    def loss(self, tokens: TokenBatch, generator: torch.Generator | None = None) -> ClassLoss:
        """Cross entropy over the cells that have a label in ``tokens.per_cell["label"]``; -1 stands for none."""
        logits = self.logits(tokens)
        labels = tokens.per_cell[LABEL].to(logits[0].device, torch.int64)
        known = labels >= 0
        if not bool(known.any()):
            zero = sum(part.sum() for part in logits) * 0.0
            return ClassLoss(zero, zero.detach())
        weights = None if self.weights is None else self.weights.to(logits[0])
        total = sum(F.cross_entropy(part[known], labels[known], weights) for part in logits)
        right = logits[0][known].detach().argmax(1) == labels[known]
        return ClassLoss(total, right.float().mean())

    @torch.inference_mode()
    def probabilities(self, tokens: TokenBatch) -> Tensor:
        """Probabilities of the classes, float32, ``(cells, classes)``; all cells have to be valid."""
        return self.logits(tokens)[0].float().softmax(1)
