"""Where the random part of a training step comes from: the seed and the place in the run, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

Purpose = Literal["tokens", "objective", "dropout", "features", "order", "split"]

_PURPOSES = {"tokens": 0, "objective": 1, "dropout": 2, "features": 3, "order": 4, "split": 5}


def seed_for(seed: int, purpose: Purpose, *place: int) -> int:
    """A seed of 63 bits that differs for each purpose and each place, such as the number of a micro-batch."""
    state = np.random.SeedSequence([seed, _PURPOSES[purpose], *place]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def generator_for(seed: int, purpose: Purpose, *place: int) -> torch.Generator:
    """A generator on the CPU with :func:`seed_for` as its seed."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *place))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the global generators start from ``seed`` inside the block, and from where they were behind it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
