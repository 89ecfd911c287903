"""The network of a run: before the first step, and as a checkpoint after the last one."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from ..backbones import backbone_class, from_config, load
from ..checkpoints import store
from ..genes import GeneVocab
from ._coexpression import coexpression_vectors
from ._state import read_tensors
from ._vocabulary import frequent_genes, variable_genes

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ._recipe import Recipe


def new_backbone(recipe: Recipe) -> Backbone:
    """Network with fresh weights and the genes of the data, or a checkpoint; on the CPU in float32, to be trained."""
    backbone = _continued(recipe) if recipe.checkpoint is not None else _fresh(recipe)
    backbone.module.requires_grad_(requires_grad=True)
    return backbone


def _fresh(recipe: Recipe) -> Backbone:
    cls = backbone_class(recipe.kind)
    if recipe.genes is not None:
        genes = Path(recipe.genes).read_text(encoding="utf-8").split()
    elif recipe.gene_choice == "variable":
        share = recipe.measured_share
        genes = variable_genes(recipe.sources, recipe.n_genes, layer=recipe.layer, measured_share=share)
    else:
        genes = frequent_genes(recipe.sources, recipe.n_genes, layer=recipe.layer)
    vocab = GeneVocab([*cls.specials, *genes], specials=cls.specials)
    config = cls.config_for(recipe.config, vocab)
    backbone = from_config(
        recipe.kind, config, vocab, name=recipe.name, seed=recipe.seed, device="cpu", precision="float32"
    )
    if recipe.annotations is not None:
        backbone.set_gene_annotations(recipe.annotations)
    if recipe.gene_vectors is not None:
        width = max((table.shape[1] for table in backbone.gene_tables), default=1)
        vectors = coexpression_vectors(recipe.sources, vocab.genes, width, layer=recipe.layer)
        backbone.set_gene_vectors(vectors, norm=recipe.gene_vector_norm)
    return backbone


def _continued(recipe: Recipe) -> Backbone:
    backbone = load(recipe.checkpoint, device="cpu", precision="float32")
    before = backbone.provenance
    extra = {"trained_from": {"id": before.id, "sha256": before.sha256, "weights": before.weights}}
    backbone.provenance = replace(before, id=recipe.name, path="", sha256="", weights="", extra=extra)
    backbone.name = recipe.name
    # weights of a checkpoint may be mapped from its file
    backbone.module.load_state_dict({key: t.clone() for key, t in backbone.module.state_dict().items()}, assign=True)
    return backbone


def finished(backbone: Backbone, state: Path | None) -> Backbone:
    """The trained network, ready for inference; put together from the saved state if its parameters are sharded."""
    if any(isinstance(p, DTensor) for p in backbone.module.parameters()):
        whole = from_config(
            backbone.kind, backbone.config, backbone.vocab, name=backbone.name, device="cpu", precision="float32"
        )
        whole.provenance, whole.load_report = backbone.provenance, backbone.load_report
        read_tensors(state, whole.module)
        backbone = whole
    backbone.module.eval().requires_grad_(requires_grad=False)
    return backbone


def export(backbone: Backbone, folder: Path) -> None:
    """Write a checkpoint into a folder that holds other files, too; it counts as one when all of it is there."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as staged:
        made = backbone.save(Path(staged) / "checkpoint")
        (folder / store.HEADER).unlink(missing_ok=True)
        for name in (store.VOCAB, store.TENSORS, store.HEADER):
            (made / name).replace(folder / name)
