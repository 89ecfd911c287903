"""Saving of model classes without a backbone's folder at their centre: JSON and safetensors, complete or not at all."""

from __future__ import annotations

import json
from abc import abstractmethod
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save_file
from scvi.data._constants import _FIELD_REGISTRIES_KEY, _SETUP_ARGS_KEY, _STATE_REGISTRY_KEY
from scvi.model.base import BaseModelClass

from ..checkpoints import store
from ..checkpoints._files import new_directory, sha256
from ._codec import decode, encode
from ._fields import GENES_KEY, GeneField
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
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from anndata import AnnData
    from torch import Tensor

    from ..backbones import Backbone

    Directory = str | os.PathLike[str]

BACKBONE = "backbone"
_ATTRIBUTES = ("is_trained_", "history_", "init_params_", "run_name_", "run_id_")
_INDICES = ("train_indices_", "validation_indices_", "test_indices_")


class PlainSaving:
    """``save`` and ``load`` of a model class that says what it consists of, and how it is made of it again."""

    @abstractmethod
    def _saved_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """JSON values, arrays and tables, and tensors."""

    @abstractmethod
    def _restore(self, state: dict[str, Any], tensors: dict[str, Tensor], place: Path, device: str) -> None:
        """Make the networks again; ``place`` is the directory of the model."""

    def save(
        self,
        dir_path: Directory,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a directory, as JSON and safetensors, a foundation model that belongs to it included.

        Parameters
        ----------
        dir_path, prefix, overwrite, save_anndata, anndata_write_kwargs
            As in :meth:`FoundationModel.save`.

        Raises
        ------
        FileExistsError
            If the directory exists and may not be replaced.
        ValueError
            If ``save_anndata`` is set for a model without data.
        """
        state, tensors = self._saved_state()
        save_model(
            self,
            dir_path,
            prefix,
            state=state,
            tensors=tensors,
            backbone=getattr(self, "backbone", None),
            overwrite=overwrite,
            save_anndata=save_anndata,
            **anndata_write_kwargs,
        )

    @classmethod
    def load(
        cls,
        dir_path: Directory,
        adata: AnnData | bool | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
    ) -> Self:
        """Load a saved model.

        Parameters
        ----------
        dir_path
            The directory.
        adata
            Data to go on with, which need the same genes in the same order; by default those saved with the model, if any;
            ``False`` for none.
        accelerator, device, prefix
            As in :meth:`FoundationModel.load`.

        Raises
        ------
        CheckpointError
            If a file is damaged or missing.
        ValueError
            If it is a model of another class, or the data have other genes.
        """
        model, state, tensors = open_model(cls, dir_path, adata, prefix)
        model._restore(state, tensors, _place(dir_path, prefix), _device(accelerator, device))
        return model


def save_model(
    model: BaseModelClass,
    dir_path: Directory,
    prefix: str | None,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    backbone: Backbone | None = None,
    overwrite: bool = False,
    save_anndata: bool = False,
    **anndata_write_kwargs: Any,
) -> None:
    """Save a model to a directory; see :meth:`FoundationModel.save`.

    Parameters
    ----------
    model
        The model.
    dir_path, prefix, overwrite, save_anndata, anndata_write_kwargs
        As there.
    state
        JSON values, arrays and tables from which the model is made again.
    tensors
        Its weights.
    backbone
        A foundation model that belongs to it.
    """
    path = _place(dir_path, prefix)
    if overwrite and path.exists() and not (path / HEADER).is_file() and any(path.iterdir()):
        msg = f"{path} holds something else than a saved model and is not replaced even with overwrite=True"
        raise FileExistsError(msg)
    if save_anndata and model.adata is None:
        msg = "save_anndata=True, but the model has no data"
        raise ValueError(msg)
    header = {
        "format": FORMAT,
        "scfm": version("scfm"),
        "class": type(model).__name__,
        "registry": encode(_without_tables(model.registry_)),
        "attributes": {name: encode(getattr(model, name, None)) for name in (*_ATTRIBUTES, *_INDICES)},
        "task": encode(state),
    }
    with new_directory(path.resolve(), overwrite=overwrite) as directory:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / HEAD)
        header["head_sha256"] = sha256(directory / HEAD)
        if backbone is not None:
            store.save_backbone(backbone, directory / BACKBONE)
        if save_anndata:
            _write(model.adata, directory, **anndata_write_kwargs)
        (directory / HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")


def open_model(
    cls: type[BaseModelClass], dir_path: Directory, adata: AnnData | bool | None, prefix: str | None
) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A saved model without its networks, and the state and tensors to make them from.

    Parameters
    ----------
    cls
        Class of the model.
    dir_path, prefix
        Where it lies.
    adata
        Data with the same genes in the same order; by default those saved with it, ``False`` for none.

    Raises
    ------
    CheckpointError
        If a file is damaged or missing.
    ValueError
        If it is a model of another class, or the data have other genes.
    """
    header, registry = _read_header(cls, dir_path, prefix)
    if adata is None:
        adata = _saved_data(_place(dir_path, prefix))
    adata = None if adata is False else adata
    if adata is not None:
        cls.setup_anndata(adata, **registry[_SETUP_ARGS_KEY])
    model = cls.__new__(cls)
    BaseModelClass.__init__(model, adata, None if adata is not None else registry)
    saved = registry[_FIELD_REGISTRIES_KEY][GENES_KEY][_STATE_REGISTRY_KEY][GeneField.NAMES]
    if not np.array_equal(model.genes.astype(str), np.asarray(saved, dtype=str)):
        msg = "the data have other genes, or another order of them, than the model; choose them with adata[:, model.genes]"
        raise ValueError(msg)
    for name, value in decode(header["attributes"]).items():
        setattr(model, name, value)
    return model, *_read_task(header, dir_path, prefix)
