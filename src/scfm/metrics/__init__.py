"""Evaluation on arrays."""

from __future__ import annotations

from ._annotation import annotation_scores, class_scores, confusion_matrix
from ._chemical import signature_scores
from ._clustering import clustering_agreement, label_silhouette
from ._gene_function import gene_function_scores
from ._integration import batch_silhouette, graph_connectivity, integration_scores
from ._interaction import distance_correlation, genetic_interaction, interaction_magnitude
from ._matched_clustering import matched_clustering_scores
from ._neighbors import clusters_by_bisection, leiden_clusters, neighbor_graph
from ._network import cosine_adjacency, edges_from_matrix, network_scores, similarity_adjacency
from ._perturbation import condition_means, de_quantiles, perturbation_scores
from ._perturbation_identity import de_overlap, discrimination_scores, e_distance
from ._programs import program_recovery
from ._recovery import recovery_scores
from ._regulon_specificity import regulon_specificity
from ._scib import has_scib, scib_scores
from ._transport import kernel_discrepancy, transport_scores

__all__ = [
    "annotation_scores",
    "batch_silhouette",
    "class_scores",
    "clustering_agreement",
    "clusters_by_bisection",
    "condition_means",
    "confusion_matrix",
    "cosine_adjacency",
    "de_overlap",
    "de_quantiles",
    "discrimination_scores",
    "distance_correlation",
    "e_distance",
    "edges_from_matrix",
    "gene_function_scores",
    "genetic_interaction",
    "graph_connectivity",
    "has_scib",
    "integration_scores",
    "interaction_magnitude",
    "kernel_discrepancy",
    "label_silhouette",
    "leiden_clusters",
    "matched_clustering_scores",
    "neighbor_graph",
    "network_scores",
    "perturbation_scores",
    "program_recovery",
    "recovery_scores",
    "regulon_specificity",
    "scib_scores",
    "signature_scores",
    "similarity_adjacency",
    "transport_scores",
]
