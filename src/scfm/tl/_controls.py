"""Embeddings that others are compared with: baselines, and models with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _keys, _logging
from .._counts import CountStats
from ..backbones import random_copy
from ..baselines import hvg_pca, scvi_latent
from ..data import open_source
from ._embed import embed
from ._inputs import load_backbone, result_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

    from ._inputs import Model

BASELINES = {"hvg_pca": ("HVG + PCA", "X_hvg_pca"), "scvi": ("scVI", "X_scvi")}


def add_baselines(
    adata: AnnData,
    baselines: Sequence[str] | None,
    *,
    layer: str | None,
    batch_key: str | None,
    taken: Iterable[str],
    random_state: int,
) -> dict[str, str]:
    """Compute baselines that are not in ``obsm`` yet.

    Parameters
    ----------
    baselines
        Names; ``None`` for HVG + PCA where the matrix holds counts.
    taken
        Slots that are compared anyway.

    Returns
    -------
    Slot of ``obsm`` by the name to show.
    """
    wanted = ("hvg_pca",) if baselines is None else tuple(baselines)
    if unknown := [name for name in wanted if name not in BASELINES]:
        msg = f"there is no baseline {', '.join(map(repr, unknown))}; choose among {', '.join(BASELINES)}"
        raise ValueError(msg)
    slots = {BASELINES[name][0]: BASELINES[name][1] for name in wanted if BASELINES[name][1] not in taken}
    missing = [name for name in wanted if BASELINES[name][1] in slots.values() and BASELINES[name][1] not in adata.obsm]
    if not missing:
        return slots
    if problem := _no_counts(adata, layer):
        if baselines is None:
            _logging.info(f"    without HVG + PCA beside them: {problem}")
            return {}
        msg = f"the baselines {', '.join(missing)} need counts, but {problem}"
        raise ValueError(msg)
    for name in missing:
        if name == "hvg_pca":
            embedding = hvg_pca(adata, layer=layer, random_state=random_state)
        else:
            _logging.info("    training scVI")
            embedding = scvi_latent(adata, layer=layer, batch_key=batch_key, random_state=random_state)
        adata.obsm[BASELINES[name][1]] = embedding
    return slots


def _no_counts(adata: AnnData, layer: str | None) -> str:
    """What is wrong with the matrix, or nothing."""
    try:
        with open_source(adata, layer=layer) as source:
            counts = source.read(0, 256)
            where = source.where
    except ValueError as error:
        return str(error)
    stats = CountStats().update(counts)
    wrong = stats.n_negative or stats.n_nan or stats.n_infinite or stats.n_noninteger
    return f"{where} {stats.problem()}; name the counts with layer=" if wrong else ""


def add_random_weights(
    adata: AnnData, models: bool | Sequence[Model], slots: Iterable[str], *, layer: str | None, random_state: int
) -> dict[str, str]:
    """Embed with random-weight copies of models that are given, or of those whose embeddings are in ``slots``.

    Returns
    -------
    Slot of ``obsm`` by the name to show.
    """
    if models is False:
        return {}
    if models is True:
        records = {slot: adata.uns.get(slot.removeprefix("X_"), {}) for slot in slots}
        ids = {slot: record["checkpoint"]["id"] for slot, record in records.items() if "checkpoint" in record}
        models = [name for name in ids.values() if not name.endswith("-random")]
        layers = {record["params"].get("layer") for record in records.values() if "checkpoint" in record}
        if layer is None and len(layers) == 1:
            layer = layers.pop()
        if not models:
            msg = "no record in uns says which models made these embeddings; give them as random_weights=[model, ...]"
            raise ValueError(msg)
    added = {}
    for model in models:
        backbone = random_copy(load_backbone(model, device="auto", precision="auto", weights=None), seed=random_state)
        embed(adata, backbone, layer=layer, rng=random_state)
        name = result_name(backbone)
        added[name] = _keys.embedding(name)
    return added
