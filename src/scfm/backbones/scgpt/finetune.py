"""Fine-tuning of scGPT without labels of cells: masked values, cell similarity and adversarial batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .objective import masked_square_error, nonzero_negative_log_likelihood

if TYPE_CHECKING:
    from torch import Tensor

    from .._tokens import TokenBatch
    from . import SCGPTBackbone
    from .heads import Decoded


@dataclass(frozen=True)
class FineTuneLoss:
    """Parts of the fine-tuning loss with their weights, each averaged over the mini-batch; 0 for those left out.

    Parameters
    ----------
    gep
        Squared error of the masked values, predicted from the tokens (gene expression prediction).
    gep_zero
        Negative log-likelihood of whether the masked values are zero, of models with explicit zeros.
    gepc, gepc_zero
        The same, predicted from the cell embedding.
    ecs
        Elastic cell similarity loss.
    dar
        Cross entropy of the batch classifier whose gradient reaches the encoder with the sign reversed.
    """

    gep: Tensor
    gep_zero: Tensor
    gepc: Tensor
    gepc_zero: Tensor
    ecs: Tensor
    dar: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the parts."""
        return self.gep + self.gep_zero + self.gepc + self.gepc_zero + self.ecs + self.dar


def random_mask(
    tokens: TokenBatch,
    ratio: float = 0.4,
    generator: torch.Generator | None = None,
    *,
    first: bool = False,
    keys: Tensor | None = None,
) -> Tensor:
    """Choose tokens whose value is hidden: of the ``m`` tokens of a cell ``int(ratio * m)``, without replacement.

    Parameters
    ----------
    tokens
        Tokens with ``<cls>`` first.
    ratio
        Share of the tokens of each cell.
    generator
        Source of the choice.
    first
        Whether ``<cls>`` takes part, as upstream has it unless its value is that of padding. It then counts in the
        loss with its own value as the target.
    keys
        One number per token to use instead of random ones; those with the smallest are masked.

    Returns
    -------
    True at masked tokens, shape ``(tokens,)``, on the CPU.

    Raises
    ------
    ValueError
        If ``ratio`` is not between 0 and 1.
    """
    if not 0 <= ratio <= 1:
        msg = f"the share of masked values must lie between 0 and 1; got {ratio}"
        raise ValueError(msg)
    tokens = tokens.to("cpu")
    if keys is None:
        keys = torch.rand(len(tokens.flat_ids), generator=generator, dtype=torch.float64)
    open_to = torch.ones(len(tokens.flat_ids), dtype=torch.bool)
    starts = tokens.offsets[:-1][tokens.lengths > 0]
    open_to[starts] = (tokens.flat_values[starts] != tokens.pad_value) if first else False
    cell = tokens.flat_cells
    n_open = torch.zeros(len(tokens), dtype=torch.int64).index_add_(0, cell, open_to.long())
    quota = (n_open.double() * ratio).long()
    # tokens ordered by cell and, within it, by key, with those that stay as they are at the end
    order = torch.argsort(keys.double().masked_fill(~open_to, torch.inf), stable=True)
    order = order[torch.argsort(cell[order], stable=True)]
    rank = torch.arange(len(order)) - tokens.offsets[:-1][cell]
    mask = torch.empty(len(order), dtype=torch.bool)
    mask[order] = rank < quota[cell]
    return mask


def finetune_loss(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    generator: torch.Generator | None = None,
    *,
    mask_ratio: float = 0.4,
    mask: Tensor | None = None,
    mask_cls: bool = False,
    gepc: bool = True,
    ecs_weight: float = 10.0,
    dar_weight: float = 1.0,
) -> FineTuneLoss:
    """Fine-tuning loss of scGPT for the integration of batches and of modalities (Cui et al. 2024).

    The defaults are those of batch integration; integration of modalities has ``ecs_weight=0``. With per-batch
    normalisation, each batch in the mini-batch is normalised by itself, padded positions included as upstream has it.

    Parameters
    ----------
    backbone
        The model. Its network has to be in training mode for dropout and the statistics of batches.
    tokens
        Tokens with their true bins and ``<cls>`` first, with batch labels if the model has any.
    generator
        Source of the mask.
    mask_ratio
        Share of the tokens of each cell whose value is hidden, see :func:`random_mask`.
    mask
        True at tokens to mask, ``(tokens,)``, instead of a random mask.
    mask_cls
        Whether ``<cls>`` can be masked, as in upstream's own training.
    gepc
        Whether values are predicted from the cell embedding, too.
    ecs_weight, dar_weight
        Weights of cell similarity and of the batch classifier; 0 leaves the part out.

    Raises
    ------
    ValueError
        If batch labels are needed and missing, or ``mask`` has another length than the tokens.
    """
    if mask is None:
        mask = random_mask(tokens, mask_ratio, generator, first=mask_cls)
    elif mask.shape != tokens.flat_ids.shape:
        msg = f"mask must have one entry for each of {len(tokens.flat_ids)} tokens; got shape {tuple(mask.shape)}"
        raise ValueError(msg)
    tokens = tokens.to(backbone.device)
    mask = mask.to(tokens.device, torch.bool)
    shown = tokens.flat_values.masked_fill(mask, backbone.config.mask_value)
    out = backbone.forward(replace(tokens, flat_values=shown))
    chosen, target = tokens.padded(mask, fill=False), tokens.values
    zero = out.cells.new_zeros(())
    gep, gep_zero = _errors(out.expression, target, chosen)
    from_cell = (zero, zero)
    if gepc and out.cell_expression is not None:
        from_cell = _errors(out.cell_expression, target, chosen)
    dar = zero
    if dar_weight and out.batch_logits is not None:
        if "batch" not in tokens.per_cell:
            msg = "the batch of each cell is needed to train the batch classifier; pass batch_labels or dar_weight=0"
            raise ValueError(msg)
        dar = dar_weight * F.cross_entropy(out.batch_logits, tokens.per_cell["batch"])
    ecs = ecs_weight * out.similarity_loss if ecs_weight else zero
    return FineTuneLoss(gep, gep_zero, *from_cell, ecs, dar)


def _errors(decoded: Decoded, target: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of values and negative log-likelihood of zeros at the chosen positions."""
    # mixed precision offers no logarithm of probabilities
    with torch.autocast(target.device.type, enabled=False):
        kind = torch.promote_types(decoded.values.dtype, torch.float32)
        error = masked_square_error(decoded.values.to(kind), target, chosen)
        if decoded.nonzero is None:
            return error, error.new_zeros(())
        return error, nonzero_negative_log_likelihood(decoded.nonzero.to(kind), target, chosen)
