"""Hyper-parameters of CellFM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ClassHead = Literal["", "retention", "mlp"]
Compat = Literal["", "torch-port"]

HEAD_DIM = 32


@dataclass(frozen=True)
class CellFMConfig:
    """Every hyper-parameter of CellFM; the defaults are those of the released 80M model.

    Parameters
    ----------
    n_genes
        Number of genes. Gene ``i`` of the list has row ``i + 1`` of the gene table; row 0 is padding.
    dim
        Width of all vectors.
    n_heads
        Number of heads.
    n_layers
        Number of layers.
    n_bins
        Learned vectors that the value encoder mixes.
    lora_rank
        Rank of low-rank updates of all projections of the encoder; 0 for none.
    has_cls
        Whether there is a CLS token, without which there are no cell embeddings.
    has_zero_embedding
        Whether there is an embedding of sampled genes without expression, which training uses.
    has_depth_tokens
        Whether there are tokens S and T for the read depth.
    has_gene_decoder
        Whether there is a decoder of expression from the states of gene tokens.
    has_cell_decoder
        Whether there is a decoder of expression from the CLS state.
    has_zero_heads
        Whether the decoders predict the probability that a gene is expressed, too.
    class_head
        Head of a classifier: ``"retention"`` as the authors fine-tune it, ``"mlp"`` as their PyTorch port does, or
        ``""`` for none.
    n_classes
        Number of classes of that head.
    n_head_layers
        Layers of the ``"retention"`` head.
    leaky_slope
        Slope of all leaky ReLUs for negative numbers.
    ln_eps
        Constant of all LayerNorms.
    dropout
        Dropout of the last layer in training; it grows from 0 linearly with depth.
    compat
        ``"torch-port"`` leaves the read depths out of the tokens S and T outside of training, as the authors' PyTorch
        port does.
    mask_ratio
        Share of the expressed genes that pre-training predicts.
    hidden_share
        Share of these that the encoder does not see.
    """

    n_genes: int = 27855
    dim: int = 1536
    n_heads: int = 48
    n_layers: int = 2
    n_bins: int = 256
    lora_rank: int = 0
    has_cls: bool = True
    has_zero_embedding: bool = True
    has_depth_tokens: bool = True
    has_gene_decoder: bool = True
    has_cell_decoder: bool = True
    has_zero_heads: bool = False
    class_head: ClassHead = ""
    n_classes: int = 0
    n_head_layers: int = 2
    leaky_slope: float = 0.2
    ln_eps: float = 1e-7
    dropout: float = 0.1
    compat: Compat = ""
    mask_ratio: float = 0.2
    hidden_share: float = 0.8

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.dim % self.n_heads:
            msg = f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})"
            raise ValueError(msg)
        if self.class_head not in ("", "retention", "mlp"):
            msg = f"class_head must be 'retention', 'mlp' or ''; got {self.class_head!r}"
            raise ValueError(msg)
        if bool(self.class_head) != (self.n_classes > 0):
            msg = f"class_head={self.class_head!r} does not go with n_classes={self.n_classes}"
            raise ValueError(msg)
        if self.compat not in ("", "torch-port"):
            msg = f"compat must be 'torch-port' or ''; got {self.compat!r}"
            raise ValueError(msg)

    @property
    def n_rows(self) -> int:
        """Rows of the gene table: padding and all genes, rounded up to a multiple of 8."""
        return rows_for(self.n_genes)

    @property
    def cls_id(self) -> int:
        """Id that stands for the CLS token where positions are chosen by id."""
        return self.n_genes + 1

    @property
    def alpha(self) -> float:
        """Weight of the residual stream (DeepNorm)."""
        return (2 * self.n_layers) ** 0.25


def rows_for(n_genes: int) -> int:
    """Rows of the gene table of a model with so many genes."""
    return -(-(n_genes + 1) // 8) * 8


PRESETS: dict[str, CellFMConfig] = {
    "cellfm-80m": CellFMConfig(),
    "cellfm-800m": CellFMConfig(n_genes=24078, n_layers=40, has_depth_tokens=False),
}
