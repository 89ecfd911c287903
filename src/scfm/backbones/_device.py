"""Where a network is and which floating-point type its weights have."""

from __future__ import annotations

from typing import get_args

import torch

from .._settings import Precision, settings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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
