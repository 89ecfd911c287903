"""Pickles of plain values and tensors, read without running code from them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from io import BytesIO
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read(path: Path) -> Any:
    """Content of a file that holds a pickle of plain values, containers of them and tensors.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    CheckpointError
        If it is damaged, or holds anything else; the message names what.
    """
    with path.open("rb") as file:
        try:
            return _Unpickler(file).load()
        except CheckpointError as error:
            msg = f"{path}: {error}"
            raise CheckpointError(msg) from error
        except Exception as error:
            # an unpickler that meets damaged input fails in every possible way
            msg = f"{path} is no pickle of plain values and tensors, or it is damaged ({type(error).__name__}: {error})"
            raise CheckpointError(msg) from error


def _storage(content: bytes) -> Any:
    """The storage of a pickled tensor, which is a file of its own inside the pickle."""
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Unpickler(pickle.Unpickler):
    """Knows the three globals that a pickled tensor consists of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            msg = (
                f"the pickle asks for {module}.{name}, which scfm does not run; only tensors and plain values are read"
            )
            raise CheckpointError(msg)
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        msg = "the pickle refers to something outside of itself, which scfm does not look up"
        raise CheckpointError(msg)
