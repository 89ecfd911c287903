"""Training of networks that predict responses to perturbations."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..metrics import perturbation_scores
from ..train._presets import Optimization, build_optimizer, clip_gradients, learning_rate_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .perturbation_learners import ResponseLearner
    from .perturbation_pairs import PerturbationPairs

# scores of held-out perturbations by which an epoch can be chosen, and whether larger is better
MONITORS = {
    "loss": False,
    "MSE": False,
    "DE MSE": False,
    "Pearson": True,
    "Pearson delta": True,
    "DE Pearson delta": True,
}


@dataclass(frozen=True)
class FitOptions:
    """How a network for responses is trained.

    Parameters
    ----------
    optimization
        Optimiser, schedule and clipping.
    batch_size
        Cells of a mini-batch.
    accumulate
        Mini-batches of an optimiser step; their losses are averaged.
    sum_accumulated
        Add their gradients up instead, and clip after each, as the authors of scFoundation and CellFM do.
    max_epochs
        Passes over the cells.
    monitor
        Score of the held-out perturbations by which the best epoch is chosen, see :data:`MONITORS`.
    keep_best
        Whether the weights of that epoch count, or the last.
    patience
        Stop after so many epochs without a better score; ``None`` for never.
    seed
        Seed of the order of cells and of what is random about the network.

    Raises
    ------
    ValueError
        If a number or name makes no sense.
    """

    optimization: Optimization
    batch_size: int = 32
    accumulate: int = 1
    sum_accumulated: bool = False
    max_epochs: int = 15
    monitor: str = "DE MSE"
    keep_best: bool = True
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"batch_size": self.batch_size, "accumulate": self.accumulate, "max_epochs": self.max_epochs}
        counts |= {} if self.patience is None else {"patience": self.patience}
        if wrong := [name for name, value in counts.items() if value < 1]:
            msg = f"{', '.join(wrong)} must be at least 1"
            raise ValueError(msg)
        if self.batch_size < 2:
            msg = "batch_size must be at least 2, because batch normalisation needs two cells"
            raise ValueError(msg)
        if self.monitor not in MONITORS:
            msg = f"monitor must be one of {', '.join(map(repr, MONITORS))}; got {self.monitor!r}"
            raise ValueError(msg)


def fit(
    learner: ResponseLearner,
    pairs: PerturbationPairs,
    train: np.ndarray,
    validation: np.ndarray,
    options: FitOptions,
    *,
    de_genes: Mapping[str, np.ndarray] | None = None,
) -> Iterator[dict[str, float]]:
    """Train a network; its weights are those of the best epoch as soon as the iterator ends.

    Parameters
    ----------
    learner
        The network, trained in place.
    pairs
        All cells.
    train, validation
        Numbers of the cells to train on, and of those whose perturbations are held out.
    options
        How to train.
    de_genes
        Positions of the most changed genes of each condition, for scores that begin with "DE", which are averaged over the held-out
        conditions that have such genes.

    Yields
    ------
    Losses and scores of one epoch after the other, ``kept`` being 1 where the epoch is the best so far.

    Raises
    ------
    ValueError
        If there are fewer than two cells to train on, the score to choose an epoch by needs ``de_genes`` of held-out conditions
        and there are none, or the loss is not finite.
    """
    if len(train) < 2:
        msg = f"there are {len(train)} cells to train on; at least two are needed"
        raise ValueError(msg)
    if options.monitor.startswith("DE ") and len(validation) and not _have_de_genes(pairs, validation, de_genes):
        msg = f"no held-out condition has de_genes, so that there is no {options.monitor!r}; choose another monitor="
        raise ValueError(msg)
    device = learner.device
    order, draws = (np.random.default_rng([options.seed, part]) for part in range(2))
    counted = torch.from_numpy(pairs.counted(train)).to(device)
    control = torch.from_numpy(pairs.control_mean).to(device)
    optimizer = build_optimizer(learner.named_parameters(), options.optimization)
    larger_is_better = MONITORS[options.monitor]
    best: float | None = None
    state: dict[str, Tensor] | None = None
    since = 0
    for epoch in range(options.max_epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(options.optimization, epoch, options.max_epochs)
        batches = _batches(order.permutation(train), options.batch_size)
        with _own_randomness(device, options.seed, epoch):
            losses = _train(learner, pairs, batches, optimizer, options, counted, control, draws)
        row = {"train_loss_epoch": float(np.mean(losses)), "learning_rate": optimizer.param_groups[0]["lr"]}
        learner.eval()
        if len(validation):
            row |= _validate(learner, pairs, validation, options, control, de_genes)
            score = row[_name(options.monitor)]
            better = np.isfinite(score) and (best is None or (score > best if larger_is_better else score < best))
            row["kept"] = float(better)
            since = 0 if better else since + 1
            if better:
                best = score
                if options.keep_best:
                    state = {name: value.detach().clone() for name, value in learner.state_dict().items()}
        yield row
        if options.patience is not None and since >= options.patience:
            break
    if state is not None:
        learner.load_state_dict(state)


def _train(
    learner: ResponseLearner,
    pairs: PerturbationPairs,
    batches: list[np.ndarray],
    optimizer: torch.optim.Optimizer,
    options: FitOptions,
    counted: Tensor,
    control: Tensor,
    rng: np.random.Generator,
) -> list[float]:
    """One pass over the cells."""
    learner.train()
    losses = []
    for number, cells in enumerate(batches):
        first = number - number % options.accumulate
        n_together = min(options.accumulate, len(batches) - first)
        loss = learner.loss(pairs.batch(cells, learner.device), counted, control, rng)
        if not bool(loss.isfinite()):
            msg = "the loss is no longer finite; use a lower lr="
            raise ValueError(msg)
        (loss if options.sum_accumulated else loss / n_together).backward()
        losses.append(float(loss.detach()))
        last = number == first + n_together - 1
        if last or options.sum_accumulated:
            clip_gradients(learner, options.optimization)
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _name(monitor: str) -> str:
    return "validation_loss" if monitor == "loss" else f"{monitor}_validation"


def _batches(cells: np.ndarray, size: int) -> list[np.ndarray]:
    """Full mini-batches; what is left over is dropped, as the authors do, unless it is all there is."""
    n_full = len(cells) // size
    return np.split(cells[: n_full * size], n_full) if n_full else [cells]


@contextmanager
def _own_randomness(device: torch.device, seed: int, epoch: int) -> Iterator[None]:
    """Dropout draws from torch's global generators, which are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield


def _have_de_genes(pairs: PerturbationPairs, cells: np.ndarray, de_genes: Mapping[str, np.ndarray] | None) -> bool:
    """Whether any condition of these cells has most changed genes."""
    names = (str(pairs.conditions[code]) for code in np.unique(pairs.codes[cells]))
    return de_genes is not None and any(len(de_genes.get(name, ())) for name in names)


@torch.no_grad()
def _validate(
    learner: ResponseLearner,
    pairs: PerturbationPairs,
    cells: np.ndarray,
    options: FitOptions,
    control: Tensor,
    de_genes: Mapping[str, np.ndarray] | None,
) -> dict[str, float]:
    """Scores of mean responses, averaged over held-out perturbations, and the loss over their cells."""
    device = learner.device
    names, observed = pairs.means(cells)
    place = np.searchsorted(np.unique(pairs.codes[cells]), pairs.codes[cells])
    sums = np.zeros(observed.shape)
    counted = torch.from_numpy(pairs.counted(cells)).to(device)
    losses, sizes = [], []
    rng = np.random.default_rng(options.seed)
    for start in range(0, len(cells), options.batch_size):
        rows = cells[start : start + options.batch_size]
        batch = pairs.batch(rows, device)
        np.add.at(sums, place[start : start + len(rows)], learner.predict(batch).double().cpu().numpy())
        losses.append(float(learner.loss(batch, counted, control, rng)))
        sizes.append(len(rows))
    predicted = sums / np.bincount(place)[:, None]
    scores = perturbation_scores(observed, predicted, pairs.control_mean).mean().to_dict()
    # a condition of one cell has no test of its genes
    chosen = {row: genes for row, name in enumerate(names) if len(genes := (de_genes or {}).get(name, ()))}
    if chosen:
        rows = list(chosen)
        table = perturbation_scores(
            observed[rows], predicted[rows], pairs.control_mean, de_genes=list(chosen.values())
        ).mean()
        scores |= {name: value for name, value in table.items() if name.startswith("DE ")}
    out = {_name(name): float(value) for name, value in scores.items() if name in MONITORS}
    return out | {"validation_loss": float(np.average(losses, weights=sizes))}
