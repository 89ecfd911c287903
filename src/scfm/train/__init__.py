"""Training of backbones: pre-training with their papers' objectives, adapters, freezing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._adapters import add_lora, has_lora, load_adapters, merge_lora, save_adapters
    from ._coexpression import coexpression_vectors
    from ._freeze import freeze, set_training_mode
    from ._plan import MicroBatch, PretrainingPlan, TrainingPlan
    from ._presets import OPTIMIZATIONS, Optimization, build_optimizer, build_schedule
    from ._pretrain import TrainingResult, pretrain
    from ._recipe import Recipe
    from ._vocabulary import frequent_genes, variable_genes

# Lightning takes seconds to import, so that nothing is imported before it is used
_HOMES = {
    "_adapters": ("add_lora", "has_lora", "load_adapters", "merge_lora", "save_adapters"),
    "_coexpression": ("coexpression_vectors",),
    "_freeze": ("freeze", "set_training_mode"),
    "_plan": ("MicroBatch", "PretrainingPlan", "TrainingPlan"),
    "_presets": ("OPTIMIZATIONS", "Optimization", "build_optimizer", "build_schedule"),
    "_pretrain": ("TrainingResult", "pretrain"),
    "_recipe": ("Recipe",),
    "_vocabulary": ("frequent_genes", "variable_genes"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "OPTIMIZATIONS",
    "MicroBatch",
    "Optimization",
    "PretrainingPlan",
    "Recipe",
    "TrainingPlan",
    "TrainingResult",
    "add_lora",
    "build_optimizer",
    "build_schedule",
    "coexpression_vectors",
    "freeze",
    "frequent_genes",
    "has_lora",
    "load_adapters",
    "merge_lora",
    "pretrain",
    "save_adapters",
    "set_training_mode",
    "variable_genes",
]


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
