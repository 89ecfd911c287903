"""Every name under which scfm stores something in an AnnData object."""

from __future__ import annotations


def embedding(model: str) -> str:
    """Slot of ``obsm`` for the cell embedding of ``model``."""
    return f"X_{model}"


def record(model: str) -> str:
    """Slot of ``uns`` for the record of a run of ``model``."""
    return model


def gene_record(model: str) -> str:
    """Slot of ``uns`` for the record of the gene embeddings of ``model``."""
    return f"{model}_genes"


def reconstruction(model: str) -> str:
    """Layer, or slot of ``obsm``, for the expression that ``model`` predicts; its record in ``uns`` is called alike."""
    return f"{model}_reconstructed"


RECOVERED_LAYER = "counts"
RECOVERED_RECORD = "recover_counts"
GENE_MATCH = "scfm_gene"
GENE_MATCH_HOW = "scfm_match"
GENE_MATCH_RECORD = "match_genes"
COMPARISON = "compare_embeddings"
ENHANCED = "enhanced"
ENRICHMENT = "enrichment"
GENE_SIMILARITY = "gene_similarity"
NETWORK = "gene_network"
TARGETS = "tf_targets"
ACTIVITY = "tf_activity"
CELL_TYPE_GENES = "cell_type_genes"
PROGRAMS = "gene_programs"
GENE_PROGRAM = "gene_program"


def clusters(embedding_name: str) -> str:
    """Column of ``obs`` for the Leiden clusters of an embedding."""
    return f"leiden_{embedding_name}"


def umap(embedding_name: str) -> str:
    """Slot of ``obsm`` for the UMAP of an embedding."""
    return f"X_umap_{embedding_name}"


def depth_share(key: str) -> str:
    """Column of ``obs`` for the counts of each cell as a share of the read depth that was asked for."""
    return f"{key}_depth_share"


def mapped(labels_key: str) -> str:
    """Column of ``obs`` for labels that come from the column ``labels_key`` of a reference; its record in ``uns`` is called alike."""
    return f"{labels_key}_mapped"


def predicted(labels_key: str) -> str:
    """Column of ``obs`` for labels that a model learned from the column ``labels_key`` of a reference."""
    return f"{labels_key}_predicted"


def confidence(key: str) -> str:
    """Column of ``obs`` for the confidence of the labels in the column ``key``."""
    return f"{key}_confidence"


def probabilities(key: str) -> str:
    """Slot of ``obsm`` for the probabilities of the labels in the column ``key``."""
    return f"{key}_proba"


def colors(key: str) -> str:
    """Slot of ``uns`` where Scanpy keeps the colours of the categories in the column ``key``."""
    return f"{key}_colors"


def integrated(model: str) -> str:
    """Slot of ``obsm`` for the embedding in which ``model`` joins batches."""
    return f"X_{model}_integrated"


def integrated_record(model: str) -> str:
    """Slot of ``uns`` for the record of that embedding."""
    return f"{model}_integrated"


def neighbors(key: str) -> str:
    """Slot of ``uns`` for the graph of the cells in the embedding ``key``; those of ``obsp`` begin with it."""
    return f"{key}_neighbors"


def network_of(key: str, condition: str) -> str:
    """Slot of ``varp`` for the network of one of several groups of cells."""
    return f"{key}_{condition.replace('/', '_')}"


def gene_graph(key: str, what: str) -> str:
    """Slot of ``varp`` for the distances or connectivities of the genes behind the programs ``key``."""
    return f"{key}_{what}"


def perturbed(key: str, name: str) -> str:
    """Layer for the expression that is predicted after the perturbation ``name``; HDF5 allows no slash in it."""
    return f"{'perturbed' if key == PERTURB else key}_{name.replace('/', '_')}"


# what the tools for perturbations write into uns
PERTURB = "perturb"
INTERACTIONS = "genetic_interactions"
REVERSE_PERTURB = "reverse_perturb"
ATLAS = "perturbation_atlas"

# what scfm.pp.perturbation_setup writes into uns and obs
PERTURBATION = "perturbation"
PERTURBATION_OF_CELL = "scfm_perturbation"
CONTROL_OF_CELL = "scfm_control"
