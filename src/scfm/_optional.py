"""Import of optional dependencies, with the pip command in the error."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._errors import MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

_EXTRAS = {
    "arboreto": "grnboost",
    "bbknn": "bbknn",
    "dask": "dask",
    "decoupler": "regulators",
    "faiss": "faiss",
    "flash_attn": "flash-attn",
    "gseapy": "enrichment",
    "harmonypy": "harmony",
    "peft": "lora",
    "performer_pytorch": "performer",
    "rdkit": "chem",
    "scdataset": "streaming",
    "scib_metrics": "benchmark",
}


def require(module: str, *, purpose: str) -> ModuleType:
    """Import ``module``, or say which extra of scfm installs it.

    Parameters
    ----------
    module
        Import name, for example ``"scib_metrics"``.
    purpose
        What the module is needed for; becomes the start of the error message.

    Raises
    ------
    MissingExtraError
        If the module cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(module.partition(".")[0])
        command = f"pip install 'scfm[{extra}]'" if extra else f"pip install {module}"
        msg = f"{purpose} needs the optional package {module!r}. Install it with: {command}"
        raise MissingExtraError(msg) from error
