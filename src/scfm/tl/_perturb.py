"""Predict what cells express after genes are perturbed."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .. import __version__, _keys, _logging
from ._inputs import check_can_hold_results, seed_of
from ._responses import expression, named, open_models, predictions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from ._responses import Predictor

    Put = Callable[[str, slice, np.ndarray], None]

_DTYPES = ("float32", "float16")
_KEEP = ("layers", "summary")
_LARGE = 4 * 2**30
# bytes of a chunk in a file
_CHUNK = 1 << 18
_COLUMNS = ("perturbation", "rank", "gene", "change", "std_cells", "std_models")


def perturb(
    adata: AnnData,
    perturbations: str | Sequence[str],
    model: Predictor | Sequence[Predictor],
    *,
    layer: str | None = None,
    keep: Literal["layers", "summary"] = "layers",
    out: str | os.PathLike[str] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    sparse_below: float | None = None,
    n_top_genes: int = 50,
    batch_size: int | None = None,
    key_added: str = _keys.PERTURB,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of each cell after genes are perturbed in it.

    Every cell of ``adata`` is taken for a control cell; its prediction depends on this cell and the perturbation only. Cells are
    predicted in blocks. A layer takes 4 bytes for each cell and gene (100 perturbations of 5,000 cells and 5,000 genes are 10 GB);
    for many perturbations, write a file with ``out``, or keep the summary alone.

    Parameters
    ----------
    adata
        Annotated data with control cells, and the genes that the model was trained on.
    perturbations
        Genes to perturb, several of one perturbation joined by ``+``.
    model
        A trained :class:`scfm.models.GeneticPerturbation`, the folder that one was saved to, or any object with its
        ``iter_predictions`` and ``perturbable``. Of several models (trained with other seeds) the mean is taken, and how far they
        differ is in the summary.
    layer
        Layer with the expression that changes are counted from; by default as the model reads it. Which one the model itself
        reads was said in its setup.
    keep
        ``"layers"``, or the ``"summary"`` only.
    out
        New ``.h5ad`` file for the layers, written block by block, so that memory does not grow with perturbations. ``adata`` then
        gets the summary only.
    dtype
        Type of the numbers in layers.
    sparse_below
        Predictions below this number become zero, and layers sparse; the summary is that of the predictions as they are.
    n_top_genes
        Genes of each perturbation in the table of the summary.
    batch_size
        Cells of a block; by default what suits the model.
    key_added
        Name of the summary; layers are then called ``<key_added>_<perturbation>``.
    rng
        Seed or generator of what a model draws. The same seed gives the same predictions.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.layers["perturbed_<A+B>"]``
        Predicted log-normalised expression, for each perturbation.
    ``.uns["perturb"]``
        ``params``; ``perturbations`` and ``genes``; ``mean_change`` and ``std_cells``, mean and standard deviation over the cells
        of the change of each gene, ``(perturbations, genes)``; ``std_models``, how far the mean changes of several models differ;
        ``control``, the mean expression of the cells; ``summary``, a table of the genes that change most.

    Raises
    ------
    ValueError
        If a gene cannot be perturbed (it is named), or an option makes no sense.
    TypeError
        If ``model`` is no model for perturbations.
    FileExistsError
        If ``out`` exists.

    Examples
    --------
    >>> import scfm
    >>> controls = adata[adata.obs["scfm_perturbation"] == "ctrl"].copy()  # doctest: +SKIP
    >>> scfm.tl.perturb(controls, ["KLF1", "CEBPE+KLF1"], model=predictor)  # doctest: +SKIP
    >>> controls.layers["perturbed_CEBPE+KLF1"]  # doctest: +SKIP
    """
    for name, value, choices in (("keep", keep, _KEEP), ("dtype", dtype, _DTYPES)):
        if value not in choices:
            msg = f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
            raise ValueError(msg)
    for name, value in (("n_top_genes", n_top_genes), ("batch_size", batch_size)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1; got {value!r}"
            raise ValueError(msg)
    if not adata.n_obs:
        msg = "there are no cells to predict for"
        raise ValueError(msg)
    models = open_models(model)
    names, seed = named(perturbations, models), seed_of(rng)
    check_can_hold_results(adata)
    file = None if out is None else Path(out).expanduser()
    if file is not None and (file.suffix != ".h5ad" or sparse_below is not None or keep != "layers"):
        msg = "out= names a new .h5ad file for dense layers; leave sparse_below= and keep= out"
        raise ValueError(msg)
    if file is not None and file.exists():
        msg = f"{file} exists; choose another name"
        raise FileExistsError(msg)
    adata = adata.copy() if copy else adata
    size = len(names) * adata.n_obs * adata.n_vars * np.dtype(dtype).itemsize
    start = _logging.info(f"predicting {len(names):,} perturbations of {adata.n_obs:,} cells")
    if keep == "layers" and file is None and size > _LARGE and sparse_below is None:
        _logging.warning(
            f"layers take {size / 2**30:,.1f} GiB; out= writes a file, keep='summary' keeps the summary alone"
        )
    changes = _Changes(names, expression(adata, models, layer), len(models))
    if file is not None:
        target = _file(adata, file, names, key_added, dtype)
    else:
        target = _memory(adata, names, key_added, dtype, sparse_below, keep == "layers")
    with target as put:
        for name, rows, values in predictions(models, names, adata, batch_size=batch_size, seed=seed):
            changes.add(name, rows, values)
            put(name, rows, values.mean(0) if len(values) > 1 else values[0])
    params = {
        "layer": layer,
        "n_models": len(models),
        "n_cells": adata.n_obs,
        "dtype": dtype,
        "rng": seed,
        "keep": keep,
    }
    params |= {"sparse_below": sparse_below, "out": None if file is None else str(file)}
    adata.uns[key_added] = {
        "params": {name: value for name, value in params.items() if value is not None},
        **changes.results(adata.var_names, min(n_top_genes, adata.n_vars)),
        "scfm_version": __version__,
    }
    where = (
        f"{str(file)!r}, layers (file)" if file is not None else f"'{_keys.perturbed(key_added, '...')}' (adata.layers)"
    )
    where = f"{where}\n    " if keep == "layers" else ""
    _logging.info("    finished", time=start, deep=f"added\n    {where}{key_added!r}, summary (adata.uns)")
    return adata if copy else None


class _Changes:
    """Sums from which means and spreads of changes come, gathered block by block."""

    def __init__(self, names: Sequence[str], control: sparse.csr_matrix, n_models: int) -> None:
        self.names, self.control = list(names), control
        self.place = {name: number for number, name in enumerate(names)}
        shape = len(names), control.shape[1]
        self.of_models = np.zeros((n_models, *shape))
        self.squares, self.seen = np.zeros(shape), np.zeros(len(names), dtype=np.int64)
        self._last: tuple[slice | None, np.ndarray | None] = (None, None)

    def add(self, name: str, rows: slice, values: np.ndarray) -> None:
        """Values of some cells, ``(models, cells, genes)``."""
        if self._last[0] != rows:  # all perturbations of a block follow each other
            self._last = rows, self.control[rows].toarray().astype(np.float64)
        change = values.astype(np.float64) - self._last[1]
        place = self.place[name]
        self.of_models[:, place] += change.sum(1)
        mean = change.mean(0)
        self.squares[place] += np.einsum("ij,ij->j", mean, mean)
        self.seen[place] += values.shape[1]

    def results(self, genes: pd.Index, n_top: int) -> dict[str, Any]:
        """What goes into ``uns``."""
        n = self.control.shape[0]
        if (self.seen != n).any():
            msg = "the model did not predict each cell once"
            raise RuntimeError(msg)
        of_models = self.of_models / n
        mean = of_models.mean(0)
        spread = np.sqrt(np.clip(self.squares - n * mean**2, 0, None) / max(n - 1, 1))
        between = of_models.std(0, ddof=1) if len(of_models) > 1 else np.full(mean.shape, np.nan)
        top = np.argsort(-np.abs(mean), axis=1, kind="stable")[:, :n_top]
        rows = np.arange(len(mean))[:, None]
        columns = (
            np.repeat(self.names, n_top),
            np.tile(np.arange(1, n_top + 1), len(mean)),
            np.asarray(genes, dtype=str)[top].ravel(),
            *(values[rows, top].ravel() for values in (mean, spread, between)),
        )
        out = {
            "perturbations": np.asarray(self.names, dtype=str),
            "genes": np.asarray(genes, dtype=str),
            "control": np.asarray(self.control.mean(0), dtype=np.float32).ravel(),
            "mean_change": mean.astype(np.float32),
            "std_cells": spread.astype(np.float32),
            "summary": pd.DataFrame(dict(zip(_COLUMNS, columns, strict=True))),
        }
        return out | ({"std_models": between.astype(np.float32)} if len(of_models) > 1 else {})


@contextmanager
def _memory(
    adata: AnnData, names: Sequence[str], key: str, dtype: str, sparse_below: float | None, wanted: bool
) -> Iterator[Put]:
    """Layers of ``adata``; they appear when all cells are predicted."""
    if not wanted:
        yield lambda name, rows, values: None
        return
    if sparse_below is None:
        dense = {name: np.empty(adata.shape, dtype=dtype) for name in names}

        def put(name: str, rows: slice, values: np.ndarray) -> None:
            dense[name][rows] = values

        yield put
        layers: dict[str, Any] = dense
    else:
        parts: dict[str, list[sparse.csr_matrix]] = {name: [] for name in names}
        yield lambda name, rows, values: parts[name].append(
            sparse.csr_matrix(np.where(values < sparse_below, 0, values).astype("float32"))
        )
        layers = {name: sparse.vstack(blocks, format="csr") for name, blocks in parts.items()}
    for name, values in layers.items():
        adata.layers[_keys.perturbed(key, name)] = values


@contextmanager
def _file(adata: AnnData, file: Path, names: Sequence[str], key: str, dtype: str) -> Iterator[Put]:
    """Layers of a new file, which appears complete or not at all."""
    import h5py

    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        part = Path(folder) / file.name
        AnnData(obs=adata.obs.copy(), var=adata.var.copy()).write_h5ad(part)
        # each open layer would keep chunks of its own in memory; small ones are cheap to read again where blocks meet
        with h5py.File(part, "r+", rdcc_nbytes=0) as store:
            layers = store.require_group("layers")
            arrays = {}
            rows_per_chunk = max(1, _CHUNK // (adata.n_vars * np.dtype(dtype).itemsize))
            chunks = (min(adata.n_obs, rows_per_chunk), adata.n_vars)
            for name in names:
                array = layers.create_dataset(
                    _keys.perturbed(key, name), adata.shape, dtype, chunks=chunks, compression="lzf"
                )
                array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
                arrays[name] = array

            def put(name: str, rows: slice, values: np.ndarray) -> None:
                arrays[name][rows] = values

            yield put
        part.replace(file)
