"""Tools: functions that compute something with a foundation model and store it in an AnnData object."""

from __future__ import annotations

from ._embed import embed

__all__ = ["embed"]
