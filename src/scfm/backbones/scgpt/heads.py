"""Decoders and classifiers on top of the scGPT encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._errors import UnsupportedError

if TYPE_CHECKING:
    from .config import MVCStyle

_MVC_QUERY_DIM = 64


class Decoded(NamedTuple):
    """Predicted values, and P(non-zero) if the decoder has explicit zeros."""

    values: Tensor
    nonzero: Tensor | None


def _leaky_mlp(dim_in: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim), nn.LeakyReLU(), nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1))


class ExpressionDecoder(nn.Module):
    """Value of each gene from the state of its token."""

    def __init__(self, dim_in: int, dim: int, *, explicit_zeros: bool) -> None:
        super().__init__()
        self.fc = _leaky_mlp(dim_in, dim)
        self.zero_logit = _leaky_mlp(dim_in, dim) if explicit_zeros else None

    def forward(self, x: Tensor, values: Tensor | None = None) -> Decoded:
        """Decode token states ``(cells, length, dim_in)``; ``values`` are for decoders that need them."""
        nonzero = None if self.zero_logit is None else torch.sigmoid(self.zero_logit(x).squeeze(-1))
        return Decoded(self.fc(x).squeeze(-1), nonzero)


class AffineDecoder(nn.Module):
    """Value of each gene as a factor times its value before a perturbation, plus a shift; both come from its state.

    Parameters
    ----------
    dim
        Width of states.
    activation
        Name of a module of :mod:`torch.nn` that factor and shift go through, such as ``"Softplus"``; ``""`` for none.
    adaptive
        Whether the shift is multiplied by the mean of the values of a cell that are not zero.
    """

    def __init__(self, dim: int, activation: str, *, adaptive: bool) -> None:
        super().__init__()
        self.factor = _leaky_mlp(dim, dim)
        self.shift = _leaky_mlp(dim, dim)
        self.activation = getattr(nn, activation)() if activation else nn.Identity()
        self.adaptive = adaptive

    def forward(self, x: Tensor, values: Tensor | None = None) -> Decoded:
        """Decode token states ``(cells, length, dim)`` beside values before the perturbation ``(cells, length)``."""
        if values is None:
            msg = (
                "this network predicts responses to perturbations from the expression before them and decodes nothing "
                "else; use predict_perturbed, or the model that it was fine-tuned from"
            )
            raise UnsupportedError(msg)
        factor = self.activation(self.factor(x).squeeze(-1))
        shift = self.activation(self.shift(x).squeeze(-1))
        if self.adaptive:
            n_expressed = (values != 0).sum(1, keepdim=True).clamp_min(1)
            shift = shift * (values.sum(1, keepdim=True) / n_expressed)
        return Decoded(factor * values + shift, None)


class MVCDecoder(nn.Module):
    """Value of each gene from the cell embedding and the gene's token embedding (GEPC in the paper).

    Parameters
    ----------
    dim
        Width of gene embeddings.
    context
        Width of the cell vector (``2 * dim`` with batch labels).
    style
        How gene and cell meet.
    explicit_zeros
        Predict P(non-zero) too (inner product only).
    """

    def __init__(self, dim: int, context: int, style: MVCStyle, *, explicit_zeros: bool) -> None:
        super().__init__()
        self.style = style
        self.W_zero_logit = None
        if style.startswith("inner product"):
            self.gene2query = nn.Linear(dim, dim)
            self.W = nn.Linear(dim, context, bias=False)
            if explicit_zeros:
                self.W_zero_logit = nn.Linear(dim, context)
        else:
            query_dim = _MVC_QUERY_DIM if style == "concat query" else dim
            self.gene2query = nn.Linear(dim, query_dim)
            self.fc1 = nn.Linear(context + query_dim if style == "concat query" else context, _MVC_QUERY_DIM)
            self.hidden_activation = nn.PReLU()
            self.fc2 = nn.Linear(_MVC_QUERY_DIM, 1)

    def forward(self, cell: Tensor, genes: Tensor) -> Decoded:
        """Decode ``cell`` ``(cells, context)`` at gene embeddings ``(cells, length, dim)``, or 1 instead of ``cells``."""
        if self.style == "inner product, detach":
            genes = genes.detach()
        query = torch.sigmoid(self.gene2query(genes))
        if self.style.startswith("inner product"):
            values = (self.W(query) @ cell.unsqueeze(-1)).squeeze(-1)
            nonzero = None
            if self.W_zero_logit is not None:
                nonzero = torch.sigmoid((self.W_zero_logit(query) @ cell.unsqueeze(-1)).squeeze(-1))
            return Decoded(values, nonzero)
        cell = cell.unsqueeze(1)
        hidden = (
            torch.cat([cell.expand(-1, query.shape[1], -1), query.expand(len(cell), -1, -1)], -1)
            if self.style == "concat query"
            else cell + query
        )
        return Decoded(self.fc2(self.hidden_activation(self.fc1(hidden))).squeeze(-1), None)


class _Head(nn.Module):
    def __init__(self, hidden: nn.Sequential, out: nn.Linear) -> None:
        super().__init__()
        self.hidden = hidden
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


def mlp_head(dim: int, n_out: int, n_layers: int, activation: nn.Module) -> _Head:
    """``n_layers - 1`` times [linear, activation, LayerNorm], then a linear layer."""
    blocks = [part for _ in range(n_layers - 1) for part in (nn.Linear(dim, dim), activation, nn.LayerNorm(dim))]
    return _Head(nn.Sequential(*blocks), nn.Linear(dim, n_out))


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


class Discriminator(_Head):
    """Classifier of the sequencing batch whose gradient reaches the encoder with the sign reversed."""

    def __init__(self, dim: int, n_batches: int) -> None:
        head = mlp_head(dim, n_batches, 3, nn.LeakyReLU())
        super().__init__(head.hidden, head.out)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the batches, ``(cells, n_batches)``."""
        return super().forward(_ReverseGradient.apply(x))


def elastic_cell_similarity(cells: Tensor, threshold: float) -> Tensor:
    """Elastic cell similarity loss: mean over all pairs of ``1 - (relu(cos) - threshold)^2``, diagonal taken as 0."""
    cells = F.normalize(cells, dim=1)
    similarity = cells @ cells.T
    similarity = similarity.masked_fill(torch.eye(len(cells), dtype=torch.bool, device=cells.device), 0.0)
    return torch.mean(1 - (F.relu(similarity) - threshold) ** 2)
