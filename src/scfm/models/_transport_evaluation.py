"""Predicted cells after a treatment beside measured ones, and beside what needs no transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from ..metrics import transport_scores
from ._label_field import label_column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scipy.sparse import csr_matrix
    from torch import Tensor

# genes that are remembered for each treatment
_MARKERS = 1000


class TransportEvaluation:
    """``evaluate`` of a transport, and what it needs to know of the cells that are trained on."""

    def _measure_shifts(
        self, cells: Callable[[np.ndarray], Tensor], expression: csr_matrix, labels: np.ndarray, train: np.ndarray
    ) -> None:
        """What the baselines need: by how much the mean code and the mean expression change."""
        means = {}
        for name in (self._arguments["control"], *self._learned):
            members = train[labels[train] == name]
            code = self._codes(cells, members).double().mean(0).cpu().numpy()
            means[name] = code, np.asarray(expression[members].mean(0), dtype=np.float64).ravel()
        base = means[self._arguments["control"]]
        self._marker_order = self._ranked(expression[train], labels[train])
        self._shifts = {
            name: tuple(np.float32(after - before) for after, before in zip(means[name], base, strict=True))
            for name in self._learned
        }

    def _ranked(self, expression: csr_matrix, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Positions of the genes that each treatment changes most, by scanpy's t-test against the controls."""
        from scanpy.tools import rank_genes_groups

        control = self._arguments["control"]
        used = np.flatnonzero(np.isin(labels, [control, *self._learned]))
        cells = AnnData(
            expression[used],
            obs=pd.DataFrame({"treatment": pd.Categorical(labels[used])}, index=used.astype(str)),
            var=pd.DataFrame(index=np.arange(expression.shape[1]).astype(str)),
        )
        cells.uns["log1p"] = {"base": None}
        found = {}
        for name in self._learned:
            if (labels == name).sum() < 2 or (labels == control).sum() < 2:
                found[name] = np.zeros(0, dtype=np.int64)
                continue
            rank_genes_groups(
                cells, "treatment", groups=[name], reference=control, method="t-test", rankby_abs=True, n_genes=_MARKERS
            )
            found[name] = cells.uns["rank_genes_groups"]["names"][name].astype(np.int64)
        return found

    def evaluate(
        self,
        adata: AnnData | None = None,
        *,
        perturbations: Sequence[str] | None = None,
        n_markers: int = 50,
        groupby: str | None = None,
    ) -> pd.DataFrame:
        """Compare predictions with treated cells that were not trained on, beside what needs no transport.

        Parameters
        ----------
        adata
            Control and treated cells to test on; by default those that the split sets aside.
        perturbations
            Treatments; by default all.
        n_markers
            Number of the genes that the treatment changes most, found in the cells that were trained on.
        groupby
            Column of ``obs``, such as the cell type, to compare within each of its groups.

        Returns
        -------
        Tidy table with the columns ``perturbation``, ``group``, ``method``, ``genes``, ``n_control``, ``n_treated`` and the scores
        of :func:`scfm.metrics.transport_scores`. Methods are ``"transport"``; ``"latent shift"``, which moves all codes alike
        (scGen); ``"mean shift"``, which adds the mean change of expression; ``"no change"``; and ``"decoded truth"``, the treated
        cells after encoder and decoder, which no method with this codec can expect to beat.

        Raises
        ------
        ValueError
            If there are no cells to test on.
        """
        self._ready()
        given = adata is not None
        adata = self._own(adata)
        rows = np.arange(adata.n_obs) if given else self.test_indices_
        if rows is None or not len(rows):
            msg = "no cells are set aside to test on; name a column with split_key=, use test_size=, or give adata="
            raise ValueError(msg)
        adata = adata[rows]
        labels = label_column(adata, self._arguments["perturbation_key"]).fillna("").to_numpy(dtype=object)
        groups = (
            np.full(adata.n_obs, "all", dtype=object)
            if groupby is None
            else label_column(adata, groupby).fillna("").to_numpy()
        )
        cells, expression, known = self._cells(adata)
        control = self._arguments["control"]
        table = []
        for name in self._learned if perturbations is None else perturbations:
            number = self._number(name)
            markers = self._marker_order[name][:n_markers]
            for group in sorted(set(groups) - {""}):
                inside = (groups == group) & known
                before, after = (np.flatnonzero(inside & (labels == which)) for which in (control, name))
                if not len(before) or not len(after):
                    continue
                predicted = self._methods(number, cells, expression, before, after)
                observed = expression[after].toarray()
                for method, values in predicted.items():
                    for what, chosen in (("all", None), (f"top {len(markers)}", markers)):
                        if chosen is not None and not len(chosen):
                            continue
                        scores = transport_scores(observed, values, genes=chosen)
                        table.append((name, group, method, what, len(before), len(after), *scores.values()))
        if not table:
            msg = "the cells to test on hold no control and treated cells of one group"
            raise ValueError(msg)
        columns = ["perturbation", "group", "method", "genes", "n_control", "n_treated", "l2", "Pearson", "MMD"]
        return pd.DataFrame(table, columns=columns)

    @torch.no_grad()
    def _methods(
        self,
        number: int,
        cells: Callable[[np.ndarray], Tensor],
        expression: csr_matrix,
        before: np.ndarray,
        after: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Predicted cells by method."""
        codec, codes = self.module["codec"], self._codes(cells, before)
        code_shift, shift = self._shifts[self._learned[number]]
        unchanged = expression[before].toarray()
        decoded = {
            "transport": self._moved(number, codes),
            "latent shift": codes + self._tensor(code_shift),
            "decoded truth": self._codes(cells, after),
        }
        out = {method: codec.decode(values).cpu().numpy() for method, values in decoded.items()}
        truth = out.pop("decoded truth")
        return out | {"mean shift": unchanged + shift, "no change": unchanged, "decoded truth": truth}
