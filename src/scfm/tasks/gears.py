"""Loss of GEARS, its graphs, and the files that its authors save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from .._errors import CheckpointError
from ..backbones.sclong.graph import GOGraph
from ..checkpoints import torch_file
from ..checkpoints.convert import KeyRule, LoadReport, check_against, rename
from ..genes import GeneVocab
from .gears_network import GearsConfig, GearsNetwork, Graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

GAMMA, DIRECTION = 2.0, 0.1
# genes whose correlations are in memory at a time, times the number of genes
_BLOCK_PAIRS = 1 << 24
_ROUNDING = 1e-12
_GENE_COLUMNS = ("gene", "symbol", "gene_name")
_TERM_COLUMNS = ("term", "go_id", "go")

_MLP = r"network\.(\d+)\.(.+)"
KEY_TABLE = (
    KeyRule(r"indv_w1", "gene_weight"),
    KeyRule(r"indv_b1", "gene_bias"),
    KeyRule(r"indv_w2", "cross_weight"),
    KeyRule(r"indv_b2", "cross_bias"),
    KeyRule(r"gene_emb\.weight", "genes.weight"),
    KeyRule(r"pert_emb\.weight", "perturbations.weight"),
    KeyRule(r"emb_pos\.weight", "positions.weight"),
    KeyRule(r"layers_emb_pos\.(\d+)\.lin\.(weight|bias)", r"coexpression.layers.\1.\2"),
    KeyRule(r"sim_layers\.(\d+)\.lin\.(weight|bias)", r"go.layers.\1.\2"),
    KeyRule(r"pert_w\.(weight|bias)", r"indicator.\1"),
    KeyRule(rf"pert_fuse\.{_MLP}", r"fuse.\1.\2"),
    # the same name for what mixes positions in, and for what CellFM's states go through
    KeyRule(rf"emb_trans_v2\.{_MLP}", r"mix.\1.\2"),
    KeyRule(rf"recovery_w\.{_MLP}", r"recover.\1.\2"),
    KeyRule(rf"cross_gene_state\.{_MLP}", r"cross.\1.\2"),
    KeyRule(r"bn_emb\.(.+)", r"state_norm.\1"),
    KeyRule(r"bn_pert_base\.(.+)", r"norm.\1"),
    KeyRule(r"bn_pert_base_trans\.(.+)", r"indicator_norm.\1"),
    KeyRule(r"singlecell_model\.feedforward\.(weight|bias)", r"project.\1"),
    KeyRule(r"singlecell_model\.(m|scfm)\..+", None, "weights of the foundation model, which has its own file"),
    KeyRule(r"cell_fitness_mlp\..+", None, "predicts fitness, which is not part of scfm"),
    KeyRule(r"uncertainty_w\..+", None, "predicts uncertainty, which is not part of scfm"),
)
"""Official names of the tensors of GEARS, and ours."""


def gears_loss(
    predicted: Tensor,
    observed: Tensor,
    control: Tensor,
    conditions: Tensor,
    counted: Tensor | None = None,
    *,
    gamma: float = GAMMA,
    direction: float = DIRECTION,
) -> Tensor:
    """Loss of GEARS: errors to a high power, and wrong directions of change.

    ``mean over conditions of [mean |y - p|^(2 + gamma) + direction * mean (sign(y - c) - sign(p - c))^2]``, where means are over
    the cells and the counted genes of a condition.

    Parameters
    ----------
    predicted, observed
        Expression, ``(cells, genes)``.
    control
        Mean expression of control cells, ``(genes,)``.
    conditions
        Number of the condition of each cell, ``(cells,)``.
    counted
        Genes that count in each cell, usually those that are not zero in all cells of its condition, ``(cells, genes)``; it has
        to be the same for all cells of a condition. All by default.
    gamma, direction
        Constants of the loss.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024).
    """
    _, code, n_cells = torch.unique(conditions, return_inverse=True, return_counts=True)
    error = (predicted - observed).abs() ** (2 + gamma)
    turned = torch.sign(observed - control) - torch.sign(predicted - control)
    loss = error + direction * turned.square()
    per_cell = loss.mean(1) if counted is None else (loss * counted).sum(1) / counted.sum(1).clamp_min(1)
    return (per_cell / n_cells[code]).sum() / len(n_cells)


def coexpression_graph(
    expression: sparse.spmatrix | np.ndarray, *, neighbors: int = 20, min_correlation: float = 0.4
) -> Graph:
    """Genes that vary together: for each gene those with the largest absolute Pearson correlation.

    Parameters
    ----------
    expression
        Cells by genes, sparse or dense. The authors take the cells that are trained on and have one perturbed gene or none.
    neighbors
        Most edges that reach a gene, besides that from itself. Of equal ones, the first genes are taken.
    min_correlation
        Pairs need a larger absolute correlation.

    Returns
    -------
    Edges from each neighbour to the gene, with the absolute correlation as weight. Genes that do not vary have none.
    """
    matrix = sparse.csr_matrix(expression, dtype=np.float64)
    n_cells, n_genes = matrix.shape
    mean = np.asarray(matrix.mean(0)).ravel()
    # from differences, so that rounding gives no gene that is constant a spread
    squares = np.bincount(matrix.indices, (matrix.data - mean[matrix.indices]) ** 2, minlength=n_genes)
    spread = np.sqrt((squares + (n_cells - matrix.getnnz(0)) * mean**2) / max(n_cells, 1))
    varies = spread > _ROUNDING * np.maximum(np.abs(mean), 1)
    scale = np.divide(1.0, spread, out=np.zeros(n_genes), where=varies)
    transposed = matrix.T.tocsr()
    kept = min(neighbors + 1, n_genes)
    step = max(1, _BLOCK_PAIRS // max(1, n_genes))
    parts = []
    for start in range(0, n_genes, step):
        rows = slice(start, start + step)
        covariance = (transposed[rows] @ matrix).toarray() / max(n_cells, 1) - np.outer(mean[rows], mean)
        size = np.abs(covariance * scale[rows, None] * scale)
        chosen = np.argsort(-size, axis=1, kind="stable")[:, :kept]
        weight = np.take_along_axis(size, chosen, 1)
        target = np.repeat(np.arange(start, start + len(size)), kept).reshape(weight.shape)
        strong = weight > min_correlation
        parts.append((chosen[strong], target[strong], weight[strong]))
    source, target, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Graph(torch.from_numpy(np.stack([source, target])), torch.from_numpy(weight.astype(np.float32)))


def annotation_table(annotations: pd.DataFrame | Mapping[str, Iterable[str]] | str | Path) -> pd.DataFrame:
    """Annotations of genes, or similarities of pairs of genes, as a table.

    Parameters
    ----------
    annotations
        Table with a column of genes (``gene`` or ``symbol``) and one of terms (``term`` or ``go_id``), a table of pairs
        (``source``, ``target``, ``importance``), a mapping of genes to their terms, or a file with one of these: parquet, CSV of
        pairs, or what ``scfm.backbones.sclong.read_annotations`` reads.

    Raises
    ------
    ValueError
        If a table has other columns.
    """
    from ..backbones.sclong.annotations import from_mapping, read_annotations

    if isinstance(annotations, Mapping):
        return from_mapping(annotations)
    if not isinstance(annotations, pd.DataFrame):
        path = Path(annotations)
        if path.suffix == ".parquet":
            annotations = pd.read_parquet(path)
        else:
            head = pd.read_csv(path, nrows=0, sep=None, engine="python") if path.suffix == ".csv" else pd.DataFrame()
            if not {"source", "target", "importance"} <= set(head.columns):
                return read_annotations(path)
            annotations = pd.read_csv(path, keep_default_na=False)
    if {"source", "target", "importance"} <= set(annotations.columns):
        return annotations[["source", "target", "importance"]]
    found = [next((c for c in names if c in annotations), None) for names in (_GENE_COLUMNS, _TERM_COLUMNS)]
    if None in found:
        msg = (
            "annotations of genes need the columns 'gene' and 'term', or 'source', 'target' and 'importance'; there are "
            f"{', '.join(map(str, annotations.columns))}"
        )
        raise ValueError(msg)
    table = annotations[found].set_axis(["gene", "term"], axis=1).dropna().astype(str)
    return table.drop_duplicates(ignore_index=True)


def annotated_genes(table: pd.DataFrame) -> np.ndarray:
    """Names of the genes in the result of :func:`annotation_table`, sorted."""
    if "source" in table:
        return np.unique(np.concatenate([table["source"].to_numpy(str), table["target"].to_numpy(str)]))
    return np.unique(table["gene"].to_numpy(str))


def go_graph(table: pd.DataFrame, genes: Sequence[str], *, neighbors: int = 20, min_similarity: float = 0.1) -> Graph:
    """Genes that share annotations: for each gene those with the largest Jaccard similarity of terms.

    Parameters
    ----------
    table
        Result of :func:`annotation_table`.
    genes
        The nodes.
    neighbors
        Most edges that reach a gene, besides that from itself.
    min_similarity
        Pairs need a larger similarity.
    """
    vocab = GeneVocab(list(genes))
    make = GOGraph.from_pairs if "source" in table else GOGraph.from_annotations
    graph = make(table, vocab, min_similarity=min_similarity, neighbors=neighbors + 1)
    return Graph(graph.edges, graph.weight)


def gears_config(state: Mapping[str, Tensor], *, states: int = 0, indicator: bool | None = None) -> dict[str, Any]:
    """Fields of :class:`GearsConfig` that official tensors tell.

    Parameters
    ----------
    state
        Official tensors under official names.
    states
        Width of the states of the foundation model; 0 for GEARS itself.
    indicator
        Whether the file is one of scLong, whose networks are told the perturbed gene. By default by the names of the tensors.
    """
    n_genes, hidden = state["indv_w1"].shape[:2]
    given = {"n_genes": n_genes, "hidden": hidden, "n_perturbations": len(state["pert_emb.weight"]), "states": states}
    # files of networks without a graph of co-expression may have no layer on it
    for name, prefix in (("n_go_layers", "sim_layers."), ("n_coexpression_layers", "layers_emb_pos.")):
        given[name] = max(1, sum(key.startswith(prefix) and key.endswith("lin.weight") for key in state))
    first = state.get("emb_trans_v2.network.0.weight")
    if indicator if indicator is not None else first is None:
        return given | {"indicator": True, "positions": "none"}
    if states and first is not None and tuple(first.shape) != (hidden, hidden):
        return given | {"entry": "mlp", "entry_hidden": len(first), "positions": "none"}
    return given


def read_gears(
    source: str | Path | Mapping[str, Tensor],
    go: Graph,
    coexpression: Graph | None = None,
    *,
    states: int = 0,
    places: Tensor | None = None,
    **config: Any,
) -> tuple[GearsNetwork, LoadReport]:
    """Network with the weights that GEARS, scFoundation, CellFM or scLong have saved as ``model.pt``.

    The graphs are not in this file; give them as they were in training. ``config.pkl`` beside it is a pickle and is not read.

    Parameters
    ----------
    source
        The file, or its tensors.
    go, coexpression, places
        As in :class:`GearsNetwork`.
    states
        Width of the states of the foundation model, 0 for GEARS itself.
    config
        Fields of :class:`GearsConfig` that tensors do not tell, such as ``positions="states"``.

    Returns
    -------
    The network, for inference, and what was read.

    Raises
    ------
    CheckpointError
        If the file holds no network of GEARS.
    """
    official = dict(source) if isinstance(source, Mapping) else torch_file.read(Path(source))
    if not isinstance(official, dict) or not {"indv_w1", "pert_emb.weight"} <= set(official):
        msg = f"{source if not isinstance(source, Mapping) else 'the mapping'} holds no network of GEARS (no 'indv_w1')"
        raise CheckpointError(msg)
    official = {key.removeprefix("module."): tensor for key, tensor in official.items()}
    settled = GearsConfig(**(gears_config(official, states=states, indicator=config.pop("indicator", None)) | config))
    network = GearsNetwork(settled, go, coexpression, places)
    renamed, report = rename(official, KEY_TABLE)
    if settled.entry == "mlp":
        renamed = {
            f"entry{key.removeprefix('mix')}" if key.startswith("mix.") else key: t for key, t in renamed.items()
        }
    expected = network.state_dict()
    graphs = {key for key in expected if key.endswith((".edges", ".edge_weight")) or key == "places"}
    for key in sorted(set(renamed) - set(expected)):
        report.dropped[key] = "this form of the network does not use it"
    renamed = {key: tensor for key, tensor in renamed.items() if key in expected}
    wanted = {key: tensor for key, tensor in expected.items() if key not in graphs}
    check_against(renamed, wanted, report).raise_for_errors("the file of GEARS")
    network.load_state_dict(renamed, strict=False)
    return network.eval(), report
