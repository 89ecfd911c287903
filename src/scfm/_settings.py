"""The settings object; every field can be set by an environment variable."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from . import _logging

Device = str
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}
_PRECISIONS = ("auto", "float32", "bfloat16", "float16", "float64")


def _env_flag(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    msg = f"environment variable {name}={text!r} is neither yes nor no; use 1 or 0"
    raise ValueError(msg)


def _env_int(name: str, default: int | None) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        msg = f"environment variable {name}={text!r} is not a whole number"
        raise ValueError(msg) from None


def _default_cache() -> Path:
    if path := os.environ.get("SCFM_CACHE"):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "scfm"


@dataclass
class Settings:
    """Package-wide defaults, read by every function whose own argument is left at its default.

    Parameters
    ----------
    verbosity
        0 errors, 1 warnings, 2 progress and results, 3 details. Environment: ``SCFM_VERBOSITY``.
    cachedir
        Where checkpoints are kept. Environment: ``SCFM_CACHE``.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device string. Environment: ``SCFM_DEVICE``.
    precision
        ``"auto"`` (float32 on CPU and MPS, bfloat16 on CUDA), ``"float32"``, ``"bfloat16"``,
        ``"float16"`` or ``"float64"``. Environment: ``SCFM_PRECISION``.
    batch_size
        Largest number of cells in one forward pass; ``None`` leaves it to the token budget of the engine.
        Environment: ``SCFM_BATCH_SIZE``.
    offline
        Never touch the network. Environment: ``SCFM_OFFLINE``.
    accept_licenses
        Download weights whose licence is non-commercial or not stated. Environment: ``SCFM_ACCEPT_LICENSES``.

    Examples
    --------
    >>> import scfm
    >>> scfm.settings.verbosity = 1
    """

    verbosity: int = field(default_factory=lambda: _env_int("SCFM_VERBOSITY", 2))
    cachedir: Path = field(default_factory=_default_cache)
    device: Device = field(default_factory=lambda: os.environ.get("SCFM_DEVICE", "auto"))
    precision: Precision = field(default_factory=lambda: os.environ.get("SCFM_PRECISION", "auto"))
    batch_size: int | None = field(default_factory=lambda: _env_int("SCFM_BATCH_SIZE", None))
    offline: bool = field(default_factory=lambda: _env_flag("SCFM_OFFLINE"))
    accept_licenses: bool = field(default_factory=lambda: _env_flag("SCFM_ACCEPT_LICENSES"))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in {f.name for f in fields(self)}:
            msg = f"scfm.settings has no field {name!r}; fields are {', '.join(f.name for f in fields(self))}"
            raise AttributeError(msg)
        if name == "cachedir":
            value = Path(value).expanduser()
        if name == "precision" and value not in _PRECISIONS:
            msg = f"precision must be one of {', '.join(_PRECISIONS)}; got {value!r}"
            raise ValueError(msg)
        if name == "batch_size" and value is not None and (not isinstance(value, int) or value < 1):
            msg = f"batch_size must be None or a positive whole number; got {value!r}"
            raise ValueError(msg)
        if name == "verbosity":
            _logging.set_verbosity(value)
        object.__setattr__(self, name, value)


settings = Settings()
