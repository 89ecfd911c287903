"""Cells of several batches in one space."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scvi
from anndata import AnnData
from anndata.io import read_elem
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY

from .. import _logging, engine
from ..data import open_source
from ..data._files import open_file
from ..tasks.integration import BATCH, IntegrationLearner
from ._batch_field import BatchField, batch_codes
from ._fields import CountsField, GeneField
from ._label_field import LabelField
from ._representations import selection
from ._task import TaskModel
from ._training import seed_or_default, split_cells
from ._variable_genes import GeneChoice, among_chosen, given_genes, restricted, variable_genes

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..backbones import Backbone
    from ..tasks.integration import Objective
    from ..train._presets import Optimization
    from ._training import Freeze


class BatchIntegrator(TaskModel):
    """One embedding for cells of several batches, from any foundation model that is fine-tuned on them.

    Models whose authors integrate by fine-tuning are trained as they do it: scGPT with masked values, elastic cell
    similarity, a normalisation for each batch and an adversarial classifier of batches; CellFM with its pre-training
    objective on sampled zeros, without any knowledge of batches. All others, and these too if wanted, go on with their
    pre-training while the cell embedding learns to tell a classifier of batches nothing (``objective="adversarial"``);
    no paper has that, it is an extension of scfm.

    Fine-tuning can remove differences between batches that are biology. Compare with what
    :func:`scfm.tl.integrate` gives without training, and with Harmony or scVI.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`.
    registry
        Registry of such data, for a model without them.
    checkpoint
        Name of a checkpoint, a folder, or a model from :func:`scfm.load`, which is copied.
    objective
        ``"paper"`` or ``"adversarial"``, see above; by default the first where there is one.
    n_top_genes
        Restrict the data to so many highly variable genes among those that the model knows; all others count as
        unknown. ``"all"`` takes all genes. By default as in the paper: 1,200 for scGPT, all for the others. The genes
        are chosen on ``adata``, whose counts are read into memory for that, and stay with the model.
    genes
        Names of the genes to take instead.
    pooling
        Cell embedding; by default as the authors make it.
    options
        Options of the loss: for scGPT ``mask_ratio`` (0.4), ``ecs_weight`` (10), ``dar_weight`` (1) and others of
        ``scfm.backbones.scgpt.finetune.finetune_loss``, and of its network, ``ecs_threshold`` (0.8 as in the authors' code;
        the paper says 0.6), ``input_norm`` (``"dsbn"``, ``"batchnorm"``, ``"none"``) and ``explicit_zeros`` (true); for
        CellFM ``mask_ratio`` (0.5), ``zero_length`` (2048),
        ``similarity`` (0.8) and others of ``scfm.backbones.cellfm.objective.pretraining_loss``; for ``"adversarial"``
        those of the model's pre-training objective, and ``adversary_weight`` (1).
    tokenize
        Options of the model's tokenizer, beside or instead of those of the paper. scGPT's faster variant leaves zeros
        out (``tokenize={"include_zeros": False}``) and freezes the embeddings (``train(freeze=True)``).
    lora, device, seed
        See :class:`scfm.models.TaskModel`.

    Attributes
    ----------
    gene_choice
        Genes that the data are restricted to and how they were chosen; ``None`` for all genes.

    Raises
    ------
    KeyError
        If one of ``genes`` is not known.
    UnsupportedError
        If the model has no cell embeddings, or nothing to be trained with.
    ValueError
        If the genes are not known to the model, or an argument makes no sense.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.BatchIntegrator.setup_anndata(adata, batch_key="sample")  # doctest: +SKIP
    >>> model = scfm.models.BatchIntegrator(adata, checkpoint="scgpt")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> adata.obsm["X_integrated"] = model.get_latent_representation()  # doctest: +SKIP
    """

    learner: IntegrationLearner
    task = "integration"

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | Backbone = "scgpt",
        objective: Objective | None = None,
        n_top_genes: int | Literal["all"] | None = None,
        genes: Sequence[str] | None = None,
        pooling: str | None = None,
        options: Mapping[str, Any] | None = None,
        lora: int | Mapping[str, Any] | None = None,
        tokenize: Mapping[str, Any] | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        if isinstance(n_top_genes, str) and n_top_genes != "all":
            msg = f"n_top_genes must be a number, 'all' or None; got {n_top_genes!r}"
            raise ValueError(msg)
        if n_top_genes is not None and genes is not None:
            msg = "n_top_genes= chooses genes, genes= names them; give one of them"
            raise ValueError(msg)
        self.gene_choice: GeneChoice | None = None
        self._trained_batches: set[str] = set()
        super().__init__(
            adata,
            registry,
            checkpoint=checkpoint,
            lora=lora,
            tokenize=tokenize,
            device=device,
            seed=seed,
            objective=objective,
            pooling=pooling,
            options=options,
        )
        if genes is None and n_top_genes is None:
            n_top_genes = self.recipe.n_top_genes
        if genes is not None or isinstance(n_top_genes, int):
            self.gene_choice = self._choose(n_top_genes, genes)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str,
        labels_key: str | None = None,
        layer: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register data of several batches; nothing but ``uns`` is changed.

        Parameters
        ----------
        adata
            Annotated data, in memory or backed.
        batch_key
            Column of ``obs`` with the batch of each cell.
        labels_key
            Column of ``obs`` with cell types. Training does not look at them.
        layer
            Layer with raw counts; by default ``X``.
        gene_symbols, gene_ids, aliases
            As in :meth:`FoundationModel.setup_anndata`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If there is one batch only, a cell has none, ``adata`` is a view, or there are impossible values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        manager = AnnDataManager(
            fields=[
                CountsField(REGISTRY_KEYS.X_KEY, layer),
                BatchField(batch_key),
                *([] if labels_key is None else [LabelField(labels_key)]),
                GeneField(gene_symbols, gene_ids),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def batches(self) -> np.ndarray:
        """The batches, in the order of their numbers in the network."""
        state = self.registry_[_FIELD_REGISTRIES_KEY][REGISTRY_KEYS.BATCH_KEY][_STATE_REGISTRY_KEY]
        return np.asarray(state[BatchField.CATEGORIES])

    @property
    def batch_key(self) -> str:
        """Column of ``obs`` that the batches come from."""
        return self.registry_[_SETUP_ARGS_KEY]["batch_key"]

    def _make_learner(self, backbone: Backbone, **options: Any) -> IntegrationLearner:
        return IntegrationLearner(backbone, len(self.batches), **options)

    def _choose(self, n_top_genes: int | None, genes: Sequence[str] | None) -> GeneChoice:
        """Genes that the data are restricted to."""
        if self.adata is None:
            msg = "genes are chosen on data; give adata=, or n_top_genes='all'"
            raise ValueError(msg)
        match = self._align(self.adata)
        if genes is not None:
            return given_genes(match, list(genes))
        codes = batch_codes(self.adata.obs, self.batch_key, self.batches)
        with open_source(self.adata, layer=self.registry_[_SETUP_ARGS_KEY]["layer"]) as source:
            return variable_genes(source, match, codes, n_top_genes)

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
        """Fine-tune the model on the data.

        What is not given is as in the paper of the model, see ``model.recipe``. The same seed gives the same weights.

        The cells to validate on are random cells of every batch: the batches of the data are all that there is, so
        there is no unseen batch to do well on.

        Parameters
        ----------
        max_epochs, max_steps
            Passes over the cells, or optimiser steps.
        accelerator, devices, strategy, precision
            As in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        batch_size
            Cells of a forward pass.
        train_size, validation_size
            Shares of the cells of each batch to train on, and to validate on.
        early_stopping, early_stopping_patience
            Stop when the loss of held-out cells has not fallen for so many epochs.
        keep_best
            Whether the weights of the epoch with the lowest loss of held-out cells count, or the last. What counts of
            that loss is ``model.recipe.monitor``: for scGPT, as upstream, the error of masked values alone; for
            ``"adversarial"`` the pre-training objective, because a good classifier of batches is no success.
        lr, weight_decay
            Learning rate and weight decay.
        optimization
            Optimiser and schedule, or the name of a preset.
        freeze
            ``"backbone"`` trains what was made for the task alone; else as in :meth:`FoundationModel.train`.
        seed
            Seed of everything random; by default ``scvi.settings.seed``.
        log_every_n_steps
            How often the loss of a step is recorded.
        trainer_kwargs
            Further arguments of :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If shares make no sense, or values are no counts where they are needed.
        """
        adata = self._validate_anndata()
        seed = seed_or_default(seed)
        codes = batch_codes(adata.obs, self.batch_key, self.batches)
        split = split_within(codes, train_size, validation_size, seed)
        self._fit(
            split,
            labels={BATCH: codes},
            groups=codes if self.recipe.by_batch else None,
            genes=partial(restricted, choice=self.gene_choice),
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
        self._trained_batches |= set(self.batches[np.unique(codes[split[0]])].tolist())

    # -- what it gives -----------------------------------------------------------------------------------------------

    def get_latent_representation(
        self,
        adata: AnnData | str | os.PathLike[str] | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int | None = None,
        *,
        pooling: str | None = None,
        **tokenize_options: Any,
    ) -> np.ndarray:
        """Embed cells.

        Networks with a normalisation for each batch use that of the cell's own batch.

        Parameters
        ----------
        adata
            Any data with genes that the model knows, which need not be set up; also the path of a file. The column of
            batches is needed only if the network looks at it.
        indices
            Numbers of cells, or a mask; all by default.
        batch_size
            Most cells in one forward pass.
        pooling
            Another cell embedding than the one that was trained.
        tokenize_options
            Options of the backbone's ``tokenize``.

        Returns
        -------
        Embeddings, float32 of shape ``(cells, dim)``, in the order of the cells. Cells without any gene that the model
        knows have NaN.

        Raises
        ------
        KeyError
            If the layer of the setup, or the column of batches, does not exist.
        TypeError
            If ``batch_labels`` are given, which come from the column of batches.
        ValueError
            If the network needs the batch and that of a cell is unknown to it, no gene is known, or values are not
            what the model needs.
        """
        if "batch_labels" in tokenize_options:
            msg = f"batches are those of obs[{self.batch_key!r}]; leave batch_labels= out"
            raise TypeError(msg)
        backbone = self.backbone
        with self._any_cells(adata, indices, **tokenize_options) as whole:
            task = among_chosen(whole, self.gene_choice)
            task.match.require_any(f"{backbone.name}, or among the genes that were chosen")
            pooling = backbone.check_pooling(self.learner.pooling if pooling is None else pooling)
            options = backbone.pooling_options(pooling, task.match)
            result = engine.run(
                **task.inputs,
                compute=lambda backbone, tokens: backbone.embed(tokens, pooling=pooling, **options),
                shape=(backbone.embedding_dim(pooling, **options),),
                task={"output": "integrated cell embedding", "pooling": pooling},
                batch_size=batch_size,
            )
        if result.n_empty:
            _logging.warning(f"{result.n_empty:,} cells have no expressed gene that {backbone.name} uses; they are NaN")
        return result.array

    def _options_for(self, adata: AnnData | str | os.PathLike[str], rows: np.ndarray) -> dict[str, Any]:
        if not self._uses_batches:
            return {}
        if isinstance(adata, AnnData):
            obs = adata.obs
        else:
            with ExitStack() as files:
                obs = read_elem(open_file(Path(adata), files).root["obs"])
        codes = batch_codes(obs, self.batch_key, self.batches)[rows]
        if untrained := sorted(set(self.batches[np.unique(codes)].tolist()) - self._trained_batches):
            msg = (
                f"the model has not been trained on cells of {', '.join(untrained)}, for which it has a normalisation of "
                "their own; call train()"
            )
            warnings.warn(msg, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)
        return {"batch_labels": codes}

    def _cells(self, adata: AnnData, indices: Any = None, **tokenize_options: Any) -> Any:
        if self._uses_batches and "batch_labels" not in tokenize_options:
            codes = batch_codes(adata.obs, self.batch_key, self.batches)
            tokenize_options["batch_labels"] = codes[selection(indices)]
        return super()._cells(adata, indices, **tokenize_options)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _task_state(self) -> dict[str, Any]:
        learner, choice = self.learner, self.gene_choice
        return {
            "objective": learner.objective,
            "pooling": learner.pooling,
            "tokenize": learner.tokenize,
            "options": learner.options,
            "parts": list(learner.parts),
            "genes": None if choice is None else {"names": choice.genes.astype(str), "how": choice.how},
            "trained_batches": sorted(self._trained_batches),
        }

    def _set_task(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        names = ("objective", "pooling", "tokenize", "options", "parts")
        learner = IntegrationLearner(
            self.backbone,
            len(self.batches),
            seed=seed_or_default(None),
            continued=True,
            **{name: state[name] for name in names},
        )
        if learner.head is not None:
            learner.load_head(tensors)
        self._use(learner)
        genes = state["genes"]
        self.gene_choice = None if genes is None else GeneChoice(np.asarray(genes["names"]), genes["how"])
        self._trained_batches = set(state["trained_batches"])

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        first, _, rest = super().summary_string.partition("\n")
        middle, _, last = rest.partition("\n")
        choice = self.gene_choice
        genes = "all genes" if choice is None else f"{len(choice.genes):,} genes ({choice.how})"
        return (
            f"{first}\n{middle}\n{len(self.batches)} batches in {self.batch_key!r}, {genes}, objective: "
            f"{self.learner.objective}\n{last}"
        )


def split_within(
    groups: np.ndarray, train_size: float, validation_size: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the cells to train on, to validate on, and to leave alone: random cells of each group.

    Parameters
    ----------
    groups
        Group of each cell, whole numbers.
    train_size, validation_size, seed
        As in :func:`split_cells`.
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        divided = split_cells(len(rows), train_size, validation_size, seed + int(group))
        for part, chosen in zip(parts, divided, strict=True):
            part.append(rows[chosen])
    train, validation, left = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, left
