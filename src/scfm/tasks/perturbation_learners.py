"""Networks that learn responses to perturbations, with one interface: a loss, and a prediction in parts."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .gears import gears_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ..backbones import Backbone
    from .gears_network import GearsNetwork
    from .perturbation_pairs import PairBatch

    States = Callable[[np.ndarray], Tensor]


class ResponseLearner(nn.Module):
    """A network that predicts expression after perturbations from expression before.

    A prediction has two parts, so that many perturbations of the same cells share the first.
    """

    @abstractmethod
    def loss(self, batch: PairBatch, counted: Tensor, control: Tensor, rng: np.random.Generator) -> Any:
        """Loss of a mini-batch, a tensor.

        Parameters
        ----------
        batch
            The pairs.
        counted
            Genes that each condition expresses, ``(conditions, genes)``.
        control
            Mean expression of control cells, ``(genes,)``.
        rng
            Source of the random part.
        """

    @abstractmethod
    def look_at(self, expression: Tensor, states: Tensor | None) -> Any:
        """What does not depend on the perturbation: from expression ``(cells, genes)`` and states of genes."""

    @abstractmethod
    def respond(self, seen: Any, expression: Tensor, perturbed: Tensor) -> Tensor:
        """Predicted expression, ``(cells, genes)``, for the perturbed genes of each cell."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    def predict(self, batch: PairBatch) -> Tensor:
        """Predicted expression of the pairs of a mini-batch."""
        states = self.states_of(batch.controls)
        return self.respond(self.look_at(batch.before, states), batch.before, batch.perturbed)

    def states_of(self, controls: np.ndarray) -> Tensor | None:
        """States of genes in control cells that are trained on."""
        return None


class GearsLearner(ResponseLearner):
    """GEARS, with or without states of genes from a foundation model.

    Parameters
    ----------
    network
        The network.
    states
        Gives the states of genes ``(cells, genes, dim)`` of control cells by their number; ``None`` for networks without.
    first_cell_only
        Compatibility with the authors' code, see :meth:`GearsNetwork.cell_states`.
    loss
        Options of :func:`scfm.tasks.gears.gears_loss`.
    """

    def __init__(
        self,
        network: GearsNetwork,
        states: States | None = None,
        *,
        first_cell_only: bool = False,
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.first_cell_only, self.loss_options = network, first_cell_only, dict(loss or {})
        self.states: States | None = states

    def states_of(self, controls: np.ndarray) -> Tensor | None:
        """States of genes, on the device of the network."""
        return None if self.states is None else self.states(controls).to(self.device)

    def loss(self, batch: PairBatch, counted: Tensor, control: Tensor, rng: np.random.Generator) -> Tensor:
        """The loss of GEARS; nothing about it is random."""
        predicted = self.network(
            batch.before, batch.perturbed, self.states_of(batch.controls), first_cell_only=self.first_cell_only
        )
        return gears_loss(
            predicted, batch.after, control, batch.conditions, counted[batch.conditions], **self.loss_options
        )

    def look_at(self, expression: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """States of genes inside the network, and vectors of perturbations."""
        states = self.network.cell_states(states, len(expression), first_cell_only=self.first_cell_only)
        return states, self.network.perturbation_vectors()

    def respond(self, seen: tuple[Tensor, Tensor], expression: Tensor, perturbed: Tensor) -> Tensor:
        """Add the perturbations."""
        states, vectors = seen
        return self.network.respond(states, self.network.effects(vectors, perturbed), perturbed, expression)


class GeneratorLearner(ResponseLearner):
    """A foundation model that predicts responses by itself (capability ``perturbs``).

    Parameters
    ----------
    backbone
        A network of :meth:`scfm.Backbone.perturbing`; trained in place.
    ids
        Vocabulary ids of the genes of the matrix, -1 for unknown ones, ``(genes,)``.
    places
        Place of each gene that can be perturbed in the matrix, ``(n_perturbations,)``.
    most_genes
        Most genes of a mini-batch of training; a random subset is drawn for each that has more. Predictions have no limit.
    always_include_perturbed
        Whether the perturbed genes are always in the subset. The authors leave that to chance, so that the perturbed gene is
        often missing.
    loss
        Options of :meth:`scfm.Backbone.perturbation_loss`.
    """

    def __init__(
        self,
        backbone: Backbone,
        ids: np.ndarray,
        places: np.ndarray,
        *,
        most_genes: int | None = 1536,
        always_include_perturbed: bool = True,
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.module = backbone, backbone.module
        self.most_genes, self.always_include_perturbed = most_genes, always_include_perturbed
        self.loss_options = dict(loss or {})
        self.register_buffer("ids", torch.from_numpy(np.asarray(ids, dtype=np.int64)), persistent=False)
        self.register_buffer("places", torch.from_numpy(np.asarray(places, dtype=np.int64)), persistent=False)

    def flags(self, perturbed: Tensor) -> Tensor:
        """1 at perturbed genes, int64, ``(cells, genes)``."""
        place = torch.where(perturbed >= 0, self.places[perturbed.clamp_min(0)], len(self.ids))
        out = torch.zeros(len(perturbed), len(self.ids) + 1, dtype=torch.int64, device=perturbed.device)
        return out.scatter_(1, place, 1)[:, :-1]

    def loss(self, batch: PairBatch, counted: Tensor, control: Tensor, rng: np.random.Generator) -> Tensor:
        """The loss of the model's authors on all genes, or on a random subset."""
        flags = self.flags(batch.perturbed)
        arrays = self.ids, batch.before, flags, batch.after
        if self.most_genes is not None and len(self.ids) > self.most_genes:
            some = torch.from_numpy(self._subset(flags, rng)).to(self.device)
            arrays = arrays[0][some], *(part[:, some] for part in arrays[1:])
        return self.backbone.perturbation_loss(*arrays, **self.loss_options).total

    def _subset(self, flags: Tensor, rng: np.random.Generator) -> np.ndarray:
        chosen = rng.permutation(len(self.ids))
        if self.always_include_perturbed:
            wanted = flags.any(0).cpu().numpy()[chosen]
            chosen = np.concatenate([chosen[wanted], chosen[~wanted]])
        return np.sort(chosen[: self.most_genes])

    def look_at(self, expression: Tensor, states: Tensor | None) -> None:
        """Genes see the flags from the first layer on, so that nothing is shared."""

    def respond(self, seen: None, expression: Tensor, perturbed: Tensor) -> Tensor:
        """Predict all genes."""
        return self.backbone.predict_perturbed(self.ids, expression, self.flags(perturbed))
