"""Saving and loading of models for perturbations."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save_file
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass

from ..backbones import Backbone, load
from ..checkpoints import store
from ..checkpoints._files import new_directory, sha256
from ..tasks.gears_network import GearsConfig, Graph, fresh_network
from ..tasks.perturbation_data import PerturbationSplit
from ..tasks.perturbation_learners import GearsLearner, GeneratorLearner
from ._backbone import own_copy
from ._codec import decode, encode
from ._fields import GENES_KEY, GeneField
from ._perturbation_data import ExpressionRule
from ._perturbation_network import PerturbedGenes
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

if TYPE_CHECKING:
    import os
    from pathlib import Path
    from typing import Self

    from anndata import AnnData
    from torch import Tensor

    from ..tasks.perturbation_learners import ResponseLearner

    File = str | os.PathLike[str]

_ATTRIBUTES = ("is_trained_", "history_", "init_params_", "run_name_", "run_id_")
_BACKBONE = "backbone"
# where and how states of control cells are kept, unless a model is told otherwise
CACHE = {"folder": None, "dtype": "float16", "max_gib": 32.0}


class PerturbationSaving:
    """``save`` and ``load`` of a model for perturbations."""

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
            "split": vars(self.split),
            "perturbed": {
                "names": self._perturbed.names.astype(str),
                "usable": self._perturbed.usable,
                "extra": list(self._perturbed.extra),
            },
            "rule": vars(self._rule),
            "backbone": None if self.backbone is None else self.backbone.provenance.id,
        }
        if isinstance(self.module, GearsLearner):
            state["network"] = vars(self.module.network.config)
            tensors: dict[str, Tensor] = self.module.network.state_dict()
        else:
            options = ("most_genes", "always_include_perturbed", "loss_options")
            state["network"] = {name: getattr(self.module, name) for name in options}
            tensors = {name: getattr(self.module, name) for name in ("ids", "places")}
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
        loaded.split, loaded._rule = PerturbationSplit(**state["split"]), ExpressionRule(**state["rule"])
        loaded._cache = dict(CACHE)
        perturbed = state["perturbed"]
        loaded._perturbed = PerturbedGenes(
            perturbed["names"].astype(object), perturbed["usable"].astype(bool), tuple(perturbed["extra"])
        )
        learner = _saved_learner(loaded.init_params_["non_kwargs"], state["network"], tensors, backbone)
        loaded._use(backbone, learner.to(where))
        return loaded


def _saved_learner(
    made: dict[str, Any], network: dict[str, Any], tensors: dict[str, Tensor], backbone: Backbone | None
) -> ResponseLearner:
    if made["route"] != "gears":
        ids, places = tensors["ids"].numpy(), tensors["places"].numpy()
        loss = network.pop("loss_options")
        return GeneratorLearner(backbone, ids, places, loss=loss, **network)
    graphs = [
        Graph(tensors[f"{name}.edges"], tensors[f"{name}.edge_weight"]) if f"{name}.edges" in tensors else None
        for name in ("go", "coexpression")
    ]
    built = fresh_network(GearsConfig(**network), 0, *graphs, tensors.get("places"))
    built.load_state_dict(tensors)
    return GearsLearner(built, first_cell_only=made["first_cell_only"])


def _saved_backbone(folder: Path, model: File | Backbone | None, name: str, device: str) -> Backbone:
    if isinstance(model, Backbone):
        return own_copy(model, device=device)
    if model is None and not folder.is_dir():
        msg = f"the foundation model {name} was not saved with this model; give it with model="
        raise ValueError(msg)
    return load(folder if model is None else model, device=device, precision="float32")
