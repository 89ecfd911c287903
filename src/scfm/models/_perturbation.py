"""Expression after genetic perturbations, learned from perturbed cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass
from tqdm.auto import tqdm

from .. import _keys, _logging, engine
from .._settings import settings
from ..backbones import Backbone, load
from ..backbones._device import resolve_device
from ..data import open_source
from ..tasks.gears import coexpression_graph
from ..tasks.perturbation_data import CONTROL, genes_of
from ..tasks.perturbation_fit import fit
from ..tasks.perturbation_learners import GearsLearner
from ..tasks.perturbation_pairs import PerturbationPairs
from ._alignment import align
from ._backbone import own_copy
from ._control_states import cached_states
from ._expression_field import ExpressionField
from ._fields import GENES_KEY, GeneField
from ._perturbation_data import (
    ExpressionRule,
    de_positions,
    genes_in,
    labels_of,
    parts_of_cells,
    require_setup,
    settled_split,
    symbol_column,
)
from ._perturbation_network import (
    check_loss,
    choose_route,
    fit_options,
    gears_learner,
    generator_learner,
    recipe_of,
)
from ._perturbation_predictions import PerturbationPredictions
from ._perturbation_saving import CACHE, PerturbationSaving
from ._saving import _device
from ._training import joined, seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from ..backbones import FineTuning
    from ..genes import GeneMatch
    from ..tasks.gears_network import Graph
    from ..tasks.perturbation_fit import FitOptions
    from ..tasks.perturbation_learners import ResponseLearner
    from ..train._presets import Optimization

    File = str | os.PathLike[str]
    Route = Literal["gears", "scgpt"]


class GeneticPerturbation(PerturbationPredictions, PerturbationSaving, BaseModelClass):
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
        ``"train"``, ``"validation"`` and ``"test"``. By default ``"simulation"`` of that function, with ``seed``, for the labels of
        the file (published splits have the seed 1).
    go
        What is known about genes, for GEARS: a table with the columns ``gene`` (or ``symbol``) and ``term`` (or ``go_id``), one
        of pairs with ``source``, ``target`` and ``importance``, a mapping of genes to terms, or a file with one of these. Genes
        that share terms are neighbours in the graph by which perturbations that were never seen are predicted.
    perturbable
        Genes that can be perturbed, besides those of the data. By default all genes of ``go`` for GEARS, and all measured ones
        for networks that mark the perturbed gene.
    network
        Form of the network where it is not that of the authors: fields of :class:`scfm.tasks.gears_network.GearsConfig` but
        numbers of genes and perturbations, or
        options of :meth:`scfm.Backbone.perturbing` (``decoder="affine"`` or ``"mlp"``, ``activation``, ``adaptive``, ``mvc``,
        ``input_bins``, ``dropout``).
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
        If the data are not prepared, the route or the split makes no sense, the default split leaves nothing to train on, or no
        gene is known to the model.
    TypeError
        If ``split`` or ``network`` has parts that do not exist.
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
        if isinstance(model, Backbone):
            backbone = own_copy(model, device=device)
        elif model is not None:
            backbone = load(model, device=device, precision="float32")
        route = choose_route(route, backbone)
        if len(set(self.genes)) < len(self.genes):
            msg = (
                "names of genes are not unique; call adata.var_names_make_unique(), or sum the columns of a gene first"
            )
            raise ValueError(msg)
        self._rule, self._cache = ExpressionRule.of(self.adata), {**CACHE, "folder": cache_dir}
        self._cache |= {"dtype": cache_dtype, "max_gib": float(max_cache_gib)}
        conditions = set(labels_of(self.adata))
        self.split = settled_split(split, self.adata, seed)
        genes = {
            "measured": [str(gene) for gene in self.genes],
            "seen": genes_in({*conditions, *self.split.train, *self.split.validation, *self.split.test}),
            "trained": genes_in(self.split.train),
            "perturbable": perturbable,
            "form": dict(network or {}),
            "seed": seed,
        }
        if route == "gears":
            learner, self._perturbed = gears_learner(
                backbone, go=go, coexpression=self._coexpression, first_cell_only=first_cell_only, **genes
            )
            place = resolve_device(device) if backbone is None else backbone.device
        else:
            if go is not None:
                msg = "route='scgpt' uses nothing that is known about genes; leave go= out, or take route='gears'"
                raise ValueError(msg)
            learner, self._perturbed = generator_learner(
                backbone,
                match=lambda extra: self._match(backbone, extra),
                most_genes=most_genes,
                always_include_perturbed=always_include_perturbed,
                **genes,
            )
            backbone, place = learner.backbone, learner.backbone.device
        self._use(backbone, learner.to(place))
        arguments = {
            "route": route,
            "checkpoint": None if backbone is None else backbone.provenance.id,
            "tokenize": dict(tokenize or {}),
            "first_cell_only": first_cell_only,
            "seed": seed,
        }
        self.init_params_ = {"kwargs": {}, "non_kwargs": arguments}

    def _use(self, backbone: Backbone | None, learner: ResponseLearner) -> None:
        self.backbone, self.module = backbone, learner.eval()

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
        gene_symbols
            Column of ``var`` with gene symbols; by default the one that :func:`scfm.pp.perturbation_setup` used.
        gene_ids, aliases
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
        require_setup(adata)
        if gene_symbols is None:
            gene_symbols = symbol_column(adata)
        setup_method_args = cls._get_setup_method_args(**locals())
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
        """Genes whose perturbation can be predicted: trained on, or known to the model or the graph."""
        return pd.Index(self._perturbed.usable_names, name="gene")

    @property
    def route(self) -> str:
        """``"gears"`` or ``"scgpt"``."""
        return self.init_params_["non_kwargs"]["route"]

    @property
    def recipe(self) -> FineTuning | None:
        """How the authors of the model train such a network; ``None`` for GEARS itself."""
        return recipe_of(self.backbone, self.route)

    @property
    def _gene_state(self) -> dict[str, Any]:
        return self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    def _match(self, backbone: Backbone, extra: Sequence[str]) -> GeneMatch:
        """What the genes of the data, and further ones by their name, are to a model."""
        state = {**self._gene_state, GeneField.NAMES: np.array([*self.genes, *extra], dtype=object)}
        if state[GeneField.ENSEMBL_IDS] is not None:
            state[GeneField.ENSEMBL_IDS] = np.array([*state[GeneField.ENSEMBL_IDS], *[""] * len(extra)], dtype=object)
        return align(backbone.vocab, state, self.registry_[_SETUP_ARGS_KEY]["aliases"])

    def _coexpression(self) -> Graph:
        """Graph of the genes over control cells and cells with one perturbed gene that are trained on, as the authors have it."""
        single = np.array([len(genes_of(name)) < 2 for name in labels_of(self.adata)])
        train = parts_of_cells(self.adata, self.split) == "train"
        return coexpression_graph(self._rule.read(self.adata)[0][train & single])

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
            delta"``, over the perturbations for which such genes are known), or ``"loss"``. By default ``"DE MSE"`` for GEARS and
            ``"Pearson"`` for scGPT.
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
            If a number makes no sense, no cells are there to train on, cells were reordered since the setup, or the loss is no
            longer finite.
        TypeError
            If ``loss`` has an option that does not exist.
        """
        if self.adata is None:
            msg = "the model was loaded without data; load it with adata="
            raise ValueError(msg)
        self._validate_anndata(self.adata)
        seed = self.init_params_["non_kwargs"]["seed"] if seed is None else int(seed)
        if loss and self.route != "gears":
            msg = "loss= has options of GEARS; the loss of this network has none"
            raise ValueError(msg)
        check_loss(loss or {})
        parts = parts_of_cells(self.adata, self.split)
        train, held_out = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "validation")
        de_genes = de_positions(self.adata, self.genes)
        options = fit_options(
            self.recipe,
            self.route,
            has_de_genes=bool(set(de_genes) & set(labels_of(self.adata)[held_out]) if len(held_out) else de_genes),
            optimization=optimization,
            lr=lr,
            weight_decay=weight_decay,
            monitor=monitor,
            patience=early_stopping_patience,
            max_epochs=max_epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            sum_accumulated=sum_accumulated,
            keep_best=keep_best,
            seed=seed,
        )
        pairs, totals = self._pairs()
        if not pairs.codes[train].any():
            msg = "no cell of the data has a perturbation of split.train, so that there is nothing to learn from"
            raise ValueError(msg)
        if (accelerator, device) != ("auto", "auto"):
            self.to_device(_device(accelerator, device))
        if isinstance(self.module, GearsLearner):
            self.module.loss_options = dict(loss or {})
            if self.backbone is not None:
                used = np.unique(pairs.controls[np.concatenate([train, held_out])])
                self.module.states = self._cached(pairs.expression, totals, used, seed)
        if not len(held_out):
            _logging.warning("no cells are held out by split.validation, so that the last epoch is kept")
        start = _logging.info(
            f"training on {len(train):,} cells with {len(np.unique(pairs.codes[train])) - 1} perturbations; "
            f"{len(np.unique(pairs.codes[held_out]))} held out"
        )
        rows = self._run(
            pairs, train, held_out, options, de_genes, settings.verbosity >= 2 if progress is None else progress
        )
        table = pd.DataFrame(rows).rename_axis("epoch")
        self.history_ = joined(self.history_, {name: table[[name]] for name in table})
        self.is_trained_ = True
        _logging.info("    finished", time=start)

    def _run(
        self,
        pairs: PerturbationPairs,
        train: np.ndarray,
        held_out: np.ndarray,
        options: FitOptions,
        de_genes: dict[str, np.ndarray],
        show: bool,
    ) -> list[dict[str, float]]:
        self.module.requires_grad_(True)
        rows: list[dict[str, float]] = []
        epochs = fit(self.module, pairs, train, held_out, options, de_genes=de_genes)
        try:
            with tqdm(total=options.max_epochs, desc="epochs", disable=not show, leave=False) as bar:
                for row in epochs:
                    rows.append(row)
                    bar.update()
                    bar.set_postfix(loss=f"{row['train_loss_epoch']:.4g}")
        finally:
            epochs.close()
            self.module.eval().requires_grad_(False)
            self.module.zero_grad()
            if isinstance(self.module, GearsLearner):
                self.module.states = None
        return rows

    def _pairs(self) -> tuple[PerturbationPairs, np.ndarray | None]:
        values, totals = self._rule.read(self.adata)
        labels = labels_of(self.adata)
        conditions = [CONTROL, *sorted(set(labels) - {CONTROL})]
        perturbed = self._members(conditions)
        controls = self.adata.obs[_keys.CONTROL_OF_CELL].to_numpy(dtype=np.int64)
        codes = pd.Index(conditions).get_indexer(labels)
        return PerturbationPairs(self._with_unmeasured(values), controls, conditions, codes, perturbed), totals

    def _members(self, names: Sequence[str]) -> np.ndarray:
        """Numbers of the perturbed genes of canonical perturbations, filled with -1, ``(names, most)``."""
        genes = [genes_of(name) for name in names]
        out = np.full((len(names), max(1, *map(len, genes))), -1, dtype=np.int64)
        for row, some in zip(out, genes, strict=True):
            row[: len(some)] = self._perturbed.numbers(some)
        return out

    def _with_unmeasured(self, values: sparse.csr_matrix) -> sparse.csr_matrix:
        """Perturbed genes that are not measured follow with the value 0."""
        if not self._perturbed.extra:
            return values
        zeros = sparse.csr_matrix((values.shape[0], len(self._perturbed.extra)), dtype=values.dtype)
        return sparse.hstack([values, zeros], format="csr")

    # -- states of genes ---------------------------------------------------------------------------------------------

    def _task(
        self, expression: sparse.csr_matrix, totals: np.ndarray | None, names: pd.Index, seed: int
    ) -> engine.Task:
        """Cells for the engine, with the values that the network sees."""
        backbone = self.backbone
        match = self._match(backbone, self._perturbed.extra)
        cells = AnnData(expression, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=match.names.astype(str)))
        options = dict(backbone.fine_tuning("gears").tokenize) | backbone.normalized_input(totals)
        if "rng" in engine.accepted_options(backbone):
            options = {"rng": seed, **options}
        options |= self.init_params_["non_kwargs"]["tokenize"]
        source = open_source(cells)
        engine.check_options(backbone, options, source.n_obs)
        return engine.Task(backbone, source, match, options)

    def _cached(self, expression: sparse.csr_matrix, totals: np.ndarray | None, cells: np.ndarray, seed: int) -> Any:
        some = expression[cells]
        names = self.adata.obs_names[cells]
        task = self._task(some, None if totals is None else totals[cells], names, seed)
        task.match.require_any(self.backbone.name)
        _logging.info(task.match.summary())
        return cached_states(task, some, cells, **self._cache)

    # -- looks ---------------------------------------------------------------------------------------------------------

    def to_device(self, device: str | int) -> None:
        """Move the network and the foundation model, in place."""
        place = str(resolve_device(str(device)))
        if self.backbone is not None:
            self.backbone.to(place, "float32")
        self.module.to(place)

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
