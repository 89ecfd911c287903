"""The classifier that scFoundation is fine-tuned with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ...nn.attention import attend
from ...nn.batch_norm import BatchNorm
from .pooling import pool

if TYPE_CHECKING:
    from torch import Tensor

    from .._tokens import TokenBatch
    from .layers import TransformerLayer
    from .module import SCFoundation

_HIDDEN = 256


class ClassHead(nn.Module):
    """Network with one hidden layer on the maximum over the tokens of a cell."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm(dim, eps=1e-6, affine=False)
        self.hidden = nn.Linear(dim, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, n_classes)

    def forward(self, cells: Tensor) -> Tensor:
        """Logits ``(cells, classes)`` from pooled states ``(cells, dim)``."""
        return self.out(F.relu(self.hidden(self.norm(cells))))


def pooled(module: SCFoundation, tokens: TokenBatch) -> Tensor:
    """Maximum of the encoder states of each cell, ``(cells, encoder_dim)``."""
    if not module.config.padded_pooling:
        return pool(tokens, module.encode(tokens), "max", module.config)
    return padded_states(module, tokens).amax(1)


def padded_states(module: SCFoundation, tokens: TokenBatch) -> Tensor:
    """Encoder states as the authors' class makes them, ``(cells, longest, encoder_dim)``.

    Padded positions have the vectors of the pad value and of the gene whose number equals it. They see the cell but are
    not seen, and the maximum runs over them, so that a cell depends on the longest one of its batch.
    """
    config, padding = module.config, tokens.padding
    ids = tokens.ids.masked_fill(padding, int(config.pad_value))
    values = tokens.values.masked_fill(padding, config.pad_value)
    x = module.value_embedding(values.flatten()).view(*values.shape, -1) + module.gene_embedding(ids)
    for layer in module.encoder.layers:
        x = _padded_layer(layer, x, padding)
    return module.encoder.norm(x)


def _padded_layer(layer: TransformerLayer, x: Tensor, padding: Tensor) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    attended = attend(q, k, v, padding, layer.dropout.p if layer.training else 0.0)
    x = layer.norm1(x + layer.dropout(layer.out(attended.transpose(1, 2).flatten(2))))
    return layer.norm2(x + layer.dropout(layer.linear2(layer.dropout(torch.relu(layer.linear1(x))))))
