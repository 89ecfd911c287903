"""Gene sets that are over-represented in gene programs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from .. import _keys
from ._figure import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW, _COLUMN, _LETTER = 0.26, 0.5, 0.072
_LONGEST = 60
_LEAST_P = 1e-300
# words that keep their capitals in names that have nothing but capitals
_ACRONYMS = frozenset(
    ("ATP", "BCR", "DNA", "GPCR", "HIV", "HLA", "IFN", "IL", "II", "III", "IV", "JAK", "MAPK", "MHC", "MTOR", "MYC")
    + ("NK", "PD", "RNA", "STAT", "TCR", "TGF", "TNF", "TP53", "UPR", "UV")
)


def enrichment(
    adata: AnnData,
    programs: Sequence[str] | None = None,
    *,
    key: str | None = None,
    n_programs: int = 8,
    n_terms: int = 3,
    significant: bool = True,
    cmap: str = "viridis_r",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the gene sets that are enriched in gene programs: colour is the corrected P, size the number of shared genes.

    Parameters
    ----------
    adata
        Annotated data after :func:`scfm.tl.enrichment`.
    programs
        Names of programs to draw; by default those with the smallest P.
    key
        Slot of ``uns`` with the enrichment.
    n_programs
        How many programs to draw by default.
    n_terms
        Gene sets of each program to draw.
    significant
        Whether to leave out results that are not significant.
    cmap
        Colour map.
    ax
        Axes to draw on.
    show, save
        Show the figure, or the file to save it to.

    Returns
    -------
    The axes, unless the figure is shown.

    Raises
    ------
    KeyError
        If there is no enrichment, or no result for a program.
    ValueError
        If nothing is significant.
    """
    key = key or _keys.ENRICHMENT
    if key not in adata.uns or "table" not in adata.uns[key]:
        msg = f"uns has no enrichment {key!r}; run scfm.tl.enrichment first"
        raise KeyError(msg)
    table, params = adata.uns[key]["table"], adata.uns[key]["params"]
    found = table[table["significant"].astype(bool)] if significant else table
    if not len(found):
        msg = f"no gene set is significant among {len(table):,} results; significant=False draws the best of them"
        raise ValueError(msg)
    best = found.groupby("program", sort=False, observed=True)["p_adjusted"].min()
    if programs is None:
        programs = list(best.sort_values(kind="stable").index[:n_programs])
    programs = [str(name) for name in programs]
    if missing := [name for name in programs if name not in best.index]:
        msg = f"there is no {'significant ' if significant else ''}result for the program {', '.join(missing)}"
        raise KeyError(msg)
    terms: dict[str, None] = {}
    for name in programs:
        terms |= dict.fromkeys(found.loc[found["program"] == name, "term"][:n_terms])
    shown = found[found["program"].isin(programs) & found["term"].isin(terms)]
    short = [_short(term) for term in terms]
    labels = [text if short.count(text) == 1 else _readable(term) for text, term in zip(short, terms, strict=True)]
    columns = [_program(adata, params, name) for name in programs]
    if ax is None:
        width = 2.4 + _LETTER * max(map(len, labels)) + _COLUMN * len(columns)
        height = 1.0 + max(2.0, _ROW * len(labels)) + 0.05 * max(map(len, columns))
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    _draw(ax, shown, list(terms), programs, cmap=cmap)
    ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(length=0, labelsize="small")
    ax.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(labels) - 0.4, -0.6))
    ax.set_xlabel("gene program", size="small")
    ax.spines[:].set_visible(False)
    return finish(ax.figure, ax, show=show, save=save)


def _draw(ax: Axes, shown: pd.DataFrame, terms: list[str], programs: list[str], *, cmap: str) -> None:
    x = [programs.index(name) for name in shown["program"]]
    y = [terms.index(term) for term in shown["term"]]
    strength = -np.log10(np.clip(shown["p_adjusted"].to_numpy(dtype=float), _LEAST_P, None))
    overlap = shown["overlap"].to_numpy(dtype=float)
    factor = 110 / overlap.max()
    image = ax.scatter(
        x,
        y,
        s=10 + factor * overlap,
        c=strength,
        cmap=cmap,
        vmin=0,
        vmax=max(strength.max(), 1.3),
        edgecolors="0.4",
        linewidths=0.4,
    )
    ax.set_axisbelow(True)
    ax.grid(color="0.93")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.5, aspect=12, pad=0.02, anchor=(0, 0.0))
    bar.set_label("−log10 corrected P", size="small")
    bar.ax.tick_params(labelsize="small")
    bar.ax.grid(visible=False)
    bar.outline.set_visible(False)
    steps = np.unique(np.round(np.quantile(overlap, [0, 0.5, 1]))).astype(int)
    handles = [
        plt.Line2D(
            [], [], marker="o", linestyle="", color="0.6", markersize=np.sqrt(10 + factor * step), label=str(step)
        )
        for step in steps
    ]
    ax.legend(
        handles=handles,
        title="shared genes",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize="small",
        title_fontsize="small",
    )


def _readable(term: str) -> str:
    """A name without underscores, without an identifier at the end, and not in capitals."""
    text = re.sub(r"\s*\((GO:\d+|R-HSA-\d+)\)$|\s+R-HSA-\d+$", "", str(term)).replace("_", " ")
    if text.isupper():
        first, *rest = text.split(" ")
        text = " ".join([first, *(word if word in _ACRONYMS else word.lower() for word in rest)])
    return text


def _short(term: str) -> str:
    """The same without its middle if it is long; many names differ at their end only."""
    text = _readable(term)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 25].rstrip()}…{text[-24:].lstrip()}"


def _program(adata: AnnData, params: dict, name: str) -> str:
    """Name of a program, with its first gene where that is known."""
    result = adata.uns.get(str(params.get("key", "")), {})
    members = result.get("programs", {}).get(name, ()) if hasattr(result, "get") else ()
    return f"{members[0]} ({name})" if len(members) else name
