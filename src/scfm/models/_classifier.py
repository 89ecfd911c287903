"""Cell types learned from labelled cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.data.fields import CategoricalObsField

from .. import _logging, engine
from ..tasks.classifier import LABEL, PLAIN_HEADS, ClassLearner, class_weights
from ._fields import CountsField, GeneField
from ._label_field import LabelField, label_codes
from ._splits import divide
from ._task import TaskModel
from ._training import seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from torch import Tensor

    from ..backbones import Backbone
    from ..train._presets import Optimization
    from ._training import Freeze

_RECIPE = "recipe"
_MONITORS = ("loss", "macro F1")


class CellTypeClassifier(TaskModel):
    """Cell types from any foundation model, fine-tuned on labelled cells.

    Models whose paper has a classifier get that one, trained as the authors do: scGPT a network on the state of
    ``<cls>``, scFoundation a network on the maximum over tokens with only the second-last layer trained, CellFM learned
    class tokens that look at the genes. All others get a small network on the cell embedding.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`.
    registry
        Registry of such data, for a model without them.
    checkpoint
        Name of a checkpoint, a folder, or a model from :func:`scfm.load`, which is copied.
    head
        Head of the model's paper (``"cls"`` for scGPT, ``"max-pool"`` or upstream's ``"max-pool-padded"`` for
        scFoundation, ``"retention"`` or ``"mlp"`` for CellFM), or for any model ``"mlp"`` or ``"linear"`` on the cell
        embedding.
    pooling
        Cell embedding that ``"mlp"`` and ``"linear"`` start from.
    hide
        For ``"mlp"`` of CellFM: hide part of the genes in training and predict them along with the classes, in one forward
        pass, as the authors' PyTorch port does; ``True``, or options of the loss (``mask_ratio``, ``similarity``,
        ``zero_length``, ``down_sampling``). Predictions are made from whole cells.
    weights
        Which weights of a checkpoint that holds several; by default those the authors fine-tune, if ``checkpoint`` is the
        name of a released one (``"gene"`` for scFoundation).
    lora, tokenize, device, seed
        See :class:`scfm.models.TaskModel`.

    Raises
    ------
    ValueError
        If the model has no such head, or the genes are not known to it.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.CellTypeClassifier.setup_anndata(reference, labels_key="cell_type")  # doctest: +SKIP
    >>> model = scfm.models.CellTypeClassifier(reference, checkpoint="scgpt")  # doctest: +SKIP
    >>> model.train(split_by="donor")  # doctest: +SKIP
    >>> query.obs["cell_type"] = model.predict(query)  # doctest: +SKIP
    """

    learner: ClassLearner
    task = "annotation"

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        checkpoint: str | os.PathLike[str] | Backbone = "scgpt",
        head: str | None = None,
        pooling: str | None = None,
        hide: bool | Mapping[str, Any] = False,
        lora: int | Mapping[str, Any] | None = None,
        tokenize: Mapping[str, Any] | None = None,
        weights: str | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            adata,
            registry,
            checkpoint=checkpoint,
            lora=lora,
            tokenize=tokenize,
            weights=weights,
            device=device,
            seed=seed,
            head=head,
            pooling=pooling,
            hide=hide,
        )

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        labels_key: str,
        unlabeled_category: str | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register labelled data; nothing but ``obs`` and ``uns`` is changed.

        Parameters
        ----------
        adata
            Annotated data, in memory or backed.
        labels_key
            Column of ``obs`` with the labels. Cells with a missing label are not trained on.
        unlabeled_category
            Label that stands for "not known", too.
        layer
            Layer with raw counts; by default ``X``.
        batch_key
            Column of ``obs`` with the batch of each cell. By default, whole batches are held out to validate on.
        gene_symbols, gene_ids, aliases
            As in :meth:`FoundationModel.setup_anndata`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If there are fewer than two labels, ``adata`` is a view, or there are impossible values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        manager = AnnDataManager(
            fields=[
                CountsField(REGISTRY_KEYS.X_KEY, layer),
                # first, because it refuses data without changing them
                LabelField(labels_key, unlabeled_category),
                CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
                GeneField(gene_symbols, gene_ids),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def classes(self) -> np.ndarray:
        """The cell types, in the order of the columns of probabilities."""
        state = self.registry_[_FIELD_REGISTRIES_KEY][REGISTRY_KEYS.LABELS_KEY][_STATE_REGISTRY_KEY]
        return np.asarray(state[LabelField.CLASSES], dtype=object)

    @property
    def labels_key(self) -> str:
        """Column of ``obs`` that the classes come from."""
        return self.registry_[_SETUP_ARGS_KEY]["labels_key"]

    def _make_learner(self, backbone: Backbone, **options: Any) -> ClassLearner:
        return ClassLearner(backbone, len(self.classes), **options)

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
        split_by: str | None = None,
        min_cells: int | None = None,
        class_weights: str | Mapping[str, float] | None = _RECIPE,
        early_stopping: bool = False,
        early_stopping_patience: int = 5,
        keep_best: bool | None = None,
        monitor: str | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimization: Optimization | str | None = None,
        freeze: Freeze | None = None,
        seed: int | None = None,
        log_every_n_steps: int = 10,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the head, and the weights of the model that its authors train.

        What is not given is as in the paper of the model, see ``model.recipe``. The same seed gives the same weights.

        Parameters
        ----------
        max_epochs, max_steps
            Passes over the cells, or optimiser steps.
        accelerator, devices, strategy, precision
            As in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        batch_size
            Cells of a forward pass.
        train_size, validation_size
            Shares of the labelled cells to train on, and to validate on.
        split_by
            Column of ``obs`` with groups (donors, batches, studies) that are held out as a whole; by default the
            batches of the setup, if there are several. Without groups, cells are held out at random, with a warning.
        min_cells
            Classes with fewer cells to train on are left out: they are never predicted.
        class_weights
            ``"balanced"``, ``"capped"``, weights by class, or ``None``, see
            :func:`scfm.tasks.classifier.class_weights`.
        early_stopping, early_stopping_patience
            Stop when ``monitor`` has not become better for so many epochs.
        keep_best
            Whether the weights of the epoch that is best on held-out cells count, or the last.
        monitor
            What best means: ``"loss"``, the lowest loss, or ``"macro F1"``, the highest F1 averaged over classes. By
            default as in the paper: F1 for scFoundation, else the loss. F1 of few cells of rare classes jumps.
        lr, weight_decay
            Learning rate and weight decay.
        optimization
            Optimiser and schedule, or the name of a preset.
        freeze
            ``"backbone"`` trains the head alone; else as in :meth:`FoundationModel.train`.
        seed
            Seed of everything random; by default ``scvi.settings.seed``.
        log_every_n_steps
            How often the loss of a step is recorded.
        trainer_kwargs
            Further arguments of :class:`scvi.train.Trainer`.

        Raises
        ------
        KeyError
            If ``split_by`` or a class of ``class_weights`` does not exist.
        ValueError
            If fewer than two classes have enough cells, shares make no sense, or ``monitor`` is unknown.
        """
        if monitor not in (None, *_MONITORS):
            msg = f"monitor must be one of {', '.join(map(repr, _MONITORS))}; got {monitor!r}"
            raise ValueError(msg)
        adata = self._validate_anndata()
        seed = seed_or_default(seed)
        arguments = self.registry_[_SETUP_ARGS_KEY]
        codes = label_codes(adata, arguments["labels_key"], self.classes)
        if split_by is None and arguments["batch_key"] is not None and adata.obs[arguments["batch_key"]].nunique() > 1:
            split_by = arguments["batch_key"]
        train, validation, test = divide(
            adata,
            np.flatnonzero(codes >= 0),
            split_by=split_by,
            train_size=train_size,
            validation_size=validation_size,
            seed=seed,
        )
        codes = self._with_enough_cells(codes, train, self.recipe.min_cells if min_cells is None else min_cells)
        n_cells = np.bincount(codes[train][codes[train] >= 0], minlength=len(self.classes))
        self.learner.set_weights(self._weights(class_weights, n_cells))
        self._fit(
            (train[codes[train] >= 0], validation[codes[validation] >= 0], test),
            labels={LABEL: codes},
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
            monitor=monitor,
            lr=lr,
            weight_decay=weight_decay,
            optimization=optimization,
            freeze=freeze,
            seed=seed,
            log_every_n_steps=log_every_n_steps,
            **trainer_kwargs,
        )
        self.trained_classes_ = self.classes[n_cells > 0].astype(str)

    def _with_enough_cells(self, codes: np.ndarray, train: np.ndarray, min_cells: int) -> np.ndarray:
        """Codes in which classes with too few cells to train on are no longer labels."""
        n_cells = np.bincount(codes[train], minlength=len(self.classes))
        kept = n_cells >= max(1, min_cells)
        if kept.sum() < 2:
            msg = (
                f"only {kept.sum()} classes have at least {max(1, min_cells)} cells to train on; use a smaller min_cells=, "
                "more cells, or another split_by="
            )
            raise ValueError(msg)
        if not kept.all():
            left_out = [f"{name} ({n})" for name, n in zip(self.classes[~kept], n_cells[~kept], strict=True)]
            _logging.warning(
                f"left out for too few cells to train on: {', '.join(left_out)}; see min_cells= and split_by="
            )
        return np.where((codes >= 0) & kept[codes], codes, -1)

    def _weights(self, rule: str | Mapping[str, float] | None, n_cells: np.ndarray) -> np.ndarray | None:
        if not hasattr(rule, "keys"):
            return class_weights(n_cells, self.recipe.class_weights if rule == _RECIPE else rule)
        if unknown := set(rule) ^ set(self.classes[n_cells > 0]):
            msg = (
                f"class_weights has to name each class that is trained; wrong or missing: {', '.join(sorted(unknown))}"
            )
            raise KeyError(msg)
        return np.array([rule.get(name, 0.0) for name in self.classes])

    # -- what it gives -----------------------------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | str | os.PathLike[str] | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        *,
        soft: bool = False,
        min_confidence: float | None = None,
        layer: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        block_size: int | None = None,
        progress: bool | None = None,
        **tokenize_options: Any,
    ) -> np.ndarray | pd.DataFrame:
        """Predict cell types.

        Parameters
        ----------
        adata
            Any data with genes that the model knows, which need not be set up nor have labels; also the path of a file.
        indices
            Numbers of cells, or a mask; all by default.
        soft
            Return probabilities instead of labels.
        min_confidence
            Cells whose best class has a lower probability get no label.
        layer
            Layer with the counts, ``"X"`` for ``adata.X``; by default that of the setup.
        gene_symbols, gene_ids, aliases
            Columns of ``var`` with the names of the genes, and a table of other names; by default those of the setup.
        batch_size, tokens_per_batch, block_size
            Most cells and tokens in one forward pass, and cells that are read at once.
        progress
            Whether to show a progress bar.
        tokenize_options
            Options of the model's tokenizer, beside or instead of those it was trained with.

        Returns
        -------
        Labels of shape ``(cells,)``, missing where there is none, or a table of probabilities with one column for each
        class. Cells without any gene that the model knows are missing.

        Raises
        ------
        KeyError
            If the layer, or a column, does not exist.
        TypeError
            If the model's tokenizer has no such option.
        ValueError
            If no gene is known, or values are not what the model needs.
        """
        names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
        with self._any_cells(adata, indices, layer=layer, **names, **tokenize_options) as task:
            table = self._probabilities(
                task,
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
                block_size=block_size,
                progress=progress,
            )
        return table if soft else labels_of(table, min_confidence)

    def _probabilities(self, task: engine.Task, **sizes: Any) -> pd.DataFrame:
        """Probabilities of the classes for all cells of a run."""
        result = engine.run(
            **task.inputs,
            compute=lambda _, tokens: self.learner.probabilities(tokens),
            shape=(len(self.classes),),
            task={"output": "class probabilities"},
            **sizes,
        )
        if result.n_empty:
            _logging.warning(
                f"{result.n_empty:,} cells have no expressed gene that {self.backbone.name} knows; they get no label"
            )
        return pd.DataFrame(self._only_trained(result.array), index=task.source.obs_names, columns=self.classes)

    def _only_trained(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities among the classes that had cells to train on."""
        trained = getattr(self, "trained_classes_", None)
        if trained is None or len(trained) == len(self.classes):
            return probabilities
        out = probabilities * np.isin(self.classes.astype(str), trained)
        total = out.sum(1, keepdims=True)
        return np.divide(out, total, out=np.full_like(out, np.nan), where=total > 0)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _task_state(self) -> dict[str, Any]:
        learner = self.learner
        return {
            "head": learner.style,
            "pooling": learner.pooling,
            "tokenize": learner.tokenize,
            "hide": learner.hide,
            "trained_classes": getattr(self, "trained_classes_", None),
        }

    def _set_task(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        plain = state["head"] in PLAIN_HEADS
        options = {"pooling": state["pooling"] if plain else None, "hide": state.get("hide") or False}
        # the head that the network holds is the saved one, so it must not be made anew
        learner = ClassLearner(self.backbone, len(self.classes), None if not tensors else state["head"], **options)
        if tensors:
            learner.head.load_state_dict(tensors)
        learner.style, learner.tokenize = state["head"], dict(state["tokenize"])
        self._use(learner)
        if state["trained_classes"] is not None:
            self.trained_classes_ = state["trained_classes"]


def labels_of(probabilities: pd.DataFrame, min_confidence: float | None = None) -> np.ndarray:
    """Label with the highest probability of each row, missing where that is too low or not known."""
    values = probabilities.to_numpy()
    best = np.where(np.isfinite(values), values, -1.0).max(1, initial=-1.0)
    labels = np.full(len(values), np.nan, dtype=object)
    known = best >= (0.0 if min_confidence is None else min_confidence)
    labels[known] = probabilities.columns.to_numpy(dtype=object)[values[known].argmax(1)]
    return labels
