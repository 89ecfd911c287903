"""What scLong's gene tokens are made of: expression values, gene vectors, and a convolution over the GO graph."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.performer import layer_norm

if TYPE_CHECKING:
    from collections.abc import Callable

_UPSTREAM_EPSILON = 1e-7


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of streams and sums beside weights of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class FixedPrecision(nn.Module):
    """A module whose tensors follow the device, but never get a smaller type than they have."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(partial(_without_narrowing, fn), recurse)


def _without_narrowing(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    # Metal has no float64
    if torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype or moved.device.type == "mps":
        return moved
    # a copy, because a single view into a mapped file keeps all of it in memory
    return tensor.to(moved.device, copy=True)


class ValueEmbedding(nn.Module):
    """Expression values as vectors: a small network, or the vector of masked values, then a LayerNorm.

    Parameters
    ----------
    dim
        Width of the vectors.
    hidden
        Width of the hidden layer.
    mask_threshold
        Values at or below it are masked.
    """

    def __init__(self, dim: int, hidden: int, mask_threshold: float) -> None:
        super().__init__()
        self.mask_threshold = mask_threshold
        self.linear1 = nn.Linear(1, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.mask = nn.Embedding(1, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``values`` of any shape, float32 at least."""
        kind = wide(self.linear1.weight.dtype)
        values = values.to(kind).unsqueeze(-1)
        out = _linear(F.relu(_linear(values, self.linear1, kind)), self.linear2, kind)
        out = torch.where(values <= self.mask_threshold, _cut_to_norm_1(self.mask.weight, self.training).to(kind), out)
        return layer_norm(self.norm, out, kind)


class GeneTable(FixedPrecision):
    """One vector for each position, float64 as in the official file."""

    def __init__(self, n_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_positions, dim, dtype=torch.float64) * dim**-0.5)


class GOConvolution(FixedPrecision):
    """Convolution of gene vectors over the Gene Ontology graph.

    An edge carries the vector of its source, times its weight divided by the roots of the summed weights of the edges
    that reach its source and its target. No self loops are added to those in the graph.

    Parameters
    ----------
    n_positions, dim
        Shape of the gene vectors.
    n_edges
        Edges of the graph. A new network has placeholders that carry nothing.
    n_layers
        Linear layers, with ReLU between them.
    max_norm
        Whether gene vectors are cut to norm 1.
    """

    def __init__(self, n_positions: int, dim: int, n_edges: int, n_layers: int, *, max_norm: bool) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.weight = nn.Parameter(torch.randn(n_positions, dim) * dim**-0.5)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        self.register_buffer("edges", torch.zeros(2, n_edges, dtype=torch.int64))
        self.register_buffer("edge_weight", torch.zeros(n_edges))

    def forward(self) -> Tensor:
        """Convolved gene vectors, ``(n_positions, dim)``, never in a type smaller than that of the weights."""
        # sparse products have no gradients in the types of mixed precision
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._convolved()

    def _convolved(self) -> Tensor:
        # torch-geometric takes seconds to import
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        x = _cut_to_norm_1(self.weight, self.training) if self.max_norm else self.weight
        edges, norm = gcn_norm(self.edges, self.edge_weight, len(x), add_self_loops=False)
        source, target = edges
        # rows of the sparse matrix are targets; the product never holds a vector for each edge
        matrix = torch.sparse_coo_tensor(
            torch.stack([target, source]), norm.to(x.dtype), (len(x), len(x)), check_invariants=True
        )
        for i, layer in enumerate(self.layers):
            x = layer(torch.sparse.mm(matrix, x if i == 0 else F.relu(x)))
        return x


def _linear(x: Tensor, layer: nn.Linear, kind: torch.dtype) -> Tensor:
    return F.linear(x, layer.weight.to(kind), layer.bias.to(kind))


def _cut_to_norm_1(weight: Tensor, training: bool) -> Tensor:
    """Rows longer than 1 scaled to 1; in training the weight itself changes, outside of the gradients."""
    with torch.no_grad():
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        scale = torch.where(norm > 1, 1 / (norm + _UPSTREAM_EPSILON), 1.0)
        if training:
            weight.mul_(scale)
    return weight if training else weight * scale
