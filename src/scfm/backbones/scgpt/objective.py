"""Pre-training objectives of scGPT: generation from a gene prompt and a cell prompt, and masked values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F

from .generation import two_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .._tokens import TokenBatch
    from . import SCGPTBackbone

RATIOS = (0.25, 0.5, 0.75)
MASKED_RATIO = 0.4

Task = Literal["both", "masked"]


@dataclass(frozen=True)
class SCGPTLoss:
    """Parts of a pre-training loss, scalars; :attr:`total` is their unweighted sum.

    Parameters
    ----------
    gene_prompt
        Squared error of hidden genes, predicted from the known ones.
    cell_decoder
        The same from the cell embedding (GEPC), 0 if the model has no such decoder.
    cell_prompt
        Squared error when the cell embedding replaces ``<cls>``, 0 if switched off.
    """

    gene_prompt: Tensor
    cell_decoder: Tensor
    cell_prompt: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the parts."""
        return self.gene_prompt + self.cell_decoder + self.cell_prompt


def _mean(errors: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen positions of the whole mini-batch; 0 if there is none."""
    return errors.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp(min=1)


def masked_square_error(predicted: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Mean squared error over the positions where ``chosen`` is True; all of shape ``(cells, length)``.

    It is computed in float32 at least, whatever precision the network has.
    """
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    return _mean((predicted - target.to(predicted.dtype)) ** 2, chosen)


def masked_relative_error(predicted: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``|predicted - target| / (target + 1e-6)`` over the chosen positions; for monitoring."""
    target = target.to(predicted.dtype)
    return _mean((predicted - target).abs() / (target + 1e-6), chosen)


def nonzero_negative_log_likelihood(nonzero: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``-log Bernoulli(target > 0 | nonzero)`` over the chosen positions."""
    expressed = (target > 0).to(nonzero.dtype)
    return _mean(F.binary_cross_entropy(nonzero, expressed, reduction="none"), chosen)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Cross-entropy of cosine similarities between two passes over the same cells, each cell being its own class."""
    similarity = F.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1) / temperature
    return F.cross_entropy(similarity, torch.arange(len(first), device=first.device))


def draw_ratio(generator: torch.Generator | None, ratios: Sequence[float] = RATIOS) -> float:
    """One of several shares of genes to generate, all equally likely, for a whole mini-batch."""
    return float(ratios[int(torch.randint(len(ratios), (1,), generator=generator))])


def split_prompt(
    tokens: TokenBatch,
    ratio: float,
    generator: torch.Generator | None = None,
    *,
    max_length: int,
    keys: Tensor | None = None,
) -> TokenBatch:
    """Divide the genes of each cell at random into known genes and queries.

    Parameters
    ----------
    tokens
        All expressed genes of each cell with ``<cls>`` first and one-sided bins (``tie_break="left"``).
    ratio
        Share of genes to generate.
    generator
        Source of the random order.
    max_length
        Tokens per cell over both parts; longer cells are subsampled in each part.
    keys
        One number per token to use instead of random ones; inside a cell, the tokens with the smallest keys become
        queries. The number of ``<cls>`` is ignored.

    Returns
    -------
    Known tokens, with the queries (and their target bins) in ``queries``.
    """
    longest = min(max_length, tokens.max_length)
    query_room = int((longest - 1) * ratio)
    known_room = longest - query_room
    if keys is None:
        keys = torch.rand(len(tokens.flat_ids), generator=generator, dtype=torch.float64)
    first = tokens.offsets[:-1]
    keys = keys.to(torch.float64).clone()
    keys[first] = -torch.inf
    cell = torch.repeat_interleave(torch.arange(len(tokens)), tokens.lengths)
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(cell[order], stable=True)]
    rank = torch.arange(len(order)) - torch.repeat_interleave(first, tokens.lengths) - 1
    n_queries = ((tokens.lengths - 1).double() * ratio).long()[cell]
    is_query = (rank >= 0) & (rank < n_queries) & (rank < query_room)
    is_known = (rank < 0) | ((rank >= n_queries) & (rank - n_queries < known_room - 1))
    queries = replace(_subset(tokens, order, cell, is_query), per_cell={}, valid=None)
    return replace(_subset(tokens, order, cell, is_known), queries=queries)


def subsampled(tokens: TokenBatch, generator: torch.Generator | None = None, *, max_length: int) -> TokenBatch:
    """Cells with at most ``max_length`` tokens: ``<cls>`` and genes that are chosen at random where there are more."""
    if tokens.max_length <= max_length:
        return tokens
    keys = torch.rand(len(tokens.flat_ids), generator=generator, dtype=torch.float64)
    keys[tokens.offsets[:-1]] = -torch.inf
    cell = torch.repeat_interleave(torch.arange(len(tokens)), tokens.lengths)
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(cell[order], stable=True)]
    rank = torch.arange(len(order)) - torch.repeat_interleave(tokens.offsets[:-1], tokens.lengths)
    return _subset(tokens, order, cell, rank < max_length)


def _subset(tokens: TokenBatch, order: Tensor, cell: Tensor, keep: Tensor) -> TokenBatch:
    offsets = torch.zeros_like(tokens.offsets)
    torch.cumsum(torch.bincount(cell[keep], minlength=len(tokens)), 0, out=offsets[1:])
    kept = order[keep]
    return replace(
        tokens,
        flat_ids=tokens.flat_ids[kept],
        flat_values=tokens.flat_values[kept],
        offsets=offsets,
        per_token={key: value[kept] for key, value in tokens.per_token.items()},
    )


def generative_loss(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    ratio: float | Sequence[float] | None = None,
    max_length: int | None = None,
    cell_prompt: bool = True,
) -> SCGPTLoss:
    """Generative pre-training loss of scGPT (Cui et al. 2024), in two passes.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Either divided already (known genes, queries with target bins as values), or all expressed genes of each
        cell, which are then divided by :func:`split_prompt`.
    generator
        Source of the division.
    ratio
        Share of genes to generate, or shares of which one is drawn for a mini-batch; by default 0.25, 0.5 and 0.75.
    max_length
        Tokens per cell over both parts.
    cell_prompt
        Whether to run the second pass; upstream starts it after 1000 steps.

    Raises
    ------
    ValueError
        If a share does not lie between 0 and 1.
    """
    if tokens.queries is None:
        if ratio is None or not isinstance(ratio, (int, float)):
            ratio = draw_ratio(generator, RATIOS if ratio is None else ratio)
        _check_share(ratio)
        cpu = tokens.to("cpu")
        tokens = split_prompt(cpu, ratio, generator, max_length=max_length or backbone.config.max_length)
    tokens = tokens.to(backbone.device)
    module, context = backbone.module, backbone._context(tokens)
    query_context = backbone._context(tokens, queries=True)
    target, chosen = tokens.queries.values, ~tokens.queries.padding
    known, queries, _, query_genes = two_streams(backbone, tokens)
    cells = known[:, 0]
    zero = cells.new_zeros(())
    gene_prompt = masked_square_error(
        module.decoder(module.with_context(queries, query_context)).values, target, chosen
    )
    from_cell = zero
    decoded = module.decode_from_cells(cells, query_genes, context, query_context)
    if decoded is not None:
        from_cell = masked_square_error(decoded.values, target, chosen)
    second = zero
    if cell_prompt:
        _, queries, _, _ = two_streams(backbone, tokens, cells.detach())
        second = masked_square_error(module.decoder(module.with_context(queries, query_context)).values, target, chosen)
    return SCGPTLoss(gene_prompt, from_cell, second)


def masked_loss(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    ratio: float = MASKED_RATIO,
    max_length: int | None = None,
    mask: Tensor | None = None,
) -> SCGPTLoss:
    """Masked-value loss: values of random genes are hidden and predicted from all tokens.

    This is upstream's ``training_tasks="pcpt"``.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Expressed genes of each cell with ``<cls>`` first.
    generator
        Source of the mask.
    ratio
        Probability that a gene is masked; ``<cls>`` never is.
    max_length
        Tokens per cell; genes of longer cells are chosen at random. All are used by default.
    mask
        True at tokens to mask, one entry for each token of the ragged batch, instead of a random mask.

    Raises
    ------
    ValueError
        If the probability does not lie between 0 and 1.
    """
    _check_share(ratio)
    if mask is None:
        if max_length is not None:
            tokens = subsampled(tokens.to("cpu"), generator, max_length=max_length)
        mask = torch.rand(len(tokens.flat_ids), generator=generator) < ratio
        mask[tokens.offsets[:-1].cpu()] = False
    tokens = tokens.to(backbone.device)
    mask = mask.to(tokens.device)
    hidden_values = tokens.flat_values.masked_fill(mask, backbone.config.mask_value)
    out = backbone.forward(replace(tokens, flat_values=hidden_values))
    chosen = tokens.padded(mask, fill=False)
    from_cell = out.cells.new_zeros(())
    if out.cell_expression is not None:
        from_cell = masked_square_error(out.cell_expression.values, tokens.values, chosen)
    return SCGPTLoss(
        masked_square_error(out.expression.values, tokens.values, chosen), from_cell, out.cells.new_zeros(())
    )


def pretraining_loss(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    task: Task | None = None,
    ratio: float | Sequence[float] | None = None,
    max_length: int | None = None,
    cell_prompt: bool | None = None,
) -> SCGPTLoss:
    """Loss of one of the pre-training tasks of scGPT on one mini-batch.

    Parameters
    ----------
    backbone
        The model.
    tokens
        Cells as :meth:`SCGPTBackbone.tokenize_for_training` makes them.
    generator
        Source of randomness, on the CPU.
    task
        ``"both"`` generates genes from a gene prompt and a cell prompt (:func:`generative_loss`), ``"masked"`` predicts
        hidden values from all genes (:func:`masked_loss`, ``training_tasks="pcpt"`` of upstream). By default
        ``"both"``, but ``"masked"`` for networks without a flag of queries, which cannot generate.
    ratio
        Share of genes to generate, or shares of which one is drawn (0.25, 0.5 and 0.75 by default); for ``"masked"``
        the probability that a gene is masked (0.4 by default).
    max_length
        Tokens per cell; genes of longer cells are chosen at random. That of the config by default.
    cell_prompt
        Whether genes are generated from the cell embedding, too; by default they are. For ``"both"`` only.

    Raises
    ------
    ValueError
        If the task is unknown or has no such option, or a share does not lie between 0 and 1.
    """
    if task is None:
        task = "both" if backbone.config.query_flag or tokens.queries is not None else "masked"
    max_length = backbone.config.max_length if max_length is None else max_length
    if task == "both":
        prompt = cell_prompt is None or cell_prompt
        return generative_loss(backbone, tokens, generator, ratio=ratio, max_length=max_length, cell_prompt=prompt)
    if task != "masked":
        msg = f"task must be one of {', '.join(map(repr, get_args(Task)))}; got {task!r}"
        raise ValueError(msg)
    if cell_prompt or not isinstance(ratio, (int, float, type(None))):
        msg = "cell_prompt and several ratios belong to task='both'; task='masked' has one ratio"
        raise ValueError(msg)
    ratio = MASKED_RATIO if ratio is None else ratio
    return masked_loss(backbone, tokens, generator, ratio=ratio, max_length=max_length)


def _check_share(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        msg = f"ratio must lie between 0 and 1; got {ratio}"
        raise ValueError(msg)
