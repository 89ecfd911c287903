"""Classifiers of cells on top of any backbone."""

from __future__ import annotations

from collections.abc import Mapping
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
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..backbones import Backbone, TokenBatch
    from ..backbones._fine_tuning import ClassWeights
    from ..genes import GeneMatch

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
        What is minimised.
    classes
        Cross entropy, summed over all logits of the head.
    accuracy
        Share of the labelled cells whose class is right.
    hidden
        Loss of predicting hidden genes; ``None`` if none are hidden.
    """

    total: Tensor
    classes: Tensor
    accuracy: Tensor
    hidden: Tensor | None = None


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


def _own_head(backbone: Backbone, *, held: bool, hide: bool) -> str:
    """The head that a fine-tuned file holds, else that of the paper, or the first that can learn along with hidden genes."""
    there = getattr(backbone.config, "class_head", None) if held else None
    if hide and backbone.joint_heads:
        return there if there in backbone.joint_heads else backbone.joint_heads[0]
    return there or (*backbone.class_heads, *PLAIN_HEADS)[0]


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
    hide
        Whether part of the genes are hidden in training and predicted along with the classes, for the heads in
        ``backbone.joint_heads``; or options of the pre-training loss that differ from those of the authors.
    seed
        Seed of the weights of the head.
    tokenize
        Options of the tokenizer, beside or instead of those of the paper's fine-tuning.

    Raises
    ------
    ValueError
        If the head is unknown, has no such training or no choice of ``pooling``, or there are fewer than two classes.
    """

    weights: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        head: str | None = None,
        *,
        pooling: str | None = None,
        hide: bool | Mapping[str, Any] = False,
        seed: int = 0,
        tokenize: Mapping[str, Any] | None = None,
    ) -> None:
        backbone.require("embeds")
        held = head is None and getattr(backbone.config, "n_classes", 0) == n_classes
        style = _own_head(backbone, held=held, hide=bool(hide)) if head is None else head
        if style not in (*backbone.class_heads, *PLAIN_HEADS):
            choices = ", ".join(dict.fromkeys((*backbone.class_heads, *PLAIN_HEADS)))
            msg = f"{backbone.kind} has no class head {style!r}; choose one of {choices}"
            raise ValueError(msg)
        if hide and style not in backbone.joint_heads:
            heads = ", ".join(f"head={name!r}" for name in backbone.joint_heads) or "none of its heads"
            msg = f"hide= needs a head that learns along with hidden genes; {backbone.kind} has it for {heads}"
            raise ValueError(msg)
        if pooling is not None and style not in PLAIN_HEADS:
            msg = f"pooling= is what the heads {' and '.join(map(repr, PLAIN_HEADS))} start from; the head is {style!r}"
            raise ValueError(msg)
        if n_classes < 2:
            msg = f"a classifier needs at least two classes; got {n_classes}"
            raise ValueError(msg)
        outside = None
        if style in backbone.class_heads:
            if not held or style != getattr(backbone.config, "class_head", style):
                backbone = rebuilt(backbone, backbone.config_with_classes(n_classes, style), seed=seed)
        else:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                outside = plain_head(style, backbone.embedding_dim(pooling), n_classes)
        recipe = backbone.fine_tuning("annotation with hidden genes" if hide else "annotation")
        if outside is not None:
            # the tokens of the authors are those for their own head
            recipe = replace(recipe, tokenize={})
        super().__init__(backbone, outside, recipe, tokenize={**recipe.tokenize, **(tokenize or {})})
        self.style, self.n_classes, self.pooling = style, n_classes, pooling
        self.hide = {**recipe.objective, **(hide if isinstance(hide, Mapping) else {})} if hide else None
        self.register_buffer("weights", None, persistent=False)
        self.start_validation()

    def set_weights(self, weights: np.ndarray | None) -> None:
        """Set the weights of the classes in the loss."""
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)

    def tokens(self, counts: csr_matrix, genes: GeneMatch, generator: torch.Generator) -> TokenBatch:
        """Tokens of cells to train on; those of the pre-training if genes are hidden."""
        if self.hide is None:
            return super().tokens(counts, genes, generator)
        return self.backbone.tokenize_for_training(counts, genes, generator)

    def logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        """Logits, with gradients if they are enabled; classes are predicted from the first."""
        if self.head is None:
            return self.backbone.class_logits(tokens)
        return (self.head(self.backbone.cell_states(tokens, pooling=self.pooling)),)

    def loss(self, tokens: TokenBatch, generator: torch.Generator | None = None) -> ClassLoss:
        """Cross entropy over the cells that have a label in ``tokens.per_cell["label"]``; -1 stands for none."""
        hidden = None
        if self.hide is None:
            logits = self.logits(tokens)
        else:
            logits, values = self.backbone.class_logits_and_loss(tokens, generator, **self.hide)
            hidden = values.total
        labels = tokens.per_cell[LABEL].to(logits[0].device, torch.int64)
        classes, accuracy = self._cross_entropy(logits, labels)
        if not self.training:
            self._count(logits[0], labels)
        return ClassLoss(classes if hidden is None else classes + hidden, classes, accuracy, hidden)

    def _cross_entropy(self, logits: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        known = labels >= 0
        if not bool(known.any()):
            zero = sum(part.sum() for part in logits) * 0.0
            return zero, zero.detach()
        weights = None if self.weights is None else self.weights.to(logits[0])
        classes = sum(F.cross_entropy(part[known], labels[known], weights) for part in logits)
        right = logits[0][known].detach().argmax(1) == labels[known]
        return classes, right.float().mean()

    def _count(self, logits: Tensor, labels: Tensor) -> None:
        known = labels >= 0
        pairs = (labels[known] * self.n_classes + logits[known].detach().argmax(1)).cpu()
        self._pairs += torch.bincount(pairs, minlength=self.n_classes**2)

    def start_validation(self) -> None:
        """Forget the held-out cells that were counted."""
        self._pairs = torch.zeros(self.n_classes**2, dtype=torch.int64)

    def validation_scores(self) -> dict[str, float]:
        """F1 averaged over the classes that occur, from the held-out cells since :meth:`start_validation`."""
        counts = self._pairs.reshape(self.n_classes, self.n_classes).double()
        total = counts.sum(0) + counts.sum(1)
        f1 = 2 * counts.diagonal()[total > 0] / total[total > 0]
        return {"macro F1": float(f1.mean())} if len(f1) else {}

    @torch.inference_mode()
    def probabilities(self, tokens: TokenBatch) -> Tensor:
        """Probabilities of the classes, float32, ``(cells, classes)``; all cells have to be valid."""
        return self.logits(tokens)[0].float().softmax(1)
