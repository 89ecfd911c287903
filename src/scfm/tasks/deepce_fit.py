"""Training of DeepCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from ..metrics import signature_scores
from ..train._random import seed_for, seeded
from .molecules import MoleculeBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from .deepce import DeepCE
    from .molecules import Molecule

Monitor = Literal["Pearson", "Spearman", "RMSE", "loss"]


@dataclass(frozen=True)
class Signatures:
    """Samples to train on or to ask for.

    Parameters
    ----------
    molecules
        Molecules, each once.
    molecule
        Number of the molecule of each sample.
    cell_lines, doses
        Which they are, as indicators, one row for each sample.
    values
        Signatures, float32, ``(samples, genes)``; ``None`` where they are to be predicted.
    """

    molecules: Sequence[Molecule]
    molecule: np.ndarray
    cell_lines: np.ndarray
    doses: np.ndarray
    values: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.molecule)


@dataclass(frozen=True)
class DeepCETraining:
    """How DeepCE is trained; the defaults are those of scLong's code.

    Parameters
    ----------
    max_epochs
        Passes over the samples.
    batch_size
        Samples of a step (paper of scLong: 16).
    lr
        Learning rate of Adam (paper: 2e-5).
    warmup_epochs
        Epochs in which the rate rises to ``lr``, after which it falls to zero in a straight line (paper: 5); 0 for a constant
        rate.
    monitor
        Score of the held-out samples by which the epoch is chosen.
    keep_best
        Whether the weights of that epoch count, or the last.
    patience
        Stop after so many epochs without a better score; ``None`` for never.
    seed
        Seed of the order of samples and of the dropout.

    Raises
    ------
    ValueError
        If a number or name makes no sense.
    """

    max_epochs: int = 100
    batch_size: int = 32
    lr: float = 2e-4
    warmup_epochs: int = 0
    monitor: Monitor = "Pearson"
    keep_best: bool = True
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.max_epochs, self.batch_size, 1 if self.patience is None else self.patience)
        if min(counts) < 1 or self.lr <= 0 or self.warmup_epochs < 0:
            msg = "max_epochs, batch_size and patience must be at least 1, lr positive and warmup_epochs not negative"
            raise ValueError(msg)
        if self.monitor not in get_args(Monitor):
            msg = f"monitor must be one of {', '.join(map(repr, get_args(Monitor)))}; got {self.monitor!r}"
            raise ValueError(msg)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        if not self.warmup_epochs:
            return self.lr
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1) / self.warmup_epochs
        return self.lr * (self.max_epochs - epoch) / max(1, self.max_epochs - self.warmup_epochs)


# of the code and of the paper of scLong, which differ
PUBLISHED = {
    "code": {"max_epochs": 100, "batch_size": 32, "lr": 2e-4, "warmup_epochs": 0},
    "paper": {"max_epochs": 100, "batch_size": 16, "lr": 2e-5, "warmup_epochs": 5},
}


def train_deepce(
    network: DeepCE, samples: Signatures, train: np.ndarray, validation: np.ndarray, training: DeepCETraining
) -> Iterator[dict[str, float]]:
    """Train a network; its weights are those of the best epoch as soon as the iterator ends.

    Parameters
    ----------
    network
        The network, trained in place.
    samples
        All samples, with signatures.
    train, validation
        Numbers of the samples to train on, and of those that choose the epoch.
    training
        How to train.

    Yields
    ------
    Losses and scores of one epoch after the other, ``kept`` being 1 where the epoch is the best so far.

    Raises
    ------
    ValueError
        If there is nothing to train on, or the loss is not finite.
    """
    if not len(train):
        msg = "there are no samples to train on"
        raise ValueError(msg)
    device = network.genes.device
    order = np.random.default_rng(training.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.lr)
    best, state, since = -np.inf, None, 0
    for epoch in range(training.max_epochs):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(epoch)
        network.train()
        losses, sizes = [], []
        shuffled = order.permutation(train)
        with seeded(seed_for(training.seed, "dropout", epoch), device):
            for start in range(0, len(shuffled), training.batch_size):
                rows = shuffled[start : start + training.batch_size]
                loss = F.mse_loss(_forward(network, samples, rows), _tensor(network, samples.values[rows]))
                if not bool(loss.isfinite()):
                    msg = "the loss is no longer finite; use a lower lr="
                    raise ValueError(msg)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                sizes.append(len(rows))
        network.eval()
        row = {"train_loss_epoch": float(np.average(losses, weights=sizes)), "learning_rate": training.rate(epoch)}
        if len(validation):
            predicted = predict_deepce(network, samples, validation, batch_size=training.batch_size)
            row |= _validation(samples.values[validation], predicted)
            score = _score(row, training.monitor)
            better = score > best
            row["kept"] = float(better)
            since = 0 if better else since + 1
            if better:
                best = score
                if training.keep_best:
                    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
        yield row
        if training.patience is not None and since >= training.patience:
            break
    if state is not None:
        network.load_state_dict(state)


@torch.no_grad()
def predict_deepce(
    network: DeepCE, samples: Signatures, rows: np.ndarray | None = None, *, batch_size: int = 32
) -> np.ndarray:
    """Predicted signatures ``(samples, genes)``, float32; what does not depend on dose and cell line is computed once.

    Parameters
    ----------
    network
        The network, out of training.
    samples
        The samples.
    rows
        Numbers of the samples to predict; by default all.
    batch_size
        Molecules in a forward pass. It does not change the result beyond rounding.
    """
    rows = np.arange(len(samples)) if rows is None else np.asarray(rows)
    out = np.zeros((len(rows), len(network.genes)), dtype=np.float32)
    wanted, inverse = np.unique(samples.molecule[rows], return_inverse=True)
    for start in range(0, len(wanted), batch_size):
        chosen = wanted[start : start + batch_size]
        genes, molecules = network.states(_molecules(network, samples, chosen))
        places = np.flatnonzero((inverse >= start) & (inverse < start + len(chosen)))
        for first in range(0, len(places), batch_size):
            some = places[first : first + batch_size]
            of = torch.from_numpy(inverse[some] - start).to(genes.device)
            conditions = (_tensor(network, values[rows[some]]) for values in (samples.cell_lines, samples.doses))
            out[some] = network.respond(genes[of], molecules[of], *conditions).float().cpu().numpy()
    return out


def _forward(network: DeepCE, samples: Signatures, rows: np.ndarray) -> Tensor:
    conditions = (_tensor(network, values[rows]) for values in (samples.cell_lines, samples.doses))
    return network(_molecules(network, samples, samples.molecule[rows]), *conditions)


def _molecules(network: DeepCE, samples: Signatures, numbers: np.ndarray) -> MoleculeBatch:
    chosen = [samples.molecules[number] for number in numbers]
    return MoleculeBatch.of(chosen, device=network.genes.device, dtype=network.genes.dtype)


def _tensor(network: DeepCE, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(network.genes)


def _validation(observed: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    scores = signature_scores(observed, predicted, ks=(1,), n_true=1)
    names = ("RMSE", "Pearson", "Spearman")
    return {f"{name}_validation": scores[name] for name in names} | {"validation_loss": scores["RMSE"] ** 2}


def _score(row: dict[str, float], monitor: str) -> float:
    """Larger is better; undefined is worst."""
    value = row["validation_loss" if monitor == "loss" else f"{monitor}_validation"]
    value = -value if monitor in ("loss", "RMSE") else value
    return value if np.isfinite(value) else -np.inf
