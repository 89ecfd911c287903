"""The one inference loop: read blocks, tokenise, make batches of like length, compute, write back in order."""

from __future__ import annotations

from ._attention_means import AttentionMeans, CellAttentionMeans
from ._expression import check_size, genes_to_predict, predict_at, predict_everywhere, predict_expressed
from ._gene_means import GeneMeans, by_column, genes_to_average
from ._options import accepted_options, check_options, is_per_cell
from ._plan import Limits, plan_batches
from ._run import Result, run, visit
from ._task import InputCheck, Task

__all__ = [
    "AttentionMeans",
    "CellAttentionMeans",
    "GeneMeans",
    "InputCheck",
    "Limits",
    "Result",
    "Task",
    "accepted_options",
    "by_column",
    "check_options",
    "check_size",
    "genes_to_average",
    "genes_to_predict",
    "is_per_cell",
    "plan_batches",
    "predict_at",
    "predict_everywhere",
    "predict_expressed",
    "run",
    "visit",
]
