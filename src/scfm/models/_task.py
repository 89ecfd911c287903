"""The base of the classes for a task, over any backbone."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scvi.data._constants import _SETUP_ARGS_KEY

from .. import engine
from ..backbones import Backbone, load
from ..backbones._task_weights import tell_other_weights, weights_for
from ..data import open_source
from ..genes import resolve_gene_names
from ..nn.low_rank import adapted_layers
from ..train._adapters import add_lora, changed
from ..train._freeze import freeze as freeze_weights
from ..train._freeze import keep_features, set_training_mode
from ..train._presets import Optimization
from ..train._task_plan import TaskPlan
from ._alignment import align
from ._backbone import own_copy
from ._base import FoundationModel
from ._fields import GeneField
from ._module import TaskModule
from ._training import fit, seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from torch import Tensor

    from ..backbones import FineTuning
    from ..tasks.learner import Learner
    from ._training import Freeze

    File = str | os.PathLike[str]


class TaskModel(FoundationModel):
    """A foundation model with a head for a task.

    A class for a task says how the head is made (:meth:`_make_learner`), and what it gives.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`.
    registry
        Registry of such data, for a model without them.
    checkpoint
        Where the weights come from: a name of :func:`scfm.checkpoints.list`, a folder, or a model from
        :func:`scfm.load`, which is copied. Any kind of model serves.
    lora
        Rank of low-rank adapters (:func:`scfm.train.add_lora`), beside which only the head is trained, or arguments for
        them as a mapping.
    tokenize
        Options of the model's tokenizer, beside or instead of those with which its authors fine-tune.
    weights
        Which weights of a checkpoint that holds several; by default those the authors take for the task, if
        ``checkpoint`` is the name of a released one.
    device
        Where to compute, until training chooses another place.
    seed
        Seed of the fresh weights; by default ``scvi.settings.seed``.
    head
        Options of the head.

    Attributes
    ----------
    backbone
        The model itself.
    learner
        The model and its head.
    history
        Losses of training, a data frame for each.
    """

    kind: ClassVar[str] = ""
    # what the model is trained for, as backbones call it in their task_weights
    task: ClassVar[str] = ""
    learner: Learner

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        checkpoint: File | Backbone = "scgpt",
        lora: int | Mapping[str, Any] | None = None,
        tokenize: Mapping[str, Any] | None = None,
        weights: str | None = None,
        device: str = "auto",
        seed: int | None = None,
        **head: Any,
    ) -> None:
        def make(_: dict[str, Any]) -> Backbone:
            if isinstance(checkpoint, Backbone):
                return own_copy(checkpoint, device=device)
            chosen = weights_for(checkpoint, self.task) if weights is None else weights
            return load(checkpoint, device=device, precision="float32", weights=chosen)

        if isinstance(checkpoint, Backbone) and weights is not None:
            msg = "weights= chooses what is loaded; the model given is loaded already (use scfm.load(..., weights=...))"
            raise ValueError(msg)
        self._start(adata, registry, make)
        if weights is None:
            tell_other_weights(self.backbone, self.task, f"fine-tune for {self.task}")
        seed = seed_or_default(seed)
        self._use(self._make_learner(self.backbone, seed=seed, tokenize=tokenize, **head))
        if lora is not None:
            add_lora(self.backbone, **({"seed": seed} | (dict(lora) if hasattr(lora, "keys") else {"rank": lora})))
        self.init_params_ = {
            "kwargs": {},
            "non_kwargs": {"checkpoint": self.backbone.provenance.id, "seed": seed, **deepcopy(head)},
        }

    @abstractmethod
    def _make_learner(self, backbone: Backbone, **options: Any) -> Learner:
        """Put the head of the task on a backbone."""

    def _use(self, learner: Learner) -> None:
        """Take a learner as what is trained and asked."""
        self.learner, self.backbone = learner.eval(), learner.backbone
        self.module = TaskModule(learner)

    @property
    def recipe(self) -> FineTuning:
        """How the authors of the model fine-tune it."""
        return self.learner.recipe

    # -- training ----------------------------------------------------------------------------------------------------

    def _fit(
        self,
        split: tuple[np.ndarray, np.ndarray, np.ndarray],
        *,
        freeze: Freeze | str | None,
        batch_size: int | None,
        max_epochs: int | None,
        max_steps: int | None,
        lr: float | None,
        weight_decay: float | None,
        optimization: Optimization | str | None,
        keep_best: bool | None,
        seed: int,
        precision: str,
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        recipe = self.recipe
        if isinstance(optimization, str):
            optimization = {"preset": optimization}
        if not isinstance(optimization, Optimization):
            values = dict(recipe.optimization if optimization is None else optimization)
            if optimization is None and str(precision).endswith("-mixed"):
                values |= recipe.mixed_optimization
            values |= {
                name: value
                for name, value in (("learning_rate", lr), ("weight_decay", weight_decay))
                if value is not None
            }
            optimization = Optimization.from_dict(values)
        if max_epochs is None and max_steps is None:
            max_epochs = recipe.max_epochs
        if batch_size is None:
            batch_size = recipe.batch_size
            options.setdefault("accumulate_grad_batches", recipe.accumulate)
        self._is_training = True
        try:
            fit(
                self,
                partial(TaskPlan, self.learner, optimization),
                trained_weights(self.learner, freeze),
                split,
                batch_size=batch_size,
                max_epochs=max_epochs,
                max_steps=max_steps,
                keep_best=recipe.keep == "best" if keep_best is None else keep_best,
                monitor=recipe.monitor if monitor is None else monitor,
                precision=precision,
                tokenize=self.learner.tokenize,
                seed=seed,
                **options,
            )
        finally:
            self._is_training = False
            self.learner.eval()

    # -- cells that need not be set up -------------------------------------------------------------------------------

    @contextmanager
    def _any_cells(
        self,
        adata: AnnData | File | None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        *,
        layer: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **options: Any,
    ) -> Iterator[engine.Task]:
        """Cells of any data with genes that the model knows, for the engine.

        Parameters
        ----------
        adata
            The data, or the path of a file.
        indices
            Numbers of cells, or a mask.
        layer, gene_symbols, gene_ids, aliases
            Where these data differ from those of the setup; ``layer="X"`` stands for ``X``.
        options
            Options of the tokenizer.
        """
        adata = self.adata if adata is None else adata
        if adata is None:
            msg = "the model was loaded without data; give adata="
            raise ValueError(msg)
        arguments = self.registry_[_SETUP_ARGS_KEY]
        set_up, layer = layer is None, arguments["layer"] if layer is None else layer
        layers = getattr(adata, "layers", None)
        if layer == "X" and not set_up and "X" not in (layers if layers is not None else ()):
            layer = None
        if set_up and layer is not None and layers is not None and layer not in layers:
            msg = (
                f"the model was set up with the counts in layers[{layer!r}], which the data do not have; name theirs with "
                "layer=, 'X' for adata.X"
            )
            raise KeyError(msg)
        with open_source(adata, layer=layer) as source:
            columns = [
                given or (column if column is None or column in source.var else None)
                for given, column in ((gene_symbols, arguments["gene_symbols"]), (gene_ids, arguments["gene_ids"]))
            ]
            names = resolve_gene_names(source.var, *columns)
            state = {
                GeneField.NAMES: names.symbols,
                GeneField.ENSEMBL_IDS: names.ensembl_ids,
                GeneField.MATCHED: dict(self._matched),
            }
            match = align(self.backbone.vocab, state, arguments["aliases"] if aliases is None else aliases)
            match.require_any(self.backbone.name)
            rows = np.arange(source.n_obs)
            if indices is not None:
                indices = np.asarray(indices)
                rows = rows[indices if len(indices) else indices.astype(np.int64)]
                source = source.select(rows)
            options = {**self.learner.tokenize, **options, **self._options_for(adata, rows)}
            engine.check_options(self.backbone, options, source.n_obs)
            yield engine.Task(self.backbone, source, match, options)

    def _options_for(self, adata: AnnData | File, rows: np.ndarray) -> dict[str, Any]:
        """Options of the tokenizer that belong to the cells."""
        return {}

    # -- saving ------------------------------------------------------------------------------------------------------

    @classmethod
    def _read_backbone(cls, place: Path, *, device: str) -> Backbone:
        return load(place, device=device, precision="float32")

    def _task_tensors(self) -> dict[str, Tensor]:
        return self.learner.head_state()


@contextmanager
def trained_weights(learner: Learner, freeze: Freeze | str | None) -> Iterator[None]:
    """Let the head and weights of the backbone be trained inside the block.

    Parameters
    ----------
    learner
        A model and its head.
    freeze
        ``None`` trains what the authors train, ``"backbone"`` the head alone; everything else as in
        :meth:`FoundationModel.train`. Adapters are trained alone, beside the head.
    """
    backbone = learner.backbone
    parameters = dict(learner.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    adapted = any(True for _ in adapted_layers(backbone.module))
    patterns = tuple(learner.recipe.train_only)
    if adapted:
        if freeze is not None:
            msg = "the model has adapters, beside which everything else is frozen; leave freeze= out"
            raise ValueError(msg)
    elif isinstance(freeze, str) and freeze == "backbone":
        backbone.module.requires_grad_(requires_grad=False)
    elif freeze is None and patterns:
        freeze_weights(backbone, rf"^(?!{'|'.join(patterns)})", embeddings=False)
    elif freeze is None or freeze is False:
        backbone.module.requires_grad_(requires_grad=True)
    elif freeze is True:
        freeze_weights(backbone)
    elif isinstance(freeze, int):
        freeze_weights(backbone, last_n_layers=freeze)
    elif hasattr(freeze, "keys"):
        freeze_weights(backbone, **freeze)
    else:
        freeze_weights(backbone, freeze, embeddings=False)
    for name, parameter in parameters.items():
        if learner.is_head(name):
            parameter.requires_grad_(requires_grad=True)
    keep_features(backbone.module)
    set_training_mode(learner)
    try:
        yield
    finally:
        learner.eval()
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        changed(backbone)
