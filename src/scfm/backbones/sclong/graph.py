"""The Gene Ontology graph of scLong: genes that share annotations, as weighted edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from .annotations import from_mapping, read_annotations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ...genes import AliasTable, GeneVocab

MIN_SIMILARITY = 0.1
NEIGHBORS = 21
# pairs of genes whose shared terms are counted at a time
_BLOCK_PAIRS = 1 << 24


@dataclass(frozen=True)
class GOGraph:
    """Weighted, directed edges between genes of a vocabulary; self loops are edges like others.

    Parameters
    ----------
    edges
        Ids of source and target of each edge, int64, shape ``(2, edges)``.
    weight
        Jaccard similarity of the annotations of both, float32, shape ``(edges,)``.
    """

    edges: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return self.edges.shape[1]

    def normalized(self, n_positions: int) -> Tensor:
        """Weights divided by the roots of the summed weights that reach source and target, shape ``(edges,)``."""
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        return gcn_norm(self.edges, self.weight, n_positions, add_self_loops=False)[1]

    def to_frame(self, vocab: GeneVocab) -> pd.DataFrame:
        """Table with the columns ``source``, ``target`` and ``importance``, as the authors' file has it."""
        source, target = vocab.names[self.edges.numpy()]
        return pd.DataFrame({"source": source, "target": target, "importance": self.weight.numpy()})

    @classmethod
    def from_annotations(
        cls,
        annotations: pd.DataFrame | Mapping[str, Iterable[str]] | str | Path,
        vocab: GeneVocab,
        *,
        aliases: AliasTable | str | Path | pd.DataFrame | None = None,
        min_similarity: float = MIN_SIMILARITY,
        neighbors: int = NEIGHBORS,
    ) -> GOGraph:
        """Build the graph from annotations of genes.

        Parameters
        ----------
        annotations
            Table with the columns ``gene`` and ``term`` (see :func:`read_annotations`), a mapping of genes to their
            terms, or the path of a file that :func:`read_annotations` understands without options.
        vocab
            Genes of the model; annotations of other genes are left out. Genes without annotations have no edges.
        aliases
            Table of symbols and Ensembl ids, for annotations that call genes otherwise than the vocabulary.
        min_similarity
            Pairs need a Jaccard similarity of their terms above this number.
        neighbors
            Most edges that reach a gene, those with the largest similarity; of equal ones, those whose source comes
            first in the vocabulary. A gene is its own neighbour, too.
        """
        if isinstance(annotations, Mapping):
            annotations = from_mapping(annotations)
        elif not isinstance(annotations, pd.DataFrame):
            annotations = read_annotations(annotations)
        codes, names = pd.factorize(annotations["gene"])
        ids = vocab.match(names, aliases=aliases).ids[codes]
        terms = pd.factorize(annotations["term"])[0]
        known = ids >= 0
        incidence = sparse.csr_matrix(
            (np.ones(known.sum(), dtype=np.int32), (ids[known], terms[known])),
            shape=(len(vocab), terms.max(initial=0) + 1),
        )
        incidence.data[:] = 1  # two names of one gene may have the same term
        parts = [_strongest(part, neighbors) for part in _similar_pairs(incidence, min_similarity)]
        return cls._of_frame(pd.concat(parts, ignore_index=True))

    @classmethod
    def from_pairs(
        cls,
        pairs: pd.DataFrame | str | Path,
        vocab: GeneVocab,
        *,
        min_similarity: float = MIN_SIMILARITY,
        neighbors: int = NEIGHBORS,
    ) -> GOGraph:
        """Build the graph from similarities, such as the authors' file ``human_ens_gene2go_graph.csv``.

        Parameters
        ----------
        pairs
            Table, or path of a CSV file, with the columns ``source``, ``target`` and ``importance``.
        vocab, min_similarity, neighbors
            As in :meth:`from_annotations`, but of equal similarities the first in the table are taken.

        Raises
        ------
        ValueError
            If a column is missing.
        """
        if not isinstance(pairs, pd.DataFrame):
            pairs = pd.read_csv(pairs, keep_default_na=False)
        if missing := {"source", "target", "importance"} - set(pairs.columns):
            msg = f"the table of gene pairs has no column {', '.join(sorted(missing))}"
            raise ValueError(msg)
        ids = {side: vocab.get_ids(pairs[side].to_numpy()) for side in ("source", "target")}
        frame = pd.DataFrame({**ids, "weight": pairs["importance"].to_numpy(np.float64)})
        frame = frame[(frame["source"] >= 0) & (frame["target"] >= 0) & (frame["weight"] > min_similarity)]
        return cls._of_frame(_strongest(frame, neighbors))

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame) -> GOGraph:
        edges = frame[["source", "target"]].to_numpy(np.int64).T
        return cls(torch.from_numpy(edges.copy()), torch.from_numpy(frame["weight"].to_numpy(np.float32)))


def _similar_pairs(incidence: csr_matrix, min_similarity: float) -> Iterator[pd.DataFrame]:
    """Pairs of genes with a Jaccard similarity above a bound, some targets at a time, ordered by source for each."""
    n_genes = incidence.shape[0]
    sizes = np.diff(incidence.indptr)
    transposed = incidence.T.tocsr()
    step = max(1, _BLOCK_PAIRS // max(1, n_genes))
    for start in range(0, n_genes, step):
        shared = (incidence[start : start + step] @ transposed).tocsr()
        shared.sort_indices()
        target = start + np.repeat(np.arange(shared.shape[0]), np.diff(shared.indptr))
        weight = shared.data / (sizes[target] + sizes[shared.indices] - shared.data)
        keep = weight > min_similarity
        yield pd.DataFrame(
            {"source": shared.indices[keep].astype(np.int64), "target": target[keep], "weight": weight[keep]}
        )


def _strongest(pairs: pd.DataFrame, neighbors: int) -> pd.DataFrame:
    """The pairs of largest weight for each target, of equal ones the first."""
    order = np.lexsort((np.arange(len(pairs)), -pairs["weight"].to_numpy(), pairs["target"].to_numpy()))
    ordered = pairs.iloc[order]
    return ordered[ordered.groupby("target").cumcount().to_numpy() < neighbors]
