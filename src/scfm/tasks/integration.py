"""Integration of batches by fine-tuning any backbone."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import FineTuning, TokenBatch, rebuilt
from ..nn.batch_norm import BatchNorm
from .learner import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..backbones import Backbone
    from ..genes import GeneMatch

Objective = Literal["paper", "adversarial"]

OBJECTIVES = ("paper", "adversarial")
BATCH = "batch"
_HIDDEN = 128
# the classifier has to keep up with a model that changes what it looks at
_SPEED = 10.0
_ADVERSARY_WEIGHT = 1.0


@dataclass(frozen=True)
class AdversarialLoss:
    """Loss of a mini-batch for models whose authors publish no fine-tuning for integration.

    Parameters
    ----------
    pretraining
        Loss of the paper's pre-training.
    confusion
        How far the classifier of batches is from knowing no more than the sizes of the batches (a Kullback-Leibler
        divergence) times the weight of the adversary; only the model is trained with it.
    classifier
        Cross entropy of the classifier of batches; only the classifier is trained with it.
    accuracy
        Share of the cells whose batch the classifier finds.
    """

    pretraining: Tensor
    confusion: Tensor
    classifier: Tensor
    accuracy: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the three losses."""
        return self.pretraining + self.confusion + self.classifier


@dataclass(frozen=True)
class PairedTokens(TokenBatch):
    """Tokens of cells to embed, and in ``training`` those of the same cells for the pre-training objective."""

    training: TokenBatch | None = None

    def select(self, cells: Tensor | np.ndarray | Sequence[int] | slice) -> PairedTokens:
        """Take cells, in the order given."""
        return replace(super().select(cells), training=self.training.select(cells))


class BatchClassifier(nn.Module):
    """Guesses the batch of a cell from its embedding, which learns to leave it in the dark.

    With a reversed gradient the model would be paid for guesses that are wrong, and learn to separate the batches in
    another way. Here it is paid for guesses that tell no more than how large the batches are (domain confusion; Tzeng
    et al., ICCV 2015).

    Parameters
    ----------
    dim
        Width of the embedding.
    n_batches
        Number of batches.
    """

    seen: Tensor

    def __init__(self, dim: int, n_batches: int) -> None:
        super().__init__()
        self.norm = BatchNorm(dim, affine=False)
        self.hidden = nn.Linear(dim, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, n_batches)
        self.register_buffer("seen", torch.ones(n_batches))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.div_(_SPEED)

    def forward(self, cells: Tensor, batches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, cross entropy for the classifier, and confusion for the model."""
        cells = self.norm(cells)
        logits = self._logits(cells.detach(), *self.parameters())
        if self.training:
            self.seen += torch.bincount(batches, minlength=len(self.seen))
        sizes = (self.seen / self.seen.sum()).to(logits.dtype)
        guesses = F.log_softmax(self._logits(cells, *(p.detach() for p in self.parameters())), 1)
        confusion = F.kl_div(guesses, sizes.expand_as(guesses), reduction="batchmean")
        return logits, F.cross_entropy(logits, batches), confusion

    @staticmethod
    def _logits(cells: Tensor, hidden: Tensor, hidden_bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
        # small weights that count more move faster in optimisers whose steps do not depend on the size of gradients
        x = F.leaky_relu(F.linear(cells, _SPEED * hidden, _SPEED * hidden_bias))
        return F.linear(x, _SPEED * out, _SPEED * out_bias)


class IntegrationLearner(Learner):
    """A model that learns to give cells of all batches the same embedding if they are the same.

    Parameters
    ----------
    backbone
        The model. Where its network lacks what the objective needs, a new one is made around its weights.
    n_batches
        Number of batches of the data.
    objective
        ``"paper"``: as the authors of the model fine-tune it. ``"adversarial"``, for any model: its pre-training
        objective, and a cell embedding that leaves a classifier of batches in the dark (:class:`BatchClassifier`). This
        one is ours; no paper has it. By default ``"paper"`` where there is one.
    pooling
        Cell embedding.
    seed
        Seed of fresh weights.
    tokenize
        Options of the tokenizer, beside or instead of those of the paper.
    options
        Options of the loss, beside or instead of those of the paper, and of the form of the network (keywords of the
        model's ``integration_config``); for ``"adversarial"`` those of the pre-training objective, and
        ``adversary_weight`` (1).
    continued
        The network has been fine-tuned for integration already and goes on with the batches it knows, which come
        first.

    Attributes
    ----------
    options
        Options of the loss and the network.
    parts
        Names of the parts of the network that were made for the task.

    Raises
    ------
    UnsupportedError
        If the model has no cell embeddings, or neither a fine-tuning of its own nor a pre-training objective.
    ValueError
        If the objective is unknown or the authors have none.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_batches: int,
        objective: Objective | None = None,
        *,
        pooling: str | None = None,
        seed: int = 0,
        tokenize: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        continued: bool = False,
        parts: Sequence[str] = (),
    ) -> None:
        backbone.require("embeds")
        objective = _checked(backbone, objective)
        self_made = objective == "adversarial"
        pooling = backbone.check_pooling(pooling)
        head, recipe, form = None, backbone.fine_tuning("integration"), {}
        if self_made:
            backbone.require("pretrains")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                head = BatchClassifier(backbone.embedding_dim(pooling), n_batches)
            if backbone.integrates:  # the recipe is that of the other objective
                recipe = FineTuning()
            recipe = replace(recipe, monitor="pretraining", tokenize=backbone.zero_shot("integration").tokenize)
        else:
            form = {name: value for name, value in (options or {}).items() if name in _form_options(backbone)}
            config = backbone.integration_config(n_batches, **form)
            backbone, parts = _with_parts(backbone, config, seed, continued=continued, parts=parts)
        super().__init__(backbone, head, recipe, tokenize={**recipe.tokenize, **(tokenize or {})})
        self.objective, self.pooling, self.n_batches = objective, pooling, n_batches
        self.options, self.parts = {**recipe.objective, **(options or {})}, tuple(parts)
        self._of_network = frozenset(form)

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this network was made for the task."""
        inside = [f"network.{part}" for part in self.parts]
        return super().is_head(name) or any(name == part or name.startswith(f"{part}.") for part in inside)

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the classifier of batches; batches that it does not know keep fresh weights."""
        for name, target in self.head.state_dict().items():
            _copy_first_rows(tensors[name], target)

    def tokens(self, counts: csr_matrix, genes: GeneMatch, generator: torch.Generator) -> TokenBatch:
        """Tokens of cells to train on."""
        if self.objective == "paper":
            return self.backbone.tokenize_for_integration(counts, genes, generator, **self.tokenize)
        shown = self.backbone.tokenize(counts, genes, **self.tokenize)
        training = self.backbone.tokenize_for_training(counts, genes, generator)
        parts = {name: getattr(shown, name) for name in shown.__dataclass_fields__}
        both = [part.valid for part in (shown, training) if part.valid is not None]
        parts["valid"] = torch.stack(both).all(0) if both else None
        return PairedTokens(**parts, training=training)

    def loss(self, tokens: TokenBatch, generator: torch.Generator | None = None) -> Any:
        """Loss of a mini-batch whose batches are ``tokens.per_cell["batch"]``."""
        if self.objective == "paper":
            options = {name: value for name, value in self.options.items() if name not in self._of_network}
            return self.backbone.integration_loss(tokens, generator, **options)
        options = dict(self.options)
        weight = options.pop("adversary_weight", _ADVERSARY_WEIGHT)
        pretraining = self.backbone.pretraining_loss(tokens.training, generator, **options).total
        cells = self.backbone.cell_states(tokens, pooling=self.pooling)
        batches = tokens.per_cell[BATCH].to(cells.device, torch.int64)
        logits, classifier, confusion = self.head(cells, batches)
        accuracy = (logits.detach().argmax(1) == batches).float().mean()
        return AdversarialLoss(pretraining, weight * confusion, classifier, accuracy)


def _checked(backbone: Backbone, objective: str | None) -> Objective:
    if objective is None:
        return "paper" if backbone.integrates else "adversarial"
    if objective not in OBJECTIVES:
        msg = f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}"
        raise ValueError(msg)
    if objective == "paper" and not backbone.integrates:
        msg = f"the authors of {backbone.kind} publish no fine-tuning for integration; use objective='adversarial'"
        raise ValueError(msg)
    return objective


def _form_options(backbone: Backbone) -> set[str]:
    """What the config of the network for integration can be told besides the number of batches."""
    parameters = inspect.signature(backbone.integration_config).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _with_parts(
    backbone: Backbone, config: Any, seed: int, *, continued: bool, parts: Sequence[str]
) -> tuple[Backbone, Sequence[str]]:
    """The model with what the paper's objective needs, and the names of the parts made for it.

    Weights for batches of other data mean nothing here, so that they are fresh unless training is continued.
    """
    names = tuple(backbone.module.state_dict())
    old = [f"{part}." for part in backbone.batch_modules if any(name.startswith(f"{part}.") for name in names)]
    if config == backbone.config and (continued or not old):
        return backbone, parts
    exclude = [] if continued else [f"{re.escape(part)}.*" for part in old]
    new = rebuilt(backbone, config, seed=seed, exclude=exclude)
    if continued:
        before, after = backbone.module.state_dict(), new.module.state_dict()
        for name in new.load_report.dropped:
            if name.startswith(tuple(old)):
                _copy_first_rows(before[name], after[name])
        return new, parts
    return new, sorted({name.partition(".")[0] for name in new.load_report.fresh})


def _copy_first_rows(source: Tensor, target: Tensor) -> None:
    """Copy a tensor; of one with a row for each batch those of the batches that the source has."""
    if source.ndim:
        target = target[: len(source)]
    target.copy_(source)
