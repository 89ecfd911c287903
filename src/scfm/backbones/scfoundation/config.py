"""Hyper-parameters of scFoundation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...nn.linear_attention import default_features

if TYPE_CHECKING:
    from collections.abc import Mapping

LayerKind = Literal["transformer", "performer"]


@dataclass(frozen=True)
class SCFoundationConfig:
    """Every hyper-parameter of the scFoundation network (Hao et al., Nature Methods 2024).

    The defaults are those of the released model of 100 million parameters.

    Parameters
    ----------
    n_genes
        Genes of the vocabulary. Position ``n_genes`` is the token T (wanted depth), ``n_genes + 1`` is S (depth of
        the input), and one more row of the gene table belongs to padding.
    encoder_dim, encoder_depth, encoder_heads, encoder_dim_head
        Width, layers, heads and head width of the encoder. Transformer layers split their width evenly over the
        heads; the head width counts for Performer layers only.
    encoder_layer
        ``"transformer"`` (post-norm, softmax attention) or ``"performer"`` (pre-norm, linear attention).
    encoder_ff_dropout, encoder_attention_dropout
        Dropout of Performer layers in training.
    decoder_dim, decoder_depth, decoder_heads, decoder_dim_head, decoder_layer
        The same for the decoder.
    decoder_ff_dropout, decoder_attention_dropout
        Dropout of Performer layers in training.
    transformer_dropout
        Dropout of transformer layers in training, also on attention weights.
    n_bins
        Learned vectors that the value embedding mixes.
    bin_alpha
        Weight of the hidden layer in the mixing logits.
    mask_value, pad_value
        Numbers that stand for "masked" and "padding" in the value channel.
    value_mask_prob, zero_mask_prob
        Probability that an expressed and an unexpressed gene is masked in pre-training.
    replace_prob, random_token_prob
        Share of the masked genes that get the mask value, and that get a random value; the others keep theirs.
    max_encoder_length
        Longest encoder input in pre-training; inference has no limit.
    n_classes
        Classes of the classifier of a fine-tuned model; 0 for none.
    padded_pooling
        The classifier takes the maximum over padded positions, too, as the authors' class does.
    """

    n_genes: int = 19264
    encoder_dim: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    encoder_dim_head: int = 64
    encoder_layer: LayerKind = "transformer"
    encoder_ff_dropout: float = 0.0
    encoder_attention_dropout: float = 0.0
    decoder_dim: int = 512
    decoder_depth: int = 6
    decoder_heads: int = 8
    decoder_dim_head: int = 64
    decoder_layer: LayerKind = "performer"
    decoder_ff_dropout: float = 0.0
    decoder_attention_dropout: float = 0.0
    transformer_dropout: float = 0.1
    n_bins: int = 100
    bin_alpha: float = 1.0
    mask_value: float = 102.0
    pad_value: float = 103.0
    value_mask_prob: float = 0.3
    zero_mask_prob: float = 0.03
    replace_prob: float = 0.8
    random_token_prob: float = 0.1
    max_encoder_length: int = 15000
    n_classes: int = 0
    padded_pooling: bool = False

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            dim, heads, kind, dim_head = (
                getattr(self, f"{side}_{name}") for name in ("dim", "heads", "layer", "dim_head")
            )
            if kind not in ("transformer", "performer"):
                msg = f"{side}_layer must be 'transformer' or 'performer'; got {kind!r}"
                raise ValueError(msg)
            if kind == "transformer" and dim % heads:
                msg = f"{side}_dim ({dim}) must be a multiple of {side}_heads ({heads})"
                raise ValueError(msg)
            if kind == "performer" and default_features(dim_head) < 1:
                msg = f"{side}_dim_head must be at least 2 for linear attention; got {dim_head}"
                raise ValueError(msg)
        if self.padded_pooling and (self.encoder_layer != "transformer" or self.n_positions < self.pad_value):
            msg = f"padded_pooling needs a transformer encoder and more than {self.pad_value:.0f} positions"
            raise ValueError(msg)
        if self.mask_value == self.pad_value:
            msg = f"mask_value and pad_value must differ; both are {self.mask_value}"
            raise ValueError(msg)

    @property
    def target_id(self) -> int:
        """Position of the token T, the wanted read depth."""
        return self.n_genes

    @property
    def source_id(self) -> int:
        """Position of the token S, the read depth of the input."""
        return self.n_genes + 1

    @property
    def n_positions(self) -> int:
        """Length of the decoder's sequence: all genes, T and S."""
        return self.n_genes + 2

    @property
    def pad_id(self) -> int:
        """Row of the gene table that stands for padding."""
        return self.n_genes + 2

    @classmethod
    def from_upstream(cls, values: Mapping[str, Any]) -> SCFoundationConfig:
        """Read the ``config`` of an official checkpoint, nested or already merged.

        Parameters
        ----------
        values
            Either the stored form, in which ``model_config[name]`` and ``dataset_config["rnaseq"]`` are merged (the
            data set wins), or that merged form itself.

        Raises
        ------
        KeyError
            If a hyper-parameter that has no default is missing.
        ValueError
            If the config asks for something that released scFoundation models do not have.
        """
        flat = _merge(values)
        if flat.get("mask_gene_name"):
            msg = "the config has mask_gene_name=True, which no released scFoundation model uses"
            raise ValueError(msg)
        n_positions = int(flat["seq_len"])
        own: dict[str, Any] = {"n_genes": n_positions - 2}
        for side in ("encoder", "decoder"):
            part = flat[side]
            own |= {f"{side}_{name}": int(part[upstream]) for name, upstream in _SIZES.items()}
            own[f"{side}_layer"] = part["module_type"]
            own[f"{side}_ff_dropout"] = float(part.get("ff_dropout", 0.0))
            own[f"{side}_attention_dropout"] = float(part.get("attn_dropout", 0.0))
        own |= {
            ours: kind(flat[upstream]) for upstream, (ours, kind) in _SCALARS.items() if flat.get(upstream) is not None
        }
        return cls(**own)


_SIZES = {"dim": "hidden_dim", "depth": "depth", "heads": "heads", "dim_head": "dim_head"}
_SCALARS = {
    "bin_num": ("n_bins", int),
    "bin_alpha": ("bin_alpha", float),
    "mask_token_id": ("mask_value", float),
    "pad_token_id": ("pad_value", float),
    "value_mask_prob": ("value_mask_prob", float),
    "zero_mask_prob": ("zero_mask_prob", float),
    "replace_prob": ("replace_prob", float),
    "random_token_prob": ("random_token_prob", float),
    "mae_encoder_max_seq_len": ("max_encoder_length", int),
}


def _merge(values: Mapping[str, Any]) -> dict[str, Any]:
    if "model_config" not in values:
        return dict(values)
    models = values["model_config"]
    name = values.get("model", next(iter(models)))
    return {**models[name], **values.get("dataset_config", {}).get("rnaseq", {})}


PRESETS: dict[str, SCFoundationConfig] = {"scfoundation": SCFoundationConfig()}
