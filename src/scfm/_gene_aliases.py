"""Old and alternative gene symbols, from an HGNC table."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._gene_names import as_names, ensembl_ids_in
from ._optional import require
from ._settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE_FILE = "hgnc_complete_set.txt"

UNKNOWN, APPROVED, PREVIOUS, ALIAS = range(4)

# our name of a column -> what files call it, after lower-casing and turning spaces and dots into underscores
_COLUMNS = {
    "symbol": ("approved_symbol", "symbol", "gene_name", "gene_symbol"),
    "previous": ("prev_symbol", "prev_symbols", "previous_symbol", "previous_symbols"),
    "alias": ("alias_symbol", "alias_symbols", "alias"),
    "ensembl": ("ensembl_gene_id", "ensembl_id", "gene_id"),
    "status": ("status",),
}
_KNOWN = {name for names in _COLUMNS.values() for name in names}


def _plain(column: object) -> str:
    return str(column).strip().lower().replace(" ", "_").replace(".", "_")


class AliasTable:
    """Approved symbols, the previous and alias symbols that lead to them, and their Ensembl ids.

    A name that is itself an approved symbol is never an alias of another gene. A previous symbol goes before an alias
    symbol. A name that leads to several approved symbols is not used at all.

    Parameters
    ----------
    approved
        Approved symbols, shape ``(genes,)``; repetitions are allowed.
    ensembl_ids
        Ensembl gene id of each approved symbol, empty where unknown, shape ``(genes,)``.
    previous, alias
        Tables of two columns, ``name`` and ``symbol``.

    Examples
    --------
    >>> import pandas as pd
    >>> table = AliasTable.read(pd.DataFrame({"symbol": ["POU5F1"], "alias_symbol": ["OCT3|OCT4"]}))
    >>> table.approve(["OCT4", "POU5F1", "KLF4"])[0].tolist()
    ['POU5F1', 'POU5F1', '']
    """

    def __init__(
        self,
        approved: Sequence[str] | np.ndarray,
        *,
        ensembl_ids: Sequence[str] | np.ndarray | None = None,
        previous: pd.DataFrame | None = None,
        alias: pd.DataFrame | None = None,
    ) -> None:
        approved = as_names(approved)
        symbols = pd.unique(approved[approved != ""])
        names, targets, kinds = [symbols], [symbols], [np.full(len(symbols), APPROVED, dtype=np.int8)]
        taken = pd.Index(symbols, dtype=object)
        self.n_ambiguous = 0
        for pairs, kind in ((previous, PREVIOUS), (alias, ALIAS)):
            if pairs is None:
                continue
            pairs = pairs[["name", "symbol"]].drop_duplicates()
            pairs = pairs[~pairs["name"].isin(taken) & (pairs["name"] != "") & (pairs["symbol"] != "")]
            taken = taken.append(pd.Index(pairs["name"].unique(), dtype=object))
            several = pairs["name"].duplicated(keep=False)
            self.n_ambiguous += pairs.loc[several, "name"].nunique()
            names.append(pairs.loc[~several, "name"].to_numpy(dtype=object))
            targets.append(pairs.loc[~several, "symbol"].to_numpy(dtype=object))
            kinds.append(np.full(len(names[-1]), kind, dtype=np.int8))
        self._names = pd.Index(np.concatenate(names), dtype=object)
        self._targets = np.concatenate(targets)
        self._kinds = np.concatenate(kinds)

        ids = np.full(len(approved), "", dtype=object) if ensembl_ids is None else ensembl_ids_in(as_names(ensembl_ids))
        pairs = pd.DataFrame({"id": ids, "symbol": approved}).drop_duplicates()
        pairs = pairs[(pairs["id"] != "") & (pairs["symbol"] != "")]
        self._symbol_by_id = _unambiguous(pairs, "id", "symbol")
        self._id_by_symbol = _unambiguous(pairs, "symbol", "id")

    @classmethod
    def read(cls, source: str | Path | pd.DataFrame) -> AliasTable:
        """Read a table of gene names.

        Understood are the HGNC complete set (``symbol``, ``prev_symbol``, ``alias_symbol``, ``ensembl_gene_id``, lists
        joined by ``|``), HGNC custom downloads (``Approved symbol``, ``Previous symbols``, ``Alias symbols``, lists
        joined by ``, ``), tables with one alias per row (``symbol``, ``alias``), two columns ``Symbol`` and
        ``Approved.Symbol`` as in HGNChelper, and tables of Ensembl ids and symbols.

        Parameters
        ----------
        source
            A data frame, or a file: ``.parquet`` (needs pyarrow), ``.csv``, anything else is read as tab-separated;
            compressed text files are fine.

        Raises
        ------
        FileNotFoundError
            If the file does not exist.
        ValueError
            If the table has no column with approved symbols, or none that leads to them.
        """
        frame = source if isinstance(source, pd.DataFrame) else _read_file(Path(source).expanduser())
        frame = frame.rename(columns=_plain)
        have = set(frame.columns)
        columns = {ours: next((c for c in names if c in have), None) for ours, names in _COLUMNS.items()}
        if {"symbol", "approved_symbol"} <= have and columns["alias"] is None:
            columns["alias"] = "symbol"
            frame = frame.assign(symbol=as_names(frame["symbol"]))
        if columns["symbol"] is None or not any(columns[key] for key in ("previous", "alias", "ensembl")):
            msg = (
                f"the table has the columns {', '.join(sorted(map(str, have)))}; needed are 'symbol' and at least one of "
                "'prev_symbol', 'alias_symbol', 'ensembl_gene_id', as in hgnc_complete_set.txt"
            )
            raise ValueError(msg)
        if columns["status"]:
            frame = frame[frame[columns["status"]].isin(["Approved", ""])]
        symbols = as_names(frame[columns["symbol"]])
        return cls(
            symbols,
            ensembl_ids=frame[columns["ensembl"]] if columns["ensembl"] else None,
            previous=_pairs(symbols, frame, columns["previous"]),
            alias=_pairs(symbols, frame, columns["alias"]),
        )

    @classmethod
    def from_cache(cls) -> AliasTable | None:
        """Read ``hgnc_complete_set.txt`` from ``scfm.settings.cachedir``; ``None`` if the file is not there."""
        path = settings.cachedir / CACHE_FILE
        return _read_cached(path, path.stat().st_mtime_ns) if path.is_file() else None

    @classmethod
    def resolve(cls, aliases: AliasTable | str | Path | pd.DataFrame | bool | None) -> AliasTable | None:
        """Turn what a user passes as ``aliases=`` into a table: ``None`` means the cached one, ``False`` none."""
        if aliases is None or aliases is True:
            return cls.from_cache()
        if aliases is False or isinstance(aliases, AliasTable):
            return aliases or None
        return cls.read(aliases)

    def approve(self, names: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Approved symbol of each name (empty if unknown or ambiguous) and what the name is.

        The second array holds ``UNKNOWN``, ``APPROVED``, ``PREVIOUS`` or ``ALIAS`` (int8).
        """
        where = self._names.get_indexer(as_names(names))
        found = where >= 0
        symbols, kinds = np.full(len(where), "", dtype=object), np.zeros(len(where), dtype=np.int8)
        symbols[found], kinds[found] = self._targets[where[found]], self._kinds[where[found]]
        return symbols, kinds

    def symbols(self, ensembl_ids: np.ndarray) -> np.ndarray:
        """Approved symbol of each Ensembl id (without version), empty if unknown."""
        return _look_up(self._symbol_by_id, ensembl_ids)

    def ensembl_ids(self, symbols: np.ndarray) -> np.ndarray:
        """Ensembl id of each approved symbol, empty if unknown or not unique."""
        return _look_up(self._id_by_symbol, symbols)

    def __len__(self) -> int:
        return len(self._names)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        n = np.bincount(self._kinds, minlength=4)
        return (
            f"AliasTable({n[APPROVED]:,} approved symbols, {n[PREVIOUS]:,} previous and {n[ALIAS]:,} alias symbols, "
            f"{len(self._symbol_by_id):,} Ensembl ids; {self.n_ambiguous:,} ambiguous names left out)"
        )


def _read_file(path: Path) -> pd.DataFrame:
    if not path.is_file():
        msg = f"no gene name table at {path}; hgnc_complete_set.txt can be downloaded from genenames.org"
        raise FileNotFoundError(msg)
    if path.suffix == ".parquet":
        require("pyarrow", purpose="Reading a parquet table")
        return pd.read_parquet(path)
    separator = "," if ".csv" in path.suffixes[-2:] else "\t"
    return pd.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, usecols=lambda column: _plain(column) in _KNOWN
    )


@lru_cache(maxsize=2)
def _read_cached(path: Path, modified: int) -> AliasTable:  # `modified` makes a changed file be read again
    return AliasTable.read(path)


def _pairs(symbols: np.ndarray, frame: pd.DataFrame, column: str | None) -> pd.DataFrame | None:
    """Split lists of names into one row per name."""
    if column is None:
        return None
    # only the plural headers of HGNC custom downloads mean comma-separated lists; some symbols contain commas
    separator = "," if column.endswith("symbols") else "|"
    names = pd.Series(as_names(frame[column])).str.split(separator, regex=False)
    pairs = pd.DataFrame({"name": names, "symbol": symbols}).explode("name", ignore_index=True)
    pairs["name"] = pairs["name"].str.strip()
    return pairs


def _unambiguous(pairs: pd.DataFrame, key: str, value: str) -> pd.Series:
    return pairs[~pairs[key].duplicated(keep=False)].set_index(key)[value]


def _look_up(table: pd.Series, keys: np.ndarray) -> np.ndarray:
    return as_names(table.reindex(pd.Index(as_names(keys), dtype=object)))
