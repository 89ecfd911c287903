"""What this CPU is fast at in reduced precision, measured once for each type: processors differ by a factor of ten."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_MATMUL_SIZE = 512
_REPEATS = 3


def best_time(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Shortest time of some runs in seconds, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def matmul_gain(dtype: torch.dtype) -> float:
    """How many times faster than in float32 a matrix product is on this CPU; takes some milliseconds once."""
    square = torch.full((_MATMUL_SIZE, _MATMUL_SIZE), 0.5)
    reduced = square.to(dtype)
    return best_time(lambda: square @ square) / best_time(lambda: reduced @ reduced)
