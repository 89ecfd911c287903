"""Hyper-parameters of scLong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...nn.linear_attention import default_features

if TYPE_CHECKING:
    from collections.abc import Mapping

STACKS = ("large", "mini", "decoder")


@dataclass(frozen=True)
class SCLongConfig:
    """Every hyper-parameter of the scLong network (Bai et al., Nature Communications 2026).

    The defaults are those of the released model of one billion parameters.

    Parameters
    ----------
    n_positions
        Length of every cell: all genes of the vocabulary, and the special entry PAD, whose value is always 0.
    top_length
        Genes with the highest values that go through the large encoder; the others go through the mini encoder.
    dim
        Width of gene tokens, mini encoder and decoder.
    value_hidden
        Width of the hidden layer that embeds expression values.
    large_dim, large_depth, large_heads, large_dim_head
        Width, layers, heads and head width of the large encoder.
    mini_depth, mini_heads, mini_dim_head
        The same for the mini encoder.
    decoder_depth, decoder_heads, decoder_dim_head
        The same for the decoder, which sees all positions.
    qkv_bias
        Whether queries, keys and values of all layers have a bias.
    mask_threshold
        Values at or below this number are masked; below 0.
    gene_table
        Whether each position has a vector of its own (gene2vec, trained further), besides the graph convolution.
    n_edges
        Edges of the Gene Ontology graph.
    go_layers
        Layers of the graph convolution.
    go_max_norm
        Whether the vectors that the graph convolution starts from are cut to norm 1.
    mask_value
        Number that stands for "masked" in the value channel.
    target_share
        Share of the expressed genes that pre-training predicts.
    replace_prob
        Probability that such a gene is masked; otherwise it keeps its value.
    redraw_every
        New random features are drawn after so many training steps.
    """

    n_positions: int = 27875
    top_length: int = 4096
    dim: int = 200
    value_hidden: int = 50
    large_dim: int = 1280
    large_depth: int = 42
    large_heads: int = 32
    large_dim_head: int = 64
    mini_depth: int = 2
    mini_heads: int = 8
    mini_dim_head: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_dim_head: int = 64
    qkv_bias: bool = False
    mask_threshold: float = -1.0
    gene_table: bool = True
    n_edges: int = 0
    go_layers: int = 1
    go_max_norm: bool = False
    mask_value: float = -10.0
    target_share: float = 0.15
    replace_prob: float = 0.9
    redraw_every: int = 1000

    def __post_init__(self) -> None:
        if not 1 <= self.top_length < self.n_positions:
            msg = (
                f"top_length ({self.top_length}) must be at least 1 and less than n_positions ({self.n_positions}): "
                "the mini encoder needs a gene, too"
            )
            raise ValueError(msg)
        for stack in STACKS:
            if default_features(getattr(self, f"{stack}_dim_head")) < 1:
                msg = f"{stack}_dim_head must be at least 2 for linear attention"
                raise ValueError(msg)
        if not self.mask_value <= self.mask_threshold < 0:
            msg = (
                f"mask_threshold ({self.mask_threshold}) must be below 0, where unexpressed genes are, and mask_value "
                f"({self.mask_value}) not above it"
            )
            raise ValueError(msg)
        if self.go_layers < 1 or self.n_edges < 0:
            msg = f"go_layers must be at least 1 and n_edges at least 0; got {self.go_layers} and {self.n_edges}"
            raise ValueError(msg)

    def stack_sizes(self, stack: str) -> dict[str, int]:
        """Width, depth, heads and head width of one of the three Performers."""
        sizes = {name: getattr(self, f"{stack}_{name}") for name in ("depth", "heads", "dim_head")}
        return {"dim": self.large_dim if stack == "large" else self.dim, **sizes}

    @classmethod
    def from_upstream(cls, values: Mapping[str, Any]) -> SCLongConfig:
        """Read the hyper-parameters that an official checkpoint has in its pickle.

        Raises
        ------
        KeyError
            If one that has no default is missing.
        ValueError
            If one asks for something that released scLong models do not have, or is unknown.
        """
        values = dict(values)
        own = {ours: kind(values.pop(upstream)) for upstream, (ours, kind) in _REQUIRED.items()}
        own["n_edges"] = int(values.pop("G_go").shape[1])
        own["go_max_norm"] = not values.pop("go_use_gene2vec")
        own |= {ours: kind(values.pop(name)) for name, (ours, kind) in _OPTIONAL.items() if name in values}
        for name in _IGNORED:
            values.pop(name, None)
        refused = {name: value for name, value in values.items() if value or name not in _OFF}
        if refused:
            shown = ", ".join(f"{name}={value!r}" for name, value in refused.items())
            msg = f"the hyper-parameters {shown} are none of released scLong models, and scfm does not build them"
            raise ValueError(msg)
        return cls(**own)


_REQUIRED = {
    "max_seq_len": ("n_positions", int),
    "top_seq_len": ("top_length", int),
    "base_dim": ("dim", int),
    "mini_enc_depth": ("mini_depth", int),
    "mini_enc_heads": ("mini_heads", int),
    "mini_enc_dim_head": ("mini_dim_head", int),
    "large_dim": ("large_dim", int),
    "large_enc_depth": ("large_depth", int),
    "large_enc_heads": ("large_heads", int),
    "large_enc_dim_head": ("large_dim_head", int),
    "dec_depth": ("decoder_depth", int),
    "dec_heads": ("decoder_heads", int),
    "dec_dim_head": ("decoder_dim_head", int),
    "mask_token_thres": ("mask_threshold", float),
    "g2v_position_emb": ("gene_table", bool),
    "go_num_layers": ("go_layers", int),
}
_OPTIONAL = {"qkv_bias": ("qkv_bias", bool), "feature_redraw_interval": ("redraw_every", int)}
# the edge weights are read beside the config; the others tell where the authors trained
_IGNORED = ("G_go_weight", "device", "gene2vec_file")
# options of the Performer that change the network; fine as long as they are off
_OFF = frozenset(
    {
        *("generalized_attention", "no_projection", "causal", "local_attn_heads", "rotary_position_emb", "reversible"),
        *("ff_glu", "use_scalenorm", "use_rezero", "cross_attend", "shift_tokens", "axial_position_emb"),
        *("emb_dropout", "ff_dropout", "attn_dropout", "tie_embed"),
    }
)
REQUIRED_KEYS = frozenset({*_REQUIRED, "G_go", "G_go_weight", "go_use_gene2vec"})

PRESETS: dict[str, SCLongConfig] = {"sclong": SCLongConfig()}
