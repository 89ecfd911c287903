"""The one inference loop: read blocks, tokenise, make batches of like length, compute, write back in order."""

from __future__ import annotations

from ._options import accepted_options, check_options, is_per_cell
from ._plan import Limits, plan_batches
from ._run import Result, run, visit

__all__ = ["Limits", "Result", "accepted_options", "check_options", "is_per_cell", "plan_batches", "run", "visit"]
