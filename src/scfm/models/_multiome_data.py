"""MuData as one matrix: which modality is which, and the features of all of them side by side."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mudata
import numpy as np
import pandas as pd
from mudata import MuData
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from ..data import CellSource, open_source
from ..data._matrix import RowReader, SelectedRows, canonical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

RNA, ATAC, PROTEIN = KINDS = ("rna", "atac", "protein")
# what the modalities are usually called, in small letters
_USUAL = {RNA: ("rna", "gex", "gene expression"), ATAC: ("atac", "peaks"), PROTEIN: ("protein", "prot", "adt")}


@dataclass(frozen=True)
class Modalities:
    """Which modality of MuData is what, and where its counts are.

    Parameters
    ----------
    names
        Name of the modality by kind (``"rna"``, ``"atac"``, ``"protein"``).
    layers
        Layer with the counts by kind; ``None`` for ``X``.
    """

    names: Mapping[str, str]
    layers: Mapping[str, str | None]

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Modalities:
        """From the arguments of ``setup_mudata``."""
        names = arguments["modalities"]
        return cls(dict(names), {kind: arguments[f"{kind}_layer"] for kind in names})

    def of(self, mdata: MuData) -> dict[str, AnnData]:
        """Those modalities that the data have, by kind."""
        return {kind: mdata.mod[name] for kind, name in self.names.items() if name in mdata.mod}

    def open(self, mdata: MuData, kind: str) -> CellSource:
        """Counts of one modality.

        Raises
        ------
        KeyError
            If the layer does not exist.
        ValueError
            If there are no features.
        """
        try:
            source = open_source(mdata.mod[self.names[kind]], layer=self.layers[kind])
        except (KeyError, ValueError) as error:
            msg = f"modality {self.names[kind]!r}: {error.args[0]}"
            raise type(error)(msg) from None
        source.where = f"{source.where} of modality {self.names[kind]!r}"
        return source


def require_mudata(data: Any) -> None:
    """Raise ``TypeError`` for anything but MuData."""
    if not isinstance(data, MuData):
        msg = (
            f"expected MuData, got {type(data).__name__}; put the modalities together with "
            "mudata.MuData({'rna': rna, 'protein': protein})"
        )
        raise TypeError(msg)


def read_mudata(data: Any) -> MuData:
    """MuData, also from the path of a file; ``TypeError`` for anything else."""
    if isinstance(data, (str, os.PathLike)):
        return mudata.read_h5mu(data)
    require_mudata(data)
    return data


def find_modalities(mdata: MuData, modalities: Mapping[str, str | None] | None) -> dict[str, str]:
    """Name of the modality of each kind, in the order RNA, ATAC, protein.

    Parameters
    ----------
    mdata
        The data.
    modalities
        Names by kind; scvi-tools' ``"rna_layer"`` means the same as ``"rna"``. By default those with usual names.

    Raises
    ------
    KeyError
        If a kind is unknown.
    ValueError
        If a modality is named twice, there is no RNA, or nothing beside it.
    """
    present = ", ".join(map(repr, mdata.mod)) or "none"
    if modalities is None:
        usual = {name.lower(): name for name in reversed(list(mdata.mod))}
        found = {kind: next((usual[name] for name in _USUAL[kind] if name in usual), None) for kind in KINDS}
    else:
        found = {}
        for key, name in modalities.items():
            kind = str(key).removesuffix("_layer")
            if kind not in KINDS:
                msg = f"modalities= has names for {', '.join(map(repr, KINDS))}; {key!r} is none of these"
                raise KeyError(msg)
            found[kind] = name
    found = {kind: str(found[kind]) for kind in KINDS if found.get(kind) is not None}
    if len(set(found.values())) < len(found):
        msg = f"each modality can have one role only; got {found}"
        raise ValueError(msg)
    if RNA not in found or len(found) < 2:
        msg = (
            f"a joint embedding needs RNA and at least one more modality; found {found or 'none'} among the modalities "
            f"{present}. Say which is which with modalities={{'rna': ..., 'atac' or 'protein': ...}}, or take "
            "scfm.tl.embed for RNA alone"
        )
        raise ValueError(msg)
    return found


def rows_of(mdata: MuData, name: str) -> np.ndarray:
    """Row that each cell of MuData has in a modality, -1 where it has none.

    Raises
    ------
    ValueError
        If names of cells are not unique, or cells of the modality are not among those of the whole.
    """
    cells, part = mdata.obs_names, mdata.mod[name].obs_names
    if getattr(mdata, "axis", 0) != 0:
        msg = "this MuData shares features, not cells; make one with axis=0"
        raise ValueError(msg)
    if not (cells.is_unique and part.is_unique):
        msg = f"names of cells occur more than once (modality {name!r}); make them unique with obs_names_make_unique()"
        raise ValueError(msg)
    rows = part.get_indexer(cells).astype(np.int64)
    if (rows >= 0).sum() < len(part):
        msg = f"modality {name!r} has cells that the MuData does not know; call mdata.update()"
        raise ValueError(msg)
    return rows


def measured(mdata: MuData, modalities: Modalities) -> np.ndarray:
    """Which modalities each cell is in, ``(cells, modalities)``."""
    columns = [
        rows_of(mdata, name) >= 0 if name in mdata.mod else np.zeros(mdata.n_obs, dtype=bool)
        for name in modalities.names.values()
    ]
    return np.stack(columns, 1)


def check_linked(mdata: MuData, modalities: Modalities) -> None:
    """Raise ``ValueError`` if there are modalities that no chain of shared cells links."""
    there = measured(mdata, modalities).astype(np.int64)
    n_parts, part = connected_components(there.T @ there > 0, directed=False)
    if n_parts > 1:
        names = np.array(list(modalities.names.values()))
        apart = " and ".join("/".join(names[part == number]) for number in range(n_parts))
        msg = (
            f"no cell is in both {apart}, so nothing says how they belong together; are the names of cells the same in "
            "all modalities?"
        )
        raise ValueError(msg)


class JointRows(RowReader):
    """Chosen features of several modalities beside each other; a cell that is not in one has no values of it.

    Parameters
    ----------
    parts
        For each modality its reader, the row of each cell (-1 for none), and the chosen columns.
    n_cells
        Number of cells.
    """

    def __init__(self, parts: Sequence[tuple[RowReader, np.ndarray, np.ndarray]], n_cells: int) -> None:
        self._parts = list(parts)
        self.shape = (n_cells, sum(len(columns) for _, _, columns in parts))

    def read(self, start: int, stop: int) -> csr_matrix:
        """Cells ``start:stop``."""
        blocks = [self._part(*part, start, stop) for part in self._parts]
        return sparse.hstack(blocks, format="csr") if blocks else sparse.csr_matrix((stop - start, 0))

    @staticmethod
    def _part(reader: RowReader, rows: np.ndarray, columns: np.ndarray, start: int, stop: int) -> csr_matrix:
        rows = rows[start:stop]
        there = np.flatnonzero(rows >= 0)
        found = canonical(sparse.csr_matrix(SelectedRows(reader, rows[there], columns).read(0, len(there))))
        lengths = np.zeros(len(rows) + 1, dtype=np.int64)
        lengths[there + 1] = np.diff(found.indptr)
        return sparse.csr_matrix((found.data, found.indices, np.cumsum(lengths)), shape=(len(rows), len(columns)))


def open_joint(mdata: MuData, modalities: Modalities, columns: Mapping[str, np.ndarray]) -> CellSource:
    """Chosen features of all modalities as one source, in the order of ``mdata.obs``.

    Parameters
    ----------
    mdata
        The data.
    modalities
        What its modalities are.
    columns
        Numbers of the chosen features by kind of modality.
    """
    files, parts, names = ExitStack(), [], []
    with ExitStack() as on_error:
        on_error.callback(files.close)
        for kind, chosen in columns.items():
            source = files.enter_context(modalities.open(mdata, kind))
            parts.append((source.reader, rows_of(mdata, modalities.names[kind]), chosen))
            names.append(source.var_names[chosen].astype(str))
        on_error.pop_all()
    where = "the modalities " + ", ".join(repr(modalities.names[kind]) for kind in columns)
    var = pd.DataFrame(index=pd.Index(np.concatenate(names, dtype=object) if names else [], dtype=object))
    return CellSource(JointRows(parts, mdata.n_obs), pd.Index(mdata.obs_names), var, where, files)
