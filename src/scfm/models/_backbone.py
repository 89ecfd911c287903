"""Where the backbone of a model class comes from: a checkpoint, a loaded model, or a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..backbones import Backbone, backbone_class, from_config, load
from ..backbones._build import filled
from ..checkpoints._registry import find
from ..checkpoints.convert import LoadReport
from ..genes import GeneVocab
from ..nn.low_rank import merged_state
from ._fields import GeneField

if TYPE_CHECKING:
    import os


def load_backbone(
    kind: str, checkpoint: str | os.PathLike[str] | Backbone | None, *, device: str, **options: Any
) -> Backbone:
    """Load a checkpoint for training, in float32; a model that is loaded already is copied.

    Raises
    ------
    ValueError
        If the checkpoint is of another kind, none is given where no mini model is bundled, or ``options`` are given for a model that is loaded already.
    """
    if isinstance(checkpoint, Backbone):
        if options:
            msg = f"{', '.join(options)} choose what is loaded, but the model given is loaded already"
            raise ValueError(msg)
        backbone = checkpoint
    else:
        if checkpoint is None and find(f"{kind}-mini") is None:
            msg = (
                f"no mini model of {kind} is bundled; give checkpoint= (a name of scfm.checkpoints.list() or a folder), or "
                "config= to start from fresh weights"
            )
            raise ValueError(msg)
        backbone = load(
            f"{kind}-mini" if checkpoint is None else checkpoint, device=device, precision="float32", **options
        )
    if backbone.kind != kind:
        msg = f"{backbone.name} is a {backbone.kind} model; its class is scfm.models.model_class({backbone.kind!r})"
        raise ValueError(msg)
    return own_copy(checkpoint, device=device) if isinstance(checkpoint, Backbone) else backbone


def new_backbone(kind: str, config: Any, genes: dict[str, Any], *, seed: int, device: str) -> Backbone:
    """Make a backbone with fresh weights whose vocabulary holds the genes of the data.

    Parameters
    ----------
    kind
        Name of the backbone class.
    config
        Hyper-parameters as a mapping, in which the number of genes may be missing, or a config of that class.
    genes
        State registry of the :class:`GeneField`.
    seed
        Seed of the weights.
    device
        Where it is to be.
    """
    cls = backbone_class(kind)
    vocab = vocabulary(genes, cls.specials)
    if isinstance(config, Mapping):
        config = cls.config_for(dict(config), vocab)
    return from_config(kind, config, vocab, seed=seed, name=kind, device=device, precision="float32")


def vocabulary(genes: dict[str, Any], specials: tuple[str, ...]) -> GeneVocab:
    """Special tokens, then each name of the data once."""
    table = pd.DataFrame({"name": genes[GeneField.NAMES], "id": genes[GeneField.ENSEMBL_IDS]})
    table = table[(table["name"] != "") & ~table["name"].isin(specials)].drop_duplicates("name")
    ids = None if genes[GeneField.ENSEMBL_IDS] is None else [*[""] * len(specials), *table["id"]]
    return GeneVocab([*specials, *table["name"]], specials=specials, ensembl_ids=ids)


def own_copy(backbone: Backbone, *, device: str = "auto") -> Backbone:
    """A float32 copy that can be trained while the original stays what it is; adapters are merged."""
    cls = type(backbone)
    state = {name: tensor.detach().clone() for name, tensor in merged_state(backbone.module).items()}
    copy = cls(
        filled(cls, backbone.config, backbone.vocab, state, LoadReport(), what=backbone.name),
        backbone.config,
        backbone.vocab,
        name=backbone.name,
        load_report=backbone.load_report,
        provenance=backbone.provenance,
    )
    return copy.to(str(backbone.device) if device == "auto" else device, "float32")
