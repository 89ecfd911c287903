"""Attention maps of chosen genes, averaged over groups of cells, for the tools that make networks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _logging, engine
from ._gene_embeddings import _groups
from ._gene_vectors import _columns
from ._inputs import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData

    from ..backbones import Backbone
    from ..genes import GeneMatch

CONTROL, PERTURBED, DIFFERENCE = "control", "perturbed", "difference"
_MOST_GENES = 2_000
_SHARE_OF_CELLS = 0.1


@dataclass(frozen=True)
class Cells:
    """Which cells are averaged, and how scores are made of their maps.

    Parameters
    ----------
    codes
        Group of each cell, -1 for none.
    groups
        Names of the groups.
    conditions
        Names of the results: the groups, or control, perturbed and their difference; empty without groups.
    """

    codes: np.ndarray
    groups: list[str]
    conditions: list[str]

    @classmethod
    def of(
        cls,
        adata: AnnData,
        groupby: str | None,
        groups: Sequence[str] | None,
        control: str | None,
        perturbed: str | None,
    ) -> Cells:
        """Read the groups from ``obs``.

        Raises
        ------
        KeyError
            If the column or a group does not exist.
        ValueError
            If no cell has a group, or only one of ``control`` and ``perturbed`` is given.
        """
        compared = control is not None or perturbed is not None
        if compared:
            if control is None or perturbed is None or groupby is None or groups is not None:
                msg = "control= and perturbed= are two groups of the column groupby=; give these three, without groups="
                raise ValueError(msg)
            if str(control) == str(perturbed):
                msg = f"control= and perturbed= are the same group {control!r}"
                raise ValueError(msg)
            groups = [control, perturbed]
        codes, names = _groups(adata, groupby, groups)
        if not (codes >= 0).any():
            msg = "adata has no cells" if groupby is None else f"no cell has a group in obs[{groupby!r}]"
            raise ValueError(msg)
        if groupby is None:
            return cls(codes, ["all"], [])
        slots = pd.Series(names, index=[name.replace("/", "_") for name in names], dtype=object)
        if (twice := slots.index.duplicated(keep=False)).any():
            msg = (
                f"the groups {', '.join(map(repr, slots[twice]))} of obs[{groupby!r}] would get the same slot, since '/' is "
                "written as '_'; rename one of them"
            )
            raise ValueError(msg)
        return cls(codes, names, [CONTROL, PERTURBED, DIFFERENCE] if compared else names)


@dataclass(frozen=True)
class AttentionMaps:
    """Mean attention between genes.

    Parameters
    ----------
    names
        Names of the genes.
    means
        The maps.
    cells
        Which cells they are of.
    min_cells
        Pairs of genes that fewer cells of a group have are left out; a tenth of its cells if it is ``None``.
    record
        What was done.
    """

    names: pd.Index
    means: engine.AttentionMeans
    cells: Cells
    min_cells: int | None
    record: dict[str, Any]

    def blocks(self, condition: str | None, genes: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """How much other genes, as queries, attend to some genes, ``(some genes, genes)``; NaN where that is unknown.

        Parameters
        ----------
        condition
            One of the conditions, or ``None`` without groups.
        genes
            Numbers of the genes that are attended to; all by default.
        """
        if condition == DIFFERENCE and len(self.cells.conditions) > len(self.cells.groups):
            before, after = self._of_group(0, genes), self._of_group(1, genes)
            for (some, control), (_, perturbed) in zip(before, after, strict=True):
                yield some, perturbed - control
        else:
            yield from self._of_group(0 if condition is None else self.cells.conditions.index(condition), genes)

    def _of_group(self, group: int, genes: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        fewest = self.min_cells
        if fewest is None:
            fewest = int(np.ceil(_SHARE_OF_CELLS * self.means.n_cells(group)))
        for some, scores, counts in self.means.blocks(group, genes):
            yield some, np.where(counts >= fewest, scores, np.nan)


def attention_maps(
    adata: AnnData,
    backbone: Backbone,
    genes: Sequence[str] | None,
    cells: Cells,
    *,
    attention_layer: int,
    attention_options: Mapping[str, Any] | None,
    min_cells: int | None,
    mean: str,
    layer: str | None,
    names: Mapping[str, Any],
    duplicates: str | None,
    rng: int | np.random.Generator,
    sizes: Mapping[str, Any],
    tokenize_options: Mapping[str, Any],
    params: Mapping[str, Any],
) -> AttentionMaps:
    """Average the attention of a model between genes over groups of cells; see :func:`scfm.tl.gene_network`."""
    backbone.require("attends")
    if mean not in ("true_mean", "upstream_mean"):
        msg = f"mean must be 'true_mean' or 'upstream_mean'; got {mean!r}"
        raise ValueError(msg)
    if min_cells is not None and min_cells < 1:
        msg = f"min_cells must be a positive whole number; got {min_cells!r}"
        raise ValueError(msg)
    chosen = cells.codes >= 0
    tokenize_options = _whole_cells(adata, backbone, tokenize_options)
    per_cell = {name: value for name, value in tokenize_options.items() if engine.is_per_cell(name, value)}
    with prepared(
        adata if chosen.all() else adata[chosen],
        backbone,
        what="averaging the attention of",
        layer=layer,
        use_raw=False,
        duplicates=duplicates,
        rng=rng,
        draws=None,
        tokenize_options={**tokenize_options, **{name: value[chosen] for name, value in per_cell.items()}},
        **names,
    ) as task:
        kept, ids = _genes_of_model(adata, task.match, genes)
        options = {**backbone.network_attention, **(attention_options or {})}
        means = engine.AttentionMeans(
            task, cells.codes[chosen], len(cells.groups), ids, layer=attention_layer, options=options, mean=mean
        )
        sizes = dict(sizes)
        means.run(sizes.pop("batch_size"), **sizes)
        record = task.record(
            {
                **params,
                "attention_layer": attention_layer,
                "attention_options": options,
                "min_cells": min_cells,
                "mean": mean,
            }
        )
    for number, group in enumerate(cells.groups):
        if not means.n_cells(number):
            msg = f"no cell of the group {group!r} has a gene that {backbone.name} knows"
            raise ValueError(msg)
    record["n_cells"] = {name.replace("/", "_"): means.n_cells(i) for i, name in enumerate(cells.groups)}
    return AttentionMaps(kept, means, cells, min_cells, record)


def _whole_cells(adata: AnnData, backbone: Backbone, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """With zeros every gene is a token of every cell, so that a limit would leave other genes out of each."""
    if (
        not options.get("include_zeros")
        or "max_length" in options
        or "max_length" not in engine.accepted_options(backbone)
    ):
        return options
    return {**options, "max_length": adata.n_vars + len(backbone.vocab.specials)}


def _genes_of_model(adata: AnnData, match: GeneMatch, genes: Sequence[str] | None) -> tuple[pd.Index, np.ndarray]:
    """Names and vocabulary ids of the wanted genes that the model knows, each id once."""
    columns = np.arange(adata.n_vars) if genes is None else _columns(adata, genes)
    ids = match.ids[columns]
    known = (ids >= 0) & ~pd.Series(ids).duplicated().to_numpy()
    if known.sum() < 2:
        msg = f"the model knows {int(known.sum())} of {len(columns):,} genes; a network needs at least two"
        raise ValueError(msg)
    if genes is None and known.sum() > _MOST_GENES:
        msg = (
            f"attention between all {int(known.sum()):,} genes is too much; choose some with genes= or program=, or run "
            "scanpy.pp.highly_variable_genes first"
        )
        raise ValueError(msg)
    if genes is not None and not known.all():
        _logging.info(f"    {int((~known).sum()):,} of {len(columns):,} wanted genes are unknown to the model")
    return adata.var_names[columns[known]], ids[known]
