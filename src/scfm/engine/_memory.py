"""How much fits into one forward pass, and what to do when it does not."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING

import torch

from .._settings import settings
from ._plan import Limits

if TYPE_CHECKING:
    from ..data import CellSource

_TOKENS_CPU = 2048
_TOKENS_MPS = 16384
_TOKENS_CUDA = 131072
_TOKENS_CUDA_NEED = 16 * 2**30
_BLOCK_CELLS = 2048
_BLOCK_VALUES = 2**21
_BLOCK_OUTPUT_BYTES = 256 * 2**20

_MESSAGES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")


def choose_limits(device: torch.device, batch_size: int | None, tokens_per_batch: int | None) -> Limits:
    """Limits from the arguments, else from the settings, else a token budget that suits the device."""
    if batch_size is None:
        batch_size = settings.batch_size
    if batch_size is None and tokens_per_batch is None:
        tokens_per_batch = _default_tokens(device)
    return Limits(tokens=tokens_per_batch, cells=batch_size)


def choose_block_size(source: CellSource, shape: tuple[int, ...]) -> int:
    """Cells per block, so that its counts, its tokens and its results stay at a few hundred megabytes."""
    by_values = _BLOCK_VALUES / max(1.0, source.values_per_cell())
    by_output = _BLOCK_OUTPUT_BYTES / (4 * max(1, math.prod(shape)))
    return max(1, int(min(_BLOCK_CELLS, by_values, by_output)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out; every device has its own wording."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


def free_memory(device: torch.device) -> None:
    """Give cached memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _default_tokens(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(_TOKENS_CPU, int(_TOKENS_CUDA * min(1.0, free / _TOKENS_CUDA_NEED)))
    return _TOKENS_MPS if device.type == "mps" else _TOKENS_CPU
