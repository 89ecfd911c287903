"""How many rows of a long matrix to work on at a time, so that what lies between two products stays in the caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# on an accelerator launches should be few, and there is memory for this many numbers
ACCELERATOR_STEP = 1 << 27
MIN_ROWS = 64


def rows_per_step(x: Tensor, width: int, per_thread: int) -> int:
    """Rows of ``x`` in one step.

    Parameters
    ----------
    x
        Its device decides.
    width
        Numbers that each row has in the widest tensor of the step.
    per_thread
        Numbers that this tensor may have on a CPU, for each thread.
    """
    numbers = per_thread * torch.get_num_threads() if x.device.type == "cpu" else ACCELERATOR_STEP
    return max(MIN_ROWS, numbers // width // MIN_ROWS * MIN_ROWS)
