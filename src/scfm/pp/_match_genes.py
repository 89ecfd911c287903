"""``scfm.pp.match_genes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _keys, _logging
from ..genes import AliasTable, GeneVocab, resolve_gene_names

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from ..backbones import Backbone

_FEW = 0.5


def match_genes(
    adata: AnnData,
    model: str | Path | Backbone | GeneVocab,
    *,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: AliasTable | str | Path | pd.DataFrame | bool | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Show which genes of the data a model knows, and under which name.

    Genes are looked up by symbol, then by Ensembl id, then by previous or alias symbol; see
    :meth:`scfm.genes.GeneVocab.match` for the rules. ``scfm.tl`` functions do the same by themselves; this function
    is for looking at the result before.

    Parameters
    ----------
    adata
        Annotated data.
    model
        Name of a model, directory of a checkpoint, loaded model, or vocabulary.
    gene_symbols
        Column of ``adata.var`` with gene symbols. By default ``adata.var_names``; if those are Ensembl ids or numbers,
        the first of ``feature_name``, ``gene_name``, ``gene_symbols``, ``gene_symbol`` that exists.
    gene_ids
        Column of ``adata.var`` with Ensembl ids. By default the first of ``gene_ids``, ``ensembl_id``, ``feature_id``,
        ``gene_id``, ``ensembl_gene_id`` that holds human ones, else ``adata.var_names`` if they do.
    aliases
        Table of previous and alias symbols, see :meth:`scfm.genes.AliasTable.read`. By default
        ``hgnc_complete_set.txt`` in ``scfm.settings.cachedir`` if it is there; ``False`` uses none.
    key_added
        Name under which results are stored instead of the default names.
    copy
        Work on a copy and return it.

    Returns
    -------
    ``None``, or the copy. Sets the following fields:

    ``adata.var['scfm_gene' | key_added]``
        Name in the model's vocabulary; empty for genes that it lacks.
    ``adata.var['scfm_match' | key_added + '_how']``
        ``symbol``, ``ensembl``, ``alias`` or missing (categorical).
    ``adata.uns['match_genes' | key_added]``
        Counts of matched genes, and the parameters.

    Raises
    ------
    KeyError
        If ``gene_symbols`` or ``gene_ids`` is not a column.
    ValueError
        If the model knows none of the genes.

    Examples
    --------
    >>> import scanpy as sc, scfm
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> scfm.settings.verbosity = 1
    >>> scfm.pp.match_genes(adata, scfm.genes.GeneVocab(["CD3E", "LYZ"]))
    >>> adata.var["scfm_match"].value_counts().to_dict()
    {'symbol': 2, 'ensembl': 0, 'alias': 0}
    """
    adata = adata.copy() if copy else adata
    name, vocab = _vocab_of(model)
    found = resolve_gene_names(adata.var, gene_symbols, gene_ids)
    table = AliasTable.resolve(aliases)
    match = vocab.match(found.symbols, ensembl_ids=found.ensembl_ids, aliases=table)
    match.require_any(name)

    if match.fraction < _FEW:
        _logging.warning(" ".join(part for part in (match.summary() + ".", match.hint) if part))
    else:
        _logging.info(match.summary())

    how = np.where(match.how == "", None, match.how)
    adata.var[key_added or _keys.GENE_MATCH] = match.vocab_names
    adata.var[f"{key_added}_how" if key_added else _keys.GENE_MATCH_HOW] = pd.Categorical(
        how, categories=["symbol", "ensembl", "alias"]
    )
    adata.uns[key_added or _keys.GENE_MATCH_RECORD] = {
        "model": name,
        "n_genes": len(match),
        "n_matched": match.n_matched,
        "n_vocabulary": vocab.n_genes,
        "n_vocabulary_covered": match.n_vocab_covered,
        "n_sharing_an_entry": sum(map(len, match.duplicated.values())),
        "gene_symbols": found.symbols_from,
        "gene_ids": found.ids_from or "",
        "aliases": "" if table is None else repr(table),
    }
    return adata if copy else None


def _vocab_of(model: str | Path | Backbone | GeneVocab) -> tuple[str, GeneVocab]:
    if isinstance(model, GeneVocab):
        return "the vocabulary", model
    if hasattr(model, "vocab"):
        return model.name, model.vocab
    from ..backbones import load_vocab

    return str(model), load_vocab(model)
