"""Cells after a treatment, by optimal transport from control to treated cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass
from torch import nn

from .. import _logging
from .._settings import settings
from ..backbones import Backbone, load
from ..backbones._device import resolve_device
from ..genes import resolve_gene_names
from ..tasks.panel_codec import CodecTraining, LinearCodec, PanelCodec
from ..tasks.transport import CodeScale, TransportMap, TransportTraining
from ._alignment import align
from ._backbone import own_copy
from ._expression_field import ExpressionField
from ._fields import GENES_KEY, GeneField
from ._label_field import label_column
from ._perturbation_data import ExpressionRule
from ._plain_saving import BACKBONE, PlainSaving
from ._saving import _device
from ._split_column import PARTS
from ._training import seed_or_default
from ._transport_codes import BLOCK, TransportCodes
from ._transport_evaluation import TransportEvaluation
from ._transport_fit import TransportFit

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..genes import GeneMatch

    File = str | os.PathLike[str]

_LATENT, _HIDDEN = 50, 512
_POTENTIAL = (64, 64, 64, 64)
_FROZEN_RATE = 1e-3
_SHOWN = 10


class ChemicalTransport(TransportCodes, TransportFit, TransportEvaluation, PlainSaving, BaseModelClass):
    """Expression of single cells after a treatment, although no cell is measured twice: CellOT on any embedding of cells.

    Each cell gets a code from which its expression can be decoded. For each treatment two input-convex networks then learn how the
    codes of control cells have to move, as little as possible, to look like those of treated cells. CellFM's variant takes the
    code from its own embedding of a panel of genes.

    Parameters
    ----------
    adata
        Data that were set up with :meth:`setup_anndata`.
    model
        Model whose embedding of cells the code is made from: a name, a folder, or a model from :func:`scfm.load`, which is copied.
    registry
        Registry of such data, for a model without them.
    use_rep
        Slot of ``obsm`` to make the code from, instead of a model.
    space
        Without either, ``"pca"`` (principal components, which need no network) or ``"autoencoder"`` (the code is made from the
        expression itself).
    latent, hidden
        Widths of the code and of the layer in front of it and behind it (CellFM and CellOT: codes of 50).
    potential
        Widths of the layers of the input-convex networks: by default four times 64 (CellOT), for CellFM four times 512.
    fine_tune
        Whether the model is trained along with its encoder and decoder, as the authors of CellFM do. By default its embeddings are
        computed once and stay as they are, which takes a small part of the time.
    pooling
        Embedding of the model.
    tokenize
        Options of the model's tokenizer; by default as its authors do (CellFM sees all genes of the panel, zeros included).
    device
        Where to compute.
    seed
        Seed of the fresh weights; by default ``scvi.settings.seed``.

    Attributes
    ----------
    perturbable
        The treatments.
    history
        Losses of the codec and of each transport, a data frame for each.

    Raises
    ------
    ValueError
        If more than one source of embeddings is given, or no gene is known to the model.

    References
    ----------
    Bunne et al., CellOT, Nature Methods 20, 1759 (2023); Zeng et al., CellFM, Nature Communications 16, 4679 (2025).

    Examples
    --------
    >>> import scfm
    >>> scfm.models.ChemicalTransport.setup_anndata(adata, "condition", control="control")  # doctest: +SKIP
    >>> model = scfm.models.ChemicalTransport(adata, model="cellfm")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> model.predict("IFN-beta", controls)  # doctest: +SKIP
    """

    module: nn.ModuleDict

    def __init__(
        self,
        adata: AnnData | None = None,
        model: File | Backbone | None = None,
        *,
        registry: dict[str, Any] | None = None,
        use_rep: str | None = None,
        space: Literal["pca", "autoencoder"] | None = None,
        latent: int | None = None,
        hidden: int | None = None,
        potential: Sequence[int] | None = None,
        fine_tune: bool = False,
        pooling: str | None = None,
        tokenize: Mapping[str, Any] | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(adata, registry)
        if self.adata is None:
            msg = "a transport starts from data; give adata=, or load a saved one"
            raise ValueError(msg)
        if sum(given is not None for given in (model, use_rep, space)) > 1:
            msg = "model=, use_rep= and space= each say where the codes come from; give one of them"
            raise ValueError(msg)
        if space not in (None, "pca", "autoencoder"):
            msg = f"space must be 'pca' or 'autoencoder'; got {space!r}"
            raise ValueError(msg)
        if fine_tune and model is None:
            msg = "fine_tune=True trains a model along; give model="
            raise ValueError(msg)
        seed = seed_or_default(seed)
        kind = "model" if model is not None else "obsm" if use_rep is not None else space or "pca"
        self.backbone = None
        defaults: dict[str, Any] = {"latent": _LATENT, "hidden": _HIDDEN, "potential": _POTENTIAL}
        if model is not None:
            self.backbone = (
                own_copy(model, device=device)
                if isinstance(model, Backbone)
                else load(model, device=device, precision="float32")
            )
            self.backbone.require("embeds")
            defaults |= dict(self.backbone.fine_tuning("transport").objective)
        given = {"latent": latent, "hidden": hidden, "potential": potential}
        sizes = defaults | {name: value for name, value in given.items() if value is not None}
        self.init_params_ = {
            "kwargs": {},
            "non_kwargs": {
                "space": kind,
                "checkpoint": None if self.backbone is None else self.backbone.provenance.id,
                "use_rep": use_rep,
                "latent": int(sizes["latent"]),
                "hidden": int(sizes["hidden"]),
                "potential": [int(width) for width in sizes["potential"]],
                "fine_tune": fine_tune,
                "pooling": pooling,
                "tokenize": dict(tokenize or {}),
                "seed": seed,
            },
        }
        labels = label_column(self.adata, self._arguments["perturbation_key"])
        self._treatments = np.array(sorted(set(labels.dropna()) - {self._arguments["control"]}), dtype=object)
        if kind == "model":
            self._match().require_any(self.backbone.name)
        codec = None if kind == "pca" else self._new_codec(self._dim(self.adata))
        self._start(codec)
        place = str(resolve_device(device)) if self.backbone is None else str(self.backbone.device)
        self.to_device(place)

    def _start(self, codec: nn.Module | None) -> None:
        self.module = nn.ModuleDict({} if codec is None else {"codec": codec})
        self.module["transports"] = nn.ModuleList()
        self._learned: list[str] = []
        # by how much each treatment shifts the mean code and the mean expression, for the baselines
        self._shifts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._marker_order: dict[str, np.ndarray] = {}
        self.module.eval()

    def _new_codec(self, dim: int) -> PanelCodec:
        return PanelCodec(
            dim, len(self.genes), self._made["latent"], hidden=self._made["hidden"], seed=self._made["seed"]
        )

    # -- data --------------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str,
        control: str = "control",
        split_key: str | None = None,
        layer: str | None = None,
        total_key: str | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        **kwargs: Any,
    ) -> None:
        """Register control and treated cells; nothing but ``uns`` and ``obs`` is changed.

        Parameters
        ----------
        adata
            The cells.
        perturbation_key
            Column of ``obs`` with the treatment of each cell. Cells without one are left alone.
        control
            What stands there for untreated cells.
        split_key
            Column that says for each cell ``"train"``, ``"validation"`` or ``"test"``; to hold out a whole cell type, say
            ``"test"`` for its cells.
        layer
            Layer with counts, which are normalised to 10,000 per cell and ``log1p``, or with values that are so already; by
            default ``X``.
        total_key
            Column of ``obs`` with the counts of each cell before genes were chosen.
        gene_symbols, gene_ids, aliases
            As in :meth:`FoundationModel.setup_anndata`.
        kwargs
            What scvi-tools passes on when a setup is transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If there are no control or no treated cells, ``adata`` is a view, or values are missing or infinite.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        there = set(label_column(adata, perturbation_key).dropna())
        if control not in there or len(there) < 2:
            what = f"no cells called {control!r}" if control not in there else "no treated cells"
            msg = f"obs[{perturbation_key!r}] has {what}; it has {', '.join(sorted(there)[:_SHOWN]) or 'nothing'} (see control=)"
            raise ValueError(msg)
        for name in (split_key, total_key):
            if name is not None and name not in adata.obs:
                msg = f"obs has no column {name!r}; there are {', '.join(map(str, adata.obs.columns))}"
                raise KeyError(msg)
        manager = AnnDataManager(
            fields=[ExpressionField(REGISTRY_KEYS.X_KEY, layer), GeneField(gene_symbols, gene_ids)],
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
        """Treatments whose effect can be predicted; before training, those of the data."""
        return pd.Index(self._learned or self._treatments, name="perturbation")

    @property
    def _made(self) -> dict[str, Any]:
        return self.init_params_["non_kwargs"]

    @property
    def _arguments(self) -> dict[str, Any]:
        return self.registry_[_SETUP_ARGS_KEY]

    @property
    def _gene_state(self) -> dict[str, Any]:
        return self.registry_[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY]

    def _match(self) -> GeneMatch:
        return align(self.backbone.vocab, {**self._gene_state, GeneField.MATCHED: {}}, self._arguments["aliases"])

    def _expression(self, adata: AnnData) -> tuple[csr_matrix, np.ndarray | None]:
        """Log-normalised expression of cells in the order of the genes, and their counts where they are known."""
        names = resolve_gene_names(adata.var, self._arguments["gene_symbols"], self._arguments["gene_ids"]).symbols
        index = pd.Index(np.asarray(names).astype(str))
        wanted = self.genes.astype(str)
        same = np.array_equal(index, wanted)
        columns = index.get_indexer(wanted) if index.is_unique else np.full(len(wanted), -1)
        if not same and ((columns < 0).any() or len(index) != len(wanted)):
            missing = wanted[columns < 0]
            what = f"they lack {', '.join(missing[:_SHOWN])}" if len(missing) else "they have others, too"
            msg = f"the cells need the {len(wanted):,} genes of the model, but {what}; choose them with adata[:, model.genes]"
            raise ValueError(msg)
        rule = ExpressionRule(self._arguments["layer"] or "", self._arguments["total_key"] or "")
        values, totals = rule.read(adata)
        return values if same else values[:, columns].tocsr(), totals

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_iter: int = 500,
        *,
        codec_epochs: int | None = None,
        codec_batch_size: int = 32,
        codec_lr: float | None = None,
        codec_patience: int | None = 10,
        inner_iter: int = 10,
        batch_size: int = 256,
        lr: float = 1e-3,
        penalty: float = 1.0,
        check_every: int = 50,
        patience: int | None = None,
        standardize: bool = True,
        start: Literal["identity", "random"] = "identity",
        start_steps: int = 200,
        validation_size: float = 0.1,
        test_size: float = 0.0,
        accelerator: str = "auto",
        device: int | str = "auto",
        seed: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Train the codec, then a transport for each treatment; the same seed gives the same weights.

        The best epoch of the codec and the best step of each transport are those with the best score of the validation cells. Cells
        of ``"test"`` are never looked at (the authors of CellOT and CellFM choose the step by them).

        Parameters
        ----------
        max_iter
            Steps of each transport. CellOT and CellFM take 100,000 with ``lr=1e-4``, which takes hours on a processor; the default,
            with the options below, is for a minute.
        codec_epochs, codec_batch_size, codec_lr, codec_patience
            Training of the encoder and decoder, see :class:`scfm.tasks.panel_codec.CodecTraining`. By default up to 100 epochs, with
            a learning rate of 1e-3, or that of the authors if the model is trained along. Principal components need none.
        inner_iter, batch_size, lr, penalty, check_every, patience
            See :class:`scfm.tasks.transport.TransportTraining`.
        standardize
            Whether codes are centred and divided by one number for the transport, which leaves the best transport as it is, but
            makes short runs possible. The authors do not.
        start, start_steps
            ``"identity"``, see :func:`scfm.tasks.transport.start_from_identity`, and its number of steps, or ``"random"`` as
            published, which needs far more steps of the transport.
        validation_size, test_size
            Shares of the cells of each treatment, if no column says what they are for. With a column without validation cells, the
            share of its training cells.
        accelerator, device
            Where to compute.
        seed
            Seed of the division, the order, the draws and the dropout; by default ``scvi.settings.seed``.
        progress
            Whether to show progress bars; by default if ``scfm.settings.verbosity`` is at least 2.

        Raises
        ------
        ValueError
            If a number makes no sense, cells are missing, or a loss is no longer finite.
        """
        if self.adata is None:
            msg = "the model was loaded without data; load it with adata="
            raise ValueError(msg)
        if start not in ("identity", "random"):
            msg = f"start must be 'identity' or 'random'; got {start!r}"
            raise ValueError(msg)
        seed = seed_or_default(seed)
        transport = TransportTraining(
            max_iter, inner_iter, batch_size, lr, (0.5, 0.9), penalty, check_every, patience, seed
        )
        if codec_lr is None:
            recipe = None if self.backbone is None else self.backbone.fine_tuning("transport").optimization
            codec_lr = float(recipe.get("learning_rate", 1e-4)) if self._made["fine_tune"] else _FROZEN_RATE
        codec = CodecTraining(
            100 if codec_epochs is None else codec_epochs, codec_batch_size, codec_lr, codec_patience, seed
        )
        self.to_device(_device(accelerator, device))
        cells, expression, known = self._cells(self.adata)
        if not known.all():
            _logging.warning(f"{int((~known).sum()):,} cells have no embedding and are left alone")
        labels = label_column(self.adata, self._arguments["perturbation_key"]).fillna("").to_numpy(dtype=object)
        labels[~known] = ""
        parts = self._parts(labels, validation_size, test_size, seed)
        rows = {part: np.flatnonzero(parts == part) for part in PARTS}
        show = settings.verbosity >= 2 if progress is None else progress
        self._train_codec(cells, expression, rows, codec, show)
        self._train_transports(
            cells,
            labels,
            rows,
            transport,
            show,
            standardize=standardize,
            start_steps=start_steps if start == "identity" else 0,
        )
        self._measure_shifts(cells, expression, labels, rows["train"])
        self.train_indices_, self.validation_indices_, self.test_indices_ = rows.values()
        self.is_trained_ = True

    # -- what it gives -----------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if not self.is_trained_:
            msg = "the transport is not trained; call train() first"
            raise RuntimeError(msg)

    def _number(self, name: str) -> int:
        if name not in self._learned:
            msg = f"the model has not learned the treatment {name!r}; it knows {', '.join(self._learned)}"
            raise ValueError(msg)
        return self._learned.index(name)

    def _controls(self, control: AnnData | None) -> AnnData:
        if control is not None:
            return control
        if self.adata is None:
            msg = "the model was loaded without data; give control cells with control="
            raise ValueError(msg)
        labels = label_column(self.adata, self._arguments["perturbation_key"])
        return self.adata[(labels == self._arguments["control"]).to_numpy()]

    def get_latent_representation(
        self, adata: AnnData | None = None, perturbation: str | None = None, *, batch_size: int = BLOCK
    ) -> np.ndarray:
        """Codes of cells.

        Parameters
        ----------
        adata
            Cells with the genes of the model, in any order; by default those it was trained with.
        perturbation
            A treatment to move the cells by.
        batch_size
            Cells at a time.

        Returns
        -------
        Codes, float32, ``(cells, latent)``; NaN for cells without any gene that the model knows.
        """
        self._ready()
        number = None if perturbation is None else self._number(perturbation)
        adata = self._own(adata)
        cells, _, known = self._cells(adata)
        rows = np.flatnonzero(known)
        codes = self._codes(cells, rows, batch_size)
        if number is not None:
            codes = self._moved(number, codes, batch_size)
        out = np.full((adata.n_obs, codes.shape[1]), np.nan, dtype=np.float32)
        out[rows] = codes.cpu().numpy()
        return out

    def _own(self, adata: AnnData | None) -> AnnData:
        if adata is None and self.adata is None:
            msg = "the model was loaded without data; give adata="
            raise ValueError(msg)
        return self.adata if adata is None else adata

    def _moved(self, number: int, codes: Tensor, size: int = BLOCK) -> Tensor:
        transport, units = self.module["transports"][number], self.module["units"]
        parts = [units.back(transport(units(codes[i : i + size]))) for i in range(0, len(codes), size)]
        return torch.cat(parts) if parts else codes

    @torch.no_grad()
    def iter_predictions(
        self,
        perturbations: str | Sequence[str],
        control: AnnData | None = None,
        batch_size: int | None = None,
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Predicted expression after treatments, some cells at a time.

        Parameters
        ----------
        perturbations
            Treatments.
        control
            Cells to treat, with the genes of the model; by default the control cells of the data.
        batch_size
            Cells at a time.

        Yields
        ------
        Treatment, rows and predicted log-normalised expression (float32, ``(rows, genes)``, genes in the order of ``control``) of
        one block after the other. A row depends on its own cell alone; cells without any gene that the model knows have NaN.

        Raises
        ------
        ValueError
            If a treatment was not learned, or the cells have other genes.
        """
        self._ready()
        names = [perturbations] if isinstance(perturbations, str) else [str(name) for name in perturbations]
        numbers = [self._number(name) for name in names]
        adata = self._controls(control)
        size = batch_size or BLOCK
        cells, _, known = self._cells(adata)
        columns = self._columns_of(adata)
        rows = np.flatnonzero(known)
        codes = self._codes(cells, rows, size)
        place = np.cumsum(known) - 1
        for name, number in zip(names, numbers, strict=True):
            for start in range(0, adata.n_obs, size):
                block = slice(start, min(start + size, adata.n_obs))
                there = known[block]
                out = np.full((len(there), len(self.genes)), np.nan, dtype=np.float32)
                if there.any():
                    some = codes[torch.from_numpy(place[block][there]).to(codes.device)]
                    values = self.module["codec"].decode(self._moved(number, some, size))
                    out[np.ix_(there, columns)] = values.cpu().numpy()
                yield name, block, out

    def _columns_of(self, adata: AnnData) -> np.ndarray:
        """Where each gene of the model is in data."""
        names = resolve_gene_names(adata.var, self._arguments["gene_symbols"], self._arguments["gene_ids"]).symbols
        names, wanted = np.asarray(names).astype(str), self.genes.astype(str)
        return np.arange(len(wanted)) if np.array_equal(names, wanted) else pd.Index(names).get_indexer(wanted)

    def predict(
        self, perturbation: str, control: AnnData | None = None, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Predicted expression of cells after one treatment.

        Parameters
        ----------
        perturbation, control, batch_size
            As in :meth:`iter_predictions`.

        Returns
        -------
        Log-normalised expression, float32, ``(cells, genes)``, in the order of the cells and genes of ``control``.
        """
        blocks = [block for _, _, block in self.iter_predictions(perturbation, control, batch_size)]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.genes)), dtype=np.float32)

    def to_device(self, device: str | int) -> None:
        """Move the networks and the foundation model, in place."""
        self._place = resolve_device(str(device))
        if self.backbone is not None:
            self.backbone.to(str(self._place), "float32")
        self.module.to(self._place)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _saved_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._ready()
        state = {
            "treatments": self._treatments.astype(str),
            "learned": self._learned,
            "shifts": {name: list(values) for name, values in self._shifts.items()},
            "markers": self._marker_order,
        }
        return state, self.module.state_dict()

    def _restore(self, state: dict[str, Any], tensors: dict[str, Tensor], place: Path, device: str) -> None:
        self._treatments, self.backbone = state["treatments"].astype(object), None
        if self._made["checkpoint"] is not None:
            self.backbone = load(place / BACKBONE, device=device, precision="float32")
        if self._made["space"] == "pca":
            codec: nn.Module = LinearCodec(tensors["codec.mean"], tensors["codec.components"])
            width = len(tensors["codec.components"])
        else:
            codec = self._new_codec(tensors["codec.encoder.0.weight"].shape[1])
            width = self._made["latent"]
        self._start(codec)
        self.module["units"] = CodeScale(tensors["units.centre"], tensors["units.scale"])
        self._learned = list(state["learned"])
        for _ in self._learned:
            self.module["transports"].append(TransportMap(width, self._made["potential"]))
        self.module.load_state_dict(tensors)
        self.module.eval().requires_grad_(requires_grad=False)
        self._shifts = {name: tuple(np.float32(part) for part in parts) for name, parts in state["shifts"].items()}
        self._marker_order = dict(state["markers"])
        self.to_device(device)

    # -- looks -------------------------------------------------------------------------------------------------------

    @property
    def summary_string(self) -> str:
        """What the model is, in a few lines."""
        made = self._made
        origin = {"model": made["checkpoint"], "obsm": f"obsm[{made['use_rep']!r}]"}.get(made["space"], made["space"])
        return (
            f"{type(self).__name__} with the following parameters:\n"
            f"codes of {made['latent']} from {origin}, {len(self.genes):,} genes, {len(self.perturbable)} treatments, "
            f"potentials of {'-'.join(map(str, made['potential']))}\n"
            f"Training status: {'Trained' if self.is_trained_ else 'Not Trained'}"
        )
