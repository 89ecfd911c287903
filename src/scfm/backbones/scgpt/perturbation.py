"""Responses to perturbations as scGPT predicts them: each gene carries a flag that says whether it is perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from .tokenizer import bin_uniforms, bin_values

if TYPE_CHECKING:
    from torch import Tensor

    from . import SCGPTBackbone

Genes = Literal["all", "batch-wise"]


@dataclass(frozen=True)
class ResponseLoss:
    """Loss of a mini-batch of responses.

    Parameters
    ----------
    total
        What is minimised.
    gep
        Mean squared error of the values decoded from the states of genes.
    gepc
        The same of values decoded from the state at the first position; 0 for networks without this decoder.
    """

    total: Tensor
    gep: Tensor
    gepc: Tensor


def responses(backbone: SCGPTBackbone, ids: Tensor, values: Tensor, flags: Tensor) -> tuple[Tensor, Tensor | None]:
    """Expression after perturbations, with gradients if they are enabled.

    There is no ``<cls>`` and no padding: all genes of the matrix take part, expressed or not. Genes that the vocabulary lacks
    have the vector of ``<pad>`` and take part, too, as upstream.

    Parameters
    ----------
    backbone
        A network with flags.
    ids
        Vocabulary ids of the genes, ``(genes,)``.
    values
        Log-normalised expression of control cells, ``(cells, genes)``.
    flags
        Flag of each gene, 1 where it is perturbed and 0 elsewhere, int64, ``(cells, genes)``.

    Returns
    -------
    Predictions from the states of genes, ``(cells, genes)``, and those from the first position if there is such a decoder.
    """
    module = backbone.module
    genes = module.embed_genes(ids)
    bins = backbone.config.input_bins
    embedded = module.embed_values(_binned(ids, values, bins) if bins else values)
    x = (genes * embedded if backbone.config.value_style == "scaling" else genes + embedded) + module.flags(flags)
    hidden = module.encode(module.normalize_input(x, None), None)
    predicted = module.decoder(hidden, values=values).values
    from_cell = None
    if module.mvc is not None:
        from_cell = module.decode_from_cells(hidden[:, 0], genes[None], None).values
    return predicted, from_cell


def _binned(ids: Tensor, values: Tensor, n_bins: int) -> Tensor:
    """Quantile bins of the values of each cell; ties are broken by random numbers that the cell's content gives."""
    cells = sparse.csr_matrix(values.detach().float().cpu().numpy())
    filled = np.flatnonzero(np.diff(cells.indptr))
    if len(filled):
        offsets = np.append(cells.indptr[filled], cells.nnz)
        uniform = bin_uniforms(ids.cpu().numpy()[cells.indices], cells.data, offsets, 0)
        cells.data = bin_values(cells.data, offsets, n_bins, uniform)[0].astype(np.float32)
    return torch.from_numpy(cells.toarray()).to(values)


def response_loss(
    backbone: SCGPTBackbone,
    ids: Tensor,
    values: Tensor,
    flags: Tensor,
    observed: Tensor,
    *,
    gepc_weight: float = 0.0,
) -> ResponseLoss:
    """Mean squared error over all genes, expressed or not.

    Parameters
    ----------
    backbone, ids, values, flags
        As in :func:`responses`.
    observed
        Expression of perturbed cells, ``(cells, genes)``.
    gepc_weight
        Weight of the values decoded from the first position; the authors train without them.
    """
    predicted, from_cell = responses(backbone, ids, values, flags)
    gep = F.mse_loss(predicted, observed)
    gepc = torch.zeros_like(gep) if from_cell is None else F.mse_loss(from_cell, observed)
    return ResponseLoss(gep + gepc_weight * gepc if gepc_weight else gep, gep, gepc)


@torch.inference_mode()
def predict_responses(
    backbone: SCGPTBackbone, ids: Tensor, values: Tensor, flags: Tensor, *, genes: Genes = "all"
) -> Tensor:
    """Predicted expression, float32, ``(cells, genes)``.

    Parameters
    ----------
    backbone, ids, values, flags
        As in :func:`responses`.
    genes
        ``"all"``, or upstream's ``"batch-wise"``: genes that none of the given cells expresses are left out and predicted as 0,
        so that numbers depend on which cells are given together.

    Raises
    ------
    ValueError
        If ``genes`` is another word.
    """
    if genes not in ("all", "batch-wise"):
        msg = f"genes must be 'all' or 'batch-wise'; got {genes!r}"
        raise ValueError(msg)
    if genes == "all":
        return responses(backbone, ids, values, flags)[0].float()
    some = torch.nonzero((values != 0).any(0)).squeeze(1)
    out = torch.zeros(values.shape, device=values.device)
    if len(some):
        out[:, some] = responses(backbone, ids[some], values[:, some], flags[:, some])[0].float()
    return out
