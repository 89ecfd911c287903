"""One embedding of cells from several modalities."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scvi
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.data._manager import AnnDataManagerValidationCheck

from .. import _logging, engine
from .._errors import UnsupportedError
from ..genes import resolve_gene_names
from ..tasks.integration import BATCH
from ..tasks.multiomics import MultiomicLearner
from ._base import _MIN_GENE_SHARE
from ._batch_field import batch_codes
from ._fields import GENES_KEY, GeneField, MatchedNames
from ._integrator import split_within
from ._multiome_data import KINDS, RNA, Modalities, find_modalities, measured, open_joint, read_mudata, require_mudata
from ._multiome_features import FeatureChoice, choose_features, feature_labels, match_features, note_new_genes
from ._multiome_fields import ModalitiesField, SampleField, require_some
from ._representations import selection
from ._task import TaskModel
from ._training import seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from mudata import MuData
    from torch import Tensor

    from ..backbones import Backbone
    from ..genes import GeneMatch
    from ..train._presets import Optimization
    from ._training import Freeze

    Data = MuData | str | os.PathLike[str]

_PEAKS = 4000
# most cells of a block, and most entries if zeros become tokens
_BLOCK_CELLS, _BLOCK_ENTRIES = 2048, 2**21


class MultiomeIntegrator(TaskModel):
    """One embedding for cells with several modalities: RNA and peaks, RNA and proteins, or all three.

    As the authors of scGPT do it: a network whose vocabulary holds the genes that the pre-trained model knows, with
    their embeddings, and new entries for peaks, proteins and other genes. All its layers are fresh and are trained on
    the data; a batch classifier with reversed gradient takes part if there are several batches. Modalities differ in
    what the decoders are told, not in how cells are embedded.

    Cells need not have all modalities (mosaic data). A modality that a cell is not in, or has only zeros of, gives
    no tokens: it is not taken for a measurement of zeros. Every modality has to be linked to the others by some cells.

    Parameters
    ----------
    mdata
        Data that were set up with :meth:`setup_mudata`.
    registry
        Registry of such data, with which a model is loaded.
    checkpoint
        Name of a checkpoint, a folder, or a model from :func:`scfm.load`, which is copied. The model has to be of a kind
        that can hold several modalities, which is scGPT.
    n_top_genes
        Highly variable genes to take, known to the model or not; ``"all"`` for all. By default as in the paper (1,200).
    n_top_peaks
        Peaks to take: those whose accessibility, open or not, varies most over cells, which are those open in closest
        to half of the cells. ``"all"`` for all.
    n_layers
        Layers of the network; by default as in the paper (4), or fewer if the pre-trained model has fewer.
    pooling
        Cell embedding; by default as the authors make it.
    options
        Options of the loss: ``mask_ratio`` (0.4), ``dar_weight`` (1), ``ecs_weight`` (0) and others of
        ``scfm.backbones.scgpt.finetune.finetune_loss``.
    tokenize
        Options of the model's tokenizer, beside or instead of those of the paper: ``include_zeros`` (only without
        proteins) makes tokens of features without counts, ``max_length`` (4001) is the longest cell; of longer ones a
        part is taken that depends on the cell alone.
    device, seed
        See :class:`scfm.models.TaskModel`.

    Attributes
    ----------
    feature_choice
        Features that the data are restricted to by kind of modality, and how they were chosen.

    Raises
    ------
    UnsupportedError
        If the model cannot hold several modalities.
    ValueError
        If no gene is known to the model, two features have the same name, or an argument makes no sense.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.MultiomeIntegrator.setup_mudata(
    ...     mdata, modalities={"rna": "rna", "protein": "prot"}
    ... )  # doctest: +SKIP
    >>> model = scfm.models.MultiomeIntegrator(mdata, checkpoint="scgpt")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> mdata.obsm["X_joint"] = model.get_latent_representation()  # doctest: +SKIP
    """

    learner: MultiomicLearner
    feature_choice: FeatureChoice | None = None

    def __init__(
        self,
        mdata: MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | Backbone = "scgpt",
        n_top_genes: int | Literal["all"] | None = None,
        n_top_peaks: int | Literal["all"] = _PEAKS,
        n_layers: int | None = None,
        pooling: str | None = None,
        options: Mapping[str, Any] | None = None,
        tokenize: Mapping[str, Any] | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        if mdata is not None:
            require_mudata(mdata)
        for name, number in (("n_top_genes", n_top_genes), ("n_top_peaks", n_top_peaks)):
            if isinstance(number, str) and number != "all":
                msg = f"{name} must be a number or 'all'; got {number!r}"
                raise ValueError(msg)
        super().__init__(
            mdata,
            registry,
            checkpoint=checkpoint,
            tokenize=tokenize,
            device=device,
            seed=seed,
            n_top_genes=n_top_genes,
            n_top_peaks=n_top_peaks,
            n_layers=n_layers,
            pooling=pooling,
            options=options,
        )

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        rna_layer: str | None = None,
        atac_layer: str | None = None,
        protein_layer: str | None = None,
        batch_key: str | None = None,
        modalities: Mapping[str, str | None] | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register data with several modalities; nothing but ``uns`` is changed.

        Parameters
        ----------
        mdata
            The data. Cells are those of ``mdata.obs``, the union over modalities; none needs to be in all of them.
        rna_layer, atac_layer, protein_layer
            Layers with raw counts; by default ``X``.
        batch_key
            Column of ``mdata.obs`` with the batch of each cell.
        modalities
            Names of the modalities, such as ``{"rna": "rna", "protein": "prot"}``; scvi-tools' ``"rna_layer"``,
            ``"atac_layer"`` and ``"protein_layer"`` mean the same. By default those with usual names.
        gene_symbols, gene_ids
            Columns of the RNA modality's ``var`` with gene symbols and Ensembl ids; by default they are looked for.
        aliases
            HGNC table of previous and alias symbols, as in :func:`scfm.tl.embed`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a modality, layer or column does not exist.
        TypeError
            If this is no MuData.
        ValueError
            If there is no RNA or nothing beside it, no cells link two modalities, ``mdata`` is a view, or there are
            impossible values.
        """
        require_mudata(mdata)
        modalities = find_modalities(mdata, modalities)
        setup_method_args = cls._get_setup_method_args(**locals())
        layout = Modalities.from_arguments(setup_method_args[_SETUP_ARGS_KEY])
        manager = AnnDataManager(
            fields=[
                ModalitiesField(layout, gene_symbols, gene_ids),
                *([] if batch_key is None else [SampleField(batch_key)]),
            ],
            setup_method_args=setup_method_args,
            validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
        )
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    @classmethod
    def setup_anndata(cls, adata: MuData, **arguments: Any) -> None:
        """The same as :meth:`setup_mudata`; it needs MuData, too.

        Parameters
        ----------
        adata
            The data.
        arguments
            Those of :meth:`setup_mudata`.
        """
        cls.setup_mudata(adata, **arguments)

    @property
    def modalities(self) -> dict[str, str]:
        """Name of the modality of each kind."""
        return dict(self._layout.names)

    @property
    def batch_key(self) -> str | None:
        """Column of ``obs`` that the batches come from."""
        return self.registry_[_SETUP_ARGS_KEY]["batch_key"]

    @property
    def batches(self) -> np.ndarray:
        """The batches, in the order of their numbers in the network; none without ``batch_key``."""
        if self.batch_key is None:
            return np.zeros(0, dtype=str)
        state = self.registry_[_FIELD_REGISTRIES_KEY][REGISTRY_KEYS.BATCH_KEY][_STATE_REGISTRY_KEY]
        return np.asarray(state[SampleField.CATEGORIES])

    @property
    def _layout(self) -> Modalities:
        return Modalities.from_arguments(self.registry_[_SETUP_ARGS_KEY])

    @property
    def _n_batches(self) -> int:
        """Batches that the network is told about: none if there is one only."""
        return len(self.batches) if len(self.batches) > 1 else 0

    def _make_learner(
        self,
        backbone: Backbone,
        *,
        n_top_genes: int | Literal["all"] | None,
        n_top_peaks: int | Literal["all"],
        **options: Any,
    ) -> MultiomicLearner:
        if self.adata is None:
            msg = "features are chosen on data; give mdata=, or load a saved model"
            raise ValueError(msg)
        match = self._align(self.adata)
        match.require_any(backbone.name)
        _logging.info(match.summary())
        if n_top_genes is None:
            n_top_genes = backbone.fine_tuning("multiomics").n_top_genes or "all"
        self.feature_choice = choose_features(
            self.adata,
            self._layout,
            match,
            self._codes(),
            n_top_genes=n_top_genes,
            n_top_peaks=n_top_peaks,
        )
        note_new_genes(self._gene_state(self.adata), self.feature_choice)
        learner = MultiomicLearner(backbone, self.feature_choice.names, n_batches=self._n_batches, **options)
        self._checked.add(self.get_anndata_manager(self.adata, required=True).id)
        return learner

    def _codes(self) -> np.ndarray:
        """Number of the batch of each cell."""
        if self.batch_key is None:
            return np.zeros(self.adata.n_obs, dtype=np.int64)
        return batch_codes(self.adata.obs, self.batch_key, self.batches)

    def _gene_state(self, mdata: MuData) -> dict[str, Any]:
        registry = self.get_anndata_manager(mdata, required=True).registry
        return registry[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    def _check_genes(self, mdata: MuData) -> None:
        """Look once at the features of each data set.

        Raises
        ------
        UnsupportedError
            If the model cannot hold several modalities.
        ValueError
            If the data have no feature of the model.
        """
        self.backbone.require("multiomics")
        manager = self.get_anndata_manager(mdata, required=True)
        if self.feature_choice is None or manager.id in self._checked:
            return
        state = self._gene_state(mdata)
        state[GeneField.MATCHED] = MatchedNames({**self._matched, **state[GeneField.MATCHED]})
        self._found(mdata, state)
        self._checked.add(manager.id)

    def _found(self, mdata: MuData, state: dict[str, Any]) -> tuple[dict[str, np.ndarray], GeneMatch]:
        """Numbers of the features of the model in any data, and what each of them is.

        Raises
        ------
        ValueError
            If there are none.
        """
        choice, aliases = self.feature_choice, self.registry_[_SETUP_ARGS_KEY]["aliases"]
        columns, match = match_features(mdata, self._layout, choice, self.backbone.vocab, state, aliases)
        n_expected = sum(len(choice.names[kind]) for kind in columns)
        if not match.n_matched:
            msg = (
                f"none of the {n_expected:,} features that the model was made for is in the data; are they called "
                "otherwise there?"
            )
            raise ValueError(msg)
        if (share := match.n_vocab_covered / n_expected) < _MIN_GENE_SHARE:
            msg = (
                f"the data have only {share:.0%} of the {n_expected:,} features of {', '.join(columns)} that the model was "
                "made for; the others count as not measured"
            )
            warnings.warn(msg, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)
        return columns, match

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        strategy: str = "auto",
        precision: str = "32-true",
        batch_size: int | None = None,
        train_size: float = 0.9,
        validation_size: float | None = None,
        early_stopping: bool = False,
        early_stopping_patience: int = 5,
        keep_best: bool | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimization: Optimization | str | None = None,
        freeze: Freeze | None = None,
        seed: int | None = None,
        log_every_n_steps: int = 10,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the network on the data.

        What is not given is as in the paper (scGPT: 25 epochs in mini-batches of 16, learning rate 1e-3 that falls by
        5 % after every epoch), see ``model.recipe``. The same seed gives the same weights.

        The cells to validate on are random cells of each batch with the same modalities.

        Parameters
        ----------
        max_epochs, max_steps
            Passes over the cells, or optimiser steps.
        accelerator, devices, strategy, precision
            As in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        batch_size
            Cells of a forward pass.
        train_size, validation_size
            Shares of the cells to train on, and to validate on.
        early_stopping, early_stopping_patience
            Stop when the loss of held-out cells has not fallen for so many epochs.
        keep_best
            Whether the weights of the epoch with the lowest loss of held-out cells count, or the last. What counts of
            that loss is ``model.recipe.monitor``, as upstream the error of masked values predicted from their tokens.
        lr, weight_decay
            Learning rate and weight decay.
        optimization
            Optimiser and schedule, or the name of a preset.
        freeze
            ``"backbone"`` trains all but the table of features, most of which is pre-trained; else as in
            :meth:`FoundationModel.train`.
        seed
            Seed of everything random; by default ``scvi.settings.seed``.
        log_every_n_steps
            How often the loss of a step is recorded.
        trainer_kwargs
            Further arguments of :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If shares make no sense, or values are not what the model needs.
        """
        mdata = self._validate_anndata()
        seed, codes = seed_or_default(seed), self._codes()
        patterns = np.unique(np.column_stack([codes, measured(mdata, self._layout)]), axis=0, return_inverse=True)[1]
        self._fit(
            split_within(patterns.ravel(), train_size, validation_size, seed),
            labels={BATCH: codes} if self._n_batches else {},
            max_epochs=max_epochs,
            max_steps=max_steps,
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,
            batch_size=batch_size,
            early_stopping=early_stopping,
            early_stopping_patience=early_stopping_patience,
            keep_best=keep_best,
            lr=lr,
            weight_decay=weight_decay,
            optimization=optimization,
            freeze=freeze,
            seed=seed,
            log_every_n_steps=log_every_n_steps,
            **trainer_kwargs,
        )

    # -- what it gives -----------------------------------------------------------------------------------------------

    def get_latent_representation(
        self,
        mdata: Data | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int | None = None,
        *,
        pooling: str | None = None,
        **tokenize_options: Any,
    ) -> np.ndarray:
        """Embed cells from all the modalities that they have.

        Parameters
        ----------
        mdata
            Any data with features of the model, in any order, which need not be set up; also the path of an ``.h5mu``
            file. Modalities and batches may be missing.
        indices
            Numbers of cells, or a mask; all by default.
        batch_size
            Most cells in one forward pass.
        pooling
            Another cell embedding than the one that was chosen.
        tokenize_options
            Options of the backbone's ``tokenize``.

        Returns
        -------
        Embeddings, float32 of shape ``(cells, dim)``, in the order of ``mdata.obs``. Cells without any feature that the
        model knows have NaN.

        Raises
        ------
        KeyError
            If the layer of the setup does not exist.
        TypeError
            If this is no MuData.
        ValueError
            If no modality or no feature is known, or values are not what the model needs.
        """
        backbone = self.backbone
        pooling = backbone.check_pooling(self.learner.pooling if pooling is None else pooling)
        with self._any_cells(mdata, indices, **tokenize_options) as task:
            # zeros that become tokens are no stored values, by which the engine measures a block
            zeros = task.options.get("include_zeros", False)
            result = engine.run(
                **task.inputs,
                compute=lambda backbone, tokens: backbone.embed(tokens, pooling=pooling),
                shape=(backbone.embedding_dim(pooling),),
                task={"output": "joint cell embedding", "pooling": pooling},
                batch_size=batch_size,
                block_size=max(1, min(_BLOCK_CELLS, _BLOCK_ENTRIES // task.source.n_vars)) if zeros else None,
            )
        if result.n_empty:
            _logging.warning(f"{result.n_empty:,} cells have no value that {backbone.name} uses; they are NaN")
        return result.array

    def get_feature_representation(self, kinds: Sequence[str] | None = None) -> pd.DataFrame:
        """Vectors that the model has learned for genes, peaks and proteins.

        Parameters
        ----------
        kinds
            Kinds of modalities, ``"rna"``, ``"atac"`` or ``"protein"``; all by default.

        Returns
        -------
        A table with one row for each feature. Its index has the levels ``modality`` and ``feature``. Genes have the
        names that they have in the model, peaks and proteins those of the data.

        Raises
        ------
        KeyError
            If the model has no such modality.
        """
        choice = self.feature_choice
        kinds = list(choice.names) if kinds is None else list(kinds)
        if unknown := [kind for kind in kinds if kind not in choice.names]:
            msg = f"the model has no {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, choice.names))}"
            raise KeyError(msg)
        table = self.backbone.gene_embeddings().cpu().numpy()
        parts = [table[self.backbone.vocab.get_ids(choice.names[kind])] for kind in kinds]
        labels = [(kind, label) for kind in kinds for label in feature_labels(kind, choice.names[kind])]
        index = pd.MultiIndex.from_tuples(labels, names=["modality", "feature"])
        return pd.DataFrame(np.concatenate(parts), index=index)

    def get_gene_representation(self, *args: Any, **options: Any) -> pd.DataFrame:
        """Not offered: see :meth:`get_feature_representation`.

        Raises
        ------
        UnsupportedError
            Always.
        """
        msg = "features of several modalities are embedded by get_feature_representation"
        raise UnsupportedError(msg)

    def get_reconstruction(self, *args: Any, **options: Any) -> pd.DataFrame:
        """Not offered: the backbone itself predicts values, see :meth:`scfm.Backbone.reconstruct`.

        Raises
        ------
        UnsupportedError
            Always.
        """
        msg = "values of several modalities are predicted by model.backbone.reconstruct, from tokens"
        raise UnsupportedError(msg)

    @contextmanager
    def _any_cells(
        self, mdata: Data | None, indices: Sequence[int] | Sequence[bool] | None = None, **options: Any
    ) -> Iterator[engine.Task]:
        mdata = self.adata if mdata is None else read_mudata(mdata)
        if mdata is None:
            msg = "the model was loaded without data; give mdata="
            raise ValueError(msg)
        arguments, layout = self.registry_[_SETUP_ARGS_KEY], self._layout
        present = require_some(mdata, layout)
        state = {GeneField.MATCHED: dict(self._matched)}
        if RNA in present:
            var = present[RNA].var
            columns = [
                column if column is None or column in var else None
                for column in (arguments["gene_symbols"], arguments["gene_ids"])
            ]
            names = resolve_gene_names(var, *columns)
            state |= {GeneField.NAMES: names.symbols, GeneField.ENSEMBL_IDS: names.ensembl_ids}
        columns, match = self._found(mdata, state)
        with open_joint(mdata, layout, columns) as source:
            if indices is not None:
                source = source.select(np.arange(source.n_obs)[selection(indices)])
            options = {**self.learner.tokenize, **options}
            engine.check_options(self.backbone, options, source.n_obs)
            yield engine.Task(self.backbone, source, match, options)

    def _cells(self, adata: MuData, indices: Any = None, **tokenize_options: Any) -> Any:
        return self._any_cells(adata, indices, **tokenize_options)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _task_state(self) -> dict[str, Any]:
        learner, choice = self.learner, self.feature_choice
        return {
            "pooling": learner.pooling,
            "tokenize": learner.tokenize,
            "options": learner.options,
            "parts": list(learner.parts),
            "features": {kind: names.astype(str) for kind, names in choice.names.items()},
            "how": dict(choice.how),
        }

    def _set_task(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        features = {kind: np.asarray(names, dtype=object) for kind, names in state["features"].items()}
        self.feature_choice = FeatureChoice({kind: features[kind] for kind in KINDS if kind in features}, state["how"])
        learner = MultiomicLearner(
            self.backbone,
            self.feature_choice.names,
            n_batches=self._n_batches,
            seed=seed_or_default(None),
            continued=True,
            **{name: state[name] for name in ("pooling", "tokenize", "options", "parts")},
        )
        self._use(learner)
        if self.adata is not None:
            self._check_genes(self.adata)

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        first, _, rest = super().summary_string.partition("\n")
        middle, _, last = rest.partition("\n")
        batches = f", {self._n_batches} batches in {self.batch_key!r}" if self._n_batches else ""
        return f"{first}\n{middle}\n{self.feature_choice}{batches}\n{last}"
