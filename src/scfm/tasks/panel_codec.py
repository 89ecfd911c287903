"""Between cells and expression: a narrow code of each cell, from which the expression of all genes is decoded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..train._random import seed_for, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scipy.sparse import csr_matrix
    from torch import Tensor

# names of the tensors of CellFM's authors
PUBLISHED_KEYS = {
    "proj2.0": "encoder.0",
    "proj2.2": "encoder.2",
    "cellwise_dec.map.0": "decoder.0",
    "cellwise_dec.map.3": "decoder.3",
}
_SVD_SEED = 0


class PanelCodec(nn.Module):
    """CellFM's encoder and decoder around the space in which cells are moved.

    From the state of a cell through SiLU to a narrow code, and from that through SiLU to the expression of a panel of genes, the
    latter without biases.

    Parameters
    ----------
    dim
        Width of what is known about a cell: its embedding, or its expression for an auto-encoder.
    n_genes
        Genes of the panel.
    latent
        Width of the code.
    hidden
        Width in between.
    dropout
        Dropout of the decoder.
    seed
        Seed of the weights; the global random state is neither used nor changed.

    Raises
    ------
    ValueError
        If a size makes no sense.

    References
    ----------
    Zeng et al., CellFM, Nature Communications 16, 4679 (2025).
    """

    def __init__(
        self, dim: int, n_genes: int, latent: int = 50, *, hidden: int = 512, dropout: float = 0.15, seed: int = 0
    ) -> None:
        super().__init__()
        if min(dim, n_genes, latent, hidden) < 1 or not 0 <= dropout < 1:
            msg = f"widths must be positive and dropout at least 0 and below 1; got {(dim, n_genes, latent, hidden, dropout)}"
            raise ValueError(msg)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, latent))
            self.decoder = nn.Sequential(
                nn.Linear(latent, hidden, bias=False),
                nn.Dropout(dropout),
                nn.SiLU(),
                nn.Linear(hidden, n_genes, bias=False),
            )

    def encode(self, cells: Tensor) -> Tensor:
        """Codes, ``(cells, latent)``."""
        return self.encoder(cells)

    def decode(self, codes: Tensor) -> Tensor:
        """Expression, ``(cells, genes)``."""
        return self.decoder(codes)

    def forward(self, cells: Tensor) -> Tensor:
        """Expression of the genes from what is known about cells, ``(cells, genes)``."""
        return self.decode(self.encode(cells))


class LinearCodec(nn.Module):
    """Principal components of expression: the codec without a network.

    Parameters
    ----------
    mean
        Mean expression, ``(genes,)``.
    components
        Orthonormal directions, ``(latent, genes)``.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    @classmethod
    def fitted(cls, expression: csr_matrix, latent: int) -> LinearCodec:
        """The principal components of cells; fewer if the cells do not have as many.

        Sparse input stays sparse.
        """
        from scanpy.preprocessing import pca

        n = min(latent, min(expression.shape) - 1)
        if n < 1:
            msg = f"principal components need at least two cells and two genes, not the shape {expression.shape}"
            raise ValueError(msg)
        _, components, *_ = pca(
            expression, n_comps=n, zero_center=True, return_info=True, random_state=_SVD_SEED, dtype="float32"
        )
        mean = np.asarray(expression.mean(0), dtype=np.float32).ravel()
        return cls(torch.from_numpy(mean), torch.from_numpy(np.ascontiguousarray(components, dtype=np.float32)))

    def encode(self, cells: Tensor) -> Tensor:
        """Scores, ``(cells, latent)``."""
        return (cells - self.mean) @ self.components.T

    def decode(self, codes: Tensor) -> Tensor:
        """Expression, ``(cells, genes)``."""
        return codes @ self.components + self.mean

    def forward(self, cells: Tensor) -> Tensor:
        """What the components keep of the expression, ``(cells, genes)``."""
        return self.decode(self.encode(cells))


@dataclass(frozen=True)
class CodecTraining:
    """How a codec is trained.

    Parameters
    ----------
    max_epochs
        Passes over the cells (CellFM: 100, with the model and ``lr=1e-5``).
    batch_size
        Cells of a step.
    lr
        Learning rate of Adam.
    patience
        Stop after so many epochs without a lower error of held-out cells; ``None`` for never.
    seed
        Seed of the order of cells and of the dropout.

    Raises
    ------
    ValueError
        If a number makes no sense.
    """

    max_epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-3
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_epochs, self.batch_size, 1 if self.patience is None else self.patience) < 1 or self.lr <= 0:
            msg = "max_epochs, batch_size and patience must be at least 1, and lr positive"
            raise ValueError(msg)


def train_codec(
    codec: PanelCodec,
    cells: Callable[[np.ndarray], Tensor],
    expression: csr_matrix,
    train: np.ndarray,
    validation: np.ndarray,
    training: CodecTraining,
    *,
    network: nn.Module | None = None,
) -> Iterator[dict[str, float]]:
    """Train a codec to restore expression (mean squared error over all genes); the weights of the best epoch count.

    Parameters
    ----------
    codec
        The codec, trained in place.
    cells
        Called with numbers of cells; gives what is known about them, ``(cells, dim)``, with gradients if ``network`` is trained.
    expression
        Expression of all cells.
    train, validation
        Numbers of the cells to train on, and of those that choose the epoch.
    training
        How to train.
    network
        What ``cells`` computes with, if it is to be trained along.

    Yields
    ------
    Errors of one epoch after the other, ``kept`` being 1 where the epoch is the best so far.

    Raises
    ------
    ValueError
        If there are no cells, or the loss is not finite.
    """
    if not len(train):
        msg = "there are no cells to train on"
        raise ValueError(msg)
    device = next(codec.parameters()).device
    trained = nn.ModuleList([codec] if network is None else [codec, network])
    order = np.random.default_rng(training.seed)
    optimizer = torch.optim.Adam((p for p in trained.parameters() if p.requires_grad), lr=training.lr)
    best, state, since = np.inf, None, 0
    for epoch in range(training.max_epochs):
        trained.train()
        losses, sizes = [], []
        shuffled = order.permutation(train)
        with seeded(seed_for(training.seed, "dropout", epoch), device):
            for start in range(0, len(shuffled), training.batch_size):
                rows = np.sort(shuffled[start : start + training.batch_size])
                loss = F.mse_loss(codec(cells(rows)), _dense(expression, rows, device))
                if not bool(loss.isfinite()):
                    msg = "the loss is no longer finite; use a lower lr="
                    raise ValueError(msg)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                sizes.append(len(rows))
        trained.eval()
        row = {"codec_loss_train": float(np.average(losses, weights=sizes))}
        if len(validation):
            row["codec_loss_validation"] = error = _error(codec, cells, expression, validation, training.batch_size)
            better = error < best
            row["kept"] = float(better)
            since = 0 if better else since + 1
            if better:
                best, state = error, deepcopy(trained.state_dict())
        yield row
        if training.patience is not None and since >= training.patience:
            break
    if state is not None:
        trained.load_state_dict(state)


@torch.no_grad()
def _error(
    codec: PanelCodec, cells: Callable[[np.ndarray], Tensor], expression: csr_matrix, rows: np.ndarray, size: int
) -> float:
    total = 0.0
    device = next(codec.parameters()).device
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        total += float(F.mse_loss(codec(cells(some)), _dense(expression, some, device))) * len(some)
    return total / len(rows)


def _dense(expression: csr_matrix, rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(expression[rows].toarray().astype(np.float32)).to(device)
