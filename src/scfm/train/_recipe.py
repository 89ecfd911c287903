"""What a pre-training run is made of, as a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from ..data import open_source

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK = 2048


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of :func:`scfm.train.pretrain`.

    Parameters
    ----------
    name
        Name of the new checkpoint.
    kind
        Backbone class.
    sources
        Files with raw counts (``.h5ad`` or ``.zarr``).
    config
        Hyper-parameters of the network.
    n_genes
        Size of the vocabulary: the genes detected in the largest share of cells.
    max_steps, batch_size
        Optimiser steps, and cells in each.
    learning_rate, warmup_steps, clip_norm
        Adam with linear warm-up, cosine decay to zero and gradient clipping.
    validation_share
        Share of cells that are never trained on.
    objective
        Options of the backbone's objective.
    seed
        Seed of weights, order of cells and masks.
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    n_genes: int = 8000
    max_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    clip_norm: float = 1.0
    validation_share: float = 0.05
    objective: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file; relative sources are taken from the folder of the file."""
        path = Path(path)
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            msg = f"{path} holds no mapping of recipe fields"
            raise ValueError(msg)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            msg = f"{path}: unknown fields {', '.join(unknown)}; a recipe has {', '.join(sorted(known))}"
            raise ValueError(msg)
        sources = values.pop("sources", ())
        sources = [sources] if isinstance(sources, str) else sources
        return cls(sources=tuple(str(path.parent / source) for source in sources), **values)


def frequent_genes(sources: Sequence[str | Path], n_genes: int) -> list[str]:
    """Names of the genes that are detected in the largest share of the cells that measure them, sorted by name."""
    detected, measured = pd.Series(dtype=float), pd.Series(dtype=float)
    for path in sources:
        with open_source(path) as source:
            counts = np.zeros(source.n_vars)
            for block in source.blocks(_BLOCK):
                counts += np.bincount(block.counts.indices, minlength=source.n_vars)
            names = pd.Index(source.var_names)
            detected = detected.add(pd.Series(counts, index=names).groupby(level=0).sum(), fill_value=0)
            cells = pd.Series(float(source.n_obs), index=names.unique())
            measured = measured.add(cells, fill_value=0)
    # a gene measured in few cells only is not frequent, however often it is seen there
    share = detected / np.maximum(measured, measured.max() / 4)
    return sorted(share.sort_values(ascending=False, kind="stable").index[:n_genes])
