"""Tools: functions that compute something with a foundation model and store it in an AnnData object."""

from __future__ import annotations

from ._annotate import annotate
from ._compare_embeddings import compare_embeddings
from ._embed import embed
from ._enhance import enhance
from ._gene_embeddings import gene_embeddings
from ._integrate import integrate
from ._map_to_reference import map_to_reference
from ._reconstruct import reconstruct

__all__ = [
    "annotate",
    "compare_embeddings",
    "embed",
    "enhance",
    "gene_embeddings",
    "integrate",
    "map_to_reference",
    "reconstruct",
]
