"""DeepSEM: a structural equation model of expression, whose weights are a regulatory network."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy import sparse
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

Inverse = Literal["exact", "cholesky"]
INVERSES = ("exact", "cholesky")
_STANDARD_RANGE = 10.0
_VARIANCE_FLOOR, _DEVIATION_FLOOR = 1e-8, 1e-10
# of one category of ten, as the authors count it
_CATEGORY_LOSS = math.log(10)

# names of the authors' tensors; what chooses among several categories has no effect with one, and is left out
PUBLISHED_KEYS = {
    "adj_A": "adjacency",
    "inference.inference_qzyx.0": "encoder.0",
    "inference.inference_qzyx.2": "encoder.2",
    "inference.inference_qzyx.4.mu": "mean",
    "inference.inference_qzyx.4.var": "log_variance",
    "generative.y_mu.0": "prior_mean.0",
    "generative.y_mu.2": "prior_mean.2",
    "generative.y_var.0": "prior_log_variance.0",
    "generative.y_var.2": "prior_log_variance.2",
    "generative.generative_pxz.0": "decoder.0",
    "generative.generative_pxz.2": "decoder.2",
    "generative.generative_pxz.4": "decoder.4",
}
_UNUSED = "inference.inference_qyx."


@dataclass(frozen=True)
class SemLoss:
    """Loss of a mini-batch of cells.

    Parameters
    ----------
    total
        Sum of the others; what is minimised.
    reconstruction
        Mean squared error over measured values.
    gaussian
        Distance of the latent values from their prior, times ``beta``.
    categorical
        The constant of a single category, times ``beta``.
    sparsity
        Mean absolute weight of the network, times ``alpha``.
    """

    total: Tensor
    reconstruction: Tensor
    gaussian: Tensor
    categorical: Tensor
    sparsity: Tensor


@dataclass(frozen=True)
class SemOutput:
    """What the network makes of a mini-batch; everything has the shape ``(cells, genes)``, priors ``(1, genes)``.

    Parameters
    ----------
    mean, variance
        Of the latent value of each gene.
    latent
        Values drawn from these.
    prior_mean, prior_variance
        What they should look like.
    reconstruction
        Predicted expression.
    """

    mean: Tensor
    variance: Tensor
    latent: Tensor
    prior_mean: Tensor
    prior_variance: Tensor
    reconstruction: Tensor


class DeepSEM(nn.Module):
    """The variational auto-encoder of DeepSEM, in which genes meet only in ``I - A``.

    Every gene goes through the same small networks; ``A`` has targets as rows and sources as columns.

    Parameters
    ----------
    adjacency
        Start of ``A``, ``(genes, genes)``. Its diagonal plays no role.
    hidden
        Width of the small networks.
    inverse
        ``"exact"``: the inverse of ``I - A^T``, as in DeepSEM. ``"cholesky"``: as in the code of scLong, which takes the
        lower triangle of that matrix for a Cholesky factor, so that the result is no inverse of it.
    seed
        Seed of the weights; the global random state is neither used nor changed.

    Raises
    ------
    ValueError
        If the adjacency is not square and finite, or ``inverse`` is unknown.

    References
    ----------
    Shu et al., DeepSEM, Nature Computational Science 1, 491 (2021); Bai et al., scLong, 2024.
    """

    def __init__(
        self, adjacency: np.ndarray | Tensor, *, hidden: int = 128, inverse: Inverse = "exact", seed: int = 0
    ) -> None:
        super().__init__()
        weights = torch.as_tensor(adjacency, dtype=torch.float32, device="cpu").clone()
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or len(weights) < 2:
            msg = f"an adjacency has a row and a column for each of at least two genes, not the shape {tuple(weights.shape)}"
            raise ValueError(msg)
        if not bool(weights.isfinite().all()):
            msg = "the adjacency holds values that are not finite"
            raise ValueError(msg)
        if inverse not in INVERSES:
            msg = f"inverse must be one of {', '.join(map(repr, INVERSES))}; got {inverse!r}"
            raise ValueError(msg)
        self.inverse, self.hidden = inverse, hidden
        n_genes = len(weights)
        self.adjacency = nn.Parameter(weights)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
            self.mean, self.log_variance = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
            self.prior_mean, self.prior_log_variance = (
                nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, n_genes)) for _ in range(2)
            )
            self.decoder = nn.Sequential(
                nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
            )
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self.register_buffer("identity", torch.eye(n_genes), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adjacency.device

    @property
    def network(self) -> Tensor:
        """The weights of the regulatory network, without a gene's own."""
        return self.adjacency * (1 - self.identity)

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take weights with the authors' names.

        Raises
        ------
        ValueError
            If a tensor has no place here, or one is missing.
        """
        renamed = {}
        for name, tensor in state.items():
            if name.startswith(_UNUSED):
                continue
            stem, _, last = name.rpartition(".")
            place = PUBLISHED_KEYS.get(name) or f"{PUBLISHED_KEYS.get(stem, '?')}.{last}"
            renamed[place] = tensor
        if wrong := set(renamed) ^ set(self.state_dict()):
            msg = (
                f"these are not the weights of DeepSEM with one category; wrong or missing: {', '.join(sorted(wrong))}"
            )
            raise ValueError(msg)
        self.load_state_dict(renamed)

    def forward(self, x: Tensor, noise: Tensor) -> SemOutput:
        """Encode and decode standardised expression.

        Parameters
        ----------
        x
            Standardised expression, ``(cells, genes)``.
        noise
            Standard normal numbers of the same shape.
        """
        structure = self.identity - self.network.T
        states = self.encoder(torch.stack([x, torch.ones_like(x)], dim=-1))
        mean = self.mean(states).squeeze(-1) @ structure
        variance = torch.exp(self.log_variance(states).squeeze(-1) @ structure)
        latent = mean + noise * torch.sqrt(variance + _DEVIATION_FLOOR)
        if self.inverse == "exact":
            # the same as the product with the inverse, with a smaller error
            sources = torch.linalg.solve(structure, latent, left=False)
        else:
            sources = latent @ torch.cholesky_inverse(structure)
        one = x.new_ones(1, 1)
        return SemOutput(
            mean,
            variance,
            latent,
            self.prior_mean(one) @ structure,
            torch.exp(self.prior_log_variance(one) @ structure),
            self.decoder(sources.unsqueeze(-1)).squeeze(-1),
        )

    def loss(self, x: Tensor, measured: Tensor, noise: Tensor, *, alpha: float, beta: float) -> SemLoss:
        """Loss of a mini-batch.

        Parameters
        ----------
        x, noise
            As in :meth:`forward`.
        measured
            1 where expression was measured, 0 where it was not (a zero of the data), ``(cells, genes)``.
        alpha
            Weight of the sparsity of the network.
        beta
            Weight of the prior.
        """
        out = self(x, noise)
        reconstruction = ((x - out.reconstruction) ** 2 * measured).sum() / measured.sum().clamp_min(1)
        own = _log_normal(out.latent, out.mean, out.variance)
        prior = _log_normal(out.latent, out.prior_mean, out.prior_variance)
        gaussian = (own - prior).mean() * beta
        categorical = x.new_tensor(_CATEGORY_LOSS * beta)
        sparsity = self.adjacency.abs().mean() * alpha
        total = reconstruction + gaussian + categorical + sparsity
        return SemLoss(total, reconstruction, gaussian, categorical, sparsity)


def _log_normal(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Logarithm of the normal density, averaged over genes."""
    variance = variance + _VARIANCE_FLOOR
    return -0.5 * (math.log(2 * math.pi) + torch.log(variance) + (values - mean) ** 2 / variance).mean(-1)


@dataclass(frozen=True)
class StandardExpression:
    """Expression in units of the spread of each gene over the cells in which it was measured.

    A value that is not zero was measured. Zeros are standardised, too (they lie far below the mean), but they do not
    count in the loss.

    Parameters
    ----------
    values
        Expression, ``(cells, genes)``, without stored zeros.
    mean, deviation
        Of the measured values of each gene.
    """

    values: sparse.csr_matrix
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: sparse.spmatrix | np.ndarray) -> StandardExpression:
        """Look at all cells.

        Raises
        ------
        ValueError
            If there are no cells, or values that are not finite.
        """
        values = sparse.csr_matrix(values, copy=True)
        values.eliminate_zeros()
        if not values.shape[0] or not np.isfinite(values.data).all():
            msg = "expression holds values that are not finite" if values.shape[0] else "there are no cells"
            raise ValueError(msg)
        data = values.data.astype(np.float64)
        count = np.bincount(values.indices, minlength=values.shape[1])
        some = np.maximum(count, 1)
        mean = np.bincount(values.indices, data, minlength=values.shape[1]) / some
        squares = np.bincount(values.indices, (data - mean[values.indices]) ** 2, minlength=values.shape[1])
        return cls(values, mean, np.sqrt(squares / some))

    def batch(self, cells: np.ndarray) -> tuple[Tensor, Tensor]:
        """Standardised expression of some cells, clipped to 10, and where it was measured; ``(cells, genes)`` each."""
        block = self.values[cells].toarray().astype(np.float64)
        # a gene of one value, or none, has no spread
        usable = self.deviation > 0
        scale = np.divide(1.0, self.deviation, out=np.zeros_like(self.deviation), where=usable)
        standard = np.clip((block - self.mean) * scale, -_STANDARD_RANGE, _STANDARD_RANGE)
        return torch.from_numpy(standard.astype(np.float32)), torch.from_numpy((block != 0).astype(np.float32))


@dataclass(frozen=True)
class Epoch:
    """What an epoch of :func:`refine` leaves.

    Parameters
    ----------
    losses
        Mean of each part of :class:`SemLoss` over the mini-batches.
    trains_network
        Whether the weights of the regulatory network were trained, or the small networks.
    adjacency
        The network after the epoch, if it was asked for.
    """

    losses: dict[str, float]
    trains_network: bool
    adjacency: Tensor | None


def refine(
    model: DeepSEM,
    cells: StandardExpression,
    *,
    max_epochs: int,
    batch_size: int,
    lr: float,
    adjacency_lr: float,
    alpha: float,
    beta: float,
    small_network_epochs: int,
    adjacency_epochs: int,
    n_kept: int,
    seed: int,
) -> Iterator[Epoch]:
    """Train in turn the small networks with a fixed adjacency, and the adjacency with fixed small networks.

    The authors' schedule of the learning rate (``StepLR`` with a step of 0.99 epochs) never lowers it: torch does so only in
    epochs that are a multiple of the step, and with rounding none below 400 is. The rates are constant here.

    Parameters
    ----------
    model
        Trained in place.
    cells
        Expression of its genes.
    max_epochs
        Number of epochs.
    batch_size
        Cells of a step.
    lr, adjacency_lr
        Learning rates of the small networks and of the adjacency (RMSprop for both).
    alpha, beta
        Weights of the loss.
    small_network_epochs, adjacency_epochs
        Epochs of each in turn.
    n_kept
        Number of last epochs whose adjacency is handed over.
    seed
        Seed of the order of cells and of the noise.

    Yields
    ------
    One :class:`Epoch` after the other.

    Raises
    ------
    ValueError
        If the loss is no longer finite.
    """
    order = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    small = [parameter for name, parameter in model.named_parameters() if name != "adjacency"]
    optimizers = {
        False: torch.optim.RMSprop(small, lr=lr),
        True: torch.optim.RMSprop([model.adjacency], lr=adjacency_lr),
    }
    n_cells, n_genes = cells.values.shape
    with _trained(model) as choose:
        for epoch in range(max_epochs):
            trains_network = epoch % (small_network_epochs + adjacency_epochs) >= small_network_epochs
            choose(trains_network)
            sums = dict.fromkeys((field.name for field in fields(SemLoss)), 0.0)
            permuted = order.permutation(n_cells)
            starts = range(0, n_cells, batch_size)
            for start in starts:
                x, measured = (part.to(model.device) for part in cells.batch(permuted[start : start + batch_size]))
                noise = torch.randn(len(x), n_genes, generator=generator).to(model.device)
                optimizers[trains_network].zero_grad()
                loss = _checked(lambda: model.loss(x, measured, noise, alpha=alpha, beta=beta))  # noqa: B023
                loss.total.backward()
                optimizers[trains_network].step()
                for name in sums:
                    sums[name] += float(getattr(loss, name).detach())
            kept = model.network.detach().cpu().clone() if epoch >= max_epochs - n_kept else None
            yield Epoch({name: value / len(starts) for name, value in sums.items()}, trains_network, kept)


def _checked(compute: Callable[[], SemLoss]) -> SemLoss:
    msg = (
        "the loss is not finite: I - A has come too close to a matrix without an inverse. Start from smaller weights "
        "(scale=), or use a lower adjacency_lr= or a higher alpha="
    )
    try:
        loss = compute()
    except torch.linalg.LinAlgError as error:
        raise ValueError(msg) from error
    if not bool(loss.total.isfinite()):
        raise ValueError(msg)
    return loss


@contextmanager
def _trained(model: DeepSEM) -> Iterator[Callable[[bool], None]]:
    """What chooses which weights have gradients; all have them again in the end."""

    def choose(network: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((name == "adjacency") == network)
            parameter.grad = None

    try:
        yield choose
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
