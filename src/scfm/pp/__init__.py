"""Preparation of AnnData objects, in the style of ``scanpy.pp``."""

from __future__ import annotations

from ._check_counts import CountCheck, check_counts
from ._match_genes import match_genes
from ._perturbation_setup import perturbation_setup
from ._recipe_scgpt import recipe_scgpt
from ._recover_counts import recover_counts

__all__ = ["CountCheck", "check_counts", "match_genes", "perturbation_setup", "recipe_scgpt", "recover_counts"]
