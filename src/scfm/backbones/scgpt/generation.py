"""Generation of expression values with the two-stream network of pre-training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from .._tokens import TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

    from . import SCGPTBackbone
    from .heads import Decoded

Confidence = Literal["value", "dropout", "zeros"]


def two_streams(
    backbone: SCGPTBackbone, tokens: TokenBatch, cell_embeddings: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the known genes and the query genes of ``tokens`` through the network (spec of generative pre-training).

    Parameters
    ----------
    backbone
        A checkpoint with the query flag (all released pre-trained ones).
    tokens
        Known genes, with query genes in ``tokens.queries``.
    cell_embeddings
        If given, takes the place of position 0 before the first layer (the cell prompt), ``(cells, dim)``.

    Returns
    -------
    States of known and of query tokens, and gene embeddings of known and of query tokens.
    """
    module = backbone.module
    if module.query_flag is None:
        msg = "this checkpoint has no query flag, so it was not trained to generate; use decode_cells"
        raise ValueError(msg)
    if tokens.queries is None:
        msg = "no genes to generate: give tokens.queries, for example with backbone.batch(..., query_genes=...)"
        raise ValueError(msg)
    known_genes, known, padding = backbone._inputs(tokens)
    query_genes = module.embed_genes(tokens.queries.ids)
    if cell_embeddings is not None:
        known = torch.cat([cell_embeddings.to(known).unsqueeze(1), known[:, 1:]], 1)
    known, queries = module.encode_with_queries(known, query_genes + module.query_flag.weight[1], padding)
    return known, queries, known_genes, query_genes


def generate(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    *,
    steps: int = 1,
    confidence: Confidence | None = None,
    cell_embeddings: Tensor | None = None,
    n_samples: int = 8,
    rng: int = 0,
) -> Tensor:
    """Values of the query genes of each cell, ``(cells, max_queries)``, NaN at padded positions.

    Parameters
    ----------
    backbone
        A checkpoint with the query flag.
    tokens
        Known genes, with query genes in ``tokens.queries``.
    steps
        With 1, all queries are predicted at once, as upstream does. With more, each step moves the most confident
        share of the remaining queries into the known set, with the predicted value. The paper describes such
        iterations but no code of it exists; the order used here is scfm's own.
    confidence
        What makes a prediction confident: ``"value"`` (the largest predicted values first), ``"dropout"`` (smallest
        variance over ``n_samples`` passes with dropout) or ``"zeros"`` (``max(p, 1 - p)`` of P(non-zero); the default
        for models with explicit zeros).
    cell_embeddings
        Generate from these instead of the model's own cell state (the cell prompt), ``(cells, dim)``.
    n_samples, rng
        Passes and seed of ``confidence="dropout"``.
    """
    if steps < 1:
        msg = f"steps must be at least 1; got {steps}"
        raise ValueError(msg)
    confidence = confidence or ("zeros" if backbone.config.explicit_zeros else "value")
    if confidence not in ("value", "dropout", "zeros"):
        msg = f"confidence must be 'value', 'dropout' or 'zeros'; got {confidence!r}"
        raise ValueError(msg)
    if confidence == "zeros" and not backbone.config.explicit_zeros:
        msg = "confidence='zeros' needs a model with explicit zeros"
        raise ValueError(msg)
    tokens = tokens.to(backbone.device)
    if tokens.queries is None:
        msg = "no genes to generate: give tokens.queries, for example with backbone.batch(..., query_genes=...)"
        raise ValueError(msg)
    if steps > 1 and tokens.per_token:
        msg = "generation in steps takes modalities from the vocabulary (set_modalities); give no modalities= to batch"
        raise ValueError(msg)
    ids, waiting = tokens.queries.ids, ~tokens.queries.padding
    values = torch.full(ids.shape, torch.nan, device=ids.device, dtype=backbone.dtype)
    for step in range(steps):
        predicted = _predict(backbone, tokens, cell_embeddings)
        here = torch.full_like(values, torch.nan)
        here[waiting] = predicted.values[~tokens.queries.padding]
        if step == steps - 1:
            return torch.where(waiting, here, values)
        score = _confidence(backbone, tokens, predicted, cell_embeddings, confidence, n_samples, rng + step)
        ranked = torch.full(ids.shape, -math.inf, device=ids.device)
        ranked[waiting] = score[~tokens.queries.padding].to(ranked)
        quota = torch.ceil(waiting.sum(1) / (steps - step))
        rank = torch.argsort(torch.argsort(ranked, dim=1, descending=True, stable=True), dim=1)
        moved = waiting & (rank < quota[:, None])
        values = torch.where(moved, here, values)
        waiting = waiting & ~moved
        tokens = _move(backbone, tokens, ids, here, moved, waiting)
        if not bool(waiting.any()):
            break
    return values


def _predict(backbone: SCGPTBackbone, tokens: TokenBatch, cell_embeddings: Tensor | None) -> Decoded:
    _, queries, _, _ = two_streams(backbone, tokens, cell_embeddings)
    return backbone.module.decoder(backbone.module.with_context(queries, backbone._context(tokens, queries=True)))


def _confidence(
    backbone: SCGPTBackbone,
    tokens: TokenBatch,
    predicted: Decoded,
    cell_embeddings: Tensor | None,
    confidence: Confidence,
    n_samples: int,
    seed: int,
) -> Tensor:
    if confidence == "value":
        return predicted.values
    if confidence == "zeros":
        return torch.maximum(predicted.nonzero, 1 - predicted.nonzero)
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        backbone.module.train()
        try:
            samples = [_predict(backbone, tokens, cell_embeddings).values for _ in range(n_samples)]
        finally:
            backbone.module.eval()
    return -torch.stack(samples).var(0)


def _move(
    backbone: SCGPTBackbone, tokens: TokenBatch, ids: Tensor, predicted: Tensor, moved: Tensor, waiting: Tensor
) -> TokenBatch:
    """Tokens in which some queries have become known genes with their predicted (clamped) value."""
    clamped = predicted.nan_to_num().clamp(0, backbone.config.n_bins - 1).to(tokens.values.dtype)
    known = TokenBatch.from_padded(
        torch.cat([tokens.ids, ids], 1),
        torch.cat([tokens.values, clamped], 1),
        pad_id=tokens.pad_id,
        pad_value=tokens.pad_value,
        padding=torch.cat([tokens.padding, ~moved], 1),
    )
    queries = TokenBatch.from_padded(ids, clamped, pad_id=tokens.pad_id, pad_value=tokens.pad_value, padding=~waiting)
    return replace(known, per_cell=tokens.per_cell, queries=queries, valid=tokens.valid)
