"""What the numbers of a run depend on, so that a run is never continued with something else."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from .. import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..backbones import Backbone
    from ..data import CellSource
    from ..genes import GeneMatch


def fingerprint(
    backbone: Backbone, source: CellSource, match: GeneMatch, options: Mapping[str, Any], task: Mapping[str, Any]
) -> dict[str, Any]:
    """Model, weights, precision, options, cells, genes and package version as JSON values."""
    values = {
        **task,
        "model": backbone.provenance.id,
        "weights": backbone.provenance.sha256 or _hash_weights(backbone),
        "precision": str(backbone.dtype).removeprefix("torch."),
        "options": {name: _describe(value) for name, value in sorted(options.items())},
        "matrix": source.where,
        "cells": source.n_obs,
        "cell_names": _hash_names(source.obs_names),
        "genes": _hash_names(source.var_names),
        "gene_ids": _hash_array(np.asarray(match.ids)),
        "scfm_version": __version__,
    }
    return json.loads(json.dumps(values))


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, pd.Series)):
        return _hash_array(np.asarray(value))
    return repr(value)


def _hash_names(names: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()


def _hash_array(array: np.ndarray) -> str:
    if array.dtype.kind not in "biuf":
        return _hash_names(array.ravel())
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _hash_weights(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
