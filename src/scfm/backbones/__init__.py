"""The foundation models, each behind the same contract."""

from __future__ import annotations

from ._base import Backbone, Checkpoint, GeneRows, Provenance
from ._build import from_config, random_copy
from ._fine_tuning import FineTuning, ZeroShot
from ._kinds import backbone_class, backbone_kinds
from ._load import load, load_vocab
from ._rebuild import rebuilt
from ._tokens import TokenBatch

__all__ = [
    "Backbone",
    "Checkpoint",
    "FineTuning",
    "GeneRows",
    "Provenance",
    "TokenBatch",
    "ZeroShot",
    "backbone_class",
    "backbone_kinds",
    "from_config",
    "load",
    "load_vocab",
    "random_copy",
    "rebuilt",
]
