"""Attention maps that the linear attention of the three Performers implies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...nn.ranks import rank_normalize
from .config import STACKS

if TYPE_CHECKING:
    from torch import Tensor

    from ...nn.performer import PerformerLayer, PerformerStack
    from .._tokens import TokenBatch
    from .module import SCLong, TieBreak

# numbers in the weights of all heads that are in memory together
_STEP = 1 << 25


def attention_map(
    module: SCLong,
    tokens: TokenBatch,
    layer: int,
    *,
    kind: str,
    places: Tensor | None,
    average_heads: bool,
    average_layers: bool,
    rank: bool,
    upstream_compat: bool,
    tie_break: TieBreak,
) -> Tensor:
    """Attention weights; see ``SCLongBackbone.attention``.

    Raises
    ------
    ValueError
        If there is no such stack or layer, or the whole map of a stack other than the large one is asked for.
    """
    if kind not in STACKS:
        msg = f"kind must be one of {', '.join(STACKS)}; got {kind!r}"
        raise ValueError(msg)
    stack: PerformerStack = getattr(module, kind)
    if not -len(stack.layers) <= layer < len(stack.layers):
        msg = f"the {kind} stack of this model has layers 0 to {len(stack.layers) - 1}; got {layer}"
        raise ValueError(msg)
    if kind != "large" and places is None:
        msg = f"the map of the {kind} stack has thousands of genes squared; choose some with genes=[...]"
        raise ValueError(msg)
    wanted = range(len(stack.layers)) if average_layers else [layer % len(stack.layers)]
    size = module.config.top_length if places is None else len(places)
    heads = () if average_heads else (stack.layers[0].heads,)
    out = torch.zeros(len(tokens), *heads, size, size, device=tokens.device)
    for i, target in enumerate(out):
        x, rows = _input(module, tokens.select(slice(i, i + 1)), kind, places, tie_break)
        there = torch.nonzero(rows >= 0).squeeze(1)
        part = target if len(there) == size else torch.zeros(*heads, len(there), len(there), device=tokens.device)
        for number, block in enumerate(stack.layers[: wanted[-1] + 1]):
            if number in wanted:
                seen = _after_attention(block, x) if upstream_compat else x
                _add_map(part, block, seen, rows[there], average_heads=average_heads, rank=rank)
            if number < wanted[-1]:
                sums = block.key_sums(x)
                block.update_(x, sums, sums.maximum.amax())
        part /= len(wanted)
        if part is not target:
            target.fill_(torch.nan)
            target[..., there[:, None], there] = part
    return out


def _input(
    module: SCLong, cell: TokenBatch, kind: str, places: Tensor | None, tie_break: TieBreak
) -> tuple[Tensor, Tensor]:
    """Input of a stack for one cell, and the row in it of each wanted position (-1 where it has none)."""
    n = module.config.n_positions
    if kind == "decoder":
        return module.merge(module.encode(cell, tie_break=tie_break))[0], places
    split = module.split(cell, tie_break)
    positions = (split.top if kind == "large" else split.rest)[0]
    x = module.embed_tokens(cell)[0, positions]
    rows = torch.full((n,), -1, device=x.device)
    rows[positions] = torch.arange(len(positions), device=x.device)
    return module.large_input(x) if kind == "large" else x, rows[positions if places is None else places]


def _after_attention(block: PerformerLayer, x: Tensor) -> Tensor:
    """The stream between the two halves of a layer, on which upstream evaluates the map a second time."""
    x = x.clone()
    sums = block.key_sums(x)
    block.attend_(x, sums, sums.maximum.amax())
    return x


def _add_map(out: Tensor, block: PerformerLayer, x: Tensor, rows: Tensor, *, average_heads: bool, rank: bool) -> None:
    """Add the weights among some rows to ``out``, some queries at a time."""
    first = 0
    for weights in block.iter_attention_map(x, rows, max(1, _STEP // max(1, block.heads * len(rows)))):
        some = rank_normalize(weights) if rank else weights.float()
        last = first + some.shape[1]
        out[..., first:last, :] += some.mean(0) if average_heads else some
        first = last
