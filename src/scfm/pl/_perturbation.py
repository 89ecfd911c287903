"""Predicted responses of the genes that change most, beside the measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from .. import _keys
from ..tasks.perturbation_data import canonical_of, genes_of
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_MARKERS = "osD^vPX"
_MEASURED = "0.25"
_GENE_WIDTH = 0.42


def perturbation(
    adata: AnnData,
    perturbation: str,
    *,
    keys: str | Sequence[str] | Mapping[str, str] = _keys.PERTURB,
    n_genes: int = 20,
    genes: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the change of the genes that change most: measured, predicted, and what baselines say.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.pp.perturbation_setup` and :func:`scfm.tl.perturb`; control cells cut out of such data
        keep what the setup found.
    perturbation
        Which perturbation, in any usual spelling.
    keys
        Slots of ``uns`` with results of :func:`scfm.tl.perturb`, one or several (a model and baselines, see
        :func:`scfm.benchmark.perturbation_baseline`), or a mapping from names for the legend to slots.
    n_genes
        How many genes: those with the largest scores in the setup; where the perturbation was not measured, those with the
        largest predicted changes.
    genes
        Which genes instead.
    ax
        Axes to draw on.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown. Grey bars are measured changes of the mean, with the standard deviation over the
    perturbed cells where the setup has it; markers are predictions, with the standard deviation over control cells.

    Raises
    ------
    KeyError
        If there is no such result, perturbation or gene.
    """
    if n_genes < 1:
        msg = f"n_genes must be at least 1; got {n_genes!r}"
        raise ValueError(msg)
    slots = (
        {key: key for key in ([keys] if isinstance(keys, str) else keys)} if not hasattr(keys, "items") else dict(keys)
    )
    name = canonical_of(perturbation, _known_genes(adata, slots.values()))
    results = {label: _result(adata, key, name) for label, key in slots.items()}
    names = next(iter(results.values()))[0]
    measured, spread, ranked = _measured(adata, name)
    if genes is not None:
        chosen = [str(gene) for gene in genes]
    elif ranked:
        chosen = [gene for gene in ranked if gene in names][:n_genes]
    else:
        change = next(iter(results.values()))[1]
        chosen = [names[place] for place in np.argsort(-np.abs(change), kind="stable")[:n_genes]]
    if unknown := [gene for gene in chosen if gene not in names]:
        msg = f"the result has no gene {', '.join(unknown[:10])}"
        raise KeyError(msg)

    if ax is None:
        _, ax = plt.subplots(figsize=(1.6 + _GENE_WIDTH * max(len(chosen), 8), 3.6), layout="constrained")
    places = np.arange(len(chosen))
    if measured:
        heights = np.array([measured.get(gene, np.nan) for gene in chosen])
        bars = np.array([spread.get(gene, np.nan) for gene in chosen])
        error = None if np.isnan(bars).all() else np.nan_to_num(bars)
        ax.bar(
            places, heights, width=0.86, color="0.87", edgecolor="0.6", linewidth=0.6, yerr=error,
            error_kw={"ecolor": "0.6", "elinewidth": 0.8}, label="measured", zorder=1,
        )  # fmt: skip
    shifts = np.linspace(-0.24, 0.24, len(results)) if len(results) > 1 else [0.0]
    for number, ((label, (there, change, over_cells)), shift) in enumerate(zip(results.items(), shifts, strict=True)):
        at = [there.index(gene) for gene in chosen]
        ax.errorbar(
            places + shift, change[at], yerr=over_cells[at], fmt=_MARKERS[number % len(_MARKERS)], markersize=4.5,
            elinewidth=0.8, color=f"C{number}", label=label, zorder=3,
        )  # fmt: skip
    ax.axhline(0, color=_MEASURED, linewidth=0.8, zorder=2)
    ax.set_xticks(places, chosen, rotation=90)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.7, len(chosen) - 0.3)
    ax.set(ylabel="change of log expression", title=name)
    ax.grid(visible=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finish(ax.figure, ax, show=show, save=save)


def _known_genes(adata: AnnData, slots: Iterable[str]) -> set[str]:
    """Genes that were perturbed in the data or in predictions."""
    measured = adata.uns.get(_keys.PERTURBATION, {}).get("names", ())
    predicted = [name for slot in slots for name in adata.uns.get(slot, {}).get("perturbations", ())]
    return {gene for name in [*measured, *predicted] for gene in genes_of(str(name))}


def _result(adata: AnnData, key: str, name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Genes, mean change and its spread over cells."""
    if key not in adata.uns or "mean_change" not in adata.uns[key]:
        msg = f"uns has no predictions {key!r}; run scfm.tl.perturb first"
        raise KeyError(msg)
    result = adata.uns[key]
    there = [str(other) for other in result["perturbations"]]
    if name not in there:
        msg = f"uns[{key!r}] has no perturbation {name!r}; there are {', '.join(there[:10])}"
        raise KeyError(msg)
    row = there.index(name)
    genes = [str(gene) for gene in result["genes"]]
    return genes, np.asarray(result["mean_change"])[row], np.asarray(result["std_cells"])[row]


def _measured(adata: AnnData, name: str) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Measured change and spread of genes, and those that change most; empty where nothing was measured."""
    record = adata.uns.get(_keys.PERTURBATION, {})
    names = [str(other) for other in record.get("names", ())]
    if name not in names or str(record["control"]) not in names:
        return {}, {}, []
    means = np.asarray(record["means"], dtype=float)
    change = means[names.index(name)] - means[names.index(str(record["control"]))]
    table = record["de_genes"]
    table = table[table["perturbation"].astype(str) == name].sort_values("rank")
    genes = table["gene"].astype(str).tolist()
    return (
        dict(zip(map(str, record["genes"]), change, strict=True)),
        dict(zip(genes, table["std"].astype(float), strict=True)),
        genes,
    )
