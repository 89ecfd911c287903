"""The base of the model classes: setup of data, the backbone, and training."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scvi
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.data.fields import CategoricalObsField
from scvi.model.base import BaseModelClass

from .. import _logging
from ..train._plan import PretrainingPlan
from ._alignment import align
from ._backbone import load_backbone, new_backbone
from ._fields import GENES_KEY, CountsField, GeneField, MatchedNames
from ._module import FoundationModule
from ._representations import RepresentationMixin
from ._saving import SavingMixin
from ._train_arguments import optimizer_fields, splitting
from ._training import choose_optimization, fit, seed_or_default, split_cells, trainable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from anndata import AnnData

    from ..backbones import Backbone
    from ..genes import GeneMatch
    from ..train._presets import Optimization
    from ._training import Freeze

# as in scvi-tools
_MIN_GENE_SHARE = 0.8
_BATCH_SIZE = 32


class FoundationModel(SavingMixin, RepresentationMixin, BaseModelClass):
    """A foundation model with the interface of scvi-tools models.

    A class for a backbone has nothing but its ``kind``; see :func:`scfm.models.model_class`.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`.
    registry
        Registry of such data, for a model without them.
    checkpoint
        Where the weights come from: a name of :func:`scfm.checkpoints.list`, a folder, or a model from
        :func:`scfm.load`, which is copied. By default the bundled mini model of this kind, if there is one.
    config
        Hyper-parameters of a network with fresh weights, whose vocabulary holds the genes of ``adata``; instead of
        ``checkpoint``.
    device
        Where to compute, until training chooses another place.
    seed
        Seed of fresh weights; by default ``scvi.settings.seed``.
    options
        Further arguments of :func:`scfm.load`.

    Attributes
    ----------
    backbone
        The model itself, for everything else that it can do.
    module
        Its network.
    history
        Losses of training, a data frame for each.

    Raises
    ------
    ValueError
        If ``adata`` is not set up, its genes are not known to the model, or both ``checkpoint`` and ``config`` are
        given.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | Backbone | None = None,
        config: Mapping[str, Any] | Any | None = None,
        device: str = "auto",
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if checkpoint is not None and config is not None:
            msg = "checkpoint= gives trained weights, config= fresh ones; give one of them"
            raise ValueError(msg)

        def make(genes: dict[str, Any]) -> Backbone:
            if config is None:
                return load_backbone(self.kind, checkpoint, device=device, **options)
            return new_backbone(self.kind, config, genes, seed=seed_or_default(seed), device=device)

        self._start(adata, registry, make)
        self.from_scratch_ = config is not None
        self.init_params_ = {
            "kwargs": {},
            "non_kwargs": {
                "checkpoint": None if self.from_scratch_ else self.backbone.provenance.id,
                "config": self.backbone.config_to_dict() if self.from_scratch_ else None,
            },
        }

    def _start(
        self, adata: AnnData | None, registry: dict[str, Any] | None, make: Callable[[dict[str, Any]], Backbone]
    ) -> None:
        """Attach data and backbone; shared by making and loading."""
        BaseModelClass.__init__(self, adata, registry)
        if adata is not None:
            # a setup can serve several models, each of which notes what the genes are to it
            self._adata_manager = copy.copy(self._adata_manager)
            self._adata_manager._registry = copy.deepcopy(self._adata_manager._registry)
            self._register_manager_for_instance(self._adata_manager)
            self.registry_ = self._adata_manager._registry
        genes = self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]
        genes[GeneField.MATCHED] = MatchedNames(genes[GeneField.MATCHED])
        self.backbone = make(genes)
        self.module = FoundationModule(self.backbone)
        self.from_scratch_ = self._is_training = False
        self.history_ = None
        self._matched, self._checked = genes[GeneField.MATCHED], set()
        self._reference = np.zeros(0, dtype=np.int64)
        if self._matched:
            ids = self.backbone.vocab.get_ids([gene for gene in self._matched.values() if gene])
            self._reference = np.unique(ids[ids >= 0])
        if adata is not None:
            self._check_genes(adata)

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register data for a model of this class; nothing but ``obs`` and ``uns`` is changed.

        Parameters
        ----------
        adata
            Annotated data, in memory or backed.
        layer
            Layer with raw counts; by default ``X``.
        batch_key, labels_key
            Columns of ``obs`` with the batch and the label of each cell.
        gene_symbols, gene_ids
            Columns of ``var`` with gene symbols and Ensembl ids; by default they are looked for.
        aliases
            HGNC table of previous and alias symbols, as in :func:`scfm.tl.embed`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If ``adata`` is a view, or there are negative, missing or infinite values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        manager = AnnDataManager(
            fields=[
                CountsField(REGISTRY_KEYS.X_KEY, layer),
                CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
                CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
                GeneField(gene_symbols, gene_ids),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        adata = self.adata if adata is None else adata
        if adata is None:
            msg = "the model was loaded without data; give adata="
            raise ValueError(msg)
        if not adata.n_obs:
            msg = "the data have no cells"
            raise ValueError(msg)
        if adata.is_view and adata.isbacked:
            msg = "this is a view of a backed AnnData; give the whole object and choose cells with indices="
            raise ValueError(msg)
        adata = super()._validate_anndata(adata, copy_if_view)
        self._check_genes(adata)
        return adata

    def _align(self, adata: AnnData) -> GeneMatch:
        """What each gene of registered data is to the model."""
        registry = self.get_anndata_manager(adata, required=True).registry
        state = registry[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]
        # scvi-tools forgets what was matched when it registers data once more
        state[GeneField.MATCHED] = MatchedNames({**self._matched, **state[GeneField.MATCHED]})
        return align(self.backbone.vocab, state, registry[_SETUP_ARGS_KEY]["aliases"])

    def _check_genes(self, adata: AnnData) -> None:
        """Look once at the genes of each data set.

        Raises
        ------
        ValueError
            If the model knows none of them.
        """
        manager = self.get_anndata_manager(adata, required=True)
        if manager.id in self._checked:
            return
        match = self._align(adata)
        match.require_any(self.backbone.name)
        _logging.info(match.summary())
        self._checked.add(manager.id)
        if not len(self._reference):
            self._reference = np.unique(match.ids[match.ids >= 0])
            self._matched = manager.registry[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY][GeneField.MATCHED]
        share = float(np.isin(self._reference, match.ids).mean())
        if share < _MIN_GENE_SHARE:
            msg = (
                f"the data have only {share:.0%} of the {len(self._reference):,} genes that the model was set up with; "
                "the others count as not expressed"
            )
            warnings.warn(msg, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        *,
        max_steps: int | None = None,
        strategy: str = "auto",
        precision: str = "32-true",
        batch_size: int | None = _BATCH_SIZE,
        early_stopping: bool = False,
        early_stopping_patience: int = 5,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimization: Optimization | Mapping[str, Any] | str | None = None,
        objective: Mapping[str, Any] | None = None,
        freeze: Freeze | None = None,
        seed: int | None = None,
        log_every_n_steps: int = 10,
        **trainer_kwargs: Any,
    ) -> None:
        """Go on with the pre-training of the paper on the data of the model.

        With adapters (:func:`scfm.train.add_lora`) only these are trained. The same seed gives the same weights.

        Parameters
        ----------
        max_epochs
            Passes over the data; by default 10, fewer for more than 20,000 cells.
        accelerator, devices
            Where to train, as in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size
            Shares of the cells to train on, and to compute the validation loss on; by default 0.9 and the rest. Cells
            in neither are left alone.
        max_steps
            Stop after so many optimiser steps.
        strategy
            How several devices share the work: ``"ddp"``, which ``"auto"`` also means where there are several.
        precision
            ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; weights are float32 in all of them.
        batch_size
            Cells of a forward pass; ``None`` for 32.
        early_stopping, early_stopping_patience
            Stop when the validation loss has not fallen for so many epochs; ``early_stopping_monitor``,
            ``early_stopping_mode``, ``early_stopping_min_delta`` and ``early_stopping_warmup_epochs`` are those of
            :class:`scvi.train.Trainer`.
        lr, weight_decay
            Learning rate (1e-4 by default) and weight decay.
        optimization
            Optimiser and schedule, the name of a preset, such as that of the paper's pre-training, or fields that change
            the default (or their ``preset``). By default the paper's optimiser with a constant rate. Random features of
            Performers stay what they are, unless a preset or ``redraw_every`` says otherwise.
        objective
            Options of the backbone's objective, see the page of the model.
        freeze
            Which weights are left alone: regular expressions for their names, a number of last layers to train beside
            the heads, ``True`` for the embeddings of genes and values, or arguments of :func:`scfm.train.freeze`.
        seed
            Seed of everything random; by default ``scvi.settings.seed``.
        log_every_n_steps
            How often the loss of a step is recorded.
        trainer_kwargs
            Further arguments of :class:`scvi.train.Trainer`, such as ``accumulate_grad_batches`` and
            ``gradient_clip_val``; and ``plan_kwargs`` (``lr``, ``weight_decay``, ``eps``, ``optimizer``),
            ``shuffle_set_split``, ``datasplitter_kwargs`` and ``trainer_config`` as scvi-tools models take them.

        Raises
        ------
        ValueError
            If shares or numbers make no sense, early stopping has nothing to watch, the objective has no such option, or
            values are no counts where they are needed.
        """
        self._validate_anndata()
        seed = seed_or_default(seed)
        optimization = choose_optimization(
            self.backbone, optimization, lr, weight_decay, optimizer_fields(trainer_kwargs)
        )
        self.backbone.check_objective(objective or {})
        self._is_training = True
        try:
            fit(
                self,
                partial(PretrainingPlan, self.backbone, optimization, objective=objective),
                trainable(self.backbone, freeze),
                split_cells(self.adata.n_obs, train_size, validation_size, seed, **splitting(trainer_kwargs)),
                max_epochs=max_epochs,
                max_steps=max_steps,
                accelerator=accelerator,
                devices=devices,
                strategy=strategy,
                precision=precision,
                batch_size=_BATCH_SIZE if batch_size is None else batch_size,
                early_stopping=early_stopping,
                early_stopping_patience=early_stopping_patience,
                seed=seed,
                log_every_n_steps=log_every_n_steps,
                **trainer_kwargs,
            )
        finally:
            self._is_training = False

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        backbone = self.backbone
        origin = "fresh weights" if self.from_scratch_ else f"checkpoint {backbone.provenance.id}"
        return (
            f"{type(self).__name__} model with the following parameters:\n"
            f"{origin}, {backbone.n_parameters / 1e6:.1f} M parameters, {backbone.vocab.n_genes:,} genes, "
            f"embeddings of width {backbone.embedding_dim()}\n"
            f"Training status: {'Trained' if self.is_trained_ else 'Not Trained'}"
        )
