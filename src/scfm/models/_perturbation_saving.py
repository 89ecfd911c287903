"""Saving and loading of models for perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..backbones import Backbone, load
from ..tasks.gears_network import GearsConfig, Graph, fresh_network
from ..tasks.perturbation_data import PerturbationSplit
from ..tasks.perturbation_learners import GearsLearner, GeneratorLearner
from ._backbone import own_copy
from ._perturbation_data import ExpressionRule
from ._perturbation_network import PerturbedGenes
from ._plain_saving import BACKBONE, open_model, save_model
from ._saving import _device, _place

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from anndata import AnnData
    from torch import Tensor

    from ..tasks.perturbation_learners import ResponseLearner

    File = str | os.PathLike[str]

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
        state: dict[str, Any] = {
            "split": vars(self.split),
            "perturbed": {
                "names": self._perturbed.names.astype(str),
                "usable": self._perturbed.usable,
                "extra": list(self._perturbed.extra),
            },
            "rule": vars(self._rule),
            "backbone": None if self.backbone is None else self.backbone.provenance.id,
            "backbone_sha256": [] if self.backbone is None else sorted(_digests(self.backbone)),
        }
        if isinstance(self.module, GearsLearner):
            state["network"] = vars(self.module.network.config)
            tensors: dict[str, Tensor] = self.module.network.state_dict()
        else:
            options = ("most_genes", "always_include_perturbed", "loss_options")
            state["network"] = {name: getattr(self.module, name) for name in options}
            tensors = {name: getattr(self.module, name) for name in ("ids", "places")}
            save_backbone = True
        save_model(
            self,
            dir_path,
            prefix,
            state=state,
            tensors=tensors,
            backbone=self.backbone if save_backbone else None,
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
            The foundation model, where it was not saved: the one that the network was trained on. With ``route="scgpt"`` it always was.

        Raises
        ------
        CheckpointError
            If a file is damaged or missing.
        ValueError
            If it is a model of another class, the data have other genes, or the foundation model is missing, another one, or
            given where it was trained and saved.
        """
        loaded, state, tensors = open_model(cls, dir_path, adata, prefix)
        where = _device(accelerator, device)
        backbone = None
        if model is not None and loaded.init_params_["non_kwargs"]["route"] != "gears":
            msg = "the foundation model was trained and saved with this model; leave model= out"
            raise ValueError(msg)
        if state["backbone"] is not None:
            backbone = _saved_backbone(_place(dir_path, prefix) / BACKBONE, model, state["backbone"], where)
            if model is not None:
                _check_same(backbone, state["backbone"], state.get("backbone_sha256", ()))
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


def _digests(backbone: Backbone) -> set[str]:
    """Hashes of the file that weights were read from, and of the one that it was made from."""
    made_from = backbone.provenance.extra.get("source", {})
    return {str(digest) for digest in (backbone.provenance.sha256, made_from.get("sha256")) if digest}


def _check_same(backbone: Backbone, name: str, digests: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a foundation model is the one that the network was trained on."""
    there, given = set(map(str, digests)), _digests(backbone)
    if there and given:
        same = bool(there & given)
    else:
        source = backbone.provenance.extra.get("source", {}).get("id")
        same = name in {backbone.provenance.id, source}
    if not same:
        shown = "another file of it" if backbone.provenance.id == name else backbone.provenance.id
        msg = f"the network was trained on the foundation model {name}, not on {shown}; give that one with model="
        raise ValueError(msg)
