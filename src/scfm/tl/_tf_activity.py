"""Activity of transcription factors in cells, and how specific it is for cell types."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from .. import __version__, _keys, _logging
from .._optional import require
from ..checkpoints._files import give_rights
from ..data import open_source
from ..metrics import regulon_specificity
from ._attention_maps import DIFFERENCE
from ._inputs import check_can_hold_results, storable
from ._known_edges import known_edges

if TYPE_CHECKING:
    from scipy import sparse

    from ._known_edges import Known

_IMPORTANCE = 100


def tf_activity(
    adata: AnnData,
    *,
    net: Known | None = None,
    key: str = _keys.TARGETS,
    condition: str | None = None,
    top_n: int | None = None,
    min_targets: int = 5,
    top_share: float = 0.05,
    groupby: str | None = None,
    layer: str | None = None,
    key_added: str = _keys.ACTIVITY,
    copy: bool = False,
) -> AnnData | None:
    """Score how active transcription factors are in each cell, by where their targets stand among its genes (AUCell).

    The genes of a cell are ranked by their expression; the score is the area under the recovery curve of the targets
    among the first genes, computed by decoupler. Counts and normalised values give the same ranks. Equal values, most of
    them zeros, come in an arbitrary order that is the same in each run.

    Parameters
    ----------
    adata
        Annotated data.
    net
        Factors and targets: a table or a file with ``source`` and ``target``, or ``"collectri"`` or ``"dorothea"``, which
        decoupler downloads; by default what :func:`scfm.tl.tf_targets` found.
    key
        Slot of ``uns`` with these targets.
    condition
        Which condition of theirs, if there are several; the difference where there is one.
    top_n
        Targets of each factor to use, the best first; by default all.
    min_targets
        Factors with fewer targets among the genes of ``adata`` are left out.
    top_share
        Share of the genes of ``adata`` that count as the first ones of a cell.
    groupby
        Column of ``obs`` with cell types; adds regulon specificity scores (:func:`scfm.metrics.regulon_specificity`).
    layer
        Layer with the expression; by default ``X``.
    key_added
        Name of the results.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.obsm["X_tf_activity"]``
        Scores from 0 to 1, a data frame of cells by factors; NaN for cells without any expressed gene.
    ``.uns["tf_activity"]``
        Arguments; the number of targets of each factor; and ``specificity``, a data frame of groups by factors, if there
        is ``groupby``.

    Raises
    ------
    KeyError
        If there are no targets, or a column or layer does not exist.
    MissingExtraError
        If decoupler is not installed.
    OfflineError
        If a resource is to be downloaded while scfm is offline.
    ValueError
        If no factor has enough targets among the genes, or expression is negative.

    See Also
    --------
    scfm.pl.tf_specificity : The factors of each cell type.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.tf_activity(adata, groupby="cell_type")  # doctest: +SKIP
    >>> scfm.pl.tf_specificity(adata)  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    decoupler = require("decoupler", purpose="scfm.tl.tf_activity")
    if groupby is not None and groupby not in adata.obs:
        msg = f"obs has no column {groupby!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise KeyError(msg)
    if not 0 < top_share <= 1:
        msg = f"top_share is a share of the genes above 0 and up to 1; got {top_share!r}"
        raise ValueError(msg)
    edges = known_edges(net) if net is not None else _found(adata, key, condition)
    if top_n is not None:
        edges = edges.groupby("source", sort=False).head(top_n)
    edges = edges[edges["target"].isin(adata.var_names)]
    sizes = edges["source"].value_counts()
    kept = sizes[sizes >= min_targets]
    if kept.empty:
        msg = f"no factor has {min_targets} targets among the genes of adata; the most are {int(sizes.max()) if len(sizes) else 0}"
        raise ValueError(msg)
    edges = edges[edges["source"].isin(kept.index)]
    adata = adata.copy() if copy else adata
    start = _logging.info(f"activity of {len(kept):,} transcription factors in {adata.n_obs:,} cells")
    with open_source(adata, layer=layer) as source:
        matrix, where = source.read(0, source.n_obs), source.where
    if matrix.nnz and not (np.isfinite(matrix.data).all() and matrix.data.min() >= 0):
        msg = f"{where} holds negative or missing values; ranks of expression need counts or log-normalised values"
        raise ValueError(msg)
    scores = _aucell(decoupler, matrix, adata.var_names, edges, max(2, round(top_share * adata.n_vars)))
    table = pd.DataFrame(scores[1], index=adata.obs_names, columns=scores[0])
    adata.obsm[_keys.embedding(key_added)] = table
    params = {"key": key if net is None else None, "net": storable(net) if isinstance(net, str) else None}
    params |= {"condition": condition, "top_n": top_n, "min_targets": min_targets, "top_share": top_share}
    params |= {"groupby": groupby, "input": where}
    record: dict[str, Any] = {
        "params": {name: value for name, value in params.items() if value is not None},
        "n_targets": pd.DataFrame({"n_targets": kept.reindex(table.columns)}),
        "scfm_version": __version__,
    }
    if groupby is not None:
        usable = table.notna().all(axis=1).to_numpy()
        record["specificity"] = regulon_specificity(table[usable], adata.obs[groupby][usable])
    adata.uns[key_added] = record
    _logging.info("    finished", time=start, deep=f"added\n    {_keys.embedding(key_added)!r}, activity (adata.obsm)")
    return adata if copy else None


def _found(adata: AnnData, key: str, condition: str | None) -> pd.DataFrame:
    """Targets that were found before, the best first."""
    if key not in adata.uns:
        msg = f"uns has no targets {key!r}; run scfm.tl.tf_targets first, or give a table with net="
        raise KeyError(msg)
    table = adata.uns[key]["targets"]
    if "condition" in table:
        conditions = list(dict.fromkeys(table["condition"].astype(str)))
        if condition is None:
            condition = DIFFERENCE if DIFFERENCE in conditions else conditions[0] if len(conditions) == 1 else None
        if condition not in conditions:
            msg = f"choose one of the conditions {', '.join(conditions)} with condition="
            raise (ValueError if condition is None else KeyError)(msg)
        table = table[table["condition"].astype(str) == condition]
    elif condition is not None:
        msg = f"the targets in uns[{key!r}] have no conditions; leave condition= out"
        raise ValueError(msg)
    return table.rename(columns={"tf": "source"})[["source", "target", "score"]].astype({"source": str, "target": str})


def _aucell(
    decoupler: Any, matrix: sparse.csr_matrix, genes: pd.Index, edges: pd.DataFrame, n_first: int
) -> tuple[pd.Index, np.ndarray]:
    """Names of the factors, and their scores in all cells; NaN for cells without expressed genes."""
    # decoupler leaves out genes that no cell expresses; ranks are among all genes here, and cells are found again by number
    filled = np.flatnonzero(np.diff(matrix.indptr) > 0)
    names = np.arange(matrix.shape[0]).astype(str)
    cells = AnnData(matrix[filled], obs=pd.DataFrame(index=names[filled]), var=pd.DataFrame(index=genes))
    decoupler.mt.aucell(cells, net=edges[["source", "target"]], tmin=1, n_up=n_first, empty=False)
    table = cells.obsm["score_aucell"]
    out = np.full((matrix.shape[0], table.shape[1]), np.nan, dtype=np.float32)
    out[table.index.astype(int)] = table.to_numpy()
    return pd.Index(table.columns.astype(str)), out


def write_adjacencies(
    adata: AnnData, path: str | os.PathLike[str], *, key: str = _keys.TARGETS, condition: str | None = None
) -> None:
    """Write the targets of transcription factors as the table of adjacencies of pySCENIC.

    ``pyscenic ctx`` prunes them by motifs. The importance is 100 times the score, as the authors of scFoundation write
    it; targets without a positive score are left out.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.tf_targets`.
    path
        File to write, with tabs between ``TF``, ``target`` and ``importance``; compressed if the name ends in ``.gz``. It
        appears at once or not at all.
    key
        Slot of ``uns`` with the targets.
    condition
        Which condition, if there are several; the difference where there is one.

    Raises
    ------
    KeyError
        If there are no targets.
    ValueError
        If a condition has to be chosen, or no score is positive.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.write_adjacencies(adata, "adjacencies.tsv")  # doctest: +SKIP
    """
    table = _found(adata, key, condition)
    table = table[table["score"] > 0]
    if table.empty:
        msg = "no target has a positive score, so that there is nothing to write"
        raise ValueError(msg)
    table = table.set_axis(["TF", "target", "importance"], axis=1)
    table["importance"] *= _IMPORTANCE
    path = Path(path).expanduser()
    # beside the file, so that it can be renamed
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        table.to_csv(temporary, sep="\t", index=False, compression="gzip" if path.suffix == ".gz" else None)
        give_rights(Path(temporary))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
