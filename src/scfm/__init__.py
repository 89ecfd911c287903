"""Single-cell foundation models for Scanpy users.

One API over scGPT, scFoundation, CellFM and scLong: ``scfm.pp``, ``scfm.tl`` and ``scfm.pl`` work on AnnData like
their namesakes in Scanpy; :func:`scfm.load` gives the network itself.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from ._errors import CheckpointError, LicenseError, MissingExtraError, OfflineError, UnsupportedError
from ._settings import settings

if TYPE_CHECKING:
    from . import baselines, benchmark, checkpoints, genes, metrics, models, pl, pp, tl, train
    from .backbones import Backbone, load

__version__ = version("scfm")

# torch and scanpy are imported when something of theirs is first used, so that `import scfm` stays cheap
_LAZY_MODULES = {"pp", "tl", "pl", "checkpoints", "genes", "metrics", "models", "baselines", "benchmark", "train"}
_LAZY_NAMES = {"load": "backbones", "Backbone": "backbones"}

__all__ = [
    "Backbone",
    "CheckpointError",
    "LicenseError",
    "MissingExtraError",
    "OfflineError",
    "UnsupportedError",
    "__version__",
    "baselines",
    "benchmark",
    "checkpoints",
    "genes",
    "load",
    "metrics",
    "models",
    "pl",
    "pp",
    "settings",
    "tl",
    "train",
]


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _LAZY_NAMES:
        return getattr(import_module(f"{__name__}.{_LAZY_NAMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
