"""The network of DeepCE: expression signatures of drugs from their molecules, with gene vectors of any model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.ragged import pad
from .molecules import ATOM_FEATURES, BOND_FEATURES, MAX_DEGREE, MoleculeBatch

if TYPE_CHECKING:
    from torch import Tensor

# added to the scores of padded atoms
_FAR = -1e10


@dataclass(frozen=True)
class DeepCEConfig:
    """Every hyper-parameter of DeepCE; the defaults are those of scLong's code.

    Parameters
    ----------
    gene_dim
        Width of the gene vectors.
    n_cell_lines, n_doses
        Number of cell lines and of doses.
    dim
        Width of genes and atoms (paper of scLong: 512).
    hidden
        Width before the output (paper: 648).
    heads, layers, feedforward
        Heads, layers and inner width of the attention between genes and atoms.
    convolutions
        Widths of the graph convolutions (paper: 128, 128, 128).
    condition_dim
        Width of cell line and dose each.
    dropout
        Dropout of the attention.

    Raises
    ------
    ValueError
        If a size makes no sense.
    """

    gene_dim: int
    n_cell_lines: int
    n_doses: int
    dim: int = 128
    hidden: int = 128
    heads: int = 4
    layers: int = 2
    feedforward: int = 512
    convolutions: tuple[int, ...] = (16, 16)
    condition_dim: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "convolutions", tuple(self.convolutions))
        sizes = (self.gene_dim, self.n_cell_lines, self.n_doses, self.dim, self.hidden, self.heads, self.layers)
        if min(*sizes, self.feedforward, self.condition_dim, *self.convolutions) < 1 or self.dim % self.heads:
            msg = f"sizes of the network must be positive, and dim ({self.dim}) a multiple of heads ({self.heads})"
            raise ValueError(msg)
        if not 0 <= self.dropout < 1:
            msg = f"dropout must be at least 0 and below 1; got {self.dropout}"
            raise ValueError(msg)


class AtomConvolution(nn.Module):
    """Convolution on molecules with weights of their own for each number of neighbours.

    Parameters
    ----------
    dim
        Width of the atoms.
    width
        Width of the result.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(dim, width, bias=False)
        self.by_degree = nn.Parameter(torch.empty(MAX_DEGREE + 1, width, dim + BOND_FEATURES))
        self.bias = nn.Parameter(torch.zeros(1, width))
        self.norm = nn.BatchNorm1d(width, affine=False)
        for weight in self.by_degree:
            nn.init.xavier_uniform_(weight)

    def forward(self, atoms: Tensor, batch: MoleculeBatch) -> Tensor:
        """New vectors of the atoms, ``(atoms, width)``."""
        along = torch.cat([atoms[batch.source], batch.bonds[batch.bond]], 1)
        near = along.new_zeros(len(atoms), along.shape[1]).index_add(0, batch.target, along)
        degrees = batch.degrees
        out = self.own(atoms) + self.bias
        for degree, weight in enumerate(self.by_degree):
            rows = (degrees == degree).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, near[rows] @ weight.T)
        # one atom has no variance; its running statistics serve
        if self.training and len(out) == 1:
            return F.batch_norm(out, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps).relu()
        return self.norm(out).relu()


class NeuralFingerprint(nn.Module):
    """Vectors of atoms that a network can learn, the fingerprint of a molecule being their sum.

    Parameters
    ----------
    dim
        Width.
    convolutions
        Widths of the graph convolutions.
    """

    def __init__(self, dim: int, convolutions: tuple[int, ...]) -> None:
        super().__init__()
        widths = (ATOM_FEATURES, *convolutions)
        self.convolutions = nn.ModuleList(
            AtomConvolution(before, after) for before, after in zip(widths, convolutions, strict=False)
        )
        self.outputs = nn.ModuleList(nn.Linear(width, dim) for width in widths)

    def forward(self, batch: MoleculeBatch) -> Tensor:
        """Vectors of the atoms, molecule after molecule, ``(atoms, dim)``."""
        x = batch.atoms
        out = self.outputs[0](x).softmax(-1)
        for convolution, output in zip(self.convolutions, self.outputs[1:], strict=True):
            x = convolution(x, batch)
            out = out + output(x).softmax(-1)
        return out


class Attention(nn.Module):
    """Attention of genes to something, with separate projections."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor, padding: Tensor | None = None) -> Tensor:
        """``x`` of shape ``(batch, genes, dim)`` looks at ``other``, ``(batch, length, dim)``."""
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, other), (self.value, other))
        )
        mask = None if padding is None else torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, _FAR)
        mask = None if mask is None else mask[:, None, None]
        # all molecules have the genes in common as long as these have not looked at any
        n = max(len(q), len(k))
        q, k, v = (y.expand(n, -1, -1, -1) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(out.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    """Genes look at the atoms of a molecule and at each other; one norm serves both residuals."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.among_genes = Attention(dim, heads, dropout)
        self.to_atoms = Attention(dim, heads, dropout)
        self.join = nn.Linear(2 * dim, dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, genes: Tensor, atoms: Tensor, padding: Tensor | None) -> Tensor:
        """New states of the genes, ``(molecules, genes, dim)``."""
        if self.training:
            genes = genes.expand(len(atoms), -1, -1)
        to_atoms = self.to_atoms(genes, atoms, padding)
        among = self.among_genes(genes, genes).expand(len(atoms), -1, -1)
        genes = self.norm(genes + self.dropout(self.join(torch.cat([to_atoms, among], -1)).relu()))
        return self.norm(genes + self.dropout(self.feedforward(genes)))


class DeepCE(nn.Module):
    """DeepCE (Pham et al., Nature Machine Intelligence 2021) in the form of scLong.

    Parameters
    ----------
    config
        Hyper-parameters.
    genes
        Vectors of the genes, ``(genes, gene_dim)``, which are not trained.
    seed
        Seed of the weights; the global random state is neither used nor changed.

    Raises
    ------
    ValueError
        If the vectors do not fit the config.
    """

    genes: Tensor

    def __init__(self, config: DeepCEConfig, genes: Tensor, *, seed: int = 0) -> None:
        super().__init__()
        if genes.ndim != 2 or genes.shape[1] != config.gene_dim or not len(genes):
            msg = f"gene vectors need the shape (genes, {config.gene_dim}), not {tuple(genes.shape)}"
            raise ValueError(msg)
        self.config = config
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.fingerprint = NeuralFingerprint(config.dim, config.convolutions)
            self.gene_input = nn.Linear(config.gene_dim, config.dim)
            self.layers = nn.ModuleList(
                AttentionLayer(config.dim, config.heads, config.feedforward, config.dropout)
                for _ in range(config.layers)
            )
            self.gene_output = nn.Linear(config.dim, config.dim)
            self.cell_line = nn.Linear(config.n_cell_lines, config.condition_dim)
            self.dose = nn.Linear(config.n_doses, config.condition_dim)
            self.hidden = nn.Linear(2 * config.dim + 2 * config.condition_dim, config.hidden)
            self.output = nn.Linear(config.hidden, 1)
            for name, parameter in self.named_parameters():
                # the attention keeps torch's own start, as the authors leave it; convolutions have theirs already
                if name.startswith(("layers.", "gene_output.")) or name.endswith("by_degree"):
                    continue
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.xavier_uniform_(parameter)
        self.register_buffer("genes", genes.detach().clone())

    def states(self, batch: MoleculeBatch) -> tuple[Tensor, Tensor]:
        """What genes and molecules are to each other, whatever the cell line and the dose.

        Returns
        -------
        States of the genes, ``(molecules, genes, dim)``, and vectors of the molecules, ``(molecules, dim)``.
        """
        atoms, padding = pad(self.fingerprint(batch), batch.lengths)
        genes = self.gene_input(self.genes)[None]
        for layer in self.layers:
            genes = layer(genes, atoms, padding)
        return self.gene_output(genes), atoms.sum(1)

    def respond(self, genes: Tensor, molecules: Tensor, cell_lines: Tensor, doses: Tensor) -> Tensor:
        """Signatures ``(samples, genes)`` from what :meth:`states` gives, one row for each sample.

        Parameters
        ----------
        genes, molecules
            States of the genes and vectors of the molecules.
        cell_lines, doses
            Which they are, as indicators, ``(samples, n_cell_lines)`` and ``(samples, n_doses)``.
        """
        rest = torch.cat([molecules, self.cell_line(cell_lines), self.dose(doses)], 1)
        # the same as one layer on all of it side by side, which would repeat the rest for every gene
        width = self.config.dim
        own = F.linear(genes.relu(), self.hidden.weight[:, :width])
        shared = F.linear(rest.relu(), self.hidden.weight[:, width:], self.hidden.bias)
        return self.output((own + shared[:, None]).relu()).squeeze(-1)

    def forward(self, batch: MoleculeBatch, cell_lines: Tensor, doses: Tensor) -> Tensor:
        """Signatures ``(samples, genes)``, one molecule for each sample."""
        return self.respond(*self.states(batch), cell_lines, doses)
