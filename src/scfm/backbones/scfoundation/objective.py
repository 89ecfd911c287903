"""Read-depth-aware pre-training: predict a cell from a masked and possibly down-sampled copy of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._tokens import TokenBatch

if TYPE_CHECKING:
    from ...nn.linear_attention import KeyMax
    from . import SCFoundationBackbone
    from .config import SCFoundationConfig

_SCALE = 1e4


@dataclass(frozen=True)
class DownSampling:
    """How often and how strongly cells are thinned; the paper names the family, the constants are a choice.

    Parameters
    ----------
    probability
        Probability that a cell is thinned.
    min_total
        Cells with fewer counts are left alone.
    alpha, beta
        The kept fraction is drawn from a beta distribution with these parameters, and each count from a binomial one
        with this fraction.
    """

    probability: float = 0.5
    min_total: float = 1000.0
    alpha: float = 2.0
    beta: float = 2.0


@dataclass(frozen=True)
class Draws:
    """Everything random about one mini-batch, drawn by :func:`draw` or given by hand.

    Parameters
    ----------
    input_counts
        Counts after down-sampling, shape ``(cells, n_genes)``.
    mask
        True at masked genes, shape ``(cells, n_genes)``.
    shown
        What the decoder sees in place of the values of masked genes (the mask value, a random value or the gene's
        own), shape ``(cells, n_genes)``; entries that are not masked are ignored. ``None`` for the mask value
        everywhere.
    left_out
        True at genes that the encoder has no room for; the decoder sees their values. Shape ``(cells, n_genes)``.
    """

    input_counts: Tensor
    mask: Tensor
    shown: Tensor | None = None
    left_out: Tensor | None = None


@dataclass(frozen=True)
class Corrupted:
    """A mini-batch ready for the network.

    Parameters
    ----------
    tokens
        Tokens for the encoder, and in ``queries`` what only the decoder sees.
    mask
        True where the network is to predict, shape ``(cells, n_genes)``.
    target
        Log-normalised raw counts, shape ``(cells, n_genes)``.
    """

    tokens: TokenBatch
    mask: Tensor
    target: Tensor


@dataclass(frozen=True)
class SCFoundationLoss:
    """Pre-training loss of one mini-batch.

    Parameters
    ----------
    total
        Mean squared error over all masked positions, a scalar; 0 if nothing is masked.
    n_masked
        Number of masked positions.
    """

    total: Tensor
    n_masked: int


def raw_counts(tokens: TokenBatch, config: SCFoundationConfig) -> Tensor:
    """Integer counts ``(cells, n_genes)``, float64, from tokens that were made of counts.

    Raises
    ------
    ValueError
        If the tokens were not made of single-cell counts.
    """
    total = tokens.per_cell.get("total")
    is_gene = tokens.flat_ids < config.n_genes
    cells, genes = tokens.flat_cells[is_gene], tokens.flat_ids[is_gene]
    values = tokens.flat_values[is_gene].double()
    if total is not None:
        counts = torch.expm1(values) * total.double()[cells] / _SCALE
        whole = counts.round()
        out = counts.new_zeros(len(tokens), config.n_genes)
        out[cells, genes] = whole
        exact = ((counts - whole).abs() <= 1e-3 + 1e-5 * counts).all() and torch.allclose(out.sum(1), total.double())
        if bool(exact):
            return out
    msg = (
        "pre-training needs raw counts: tokenise a count matrix with input_type='singlecell' and pre_normalized=False, "
        "for which backbone.tokenize_for_training is a short form"
    )
    raise ValueError(msg)


def log_normalize(counts: Tensor) -> Tensor:
    """``log1p`` of counts per 10,000; rows without counts stay 0."""
    return torch.log1p(counts / counts.sum(1, keepdim=True).clamp(min=1) * _SCALE)


def draw(
    counts: Tensor,
    config: SCFoundationConfig,
    generator: torch.Generator | None = None,
    *,
    down_sampling: DownSampling | None = None,
    mask_only: bool = False,
) -> Draws:
    """Draw down-sampling, mask and what stands at masked places.

    Parameters
    ----------
    counts
        Raw counts ``(cells, n_genes)``.
    config
        Mask probabilities and shares.
    generator
        Source of randomness.
    down_sampling
        Constants of the down-sampling.
    mask_only
        Show the mask value at all masked genes, instead of the shares of the config.
    """
    rule = DownSampling() if down_sampling is None else down_sampling
    seed = torch.randint(2**62, (1,), generator=generator, device="cpu" if generator is None else generator.device)
    rng = np.random.default_rng(int(seed))
    raw = counts.cpu().numpy()

    thinned = (rng.random(len(raw)) < rule.probability) & (raw.sum(1) > rule.min_total)
    fraction = np.where(thinned, rng.beta(rule.alpha, rule.beta, len(raw)), 1.0)
    cells, genes = np.nonzero(raw)
    inputs = np.zeros_like(raw)
    inputs[cells, genes] = rng.binomial(raw[cells, genes].astype(np.int64), fraction[cells])

    expressed = inputs > 0
    mask = rng.random(raw.shape) < np.where(expressed, config.value_mask_prob, config.zero_mask_prob)
    shown = None
    if not mask_only:
        values = log_normalize(torch.from_numpy(inputs)).numpy()
        choice = rng.random(raw.shape)
        random = rng.choice(values[expressed], raw.shape) if expressed.any() else values
        shown = np.where(choice < config.replace_prob + config.random_token_prob, random, values)
        shown = np.where(choice < config.replace_prob, config.mask_value, shown)
    left_out = None
    seen = expressed & ~mask
    room = config.max_encoder_length - 2
    if (seen.sum(1) > room).any():
        keys = np.where(seen, rng.random(raw.shape), 2.0)
        left_out = seen & (keys.argsort(1).argsort(1) >= room)
    parts = (None if part is None else torch.from_numpy(part) for part in (inputs, mask, shown, left_out))
    return Draws(*parts)


def corrupt(raw: Tensor, draws: Draws, config: SCFoundationConfig) -> Corrupted:
    """Build the input of the network from raw counts and draws.

    T is the log10 of the raw and S of the input total. Masked genes never reach the encoder; T and S are never masked.

    Parameters
    ----------
    raw
        Raw counts ``(cells, n_genes)``.
    draws
        Random part.
    config
        Hyper-parameters.
    """
    raw, inputs, mask = raw.double(), draws.input_counts.double(), draws.mask.bool()
    values = log_normalize(inputs)
    shown = torch.full_like(values, config.mask_value) if draws.shown is None else draws.shown.double()
    shown = torch.where(mask, shown, 0)
    hidden = mask
    if draws.left_out is not None:
        hidden = mask | draws.left_out
        shown = torch.where(draws.left_out, values, shown)
    depths = [torch.log10(counts.sum(1, keepdim=True).clamp(min=1)) for counts in (raw, inputs)]
    seen = torch.cat([values.masked_fill(hidden, 0), *depths], 1)
    parts = (TokenBatch(*entries(rows), config.pad_id, config.pad_value) for rows in (seen, shown))
    tokens, queries = parts
    return Corrupted(replace(tokens, queries=queries), mask, log_normalize(raw))


def entries(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, values and offsets of the entries that are not zero."""
    cells, columns = torch.nonzero(rows, as_tuple=True)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(cells, minlength=len(rows)), 0, out=offsets[1:])
    return columns, rows[cells, columns], offsets


def masked_loss(backbone: SCFoundationBackbone, batch: Corrupted, *, key_max: KeyMax = "cell") -> SCFoundationLoss:
    """Squared error at the masked positions of a mini-batch, with gradients if they are enabled."""
    module = backbone.module
    tokens = batch.tokens.to(backbone.device)
    mask, target = batch.mask.to(backbone.device), batch.target.to(backbone.device)
    states = torch.cat(list(module.decode(tokens, module.encode(tokens), key_max=key_max)))
    predicted = module.predict(states[:, : backbone.config.n_genes][mask])
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    errors = (predicted - target[mask].to(predicted.dtype)) ** 2
    n_masked = errors.numel()
    return SCFoundationLoss(errors.sum() / max(1, n_masked), n_masked)


def read_depth_aware_loss(
    backbone: SCFoundationBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    down_sampling: DownSampling | Mapping[str, float] | bool | None = None,
    mask_only: bool = False,
    value_mask_prob: float | None = None,
    zero_mask_prob: float | None = None,
    draws: Draws | None = None,
    key_max: KeyMax = "cell",
    redraw_every: int | None = None,
) -> SCFoundationLoss:
    """Loss of read-depth-aware pre-training (Hao et al. 2024) on one mini-batch.

    A cell is thinned with some probability, some of its genes are masked, and the network predicts the log-normalised
    values that the masked genes have in the raw cell.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Cells as :meth:`SCFoundationBackbone.tokenize_for_training` makes them.
    generator
        Source of randomness, on the CPU.
    down_sampling
        Constants of the down-sampling, also as a mapping; ``False`` for none.
    mask_only
        Show the mask value at all masked genes, instead of a random or the true value at some.
    value_mask_prob, zero_mask_prob
        Probabilities that an expressed and another gene is masked; those of the config by default.
    draws
        The random part, to use instead of drawing it.
    key_max
        ``"batch"`` lets the cells of a mini-batch influence each other through the maximum of the linear attention, as
        in upstream's network.
    redraw_every
        Draw new random features after so many calls, as pre-training from scratch does; ``None`` keeps them.

    Raises
    ------
    ValueError
        If the tokens were not made of counts.
    """
    tokens = tokens.to("cpu")
    if tokens.valid is not None and not bool(tokens.valid.all()):
        tokens = tokens.select(torch.nonzero(tokens.valid).squeeze(1))
    raw = raw_counts(tokens, backbone.config)
    if isinstance(down_sampling, Mapping):
        down_sampling = DownSampling(**down_sampling)
    elif isinstance(down_sampling, bool):
        down_sampling = DownSampling() if down_sampling else DownSampling(probability=0.0)
    if draws is None:
        given = {"value_mask_prob": value_mask_prob, "zero_mask_prob": zero_mask_prob}
        config = replace(backbone.config, **{name: value for name, value in given.items() if value is not None})
        draws = draw(raw, config, generator, down_sampling=down_sampling, mask_only=mask_only)
    if redraw_every is not None:
        backbone.module.count_call(redraw_every, generator)
    return masked_loss(backbone, corrupt(raw, draws, backbone.config), key_max=key_max)
