"""scGPT as its authors fine-tune it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from .._fine_tuning import FineTuning
from .._tasks import TaskMethods
from . import modality, perturbation
from .config import NORM_STYLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from .._tokens import TokenBatch
    from . import SCGPTBackbone
    from .config import NormStyle, SCGPTConfig

# the rate falls after every epoch
_DECAY = {"schedule": "steps", "unit": "epoch", "step_size": 1, "gamma": 0.9}
# squares of small gradients vanish in half precision
_MIXED = {"eps": 1e-4}
# of a cell with 3,000 genes and <cls>
_MAX_LENGTH = 3001
# layers of the network for several modalities, and the tensors of a pre-trained one that it starts from
_MULTIOMIC_LAYERS, _MULTIOMIC_KEPT = 4, (r"genes\.embedding\.weight", r"genes\.norm\.weight")


class SCGPTTasks(TaskMethods):
    """The part of the backbone that tasks ask for."""

    def fine_tuning(self, task: str) -> FineTuning:
        """How the authors fine-tune.

        Annotation sees up to 3,000 genes of a cell, more than the pre-training: 2.5 times the memory of 1,200 genes, or six
        times where the attention keeps its matrix.
        """
        if task == "annotation":
            return FineTuning(
                tokenize={"cls_value": 0.0, "max_length": _MAX_LENGTH},
                optimization={"optimizer": "adam", "learning_rate": 1e-4} | _DECAY,
                mixed_optimization=_MIXED,
                batch_size=32,
                max_epochs=10,
            )
        if task == "integration":
            return FineTuning(
                # all the chosen genes, zeros included
                tokenize={"cls_value": 0.0, "include_zeros": True, "max_length": len(self.vocab) + 1},
                optimization={"optimizer": "adam", "learning_rate": 1e-4} | _DECAY,
                mixed_optimization=_MIXED,
                batch_size=64,
                max_epochs=15,
                monitor="gep",
                n_top_genes=1200,
                by_batch=True,
            )
        if task == "multiomics":
            has_proteins = "protein" in (name.lower() for name in self.config.modalities)
            return FineTuning(
                tokenize={"cls_value": 0.0, "include_zeros": not has_proteins, "max_length": 4001},
                optimization={"optimizer": "adam", "learning_rate": 1e-3} | _DECAY | {"gamma": 0.95},
                mixed_optimization=_MIXED,
                batch_size=16,
                max_epochs=25,
                monitor="gep",
                objective={"mask_ratio": 0.4, "ecs_weight": 0.0, "dar_weight": 1.0},
                n_top_genes=1200,
            )
        if task == "gears":
            # an extension of scfm: all genes have states, zeros included
            return FineTuning(tokenize={"include_zeros": True, "max_length": len(self.vocab) + 1})
        if task == "responses":
            return FineTuning(
                optimization={"optimizer": "adam", "learning_rate": 1e-4} | _DECAY,
                batch_size=64,
                max_epochs=15,
                monitor="Pearson",
                objective={"most_genes": 1536, "patience": 10},
            )
        return super().fine_tuning(task)

    def _perturbing(
        self,
        *,
        seed: int,
        decoder: Literal["affine", "mlp"] = "affine",
        activation: str = "",
        adaptive: bool = False,
        mvc: bool = False,
        frozen_flag: int | None = 0,
        input_bins: int = 0,
        dropout: float = 0.0,
    ) -> SCGPTBackbone:
        """Upstream keeps what embeds genes and values, and the layers; ``"mlp"`` is the network of the preprint."""
        from .._rebuild import rebuilt

        if decoder not in ("affine", "mlp"):
            msg = f"decoder must be 'affine' or 'mlp'; got {decoder!r}"
            raise ValueError(msg)
        if self.config.value_style == "category" and not input_bins:
            msg = f"{self.name} embeds bins, not values; give input_bins={self.config.n_bins}"
            raise ValueError(msg)
        config = replace(
            self.config,
            dropout=dropout,
            input_norm="none" if decoder == "affine" else "batchnorm",
            n_batches=0,
            use_batch_labels=False,
            explicit_zeros=False,
            mvc="inner product" if mvc else None,
            n_classes=0,
            discriminator=False,
            query_flag=False,
            multiomic=False,
            modalities=(),
            perturbation_flags=3,
            frozen_flag=frozen_flag,
            affine_decoder=decoder == "affine",
            decoder_activation=activation,
            adaptive_shift=adaptive,
            input_bins=input_bins,
        )
        kept = [r"genes\..+", r"layers\..+", *([r"values\..+"] if self.module.values is not None else [])]
        return rebuilt(self, config, seed=seed, include=kept)

    @property
    def perturbs_already(self) -> bool:
        """Whether the network is one for responses to perturbations, such as a fine-tuned file."""
        return self.config.perturbation_flags > 0

    def _predict_perturbed(self, ids: Tensor, values: Tensor, flags: Tensor, **options: Any) -> Tensor:
        return perturbation.predict_responses(self, ids, values, flags, **options)

    def _perturbation_loss(
        self, ids: Tensor, values: Tensor, flags: Tensor, observed: Tensor, **options: Any
    ) -> perturbation.ResponseLoss:
        return perturbation.response_loss(self, ids, values, flags, observed, **options)

    def config_with_classes(self, n_classes: int, head: str) -> SCGPTConfig:
        """The config with a classifier on the state of ``<cls>``."""
        return replace(self.config, n_classes=n_classes)

    def integration_config(
        self,
        n_batches: int,
        *,
        ecs_threshold: float = 0.8,
        input_norm: NormStyle = "dsbn",
        explicit_zeros: bool = True,
    ) -> SCGPTConfig:
        """The config with batch labels, a normalisation for each batch, explicit zeros and the batch classifier.

        Parameters
        ----------
        n_batches
            Number of batches.
        ecs_threshold
            Similarity that cells with a higher one are drawn beyond: 0.8 in the authors' code, 0.6 in the paper.
        input_norm
            Normalisation of the embedded tokens: ``"dsbn"`` for each batch, ``"batchnorm"`` for all, or ``"none"``.
        explicit_zeros
            Whether being zero is predicted apart from the value.

        Raises
        ------
        ValueError
            If there is no such normalisation, or the threshold is no similarity.
        """
        if input_norm not in NORM_STYLES:
            msg = f"input_norm must be one of {', '.join(map(repr, NORM_STYLES))}; got {input_norm!r}"
            raise ValueError(msg)
        if not -1 <= ecs_threshold <= 1:
            msg = f"ecs_threshold is a similarity between -1 and 1; got {ecs_threshold!r}"
            raise ValueError(msg)
        return replace(
            self.config,
            n_batches=n_batches,
            use_batch_labels=True,
            input_norm=input_norm,
            explicit_zeros=explicit_zeros,
            discriminator=True,
            mvc=self.config.mvc if (self.config.mvc or "").startswith("inner product") else "inner product",
            ecs_threshold=ecs_threshold,
        )

    def _integration_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .finetune import finetune_loss

        return finetune_loss(self, tokens, generator, **options)

    def _multiomic(
        self,
        features: Mapping[str, Sequence[str]],
        *,
        n_layers: int | None,
        n_batches: int,
        seed: int,
        continued: bool,
    ) -> SCGPTBackbone:
        """Upstream keeps the gene table and the weight of its LayerNorm, and no other layer."""
        from .._rebuild import rebuilt

        if n_layers is None:
            n_layers = self.config.n_layers if continued else min(_MULTIOMIC_LAYERS, self.config.n_layers)
        if n_layers < 1:
            msg = f"n_layers must be positive; got {n_layers}"
            raise ValueError(msg)
        config = replace(
            self.config,
            n_layers=n_layers,
            n_batches=n_batches,
            use_batch_labels=n_batches > 0,
            discriminator=n_batches > 0,
            input_norm="none",
            explicit_zeros=False,
            mvc=self.config.mvc or "inner product",
            n_classes=0,
            multiomic=True,
            modalities=modality.modality_names(features),
        )
        vocab = modality.multiomic_vocab(self.vocab, features)
        backbone = rebuilt(self, config, vocab=vocab, seed=seed, include=None if continued else _MULTIOMIC_KEPT)
        backbone.set_modalities(features)
        return backbone

    def _multiomic_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        from .finetune import finetune_loss

        return finetune_loss(self, tokens, generator, **options)

    def _class_logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        _, x, padding = self._inputs(tokens)
        return (self.module.classifier(self.module.encode(x, padding)[:, 0]),)

    def _cell_states(self, tokens: TokenBatch, pooling: str) -> Tensor:
        _, x, padding = self._inputs(tokens)
        return self._pool(tokens, self.module.encode(x, padding), pooling)
