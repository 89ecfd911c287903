"""Genes of a model: a fixed list of names, and the genes of a data set looked up in it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._columns import ColumnMap
from ._gene_aliases import ALIAS, APPROVED, PREVIOUS, AliasTable
from ._gene_match import GeneMatch
from ._gene_names import GeneNames, as_names, ensembl_ids_in, resolve_gene_names, some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["AliasTable", "ColumnMap", "GeneMatch", "GeneNames", "GeneVocab", "resolve_gene_names"]


class GeneVocab:
    """Ordered names of a model; the id of a name is its position.

    Parameters
    ----------
    names
        All names in the order of their ids.
    specials
        Those of ``names`` that are not genes, such as ``"<pad>"``. They never match a gene of the data.
    ensembl_ids
        Ensembl gene id of each name, empty where there is none. Names that are Ensembl ids, or end in one
        (``SYMBOL_ENSG00000141510``), are understood without it.

    Raises
    ------
    ValueError
        If there are no names, a name is empty or occurs twice, or a special is not among the names.

    Examples
    --------
    >>> vocab = GeneVocab(["<pad>", "CD3E", "LYZ"], specials=["<pad>"])
    >>> vocab["LYZ"]
    2
    >>> vocab.match(["LYZ", "XIST", "<pad>"]).ids
    array([ 2, -1, -1])
    """

    def __init__(
        self,
        names: Sequence[str] | np.ndarray,
        *,
        specials: Sequence[str] = (),
        ensembl_ids: Sequence[str] | np.ndarray | None = None,
    ) -> None:
        self.names = as_names(names)
        self.names.flags.writeable = False
        self._index = pd.Index(self.names, dtype=object)
        if not self._index.is_unique:
            twice = self._index[self._index.duplicated()].unique()
            msg = f"a vocabulary needs unique names; these occur more than once: {some(twice)}"
            raise ValueError(msg)
        if not len(self.names):
            msg = "a vocabulary needs at least one name"
            raise ValueError(msg)
        if "" in self._index:
            msg = f"entry {self._index.get_loc('')} of the vocabulary is empty"
            raise ValueError(msg)
        self.specials = tuple(specials)
        positions = self._index.get_indexer(as_names(self.specials))
        if (positions < 0).any():
            msg = f"special tokens {some(np.array(self.specials)[positions < 0])} are not among the names"
            raise ValueError(msg)
        self.is_gene = np.ones(len(self.names), dtype=bool)
        self.is_gene[positions] = False
        self.is_gene.flags.writeable = False
        self.ensembl_ids = None if ensembl_ids is None else as_names(ensembl_ids)
        if self.ensembl_ids is not None and len(self.ensembl_ids) != len(self.names):
            msg = f"{len(self.ensembl_ids)} Ensembl ids for {len(self.names)} names"
            raise ValueError(msg)

    # -- a sequence of names -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> int:
        try:
            return int(self._index.get_loc(name))
        except KeyError:
            similar = [other for other in self.names if other.lower() == str(name).lower()]
            hint = f" Did you mean {some(similar)}?" if similar else ""
            msg = f"{name!r} is not one of the {len(self):,} names of the vocabulary.{hint}"
            raise KeyError(msg) from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneVocab):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        specials = f" and {len(self.specials)} special tokens" if self.specials else ""
        return f"GeneVocab({self.n_genes:,} genes{specials}: {some(self.genes)})"

    @property
    def genes(self) -> np.ndarray:
        """Names without the special tokens, in the order of their ids."""
        return self.names[self.is_gene]

    @property
    def n_genes(self) -> int:
        """Number of names that are genes."""
        return int(self.is_gene.sum())

    def get_ids(self, names: Sequence[str] | np.ndarray) -> np.ndarray:
        """Ids of exact names, special tokens included; -1 where missing; int64."""
        return self._index.get_indexer(as_names(names)).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """JSON-writable form."""
        return {
            "names": self.names.tolist(),
            "specials": list(self.specials),
            "ensembl_ids": None if self.ensembl_ids is None else self.ensembl_ids.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GeneVocab:
        """Inverse of :meth:`to_dict`."""
        return cls(values["names"], specials=values.get("specials", ()), ensembl_ids=values.get("ensembl_ids"))

    # -- genes of a data set -------------------------------------------------------------------------------------

    def match(
        self,
        var_names: Sequence[str] | np.ndarray | pd.Index,
        *,
        ensembl_ids: Sequence[str] | np.ndarray | None = None,
        aliases: AliasTable | str | Path | pd.DataFrame | None = None,
    ) -> GeneMatch:
        """Look up the genes of a data set.

        Each gene takes the first of these that gives an entry:

        1. its symbol, exactly;
        2. its Ensembl id, version dropped: an entry with that id, or the entry of the id's approved symbol. Refused
           if another gene of the data has that symbol and a different Ensembl id;
        3. its approved symbol, where it is a previous or alias symbol, or the entry is. Refused if the alias table
           gives several, if another gene of the data already has the entry, if two genes of the data with different
           names want it, or if the gene's Ensembl id belongs to another symbol.

        The order of the genes plays no role.

        Parameters
        ----------
        var_names
            Symbols (or Ensembl ids, also mixed) of the data, shape ``(n_vars,)``.
        ensembl_ids
            Ensembl ids of the same genes, empty or NaN where unknown, shape ``(n_vars,)``.
        aliases
            Table for steps 2 and 3, see :meth:`AliasTable.read`; without it only Ensembl ids that the vocabulary
            itself knows can be used.

        Raises
        ------
        ValueError
            If there are not as many Ensembl ids as names.
        """
        names = as_names(var_names)
        inside = ensembl_ids_in(names)
        if ensembl_ids is not None:
            given = ensembl_ids_in(as_names(ensembl_ids))
            if len(given) != len(names):
                msg = f"{len(given)} Ensembl ids for {len(names)} genes"
                raise ValueError(msg)
            inside = np.where(given != "", given, inside)
        if not (aliases is None or isinstance(aliases, AliasTable)):
            aliases = AliasTable.read(aliases)
        return _Matching(self, names, inside, aliases).run()

    def _gene_ids(self, names: np.ndarray) -> np.ndarray:
        ids = self._index.get_indexer(names).astype(np.int64)
        return np.where((ids >= 0) & self.is_gene[ids], ids, -1)

    @cached_property
    def _by_ensembl(self) -> pd.Series:
        """Vocabulary ids by Ensembl id: the given ids first, then entries that are an id, then entries ending in one."""
        inside = ensembl_ids_in(self.names)
        is_id = np.array([name.startswith("ENSG") for name in self.names], dtype=bool)
        parts = [np.where(is_id, inside, ""), np.where(is_id, "", inside)]
        if self.ensembl_ids is not None:
            parts.insert(0, ensembl_ids_in(self.ensembl_ids))
        table = pd.DataFrame({"id": np.concatenate(parts), "entry": np.tile(np.arange(len(self)), len(parts))})
        table = table[(table["id"] != "") & self.is_gene[table["entry"]]].drop_duplicates("id")
        return table.set_index("id")["entry"]

    def _ids_by_ensembl(self, ensembl_ids: np.ndarray) -> np.ndarray:
        where = self._by_ensembl.index.get_indexer(ensembl_ids)
        found = np.full(len(where), -1, dtype=np.int64)
        found[where >= 0] = self._by_ensembl.to_numpy()[where[where >= 0]]
        return found


class _Matching:
    """One run of :meth:`GeneVocab.match`."""

    def __init__(self, vocab: GeneVocab, names: np.ndarray, ensembl: np.ndarray, table: AliasTable | None) -> None:
        self.vocab, self.names, self.ensembl, self.table = vocab, names, ensembl, table
        self.ids = np.full(len(names), -1, dtype=np.int64)
        self.how = np.full(len(names), "", dtype=object)

    def run(self) -> GeneMatch:
        found = self.vocab._gene_ids(self.names)
        self._accept(np.flatnonzero(found >= 0), found[found >= 0], "symbol")
        self._match_ensembl()
        if self.table is not None:
            self._match_aliases()
        return GeneMatch(self.ids, self.how, self.names, self.vocab)

    def _accept(self, rows: np.ndarray, targets: np.ndarray, how: str) -> None:
        self.ids[rows] = targets
        self.how[rows] = how

    def _match_ensembl(self) -> None:
        ensembl = self.ensembl
        if self.table is not None:
            ensembl = np.where(ensembl == "", self.table.ensembl_ids(self.names), ensembl)
        rows = np.flatnonzero((self.ids < 0) & (ensembl != ""))
        targets = self.vocab._ids_by_ensembl(ensembl[rows])
        if self.table is not None:
            targets = np.where(targets < 0, self._entries(self.table.symbols(ensembl[rows])), targets)
        # an entry that a gene with another Ensembl id has taken by its symbol is not shared with this gene
        codes = pd.factorize(ensembl)[0]
        owners = np.flatnonzero((self.ids >= 0) & (ensembl != ""))
        width = len(ensembl) + 1
        same = np.isin(targets * width + codes[rows], self.ids[owners] * width + codes[owners])
        free = (targets >= 0) & (same | ~np.isin(targets, self.ids[owners]))
        self._accept(rows[free], targets[free], "ensembl")

    def _match_aliases(self) -> None:
        symbols, kinds = self.table.approve(self.names)
        own_symbols = self.table.symbols(self.ensembl)
        agrees = (own_symbols == "") | (own_symbols == symbols)
        for kind in (APPROVED, PREVIOUS, ALIAS):
            rows = np.flatnonzero((self.ids < 0) & (kinds == kind) & agrees)
            targets = self._entries(symbols[rows])
            free = (targets >= 0) & ~np.isin(targets, self.ids)
            wanted = pd.DataFrame({"target": targets, "name": self.names[rows]})[free].drop_duplicates()
            contested = wanted.loc[wanted["target"].duplicated(), "target"]
            free &= ~np.isin(targets, contested)
            self._accept(rows[free], targets[free], "alias")

    def _entries(self, symbols: np.ndarray) -> np.ndarray:
        """Vocabulary ids of approved symbols: the entry itself, one with its Ensembl id, or one with an old name of it."""
        ids = self.vocab._gene_ids(symbols)
        by_ensembl = self.vocab._ids_by_ensembl(self.table.ensembl_ids(symbols))
        old = self._old_entries
        where = old.index.get_indexer(symbols)
        by_old_name = np.where(where >= 0, old.to_numpy()[where], -1) if len(old) else np.full(len(ids), -1)
        return np.select([ids >= 0, by_ensembl >= 0], [ids, by_ensembl], by_old_name)

    @cached_property
    def _old_entries(self) -> pd.Series:
        """Vocabulary ids of entries under an old name, by approved symbol, where only one entry has that symbol."""
        symbols, kinds = self.table.approve(self.vocab.names)
        entries = np.flatnonzero((kinds >= PREVIOUS) & self.vocab.is_gene)
        found = pd.Series(entries, index=pd.Index(symbols[entries], dtype=object), dtype=np.int64)
        return found[~found.index.duplicated(keep=False)]
