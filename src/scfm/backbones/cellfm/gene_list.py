"""Gene lists of CellFM, which lie beside the weights, and the vocabularies made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ... import _logging
from ..._errors import CheckpointError
from ..._settings import settings
from ...genes import GeneVocab
from .config import rows_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

PAD = "<pad>"
GENE_LISTS = {rows_for(27855): "expand_gene_info.csv", rows_for(24078): "gene_info.csv"}
WRONG_LIST = "genemap.csv"
_CACHE_FOLDERS = ("cellfm-80m", "cellfm-800m", "cellfm")


def make_vocab(
    path: Path, n_rows: int, genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None
) -> GeneVocab:
    """Genes of a model whose gene table has ``n_rows`` rows; the id of a gene is its row, row 0 is ``"<pad>"``.

    The table has one row more than there are genes, rounded up to a multiple of 8; the rows at its end belong to no
    gene.

    Parameters
    ----------
    path
        The weight file.
    n_rows
        Rows of the gene table.
    genes
        Names, vocabulary or table to use instead of the gene list beside the weights.
    """
    if isinstance(genes, (str, Path)):
        genes = read_table(Path(genes))
    elif genes is None:
        genes = _find_genes(path, n_rows)
    vocab = genes if isinstance(genes, GeneVocab) and PAD in genes.specials else vocab_of(genes)
    if rows_for(vocab.n_genes) != n_rows:
        msg = (
            f"the gene list has {vocab.n_genes:,} names, for which the gene table would have {rows_for(vocab.n_genes):,} "
            f"rows; that in {path} has {n_rows:,}. It belongs to another model."
        )
        raise CheckpointError(msg)
    return vocab


def vocab_of(genes: Sequence[str] | np.ndarray | GeneVocab) -> GeneVocab:
    """Vocabulary with padding in front of the genes."""
    names = genes.genes if isinstance(genes, GeneVocab) else genes
    return GeneVocab([PAD, *names], specials=[PAD])


def _find_genes(path: Path, n_rows: int) -> Sequence[str] | np.ndarray:
    name = GENE_LISTS.get(n_rows)
    if name is not None:
        folders = [path.parent, path.parent.parent, *(settings.cachedir / folder for folder in _CACHE_FOLDERS)]
        for folder in folders:
            if (folder / name).is_file():
                return read_table(folder / name)
        msg = (
            f"the gene list {name} is missing, to which this model with {n_rows:,} rows belongs. It is part of the CellFM "
            f"repository (github.com/biomed-AI/CellFM, folder 'csv'); put it at {folders[0] / name} or pass "
            f"genes=<path>. Looked in: {', '.join(map(str, folders))}"
        )
        raise CheckpointError(msg)
    _logging.warning(
        f"{path.name} is a model with {n_rows:,} rows of genes without names; they are called by their row, 'gene_1', "
        "'gene_2' and so on. Pass genes=[...] to name them."
    )
    return [f"gene_{i}" for i in range(1, n_rows)]


def read_table(path: Path) -> np.ndarray:
    """Names in the column ``HGNC_gene`` of a gene list.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    CheckpointError
        If it is no gene list, or the one that belongs to no model.
    """
    if not path.is_file():
        msg = f"no gene list at {path}"
        raise FileNotFoundError(msg)
    if path.name == WRONG_LIST:
        msg = (
            f"{WRONG_LIST} is a leftover in the CellFM repository that belongs to neither released model, although it "
            f"has almost as many rows; use {' or '.join(GENE_LISTS.values())}"
        )
        raise CheckpointError(msg)
    # "NA" and the like would be gene names here, not missing values
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "HGNC_gene" not in table:
        msg = f"{path} has no column 'HGNC_gene', so it is no gene list of CellFM"
        raise CheckpointError(msg)
    return table["HGNC_gene"].to_numpy()
