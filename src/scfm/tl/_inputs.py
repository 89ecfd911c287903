"""What every tool does before it computes: load the model, match the genes, check the options."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__, _logging, engine
from ..backbones import Backbone, load
from ..data import open_source
from ..engine import accepted_options, check_options
from ..genes import AliasTable, resolve_gene_names

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

    from ..genes import GeneMatch

    Model = str | os.PathLike[str] | Backbone
    Aliases = AliasTable | str | Path | pd.DataFrame | bool | None


def load_backbone(model: Model, *, device: str, precision: str, weights: str | None) -> Backbone:
    """Load a model by name or folder; a loaded one is moved only if a device or precision is named.

    Raises
    ------
    TypeError
        If ``model`` is neither of these.
    ValueError
        If ``weights`` is given for a model that is loaded already.
    """
    if isinstance(getattr(model, "backbone", None), Backbone):
        # a class of scfm.models around it
        model = model.backbone
    if not isinstance(model, Backbone | str | PathLike):
        msg = f"model= needs the name or folder of a model, or a loaded or trained one, not {type(model).__name__}"
        raise TypeError(msg)
    if not isinstance(model, Backbone):
        extra = {} if weights is None else {"weights": weights}
        return load(model, device=device, precision=precision, **extra)
    if weights is not None:
        msg = "weights= chooses what is loaded; the model given is loaded already (use scfm.load(..., weights=...))"
        raise ValueError(msg)
    if device != "auto" or precision != "auto":
        device = str(model.device) if device == "auto" else device
        precision = str(model.dtype).removeprefix("torch.") if precision == "auto" else precision
        model.to(device, precision)
    return model


@dataclass(frozen=True)
class Task(engine.Task):
    """A run of a tool: what the engine needs, and what is recorded about it."""

    params: dict[str, Any]
    start: datetime

    def record(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What was done, to be stored in ``uns``; see :func:`run_record`."""
        return run_record(self.backbone, self.source.where, self.match, {**self.params, **params})


@contextmanager
def prepared(
    adata: Any,
    backbone: Backbone,
    *,
    what: str,
    layer: str | None,
    use_raw: bool,
    gene_symbols: str | None,
    gene_ids: str | None,
    aliases: Aliases,
    duplicates: str | None,
    rng: int | np.random.Generator,
    draws: Any,
    tokenize_options: Mapping[str, Any],
) -> Iterator[Task]:
    """Open the cells and check that the model knows their genes and its tokenizer the options.

    Parameters
    ----------
    what
        What is going to be done, for the log.
    """
    seed = seed_of(rng)
    with open_source(adata, layer=layer, use_raw=use_raw) as source:
        start = _logging.info(f"{what} {source.n_obs:,} cells with {backbone!r}")
        match = match_genes(backbone, source.var, gene_symbols=gene_symbols, gene_ids=gene_ids, aliases=aliases)
        options = tokenizer_options(
            backbone, tokenize_options, n_obs=source.n_obs, seed=seed, duplicates=duplicates, draws=draws
        )
        params = {
            "layer": layer,
            "use_raw": use_raw,
            "duplicates": duplicates,
            "rng": seed,
            "draws": None if draws is None else "given",
            "tokenize_options": dict(tokenize_options) or None,
        }
        yield Task(backbone, source, match, options, params, start)


def result_name(backbone: Backbone) -> str:
    """Name of the model in AnnData keys; HDF5 allows no slash in them."""
    return re.sub(r"[^\w.-]+", "_", backbone.name).strip("_") or backbone.kind


def match_genes(
    backbone: Backbone, var: pd.DataFrame, *, gene_symbols: str | None, gene_ids: str | None, aliases: Aliases
) -> GeneMatch:
    """Match the genes of a data set to those of a model, and log the share that is known.

    Raises
    ------
    ValueError
        If no gene is known.
    """
    names = resolve_gene_names(var, gene_symbols, gene_ids)
    match = backbone.vocab.match(
        names.symbols, ensembl_ids=names.ensembl_ids, aliases=AliasTable.resolve(aliases) or None
    )
    match.require_any(backbone.name)
    _logging.info(f"    {match.summary()}")
    return match


def seed_of(rng: int | np.random.Generator) -> int:
    """A whole number from a seed or a generator."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**31))
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return int(rng)
    msg = f"rng must be a whole number or a numpy.random.Generator; got {type(rng).__name__}"
    raise TypeError(msg)


def tokenizer_options(
    backbone: Backbone, options: Mapping[str, Any], *, n_obs: int, seed: int, duplicates: str | None, draws: Any
) -> dict[str, Any]:
    """Options of the tokenizer, among them those that tools have as arguments of their own.

    Raises
    ------
    TypeError
        If the model's tokenizer has no such option.
    """
    accepted = accepted_options(backbone)
    out = dict(options)
    if "rng" in accepted:
        out["rng"] = seed
    if duplicates is not None:
        out["duplicates"] = duplicates
    if draws is not None:
        out["draws"] = draws
    check_options(backbone, out, n_obs)
    return out


def run_record(
    backbone: Backbone, where: str, match: GeneMatch, params: Mapping[str, Any]
) -> dict[str, dict[str, Any] | str]:
    """What was done, in values that HDF5 and zarr can hold.

    Parameters
    ----------
    where
        Name of the matrix that was read.
    params
        Arguments of the tool; those that are ``None`` are left out.
    """
    origin = backbone.provenance
    checkpoint = {
        "id": origin.id,
        "sha256": origin.sha256,
        "licence": origin.licence,
        "citation": origin.citation,
        "weights": origin.weights,
    }
    params = {
        **params,
        "input": where,
        "device": str(backbone.device),
        "precision": str(backbone.dtype).removeprefix("torch."),
    }
    return {
        "params": {name: storable(value) for name, value in params.items() if value is not None},
        "checkpoint": checkpoint,
        "genes": {
            "matched": match.n_matched,
            "missing": len(match) - match.n_matched,
            "renamed": len(match.renamed),
            "fraction": match.fraction,
        },
        "scfm_version": __version__,
    }


def storable(value: Any) -> Any:
    """A value that HDF5 and zarr can hold; objects become their text."""
    if isinstance(value, (bool, int, float, str, np.generic, np.ndarray)):
        return value
    if isinstance(value, dict):
        return {str(name): storable(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
        return np.asarray(value)
    return repr(value)


def check_can_hold_results(adata: AnnData) -> None:
    """Raise ``ValueError`` for a view of a backed object, to which nothing can be added."""
    if adata.isbacked and adata.is_view:
        msg = (
            "a view of a backed AnnData cannot hold results. Load it with adata.to_memory(), or embed the whole file by "
            "its path and take the rows you need"
        )
        raise ValueError(msg)
