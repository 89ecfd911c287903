"""Tables of known regulators and their targets, and lists of regulators."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _logging
from .._errors import OfflineError
from .._optional import require
from .._settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    Known = pd.DataFrame | Mapping[str, Sequence[str]] | str | os.PathLike[str]

_SOURCES = ("source", "tf", "TF", "regulator", "Gene1")
_TARGETS = ("target", "gene", "target_gene", "Gene2")
# resources that decoupler downloads
RESOURCES = ("collectri", "dorothea")
_READERS = {".parquet": pd.read_parquet, ".tsv": pd.read_table, ".txt": pd.read_table}


def known_edges(known: Known) -> pd.DataFrame:
    """Known edges as a table with ``source`` and ``target``, each pair once.

    Parameters
    ----------
    known
        Data frame, mapping from regulators to lists of targets, file (``.csv``, ``.tsv``, ``.txt``, ``.parquet``; also
        compressed), or the name of a resource that decoupler downloads, ``"collectri"`` or ``"dorothea"``. Regulators stand in a column ``source``, ``tf``, ``TF``,
        ``regulator`` or ``Gene1``, targets in ``target``, ``gene``, ``target_gene`` or ``Gene2``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OfflineError
        If a resource is named while scfm is offline.
    TypeError
        If it is something else.
    ValueError
        If a column is missing, or there are no edges.
    """
    if isinstance(known, Mapping):
        pairs = [(source, target) for source, targets in known.items() for target in targets]
        known = pd.DataFrame(pairs, columns=["source", "target"])
    if not isinstance(known, pd.DataFrame | str | os.PathLike):
        msg = f"known edges are a table, a mapping or a file, not {type(known).__name__}"
        raise TypeError(msg)
    table = known if isinstance(known, pd.DataFrame) else _read(known)
    source = next((name for name in _SOURCES if name in table), None)
    target = next((name for name in _TARGETS if name in table), None)
    if source is None or target is None:
        msg = (
            f"known edges need a column with regulators ({', '.join(_SOURCES)}) and one with targets "
            f"({', '.join(_TARGETS)}); there are {', '.join(map(str, table.columns)) or 'none'}"
        )
        raise ValueError(msg)
    table = table[[source, target]].dropna().astype(str).set_axis(["source", "target"], axis=1).drop_duplicates()
    if table.empty:
        msg = "the table of known edges has no rows"
        raise ValueError(msg)
    return table.reset_index(drop=True)


def _read(known: str | os.PathLike[str]) -> pd.DataFrame:
    if isinstance(known, str) and known in RESOURCES:
        if settings.offline:
            msg = (
                f"{known!r} is downloaded by decoupler, but scfm is offline; give a table or a file with the columns "
                "source and target"
            )
            raise OfflineError(msg)
        return getattr(require("decoupler", purpose=f"The resource {known!r}").op, known)()
    path = Path(known).expanduser()
    if not path.is_file():
        msg = f"there is no file {path}; known edges are a table, a file, or one of {', '.join(RESOURCES)}"
        raise FileNotFoundError(msg)
    kind = next((suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".bz2", ".xz", ".zst")), "")
    return _READERS.get(kind, pd.read_csv)(path)


def regulators(tfs: Sequence[str] | str | os.PathLike[str] | None, known: pd.DataFrame | None) -> list[str]:
    """Names of regulators, each once: from a list, from a file with one name a line, or the sources of known edges.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If there is nothing to take names from.
    """
    if tfs is None:
        if known is None:
            msg = "name regulators with tfs= (a list, or a file with one name a line), or give known edges with prior="
            raise ValueError(msg)
        names: Sequence[str] = known["source"].tolist()
    elif isinstance(tfs, (str, os.PathLike)):
        path = Path(tfs).expanduser()
        if not path.is_file():
            msg = f"there is no file {path}; tfs= is a list of names, or a file with one name a line"
            raise FileNotFoundError(msg)
        lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
        names = [line[0] for line in lines if line]
    else:
        names = [str(name) for name in tfs]
    return list(dict.fromkeys(names))


def present(names: Sequence[str], var_names: pd.Index) -> list[str]:
    """The regulators that are genes of the data.

    Raises
    ------
    ValueError
        If none is.
    """
    there = np.isin(np.asarray(names, dtype=object), var_names.to_numpy(dtype=object))
    if not there.any():
        msg = (
            f"none of the {len(names):,} regulators is a gene of adata; are the names of the same kind (symbols, ids)?"
        )
        raise ValueError(msg)
    if not there.all():
        _logging.info(f"    {int(there.sum()):,} of {len(names):,} regulators are genes of adata")
    return [name for name, is_gene in zip(names, there, strict=True) if is_gene]
