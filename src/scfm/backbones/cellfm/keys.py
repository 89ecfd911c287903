"""Names of weights in CellFM files of all origins, and ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...checkpoints.convert import KeyRule

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTS = {"k": (0, 4), "v": (1, 4), "q": (2, 4), "u": (3, 4)}
_FFN_PARTS = {"u": (0, 2), "v": (1, 2)}


def _attention(upstream: str, ours: str) -> Iterator[KeyRule]:
    """Rules of one set of retention projections; the groups before the last belong to ``upstream``."""
    for letter, part in _PARTS.items():
        yield KeyRule(rf"{upstream}\.{letter}_proj\.weight", rf"{ours}.kvqu.weight", part=part)
        yield KeyRule(rf"{upstream}\.lora_{letter}\.A\.weight", rf"{ours}.kvqu.lora_a", part=part)
        yield KeyRule(rf"{upstream}\.lora_{letter}\.B\.weight", rf"{ours}.kvqu.lora_b", part=part)
    yield from _out(upstream, ours)


def _ffn(upstream: str, ours: str) -> Iterator[KeyRule]:
    for letter, part in _FFN_PARTS.items():
        yield KeyRule(rf"{upstream}\.{letter}_proj\.weight", rf"{ours}.uv.weight", part=part)
        yield KeyRule(rf"{upstream}\.lora_{letter}\.A\.weight", rf"{ours}.uv.lora_a", part=part)
        yield KeyRule(rf"{upstream}\.lora_{letter}\.B\.weight", rf"{ours}.uv.lora_b", part=part)
    yield from _out(upstream, ours)


def _out(upstream: str, ours: str) -> Iterator[KeyRule]:
    yield KeyRule(rf"{upstream}\.o_proj\.weight", rf"{ours}.out.weight")
    yield KeyRule(rf"{upstream}\.lora_o\.A\.weight", rf"{ours}.out.lora_a")
    yield KeyRule(rf"{upstream}\.lora_o\.B\.weight", rf"{ours}.out.lora_b")


def _norms(upstream: str, ours: str) -> Iterator[KeyRule]:
    yield KeyRule(rf"{upstream}\.(?:post_)?norm([123])\.(?:gamma|weight)", rf"{ours}.norm\2.weight")
    yield KeyRule(rf"{upstream}\.(?:post_)?norm([123])\.(?:beta|bias)", rf"{ours}.norm\2.bias")


# fine-tuned models have the encoder under a prefix: `extractor.` (MindSpore) or `extractor.net.` (PyTorch port)
PREFIX = r"(?:extractor\.(?:net\.)?)?"
_LAYER, _QUERY = PREFIX + r"encoder\.(\d+)", r"query_layer\.(\d+)"
_STATE = (
    "global_step|learning_rate|beta[12]_power|scale_sense|loss_scale|current_iterator_step|last_overflow_iterator_step|"
    "epoch_num|step_num"
)

KEY_TABLE = (
    KeyRule(PREFIX + r"gene_emb(?:\.weight)?", "gene_embedding.weight"),
    KeyRule(PREFIX + r"cls_token", "cls_token"),
    KeyRule(PREFIX + r"zero_emb", "zero_embedding"),
    KeyRule(PREFIX + r"ST_emb", "depth_tokens"),
    KeyRule(PREFIX + r"ST_enc\.(a|(?:w1|w3|table)\.weight)", r"depth_encoder.\1"),
    KeyRule(PREFIX + r"value_enc\.mask_emb", "mask_embedding"),
    KeyRule(PREFIX + r"value_enc\.(?:value_enc\.)?(a|(?:w1|w3|table)\.weight)", r"value_encoder.\1"),
    *_attention(_LAYER + r"\.attn", r"layers.\1.attention"),
    *_ffn(_LAYER + r"\.ffn", r"layers.\1.ffn"),
    *_norms(_LAYER, r"layers.\1"),
    KeyRule(PREFIX + r"value_dec\.(w[12])\.weight", r"gene_decoder.\1.weight"),
    KeyRule(PREFIX + r"value_dec\.zero_logit\.([024])\.(weight|bias)", r"gene_decoder.zero_head.\1.\2"),
    KeyRule(PREFIX + r"cellwise_dec\.map\.weight", "cell_decoder.map.weight"),
    KeyRule(PREFIX + r"cellwise_dec\.zero_logit\.(weight|bias)", r"cell_decoder.zero_head.\1"),
    KeyRule(r"cluster_emb", "head.classes"),
    KeyRule(r"classifier\.weight", "head.score.weight"),
    *_attention(_QUERY + r"\.attn1", r"head.layers.\1.self_attention"),
    *_attention(_QUERY + r"\.attn2", r"head.layers.\1.gene_attention"),
    *_ffn(_QUERY + r"\.ffn", r"head.layers.\1.ffn"),
    *_norms(_QUERY, r"head.layers.\1"),
    KeyRule(r"cls\.(\d+\..+)", r"head.\1"),
    KeyRule(r"(?:proj2\.\d+\.(?:weight|bias)|cellwise_dec\.map\.\d+\.weight)", None, "head of a drug response model"),
    KeyRule(PREFIX + r"pert_token", None, "upstream has it but never uses it"),
    KeyRule(r"moment[12]\..+", None, "state of the optimiser"),
    KeyRule(_STATE, None, "state of the training loop"),
)
