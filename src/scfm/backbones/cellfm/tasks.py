"""CellFM as its authors fine-tune it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .._fine_tuning import FineTuning
from .._tasks import TaskMethods

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import GeneMatch
    from .._tokens import TokenBatch
    from .config import CellFMConfig

# most tokens of a cell in all networks of the authors
MAX_LENGTH = 2048
# of networks on top of a small model
_LEAST_WIDTH = 64


class CellFMTasks(TaskMethods):
    """The part of the backbone that tasks ask for."""

    def fine_tuning(self, task: str) -> FineTuning:
        """How the authors fine-tune."""
        if task == "annotation":
            return FineTuning(
                optimization={"preset": "cellfm-tutorials"}, batch_size=16, max_epochs=30, min_cells=10, keep="last"
            )
        if task == "annotation with hidden genes":
            return FineTuning(
                optimization={
                    "optimizer": "adamw",
                    "learning_rate": 1e-4,
                    "weight_decay": 1e-5,
                    "clip": "norm",
                    "clip_value": 1.0,
                    "schedule": "steps",
                    "gamma": 0.95,
                    "unit": "epoch",
                },
                batch_size=16,
                max_epochs=5,
                train_only=(r"layers\.",),
                min_cells=10,
                keep="last",
                objective={"mask_ratio": 0.5, "similarity": 0.8},
            )
        if task == "integration":
            return FineTuning(
                optimization={"preset": "cellfm-tutorials"},
                batch_size=4,
                max_epochs=30,
                keep="last",
                objective={"mask_ratio": 0.5, "zero_length": MAX_LENGTH, "similarity": 0.8},
            )
        if task == "gears":
            # 1536 to 1024 to 512 in the released models
            hidden = max(_LEAST_WIDTH, self.config.dim // 3)
            return FineTuning(
                tokenize={"include_zeros": True, "unknown": "pad"},
                optimization={"learning_rate": 5e-3},
                batch_size=10,
                accumulate=5,
                max_epochs=15,
                objective={"entry": "mlp", "entry_hidden": 2 * hidden, "hidden": hidden, "positions": "none"},
            )
        if task == "transport":
            return FineTuning(
                tokenize={"include_zeros": True, "unknown": "pad"},
                optimization={"optimizer": "adam", "learning_rate": 1e-5},
                batch_size=32,
                max_epochs=100,
                objective={"latent": 50, "hidden": 512, "potential": (512, 512, 512, 512)},
            )
        return super().fine_tuning(task)

    def normalized_input(self, totals: np.ndarray | None = None) -> dict[str, Any]:
        """Values as they are."""
        return {"pre_normalized": True}

    def integration_config(self, n_batches: int) -> CellFMConfig:
        """The config with decoders of "is expressed"; the batch of a cell has no part in it."""
        for decoder in ("gene", "cell"):
            self.need_decoder(decoder)
        return replace(self.config, has_zero_heads=True, has_zero_embedding=True)

    def tokenize_for_integration(
        self,
        counts: csr_matrix,
        genes: Sequence[str] | np.ndarray | GeneMatch,
        generator: torch.Generator,
        **options: Any,
    ) -> TokenBatch:
        """Tokens as for pre-training, with genes without expression to sample from."""
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        return self.tokenize(
            counts, genes, **({"sampling": "weighted", "with_unexpressed": True, "seed": seed} | options)
        )

    def _integration_loss(self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any) -> Any:
        return self._pretraining_loss(tokens, generator, **options)

    def config_with_classes(self, n_classes: int, head: str) -> CellFMConfig:
        """The config with a classifier: ``"retention"``, or ``"mlp"`` of the PyTorch port."""
        return replace(self.config, class_head=head, n_classes=n_classes)

    def _class_logits(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        return tuple(logits for logits in self.module.classify(tokens) if logits is not None)

    def _class_logits_and_loss(
        self, tokens: TokenBatch, generator: torch.Generator | None, **options: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        loss = self._pretraining_loss(tokens, generator, **options)
        return (self.module.head(loss.cell_states),), loss
