"""Where a network is and which floating-point type its weights have."""

from __future__ import annotations

from typing import get_args

import torch

from .._logging import warning
from .._settings import Precision, settings
from ..nn.cpu_speed import matmul_gain

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# a gain in speed below this one is a loss
_WORTH_IT = 0.9


def resolve_device(device: str = "auto") -> torch.device:
    """Turn ``"auto"`` into CUDA, MPS or CPU; check that a named device exists."""
    if device == "auto":
        device = settings.device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        msg = f"unknown device {device!r}; use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' ..."
        raise ValueError(msg) from None
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(resolved.type)
    if available is not None and not available():
        msg = f"device {device!r} was asked for, but torch sees no such device here; use device='cpu' or 'auto'"
        raise ValueError(msg)
    return resolved


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Turn a precision name into a torch type; ``"auto"`` is float32 except on CUDA (bfloat16)."""
    if precision not in get_args(Precision):
        msg = f"unknown precision {precision!r}; use one of {', '.join(get_args(Precision))}"
        raise ValueError(msg)
    if precision == "auto":
        precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return _DTYPES[precision]


def warn_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    """Say so when a CPU multiplies matrices in reduced precision slower than in float32, as those without AMX may."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return
    gain = matmul_gain(dtype)
    if gain < _WORTH_IT:
        name = str(dtype).removeprefix("torch.")
        warning(
            f"{name} halves the memory of the weights, but this CPU multiplies matrices {1 / gain:.1f} times slower in "
            f"it than in float32; use precision='float32' for speed"
        )
