"""Token batches: the ragged form in which cells travel from a tokenizer to a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate ``arange(start, start + length)`` over all pairs, without a loop."""
    total = int(lengths.sum())
    before = torch.cumsum(lengths, 0) - lengths
    return torch.arange(total, device=starts.device) + torch.repeat_interleave(starts - before, lengths)


# what is kept must serve training later, although inference may have been first to ask for it
_kept = torch.inference_mode(mode=False)


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of several cells, stored without padding.

    Parameters
    ----------
    flat_ids
        Vocabulary ids (int64) of all tokens, cell after cell, shape ``(tokens,)``.
    flat_values
        The expression channel of the same tokens (floating point), shape ``(tokens,)``.
    offsets
        Cell ``i`` owns tokens ``offsets[i]:offsets[i + 1]``, shape ``(cells + 1,)``.
    pad_id, pad_value
        What :attr:`ids` and :attr:`values` hold at padded positions.
    per_cell
        What else the model needs for each cell (batch labels, read depth ...), each of shape ``(cells, ...)``.
    per_token
        What else it needs for each token, each of shape ``(tokens,)``.
    queries
        Positions the encoder does not see but the model is to predict, as a second ragged set over the same cells.
    valid
        False for cells that have no token the model could use; their outputs are NaN. ``None`` means all are valid.
    """

    flat_ids: Tensor
    flat_values: Tensor
    offsets: Tensor
    pad_id: int
    pad_value: float
    per_cell: Mapping[str, Tensor] = field(default_factory=dict)
    queries: TokenBatch | None = None
    valid: Tensor | None = None
    per_token: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self)

    @cached_property
    @_kept
    def lengths(self) -> Tensor:
        """Number of tokens of each cell, shape ``(cells,)``."""
        return torch.diff(self.offsets)

    @cached_property
    @_kept
    def flat_cells(self) -> Tensor:
        """Number of the cell that each token belongs to, shape ``(tokens,)``."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.device), self.lengths)

    @property
    def max_length(self) -> int:
        """Length of the longest cell."""
        return int(self.lengths.max()) if len(self) else 0

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.flat_ids.device

    @cached_property
    def is_rectangular(self) -> bool:
        """Whether all cells have the same length, so that no padding exists."""
        return len(self) < 2 or bool((self.lengths == self.lengths[0]).all())

    def padded(self, flat: Tensor, fill: float) -> Tensor:
        """Lay out something about each token, ``(tokens,)``, right-padded with ``fill`` as ``(cells, max_length)``."""
        if self.is_rectangular:
            return flat.view(len(self), -1) if len(self) else flat.new_empty(0, 0)
        out = flat.new_full((len(self), self.max_length), fill)
        out[~self.padding] = flat
        return out

    @cached_property
    @_kept
    def padding(self) -> Tensor:
        """True at padded positions, shape ``(cells, max_length)``."""
        return torch.arange(self.max_length, device=self.device) >= self.lengths[:, None]

    @cached_property
    @_kept
    def ids(self) -> Tensor:
        """Vocabulary ids, right-padded with ``pad_id``, shape ``(cells, max_length)``."""
        return self.padded(self.flat_ids, self.pad_id)

    @cached_property
    @_kept
    def values(self) -> Tensor:
        """Expression channel, right-padded with ``pad_value``, shape ``(cells, max_length)``."""
        return self.padded(self.flat_values, self.pad_value)

    def select(self, cells: Tensor | np.ndarray | Sequence[int] | slice) -> TokenBatch:
        """Take cells, in the order given."""
        if isinstance(cells, slice):
            cells = np.arange(*cells.indices(len(self)))
        cells = torch.as_tensor(np.asarray(cells), dtype=torch.int64, device=self.device)
        lengths = self.lengths[cells]
        where = _ranges(self.offsets[cells], lengths)
        offsets = torch.zeros(len(cells) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return replace(
            self,
            flat_ids=self.flat_ids[where],
            flat_values=self.flat_values[where],
            offsets=offsets,
            per_cell={key: value[cells] for key, value in self.per_cell.items()},
            queries=None if self.queries is None else self.queries.select(cells),
            valid=None if self.valid is None else self.valid[cells],
            per_token={key: value[where] for key, value in self.per_token.items()},
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """Move all tensors to ``device``."""
        if torch.device(device) == self.device:
            return self
        move = {"device": device, "non_blocking": True}
        return replace(
            self,
            flat_ids=self.flat_ids.to(**move),
            flat_values=_float32_if_needed(self.flat_values, device).to(**move),
            offsets=self.offsets.to(**move),
            per_cell={key: _float32_if_needed(value, device).to(**move) for key, value in self.per_cell.items()},
            queries=None if self.queries is None else self.queries.to(device),
            valid=None if self.valid is None else self.valid.to(**move),
            per_token={key: _float32_if_needed(value, device).to(**move) for key, value in self.per_token.items()},
        )

    @classmethod
    def from_padded(
        cls,
        ids: Tensor,
        values: Tensor,
        *,
        pad_id: int,
        pad_value: float,
        padding: Tensor | None = None,
        per_token: Mapping[str, Tensor] | None = None,
        **parts: object,
    ) -> TokenBatch:
        """Build a batch from padded arrays of shape ``(cells, length)``.

        ``padding`` is True at positions to leave out; by default these are the positions whose id is ``pad_id``. Entries
        of ``per_token`` are of the same shape.
        """
        ids, values = torch.as_tensor(ids), torch.as_tensor(values)
        if ids.shape != values.shape or ids.ndim != 2:
            msg = (
                f"ids and values must both have shape (cells, length); got {tuple(ids.shape)} and {tuple(values.shape)}"
            )
            raise ValueError(msg)
        keep = ids != pad_id if padding is None else ~torch.as_tensor(padding, dtype=torch.bool)
        offsets = torch.zeros(len(ids) + 1, dtype=torch.int64, device=ids.device)
        torch.cumsum(keep.sum(1), 0, out=offsets[1:])
        flat_values = values[keep]
        if not flat_values.is_floating_point():
            flat_values = flat_values.to(torch.float32)
        parts["per_token"] = {key: torch.as_tensor(value)[keep] for key, value in (per_token or {}).items()}
        return cls(ids[keep].to(torch.int64), flat_values, offsets, pad_id, pad_value, **parts)


def _float32_if_needed(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Metal has no float64."""
    if torch.device(device).type == "mps" and tensor.dtype == torch.float64:
        return tensor.to(torch.float32)
    return tensor
