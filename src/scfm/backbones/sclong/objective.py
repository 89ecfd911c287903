"""Pre-training of scLong: predict the values of some expressed genes, most of which are masked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import wide

if TYPE_CHECKING:
    from ...nn.linear_attention import KeyMax
    from .._tokens import TokenBatch
    from . import SCLongBackbone
    from .config import SCLongConfig
    from .module import TieBreak


@dataclass(frozen=True)
class Draws:
    """Everything random about one mini-batch, drawn by :func:`draw` or given by hand.

    Parameters
    ----------
    targets
        True at tokens whose value is to be predicted, shape ``(tokens,)``.
    replaced
        True at those of them that are masked, shape ``(tokens,)``.
    """

    targets: Tensor
    replaced: Tensor


@dataclass(frozen=True)
class SCLongLoss:
    """Pre-training loss of one mini-batch.

    Parameters
    ----------
    total
        Mean squared error over all targets, a scalar; 0 if there are none.
    n_targets
        Number of targets.
    """

    total: Tensor
    n_targets: int


def n_targets(n_expressed: Tensor, share: float) -> Tensor:
    """Number of targets of cells with so many expressed genes: the share, rounded up, all in float32.

    As in the authors' code, 100 genes have 16 targets at a share of 0.15, because the product is a little above 15.
    """
    return torch.ceil(n_expressed.to(torch.float32) * torch.tensor(share, dtype=torch.float32)).to(torch.int64)


def draw(tokens: TokenBatch, config: SCLongConfig, generator: torch.Generator | None = None) -> Draws:
    """Draw targets among the tokens of each cell, all equally likely, and which of them are masked."""
    keys, chance = torch.rand(2, len(tokens.flat_ids), generator=generator, dtype=torch.float64)
    cells = tokens.flat_cells
    order = torch.argsort(keys + cells)  # each cell in a random order
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    targets = place - tokens.offsets[cells] < n_targets(tokens.lengths, config.target_share)[cells]
    return Draws(targets, targets & (chance < config.replace_prob))


def masked_value_loss(
    backbone: SCLongBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    draws: Draws | None = None,
    target_share: float | None = None,
    replace_prob: float | None = None,
    key_max: KeyMax = "cell",
    tie_break: TieBreak = "index",
    redraw_every: int | None = None,
) -> SCLongLoss:
    """Loss of pre-training (Bai et al. 2026) on one mini-batch.

    A share of the expressed genes of each cell is to be predicted. Most of them are masked, the others keep their value.
    Masked genes never are among those with the highest values, so they go through the mini encoder.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Cells without masked values.
    generator
        Source of randomness, on the CPU.
    draws
        The random part, to use instead of drawing it.
    target_share, replace_prob
        Share of the expressed genes to predict, and probability that one of them is masked; those of the config by
        default. The paper masks all of them, which is ``replace_prob=1``.
    key_max
        ``"batch"`` lets the cells of a mini-batch influence each other through the maximum of the linear attention, as
        in upstream's network.
    tie_break
        Which of the genes with equal values go through the large encoder.
    redraw_every
        Draw new random features after so many calls; ``config.redraw_every`` if the network is in training mode, never
        otherwise.

    Raises
    ------
    ValueError
        If values are masked already.
    """
    tokens = tokens.to("cpu")
    if tokens.valid is not None and not bool(tokens.valid.all()):
        tokens = tokens.select(torch.nonzero(tokens.valid).squeeze(1))
    module, config = backbone.module, backbone.config
    if bool((tokens.flat_values < 0).any()):
        msg = "pre-training masks values itself; the tokens hold negative values"
        raise ValueError(msg)
    if draws is None:
        given = {"target_share": target_share, "replace_prob": replace_prob}
        shares = replace(config, **{name: value for name, value in given.items() if value is not None})
        draws = draw(tokens, shares, generator)
    if redraw_every is None and module.training:
        redraw_every = config.redraw_every
    if redraw_every is not None:
        module.count_call(redraw_every, generator)
    device, targets = backbone.device, draws.targets
    shown = replace(tokens, flat_values=tokens.flat_values.masked_fill(draws.replaced, config.mask_value))
    states = module(shown.to(device), key_max=key_max, tie_break=tie_break)
    predicted = module.predict(states[tokens.flat_cells[targets].to(device), tokens.flat_ids[targets].to(device)])
    predicted = predicted.to(wide(predicted.dtype))
    errors = (predicted - tokens.flat_values[targets].to(predicted)) ** 2
    return SCLongLoss(errors.sum() / max(1, errors.numel()), errors.numel())
