"""Pre-training of CellFM: predict hidden genes from the others, and all of them from the CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._tokens import TokenBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import CellFMBackbone
    from .config import CellFMConfig
    from .module import CellFM

_SCALE = 1e4
_TINY_PROBABILITY = 1e-12

Sums = Literal["masked", "all"]


@dataclass(frozen=True)
class DownSampling:
    """How often and how strongly cells are thinned.

    Parameters
    ----------
    probability
        Probability that a cell is thinned.
    alpha, beta
        The kept fraction is drawn from a beta distribution with these parameters, and each count from a binomial one
        with this fraction; no expressed gene is lost.
    """

    probability: float = 0.5
    alpha: float = 2.0
    beta: float = 2.0


@dataclass(frozen=True)
class Draws:
    """Everything random about one mini-batch, drawn by :func:`draw` or given by hand.

    Parameters
    ----------
    hidden
        True where the value is not shown, for each token and, behind those of its cell, each sampled zero.
    in_loss
        True where the network is to predict, in the same order.
    input_counts
        Counts of the tokens after down-sampling, shape ``(tokens,)``; ``None`` for the counts themselves.
    thinned
        Whether a cell was down-sampled, shape ``(cells,)``; ``None`` for none.
    zeros
        Sampled genes without expression; ``None`` for none.
    """

    hidden: Tensor
    in_loss: Tensor
    input_counts: Tensor | None = None
    thinned: Tensor | None = None
    zeros: TokenBatch | None = None


@dataclass(frozen=True)
class Corrupted:
    """A mini-batch ready for the network.

    Parameters
    ----------
    tokens
        Genes and their values as the network gets them.
    hidden, in_loss
        True at tokens whose value is not shown, and at those to predict.
    target
        Values to predict, ``log1p`` of counts per 10,000 of the raw cell.
    unexpressed
        True at sampled genes without expression; ``None`` if there are none.
    depths
        ``log1p`` of the input total S and the raw total T in thousands, shape ``(cells, 2)``; ``None`` for models
        without depth tokens.
    """

    tokens: TokenBatch
    hidden: Tensor
    in_loss: Tensor
    target: Tensor
    unexpressed: Tensor | None = None
    depths: Tensor | None = None

    def to(self, device: torch.device) -> Corrupted:
        """Move all tensors to ``device``."""
        names = ("tokens", "hidden", "in_loss", "target", "unexpressed", "depths")
        parts = {name: getattr(self, name) for name in names}
        return Corrupted(**{name: None if part is None else part.to(device) for name, part in parts.items()})


@dataclass(frozen=True)
class CellFMLoss:
    """Pre-training loss of one mini-batch.

    Parameters
    ----------
    total
        Sum of all terms, a scalar.
    genes, cells
        Mean squared errors of the gene-wise and the cell-wise decoder.
    zeros_genes, zeros_cells
        Cross entropies of "is expressed"; ``None`` without zero heads.
    similarity
        Elastic cell similarity; ``None`` if it was not asked for.
    n_in_loss
        Number of positions to predict.
    cell_states
        States of CLS, ``(cells, dim)``, with gradients if they are enabled, for heads that are trained along.
    """

    total: Tensor
    genes: Tensor
    cells: Tensor
    zeros_genes: Tensor | None
    zeros_cells: Tensor | None
    similarity: Tensor | None
    n_in_loss: int
    cell_states: Tensor


# -- corruption ----------------------------------------------------------------------------------------------------------


def raw_counts(tokens: TokenBatch) -> Tensor:
    """Integer counts of tokens that were made of counts, float64, shape ``(tokens,)``.

    Raises
    ------
    ValueError
        If the tokens were not made of counts.
    """
    total = tokens.per_cell.get("total")
    if total is not None and "panel" not in tokens.per_cell:
        counts = torch.expm1(tokens.flat_values.double()) * total.double()[tokens.flat_cells] / _SCALE
        whole = counts.round()
        sums = whole.new_zeros(len(tokens)).index_add(0, tokens.flat_cells, whole)
        exact = (counts - whole).abs() <= 1e-3 + 1e-5 * counts
        if bool(exact.all()) and bool((sums <= total.double() + 0.5).all()):
            return whole
    msg = (
        "pre-training needs raw counts: tokenise a count matrix with pre_normalized=False and include_zeros=False, for "
        "which backbone.tokenize_for_training is a short form"
    )
    raise ValueError(msg)


def draw(
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    mask_ratio: float,
    hidden_share: float,
    down_sampling: DownSampling | None = None,
    zero_length: int | None = None,
) -> Draws:
    """Draw what is hidden, the down-sampling and sampled zeros.

    Of ``n`` expressed genes ``int(mask_ratio * n)`` are predicted and of these the share ``hidden_share`` is hidden; if
    that makes none, all are predicted and none is hidden. Of sampled zeros as many as the ratio of the smaller of both
    numbers are hidden, and the share of these is predicted.

    Parameters
    ----------
    tokens
        Cells made of counts; ``queries`` has the known genes that a cell does not express if zeros are to be sampled.
    generator
        Source of randomness.
    mask_ratio, hidden_share
        See above.
    down_sampling
        Constants of the down-sampling; ``None`` for none.
    zero_length
        Add so many unexpressed genes that cells have this length; ``None`` for none.
    """
    seed = torch.randint(2**62, (1,), generator=generator, device="cpu" if generator is None else generator.device)
    rng = np.random.default_rng(int(seed))
    lengths = tokens.lengths.numpy()
    rank, cell = _random_ranks(lengths, rng), tokens.flat_cells.numpy()
    n_masked = np.floor(mask_ratio * lengths).astype(np.int64)
    n_hidden = np.floor(hidden_share * n_masked).astype(np.int64)
    hidden = rank < n_hidden[cell]
    in_loss = (rank < n_masked[cell]) | (n_masked == 0)[cell]

    counts, thinned = None, None
    if down_sampling is not None:
        thinned = rng.random(len(lengths)) < down_sampling.probability
        fraction = np.where(thinned, rng.beta(down_sampling.alpha, down_sampling.beta, len(lengths)), 1.0)
        kept = rng.binomial(raw_counts(tokens).numpy().astype(np.int64), fraction[cell])
        counts, thinned = torch.from_numpy(np.maximum(kept, 1).astype(np.float64)), torch.from_numpy(thinned)
    if zero_length is None:
        return Draws(torch.from_numpy(hidden), torch.from_numpy(in_loss), counts, thinned)

    if tokens.queries is None:
        msg = "zeros cannot be sampled from these tokens; make them with with_unexpressed=True"
        raise ValueError(msg)
    room = np.maximum(zero_length - lengths, 0)
    others = tokens.queries
    chosen = _random_ranks(others.lengths.numpy(), rng) < room[others.flat_cells.numpy()]
    zeros = _subset(others, torch.from_numpy(chosen))
    rank, zero_cell = _random_ranks(zeros.lengths.numpy(), rng), zeros.flat_cells.numpy()
    n_hidden = np.floor(mask_ratio * np.minimum(lengths, room)).astype(np.int64)
    n_masked = np.floor(hidden_share * n_hidden).astype(np.int64)
    order = np.argsort(np.concatenate([cell, zero_cell]), kind="stable")
    hidden = np.concatenate([hidden, rank < n_hidden[zero_cell]])[order]
    in_loss = np.concatenate([in_loss, rank < n_masked[zero_cell]])[order]
    return Draws(torch.from_numpy(hidden), torch.from_numpy(in_loss), counts, thinned, zeros)


def _random_ranks(lengths: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of the members of each cell: the place of each, cell after cell."""
    cell = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((rng.random(len(cell)), cell))
    ranks = np.empty(len(cell), dtype=np.int64)
    ranks[order] = np.arange(len(cell)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ranks


def _subset(tokens: TokenBatch, keep: Tensor) -> TokenBatch:
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])[tokens.offsets]
    return replace(tokens, flat_ids=tokens.flat_ids[keep], flat_values=tokens.flat_values[keep], offsets=offsets)


def corrupt(tokens: TokenBatch, draws: Draws, config: CellFMConfig) -> Corrupted:
    """Build the input of the network from cells made of counts, and draws."""
    raw, total = raw_counts(tokens), tokens.per_cell["total"].double()
    counts = raw if draws.input_counts is None else draws.input_counts.double()
    source = total
    if draws.thinned is not None:
        source = torch.where(draws.thinned, total.new_zeros(len(tokens)).index_add(0, tokens.flat_cells, counts), total)
    cell = tokens.flat_cells
    values = torch.log1p(counts / source[cell] * _SCALE).float()
    target = torch.log1p(raw / total[cell] * _SCALE).float()
    inputs = TokenBatch(tokens.flat_ids, values, tokens.offsets, tokens.pad_id, tokens.pad_value)
    unexpressed = None
    if draws.zeros is not None:
        order = torch.cat([cell, draws.zeros.flat_cells]).argsort(stable=True)
        zeros = draws.zeros.flat_values.new_zeros(len(draws.zeros.flat_ids))
        unexpressed = torch.cat([torch.zeros_like(cell, dtype=torch.bool), zeros == 0])[order]
        target = torch.cat([target, zeros])[order]
        inputs = replace(
            inputs,
            flat_ids=torch.cat([tokens.flat_ids, draws.zeros.flat_ids])[order],
            flat_values=torch.cat([values, zeros])[order],
            offsets=tokens.offsets + draws.zeros.offsets,
        )
    depths = torch.log1p(torch.stack([source, total], 1) / 1000).float() if config.has_depth_tokens else None
    return Corrupted(inputs, draws.hidden, draws.in_loss, target, unexpressed, depths)


# -- loss ----------------------------------------------------------------------------------------------------------------


def masked_loss(
    module: CellFM,
    batch: Corrupted,
    *,
    zeros_over: Sums = "masked",
    similarity: float | None = None,
    padded_length: int | None = None,
) -> CellFMLoss:
    """Loss of a mini-batch, with gradients if they are enabled.

    Parameters
    ----------
    module
        The network.
    batch
        Corrupted cells.
    zeros_over
        Whether the cross entropies of the zero heads are summed over the positions in the loss, or as upstream over all
        positions, while both divide by the number in the loss.
    similarity
        Threshold of the elastic cell similarity; ``None`` for no such term. Upstream compares the cell-wise predictions
        of two cells position by position, whichever genes stand there.
    padded_length
        Length to which upstream pads; its padding takes part in the similarity.
    """
    batch = batch.to(module.mask_embedding.device)
    # a new batch has no cached tensors that were made in inference mode
    tokens, weights = replace(batch.tokens), batch.in_loss.float()
    sequences = module.sequences(
        tokens,
        "cls" if batch.depths is None else "depths",
        hidden=batch.hidden,
        unexpressed=batch.unexpressed,
        depths=batch.depths,
    )
    states = module.encode(sequences)
    cells, genes = states[sequences.first], states[sequences.genes]
    rows = module.gene_embedding(tokens.flat_ids)
    n_in_loss = weights.sum()

    def mean(errors: Tensor) -> Tensor:
        return errors.sum() / n_in_loss.clamp_min(1)

    def from_cell(queries: Tensor) -> Tensor:
        return (queries * cells[tokens.flat_cells]).sum(-1).float()

    predicted = module.predict_genes(genes).float(), from_cell(module.cell_decoder.queries(rows))
    parts = [mean(weights * (values - batch.target) ** 2) for values in predicted]
    zero_parts: list[Tensor | None] = [None, None]
    if batch.unexpressed is not None and module.config.has_zero_heads:
        expressed = (~batch.unexpressed).float()
        probabilities = (
            module.gene_decoder.expressed(genes).float(),
            torch.sigmoid(from_cell(module.cell_decoder.zero_head(rows))),
        )
        chosen = weights if zeros_over == "masked" else torch.ones_like(weights)
        zero_parts = [mean(chosen * _cross_entropy(p, expressed)) for p in probabilities]
    alike = None
    if similarity is not None:
        behind = cells @ module.cell_decoder.queries(module.gene_embedding.weight[0])
        alike = _similarity(predicted[1], tokens, similarity, behind.float(), padded_length)
    total = sum(part for part in (*parts, *zero_parts, alike) if part is not None)
    return CellFMLoss(total, *parts, *zero_parts, alike, int(n_in_loss), cells)


def _cross_entropy(probability: Tensor, truth: Tensor) -> Tensor:
    chosen = truth * probability + (1 - truth) * (1 - probability)
    return -chosen.clamp(_TINY_PROBABILITY, 1).log()


def _similarity(
    predicted: Tensor, tokens: TokenBatch, threshold: float, padding: Tensor, padded_length: int | None
) -> Tensor:
    """Mean over all pairs of cells of ``1 - (relu(cos) - threshold)^2``, the diagonal taken as 0."""
    place = torch.arange(len(predicted), device=predicted.device) - tokens.offsets[:-1][tokens.flat_cells]
    if padded_length is None:
        rows = predicted.new_zeros(len(tokens), tokens.max_length)
    else:
        rows = padding[:, None].repeat(1, max(padded_length, tokens.max_length))
    rows = rows.index_put((tokens.flat_cells, place), predicted)
    rows = F.normalize(rows, dim=1)
    cosine = (rows @ rows.T) * (1 - torch.eye(len(rows), device=rows.device))
    return torch.mean(1 - (F.relu(cosine) - threshold) ** 2)


def pretraining_loss(
    backbone: CellFMBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    mask_ratio: float | None = None,
    down_sampling: DownSampling | Mapping[str, float] | bool | None = None,
    zero_length: int | None = None,
    zeros_over: Sums = "masked",
    similarity: float | None = None,
    padded_length: int | None = None,
    draws: Draws | Corrupted | None = None,
) -> CellFMLoss:
    """Loss of pre-training (Zeng et al. 2025) on one mini-batch.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Cells as :meth:`CellFMBackbone.tokenize_for_training` makes them.
    generator
        Source of randomness, on the CPU.
    mask_ratio
        Share of the expressed genes to predict; that of the config by default.
    down_sampling
        Whether cells are thinned, or how; by default if the model has depth tokens.
    zero_length
        Add so many unexpressed genes that cells have this length (``pad_zero=False`` of upstream).
    zeros_over, similarity, padded_length
        See :func:`masked_loss`.
    draws
        The random part, to use instead of drawing it, or the cells as the network is to get them.

    Raises
    ------
    UnsupportedError
        If the file of the model has no decoders.
    ValueError
        If the tokens were not made of counts, ``zeros_over`` is unknown, or the model cannot sample zeros.
    """
    for decoder in ("gene", "cell"):
        backbone.need_decoder(decoder)
    if zeros_over not in get_args(Sums):
        msg = f"zeros_over must be one of {', '.join(map(repr, get_args(Sums)))}; got {zeros_over!r}"
        raise ValueError(msg)
    if zero_length is not None and not backbone.config.has_zero_embedding:
        msg = (
            f"{backbone.name} has no embedding of genes without expression, so that none can be sampled; leave "
            "zero_length out, or rebuild it with has_zero_embedding=True (scfm.backbones.rebuilt)"
        )
        raise ValueError(msg)
    tokens = tokens.to("cpu")
    if tokens.valid is not None and not bool(tokens.valid.all()):
        tokens = tokens.select(torch.nonzero(tokens.valid).squeeze(1))
    config = backbone.config
    if isinstance(down_sampling, Mapping):
        down_sampling = DownSampling(**down_sampling)
    elif not isinstance(down_sampling, DownSampling):
        wanted = config.has_depth_tokens if down_sampling is None else down_sampling
        down_sampling = DownSampling() if wanted else None
    if draws is None:
        draws = draw(
            tokens,
            generator,
            mask_ratio=config.mask_ratio if mask_ratio is None else mask_ratio,
            hidden_share=config.hidden_share,
            down_sampling=down_sampling,
            zero_length=zero_length,
        )
    return masked_loss(
        backbone.module,
        draws if isinstance(draws, Corrupted) else corrupt(tokens, draws, config),
        zeros_over=zeros_over,
        similarity=similarity,
        padded_length=padded_length,
    )
