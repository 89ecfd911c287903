"""A model with what a task puts on top of it: what is trained, saved and asked."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..backbones import Backbone, FineTuning, TokenBatch
    from ..genes import GeneMatch


class Learner(nn.Module):
    """A backbone and a head for a task, as one network.

    Parameters
    ----------
    backbone
        The model, which is trained in place. It may hold the head.
    head
        Head outside of the model.
    recipe
        How the task fine-tunes this model.
    tokenize
        Options of the tokenizer; by default those of the recipe.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module | None,
        recipe: FineTuning,
        *,
        tokenize: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.module
        self.head = None if head is None else head.to(backbone.device, backbone.dtype)
        self.requires_grad_(requires_grad=False)
        self.recipe = recipe
        self.tokenize = dict(recipe.tokenize if tokenize is None else tokenize)

    def tokens(self, counts: csr_matrix, genes: GeneMatch, generator: torch.Generator) -> TokenBatch:
        """Tokens of cells to train on."""
        return self.backbone.tokenize(counts, genes, **self.tokenize)

    @abstractmethod
    def loss(self, tokens: TokenBatch, generator: torch.Generator | None = None) -> Any:
        """Loss of a mini-batch, an object whose ``total`` is minimised."""

    def start_validation(self) -> None:
        """Called before the losses of held-out cells are computed."""

    def validation_scores(self) -> dict[str, float]:
        """Scores of all held-out cells together, for which the mean over mini-batches of their loss does not do."""
        return {}

    def head_state(self) -> dict[str, Tensor]:
        """Weights that lie outside of the model."""
        return {} if self.head is None else self.head.state_dict()

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this network belongs to the task."""
        inside = tuple(f"network.{module}." for module in self.backbone.head_modules)
        return name.startswith("head.") or name.startswith(inside)
