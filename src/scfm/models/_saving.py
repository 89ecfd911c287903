"""Saving and loading of model classes: safetensors and JSON, complete or not at all."""

from __future__ import annotations

import json
import warnings
from contextlib import closing
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import anndata
import mudata
import rich.pretty  # noqa: F401  (scvi-tools prints with it, but does not import it)
import scvi
from safetensors.torch import load_file, save_file
from scvi.data import AnnDataManager
from scvi.data._constants import _MODEL_NAME_KEY, _SETUP_ARGS_KEY
from scvi.model._utils import parse_device_args

from .._errors import CheckpointError
from ..backbones import load as load_any
from ..checkpoints import store
from ..checkpoints._files import new_directory, read_json, recover, sha256
from ._backbone import load_backbone, own_copy
from ._codec import decode, encode

if TYPE_CHECKING:
    import os
    from typing import Self

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

    from ..backbones import Backbone

    Directory = str | os.PathLike[str]

HEADER = "model.json"
DATA, MUDATA = "adata.h5ad", "mdata.h5mu"
HEAD = "head.safetensors"
FORMAT = 1

# what a model remembers besides its weights and its registry
_ATTRIBUTES = (
    *("is_trained_", "train_indices_", "validation_indices_", "test_indices_", "history_"),
    *("init_params_", "run_name_", "run_id_", "from_scratch_"),
)


class SavingMixin:
    """``save``, ``load`` and ``load_query_data`` of a model class."""

    kind: ClassVar[str]
    backbone: Backbone

    def save(
        self,
        dir_path: Directory,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a directory, which appears complete or not at all.

        The directory holds ``model.json`` and the files of :meth:`scfm.Backbone.save`, so that :func:`scfm.load` and
        :func:`scfm.tl.embed` take it, too. Adapters are merged in the file.

        Parameters
        ----------
        dir_path
            The directory.
        prefix
            Start of the name of a folder in ``dir_path`` that then holds the model.
        overwrite
            Replace a model that lies there. Anything else is never replaced.
        save_anndata
            Save the data, too.
        anndata_write_kwargs
            Options of :meth:`anndata.AnnData.write_h5ad`, or of ``write_h5mu`` for MuData.

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
        header = {
            "format": FORMAT,
            "scfm": version("scfm"),
            "class": type(self).__name__,
            "registry": encode(_without_tables(self.registry_)),
            "attributes": {name: encode(getattr(self, name)) for name in _ATTRIBUTES},
            "task": encode(self._task_state()),
        }
        with new_directory(path.resolve(), overwrite=overwrite) as directory:
            store.save_backbone(self.backbone, directory / "backbone")
            for file in (directory / "backbone").iterdir():
                file.rename(directory / file.name)
            (directory / "backbone").rmdir()
            if tensors := self._task_tensors():
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, directory / HEAD)
                header["head_sha256"] = sha256(directory / HEAD)
            if save_anndata:
                _write(self.adata, directory, **anndata_write_kwargs)
            (directory / HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")

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
            Data to set up as those of the saved model were; its genes may differ and stand in any order. By default the
            data saved with the model, if any; ``False`` for none.
        accelerator, device
            Where to compute.
        prefix
            As in :meth:`save`.

        Raises
        ------
        CheckpointError
            If a file is damaged or missing.
        ValueError
            If the model is of another class, or the data do not suit it.
        """
        header, registry = _read_header(cls, dir_path, prefix)
        backbone = load_any(_place(dir_path, prefix), device=_device(accelerator, device), precision="float32")
        if adata is None:
            adata = _saved_data(_place(dir_path, prefix))
        adata = None if adata is False else adata
        if adata is not None:
            cls.setup_anndata(adata, source_registry=registry, **registry[_SETUP_ARGS_KEY])
        return cls._restored(
            adata, registry, backbone, decode(header["attributes"]), _read_task(header, dir_path, prefix)
        )

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: Directory | Self,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
    ) -> Self:
        """Make a model for new data that starts from the weights of another one.

        Genes are matched by name as they were in the reference; new categories of batches and labels are added.

        Parameters
        ----------
        adata
            The new data, which need not be set up.
        reference_model
            A model, which is not changed, or the directory of a saved one.
        accelerator, device
            Where to compute; by default where the reference model is.
        prefix
            As in :meth:`save`.

        Returns
        -------
        An untrained model of the same class.

        Raises
        ------
        ValueError
            If the reference is of another class, or knows none of the genes.
        """
        where = _device(accelerator, device)
        if isinstance(reference_model, SavingMixin):
            if type(reference_model) is not cls:
                msg = f"the reference is a {type(reference_model).__name__}, not a {cls.__name__}"
                raise ValueError(msg)
            registry = deepcopy(reference_model.registry_)
            attributes = {name: deepcopy(getattr(reference_model, name)) for name in _ATTRIBUTES}
            tensors = {name: tensor.detach().clone() for name, tensor in reference_model._task_tensors().items()}
            task = deepcopy(reference_model._task_state()), tensors
            backbone = own_copy(reference_model.backbone, device="auto" if accelerator == device == "auto" else where)
        else:
            header, registry = _read_header(cls, reference_model, prefix)
            attributes = decode(header["attributes"])
            task = _read_task(header, reference_model, prefix)
            backbone = cls._read_backbone(_place(reference_model, prefix), device=where)
        cls.setup_anndata(adata, source_registry=registry, extend_categories=True, **registry[_SETUP_ARGS_KEY])
        untrained = attributes["from_scratch_"] and not attributes["is_trained_"]
        started = {"init_params_": attributes["init_params_"], "from_scratch_": untrained}
        return cls._restored(adata, registry, backbone, started, task)

    @classmethod
    def _restored(
        cls,
        adata: AnnData | None,
        registry: dict[str, Any],
        backbone: Backbone,
        attributes: dict[str, Any],
        task: tuple[dict[str, Any], dict[str, Tensor]],
    ) -> Self:
        model = cls.__new__(cls)
        model._start(adata, registry, lambda _: backbone)
        model._set_task(*task)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    @classmethod
    def _read_backbone(cls, place: Path, *, device: str) -> Backbone:
        return load_backbone(cls.kind, place, device=device)

    # -- what a model for a task keeps besides ---------------------------------------------------------------------------

    def _task_state(self) -> dict[str, Any]:
        """JSON values from which :meth:`_set_task` restores what the task needs."""
        return {}

    def _task_tensors(self) -> dict[str, Tensor]:
        """Weights that lie outside of the backbone."""
        return {}

    def _set_task(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore a model for a task around its backbone."""

    @staticmethod
    def load_registry(dir_path: Directory, prefix: str | None = None) -> dict[str, Any]:
        """Registry saved with a model."""
        return _read_header(None, dir_path, prefix)[1]

    @staticmethod
    def view_setup_args(dir_path: Directory, prefix: str | None = None) -> None:
        """Print the arguments with which the data of a saved model were set up."""
        AnnDataManager.view_setup_method_args(_read_header(None, dir_path, prefix)[1])


def _place(dir_path: Directory, prefix: str | None) -> Path:
    path = Path(dir_path).expanduser()
    return path / f"{prefix}model" if prefix else path


def _device(accelerator: str, device: int | str) -> str:
    parsed = parse_device_args(accelerator, device, return_device="torch", validate_single_device=True)
    return str(parsed[2])


def _read_header(cls: type | None, dir_path: Directory, prefix: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    path = _place(dir_path, prefix)
    recover(path)
    if not (path / HEADER).is_file():
        msg = f"{path} holds no model that scfm saved ({HEADER} is missing)"
        raise ValueError(msg)
    header = read_json(path / HEADER)
    if header.get("format", FORMAT + 1) > FORMAT:
        msg = f"{path} was saved by a newer scfm ({header.get('scfm')}); upgrade with: pip install -U scfm"
        raise CheckpointError(msg)
    registry = decode(header["registry"])
    if cls is not None and registry[_MODEL_NAME_KEY] != cls.__name__:
        msg = f"{path} holds a {registry[_MODEL_NAME_KEY]}; it appears you are loading a model from a different class"
        raise ValueError(msg)
    return header, registry


def _read_task(
    header: dict[str, Any], dir_path: Directory, prefix: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values and weights that belong to the task of a saved model."""
    file, expected = _place(dir_path, prefix) / HEAD, header.get("head_sha256")
    if expected is None:
        return decode(header.get("task", {})), {}
    if not file.is_file() or sha256(file) != expected:
        msg = f"{file} is missing or damaged; copy the directory of the model again"
        raise CheckpointError(msg)
    return decode(header["task"]), load_file(file)


def _without_tables(registry: dict[str, Any]) -> dict[str, Any]:
    """Registry without a table of gene names that was given as an object: what it led to is in the registry anyway."""
    arguments = dict(registry[_SETUP_ARGS_KEY])
    if not isinstance(arguments["aliases"], (str, Path, bool)):
        arguments["aliases"] = None
    return {**registry, _SETUP_ARGS_KEY: arguments}


def _saved_data(path: Path) -> AnnData | MuData | None:
    if (path / DATA).is_file():
        return anndata.read_h5ad(path / DATA)
    if (path / MUDATA).is_file():
        return mudata.read_h5mu(path / MUDATA)
    msg = "no data were saved with the model and none were given; it is loaded without"
    warnings.warn(msg, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)
    return None


def _write(data: AnnData | MuData, directory: Path, **options: Any) -> None:
    if isinstance(data, mudata.MuData):
        data.write_h5mu(directory / MUDATA, **options)
        return
    if data.isbacked:
        # writing a backed object would make it refer to the new file
        with closing(data.copy(directory / DATA).file):
            return
    data.write_h5ad(directory / DATA, **options)
