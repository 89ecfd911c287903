"""Regulatory networks: predicted edges beside known ones, and the start of a network from gene states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from .. import _logging

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK_VALUES = 2**22
# score of a pair that has no edge; weights are not negative
_NO_EDGE = -1.0


def network_scores(known: pd.DataFrame, edges: pd.DataFrame) -> dict[str, float]:
    """AUPR ratio and early precision ratio of a predicted network.

    Pairs of a source (a gene that regulates others in ``known``) and any gene of ``known`` are scored by the absolute weight
    of their edge; edges between other genes are left out, and of an edge that is there twice the stronger counts.

    Parameters
    ----------
    known
        Known network, with the columns ``source`` and ``target``.
    edges
        Predicted network, with the columns ``source``, ``target`` and ``weight``, in any order.

    Returns
    -------
    ``AUPR``
        Average precision over all pairs, a gene with itself included; pairs without an edge come last.
    ``AUPR ratio``
        The same divided by the share of pairs that are known edges, which is what chance gives.
    ``early hits``
        Known edges among the strongest ``K`` predicted ones, with ``K`` the number of known edges, those of a gene to itself
        included. Of edges that share the last weight, as many count as would on average in random order.
    ``EPR``
        Early precision ratio: early hits divided by ``K * K / (sources * genes - sources)``, as DeepSEM and scLong define
        it: chance is counted over pairs of different genes. A method that predicts no edge of a gene to itself stays a
        little below 1 by chance if ``known`` has some.

    Raises
    ------
    ValueError
        If a column is missing, there are no known edges, or a weight is not finite.

    References
    ----------
    Pratapa et al., BEELINE, Nature Methods 17, 147 (2020); Shu et al., DeepSEM, Nature Computational Science 1, 491 (2021).
    """
    for table, what, columns in (
        (known, "known", ["source", "target"]),
        (edges, "edges", ["source", "target", "weight"]),
    ):
        if absent := [name for name in columns if name not in table]:
            msg = f"{what} lacks the column {', '.join(absent)}; it has {', '.join(map(str, table.columns)) or 'none'}"
            raise ValueError(msg)
    known_sources, known_targets = (known[name].astype(str).to_numpy() for name in ("source", "target"))
    sources, genes = pd.Index(np.unique(known_sources)), pd.Index(np.union1d(known_sources, known_targets))
    weights = np.abs(edges["weight"].to_numpy(dtype=np.float64))
    if not len(known) or not np.isfinite(weights).all():
        msg = "the weight of an edge is not finite" if len(known) else "known has no edges"
        raise ValueError(msg)
    shape = len(sources), len(genes)
    truth = np.zeros(shape, dtype=bool)
    truth[sources.get_indexer(known_sources), genes.get_indexer(known_targets)] = True
    score = np.full(shape, _NO_EDGE)
    rows, columns = (
        index.get_indexer(edges[name].astype(str)) for index, name in ((sources, "source"), (genes, "target"))
    )
    inside = (rows >= 0) & (columns >= 0)
    np.maximum.at(score, (rows[inside], columns[inside]), weights[inside])
    aupr = float(average_precision_score(truth.ravel(), score.ravel()))
    hits = _early_hits(truth.ravel(), score.ravel())
    n_pairs = truth.size - len(sources)
    expected = int(truth.sum()) ** 2 / n_pairs if n_pairs else 0.0
    return {
        "AUPR": aupr,
        "AUPR ratio": aupr / float(truth.mean()),
        "early hits": hits,
        "EPR": hits / expected if expected else np.nan,
    }


def _early_hits(truth: np.ndarray, score: np.ndarray) -> float:
    """Hits among the strongest edges, as many as are known."""
    has_edge = score > _NO_EDGE
    n_taken = min(int(truth.sum()), int(has_edge.sum()))
    if not n_taken:
        return 0.0
    last = -np.partition(-score, n_taken - 1)[n_taken - 1]
    above, tied = score > last, score == last
    return float(truth[above].sum() + (n_taken - above.sum()) * truth[tied].mean())


def edges_between(known: pd.DataFrame, genes: Sequence[str] | pd.Index | np.ndarray, where: str) -> pd.DataFrame:
    """Known edges between some genes, each once.

    Parameters
    ----------
    known
        Known network, with the columns ``source`` and ``target``.
    genes
        Names of the genes.
    where
        What holds them, for messages.

    Raises
    ------
    ValueError
        If a column is missing, or no edge is left.
    """
    if absent := [name for name in ("source", "target") if name not in known]:
        msg = f"known lacks the column {', '.join(absent)}; it has {', '.join(map(str, known.columns)) or 'none'}"
        raise ValueError(msg)
    names = pd.Index(np.asarray(genes).astype(str))
    edges = known[["source", "target"]].astype(str)
    inside = edges["source"].isin(names) & edges["target"].isin(names)
    if not inside.any():
        first = f", unlike {edges['source'].iloc[0]} -> {edges['target'].iloc[0]}" if len(edges) else ""
        msg = (
            f"no known edge is between genes of {where} ({', '.join(names[:3])} ...){first}; names have to be the same, upper and "
            "lower case included"
        )
        raise ValueError(msg)
    if not inside.all():
        _logging.info(f"    {int((~inside).sum()):,} of {len(known):,} known edges have a gene that {where} lacks")
    return edges[inside].drop_duplicates(ignore_index=True)


def edges_from_matrix(
    adjacency: np.ndarray, genes: Sequence[str] | np.ndarray, *, sources: Sequence[str] | None = None
) -> pd.DataFrame:
    """Edges of an adjacency matrix whose rows are targets and whose columns are sources, as DeepSEM has it.

    Parameters
    ----------
    adjacency
        Weights ``(targets, sources)``, both in the order of ``genes``; zeros are no edges.
    genes
        Name of each gene.
    sources
        Genes that may be sources, for example transcription factors; by default all. Names that are not among ``genes`` are
        ignored.

    Returns
    -------
    Table with ``source``, ``target`` and ``weight``, the largest absolute weight first.
    """
    adjacency, genes = np.asarray(adjacency), np.asarray(genes).astype(str)
    if adjacency.shape != (len(genes), len(genes)):
        msg = f"adjacency has the shape {adjacency.shape}, but there are {len(genes)} genes"
        raise ValueError(msg)
    allowed = (
        np.ones(len(genes), dtype=bool) if sources is None else np.isin(genes, np.asarray(list(sources), dtype=str))
    )
    target, source = np.nonzero(np.where(allowed, adjacency, 0))
    weight = adjacency[target, source]
    order = np.argsort(-np.abs(weight), kind="stable")
    return pd.DataFrame({"source": genes[source[order]], "target": genes[target[order]], "weight": weight[order]})


def similarity_adjacency(
    states: np.ndarray, *, half_precision: bool = False, uniform_if_empty: bool = False
) -> np.ndarray:
    """Adjacency of genes from their contextual states, with which scLong starts the inference of a network.

    The states of a gene over all cells are one vector, scaled to an absolute sum of 1, with its zeros replaced by the median
    of its positive values. Scalar products of these vectors, without a gene's own, are scaled to an absolute row sum of 1.

    Parameters
    ----------
    states
        Genes by features, ``(genes, cells, dim)`` or ``(genes, features)``; missing genes are zero. Read in blocks, so it
        may be memory-mapped.
    half_precision
        Round vectors, products and result to float16, as the authors' code does.
    uniform_if_empty
        Give genes without any similarity the same weight for all others; otherwise their row is zero.

    Returns
    -------
    Matrix ``(genes, genes)`` of float32 (float16 with ``half_precision``), with a zero diagonal.

    References
    ----------
    Bai et al., scLong, 2024.
    """
    n_genes = len(states)
    features = np.reshape(states, (n_genes, -1))
    if n_genes < 2 or not features.shape[1]:
        msg = f"an adjacency needs at least two genes with states, not the shape {np.shape(states)}"
        raise ValueError(msg)
    kind = np.float16 if half_precision else np.float32
    scale, fill = np.empty((n_genes, 1)), np.empty((n_genes, 1))
    step = max(1, _CHUNK_VALUES // features.shape[1])
    for start in range(0, n_genes, step):
        rows = slice(start, start + step)
        block = np.asarray(features[rows], dtype=np.float64)
        if not np.isfinite(block).all():
            msg = f"states of genes {start} to {start + len(block) - 1} hold values that are not finite"
            raise ValueError(msg)
        total = np.abs(block).sum(1, keepdims=True)
        scale[rows] = np.where(total > 0, total, 1)
        positive = np.where(block > 0, block, np.nan)
        some = (block > 0).any(1)
        fill[rows] = 0
        fill[rows][some] = np.nanmedian(positive[some], axis=1, keepdims=True) if some.any() else 0
    product = np.zeros((n_genes, n_genes), dtype=np.float32)
    step = max(1, _CHUNK_VALUES // n_genes)
    for start in range(0, features.shape[1], step):
        block = np.asarray(features[:, start : start + step], dtype=np.float64)
        block = (np.where(block == 0, fill, block) / scale).astype(kind).astype(np.float32)
        product += block @ block.T
    product = product.astype(kind).astype(np.float32)
    np.fill_diagonal(product, 0)
    total = np.abs(product).sum(1, keepdims=True)
    product /= np.where(total > 0, total, 1)
    if uniform_if_empty:
        product[total[:, 0] == 0] = 1 / (n_genes - 1)
        np.fill_diagonal(product, 0)
    return product.astype(kind)


def cosine_adjacency(vectors: np.ndarray, *, uniform_if_empty: bool = True) -> np.ndarray:
    """Cosine similarity of genes, as an adjacency.

    With the mean of the state of each gene in each cell as vectors, this is how the paper of scLong starts the inference of a
    network (its code does :func:`similarity_adjacency`).

    Parameters
    ----------
    vectors
        One row for each gene; genes without a vector are zero or NaN.
    uniform_if_empty
        Give these genes the same weight ``1 / (genes - 1)`` for all others; otherwise their row is zero.

    Returns
    -------
    Matrix ``(genes, genes)`` of float32 with a zero diagonal.

    Raises
    ------
    ValueError
        If there are fewer than two genes, or a vector is infinite.

    References
    ----------
    Bai et al., scLong, 2024.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) < 2:
        msg = f"an adjacency needs a vector for each of at least two genes, not the shape {vectors.shape}"
        raise ValueError(msg)
    missing = np.isnan(vectors).any(1)
    vectors = np.where(missing[:, None], 0, vectors)
    if not np.isfinite(vectors).all():
        msg = "a vector of a gene is infinite"
        raise ValueError(msg)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1)
    cosine = unit @ unit.T
    if uniform_if_empty:
        cosine[length[:, 0] == 0] = 1 / (len(vectors) - 1)
    np.fill_diagonal(cosine, 0)
    return cosine.astype(np.float32)
