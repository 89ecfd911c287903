"""Tools: functions that compute something with a foundation model and store it in an AnnData object."""

from __future__ import annotations

from ._annotate import annotate
from ._cell_type_genes import cell_type_genes
from ._compare_embeddings import compare_embeddings
from ._embed import embed
from ._enhance import enhance
from ._enrichment import enrichment
from ._gene_embeddings import gene_embeddings
from ._gene_network import gene_network
from ._gene_programs import gene_programs
from ._gene_similarity import gene_similarity
from ._genetic_interactions import genetic_interactions
from ._integrate import integrate
from ._map_to_reference import map_to_reference
from ._perturb import perturb
from ._perturbation_atlas import perturbation_atlas
from ._reconstruct import reconstruct
from ._reverse_perturb import reverse_perturb
from ._tf_activity import tf_activity, write_adjacencies
from ._tf_targets import tf_targets

__all__ = [
    "annotate",
    "cell_type_genes",
    "compare_embeddings",
    "embed",
    "enhance",
    "enrichment",
    "gene_embeddings",
    "gene_network",
    "gene_programs",
    "gene_similarity",
    "genetic_interactions",
    "integrate",
    "map_to_reference",
    "perturb",
    "perturbation_atlas",
    "reconstruct",
    "reverse_perturb",
    "tf_activity",
    "tf_targets",
    "write_adjacencies",
]
