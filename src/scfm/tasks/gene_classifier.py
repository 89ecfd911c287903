"""What genes do, from vectors of them: the published heads, losses and folds."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Head = Literal["binary", "go", "linear"]
HEADS = ("binary", "go", "linear")
GO_HIDDEN = 1028
_GO_EPSILON = 1e-6
_BINARY_DROPOUT, _GO_DROPOUT = 0.15, 0.2


class GeneHead(nn.Module):
    """A network from the vector of a gene to its classes or functions.

    Parameters
    ----------
    style
        ``"binary"``: three layers without biases, ``dim`` to ``dim / 2`` to ``dim / 4`` to the classes (CellFM, dosage
        sensitivity and methylation). ``"go"``: a layer norm and four layers (CellFM, Gene Ontology). ``"linear"``: one
        layer.
    dim
        Width of the vectors.
    n_outputs
        Number of classes or functions.
    hidden
        Width of the first layer of ``"go"``.
    seed
        Seed of the weights; the global random state is neither used nor changed.

    Raises
    ------
    ValueError
        If the style is unknown, or the vectors are too narrow for it.

    References
    ----------
    Zeng et al., CellFM, Nature Communications 16, 4679 (2025).
    """

    def __init__(self, style: Head, dim: int, n_outputs: int, *, hidden: int = GO_HIDDEN, seed: int = 0) -> None:
        super().__init__()
        if style not in HEADS:
            msg = f"head must be one of {', '.join(map(repr, HEADS))}; got {style!r}"
            raise ValueError(msg)
        if style == "binary" and dim < 4:
            msg = f"the head 'binary' halves the vectors twice, but they have only {dim} values; use head='linear'"
            raise ValueError(msg)
        self.style = style
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            if style == "binary":
                self.layers = nn.Sequential(
                    nn.Linear(dim, dim // 2, bias=False),
                    nn.Dropout(_BINARY_DROPOUT),
                    nn.SiLU(),
                    nn.Linear(dim // 2, dim // 4, bias=False),
                    nn.Dropout(_BINARY_DROPOUT),
                    nn.SiLU(),
                    nn.Linear(dim // 4, n_outputs, bias=False),
                )
            elif style == "go":
                # the authors build a further block that they never apply
                self.layers = nn.Sequential(
                    nn.LayerNorm(dim, eps=_GO_EPSILON),
                    nn.Linear(dim, hidden),
                    nn.SiLU(),
                    nn.Linear(hidden, 512),
                    nn.Dropout(_GO_DROPOUT),
                    nn.SiLU(),
                    nn.Linear(512, 256),
                    nn.Dropout(_GO_DROPOUT),
                    nn.SiLU(),
                    nn.Linear(256, n_outputs),
                )
                for layer in self.layers:
                    if isinstance(layer, nn.Linear):
                        nn.init.xavier_uniform_(layer.weight)
            else:
                self.layers = nn.Sequential(nn.Linear(dim, n_outputs))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits, ``(genes, outputs)``."""
        return self.layers(vectors)


def gene_loss(logits: Tensor, targets: Tensor, *, as_published: bool = False) -> Tensor:
    """Loss of classes (whole numbers, ``(genes,)``) or of functions (0 or 1, ``(genes, functions)``).

    Parameters
    ----------
    logits
        Logits of a head, ``(genes, outputs)``.
    targets
        Known answers.
    as_published
        Double the loss of functions where both answers occur, as the authors' code does: it means to weight rare functions
        more, but multiplies a loss that is averaged already. With Adam this changes next to nothing.
    """
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    if as_published and bool((targets > 0).any()) and bool((targets == 0).any()):
        loss = loss * 2
    return loss


def class_folds(classes: np.ndarray, n_folds: int = 5, *, seed: int = 0) -> np.ndarray:
    """Fold of each gene, drawn within each class as CellFM does.

    The genes of a class are permuted. With ``q`` their number divided by the number of folds, rounded, each fold takes the
    next ``q`` genes, and the last one takes the rest.

    Parameters
    ----------
    classes
        Class of each gene, ``(genes,)``.
    n_folds
        Number of folds.
    seed
        Seed of the permutation, which is the same for each class.

    Returns
    -------
    Numbers from 0, ``(genes,)``.

    Raises
    ------
    ValueError
        If there are fewer than two folds, or a class has fewer genes than there are folds.
    """
    classes = np.asarray(classes)
    if n_folds < 2:
        msg = f"n_folds={n_folds}: genes to test on need at least two folds"
        raise ValueError(msg)
    folds = np.empty(len(classes), dtype=np.int64)
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        if len(members) < n_folds:
            msg = f"class {str(name)!r} has {len(members)} genes, which is too few for {n_folds} folds; use a smaller n_folds="
            raise ValueError(msg)
        # the authors use numpy's older generator
        order = np.random.RandomState(seed).permutation(len(members))
        width = round(len(members) / n_folds)
        folds[members[order]] = np.minimum(np.arange(len(members)) // max(width, 1), n_folds - 1)
    return folds


def random_folds(n_genes: int, n_folds: int = 5, *, seed: int = 0) -> np.ndarray:
    """Fold of each gene, drawn regardless of classes; for genes with several functions."""
    return class_folds(np.zeros(n_genes, dtype=np.int64), n_folds, seed=seed)


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained (Adam, constant rate).

    Parameters
    ----------
    max_epochs
        Passes over the genes.
    batch_size
        Genes of a step.
    lr
        Learning rate.
    l2
        Penalty that is added to the gradient.
    clip
        Largest absolute value of an element of the gradient; ``None`` for any.
    drop_last
        Leave out the last genes of an epoch, if they do not fill a step.
    keep_best
        Take the weights of the epoch with the lowest loss on genes that were held out, not those of the last.
    as_published
        See :func:`gene_loss`.
    seed
        Seed of the order and of the dropout.
    """

    max_epochs: int
    batch_size: int
    lr: float = 1e-4
    l2: float = 0.0
    clip: float | None = None
    drop_last: bool = False
    keep_best: bool = True
    as_published: bool = False
    seed: int = 0


# how the authors of CellFM train their heads; a linear one is an extension
PUBLISHED = {
    "binary": {"max_epochs": 30, "batch_size": 4, "l2": 1e-5, "clip": 2.0, "drop_last": True},
    "go": {"max_epochs": 5, "batch_size": 1024, "seed": 5},
    "linear": {"max_epochs": 100, "batch_size": 64, "lr": 1e-2, "l2": 1e-3},
}


def train_head(
    head: GeneHead,
    vectors: Tensor,
    targets: Tensor,
    training: HeadTraining,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Iterator[dict[str, float]]:
    """Train a head in place.

    Parameters
    ----------
    head
        The network, where it shall be trained.
    vectors
        Vector of each gene to train on.
    targets
        Known answers.
    training
        How to train.
    validation
        Vectors and answers of genes that are not trained on.

    Yields
    ------
    Losses of an epoch: ``train_loss`` and, if there are genes to validate on, ``validation_loss``.

    Raises
    ------
    ValueError
        If the loss is not finite.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=training.lr, weight_decay=training.l2)
    order = np.random.default_rng(training.seed)
    n, size = len(vectors), training.batch_size
    # a set that is smaller than one step is one step
    stop = n - n % size if training.drop_last and n >= size else n
    best, best_state = np.inf, None
    for _ in range(training.max_epochs):
        head.train()
        permuted = torch.from_numpy(order.permutation(n))
        losses = []
        with torch.random.fork_rng(devices=_cuda(vectors)):
            torch.manual_seed(int(order.integers(2**31)))
            for start in range(0, stop, size):
                some = permuted[start : min(start + size, stop)].to(vectors.device)
                optimizer.zero_grad()
                loss = gene_loss(head(vectors[some]), targets[some], as_published=training.as_published)
                loss.backward()
                if training.clip is not None:
                    nn.utils.clip_grad_value_(head.parameters(), training.clip)
                optimizer.step()
                losses.append(loss.detach())
        epoch = {"train_loss": float(torch.stack(losses).mean())}
        if not np.isfinite(epoch["train_loss"]):
            msg = "the loss is not finite; use a lower lr="
            raise ValueError(msg)
        head.eval()
        if validation is not None:
            with torch.no_grad():
                epoch["validation_loss"] = float(gene_loss(head(validation[0]), validation[1]))
            if training.keep_best and epoch["validation_loss"] < best:
                best, best_state = epoch["validation_loss"], deepcopy(head.state_dict())
        yield epoch
    if best_state is not None:
        head.load_state_dict(best_state)


def _cuda(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.device.type == "cuda" else []
