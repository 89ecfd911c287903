"""Every name under which scfm stores something in an AnnData object."""

from __future__ import annotations


def embedding(model: str) -> str:
    """Slot of ``obsm`` for the cell embedding of ``model``."""
    return f"X_{model}"


def record(model: str) -> str:
    """Slot of ``uns`` for the record of a run of ``model``."""
    return model


def gene_embedding(model: str) -> str:
    """Slot of ``varm`` for the gene embedding of ``model``."""
    return model


RECOVERED_LAYER = "counts"
RECOVERED_RECORD = "recover_counts"
GENE_MATCH = "scfm_gene"
GENE_MATCH_HOW = "scfm_match"
GENE_MATCH_RECORD = "match_genes"
