"""Batch normalisation that a batch of one cell does not stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class BatchNorm(nn.BatchNorm1d):
    """Normalisation over the cells of a mini-batch.

    One cell has no spread: it is normalised with the running statistics and does not change them. The last mini-batch
    of an epoch often has one cell.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(cells, dim)``."""
        if self.training and len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
