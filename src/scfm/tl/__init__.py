"""Tools: functions that compute something with a foundation model and store it in an AnnData object."""

from __future__ import annotations

from ._compare_embeddings import compare_embeddings
from ._embed import embed
from ._gene_embeddings import gene_embeddings
from ._reconstruct import reconstruct

__all__ = ["compare_embeddings", "embed", "gene_embeddings", "reconstruct"]
