"""Which weights of a checkpoint that holds several the authors take for a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _logging
from ..checkpoints._registry import find
from ._kinds import backbone_class, backbone_kinds

if TYPE_CHECKING:
    from ._base import Backbone


def weights_for(model: Any, task: str) -> str | None:
    """Weights to load for a task, if ``model`` is the name of a released checkpoint that has them.

    Parameters
    ----------
    model
        What is going to be loaded, or a model.
    task
        One of the keys of ``task_weights`` of the class, such as ``"annotation"``.
    """
    entry = find(model) if isinstance(model, str) else None
    if entry is None or entry.backbone not in backbone_kinds():
        return None
    wanted = backbone_class(entry.backbone).task_weights.get(task)
    return wanted if wanted in entry.weights else None


def tell_other_weights(backbone: Backbone, task: str, doing: str) -> None:
    """Warn if others than the authors' choice for a task were loaded; ``doing`` is what they do with theirs."""
    wanted, loaded = backbone.task_weights.get(task), backbone.provenance.weights
    if wanted and loaded and loaded != wanted:
        _logging.warning(
            f"{backbone.name} was loaded with weights={loaded!r}; its authors {doing} with weights={wanted!r}"
        )
