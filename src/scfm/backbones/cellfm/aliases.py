"""How the authors rename gene symbols, for runs that must repeat theirs.

:class:`scfm.genes.AliasTable` is what :func:`scfm.pp.match_genes` uses. It leaves out names that lead to several
symbols; the authors take the last one that their table lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...genes import GeneVocab


def alias_map(path: str | Path) -> dict[str, str]:
    """Approved symbol of each previous or alias symbol, from an HGNC table (``updated_hgcn.tsv``).

    Previous symbols go before alias symbols, later rows before earlier ones; approved symbols are never renamed.

    Parameters
    ----------
    path
        Tab-separated table whose second column holds approved symbols, with the columns ``Status``,
        ``Previous symbols`` and ``Alias symbols``.
    """
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    table = table[table["Status"] == "Approved"]
    approved = table.iloc[:, 1]
    out: dict[str, str] = {}
    for column in ("Alias symbols", "Previous symbols"):
        pairs = pd.DataFrame({"name": table[column].str.split(", "), "symbol": approved}).explode("name")
        pairs = pairs[(pairs["name"] != "") & ~pairs["name"].isin(set(approved))]
        out |= dict(zip(pairs["name"], pairs["symbol"], strict=True))
    return out


def notebook_names(genes: Sequence[str] | np.ndarray, vocab: GeneVocab, aliases: Mapping[str, str]) -> np.ndarray:
    """Names after the rule of the authors' notebook ``process.ipynb``; names that nothing is known of stay.

    Symbols that are not in the vocabulary are taken in sorted order and renamed unless another gene has the new name.

    Parameters
    ----------
    genes
        Symbols of the data.
    vocab
        Genes of the model.
    aliases
        Result of :func:`alias_map`.
    """
    genes = np.asarray(genes, dtype=object)
    new = dict(zip(genes, genes, strict=True))
    taken = set(genes)
    for name in sorted(name for name in new if name not in vocab):
        target = aliases.get(name)
        if target is not None and target not in taken:
            taken.discard(name)
            taken.add(target)
            new[name] = target
    return np.array([new[name] for name in genes], dtype=object)


def port_names(genes: Sequence[str] | np.ndarray, vocab: GeneVocab, aliases: Mapping[str, str]) -> np.ndarray:
    """Names after the rule of the PyTorch port: the symbol or what it is an alias of, ``""`` where neither is known.

    Parameters
    ----------
    genes, vocab, aliases
        As for :func:`notebook_names`.
    """
    names = ((name, aliases.get(name, "")) for name in genes)
    return np.array([next((n for n in pair if n in vocab), "") for pair in names], dtype=object)
