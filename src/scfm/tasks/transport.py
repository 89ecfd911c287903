"""Optimal transport between cells by input-convex networks (CellOT): where a treatment would move a cell."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..metrics import kernel_discrepancy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_SLOPE = 0.2
_INIT = 0.05
# cells that a score of held-out cells is computed from at most
_SCORED = 1000


class ConvexPotential(nn.Module):
    """A network that is convex in its input as long as its inner weights are not negative.

    The first layer is ``LeakyReLU(A x + b)`` squared, each further one ``LeakyReLU(W z + A x + b)``, and the last one has no
    activation.

    Parameters
    ----------
    dim
        Width of the input.
    hidden
        Widths of the layers (CellOT: four times 64; CellFM: four times 512).
    seed
        Seed of the weights, uniform between -0.05 and 0.05; the global random state is neither used nor changed.

    Raises
    ------
    ValueError
        If there is no layer.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64, 64, 64), *, seed: int = 0) -> None:
        super().__init__()
        widths = (*hidden, 1)
        if not hidden or min(dim, *widths) < 1:
            msg = "a potential needs at least one hidden layer, and positive widths"
            raise ValueError(msg)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.W = nn.ModuleList(
                nn.Linear(before, after, bias=False) for before, after in zip(widths, widths[1:], strict=False)
            )
            self.A = nn.ModuleList(nn.Linear(dim, width) for width in widths)
            for layer in (*self.A, *self.W):
                nn.init.uniform_(layer.weight, -_INIT, _INIT)
            for layer in self.A:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Values of the potential, ``(cells, 1)``."""
        z = F.leaky_relu(self.A[0](x), _SLOPE) ** 2
        for inner, direct in zip(self.W[:-1], self.A[1:-1], strict=True):
            z = F.leaky_relu(inner(z) + direct(x), _SLOPE)
        return self.W[-1](z) + self.A[-1](x)

    def transport(self, x: Tensor, *, for_training: bool = False) -> Tensor:
        """Gradient of the potential at each cell, ``(cells, dim)``: where the cell goes.

        Parameters
        ----------
        x
            Cells.
        for_training
            Whether gradients are to flow through it.
        """
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            (moved,) = torch.autograd.grad(self(x).sum(), x, create_graph=for_training)
        return moved if for_training else moved.detach()

    def penalty(self) -> Tensor:
        """Sum of the norms of what is negative in the inner weights."""
        return sum(F.relu(-layer.weight).norm() for layer in self.W)

    @torch.no_grad()
    def clamp(self) -> None:
        """Set negative inner weights to zero."""
        for layer in self.W:
            layer.weight.clamp_(min=0)


class TransportMap(nn.Module):
    """Both potentials of a transport: the gradient of ``g`` moves control cells to treated ones.

    Parameters
    ----------
    dim
        Width of the cells.
    hidden
        Widths of the layers.
    seed
        Seed of the weights.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64, 64, 64), *, seed: int = 0) -> None:
        super().__init__()
        self.f = ConvexPotential(dim, hidden, seed=2 * seed)
        self.g = ConvexPotential(dim, hidden, seed=2 * seed + 1)

    def forward(self, source: Tensor) -> Tensor:
        """Where control cells go, ``(cells, dim)``."""
        return self.g.transport(source)

    def loss_g(self, source: Tensor, *, penalty: float = 1.0) -> Tensor:
        """What ``g`` minimises: ``f(grad g(s)) - <s, grad g(s)>``, and the penalty of its negative weights."""
        moved = self.g.transport(source, for_training=True)
        loss = (self.f(moved) - (source * moved).sum(1, keepdim=True)).mean()
        return loss + penalty * self.g.penalty() if penalty else loss

    def loss_f(self, source: Tensor, target: Tensor) -> Tensor:
        """What ``f`` minimises: ``f(t) - f(grad g(s))``."""
        return (self.f(target) - self.f(self.g.transport(source))).mean()

    @torch.no_grad()
    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        """Estimate of the squared Wasserstein distance from the dual problem; both need the same number of cells."""
        moved = self.g.transport(source)
        sizes = ((source * source).sum(1, keepdim=True) + (target * target).sum(1, keepdim=True)) / 2
        return (self.f(moved) - (source * moved).sum(1, keepdim=True) - self.f(target) + sizes).mean()


class CodeScale(nn.Module):
    """Codes moved to the origin and divided by one number.

    The best transport in these units is the best one in the old ones: neither change alters which cell goes where at least cost.

    Parameters
    ----------
    centre
        What is subtracted, ``(dim,)``.
    scale
        What codes are divided by then, a tensor with one number.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, codes: Tensor) -> CodeScale:
        """Units in which these codes have mean 0 and, over all their values, variance 1."""
        centre = codes.mean(0)
        spread = (codes - centre).square().mean().sqrt()
        return cls(centre, spread if float(spread) > 0 else torch.ones_like(spread))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in these units."""
        return (codes - self.centre) / self.scale

    def back(self, codes: Tensor) -> Tensor:
        """Inverse of :meth:`forward`."""
        return codes * self.scale + self.centre


@dataclass(frozen=True)
class TransportTraining:
    """How a transport is learned.

    Parameters
    ----------
    max_iter
        Steps of ``f`` (CellOT and CellFM: 100,000).
    inner_iter
        Steps of ``g`` for each of them.
    batch_size
        Cells of a step, drawn anew for each.
    lr, betas
        Learning rate (CellOT and CellFM: 1e-4) and moments of Adam.
    penalty
        Weight of the negative inner weights of ``g``.
    check_every
        Steps between scores of held-out cells.
    patience
        Stop after so many scores without a better one; ``None`` for never.
    seed
        Seed of the draws.

    Raises
    ------
    ValueError
        If a number makes no sense.
    """

    max_iter: int = 500
    inner_iter: int = 10
    batch_size: int = 256
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.9)
    penalty: float = 1.0
    check_every: int = 50
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("max_iter", "inner_iter", "batch_size", "check_every")}
        counts |= {} if self.patience is None else {"patience": self.patience}
        if wrong := [name for name, value in counts.items() if value < 1]:
            msg = f"{', '.join(wrong)} must be at least 1"
            raise ValueError(msg)
        if self.lr <= 0 or self.penalty < 0:
            msg = "lr must be positive and penalty not negative"
            raise ValueError(msg)


def start_from_identity(
    transport: TransportMap,
    cells: Tensor,
    *,
    n_steps: int = 200,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> float:
    """Train both potentials to leave cells where they are, an extension of scfm.

    Small random weights move all cells to nearly one place, from where transports run far away before they come back over tens
    of thousands of steps. From the identity, which is no worse a guess, short runs suffice.

    Parameters
    ----------
    transport
        The potentials, trained in place.
    cells
        Cells, control and treated.
    n_steps, batch_size, lr
        Steps of Adam, cells of a step, learning rate.
    seed
        Seed of the draws.

    Returns
    -------
    Mean squared distance by which cells are still moved in the last step; NaN without steps.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(transport.parameters(), lr=lr)
    loss = torch.tensor(torch.nan)
    for _ in range(n_steps):
        some = cells[torch.from_numpy(rng.integers(len(cells), size=batch_size)).to(cells.device)]
        moved = (potential.transport(some, for_training=True) for potential in (transport.f, transport.g))
        loss = sum(((there - some) ** 2).sum(1).mean() for there in moved) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        transport.f.clamp()
        transport.g.clamp()
    return float(loss.detach())


def train_transport(
    transport: TransportMap,
    source: Tensor,
    target: Tensor,
    training: TransportTraining,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> Iterator[dict[str, float]]:
    """Learn a transport; its weights are those of the best score as soon as the iterator ends.

    Parameters
    ----------
    transport
        The potentials, trained in place.
    source, target
        Control and treated cells, ``(cells, dim)``.
    training
        How to train.
    held_out
        Control and treated cells that are not trained on. The weights count with which the moved ones are nearest to the treated
        ones, by :func:`scfm.metrics.kernel_discrepancy` with relative widths; without them the last weights.

    Yields
    ------
    Losses since the last time and the score of the held-out cells, every ``check_every`` steps; ``kept`` is 1 where they are the
    best so far.

    Raises
    ------
    ValueError
        If there are no cells, or a loss is not finite.

    References
    ----------
    Bunne et al., CellOT, Nature Methods 20, 1759 (2023); Makkuva et al., ICML 2020.
    """
    if not len(source) or not len(target):
        msg = f"a transport needs control and treated cells to train on; there are {len(source)} and {len(target)}"
        raise ValueError(msg)
    rng = np.random.default_rng(training.seed)
    options = {"lr": training.lr, "betas": training.betas}
    steps = {name: torch.optim.Adam(getattr(transport, name).parameters(), **options) for name in ("f", "g")}
    best, state, since = np.inf, None, 0
    losses: dict[str, list[float]] = {"g": [], "f": []}

    def draw(cells: Tensor) -> Tensor:
        return cells[torch.from_numpy(rng.integers(len(cells), size=training.batch_size)).to(cells.device)]

    def step(name: str, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            msg = "a loss of the transport is no longer finite; use a lower lr="
            raise ValueError(msg)
        optimizer = steps[name]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(float(loss.detach()))

    for number in range(1, training.max_iter + 1):
        transport.f.requires_grad_(requires_grad=False)
        for _ in range(training.inner_iter):
            step("g", transport.loss_g(draw(source), penalty=training.penalty))
        transport.f.requires_grad_(requires_grad=True)
        step("f", transport.loss_f(draw(source), draw(target)))
        transport.f.clamp()
        if number % training.check_every and number < training.max_iter:
            continue
        row = {"iteration": number, **{f"loss_{name}": float(np.mean(values)) for name, values in losses.items()}}
        losses = {"g": [], "f": []}
        if held_out is not None:
            row["MMD_validation"] = score = _score(transport, *held_out)
            better = score < best
            row["kept"] = float(better)
            since = 0 if better else since + 1
            if better:
                best, state = score, copy.deepcopy(transport.state_dict())
        yield row
        if training.patience is not None and since >= training.patience:
            break
    if state is not None:
        transport.load_state_dict(state)


def _score(transport: TransportMap, source: Tensor, target: Tensor) -> float:
    """How far moved cells are from treated ones; not finite values are worst."""
    moved = transport(source[:_SCORED])
    if not bool(moved.isfinite().all()):
        return np.inf
    sets = (cells.double().cpu().numpy() for cells in (target[:_SCORED], moved))
    return kernel_discrepancy(*sets, relative=True)
