"""Expression after genetic perturbations, learned from perturbed cells."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors.torch import save_file
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass
from tqdm.auto import tqdm

from .. import _keys, _logging, engine
from .._errors import UnsupportedError
from .._settings import settings
from ..backbones import Backbone, load
from ..backbones._base import resolve_device
from ..checkpoints import store
from ..checkpoints._files import new_directory, sha256
from ..data import open_source
from ..tasks.gears import annotation_table, coexpression_graph, genes_of, go_graph
from ..tasks.gears_network import GearsConfig, Graph, fresh_network
from ..tasks.perturbation_fit import MONITORS, FitOptions, fit
from ..tasks.perturbation_learners import GearsLearner, GeneratorLearner, ResponseLearner
from ..tasks.perturbation_pairs import PerturbationPairs
from ..train._presets import Optimization
from ._alignment import align
from ._backbone import own_copy
from ._codec import decode, encode
from ._control_states import cached_states, states_in_memory
from ._fields import GENES_KEY, GeneField
from ._perturbation_data import (
    CONTROL,
    SEPARATOR,
    ExpressionRule,
    SplitNames,
    canonical,
    de_positions,
    genes_in,
    require_setup,
)
from ._regulatory_network import ExpressionField
from ._saving import (
    FORMAT,
    HEAD,
    HEADER,
    _device,
    _place,
    _read_header,
    _read_task,
    _saved_data,
    _without_tables,
    _write,
)
from ._training import joined, seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Literal, Self

    from torch import Tensor

    from ..backbones._fine_tuning import FineTuning

    File = str | os.PathLike[str]
    Route = Literal["gears", "scgpt"]

_ATTRIBUTES = ("is_trained_", "history_", "init_params_", "run_name_", "run_id_")
_BACKBONE = "backbone"
_PREDICTION_BYTES = 256 * 2**20
_SHOWN = 10
# GEARS itself, and GEARS on states of models whose authors have not tried it
_GEARS = {"learning_rate": 1e-3, "batch_size": 30, "objective": {"hidden": 128, "positions": "table"}}
_GEARS_ON_STATES = {
    "learning_rate": 1e-3,
    "batch_size": 32,
    "objective": {"hidden": 128, "entry": "mlp", "entry_hidden": 256, "positions": "none"},
}
# of all networks of GEARS; the rate is halved after every epoch
_GEARS_OPTIMIZATION = {
    "optimizer": "adam",
    "weight_decay": 5e-4,
    "clip": "value",
    "clip_value": 1.0,
    "schedule": "steps",
    "unit": "epoch",
    "step_size": 1,
    "gamma": 0.5,
}


class GeneticPerturbation(BaseModelClass):
    """Expression of cells after one or several genes are perturbed, also for perturbations that no cell was seen with.

    Three kinds of models learn it from the same cells:

    - GEARS without a foundation model (``model=None``), the baseline.
    - GEARS on states of genes in the control cells, from any model (``route="gears"``), in the form that its authors chose:
      scFoundation with a graph of co-expression, CellFM and scLong without.
    - scGPT's own network, in which each gene carries a flag (``route="scgpt"``), for any model with the capability ``perturbs``.

    Training uses the perturbations of ``split.train``; those of ``split.validation`` choose the best epoch, and those of
    ``split.test`` are never looked at (the authors of CellFM choose the epoch by them).

    Parameters
    ----------
    adata
        Data that :func:`scfm.pp.perturbation_setup` and :meth:`setup_anndata` have prepared.
    model
        Name of a checkpoint, a folder, or a model from :func:`scfm.load`; ``None`` for GEARS by itself. A fine-tuned file of
        scGPT can be used for predictions as it is.
    registry
        Registry of such data, for a model without them.
    route
        ``"gears"`` or ``"scgpt"``; by default the second for models that have it.
    split
        Which perturbations to train on, from :func:`scfm.tasks.perturbation_data.split_perturbations`, or a mapping with
        ``"train"``, ``"validation"`` and ``"test"``. By default ``"simulation"`` of that function, with ``seed``.
    go
        What is known about genes, for GEARS: a table with the columns ``gene`` (or ``symbol``) and ``term`` (or ``go_id``), one
        of pairs with ``source``, ``target`` and ``importance``, a mapping of genes to terms, or a file with one of these. Genes
        that share terms are neighbours in the graph by which perturbations that were never seen are predicted.
    perturbable
        Genes that can be perturbed, besides those of the data. By default all genes of ``go`` for GEARS, and all measured ones
        for networks that mark the perturbed gene.
    network
        Form of the network where it is not that of the authors: fields of :class:`scfm.tasks.gears_network.GearsConfig`, or
        options of :meth:`scfm.Backbone.perturbing` (``decoder="affine"`` or ``"mlp"``, ``activation``, ``adaptive``, ``mvc``,
        ``dropout``).
    most_genes, always_include_perturbed
        For ``route="scgpt"``, see :class:`scfm.tasks.perturbation_learners.GeneratorLearner`.
    first_cell_only
        The graph of co-expression reaches the first cell of a mini-batch only, as in the authors' code; for comparisons.
    tokenize
        Options of the model's tokenizer; by default as its authors do.
    cache_dir
        Folder for the states of genes in control cells, which are computed once; it can serve several models. By default a
        temporary one.
    cache_dtype
        ``"float16"`` or ``"float32"``, for these files.
    max_cache_gib
        Largest such file.
    device
        Where to compute.
    seed
        Seed of the fresh weights; by default ``scvi.settings.seed``.

    Attributes
    ----------
    history
        Losses and scores of training, a data frame for each.
    split
        Names of the perturbations to train on, to validate on and to test on.

    Raises
    ------
    ValueError
        If the data are not prepared, the route or the split makes no sense, or no gene is known to the model.
    UnsupportedError
        If the model has neither states of genes nor a network for perturbations.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024); Cui et al., scGPT, Nature Methods 21, 1470 (2024); Hao et al.,
    scFoundation, Nature Methods 21, 1481 (2024); Zeng et al., CellFM, Nature Communications 16, 4679 (2025); Bai et al.,
    scLong, Nature Communications 17, 2380 (2026).

    Examples
    --------
    >>> import scfm
    >>> scfm.pp.perturbation_setup(adata, perturbation_key="perturbation", control="control")  # doctest: +SKIP
    >>> scfm.models.GeneticPerturbation.setup_anndata(adata)  # doctest: +SKIP
    >>> model = scfm.models.GeneticPerturbation(adata, model="scgpt")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> controls = adata[adata.obs["scfm_perturbation"] == "ctrl"]  # doctest: +SKIP
    >>> model.predict(["KLF1", "CEBPE+KLF1"], controls)  # doctest: +SKIP
    """

    _module_cls: ClassVar[Any] = None
    module: ResponseLearner

    def __init__(
        self,
        adata: AnnData | None = None,
        model: File | Backbone | None = None,
        *,
        registry: dict[str, Any] | None = None,
        route: Route | None = None,
        split: Any = None,
        go: pd.DataFrame | Mapping[str, Sequence[str]] | File | None = None,
        perturbable: Sequence[str] | None = None,
        network: Mapping[str, Any] | None = None,
        most_genes: int | None = None,
        always_include_perturbed: bool = True,
        first_cell_only: bool = False,
        tokenize: Mapping[str, Any] | None = None,
        cache_dir: File | None = None,
        cache_dtype: str = "float16",
        max_cache_gib: float = 32.0,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(adata, registry)
        if self.adata is None:
            msg = "a model for perturbations starts from data; give adata=, or load a saved one"
            raise ValueError(msg)
        require_setup(self.adata)
        seed = seed_or_default(seed)
        backbone = None
        if model is not None:
            # networks are trained and asked in float32
            backbone = (
                own_copy(model, device=device)
                if isinstance(model, Backbone)
                else load(model, device=device, precision="float32")
            )
        conditions = self._labels(self.adata)
        self.split = _settled(split, conditions, seed)
        arguments = {
            "route": _route(route, backbone),
            "checkpoint": None if backbone is None else backbone.provenance.id,
            "most_genes": most_genes,
            "always_include_perturbed": always_include_perturbed,
            "first_cell_only": first_cell_only,
            "tokenize": dict(tokenize or {}),
            "seed": seed,
        }
        self._cache = {"folder": cache_dir, "dtype": cache_dtype, "max_gib": float(max_cache_gib)}
        self._rule = ExpressionRule.of(self.adata)
        seen = genes_in(sorted({*conditions, *self.split.known}))
        trained = genes_in(self.split.train)
        place = str(resolve_device(device)) if backbone is None else str(backbone.device)
        if arguments["route"] == "gears":
            self._start_gears(backbone, arguments, dict(network or {}), go, perturbable, seen, trained, place)
        else:
            if go is not None:
                msg = "route='scgpt' uses no annotations of genes; leave go= out, or take route='gears'"
                raise ValueError(msg)
            self._start_generator(backbone, arguments, dict(network or {}), perturbable, seen, trained)
        self.init_params_ = {"kwargs": {}, "non_kwargs": arguments}

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register data that :func:`scfm.pp.perturbation_setup` has prepared; nothing but ``uns`` and ``obs`` is changed.

        Parameters
        ----------
        adata
            The data. Which layer is used, and where the counts of a cell are found, was said there.
        gene_symbols, gene_ids, aliases
            As in :meth:`FoundationModel.setup_anndata`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If the data are not prepared, ``adata`` is a view, or values are missing or infinite.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        require_setup(adata)
        manager = AnnDataManager(
            fields=[
                ExpressionField(REGISTRY_KEYS.X_KEY, ExpressionRule.of(adata).layer or None),
                GeneField(gene_symbols, gene_ids),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes whose expression is predicted."""
        return np.asarray(self._gene_state[GeneField.NAMES], dtype=object)

    @property
    def perturbable(self) -> pd.Index:
        """Genes whose perturbation can be predicted: seen in training, or tied to others by what is known about them."""
        return pd.Index(self._perturbed_genes[self._usable], name="gene")

    @property
    def route(self) -> str:
        """``"gears"`` or ``"scgpt"``."""
        return self.init_params_["non_kwargs"]["route"]

    @property
    def recipe(self) -> FineTuning | None:
        """How the authors of the model train such a network; ``None`` for GEARS itself."""
        if self.backbone is None:
            return None
        return self.backbone.fine_tuning("gears" if self.route == "gears" else "responses")

    @property
    def _gene_state(self) -> dict[str, Any]:
        return self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    @staticmethod
    def _labels(adata: AnnData) -> np.ndarray:
        return adata.obs[_keys.PERTURBATION_OF_CELL].astype(str).to_numpy(dtype=object)

    # -- building ----------------------------------------------------------------------------------------------------

    def _start_gears(
        self,
        backbone: Backbone | None,
        arguments: dict[str, Any],
        network: dict[str, Any],
        go: Any,
        perturbable: Sequence[str] | None,
        seen: list[str],
        trained: list[str],
        device: str,
    ) -> None:
        _check_unique(self.genes)
        form = dict(_GEARS["objective"])
        if backbone is not None:
            backbone.require("gene_states")
            form = dict(backbone.fine_tuning("gears").objective) or dict(_GEARS_ON_STATES["objective"])
            form["states"] = backbone.gene_state_dim
        form |= network
        table = None if go is None else annotation_table(go)
        known = np.zeros(0, dtype=str) if table is None else genes_of(table)
        marks = bool(form.get("indicator", False))
        if perturbable is not None:
            names = sorted({*map(str, perturbable), *seen})
        else:
            names = sorted({*seen, *map(str, self.genes)} if marks else {*seen, *known})
        extra = [name for name in names if name not in set(self.genes)] if marks else []
        names = np.array([*map(str, self.genes), *extra] if marks else names, dtype=object)
        graph = Graph.empty() if table is None else go_graph(table, names)
        if table is None:
            _logging.warning(
                "without annotations of genes (go=), GEARS predicts perturbations of genes only that it was trained on"
            )
        elif lost := [gene for gene in seen if gene not in set(known)]:
            _logging.warning(
                f"go= says nothing about {', '.join(lost[:_SHOWN])}; what is learned of them comes from their own cells"
            )
        self._set_genes(names, np.isin(names.astype(str), known) | np.isin(names.astype(str), trained), extra)
        coexpression = None
        if form.get("positions", "table") != "none":
            values = self._rule.read(self.adata)[0]
            coexpression = coexpression_graph(values[self._cells_of(self.split.train, self._labels(self.adata), True)])
        config = GearsConfig(n_genes=len(self._all_genes), n_perturbations=len(names), **form)
        places = torch.from_numpy(pd.Index(self._all_genes).get_indexer(names)) if marks else None
        made = fresh_network(config, arguments["seed"], graph, coexpression, places)
        self._use(backbone, GearsLearner(made.to(device), first_cell_only=arguments["first_cell_only"]))

    def _start_generator(
        self,
        backbone: Backbone | None,
        arguments: dict[str, Any],
        network: dict[str, Any],
        perturbable: Sequence[str] | None,
        seen: list[str],
        trained: list[str],
    ) -> None:
        _check_unique(self.genes)
        if backbone is None:
            msg = "route='scgpt' needs a model; give model=, or take route='gears'"
            raise ValueError(msg)
        if not backbone.perturbs_already:
            backbone = backbone.perturbing(seed=arguments["seed"], **network)
        elif network:
            msg = f"{backbone.name} is a network for perturbations already; leave network= out"
            raise ValueError(msg)
        wanted = sorted({*seen, *map(str, perturbable or ())})
        extra = [name for name in wanted if name not in set(self.genes)]
        names = np.array([*map(str, self.genes), *extra], dtype=object)
        self._set_genes(names, np.ones(len(names), dtype=bool), extra)
        match = self._match(backbone)
        match.require_any(backbone.name)
        _logging.info(match.summary())
        if len(unknown := np.asarray(names)[match.ids < 0]):
            _logging.warning(
                f"{len(unknown):,} genes are not in the vocabulary of {backbone.name} and all have the vector of padding, among "
                f"them {', '.join(map(str, unknown[:_SHOWN]))}"
            )
        self._usable = (match.ids >= 0) | np.isin(names.astype(str), trained)
        options = dict(backbone.fine_tuning("responses").objective)
        most = options.get("most_genes") if arguments["most_genes"] is None else arguments["most_genes"]
        learner = GeneratorLearner(
            backbone,
            match.ids,
            np.arange(len(names)),
            most_genes=most,
            always_include_perturbed=arguments["always_include_perturbed"],
            loss={"gepc_weight": 1.0} if network.get("mvc") else None,
        )
        self._use(backbone, learner)

    def _set_genes(self, perturbed: np.ndarray, usable: np.ndarray, extra: list[str]) -> None:
        """Genes that can be perturbed, and genes of the network: those of the data, then perturbed ones that are not measured."""
        self._perturbed_genes, self._usable = np.asarray(perturbed, dtype=object), np.asarray(usable, dtype=bool)
        self._all_genes = np.array([*map(str, self.genes), *extra], dtype=object)

    def _use(self, backbone: Backbone | None, learner: ResponseLearner) -> None:
        self.backbone, self.module = backbone, learner.eval()

    def _match(self, backbone: Backbone) -> Any:
        """What the genes of the network are to a model."""
        state = dict(self._gene_state)
        n_extra = len(self._all_genes) - len(self.genes)
        state[GeneField.NAMES] = self._all_genes
        if state[GeneField.ENSEMBL_IDS] is not None:
            state[GeneField.ENSEMBL_IDS] = np.array([*state[GeneField.ENSEMBL_IDS], *[""] * n_extra], dtype=object)
        # genes that are appended have no identifiers, so that their names decide
        return align(backbone.vocab, state, self.registry_[_SETUP_ARGS_KEY]["aliases"])

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
        batch_size: int | None = None,
        accumulate: int | None = None,
        sum_accumulated: bool = False,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimization: Optimization | Mapping[str, Any] | None = None,
        monitor: str | None = None,
        keep_best: bool = True,
        early_stopping_patience: int | None = None,
        loss: Mapping[str, Any] | None = None,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Train the network; the same seed gives the same weights.

        What is not given is as the authors do it, see ``model.recipe``. For GEARS: Adam with a weight decay of 5e-4, a rate that
        is halved after every epoch, gradients clipped to 1; 15 epochs with batches of 30 and a rate of 1e-3 without a model.

        Parameters
        ----------
        max_epochs
            Passes over the cells.
        accelerator, device
            Where to compute.
        batch_size, accumulate
            Pairs of cells of a forward pass, and forward passes of an optimiser step.
        sum_accumulated
            Add the gradients of these up, and clip each time, as the authors of scFoundation and CellFM do.
        lr, weight_decay
            Learning rate and weight decay.
        optimization
            Optimiser and schedule, or fields of it.
        monitor
            Score of the perturbations in ``split.validation`` by which the best epoch is chosen:
            ``"MSE"``, ``"Pearson"``, ``"Pearson delta"``, the same over the 20 most changed genes (``"DE MSE"``, ``"DE Pearson
            delta"``), or ``"loss"``. By default ``"DE MSE"`` for GEARS and ``"Pearson"`` for scGPT.
        keep_best
            Whether the weights of that epoch count, or the last.
        early_stopping_patience
            Stop after so many epochs without a better score.
        loss
            Options of :func:`scfm.tasks.gears.gears_loss`.
        seed
            Seed of the order of cells and of what else is random; by default that of the model.
        progress
            Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2.

        Raises
        ------
        ValueError
            If a number makes no sense, no cells are there to train on, or the loss is no longer finite.
        """
        if self.adata is None:
            msg = "the model was loaded without data; load it with adata="
            raise ValueError(msg)
        self._validate_anndata(self.adata)
        made = self.init_params_["non_kwargs"]
        seed = made["seed"] if seed is None else int(seed)
        options = self._fit_options(
            max_epochs, batch_size, accumulate, sum_accumulated, lr, weight_decay, optimization, monitor, keep_best,
            early_stopping_patience, seed,
        )  # fmt: skip
        pairs, totals = self._pairs()
        train = self._cells_of(self.split.train, pairs.conditions, True)[pairs.codes]
        train, held_out = (
            np.flatnonzero(train),
            np.flatnonzero(self._cells_of(self.split.validation, pairs.conditions, False)[pairs.codes]),
        )
        if not (pairs.codes[train] > 0).any():
            msg = "no cell of the data has a perturbation of split.train, so that there is nothing to learn from"
            raise ValueError(msg)
        if (accelerator, device) != ("auto", "auto"):
            self.to_device(_device(accelerator, device))
        if isinstance(self.module, GearsLearner):
            self.module.loss_options = dict(loss or {})
            if self.backbone is not None:
                used = np.unique(pairs.controls[np.concatenate([train, held_out])])
                self.module.states = self._cached(pairs.expression, totals, used, seed)
        elif loss:
            msg = "loss= has options of GEARS; the loss of this network has none"
            raise ValueError(msg)
        show = settings.verbosity >= 2 if progress is None else progress
        start = _logging.info(
            f"training on {len(train):,} cells with {len(np.unique(pairs.codes[train])) - 1} perturbations, "
            f"{len(np.unique(pairs.codes[held_out]))} held out"
        )
        if not len(held_out):
            _logging.warning("split.validation is empty, so that the last epoch is kept")
        rows = self._run(pairs, train, held_out, options, show)
        table = pd.DataFrame(rows).rename_axis("epoch")
        self.history_ = joined(self.history_, {name: table[[name]] for name in table})
        self.is_trained_ = True
        _logging.info("    finished", time=start)

    def _run(
        self, pairs: PerturbationPairs, train: np.ndarray, held_out: np.ndarray, options: FitOptions, show: bool
    ) -> list[dict[str, float]]:
        trained = list(self.module.parameters())
        before = [parameter.requires_grad for parameter in trained]
        for parameter in trained:
            parameter.requires_grad_(True)
        epochs = fit(
            self.module, pairs, train, held_out, options, de_genes=de_positions(self.adata, self._all_genes) or None
        )
        rows = []
        try:
            with tqdm(total=options.max_epochs, desc="epochs", disable=not show, leave=False) as bar:
                for row in epochs:
                    rows.append(row)
                    bar.update()
                    bar.set_postfix(loss=f"{row['train_loss_epoch']:.4g}")
        finally:
            epochs.close()
            self.module.eval()
            for parameter, state in zip(trained, before, strict=True):
                parameter.requires_grad_(state)
                parameter.grad = None
            if isinstance(self.module, GearsLearner):
                self.module.states = None
        return rows

    def _fit_options(
        self,
        max_epochs: int | None,
        batch_size: int | None,
        accumulate: int | None,
        sum_accumulated: bool,
        lr: float | None,
        weight_decay: float | None,
        optimization: Optimization | Mapping[str, Any] | None,
        monitor: str | None,
        keep_best: bool,
        patience: int | None,
        seed: int,
    ) -> FitOptions:
        recipe = self.recipe
        usual = {"batch_size": 32, "accumulate": 1, "max_epochs": 15}
        if self.route != "gears":
            fields = dict(recipe.optimization)
            usual = {name: getattr(recipe, name) for name in usual}
            patience = recipe.objective.get("patience") if patience is None else patience
        elif recipe is None or not recipe.objective:
            default = _GEARS if recipe is None else _GEARS_ON_STATES
            fields = _GEARS_OPTIMIZATION | {"learning_rate": default["learning_rate"]}
            usual["batch_size"] = default["batch_size"]
        else:
            fields = _GEARS_OPTIMIZATION | dict(recipe.optimization)
            usual = {name: getattr(recipe, name) for name in usual}
        if not isinstance(optimization, Optimization):
            fields = fields if optimization is None else dict(optimization)
            given = {"learning_rate": lr, "weight_decay": weight_decay}
            optimization = Optimization.from_dict(fields | {k: v for k, v in given.items() if v is not None})
        if monitor is None:
            monitor = recipe.monitor if recipe is not None and recipe.monitor in set(MONITORS) - {"loss"} else "DE MSE"
        if monitor.startswith("DE ") and not de_positions(self.adata, self._all_genes):
            _logging.warning(f"the data have no genes for {monitor!r}; {monitor.removeprefix('DE ')!r} is used")
            monitor = monitor.removeprefix("DE ")
        given = {"batch_size": batch_size, "accumulate": accumulate, "max_epochs": max_epochs}
        usual |= {name: value for name, value in given.items() if value is not None}
        return FitOptions(
            optimization,
            sum_accumulated=sum_accumulated,
            monitor=monitor,
            keep_best=keep_best,
            patience=patience,
            seed=seed,
            **usual,
        )

    def _pairs(self) -> tuple[PerturbationPairs, np.ndarray | None]:
        values, totals = self._rule.read(self.adata)
        values = self._with_unmeasured(values)
        labels = self._labels(self.adata)
        conditions = [CONTROL, *sorted(set(labels) - {CONTROL})]
        place = pd.Index(self._perturbed_genes)
        members = [place.get_indexer(name.split(SEPARATOR)) if name != CONTROL else [] for name in conditions]
        perturbed = np.full((len(conditions), max(1, *map(len, members))), -1, dtype=np.int64)
        for row, genes in zip(perturbed, members, strict=True):
            row[: len(genes)] = genes
        controls = self.adata.obs[_keys.CONTROL_OF_CELL].to_numpy(dtype=np.int64)
        codes = pd.Index(conditions).get_indexer(labels)
        return PerturbationPairs(values, controls, conditions, codes, perturbed), totals

    def _with_unmeasured(self, values: sparse.csr_matrix) -> sparse.csr_matrix:
        """Perturbed genes that are not measured follow with the value 0."""
        n_extra = len(self._all_genes) - len(self.genes)
        if not n_extra:
            return values
        zeros = sparse.csr_matrix((values.shape[0], n_extra), dtype=values.dtype)
        return sparse.hstack([values, zeros], format="csr")

    @staticmethod
    def _cells_of(names: Sequence[str], conditions: Sequence[str], control: bool) -> np.ndarray:
        """Which conditions are among some names, control as wanted."""
        return np.isin(np.asarray(conditions, dtype=str), [*names, *([CONTROL] if control else [])])

    # -- states of genes ---------------------------------------------------------------------------------------------

    def _task(
        self, expression: sparse.csr_matrix, totals: np.ndarray | None, names: pd.Index, seed: int
    ) -> engine.Task:
        """Cells for the engine, with the values that the network sees."""
        backbone = self.backbone
        cells = AnnData(expression, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=self._all_genes.astype(str)))
        options = dict(backbone.fine_tuning("gears").tokenize) | backbone.normalized_input(totals)
        if "rng" in engine.accepted_options(backbone):
            options = {"rng": seed, **options}
        options |= self.init_params_["non_kwargs"]["tokenize"]
        source = open_source(cells)
        engine.check_options(backbone, options, source.n_obs)
        return engine.Task(backbone, source, self._match(backbone), options)

    def _cached(self, expression: sparse.csr_matrix, totals: np.ndarray | None, cells: np.ndarray, seed: int) -> Any:
        some = expression[cells]
        names = self.adata.obs_names[cells]
        task = self._task(some, None if totals is None else totals[cells], names, seed)
        task.match.require_any(self.backbone.name)
        _logging.info(task.match.summary())
        return cached_states(task, some, cells, **self._cache)

    # -- predictions -------------------------------------------------------------------------------------------------

    def iter_predictions(
        self,
        perturbations: Sequence[str] | str,
        control: AnnData | None = None,
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Predict, a block at a time, so that memory does not grow with cells and perturbations.

        Parameters
        ----------
        perturbations
            Genes to perturb, several of one perturbation joined by ``+``.
        control
            Control cells; by default those of the data. All genes of the model have to be there, in any order.
        batch_size
            Cells of a block.
        seed
            Seed of what a model draws when it looks at cells; a cell never depends on others.

        Yields
        ------
        Name of the perturbation as given, the cells, and their predicted log-normalised expression, float32, ``(cells, genes)``
        with the genes of ``control``. All perturbations of a block of cells come before the next block.

        Raises
        ------
        ValueError
            If a gene cannot be perturbed, or genes of the model are missing.
        """
        names = [perturbations] if isinstance(perturbations, str) else list(map(str, perturbations))
        members = self._members(names)
        control = self._controls() if control is None else control
        expression, totals, columns = self._control_expression(control)
        if not self.is_trained_ and not (self.backbone is not None and self.backbone.perturbs_already):
            _logging.warning("the model is not trained; call train() first")
        size = self._block_size() if batch_size is None else batch_size
        if size < 1:
            msg = f"batch_size must be positive; got {batch_size}"
            raise ValueError(msg)
        return self._predict_blocks(names, members, expression, totals, columns, control.obs_names, size, seed)

    def _predict_blocks(
        self,
        names: list[str],
        members: list[np.ndarray],
        expression: sparse.csr_matrix,
        totals: np.ndarray | None,
        columns: np.ndarray,
        cells: pd.Index,
        size: int,
        seed: int,
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        learner, n_genes = self.module, len(self.genes)
        learner.eval()
        needs_states = isinstance(learner, GearsLearner) and self.backbone is not None
        for start in range(0, expression.shape[0], size):
            rows = slice(start, min(start + size, expression.shape[0]))
            block = expression[rows]
            with torch.no_grad():
                states = None
                if needs_states:
                    known = None if totals is None else totals[rows]
                    task = self._task(block, known, cells[rows], seed)
                    states = torch.from_numpy(states_in_memory(task)).to(learner.device)
                before = torch.from_numpy(block.toarray().astype(np.float32, copy=False)).to(learner.device)
                seen = learner.look_at(before, states)
                for name, genes in zip(names, members, strict=True):
                    perturbed = torch.from_numpy(genes).to(learner.device).expand(len(before), -1)
                    values = learner.respond(seen, before, perturbed)[:, :n_genes].float().cpu().numpy()
                    out = np.empty_like(values)
                    out[:, columns] = values
                    yield name, rows, out

    def predict(
        self,
        perturbations: Sequence[str] | str,
        control: AnnData | None = None,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Predict expression after perturbations.

        Parameters
        ----------
        perturbations, control, batch_size, seed
            As in :meth:`iter_predictions`.

        Returns
        -------
        Predicted log-normalised expression by perturbation, float32, ``(cells, genes)`` each.
        """
        out: dict[str, list[np.ndarray]] = {}
        for name, _, values in self.iter_predictions(perturbations, control, batch_size, seed=seed):
            out.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in out.items()}

    def _members(self, names: list[str]) -> list[np.ndarray]:
        """Numbers of the genes of each perturbation."""
        place = pd.Index(self._perturbed_genes)
        wanted = [canonical(name).split(SEPARATOR) if canonical(name) != CONTROL else [] for name in names]
        genes = sorted({gene for some in wanted for gene in some})
        found = place.get_indexer(genes)
        unable = [gene for gene, at in zip(genes, found, strict=True) if at < 0 or not self._usable[at]]
        if unable:
            msg = (
                f"the model cannot perturb {', '.join(unable[:_SHOWN])}{' ...' if len(unable) > _SHOWN else ''}: nothing is known "
                f"about these genes, and it was not trained on them; see .perturbable for the {int(self._usable.sum()):,} that it can"
            )
            raise ValueError(msg)
        return [place.get_indexer(some).astype(np.int64) if some else np.full(1, -1) for some in wanted]

    def _controls(self) -> AnnData:
        if self.adata is None:
            msg = "the model was loaded without data; give control cells with control="
            raise ValueError(msg)
        return self.adata[self._labels(self.adata) == CONTROL]

    def _control_expression(self, control: AnnData) -> tuple[sparse.csr_matrix, np.ndarray | None, np.ndarray]:
        """Expression of control cells in the order of the network's genes, and where each gene is in the data."""
        if not isinstance(control, AnnData):
            msg = f"control= needs an AnnData with control cells, not {type(control).__name__}"
            raise TypeError(msg)
        arguments = self.registry_[_SETUP_ARGS_KEY]
        symbols = arguments["gene_symbols"]
        names = control.var.get(symbols, control.var_names)
        names = pd.Index(np.asarray(names).astype(str))
        wanted = self.genes.astype(str)
        columns = names.get_indexer(wanted) if names.is_unique else np.full(len(wanted), -1)
        if (columns < 0).any() or len(names) != len(wanted):
            missing = wanted[columns < 0]
            what = f"they lack {', '.join(missing[:_SHOWN])}" if len(missing) else "they have others, too"
            msg = f"control cells need the {len(wanted):,} genes of the model, but {what}; choose them with adata[:, model.genes]"
            raise ValueError(msg)
        values, totals = self._rule.read(control)
        return self._with_unmeasured(values[:, columns].tocsr()), totals, columns

    def _block_size(self) -> int:
        """Cells of a block, so that its largest arrays stay at a few hundred megabytes."""
        width = 8
        if isinstance(self.module, GearsLearner):
            config = self.module.network.config
            width = max(4 * config.hidden, 2 * config.states)
        else:
            width = 8 * self.backbone.config_to_dict().get("dim", 64)
        return int(np.clip(_PREDICTION_BYTES // (4 * width * len(self._all_genes)), 1, 512))

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        dir_path: File,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_backbone: bool = True,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a directory, as JSON and safetensors.

        Parameters
        ----------
        dir_path, prefix, overwrite, save_anndata, anndata_write_kwargs
            As in :meth:`FoundationModel.save`.
        save_backbone
            Whether the foundation model whose states GEARS sees is saved, too. Without, give it to :meth:`load`.

        Raises
        ------
        FileExistsError
            If the directory exists and may not be replaced.
        ValueError
            If ``save_anndata`` is set for a model without data.
        """
        path = _place(dir_path, prefix)
        if overwrite and path.exists() and not (path / HEADER).is_file() and any(path.iterdir()):
            msg = f"{path} holds something else than a saved model and is not replaced even with overwrite=True"
            raise FileExistsError(msg)
        if save_anndata and self.adata is None:
            msg = "save_anndata=True, but the model has no data"
            raise ValueError(msg)
        state: dict[str, Any] = {
            "split": self.split.to_dict(),
            "perturbed_genes": self._perturbed_genes.astype(str),
            "usable": self._usable,
            "all_genes": self._all_genes.astype(str),
            "rule": {"layer": self._rule.layer, "total_key": self._rule.total_key, "target_sum": self._rule.target_sum},
            "backbone": None if self.backbone is None else self.backbone.provenance.id,
        }
        tensors: dict[str, Tensor] = {}
        if isinstance(self.module, GearsLearner):
            state["network"] = vars(self.module.network.config)
            tensors = self.module.network.state_dict()
        else:
            state["network"] = {"most_genes": self.module.most_genes, "loss": self.module.loss_options}
            tensors = {"ids": self.module.ids}
            save_backbone = True
        header = {
            "format": FORMAT,
            "scfm": version("scfm"),
            "class": type(self).__name__,
            "registry": encode(_without_tables(self.registry_)),
            "attributes": {name: encode(getattr(self, name)) for name in _ATTRIBUTES},
            "task": encode(state),
        }
        with new_directory(path.resolve(), overwrite=overwrite) as directory:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / HEAD)
            header["head_sha256"] = sha256(directory / HEAD)
            if self.backbone is not None and save_backbone:
                store.save_backbone(self.backbone, directory / _BACKBONE)
            if save_anndata:
                _write(self.adata, directory, **anndata_write_kwargs)
            (directory / HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        dir_path: File,
        adata: AnnData | bool | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        *,
        model: File | Backbone | None = None,
    ) -> Self:
        """Load a saved model.

        Parameters
        ----------
        dir_path
            The directory.
        adata
            Data to go on training with, which need the same genes in the same order; by default those saved with the model, if
            any; ``False`` for none.
        accelerator, device, prefix
            As in :meth:`FoundationModel.load`.
        model
            The foundation model, where it was not saved.

        Raises
        ------
        CheckpointError
            If a file is damaged or missing.
        ValueError
            If it is a model of another class, the data have other genes, or the foundation model is missing.
        """
        header, registry = _read_header(cls, dir_path, prefix)
        place, where = _place(dir_path, prefix), _device(accelerator, device)
        if adata is None:
            adata = _saved_data(place)
        adata = None if adata is False else adata
        if adata is not None:
            cls.setup_anndata(adata, **registry[_SETUP_ARGS_KEY])
        loaded = cls.__new__(cls)
        BaseModelClass.__init__(loaded, adata, None if adata is not None else registry)
        saved = registry[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY][GeneField.NAMES]
        if not np.array_equal(loaded.genes.astype(str), np.asarray(saved, dtype=str)):
            msg = "the data have other genes, or another order of them, than the model; choose them with adata[:, model.genes]"
            raise ValueError(msg)
        state, tensors = _read_task(header, dir_path, prefix)
        for name, value in decode(header["attributes"]).items():
            setattr(loaded, name, value)
        backbone = None
        if state["backbone"] is not None:
            backbone = _saved_backbone(place / _BACKBONE, model, state["backbone"], where)
        made = loaded.init_params_["non_kwargs"]
        loaded.split, loaded._rule = SplitNames.of(state["split"]), ExpressionRule(**state["rule"])
        loaded._cache = {"folder": None, "dtype": "float16", "max_gib": 32.0}
        loaded._perturbed_genes, loaded._usable = state["perturbed_genes"].astype(object), state["usable"].astype(bool)
        loaded._all_genes = state["all_genes"].astype(object)
        if made["route"] == "gears":
            graphs = [
                Graph(tensors[f"{name}.edges"], tensors[f"{name}.edge_weight"]) if f"{name}.edges" in tensors else None
                for name in ("go", "coexpression")
            ]
            network = fresh_network(GearsConfig(**state["network"]), 0, *graphs, tensors.get("places"))
            network.load_state_dict(tensors)
            learner: ResponseLearner = GearsLearner(network.to(where), first_cell_only=made["first_cell_only"])
        else:
            learner = GeneratorLearner(
                backbone,
                tensors["ids"].numpy(),
                np.arange(len(loaded._all_genes)),
                most_genes=state["network"]["most_genes"],
                always_include_perturbed=made["always_include_perturbed"],
                loss=state["network"]["loss"],
            ).to(where)
        loaded._use(backbone, learner)
        return loaded

    def to_device(self, device: str | int) -> None:
        """Move the network and the foundation model, in place."""
        place = str(resolve_device(str(device)))
        if self.backbone is not None:
            self.backbone.to(place, "float32")
        self.module.to(place)

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        made = self.init_params_["non_kwargs"]
        kind = "scGPT's network" if made["route"] != "gears" else "GEARS"
        origin = f"{kind} on {made['checkpoint']}" if made["checkpoint"] else f"{kind} without a foundation model"
        return (
            f"{type(self).__name__} with the following parameters:\n"
            f"{origin}, {len(self.genes):,} genes, {len(self.perturbable):,} can be perturbed, "
            f"{len(self.split.train)} perturbations to train on, {len(self.split.validation)} to validate on\n"
            f"Training status: {'Trained' if self.is_trained_ else 'Not Trained'}"
        )


def _route(route: str | None, backbone: Backbone | None) -> str:
    if route not in (None, "gears", "scgpt"):
        msg = f"route must be 'gears' or 'scgpt'; got {route!r}"
        raise ValueError(msg)
    if route is None:
        return "scgpt" if backbone is not None and "perturbs" in backbone.capabilities else "gears"
    if route == "scgpt" and backbone is not None:
        backbone.require("perturbs")
    if route == "gears" and backbone is not None and backbone.perturbs_already:
        msg = f"{backbone.name} is a network for perturbations; use route='scgpt', or the model it was fine-tuned from"
        raise UnsupportedError(msg)
    return route


def _settled(split: Any, conditions: np.ndarray, seed: int) -> SplitNames:
    """Names of a split, those of the default one included; perturbations that the data lack are said."""
    there = set(conditions) - {CONTROL}
    if not there:
        msg = "all cells are controls, so that there is nothing to learn; run scfm.pp.perturbation_setup with the right names"
        raise ValueError(msg)
    if split is None:
        from ..tasks.perturbation_data import split_perturbations

        split = split_perturbations(sorted(there), how="simulation", seed=seed)
    names = SplitNames.of(split)
    if not set(names.train) & there:
        msg = f"no perturbation of split.train is in the data ({', '.join(sorted(there)[:_SHOWN])} ...)"
        raise ValueError(msg)
    if absent := sorted({*names.train, *names.validation} - there):
        _logging.warning(f"the data have no cells for {', '.join(absent[:_SHOWN])} of the split")
    if left := sorted(there - names.known):
        _logging.info(f"    in no part of the split, and left alone: {', '.join(left[:_SHOWN])}")
    return names


def _check_unique(genes: np.ndarray) -> None:
    if len(set(genes)) < len(genes):
        msg = "names of genes are not unique; call adata.var_names_make_unique(), or sum the columns of a gene first"
        raise ValueError(msg)


def _saved_backbone(folder: Any, model: File | Backbone | None, name: str, device: str) -> Backbone:
    if isinstance(model, Backbone):
        return own_copy(model, device=device)
    if model is None and not folder.is_dir():
        msg = f"the foundation model {name} was not saved with this model; give it with model="
        raise ValueError(msg)
    return load(folder if model is None else model, device=device, precision="float32")
