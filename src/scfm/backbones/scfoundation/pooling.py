"""From encoder states to one vector per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .._tokens import TokenBatch
    from .config import SCFoundationConfig

POOLINGS = ("all", "max", "S", "T", "gene_max", "gene_mean")
_PARTS_OF_ALL = ("S", "T", "gene_max", "gene_mean")


def pool(tokens: TokenBatch, hidden: Tensor, pooling: str, config: SCFoundationConfig) -> Tensor:
    """Cell vectors ``(cells, dim)`` from encoder states ``(tokens, dim)``, float32 or better.

    T and S are found by their position id. What a cell lacks is NaN: S and T where they have no token, maximum and mean
    where no gene has.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "all":
        return torch.cat([_part(tokens, hidden, part, config) for part in _PARTS_OF_ALL], 1)
    return _part(tokens, hidden, pooling, config)


def _part(tokens: TokenBatch, hidden: Tensor, part: str, config: SCFoundationConfig) -> Tensor:
    cells = tokens.flat_cells
    if part in ("S", "T"):
        chosen = tokens.flat_ids == (config.source_id if part == "S" else config.target_id)
        missing = hidden.new_full((len(tokens), hidden.shape[1]), torch.nan)
        return missing.index_copy(0, cells[chosen], hidden[chosen])
    if part == "max":
        return _reduce(hidden, tokens.lengths, "max")
    is_gene = tokens.flat_ids < config.n_genes
    lengths = torch.bincount(cells[is_gene], minlength=len(tokens))
    return _reduce(hidden[is_gene], lengths, "max" if part == "gene_max" else "mean")


def _reduce(hidden: Tensor, lengths: Tensor, how: str) -> Tensor:
    if hidden.device.type == "mps":  # segment_reduce has no kernel there
        return _reduce(hidden.cpu(), lengths.cpu(), how).to(hidden.device)
    pooled = torch.segment_reduce(hidden, how, lengths=lengths, axis=0)
    return torch.where((lengths > 0)[:, None], pooled, torch.nan)
