"""Files that ``torch.save`` wrote, read without running code from them."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from .._errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def read(path: Path) -> Any:
    """Tensors and plain values of a file, memory-mapped where its format allows it.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    CheckpointError
        If it is damaged, or holds anything but tensors and plain values.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files in the format before torch 1.6 cannot be mapped
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        msg = (
            f"{path} is damaged, incomplete or holds more than tensors and plain values ({type(error).__name__}); "
            "fetch it again"
        )
        raise CheckpointError(msg) from error
