"""Saving and loading of transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..backbones import load
from ..tasks.panel_codec import LinearCodec
from ..tasks.transport import CodeScale, TransportMap
from ._plain_saving import BACKBONE, open_model, save_model
from ._saving import _device, _place

if TYPE_CHECKING:
    import os
    from typing import Self

    from anndata import AnnData
    from torch import nn

    File = str | os.PathLike[str]


class TransportSaving:
    """``save`` and ``load`` of a transport."""

    def save(
        self,
        dir_path: File,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a directory, as JSON and safetensors, the foundation model included.

        Parameters
        ----------
        dir_path, prefix, overwrite, save_anndata, anndata_write_kwargs
            As in :meth:`FoundationModel.save`.

        Raises
        ------
        FileExistsError
            If the directory exists and may not be replaced.
        RuntimeError
            If the model is not trained.
        ValueError
            If ``save_anndata`` is set for a model without data.
        """
        self._ready()
        state = {
            "treatments": self._treatments.astype(str),
            "learned": self._learned,
            "shifts": {name: list(values) for name, values in self._shifts.items()},
            "markers": self._marker_order,
        }
        save_model(
            self,
            dir_path,
            prefix,
            state=state,
            tensors=self.module.state_dict(),
            backbone=self.backbone,
            overwrite=overwrite,
            save_anndata=save_anndata,
            **anndata_write_kwargs,
        )

    @classmethod
    def load(
        cls,
        dir_path: File,
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
        where = _device(accelerator, device)
        model._treatments = state["treatments"].astype(object)
        model.backbone = None
        if model._made["checkpoint"] is not None:
            model.backbone = load(_place(dir_path, prefix) / BACKBONE, device=where, precision="float32")
        if model._made["space"] == "pca":
            codec: nn.Module = LinearCodec(tensors["codec.mean"], tensors["codec.components"])
            width = len(tensors["codec.components"])
        else:
            codec = model._new_codec(tensors["codec.encoder.0.weight"].shape[1])
            width = model._made["latent"]
        model._start(codec)
        model.module["units"] = CodeScale(tensors["units.centre"], tensors["units.scale"])
        model._learned = list(state["learned"])
        for _ in model._learned:
            model.module["transports"].append(TransportMap(width, model._made["potential"]))
        model.module.load_state_dict(tensors)
        model.module.eval().requires_grad_(requires_grad=False)
        model._shifts = {name: tuple(np.float32(part) for part in parts) for name, parts in state["shifts"].items()}
        model._marker_order = dict(state["markers"])
        model.to_device(where)
        return model
