"""Expression signatures of drugs, learned from their molecules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass
from tqdm.auto import tqdm

from .. import _logging
from .._settings import settings
from ..backbones._device import resolve_device
from ..baselines import random_gene_vectors
from ..data import open_source
from ..genes import resolve_gene_names
from ..metrics import signature_scores
from ..tasks.deepce import DeepCE, DeepCEConfig
from ..tasks.deepce_fit import PUBLISHED, DeepCETraining, Signatures, predict_deepce, train_deepce
from ..tasks.molecules import molecules_of
from ..tasks.signatures import Categories
from ._expression_field import ExpressionField
from ._fields import GENES_KEY, GeneField
from ._gene_table import gene_table
from ._plain_saving import PlainSaving
from ._saving import _device
from ._split_column import PARTS, parts_of
from ._splits import split_by_group
from ._training import joined, seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..backbones import Backbone
    from ..tasks.deepce_fit import Monitor
    from ..tasks.molecules import Molecule

    File = str | os.PathLike[str]
    Samples = AnnData | pd.DataFrame | Sequence[str]

_READ_ROWS = 4096
_RANDOM_DIM = 128
_ONE = ("any",)
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# sizes in the paper of scLong, which its code does not use
_PAPER_NETWORK = {"dim": 512, "hidden": 648, "convolutions": (128, 128, 128)}


class ChemicalPerturbation(PlainSaving, BaseModelClass):
    """Expression signature of a drug at a dose in a cell line, also for drugs that were never measured.

    This is DeepCE with the changes of scLong: a network on the graph of the molecule gives a vector for each atom, genes look at
    the atoms and at each other, and dose and cell line are added. What the network knows about genes beforehand comes from the
    table of gene embeddings of any foundation model.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`: one signature for each sample, such as the 978 landmark genes of L1000.
    model
        Model whose vectors of genes are taken: a name, a folder, or a model from :func:`scfm.load`. It is needed at the start
        only, and not kept.
    registry
        Registry of such data, for a model without them.
    gene_vectors
        Vectors of genes instead of a model, one row for each gene. Without either, genes have random vectors (the control).
    network
        Form of the network where it is not that of scLong's code: fields of :class:`scfm.tasks.deepce.DeepCEConfig`, or
        ``"paper"`` for the sizes in its paper.
    precision
        ``"float32"``, or ``"float64"`` as published.
    device
        Where to compute.
    seed
        Seed of the fresh weights; by default ``scvi.settings.seed``.

    Attributes
    ----------
    history
        Losses and scores of training, a data frame for each.
    drugs
        SMILES that were seen.
    doses, cell_lines
        What was seen of these.
    unknown_genes
        Genes without a vector; theirs is zero.

    Raises
    ------
    MissingExtraError
        If rdkit is not installed.
    ValueError
        If a SMILES cannot be read, no gene has a vector, or values are missing.

    References
    ----------
    Pham et al., DeepCE, Nature Machine Intelligence 3, 247 (2021); Bai et al., scLong, Nature Communications 17, 2380 (2026).

    Examples
    --------
    >>> import scfm
    >>> scfm.models.ChemicalPerturbation.setup_anndata(
    ...     adata, smiles_key="smiles", dose_key="pert_dose"
    ... )  # doctest: +SKIP
    >>> model = scfm.models.ChemicalPerturbation(adata, model="sclong")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> model.predict(["CC(=O)Oc1ccccc1C(=O)O"], dose=10)  # doctest: +SKIP
    """

    module: DeepCE

    def __init__(
        self,
        adata: AnnData | None = None,
        model: File | Backbone | None = None,
        *,
        registry: dict[str, Any] | None = None,
        gene_vectors: pd.DataFrame | None = None,
        network: Mapping[str, Any] | Literal["paper"] | None = None,
        precision: Literal["float32", "float64"] = "float32",
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(adata, registry)
        if self.adata is None:
            msg = "a model of drugs starts from data; give adata=, or load a saved one"
            raise ValueError(msg)
        if precision not in _DTYPES:
            msg = f"precision must be one of {', '.join(map(repr, _DTYPES))}; got {precision!r}"
            raise ValueError(msg)
        if isinstance(network, str):
            if network != "paper":
                msg = f"network must be 'paper' or a mapping; got {network!r}"
                raise ValueError(msg)
            network = _PAPER_NETWORK
        seed = seed_or_default(seed)
        vectors, origin = self._vectors(model, gene_vectors, device, seed)
        smiles, doses, cell_lines = self._conditions(self.adata)
        molecules_of(smiles)
        self.drugs = np.array(sorted(set(smiles)), dtype=object)
        self._doses = Categories(_ONE, "dose") if doses is None else Categories.of(doses, "dose", amounts=True)
        self._cell_lines = (
            Categories(_ONE, "cell line") if cell_lines is None else Categories.of(cell_lines, "cell line")
        )
        config = DeepCEConfig(
            **{
                "gene_dim": vectors.shape[1],
                "n_cell_lines": len(self._cell_lines.names),
                "n_doses": len(self._doses.names),
                **dict(network or {}),
            }
        )
        self.module = DeepCE(config, torch.from_numpy(vectors), seed=seed).to(_DTYPES[precision]).eval()
        self.to_device(str(resolve_device(device)))
        self.init_params_ = {
            "kwargs": {},
            "non_kwargs": {"gene_vectors": origin, "precision": precision, "seed": seed},
        }

    def _vectors(
        self, model: File | Backbone | None, gene_vectors: pd.DataFrame | None, device: str, seed: int
    ) -> tuple[np.ndarray, str]:
        """Vectors of the genes, zero for those without one, and where they come from."""
        self.unknown_genes = np.zeros(0, dtype=object)
        if model is None and gene_vectors is None:
            return random_gene_vectors(self.genes, _RANDOM_DIM, random_state=seed).to_numpy(), "random"
        table = gene_table(
            model, embeddings=gene_vectors, aliases=self.registry_[_SETUP_ARGS_KEY]["aliases"], device=device
        )
        rows = table.rows(self.genes.astype(str))
        ids = self._gene_state[GeneField.ENSEMBL_IDS]
        if ids is not None:
            by_id = table.rows(np.asarray(ids).astype(str))
            rows = np.where(rows < 0, by_id, rows)
        self.unknown_genes = self.genes[rows < 0]
        if (rows < 0).all():
            msg = f"none of the genes has a vector in {table.origin}; are these symbols or Ensembl ids of human genes?"
            raise ValueError(msg)
        if len(self.unknown_genes):
            shown = ", ".join(map(str, self.unknown_genes[:10])) + (" ..." if len(self.unknown_genes) > 10 else "")
            _logging.warning(
                f"{len(self.unknown_genes):,} genes have no vector in {table.origin}; theirs is zero: {shown}"
            )
        return np.nan_to_num(table.take(rows)).astype(np.float32), table.origin

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        smiles_key: str = "smiles",
        dose_key: str | None = None,
        cell_line_key: str | None = None,
        split_key: str | None = None,
        layer: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register signatures; nothing but ``uns`` and ``obs`` is changed.

        Parameters
        ----------
        adata
            One row for each sample. :func:`scfm.tasks.signatures.central_replicates` chooses among replicates.
        smiles_key
            Column of ``obs`` with the molecule as SMILES.
        dose_key
            Column with the dose: amounts such as ``10`` or ``"3.33 um"``, or names.
        cell_line_key
            Column with the cell line.
        split_key
            Column that says for each sample ``"train"``, ``"validation"`` (or ``"dev"``) or ``"test"``.
        layer
            Layer with the signatures; by default ``X``.
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
        for name in (smiles_key, dose_key, cell_line_key, split_key):
            if name is not None and name not in adata.obs:
                msg = f"obs has no column {name!r}; there are {', '.join(map(str, adata.obs.columns)) or 'none'}"
                raise KeyError(msg)
        manager = AnnDataManager(
            fields=[ExpressionField(REGISTRY_KEYS.X_KEY, layer), GeneField(gene_symbols, gene_ids)],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes of a signature."""
        return np.asarray(self._gene_state[GeneField.NAMES], dtype=object)

    @property
    def doses(self) -> tuple[str, ...]:
        """Doses that were seen; empty if there is no column of them."""
        return self._doses.names if self._arguments["dose_key"] else ()

    @property
    def cell_lines(self) -> tuple[str, ...]:
        """Cell lines that were seen; empty if there is no column of them."""
        return self._cell_lines.names if self._arguments["cell_line_key"] else ()

    @property
    def _arguments(self) -> dict[str, Any]:
        return self.registry_[_SETUP_ARGS_KEY]

    @property
    def _gene_state(self) -> dict[str, Any]:
        return self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    def _signatures(self) -> np.ndarray:
        with open_source(self.adata, layer=self._arguments["layer"]) as source:
            blocks = [block.counts.toarray().astype(np.float32) for block in source.blocks(_READ_ROWS)]
        values = np.concatenate(blocks) if blocks else np.zeros((0, len(self.genes)), dtype=np.float32)
        if not np.isfinite(values).all():
            msg = "signatures hold values that are missing or infinite; take these samples out first"
            raise ValueError(msg)
        return values

    def _conditions(self, samples: AnnData | pd.DataFrame) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
        """SMILES, dose and cell line of samples; ``None`` for what the model was set up without."""
        table = samples.obs if isinstance(samples, AnnData) else samples
        names = [self._arguments[name] for name in ("smiles_key", "dose_key", "cell_line_key")]
        if missing := [name for name in names if name is not None and name not in table]:
            msg = f"the samples have no column {', '.join(map(repr, missing))}, with which the model was set up"
            raise KeyError(msg)
        values = [None if name is None else table[name].to_numpy(dtype=object) for name in names]
        lost = pd.isna(values[0]) | (values[0].astype(str) == "")
        if lost.any():
            msg = f"{int(lost.sum()):,} samples have no SMILES in {names[0]!r}; leave them out, for example adata[adata.obs[{names[0]!r}] != ''].copy()"
            raise ValueError(msg)
        return [str(text) for text in values[0]], values[1], values[2]

    def _samples(
        self,
        smiles: Sequence[str],
        doses: Iterable[Any] | None,
        cell_lines: Iterable[Any] | None,
        values: np.ndarray | None = None,
    ) -> Signatures:
        known, numbers = np.unique(np.asarray(smiles, dtype=str), return_inverse=True)
        molecules: list[Molecule] = molecules_of(known.tolist())
        parts = []
        for categories, given in ((self._cell_lines, cell_lines), (self._doses, doses)):
            only = np.full(len(numbers), _ONE[0], dtype=object)
            parts.append(categories.indicators(only if given is None else np.asarray(given, dtype=object)))
        return Signatures(molecules, numbers.ravel(), *parts, values)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        preset: Literal["code", "paper"] = "code",
        validation_size: float = 0.1,
        batch_size: int | None = None,
        lr: float | None = None,
        warmup_epochs: int | None = None,
        monitor: Monitor = "Pearson",
        keep_best: bool = True,
        patience: int | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Train the network; the same seed gives the same weights.

        Parameters
        ----------
        max_epochs, batch_size, lr, warmup_epochs
            See :class:`scfm.tasks.deepce_fit.DeepCETraining`; by default those of ``preset``.
        preset
            ``"code"`` (Adam, 2e-4, 32 samples) or ``"paper"`` (2e-5 with five epochs of warm-up, 16 samples) of scLong.
        validation_size
            Share of the samples, whole drugs of them, that choose the epoch, if no column says which do.
        monitor
            Score of these samples by which the epoch is chosen.
        keep_best
            Whether the weights of that epoch count, or the last.
        patience
            Stop after so many epochs without a better score.
        accelerator, device
            Where to compute.
        seed
            Seed of the division, the order and the dropout; by default ``scvi.settings.seed``.
        progress
            Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2.

        Raises
        ------
        ValueError
            If a number makes no sense, or the loss is no longer finite.
        """
        if self.adata is None:
            msg = "the model was loaded without data; load it with adata="
            raise ValueError(msg)
        if preset not in PUBLISHED:
            msg = f"preset must be one of {', '.join(map(repr, PUBLISHED))}; got {preset!r}"
            raise ValueError(msg)
        seed = seed_or_default(seed)
        given = {"max_epochs": max_epochs, "batch_size": batch_size, "lr": lr, "warmup_epochs": warmup_epochs}
        training = DeepCETraining(
            **PUBLISHED[preset] | {name: value for name, value in given.items() if value is not None},
            monitor=monitor,
            keep_best=keep_best,
            patience=patience,
            seed=seed,
        )
        smiles, doses, cell_lines = self._conditions(self.adata)
        samples = self._samples(smiles, doses, cell_lines, self._signatures())
        train, validation, test = self._divide(samples.molecule, validation_size, seed)
        self.to_device(_device(accelerator, device))
        start = _logging.info(
            f"training on {len(train):,} signatures of {len(np.unique(samples.molecule[train])):,} drugs"
        )
        show = settings.verbosity >= 2 if progress is None else progress
        epochs = train_deepce(self.module, samples, train, validation, training)
        try:
            rows = list(tqdm(epochs, total=training.max_epochs, desc="epochs", disable=not show, leave=False))
        finally:
            epochs.close()
            self.module.eval()
        table = pd.DataFrame(rows).rename_axis("epoch")
        self.history_ = joined(self.history_, {name: table[[name]] for name in table})
        self.train_indices_, self.validation_indices_, self.test_indices_ = train, validation, test
        self.is_trained_ = True
        _logging.info("    finished", time=start)

    def _divide(
        self, molecule: np.ndarray, validation_size: float, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        key = self._arguments["split_key"]
        if key is not None:
            parts = parts_of(self.adata, key)
            return tuple(np.flatnonzero(parts == part) for part in PARTS)
        if not 0 <= validation_size < 1:
            msg = f"validation_size={validation_size} is no share of the samples"
            raise ValueError(msg)
        everything, none = np.arange(len(molecule)), np.zeros(0, dtype=np.int64)
        if not validation_size:
            return everything, none, none
        return *split_by_group(molecule, validation_size, seed), none

    # -- what it gives -----------------------------------------------------------------------------------------------

    def predict(
        self,
        samples: Samples | None = None,
        *,
        dose: Any = None,
        cell_line: Any = None,
        batch_size: int = 32,
    ) -> pd.DataFrame:
        """Predict signatures.

        Parameters
        ----------
        samples
            Data or a table with the columns that the model was set up with, or a list of SMILES. By default the samples that
            the model was trained with.
        dose, cell_line
            For a list of SMILES, one for all or one for each. Amounts between two known doses are divided among them by their
            logarithms, which is an extension of scfm; beyond the known ones they are refused.
        batch_size
            Molecules in a forward pass.

        Returns
        -------
        One row for each sample, one column for each gene.

        Raises
        ------
        ValueError
            If a SMILES cannot be read, or a dose or cell line is unknown.
        """
        if not self.is_trained_:
            _logging.warning("the network is not trained; call train() first")
        if samples is None:
            if self.adata is None:
                msg = "the model was loaded without data; say what to predict with samples="
                raise ValueError(msg)
            samples = self.adata
        if isinstance(samples, (AnnData, pd.DataFrame)):
            if dose is not None or cell_line is not None:
                msg = "dose= and cell_line= go with a list of SMILES; tables have columns for them"
                raise ValueError(msg)
            names = samples.obs_names if isinstance(samples, AnnData) else samples.index
            given = self._samples(*self._conditions(samples))
        else:
            smiles = [samples] if isinstance(samples, str) else [str(text) for text in samples]
            names = pd.Index(smiles, name="smiles")
            given = self._samples(
                smiles,
                *(
                    self._for_each(name, value, len(smiles))
                    for name, value in (("dose", dose), ("cell_line", cell_line))
                ),
            )
        if not len(given):
            return pd.DataFrame(np.zeros((0, len(self.genes)), dtype=np.float32), index=names, columns=self.genes)
        values = predict_deepce(self.module.eval(), given, batch_size=batch_size)
        return pd.DataFrame(values, index=names, columns=self.genes)

    def _for_each(self, name: str, value: Any, n: int) -> np.ndarray | None:
        known = self._arguments[f"{name}_key"] is not None
        if known == (value is None):
            what = "needs" if known else "was set up without, and takes no"
            msg = f"the model {what} {name}="
            raise ValueError(msg)
        if value is None:
            return None
        values = np.full(n, value, dtype=object) if np.ndim(value) == 0 else np.asarray(value, dtype=object)
        if len(values) != n:
            msg = f"{name}= has {len(values)} values for {n} drugs"
            raise ValueError(msg)
        return values

    def score(self, samples: AnnData | None = None, *, batch_size: int = 32) -> dict[str, float]:
        """Compare predicted signatures with measured ones.

        Parameters
        ----------
        samples
            Samples with signatures of the same genes in the same order, in the same layer; by default those of the split that
            are tested on.
        batch_size
            Molecules in a forward pass.

        Returns
        -------
        See :func:`scfm.metrics.signature_scores`.

        Raises
        ------
        ValueError
            If there are no such samples, or their genes differ.
        """
        if samples is None:
            rows = self.test_indices_
            if self.adata is None or rows is None or not len(rows):
                msg = "no samples are set aside to test on; name a column with split_key=, or give samples="
                raise ValueError(msg)
            samples = self.adata[rows]
        names = resolve_gene_names(samples.var, self._arguments["gene_symbols"], self._arguments["gene_ids"]).symbols
        if not np.array_equal(np.asarray(names).astype(str), self.genes.astype(str)):
            msg = "the samples have other genes than the model, or another order; choose them with samples[:, model.genes]"
            raise ValueError(msg)
        layer = self._arguments["layer"]
        with open_source(samples, layer=layer) as source:
            observed = source.read(0, source.n_obs).toarray()
        most = min(100, len(self.genes))
        ks = tuple(k for k in (10, 20, 50, 100) if k <= most) or (most,)
        return signature_scores(observed, self.predict(samples, batch_size=batch_size).to_numpy(), ks=ks, n_true=most)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _saved_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = self.module.config
        state = {
            "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
            "drugs": self.drugs.astype(str),
            "doses": list(self._doses.names),
            "cell_lines": list(self._cell_lines.names),
            "unknown_genes": self.unknown_genes.astype(str),
        }
        return state, self.module.state_dict()

    def _restore(self, state: dict[str, Any], tensors: dict[str, Tensor], place: Path, device: str) -> None:
        self.drugs, self.unknown_genes = (state[name].astype(object) for name in ("drugs", "unknown_genes"))
        dosed = self._arguments["dose_key"] is not None
        self._doses = Categories(tuple(state["doses"]), "dose", dosed)
        self._cell_lines = Categories(tuple(state["cell_lines"]), "cell line")
        self.module = DeepCE(DeepCEConfig(**state["config"]), tensors["genes"]).to(tensors["genes"].dtype)
        self.module.load_state_dict(tensors)
        self.module.eval()
        self.to_device(device)

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        made = self.init_params_["non_kwargs"]
        return (
            f"{type(self).__name__} with the following parameters:\n"
            f"DeepCE, {len(self.genes):,} genes with vectors from {made['gene_vectors']}, {len(self.drugs):,} drugs, "
            f"{len(self._doses.names)} doses, {len(self._cell_lines.names)} cell lines\n"
            f"Training status: {'Trained' if self.is_trained_ else 'Not Trained'}"
        )
