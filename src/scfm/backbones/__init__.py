"""The foundation models, each behind the same contract."""

from __future__ import annotations

from ._base import Backbone, Checkpoint, Provenance, backbone_class, backbone_kinds
from ._load import load
from ._tokens import TokenBatch

__all__ = ["Backbone", "Checkpoint", "Provenance", "TokenBatch", "backbone_class", "backbone_kinds", "load"]
