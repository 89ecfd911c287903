"""What a backbone does when it is fine-tuned for a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .._errors import UnsupportedError
from ._fine_tuning import FineTuning, ZeroShot
from ._kinds import kinds_with

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..genes import GeneMatch
    from ._base import Backbone
    from ._tokens import TokenBatch


class TaskMethods:
    """The part of :class:`scfm.Backbone` that tasks ask for; a class implements what its authors publish."""

    def fine_tuning(self, task: str) -> FineTuning:
        """How the paper fine-tunes for a task; override it where it does.

        Tasks are ``"annotation"``, ``"integration"``, ``"multiomics"``, ``"gears"`` (GEARS on states of genes, whose form is the
        ``objective``), ``"responses"`` (the network of :meth:`perturbing`) and ``"transport"`` (a code of each cell in which
        treatments move it, whose widths are the ``objective``).
        """
        return FineTuning()

    def normalized_input(self, totals: np.ndarray | None = None) -> dict[str, Any]:
        """Options of the tokenizer for values that are ``log1p`` of counts per 10,000 already.

        Parameters
        ----------
        totals
            Counts of each cell, ``(cells,)``, where they are known.
        """
        return {}

    @classmethod
    def zero_shot(cls, task: str) -> ZeroShot:
        """How the paper embeds for a task such as ``"integration"`` without training; override it where it says so."""
        return ZeroShot()

    def integration_config(self, n_batches: int) -> Any:
        """Config of a network that can be fine-tuned for the integration of so many batches.

        A class may take more, as keywords, about the form of its network.
        """
        msg = f"the authors of {self.kind} publish no fine-tuning for integration"
        raise UnsupportedError(msg)

    def tokenize_for_integration(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        generator: torch.Generator,
        **options: Any,
    ) -> TokenBatch:
        """Tokens as :meth:`integration_loss` expects them; ``options`` are those of :meth:`tokenize`."""
        return self.tokenize(counts, genes, **options)

    def config_with_classes(self, n_classes: int, head: str) -> Any:
        """Config of a network that holds the classifier ``head``, one of ``class_heads``."""
        msg = f"{self.kind} has no classifier of its own"
        raise UnsupportedError(msg)

    # what a class says it can do in `capabilities`, `class_heads` or `integrates`, it implements here
    def _class_logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]: ...
    def _class_logits_and_loss(self, tokens: TokenBatch, generator: Any, **options: Any) -> Any: ...
    def _integration_loss(self, tokens: TokenBatch, generator: torch.Generator, **options: Any) -> Any: ...
    def _multiomic(self, features: Mapping[str, Sequence[str]], **options: Any) -> Backbone: ...
    def _multiomic_loss(self, tokens: TokenBatch, generator: torch.Generator, **options: Any) -> Any: ...
    def _perturbing(self, *, seed: int, **options: Any) -> Backbone: ...
    def _predict_perturbed(self, ids: Tensor, values: Tensor, flags: Tensor, **options: Any) -> Tensor: ...
    def _perturbation_loss(self, *arrays: Tensor, **options: Any) -> Any: ...

    # -- what everybody calls ------------------------------------------------------------------------------------

    def class_logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        """Logits of the classifier that the network holds, with gradients if they are enabled.

        Returns
        -------
        Tensors ``(cells, classes)``. Classes are predicted from the first; all of them are trained.

        Raises
        ------
        UnsupportedError
            If the network holds none.
        """
        self._need_classes()
        return self._class_logits(tokens.to(self.device))

    def class_logits_and_loss(
        self, tokens: TokenBatch, generator: torch.Generator | None = None, **options: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Logits of cells of which some genes are hidden, and the loss of predicting these, from one forward pass.

        Arguments are those of :meth:`pretraining_loss`. All cells have to be valid.

        Raises
        ------
        UnsupportedError
            If the network holds no classifier for which there is such a pass.
        """
        self._need_classes()
        if getattr(self.config, "class_head", None) not in self.joint_heads:
            heads = ", ".join(map(repr, self.joint_heads)) or "none"
            msg = f"classes and hidden genes of {self.kind} cannot be learned in one pass with this head; heads that can: {heads}"
            raise UnsupportedError(msg)
        return self._class_logits_and_loss(tokens.to(self.device), generator, **options)

    def _need_classes(self) -> None:
        if not getattr(self.config, "n_classes", 0):
            msg = f"{self.name} holds no classifier; see scfm.models.CellTypeClassifier"
            raise UnsupportedError(msg)

    def integration_loss(self, tokens: TokenBatch, generator: torch.Generator | None = None, **options: Any) -> Any:
        """The loss with which the authors fine-tune for the integration of batches.

        Parameters
        ----------
        tokens
            Cells of :meth:`tokenize_for_integration`, all valid, with the number of the batch of each cell as
            ``per_cell["batch"]`` for models that look at it.
        generator
            Source of the random part, on the CPU.
        options
            What the loss of the model takes.

        Returns
        -------
        An object whose ``total`` is minimised.

        Raises
        ------
        UnsupportedError
            If the authors publish none.
        """
        if not self.integrates:
            able = ", ".join(kinds_with(lambda cls: cls.integrates))
            msg = f"the authors of {self.kind} publish no fine-tuning for integration; those of {able} do"
            raise UnsupportedError(msg)
        return self._integration_loss(tokens, generator, **options)

    def multiomic(
        self,
        features: Mapping[str, Sequence[str]],
        *,
        n_layers: int | None = None,
        n_batches: int = 0,
        seed: int = 0,
        continued: bool = False,
    ) -> Backbone:
        """Make a network for the features of several modalities around what the authors keep of this one.

        Parameters
        ----------
        features
            Names of the features of each modality. One that the vocabulary has keeps what the model knows about it.
        n_layers
            Layers of the new network; by default as the authors have it.
        n_batches
            Batches of the data that the network is told about; 0 for none.
        seed
            Seed of the fresh weights.
        continued
            This is such a network already: keep all the weights that fit.

        Raises
        ------
        UnsupportedError
            If there are no such networks of this kind.
        ValueError
            If a feature occurs twice, or ``n_layers`` makes no sense.
        """
        self.require("multiomics")
        return self._multiomic(features, n_layers=n_layers, n_batches=n_batches, seed=seed, continued=continued)

    def multiomic_loss(self, tokens: TokenBatch, generator: torch.Generator | None = None, **options: Any) -> Any:
        """The loss with which the authors integrate modalities; everything as in :meth:`integration_loss`."""
        self.require("multiomics")
        return self._multiomic_loss(tokens, generator, **options)

    @property
    def perturbs_already(self) -> bool:
        """Whether the network is one of :meth:`perturbing` already."""
        return False

    def perturbing(self, *, seed: int = 0, **options: Any) -> Backbone:
        """Make a network that predicts responses to perturbations, around what the authors keep of this one.

        Parameters
        ----------
        seed
            Seed of the fresh weights.
        options
            Form of the network; see the documentation of the model.

        Raises
        ------
        UnsupportedError
            If there are no such networks of this kind.
        """
        self.require("perturbs")
        return self._perturbing(seed=seed, **options)

    @torch.inference_mode()
    def predict_perturbed(self, ids: Tensor, values: Tensor, flags: Tensor, **options: Any) -> Tensor:
        """Expression after perturbations, float32, ``(cells, genes)``.

        Parameters
        ----------
        ids
            Vocabulary ids of the genes, -1 for genes that the model does not know, ``(genes,)``.
        values
            Log-normalised expression of control cells, ``(cells, genes)``.
        flags
            1 where a gene is perturbed and 0 elsewhere, ``(cells, genes)``.
        options
            See the documentation of the model.

        Raises
        ------
        UnsupportedError
            If the network is none of :meth:`perturbing`.
        """
        return self._predict_perturbed(*self._perturbation_inputs(ids, values, flags), **options)

    def perturbation_loss(self, ids: Tensor, values: Tensor, flags: Tensor, observed: Tensor, **options: Any) -> Any:
        """The loss with which the authors learn responses, an object whose ``total`` is minimised.

        Arguments are those of :meth:`predict_perturbed`, and the expression of perturbed cells, ``(cells, genes)``.
        """
        inputs = self._perturbation_inputs(ids, values, flags)
        return self._perturbation_loss(*inputs, observed.to(self.device, self.dtype), **options)

    def _perturbation_inputs(self, ids: Tensor, values: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.require("perturbs")
        if not self.perturbs_already:
            msg = f"{self.name} is no network for perturbations yet; make one with .perturbing() and train it"
            raise UnsupportedError(msg)
        if values.shape != flags.shape or values.shape[1:] != ids.shape:
            msg = f"ids {tuple(ids.shape)}, values {tuple(values.shape)} and flags {tuple(flags.shape)} do not fit together"
            raise ValueError(msg)
        ids = torch.where(ids < 0, self._unknown_id, ids)
        return ids.to(self.device), values.to(self.device, self.dtype), flags.to(self.device).long()

    @property
    def _unknown_id(self) -> int:
        """Entry that stands for genes that the vocabulary lacks."""
        return self.vocab[self.specials[0]]
