"""The network of GEARS, in the forms that the papers of scFoundation, CellFM and scLong give it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

Entry = Literal["norm", "mlp"]
Positions = Literal["none", "table", "states"]

# share of the convolved table in the state of a gene
_POSITION_SHARE = 0.2
# rows of learned tables are cut to this norm when they are looked up
_MAX_NORM = 1.0
NO_PERTURBATION = -1


@dataclass(frozen=True)
class GearsConfig:
    """Every hyper-parameter of the network of GEARS (Roohani et al., Nature Biotechnology 2024) and its relatives.

    Parameters
    ----------
    n_genes
        Genes whose expression is predicted.
    n_perturbations
        Genes that can be perturbed; they need not be among the others.
    hidden
        Width.
    states
        Width of the states of genes that a foundation model gives; 0 for a learned table, as in GEARS itself.
    entry
        What states go through first: ``"norm"`` (batch normalisation and ReLU, after a linear map if they are not as wide as the
        network; GEARS, scFoundation, scLong), or ``"mlp"`` (two layers; CellFM).
    entry_hidden
        Width between the layers of ``entry="mlp"``.
    positions
        What is convolved on the graph of co-expression and added to the state of a gene: nothing (CellFM, scLong), a learned
        ``"table"`` (GEARS; mode v1 of scFoundation, with which all its results were made), or the ``"states"`` themselves (mode
        v2).
    indicator
        Whether the network is also told at which gene a cell is perturbed, as in scLong; a second normalisation goes with it.
    frozen_projection
        Whether the linear map from the states to the network, if there is one, keeps its random weights in training, as in scLong's
        code.
    n_go_layers, n_coexpression_layers
        Layers on the graph of the genes that can be perturbed, and on that of co-expression.
    n_graph_layers
        Sets both.

    Raises
    ------
    ValueError
        If a choice is unknown, or choices do not go together.
    """

    n_genes: int
    n_perturbations: int
    hidden: int = 128
    states: int = 0
    entry: Entry = "norm"
    entry_hidden: int = 0
    positions: Positions = "table"
    indicator: bool = False
    frozen_projection: bool = False
    n_go_layers: int = 1
    n_coexpression_layers: int = 1
    n_graph_layers: InitVar[int | None] = None

    def __post_init__(self, n_graph_layers: int | None) -> None:
        if n_graph_layers is not None:
            for name in ("n_go_layers", "n_coexpression_layers"):
                object.__setattr__(self, name, n_graph_layers)
        if self.entry not in ("norm", "mlp"):
            msg = f"entry must be 'norm' or 'mlp'; got {self.entry!r}"
            raise ValueError(msg)
        if self.positions not in ("none", "table", "states"):
            msg = f"positions must be 'none', 'table' or 'states'; got {self.positions!r}"
            raise ValueError(msg)
        layers = min(self.n_go_layers, self.n_coexpression_layers)
        if min(self.n_genes, self.n_perturbations, self.hidden, layers) < 1:
            msg = "a network needs at least one gene, one perturbation, one layer and a positive width"
            raise ValueError(msg)
        if self.entry == "mlp" and (self.positions != "none" or not self.entry_hidden or not self.states):
            msg = "entry='mlp' needs states, entry_hidden and positions='none'"
            raise ValueError(msg)
        if self.positions == "states" and not self.states:
            msg = "positions='states' needs the states of a model; use 'table' or 'none'"
            raise ValueError(msg)


@dataclass(frozen=True)
class Graph:
    """Weighted, directed edges between numbered nodes.

    Parameters
    ----------
    edges
        Source and target of each edge, int64, ``(2, edges)``.
    weight
        Weights, float32, ``(edges,)``.
    """

    edges: Tensor
    weight: Tensor

    @classmethod
    def empty(cls) -> Graph:
        """No edges, so that each node keeps what it has."""
        return cls(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0))


class GraphConvolution(nn.Module):
    """Simplified graph convolution with one step, ``SGConv`` of torch-geometric.

    A node gets the weighted mean of its neighbours and itself (self loops of weight 1 where the graph has none, weights divided
    by the roots of the sums that reach both ends), then a linear map. The weights are those of torch-geometric; the product is
    one sparse matrix product for all cells, which gives the same numbers as its message passing without a vector for each edge
    of each cell.

    Parameters
    ----------
    dim
        Width of nodes.
    n_nodes
        Number of nodes.
    graph
        The edges.
    n_layers
        Layers, with ReLU between them.
    """

    def __init__(self, dim: int, n_nodes: int, graph: Graph, n_layers: int) -> None:
        super().__init__()
        self.n_nodes = n_nodes
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(n_layers))
        self.register_buffer("edges", graph.edges.clone())
        self.register_buffer("edge_weight", graph.weight.float().clone())
        self._matrix: Tensor | None = None

    def matrix(self) -> Tensor:
        """Normalised adjacency with targets as rows, sparse, ``(nodes, nodes)``."""
        if self._matrix is None or self._matrix.device != self.edges.device:
            # torch-geometric takes seconds to import
            from torch_geometric.nn.conv.gcn_conv import gcn_norm

            (source, target), weight = gcn_norm(self.edges, self.edge_weight, self.n_nodes, add_self_loops=True)
            shape = (self.n_nodes, self.n_nodes)
            self._matrix = torch.sparse_coo_tensor(
                torch.stack([target, source]), weight, shape, check_invariants=False
            ).coalesce()
        return self._matrix

    def spread(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Weighted means of neighbours, for nodes ``(nodes, dim)``, or some of them, or each cell ``(cells, nodes, dim)``."""
        if x.ndim == 2:
            matrix = self.matrix() if rows is None else self.matrix().index_select(0, rows)
            return torch.sparse.mm(matrix, x)
        flat = x.transpose(0, 1).reshape(self.n_nodes, -1)
        return torch.sparse.mm(self.matrix(), flat).view(self.n_nodes, len(x), -1).transpose(0, 1)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Convolve ``(nodes, dim)`` or ``(cells, nodes, dim)``; only ``rows`` of the former, if given."""
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            x = layer(self.spread(x if i == 0 else F.relu(x), rows if last else None))
        return x

    def without_neighbors(self, x: Tensor) -> Tensor:
        """The same for nodes that have no edges."""
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.relu(x))
        return x


class MLP(nn.Sequential):
    """Linear layers, each followed by batch normalisation and all but the last by ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        parts: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            parts += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        super().__init__(*parts[:-1])


class Table(nn.Module):
    """Learned vectors whose norm is cut to 1 when they are looked up; in training the table itself changes, as in torch."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, dim))

    def forward(self) -> Tensor:
        """All vectors, ``(rows, dim)``."""
        rows = torch.arange(len(self.weight), device=self.weight.device)
        with torch.no_grad():
            cut = self.weight if self.training else self.weight.detach().clone()
            torch.embedding_renorm_(cut, rows, _MAX_NORM, 2.0)
        return self.weight if self.training else cut


class GearsNetwork(nn.Module):
    """Expression after perturbations from expression before, states of genes, and graphs of genes.

    Parameters
    ----------
    config
        Hyper-parameters.
    go
        Graph over the genes that can be perturbed, such as that of shared Gene Ontology terms.
    coexpression
        Graph over the genes that are predicted; needed unless ``positions="none"``.
    places
        Place of each gene that can be perturbed among those that are predicted, -1 for none, ``(n_perturbations,)``; needed
        with ``indicator``.

    Raises
    ------
    ValueError
        If a graph or ``places`` is missing, or does not fit the config.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024); Hao et al., scFoundation, Nature Methods 21, 1481 (2024);
    Zeng et al., CellFM, Nature Communications 16, 4679 (2025); Bai et al., scLong, 2024.
    """

    def __init__(
        self,
        config: GearsConfig,
        go: Graph,
        coexpression: Graph | None = None,
        places: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden, n_genes = config.hidden, config.n_genes
        _check_graph(go, config.n_perturbations, "go")
        self.genes = None if config.states else Table(n_genes, hidden)
        self.project = None
        if config.entry == "norm":
            if config.states not in (0, hidden):
                self.project = nn.Linear(config.states, hidden)
            self.state_norm = nn.BatchNorm1d(hidden)
        else:
            self.entry = MLP([config.states, config.entry_hidden, hidden])
        self.positions = None
        if config.positions != "none":
            if coexpression is None:
                msg = f"positions={config.positions!r} needs a graph of co-expression"
                raise ValueError(msg)
            _check_graph(coexpression, n_genes, "coexpression")
            self.positions = Table(n_genes, hidden) if config.positions == "table" else nn.Identity()
            self.coexpression = GraphConvolution(hidden, n_genes, coexpression, config.n_coexpression_layers)
            self.mix = MLP([hidden, hidden, hidden])
        self.perturbations = Table(config.n_perturbations, hidden)
        self.go = GraphConvolution(hidden, config.n_perturbations, go, config.n_go_layers)
        self.fuse = MLP([hidden, hidden, hidden])
        self.indicator = None
        if config.indicator:
            if places is None or places.shape != (config.n_perturbations,) or int(places.max()) >= n_genes:
                msg = f"indicator=True needs places= of shape {(config.n_perturbations,)}, each below {n_genes}"
                raise ValueError(msg)
            self.indicator = nn.Linear(1, hidden)
            self.indicator_norm = nn.BatchNorm1d(hidden)
            self.register_buffer("places", places.long().clone())
        self.norm = nn.BatchNorm1d(hidden)
        self.recover = MLP([hidden, 2 * hidden, hidden])
        # one linear readout for each gene; the shapes are those of the authors' files
        self.gene_weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_genes, hidden, 1)))
        self.gene_bias = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_genes, 1)))
        self.cross = MLP([n_genes, hidden, hidden])
        self.cross_weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, n_genes, hidden + 1)))
        self.cross_bias = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, n_genes)))

    # -- parts, so that many perturbations of the same cells share the work ----------------------------------------------

    def cell_states(self, states: Tensor | None, n_cells: int, *, first_cell_only: bool = False) -> Tensor:
        """States of genes before any perturbation, ``(cells, genes, hidden)``.

        Parameters
        ----------
        states
            States of a foundation model, ``(cells, genes, dim)``; ``None`` without one.
        n_cells
            Number of cells, for networks without states.
        first_cell_only
            The graph of co-expression reaches the first cell of the batch only, as in the authors' code, where numbers depend
            on the order of cells.

        Raises
        ------
        ValueError
            If states are missing, superfluous or of another shape.
        """
        config = self.config
        if (states is None) != (config.states == 0):
            msg = "this network needs states of genes" if states is None else "this network takes no states of genes"
            raise ValueError(msg)
        if states is not None and states.shape[1:] != (config.n_genes, config.states):
            msg = f"states have the shape {tuple(states.shape)}, not (cells, {config.n_genes}, {config.states})"
            raise ValueError(msg)
        if config.entry == "mlp":
            return self._rows(self.entry, states)
        # without states the vectors are the same in all cells, and so are means and variances over them
        x = self.genes()[None] if states is None else states
        x = x if self.project is None else self._projected(x)
        plain = x
        x = F.relu(
            self._rows(self.state_norm, x if states is not None or not self.training else x.expand(n_cells, -1, -1))
        )
        if self.positions is not None:
            moved = self.positions()[None] if config.positions == "table" else plain
            around = self.coexpression(moved)
            if first_cell_only:
                alone = self.coexpression.without_neighbors(moved).expand(n_cells, -1, -1)
                around = torch.cat([around[:1], alone[1:]])
            x = x + _POSITION_SHARE * around
            x = self._rows(self.mix, x)
        return x.expand(n_cells, -1, -1)

    def _projected(self, states: Tensor) -> Tensor:
        weight, bias = self.project.weight, self.project.bias
        if self.config.frozen_projection:
            # whoever trains the network may let all of its weights have gradients
            weight, bias = weight.detach(), bias.detach()
        return F.linear(states, weight, bias)

    def perturbation_vectors(self, numbers: Tensor | None = None) -> Tensor:
        """Vectors of the genes that can be perturbed, after the graph, or of those with some numbers, ``(genes, hidden)``."""
        return self.go(self.perturbations(), numbers)

    def effects(self, vectors: Tensor, perturbed: Tensor) -> Tensor:
        """What perturbations add to the state of every gene, ``(cells, hidden)``; zero for control cells.

        Parameters
        ----------
        vectors
            Result of :meth:`perturbation_vectors`.
        perturbed
            Rows of ``vectors`` that belong to each cell, filled with -1, ``(cells, most)``.
        """
        there = perturbed >= 0
        summed = (vectors[perturbed.clamp_min(0)] * there.unsqueeze(-1)).sum(1)
        any_there = there.any(1)
        if self.indicator is not None:
            return self.fuse(summed) * any_there.unsqueeze(-1)
        out = torch.zeros_like(summed)
        rows = torch.nonzero(any_there).squeeze(1)
        if len(rows):
            # batch normalisation needs two rows; upstream repeats a single one
            some = summed[rows] if len(rows) > 1 else summed[rows].expand(2, -1)
            out = out.index_copy(0, rows, self.fuse(some)[: len(rows)])
        return out

    def respond(self, states: Tensor, effects: Tensor, perturbed: Tensor, expression: Tensor) -> Tensor:
        """Expression after the perturbation, ``(cells, genes)``.

        Parameters
        ----------
        states
            Result of :meth:`cell_states`.
        effects
            Result of :meth:`effects`.
        perturbed
            As in :meth:`effects`.
        expression
            Expression of the control cells, ``(cells, genes)``.
        """
        if not self.training and len(states) > 1 and states.stride(0) == 0:
            # without a foundation model cells have the same states, so that a perturbation adds the same to all of them
            kinds, which = torch.unique(perturbed, dim=0, return_inverse=True)
            one = torch.zeros(len(kinds), dtype=which.dtype, device=which.device)
            one = one.scatter_(0, which, torch.arange(len(which), device=which.device))
            return self._change(states[one], effects[one], kinds)[which] + expression
        return self._change(states, effects, perturbed) + expression

    def _change(self, states: Tensor, effects: Tensor, perturbed: Tensor) -> Tensor:
        """What is added to the expression before, ``(cells, genes)``."""
        x = states + effects.unsqueeze(1)
        if self.indicator is not None:
            x = x + self.indicator(self.flags(perturbed).to(x).unsqueeze(-1))
            x = F.relu(self._rows(self.indicator_norm, x))
        x = F.relu(self._rows(self.norm, x))
        x = self._rows(self.recover, x)
        gene = (x * self.gene_weight.squeeze(-1)).sum(-1) + self.gene_bias.squeeze(-1)
        weight = self.cross_weight[0]
        return gene * weight[:, 0] + self.cross(gene) @ weight[:, 1:].T + self.cross_bias[0]

    def flags(self, perturbed: Tensor) -> Tensor:
        """1 at the perturbed genes that are predicted, too, ``(cells, genes)``."""
        place = torch.where(perturbed >= 0, self.places[perturbed.clamp_min(0)], NO_PERTURBATION)
        # what has no place goes into a column that is cut off
        out = torch.zeros(len(perturbed), self.config.n_genes + 1, device=perturbed.device)
        return out.scatter_(1, torch.where(place >= 0, place, self.config.n_genes), 1.0)[:, :-1]

    def forward(
        self, expression: Tensor, perturbed: Tensor, states: Tensor | None = None, *, first_cell_only: bool = False
    ) -> Tensor:
        """Expression after perturbations, ``(cells, genes)``.

        Parameters
        ----------
        expression
            Expression of the control cells, ``(cells, genes)``.
        perturbed
            Numbers of the perturbed genes of each cell, filled with -1, ``(cells, most)``; a row of -1 is a control cell.
        states, first_cell_only
            As in :meth:`cell_states`.
        """
        before = self.cell_states(states, len(expression), first_cell_only=first_cell_only)
        # few of the many genes that can be perturbed are in a mini-batch
        numbers, rows = torch.unique(perturbed.clamp_min(0), return_inverse=True)
        vectors = self.perturbation_vectors(numbers)
        effects = self.effects(vectors, torch.where(perturbed >= 0, rows, NO_PERTURBATION))
        return self.respond(before, effects, perturbed, expression)

    @staticmethod
    def _rows(module: nn.Module, x: Tensor) -> Tensor:
        """Apply a module for rows to ``(cells, genes, dim)``."""
        return module(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _check_graph(graph: Graph, n_nodes: int, name: str) -> None:
    if graph.edges.ndim != 2 or len(graph.edges) != 2 or graph.edges.shape[1:] != graph.weight.shape:
        msg = f"the graph {name}= needs edges (2, n) and n weights, not {tuple(graph.edges.shape)} and {tuple(graph.weight.shape)}"
        raise ValueError(msg)
    if graph.edges.numel() and (int(graph.edges.min()) < 0 or int(graph.edges.max()) >= n_nodes):
        msg = f"the graph {name}= has an edge to a node that is not among the {n_nodes}"
        raise ValueError(msg)


def fresh_network(config: GearsConfig, seed: int, *graphs: Graph | Tensor | None) -> GearsNetwork:
    """A network with fresh weights; the global random state is neither used nor changed."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return GearsNetwork(config, *graphs)
