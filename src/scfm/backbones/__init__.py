"""The foundation models, each behind the same contract."""

from __future__ import annotations

from ._base import Backbone, Checkpoint, GeneRows, Provenance, backbone_class, backbone_kinds
from ._build import from_config, random_copy
from ._load import load, load_vocab
from ._rebuild import rebuilt
from ._tokens import TokenBatch

__all__ = [
    "Backbone",
    "Checkpoint",
    "GeneRows",
    "Provenance",
    "TokenBatch",
    "backbone_class",
    "backbone_kinds",
    "from_config",
    "load",
    "load_vocab",
    "random_copy",
    "rebuilt",
]
