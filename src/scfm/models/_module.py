"""The network as scvi-tools expects one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi.module.base import BaseModuleClass, LossOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..backbones import Backbone, TokenBatch
    from ..tasks.learner import Learner


class FoundationModule(BaseModuleClass):
    """Network of a backbone, with the methods of a scvi-tools module.

    There is no posterior: ``inference`` gives cell embeddings, ``loss`` the objective that the paper pre-trains with.

    Parameters
    ----------
    backbone
        The model; its network is :attr:`network`.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.module

    def _get_inference_input(self, tensors: dict[str, Any], **kwargs: Any) -> dict[str, TokenBatch]:
        return {"tokens": tensors["tokens"]}

    def _get_generative_input(self, tensors: dict[str, Any], inference_outputs: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def inference(self, tokens: TokenBatch, **options: Any) -> dict[str, Tensor]:
        """Cell embeddings ``z``, without gradients."""
        return {"z": self.backbone.embed(tokens, **options)}

    def generative(self) -> dict[str, Tensor]:
        """Nothing: expression is predicted by :meth:`scfm.models.FoundationModel.get_reconstruction`."""
        return {}

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: Any = None,
        generative_outputs: Any = None,
        generator: torch.Generator | None = None,
        **objective: Any,
    ) -> LossOutput:
        """Loss of pre-training on tokens that the backbone made for it."""
        tokens = tensors["tokens"]
        loss = self.backbone.pretraining_loss(tokens, generator, **objective).total
        return LossOutput(loss=loss, n_obs_minibatch=len(tokens))


class TaskModule(FoundationModule):
    """Network of a model and its head for a task.

    ``inference`` gives cell embeddings, ``loss`` the loss of the task.

    Parameters
    ----------
    learner
        The model and its head.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner.backbone)
        self.learner = learner

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: Any = None,
        generative_outputs: Any = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Loss of the task on tokens, with labels and whatever else it needs in ``tokens.per_cell``."""
        tokens = tensors["tokens"]
        return LossOutput(loss=self.learner.loss(tokens, generator).total, n_obs_minibatch=len(tokens))
