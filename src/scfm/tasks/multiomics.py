"""Integration of modalities by fine-tuning a backbone that can hold several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .integration import _copy_first_rows
from .learner import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from ..backbones import Backbone, TokenBatch


class MultiomicLearner(Learner):
    """A model that learns one embedding of cells from all the modalities that were measured in them.

    Parameters
    ----------
    backbone
        The model; a new network is made around what its authors keep of it.
    features
        Names of the features of each modality, as vocabulary entries.
    n_batches
        Batches of the data that the network is told about; 0 for none.
    n_layers
        Layers of the network; by default as in the paper.
    pooling
        Cell embedding.
    seed
        Seed of the fresh weights.
    tokenize
        Options of the tokenizer, beside or instead of those of the paper.
    options
        Options of the loss, beside or instead of those of the paper.
    continued
        The network has been made for these features already and goes on with the batches it knows, which come first.
    parts
        What :attr:`parts` was then.

    Attributes
    ----------
    options
        Options of the loss.
    parts
        Names of the parts of the network that were made for the task.

    Raises
    ------
    UnsupportedError
        If the model cannot hold several modalities.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: Mapping[str, Sequence[str]],
        *,
        n_batches: int = 0,
        n_layers: int | None = None,
        pooling: str | None = None,
        seed: int = 0,
        tokenize: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        continued: bool = False,
        parts: Sequence[str] = (),
    ) -> None:
        backbone.require("multiomics")
        pooling = backbone.check_pooling(pooling)
        if not continued:
            backbone = backbone.multiomic(features, n_layers=n_layers, n_batches=n_batches, seed=seed)
            parts = _made_anew(backbone)
        elif n_batches != getattr(backbone.config, "n_batches", n_batches):
            backbone = _with_batches(backbone, features, n_batches, seed)
        recipe = backbone.fine_tuning("multiomics")
        super().__init__(backbone, None, recipe, tokenize={**recipe.tokenize, **(tokenize or {})})
        self.pooling, self.n_batches = pooling, n_batches
        self.options, self.parts = {**recipe.objective, **(options or {})}, tuple(parts)

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this network was made for the task."""
        return super().is_head(name) or name.startswith(tuple(f"network.{part}." for part in self.parts))

    def loss(self, tokens: TokenBatch, generator: torch.Generator | None = None) -> Any:
        """Loss of a mini-batch; the number of the batch of each cell is ``tokens.per_cell["batch"]``, if it has one."""
        return self.backbone.multiomic_loss(tokens, generator, **self.options)


def _made_anew(backbone: Backbone) -> list[str]:
    """Names of the parts of a network whose weights have nothing of the one it was made from."""
    loaded = set(backbone.load_report.loaded)
    parameters = [name for name, _ in backbone.module.named_parameters()]
    kept = {name.partition(".")[0] for name in parameters if name in loaded}
    return sorted({name.partition(".")[0] for name in parameters} - kept)


def _with_batches(backbone: Backbone, features: Mapping[str, Sequence[str]], n_batches: int, seed: int) -> Backbone:
    """The network with another number of batches; those it knows come first and keep their weights."""
    new = backbone.multiomic(features, n_batches=n_batches, seed=seed, continued=True)
    before: Mapping[str, Tensor] = backbone.module.state_dict()
    after = new.module.state_dict()
    for name in new.load_report.dropped:
        if name.startswith(tuple(f"{part}." for part in backbone.batch_modules)) and name in after:
            _copy_first_rows(before[name], after[name])
    return new
