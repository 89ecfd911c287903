"""Hyper-parameters of scGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ValueStyle = Literal["continuous", "category", "scaling"]
MVCStyle = Literal["inner product", "inner product, detach", "concat query", "sum query"]
NormStyle = Literal["none", "batchnorm", "dsbn", "dsbn-affine"]
NORM_STYLES: tuple[NormStyle, ...] = get_args(NormStyle)

# in the order in which scGPT appends them to a vocabulary
SPECIALS = ("<pad>", "<cls>", "<eoc>")
# larger values are cut to it before they are embedded
MAX_VALUE = 512


@dataclass(frozen=True)
class SCGPTConfig:
    """Every hyper-parameter of the scGPT network and its input (Cui et al., Nature Methods 2024).

    The defaults are those of the released whole-human model.

    Parameters
    ----------
    dim, n_heads, ffn_dim, n_layers
        Width, attention heads, hidden width of the feed-forward block, transformer layers.
    dropout
        Dropout in training, also on attention weights.
    n_bins
        Bin 0 is "not expressed"; expressed values get 1 to ``n_bins - 1``.
    max_length
        Tokens per cell, ``<cls>`` included.
    pad_token, cls_token
        Names of the special tokens in the vocabulary.
    pad_value, mask_value
        What the value channel holds at padded (and ``<cls>``) and at masked positions.
    value_style
        ``"continuous"`` (an MLP on the bin number; all released models), ``"category"`` (an embedding of
        ``n_value_bins`` bins) or ``"scaling"`` (the value multiplies the gene embedding).
    n_value_bins
        Rows of the bin embedding of ``value_style="category"``.
    pre_norm
        The unusual order of scGPT's flash layer with ``pre_norm``; no released model uses it.
    input_norm
        Batch normalisation of the summed embedding: none, one affine, or one per batch label.
    n_batches
        Batch labels of the batch encoder, the domain norms and the discriminator; 0 for none.
    use_batch_labels
        Whether the decoders also see a batch embedding.
    explicit_zeros
        Whether the decoders predict P(non-zero) beside the value.
    mvc
        Decoder from the cell embedding, or ``None``.
    n_classes, n_class_layers
        Classes of the cell-type head (0 for no head) and its depth.
    discriminator
        Whether the adversarial batch classifier is present.
    query_flag
        Whether the flag embedding of generative pre-training is present (all released pre-trained models).
    ecs_threshold
        Threshold of the elastic cell similarity loss.
    multiomic
        Whether the decoder from the cell embedding also sees batch (and modality) on the side of the gene, as in
        scGPT's multi-omic network; its weights then have other shapes.
    modalities
        Names of the modalities, special tokens included, whose embedding the decoders of a multi-omic network see.
        They have no part in the cell embedding.
    perturbation_flags
        Rows of the embedding that marks perturbed genes, 3 in all files of scGPT (1 for "perturbed", 0 for "not"); 0 for
        networks that predict no responses to perturbations.
    frozen_flag
        Row of that embedding that is zero in new networks and is not trained; ``None`` for none.
    affine_decoder
        Whether the decoder gives a factor for the value before the perturbation and a shift (scGPT >= 0.2.2), in place of a
        value (the preprint).
    decoder_activation, adaptive_shift
        Activation of both and scaling of the shift, see ``AffineDecoder``.
    input_bins
        Number of bins, zero included, in which a network for perturbations sees values, while its decoder sees the values
        themselves; 0 for values in both places, as in all published networks.
    """

    dim: int = 512
    n_heads: int = 8
    ffn_dim: int = 512
    n_layers: int = 12
    dropout: float = 0.2
    n_bins: int = 51
    max_length: int = 1200
    pad_token: str = "<pad>"
    cls_token: str = "<cls>"
    pad_value: float = -2.0
    mask_value: float = -1.0
    value_style: ValueStyle = "continuous"
    n_value_bins: int = 53
    pre_norm: bool = False
    input_norm: NormStyle = "none"
    n_batches: int = 0
    use_batch_labels: bool = False
    explicit_zeros: bool = False
    mvc: MVCStyle | None = "inner product"
    n_classes: int = 0
    n_class_layers: int = 3
    discriminator: bool = False
    query_flag: bool = True
    ecs_threshold: float = 0.8
    multiomic: bool = False
    modalities: tuple[str, ...] = ()
    perturbation_flags: int = 0
    frozen_flag: int | None = None
    affine_decoder: bool = False
    decoder_activation: str = ""
    adaptive_shift: bool = False
    input_bins: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))  # JSON has lists only
        if self.dim % self.n_heads:
            msg = f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})"
            raise ValueError(msg)
        if self.explicit_zeros and self.mvc in ("concat query", "sum query"):
            msg = f"the decoder {self.mvc!r} has no explicit zeros; use mvc='inner product'"
            raise ValueError(msg)
        if self.n_bins < 3:
            msg = f"n_bins must be at least 3; got {self.n_bins}"
            raise ValueError(msg)
        if self.input_bins and not 3 <= self.input_bins <= self._most_bins:
            msg = f"input_bins must be 0, or a number from 3 to {self._most_bins:,}; got {self.input_bins}"
            raise ValueError(msg)
        if self.modalities and not self.multiomic:
            msg = "modalities are part of the multi-omic network only; set multiomic=True"
            raise ValueError(msg)
        if self.modalities and not {self.pad_token, self.cls_token} <= set(self.modalities):
            msg = (
                f"modalities must hold the special tokens {self.pad_token!r} and {self.cls_token!r}; make them with "
                "scfm.backbones.scgpt.modality.modality_names"
            )
            raise ValueError(msg)
        if self.affine_decoder and (self.explicit_zeros or self.use_batch_labels or self.modalities):
            msg = "the affine decoder goes with neither explicit zeros nor labels of batches or modalities"
            raise ValueError(msg)
        if self.decoder_activation and not hasattr(nn, self.decoder_activation):
            msg = f"decoder_activation must be the name of a module of torch.nn; got {self.decoder_activation!r}"
            raise ValueError(msg)
        if len(set(self.modalities)) < len(self.modalities):
            msg = f"each modality needs a name of its own; got {', '.join(self.modalities)}"
            raise ValueError(msg)

    @property
    def _most_bins(self) -> int:
        """Rows for bins, if they are looked up in a table; else what the linear layers see without being cut."""
        return self.n_value_bins if self.value_style == "category" else MAX_VALUE


PRESETS: dict[str, SCGPTConfig] = {"scgpt": SCGPTConfig()}


def infer_config(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> SCGPTConfig:
    """Derive the config from our state-dict keys, and from upstream's ``args.json`` what shapes cannot tell.

    Parameters
    ----------
    state
        Tensors under our names.
    args
        Names as in ``args.json`` or in the constructor of upstream's ``TransformerModel``. ``nheads`` is required.
    """
    if "nheads" not in args:
        msg = "the number of attention heads cannot be read from the weights; args.json must hold 'nheads'"
        raise KeyError(msg)
    dim = state["genes.embedding.weight"].shape[1]
    layers = {int(key.split(".")[1]) for key in state if key.startswith("layers.")}
    style: ValueStyle = "scaling"
    if "values.linear1.weight" in state:
        style = "continuous"
    elif "values.embedding.weight" in state:
        style = "category"
    domains = {int(key.split(".")[1]) for key in state if key.startswith("domain_norms.")}
    norm: NormStyle = "none"
    if domains:
        norm = "dsbn-affine" if "domain_norms.0.weight" in state else "dsbn"
    elif "batch_norm.weight" in state:
        norm = "batchnorm"
    batch_rows = [len(domains)]
    batch_rows += [
        state[key].shape[0] for key in ("batches.embedding.weight", "discriminator.out.weight") if key in state
    ]
    class_layers = [key for key in state if key.startswith("classifier.hidden.") and state[key].ndim == 2]
    query_width = state["mvc.gene2query.weight"].shape[1] if "mvc.gene2query.weight" in state else dim
    modalities = _modalities(state, args)
    return SCGPTConfig(
        dim=dim,
        n_heads=int(args["nheads"]),
        ffn_dim=state["layers.0.linear1.weight"].shape[0],
        n_layers=len(layers),
        dropout=float(args.get("dropout", 0.2)),
        n_bins=int(args.get("n_bins", 51)),
        max_length=int(args.get("max_seq_len", 1200)),
        pad_token=str(args.get("pad_token", "<pad>")),
        pad_value=float(args.get("pad_value", -2)),
        mask_value=float(args.get("mask_value", -1)),
        value_style=style,
        n_value_bins=state["values.embedding.weight"].shape[0] if style == "category" else 53,
        pre_norm=bool(args.get("pre_norm", False)),
        input_norm=norm,
        n_batches=max(batch_rows),
        use_batch_labels="batches.embedding.weight" in state,
        explicit_zeros="decoder.zero_logit.0.weight" in state,
        mvc=_mvc_style(state, args, query_width),
        n_classes=state["classifier.out.weight"].shape[0] if "classifier.out.weight" in state else 0,
        n_class_layers=len(class_layers) + 1,
        discriminator="discriminator.out.weight" in state,
        query_flag="query_flag.weight" in state,
        ecs_threshold=float(args.get("ecs_threshold", 0.8)),
        multiomic=bool(modalities) or query_width > dim,
        modalities=modalities,
        **_perturbation(state, args),
    )


def _perturbation(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a network for perturbations; ``pert_pad_id`` and the like are names of upstream's constructor."""
    if "flags.weight" not in state:
        return {}
    rows = len(state["flags.weight"])
    return {
        "perturbation_flags": rows,
        # the default of upstream's class is the last row
        "frozen_flag": int(args.get("pert_pad_id", rows - 1)),
        "affine_decoder": "decoder.factor.0.weight" in state,
        "decoder_activation": str(args.get("decoder_activation") or ""),
        "adaptive_shift": bool(args.get("decoder_adaptive_bias", False)),
        "input_bins": int(args.get("n_input_bins") or 0),
    }


def _modalities(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in the order of their ids, from ``vocab_mod``; numbers with the special tokens behind them without it."""
    if "modalities.embedding.weight" not in state:
        return ()
    n = len(state["modalities.embedding.weight"])
    given = args.get("vocab_mod")
    if given is None:
        return (*(f"modality_{i}" for i in range(n - len(SPECIALS))), *SPECIALS)
    if sorted(given.values()) != list(range(n)):
        msg = f"vocab_mod must give the ids 0 to {n - 1} to the modalities of the weights; got {dict(given)}"
        raise ValueError(msg)
    return tuple(sorted(given, key=given.__getitem__))


def _mvc_style(state: Mapping[str, Tensor], args: Mapping[str, Any], query_width: int) -> MVCStyle | None:
    if "mvc.W.weight" in state:
        return "inner product, detach" if "detach" in str(args.get("mvc_decoder_style", "")) else "inner product"
    if "mvc.fc1.weight" in state:
        return "sum query" if state["mvc.fc1.weight"].shape[1] == query_width else "concat query"
    return None
