"""Predicted expression after genetic perturbations, a block of control cells at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.data._constants import _SETUP_ARGS_KEY

from .. import _logging
from ..genes import resolve_gene_names
from ..tasks.perturbation_data import CONTROL, canonical_of
from ..tasks.perturbation_learners import GearsLearner
from ._control_states import states_in_memory
from ._perturbation_data import genes_in, labels_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scipy import sparse

# largest arrays of a block
_PREDICTION_BYTES = 256 * 2**20
_MOST_CELLS = 512
_SHOWN = 10


class PerturbationPredictions:
    """``predict`` and ``iter_predictions`` of a learner of perturbations."""

    def iter_predictions(
        self,
        perturbations: Sequence[str] | str,
        control: AnnData | None = None,
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Predict, a block at a time, so that memory does not grow with cells and perturbations.

        Parameters
        ----------
        perturbations
            Genes to perturb, several of one perturbation joined by ``+``, or in another usual spelling. A name that is given twice
            is predicted once.
        control
            Control cells; by default those of the data. All genes of the model have to be there, in any order.
        batch_size
            Cells of a block.
        seed
            Seed of what a model draws when it looks at cells; a cell never depends on others.

        Yields
        ------
        Name of the perturbation as given, the cells, and their predicted log-normalised expression, float32, ``(cells, genes)``
        with the genes of ``control``. All perturbations of a block of cells come before the next block.

        Raises
        ------
        ValueError
            If a gene cannot be perturbed, or genes of the model are missing.
        """
        names = [perturbations] if isinstance(perturbations, str) else list(dict.fromkeys(map(str, perturbations)))
        members = self._usable_members(names)
        control = self._controls() if control is None else control
        expression, totals, columns = self._control_expression(control)
        if not self.is_trained_ and not (
            self.backbone is not None and self.backbone.perturbs_already and self.adata is None
        ):
            _logging.warning("the model is not trained; call train() first")
        size = self._block_size() if batch_size is None else int(batch_size)
        if size < 1:
            msg = f"batch_size must be positive; got {batch_size}"
            raise ValueError(msg)
        # a generator of its own, so that wrong input is refused before the first block is asked for
        return self._predict(names, members, expression, totals, columns, size, seed)

    def _predict(
        self,
        names: list[str],
        members: np.ndarray,
        expression: sparse.csr_matrix,
        totals: np.ndarray | None,
        columns: np.ndarray,
        size: int,
        seed: int,
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        learner, n_genes = self.module.eval(), len(self.genes)
        needs_states = isinstance(learner, GearsLearner) and self.backbone is not None
        for start in range(0, expression.shape[0], size):
            rows = slice(start, min(start + size, expression.shape[0]))
            block = expression[rows]
            states = None
            if needs_states:
                cells = pd.RangeIndex(rows.start, rows.stop).astype(str)
                task = self._task(block, None if totals is None else totals[rows], cells, seed)
                states = torch.from_numpy(states_in_memory(task, quiet=start > 0)).to(learner.device)
            before = torch.from_numpy(block.toarray().astype(np.float32, copy=False)).to(learner.device)
            with torch.no_grad():
                seen = learner.look_at(before, states)
            for name, genes in zip(names, members, strict=True):
                with torch.no_grad():
                    perturbed = torch.from_numpy(genes).to(learner.device).expand(len(before), -1)
                    values = learner.respond(seen, before, perturbed)[:, :n_genes].float().cpu().numpy()
                out = np.empty_like(values)
                out[:, columns] = values
                yield name, rows, out

    def predict(
        self,
        perturbations: Sequence[str] | str,
        control: AnnData | None = None,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Predict expression after perturbations.

        Parameters
        ----------
        perturbations, control, batch_size, seed
            As in :meth:`iter_predictions`.

        Returns
        -------
        Predicted log-normalised expression by perturbation, float32, ``(cells, genes)`` each.
        """
        out: dict[str, list[np.ndarray]] = {}
        for name, _, values in self.iter_predictions(perturbations, control, batch_size, seed=seed):
            out.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in out.items()}

    def _usable_members(self, names: list[str]) -> np.ndarray:
        """Numbers of the genes of perturbations in any order.

        Raises
        ------
        ValueError
            If one of them cannot be perturbed.
        """
        known = frozenset(map(str, self._perturbed.names))
        wanted = [canonical_of(name, known) for name in names]
        genes = genes_in(wanted)
        at = self._perturbed.numbers(genes)
        able = (at >= 0) & self._perturbed.usable[at]
        unable = [gene for gene, fine in zip(genes, able, strict=True) if not fine]
        if unable:
            msg = (
                f"the model cannot perturb {', '.join(unable[:_SHOWN])}{' ...' if len(unable) > _SHOWN else ''}: it was not "
                f"trained on these genes, and nothing else is known to it about them; .perturbable has the "
                f"{len(self.perturbable):,} that it can"
            )
            raise ValueError(msg)
        return self._members(wanted)

    def _controls(self) -> AnnData:
        if self.adata is None:
            msg = "the model was loaded without data; give control cells with control="
            raise ValueError(msg)
        return self.adata[labels_of(self.adata) == CONTROL]

    def _control_expression(self, control: AnnData) -> tuple[sparse.csr_matrix, np.ndarray | None, np.ndarray]:
        """Expression of control cells in the order of the network's genes, and where each gene is in the data."""
        if not isinstance(control, AnnData):
            msg = f"control= needs an AnnData with control cells, not {type(control).__name__}"
            raise TypeError(msg)
        arguments = self.registry_[_SETUP_ARGS_KEY]
        symbols = arguments["gene_symbols"]
        wanted = self.genes.astype(str)
        names = pd.Index(
            resolve_gene_names(control.var, symbols if symbols in control.var else None).symbols.astype(str)
        )
        if set(wanted) <= set(control.var_names):
            names = control.var_names.astype(str)
        columns = names.get_indexer(wanted) if names.is_unique else np.full(len(wanted), -1)
        if (columns < 0).any() or len(names) != len(wanted):
            missing = wanted[columns < 0]
            what = f"they lack {', '.join(missing[:_SHOWN])}" if len(missing) else "they have others, too"
            msg = f"control cells need the {len(wanted):,} genes of the model, but {what}; choose them with adata[:, model.genes]"
            raise ValueError(msg)
        values, totals = self._rule.read(control)
        return self._with_unmeasured(values[:, columns].tocsr()), totals, columns

    def _block_size(self) -> int:
        """Cells of a block, so that its largest arrays stay at a few hundred megabytes."""
        if isinstance(self.module, GearsLearner):
            config = self.module.network.config
            width = max(4 * config.hidden, 2 * config.states)
        else:
            width = 8 * self.backbone.gene_state_dim
        n_genes = len(self.genes) + len(self._perturbed.extra)
        return int(np.clip(_PREDICTION_BYTES // (4 * width * n_genes), 1, _MOST_CELLS))
