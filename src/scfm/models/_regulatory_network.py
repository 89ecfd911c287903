"""A regulatory network from expression and what a model knows about genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass
from tqdm.auto import trange

from .. import _logging, engine
from .._settings import settings
from ..backbones import Backbone, load
from ..backbones._device import resolve_device
from ..data import open_source
from ..metrics import edges_from_matrix, network_scores
from ..metrics._network import edges_between
from ..tasks.deepsem import INVERSES, DeepSEM, StandardExpression, refine
from ._alignment import align
from ._expression_field import ExpressionField
from ._fields import GENES_KEY, GeneField
from ._network_start import OF_DATA, OF_MODEL, Cells, scaled, start_of_data, start_of_model
from ._plain_saving import PlainSaving
from ._saving import _device
from ._training import joined, seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Literal

    from anndata import AnnData

    from ..tasks.deepsem import Inverse
    from ._network_start import Start

    Directory = str | os.PathLike[str]

_MOST_GENES = 10_000
_READ_ROWS = 4096
# largest row or column sum of a start, see scaled
_BOUND = 0.9
_GIVEN = "given"


class RegulatoryNetwork(PlainSaving, BaseModelClass):
    """A gene regulatory network, refined by DeepSEM from what a foundation model says about pairs of genes.

    This is the network inference of scLong, with any model: similarities of genes are the start of the weights ``A`` of a
    structural equation model, a variational auto-encoder in which genes meet only in ``I - A`` (DeepSEM). Training changes
    ``A`` so that it explains the expression.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`; every gene of them is in the network.
    registry
        Registry of such data, for a network without them.
    model
        Name of a checkpoint, a folder, or a model from :func:`scfm.load`; ``None`` for none. It is needed at the start only,
        and not kept.
    adjacency
        Start instead of what ``init`` makes, ``(targets, sources)``: an array in the order of the genes, or a table by name.
    init
        How the network starts.

        ``"paper"``
            Cosine similarity of the mean of the state of a gene in each cell, over cells (paper of scLong).
        ``"code"``
            Scalar products of all states, scaled, see :func:`scfm.metrics.similarity_adjacency` (code of scLong).
        ``"contextual"``
            Cosine similarity of the states of a gene, averaged over cells (an extension of scfm).
        ``"static"``
            Cosine similarity of the vectors that the model has learned for its genes.
        ``"correlation"``
            Absolute Pearson correlation of expression; needs no model.
        ``"random"``
            All weights ``1 / (genes - 1)`` with a little noise, as in DeepSEM; needs no model.

        By default ``"paper"`` with a model and ``"random"`` without.
    inverse
        ``"exact"``, or ``"cholesky"`` for the variant that scLong's code computes in its place, see
        :class:`scfm.tasks.deepsem.DeepSEM`.
    scale
        Number to multiply the start with. By default 1 with ``inverse="cholesky"``. Published starts have rows that sum to
        one, so that ``I - A`` has no inverse; with ``"exact"`` they are divided by a number where that is needed, which does
        not change the order of edges.
    tfs
        Genes that may be sources of edges, such as transcription factors; by default all.
    hidden
        Width of the small networks.
    tokenize
        Options of the model's tokenizer.
    device
        Where to compute, until training chooses another place.
    seed
        Seed of the weights and of a random start; by default ``scvi.settings.seed``.

    Attributes
    ----------
    history
        Losses of training, a data frame for each.

    Raises
    ------
    ValueError
        If the genes are too many, have no unique names or are not known to the model, the start does not fit them, or an option is unknown.
    UnsupportedError
        If the model has no states of genes.

    References
    ----------
    Shu et al., DeepSEM, Nature Computational Science 1, 491 (2021); Bai et al., scLong, 2024.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.RegulatoryNetwork.setup_anndata(adata, counts_layer="counts")  # doctest: +SKIP
    >>> network = scfm.models.RegulatoryNetwork(adata, model="scgpt", tfs=tfs)  # doctest: +SKIP
    >>> network.train()  # doctest: +SKIP
    >>> network.get_edges(top_n=1000)  # doctest: +SKIP
    >>> network.score(known)  # doctest: +SKIP
    """

    module: DeepSEM

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        model: str | os.PathLike[str] | Backbone | None = None,
        adjacency: np.ndarray | pd.DataFrame | None = None,
        init: Start | None = None,
        inverse: Inverse = "exact",
        scale: float | None = None,
        tfs: Sequence[str] | None = None,
        hidden: int = 128,
        tokenize: Mapping[str, Any] | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(adata, registry)
        seed = seed_or_default(seed)
        if inverse not in INVERSES:
            msg = f"inverse must be one of {', '.join(map(repr, INVERSES))}; got {inverse!r}"
            raise ValueError(msg)
        _check_genes(self.genes)
        init = _chosen(init, model, adjacency)
        self._tfs = None if tfs is None else self._known_tfs(tfs)
        checkpoint = None
        if init == _GIVEN:
            start = self._ordered(adjacency)
        elif self.adata is None:
            msg = "a network starts from data; give adata=, or adjacency="
            raise ValueError(msg)
        elif init in OF_DATA:
            start = start_of_data(init, self._expression(), seed=seed)
        else:
            backbone = model if isinstance(model, Backbone) else load(model, device=device)
            checkpoint = backbone.provenance.id
            start = start_of_model(init, backbone, self._cells(backbone, dict(tokenize or {}), seed))
        start = scaled(start, scale, inverse=inverse, bound=_BOUND)
        self._start(start, inverse, hidden, seed, str(resolve_device(device)))
        self.init_params_ = {
            "kwargs": {},
            "non_kwargs": {"checkpoint": checkpoint, "init": init, "inverse": inverse, "hidden": hidden, "seed": seed},
        }

    def _start(self, adjacency: np.ndarray, inverse: Inverse, hidden: int, seed: int, device: str) -> None:
        self.module = DeepSEM(adjacency, hidden=hidden, inverse=inverse, seed=seed).eval()
        self._kept = torch.zeros(0, *adjacency.shape)
        self.to_device(device)

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        counts_layer: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register data; nothing but ``uns`` and ``obs`` is changed.

        Parameters
        ----------
        adata
            Annotated data with the genes of the network, a few hundred to a few thousand.
        layer
            Layer with normalised expression to explain, such as logarithms of counts per 10,000; by default ``X``. Zero
            means that nothing was measured.
        counts_layer
            Layer with raw counts for the model to look at; by default ``layer``.
        gene_symbols, gene_ids, aliases
            As in :meth:`FoundationModel.setup_anndata`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If ``adata`` is a view, or values are missing or infinite.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        if counts_layer is not None and counts_layer not in adata.layers:
            msg = f"there is no layer {counts_layer!r}; there are {', '.join(adata.layers) or 'none'}"
            raise KeyError(msg)
        manager = AnnDataManager(
            fields=[ExpressionField(REGISTRY_KEYS.X_KEY, layer), GeneField(gene_symbols, gene_ids)],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes, in the order of the adjacency."""
        return np.asarray(self._gene_state[GeneField.NAMES], dtype=object)

    @property
    def tfs(self) -> np.ndarray:
        """Genes that may be sources."""
        return self.genes if self._tfs is None else self._tfs

    @property
    def _gene_state(self) -> dict[str, Any]:
        return self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    def _known_tfs(self, tfs: Sequence[str]) -> np.ndarray:
        if isinstance(tfs, str):
            msg = f"tfs= needs a list of names, not the text {tfs!r}"
            raise TypeError(msg)
        known = self.genes[np.isin(self.genes.astype(str), np.asarray(list(tfs), dtype=str))]
        if not len(known):
            msg = f"none of tfs= is a gene of the data ({', '.join(map(str, self.genes[:3]))} ...); names have to be the same"
            raise ValueError(msg)
        return known

    def _ordered(self, adjacency: np.ndarray | pd.DataFrame) -> np.ndarray:
        if isinstance(adjacency, pd.DataFrame):
            missing = [gene for gene in self.genes if gene not in adjacency.index or gene not in adjacency.columns]
            if missing:
                msg = f"adjacency= has no row or column for {', '.join(map(str, missing[:5]))}"
                raise ValueError(msg)
            adjacency = adjacency.loc[self.genes, self.genes].to_numpy()
        adjacency = np.array(adjacency, dtype=np.float32)
        if adjacency.shape != (len(self.genes), len(self.genes)) or not np.isfinite(adjacency).all():
            msg = f"adjacency= needs finite weights of {len(self.genes)} x {len(self.genes)} genes, not the shape {adjacency.shape}"
            raise ValueError(msg)
        np.fill_diagonal(adjacency, 0)
        return adjacency

    def _expression(self) -> sparse.csr_matrix:
        with open_source(self.adata, layer=self.registry_[_SETUP_ARGS_KEY]["layer"]) as source:
            blocks = [block.counts for block in source.blocks(_READ_ROWS)]
        return sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, len(self.genes)))

    def _cells(self, backbone: Backbone, options: dict[str, Any], seed: int) -> Cells:
        arguments = self.registry_[_SETUP_ARGS_KEY]
        match = align(backbone.vocab, {**self._gene_state, GeneField.MATCHED: {}}, arguments["aliases"])
        match.require_any(backbone.name)
        _logging.info(match.summary())
        if "rng" in engine.accepted_options(backbone):
            options = {"rng": seed, **options}
        layer = arguments["layer"] if arguments["counts_layer"] is None else arguments["counts_layer"]
        return Cells(self.adata, layer, match, options)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int = 120,
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
        batch_size: int = 64,
        alpha: float = 0.1,
        beta: float = 0.01,
        lr: float = 1e-4,
        adjacency_lr: float = 2e-5,
        small_network_epochs: int = 1,
        adjacency_epochs: int = 2,
        n_averaged: int = 5,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Refine the network; the same seed gives the same weights.

        Epochs in which the small networks are trained and such in which the adjacency is trained take turns, with an
        optimiser (RMSprop) for each. Rates are constant: the schedule in the authors' code never changes them. The paper
        trains for 120 epochs; the authors' evaluation averages over epochs 10 to 14, which is ``max_epochs=15`` here.

        Parameters
        ----------
        max_epochs
            Passes over the cells.
        accelerator, device
            Where to compute.
        batch_size
            Cells of a step (paper: 64; default of the code: 8).
        alpha, beta
            Weights of the sparsity of the network and of the prior.
        lr, adjacency_lr
            Learning rates of the small networks and of the adjacency.
        small_network_epochs, adjacency_epochs
            How many epochs each is trained in turn.
        n_averaged
            Number of last epochs over which the edges are averaged.
        seed
            Seed of the order of cells and of the noise; by default ``scvi.settings.seed``.
        progress
            Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2.

        Raises
        ------
        ValueError
            If a number makes no sense, or the loss is no longer finite.
        """
        if self.adata is None:
            msg = "the network was loaded without data; load it with adata="
            raise ValueError(msg)
        counts = {"max_epochs": max_epochs, "batch_size": batch_size, "n_averaged": n_averaged}
        counts |= {"small_network_epochs": small_network_epochs, "adjacency_epochs": adjacency_epochs}
        if wrong := [name for name, value in counts.items() if value < 1]:
            msg = f"{', '.join(wrong)} must be at least 1"
            raise ValueError(msg)
        if alpha < 0 or beta < 0 or lr <= 0 or adjacency_lr <= 0:
            msg = "alpha and beta must not be negative, learning rates must be positive"
            raise ValueError(msg)
        cells = StandardExpression.of(self._expression())
        self.to_device(_device(accelerator, device))
        start = _logging.info(f"refining a network of {len(self.genes):,} genes on {cells.values.shape[0]:,} cells")
        show = settings.verbosity >= 2 if progress is None else progress
        losses, kept = [], []
        epochs = refine(
            self.module.train(),
            cells,
            max_epochs=max_epochs,
            batch_size=batch_size,
            lr=lr,
            adjacency_lr=adjacency_lr,
            alpha=alpha,
            beta=beta,
            small_network_epochs=small_network_epochs,
            adjacency_epochs=adjacency_epochs,
            n_kept=n_averaged,
            seed=seed_or_default(seed),
        )
        try:
            for _, epoch in zip(trange(max_epochs, desc="epochs", disable=not show, leave=False), epochs, strict=True):
                losses.append(epoch.losses)
                if epoch.adjacency is not None:
                    kept.append(epoch.adjacency)
        finally:
            epochs.close()
            self.module.eval()
        self._kept = torch.stack(kept)
        table = pd.DataFrame(losses).rename_axis("epoch")
        names = {name: "train_loss_epoch" if name == "total" else f"{name}_train" for name in table}
        self.history_ = joined(
            self.history_, {names[name]: table[[name]].set_axis([names[name]], axis=1) for name in table}
        )
        self.is_trained_ = True
        _logging.info("    finished", time=start)

    # -- what it gives -----------------------------------------------------------------------------------------------

    def get_adjacency(self) -> pd.DataFrame:
        """Weights of the network, with targets as rows and sources as columns, averaged over the last epochs of training.

        Before training this is the start.
        """
        return pd.DataFrame(
            self._matrix(), index=pd.Index(self.genes, name="target"), columns=pd.Index(self.genes, name="source")
        )

    def _matrix(self) -> np.ndarray:
        matrix = self._kept.double().mean(0) if len(self._kept) else self.module.network.detach().cpu()
        return matrix.float().numpy()

    def get_edges(self, tfs: Sequence[str] | None = None, top_n: int | None = None) -> pd.DataFrame:
        """Edges of the network.

        Parameters
        ----------
        tfs
            Genes that may be sources; by default those named when the network was made.
        top_n
            Number of strongest edges; by default all.

        Returns
        -------
        Table with ``source``, ``target`` and ``weight``, the largest absolute weight first.
        """
        sources = self.tfs if tfs is None else self._known_tfs(tfs)
        edges = edges_from_matrix(self._matrix(), self.genes, sources=sources)
        return edges if top_n is None else edges.head(top_n)

    def score(
        self,
        known: pd.DataFrame,
        *,
        average: Literal["edges", "scores"] = "edges",
        unmeasured: Literal["leave_out", "count"] = "leave_out",
    ) -> dict[str, float]:
        """Compare the network with a known one.

        Parameters
        ----------
        known
            Table with the columns ``source`` and ``target``.
        average
            ``"edges"`` scores the network, averaged over the last epochs. ``"scores"`` scores each of these epochs, and
            averages the scores, as the authors of scLong do.

        unmeasured
            Known edges with a gene that the network does not have, which no method can predict: ``"leave_out"``, as BEELINE
            and :func:`scfm.benchmark.networks` do, or ``"count"`` as missed, as the script of scLong does.

        Returns
        -------
        See :func:`scfm.metrics.network_scores`.

        Raises
        ------
        ValueError
            If no known edge is between genes of the network.
        """
        if average not in ("edges", "scores"):
            msg = f"average must be 'edges' or 'scores'; got {average!r}"
            raise ValueError(msg)
        if unmeasured not in ("leave_out", "count"):
            msg = f"unmeasured must be 'leave_out' or 'count'; got {unmeasured!r}"
            raise ValueError(msg)
        inside = edges_between(known, self.genes, "the network")
        known = inside if unmeasured == "leave_out" else known
        if average == "edges" or not len(self._kept):
            return network_scores(known, self.get_edges())
        each = [
            network_scores(known, edges_from_matrix(one.numpy(), self.genes, sources=self.tfs)) for one in self._kept
        ]
        return pd.DataFrame(each).mean().to_dict()

    # -- saving ------------------------------------------------------------------------------------------------------

    def _saved_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        weights = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {"tfs": self._tfs}, weights | {"kept": self._kept}

    def _restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor], place: Path, device: str) -> None:
        self._tfs, made = state["tfs"], self.init_params_["non_kwargs"]
        weights = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
        self._start(weights["adjacency"].numpy(), made["inverse"], made["hidden"], made["seed"], device)
        self.module.load_state_dict(weights)
        self._kept = tensors["kept"]

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the network is, in a few lines."""
        made = self.init_params_["non_kwargs"]
        origin = f"{made['init']} of {made['checkpoint']}" if made["checkpoint"] else made["init"]
        return (
            f"{type(self).__name__} with the following parameters:\n"
            f"{len(self.genes):,} genes, {len(self.tfs):,} possible sources, start: {origin}, inverse: {made['inverse']}\n"
            f"Training status: {'Trained' if self.is_trained_ else 'Not Trained'}"
        )


def _check_genes(genes: np.ndarray) -> None:
    if len(set(genes)) < len(genes):
        msg = "names of genes are not unique; call adata.var_names_make_unique(), or sum the columns of a gene first"
        raise ValueError(msg)
    if not 2 <= len(genes) <= _MOST_GENES:
        msg = (
            f"the data have {len(genes):,} genes; a network has 2 to {_MOST_GENES:,}. Choose some, for example "
            "variable genes and transcription factors, with adata[:, genes].copy()"
        )
        raise ValueError(msg)


def _chosen(init: str | None, model: Any, adjacency: Any) -> str:
    """The start, by default what fits to the arguments."""
    if adjacency is not None:
        if init is not None or model is not None:
            msg = "adjacency= is a start itself; leave init= and model= out"
            raise ValueError(msg)
        return _GIVEN
    if init is None:
        return "random" if model is None else "paper"
    if init not in (*OF_MODEL, *OF_DATA):
        msg = f"init must be one of {', '.join(map(repr, (*OF_MODEL, *OF_DATA)))}; got {init!r}"
        raise ValueError(msg)
    if (init in OF_MODEL) == (model is None):
        needed = "needs model=" if init in OF_MODEL else "needs no model; leave model= out"
        msg = f"init={init!r} {needed}"
        raise ValueError(msg)
    return init
