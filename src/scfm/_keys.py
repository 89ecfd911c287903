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


def clusters(embedding_name: str) -> str:
    """Column of ``obs`` for the Leiden clusters of an embedding."""
    return f"leiden_{embedding_name}"


def umap(embedding_name: str) -> str:
    """Slot of ``obsm`` for the UMAP of an embedding."""
    return f"X_umap_{embedding_name}"
