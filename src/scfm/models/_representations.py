"""What a model class gives: embeddings of cells and genes, and predicted expression."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scvi
from scvi import REGISTRY_KEYS
from scvi.data._constants import _SETUP_ARGS_KEY

from .. import _logging, engine
from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from ..backbones import Backbone


class RepresentationMixin:
    """Getters of a model class; all use the inference engine of :mod:`scfm.tl`."""

    backbone: Backbone

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int | None = None,
        *,
        pooling: str | None = None,
        **tokenize_options: Any,
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Other data than those of the model, with any genes in any order.
        indices
            Numbers of cells, or a mask; all by default.
        batch_size
            Most cells in one forward pass; by default a token budget that suits the device.
        pooling
            How token states become one vector per cell; by default as the authors do it.
        tokenize_options
            Options of the backbone's ``tokenize``.

        Returns
        -------
        Embeddings, float32 of shape ``(cells, dim)``, in the order of the cells. Cells without any gene that the model
        knows have NaN.

        Raises
        ------
        ValueError
            If the data do not hold what the model needs, or none of their genes is known.
        """
        with self._cells(self._validate_anndata(adata), indices, **tokenize_options) as task:
            backbone = self.backbone
            pooling = backbone.check_pooling(pooling)
            options = backbone.pooling_options(pooling, task.match)
            result = engine.run(
                **task.inputs,
                compute=lambda backbone, tokens: backbone.embed(tokens, pooling=pooling, **options),
                shape=(backbone.embedding_dim(pooling, **options),),
                task={"output": "cell embedding", "pooling": pooling},
                batch_size=batch_size,
            )
        if result.n_empty:
            _logging.warning(
                f"{result.n_empty:,} cells have no expressed gene that {backbone.name} knows; they are NaN"
            )
        return result.array

    def get_gene_representation(
        self,
        adata: AnnData | None = None,
        *,
        contextual: bool | None = None,
        groupby: str | None = None,
        groups: Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int | None = None,
        **tokenize_options: Any,
    ) -> pd.DataFrame | dict[str, pd.DataFrame]:
        """Embed genes.

        Parameters
        ----------
        adata
            Other data than those of the model.
        contextual
            States of the genes inside cells, averaged over cells, instead of the vectors that the model has learned for
            them; by default if ``groupby`` is given.
        groupby
            Column of ``obs`` with groups of cells to average over; by default all cells are one group.
        groups
            Which groups; by default all.
        genes
            Genes of the data to restrict contextual embeddings to.
        indices, batch_size, tokenize_options
            As in :meth:`get_latent_representation`; they count for contextual embeddings only.

        Returns
        -------
        A table with one row for each gene of the data, NaN for genes without an embedding, or with ``groupby`` such a
        table for each group.

        Raises
        ------
        KeyError
            If a column, a group or a gene does not exist.
        ValueError
            If ``contextual=False`` is combined with what chooses cells or genes.
        """
        adata = self._validate_anndata(adata)
        contextual = groupby is not None if contextual is None else contextual
        if not contextual:
            if groupby is not None or genes is not None or indices is not None:
                msg = "groupby=, genes= and indices= choose contextual embeddings; static ones do not depend on cells"
                raise ValueError(msg)
            table = self.backbone.gene_embeddings().cpu().numpy()
            return pd.DataFrame(engine.by_column(table, self._align(adata).ids), index=adata.var_names)
        self.backbone.require("gene_states")
        codes, names = _groups(adata, groupby, groups)
        rows = np.arange(adata.n_obs)[selection(indices)]
        rows = rows[codes[rows] >= 0]
        with self._cells(adata, rows, **tokenize_options) as task:
            wanted = engine.genes_to_average(task.match, genes)
            means = engine.GeneMeans(task, codes[rows], len(names), wanted)
            means.run(batch_size)
        tables = [pd.DataFrame(mean, index=adata.var_names) for mean in means.of_columns()]
        return tables[0] if groupby is None else dict(zip(names, tables, strict=True))

    def get_reconstruction(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        genes: Sequence[str] | Literal["expressed", "all"] = "expressed",
        batch_size: int | None = None,
        **tokenize_options: Any,
    ) -> csr_matrix | pd.DataFrame:
        """Predict expression from the cells that the model has seen, on the scale ``backbone.expression_scale``.

        Parameters
        ----------
        adata, indices, batch_size, tokenize_options
            As in :meth:`get_latent_representation`.
        genes
            ``"expressed"``, the genes that each cell expresses; ``"all"`` genes of the data that the model knows; or
            names of genes.

        Returns
        -------
        For ``"expressed"`` a sparse matrix of shape ``(cells, n_vars)``; else a table of cells and genes, NaN for genes
        that the model does not know.

        Raises
        ------
        KeyError
            If a gene is not known.
        MemoryError
            If the table would be larger than 2 GiB.
        UnsupportedError
            If the model does not predict expression.
        """
        adata = self._validate_anndata(adata)
        self.backbone.require("reconstructs")
        with self._cells(adata, indices, **tokenize_options) as task:
            if isinstance(genes, str) and genes == "expressed":
                return engine.predict_expressed(task, batch_size=batch_size)
            if isinstance(genes, str) and genes != "all":
                msg = f"genes must be 'expressed', 'all' or a list of names; got {genes!r}"
                raise ValueError(msg)
            columns = engine.genes_to_predict(task.match, genes)
            engine.check_size(task.source.n_obs, len(columns))
            values = engine.predict_everywhere(task, columns, batch_size=batch_size)
            names = adata.var_names if isinstance(genes, str) else list(genes)
            return pd.DataFrame(values, index=task.source.obs_names, columns=names)

    @contextmanager
    def _cells(
        self, adata: AnnData, indices: Sequence[int] | Sequence[bool] | None = None, **tokenize_options: Any
    ) -> Iterator[engine.Task]:
        """Registered cells, or some of them, for the engine."""
        if self.from_scratch_ and not self.is_trained_ and not self._is_training:
            msg = "the model was made from a config and is not trained yet; what it gives means nothing"
            warnings.warn(msg, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)
        manager = self.get_anndata_manager(adata, required=True)
        match, options = self._align(adata), dict(tokenize_options)
        with open_source(adata, layer=manager.registry[_SETUP_ARGS_KEY]["layer"]) as source:
            rows = np.arange(source.n_obs)[selection(indices)]
            source = source if indices is None else source.select(rows)
            if self._uses_batches and "batch_labels" not in options:
                codes = manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()[rows].astype(np.int64)
                self._check_batches(codes)
                options["batch_labels"] = codes
            engine.check_options(self.backbone, options, source.n_obs)
            yield engine.Task(self.backbone, source, match, options)

    @property
    def _uses_batches(self) -> bool:
        """Whether the network has an input for the batch of a cell."""
        takes = "batch_labels" in engine.accepted_options(self.backbone)
        return takes and bool(getattr(self.backbone.config, "n_batches", 0))

    def _check_batches(self, codes: np.ndarray) -> None:
        """Raise unless the network has an input for each batch of the data."""
        n_batches, n_known = int(codes.max(initial=-1)) + 1, self.backbone.config.n_batches
        if n_batches > n_known:
            msg = (
                f"the data have {n_batches} batches and the network was made for {n_known}; make it with "
                f"n_batches={n_batches}, or set the data up with a batch_key of so many batches"
            )
            raise ValueError(msg)


def selection(indices: Sequence[int] | Sequence[bool] | None) -> np.ndarray | slice:
    """What picks the rows of chosen cells, or of all."""
    if indices is None:
        return slice(None)
    indices = np.asarray(indices)
    return indices.astype(np.int64) if not len(indices) else indices


def _groups(adata: AnnData, groupby: str | None, groups: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Number of the group of each cell, -1 for none, and the names of the groups."""
    if groupby is None:
        return np.zeros(adata.n_obs, dtype=np.int64), [""]
    if groupby not in adata.obs:
        msg = f"obs has no column {groupby!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise KeyError(msg)
    labels = adata.obs[groupby].astype(object).map(str, na_action="ignore")
    names = sorted(labels.dropna().unique()) if groups is None else [str(group) for group in groups]
    if unknown := [name for name in names if not (labels == name).any()]:
        msg = f"obs[{groupby!r}] has no group {', '.join(unknown)}"
        raise KeyError(msg)
    return np.asarray(pd.Categorical(labels, categories=names).codes, dtype=np.int64), names
