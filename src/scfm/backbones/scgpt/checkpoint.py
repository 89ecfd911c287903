"""Official scGPT folders: ``args.json``, ``vocab.json`` and ``best_model.pt``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from ..._errors import CheckpointError
from ...checkpoints import torch_file
from ...checkpoints.convert import KeyRule, rename
from ...genes import GeneVocab
from .._base import Checkpoint
from . import modality
from .config import SPECIALS, infer_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

WEIGHTS, ARGS, VOCAB = "best_model.pt", "args.json", "vocab.json"

_LAYER = r"(?:module\.)?transformer_encoder\.layers\.(\d+)\."

# flash-attn 1.x and all released files, scGPT >= 0.2.5 with flash (`_impl`) and torch's native layer hold the same
# packed projection under three names
KEY_TABLE = (
    KeyRule(_LAYER + r"self_attn\.(?:_impl\.)?Wqkv\.(weight|bias)", r"layers.\1.qkv.\2"),
    KeyRule(_LAYER + r"self_attn\.in_proj_(weight|bias)", r"layers.\1.qkv.\2"),
    KeyRule(_LAYER + r"self_attn\.(?:_impl\.)?out_proj\.(weight|bias)", r"layers.\1.out.\2"),
    KeyRule(_LAYER + r"(linear1|linear2|norm1|norm2)\.(weight|bias)", r"layers.\1.\2.\3"),
    KeyRule(r"(?:module\.)?encoder\.embedding\.weight", "genes.embedding.weight"),
    KeyRule(r"(?:module\.)?encoder\.enc_norm\.(weight|bias)", r"genes.norm.\1"),
    KeyRule(r"(?:module\.)?flag_encoder\.weight", "query_flag.weight"),
    KeyRule(r"(?:module\.)?value_encoder\.(linear1|linear2|norm)\.(weight|bias)", r"values.\1.\2"),
    KeyRule(r"(?:module\.)?value_encoder\.embedding\.weight", "values.embedding.weight"),
    KeyRule(r"(?:module\.)?value_encoder\.enc_norm\.(weight|bias)", r"values.norm.\1"),
    KeyRule(r"(?:module\.)?batch_encoder\.embedding\.weight", "batches.embedding.weight"),
    KeyRule(r"(?:module\.)?batch_encoder\.enc_norm\.(weight|bias)", r"batches.norm.\1"),
    KeyRule(r"(?:module\.)?mod_encoder\.embedding\.weight", "modalities.embedding.weight"),
    KeyRule(r"(?:module\.)?mod_encoder\.enc_norm\.(weight|bias)", r"modalities.norm.\1"),
    KeyRule(r"(?:module\.)?dsbn\.bns\.(\d+)\.(.+)", r"domain_norms.\1.\2"),
    KeyRule(r"(?:module\.)?bn\.(.+)", r"batch_norm.\1"),
    KeyRule(r"(?:module\.)?pert_encoder\.weight", "flags.weight"),
    KeyRule(r"(?:module\.)?decoder\.coeff_decoder\.fc\.(\d)\.(weight|bias)", r"decoder.factor.\1.\2"),
    KeyRule(r"(?:module\.)?decoder\.bias_decoder\.fc\.(\d)\.(weight|bias)", r"decoder.shift.\1.\2"),
    KeyRule(r"(?:module\.)?decoder\.(fc|zero_logit)\.(\d)\.(weight|bias)", r"decoder.\1.\2.\3"),
    KeyRule(r"(?:module\.)?mvc_decoder\.(.+)", r"mvc.\1"),
    KeyRule(r"(?:module\.)?cls_decoder\._decoder\.(\d+)\.(weight|bias)", r"classifier.hidden.\1.\2"),
    KeyRule(r"(?:module\.)?cls_decoder\.out_layer\.(weight|bias)", r"classifier.out.\1"),
    KeyRule(r"(?:module\.)?grad_reverse_discriminator\._decoder\.(\d+)\.(weight|bias)", r"discriminator.hidden.\1.\2"),
    KeyRule(r"(?:module\.)?grad_reverse_discriminator\.out_layer\.(weight|bias)", r"discriminator.out.\1"),
    KeyRule(r"(?:module\.)?sim_decoder\..+", None, "similarity classifier of the development branch, not part of scfm"),
)


def recognizes(path: Path) -> bool:
    """Whether a folder looks like an official scGPT checkpoint, or a file holds weights of scGPT."""
    if path.is_dir():
        return (path / WEIGHTS).is_file() and (path / VOCAB).is_file()
    if path.suffix not in (".pt", ".pth"):
        return False
    try:
        keys = read_state(path).keys()
    except CheckpointError:
        return False
    return {"encoder.embedding.weight", "module.encoder.embedding.weight"} & keys != set()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a ``.pt`` file as tensors, memory-mapped where the file allows it, without executing code from it."""
    state = torch_file.read(path)
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        msg = f"{path} does not hold a dictionary of tensors, so it is no scGPT checkpoint"
        raise CheckpointError(msg)
    return state


def read_vocab(source: Path | Mapping[str, int] | Sequence[str] | GeneVocab, n_tokens: int | None = None) -> GeneVocab:
    """Build the vocabulary from ``vocab.json``, a mapping token -> id, or names in order.

    Special tokens that are missing are appended; with ``n_tokens``, the rows of the gene table, the sizes have to agree.
    """
    if isinstance(source, GeneVocab):
        return source
    if not isinstance(source, (list, tuple)):
        mapping = source if isinstance(source, dict) else _read_json(source)
        if sorted(mapping.values()) != list(range(len(mapping))):
            msg = f"the ids in {VOCAB} are not 0 to {len(mapping) - 1} without gaps; the file is damaged"
            raise CheckpointError(msg)
        source = sorted(mapping, key=mapping.__getitem__)
    names = [*source, *(token for token in SPECIALS if token not in set(source))]
    if n_tokens is not None and not len(source) <= n_tokens <= len(names):
        msg = (
            f"{VOCAB} names {len(source)} tokens but the weights hold {n_tokens}: the files belong to different models"
        )
        raise CheckpointError(msg)
    return GeneVocab(names[:n_tokens], specials=[token for token in SPECIALS if token in set(names[:n_tokens])])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is no valid JSON ({error}); fetch it again"
        raise CheckpointError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds no JSON object, so it is no scGPT file"
        raise CheckpointError(msg)
    return content


def read(
    directory: Path,
    *,
    weights: str | None = None,
    args: Mapping[str, Any] | None = None,
    vocab: Path | Mapping[str, int] | Sequence[str] | GeneVocab | None = None,
    modalities: Mapping[str, Sequence[str]] | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Read an official folder, or one weights file with what belongs to it given by hand.

    Parameters
    ----------
    directory
        Folder with ``args.json``, ``vocab.json`` and ``best_model.pt``.
    weights
        Another weights file in the folder.
    args
        Entries that add to or replace those of ``args.json``; names as upstream writes them.
    vocab
        Vocabulary to use instead of ``vocab.json``.
    modalities
        Vocabulary entries of each modality of a multi-omic model, which its files do not tell; see
        :meth:`SCGPTBackbone.set_modalities`.
    strict
        Refuse files with keys that the key table does not know; otherwise they are dropped and reported. (The content
        of the continually pre-trained file is not documented.)
    """
    path = directory / (weights or WEIGHTS)
    if not path.is_file():
        msg = f"no file {path.name} in {directory}"
        raise CheckpointError(msg)
    state, report = rename(read_state(path), KEY_TABLE)
    if not strict:
        report.dropped |= dict.fromkeys(report.unexpected, "unknown key, strict=False")
        report.unexpected.clear()
    if "genes.embedding.weight" not in state or "layers.0.qkv.weight" not in state:
        msg = f"{path} is no scGPT checkpoint: it has no gene embedding or no transformer layer"
        raise CheckpointError(msg)
    stored = _read_json(directory / ARGS) if (directory / ARGS).is_file() else {}
    try:
        config = infer_config(state, {**stored, **(args or {})})
    except KeyError as error:
        msg = f"{directory}: {error.args[0]}. Put {ARGS} beside {path.name} or pass args={{'nheads': ...}}"
        raise CheckpointError(msg) from error
    if vocab is None:
        if not (directory / VOCAB).is_file():
            msg = f"no {VOCAB} in {directory}; put it beside {path.name} or pass vocab="
            raise CheckpointError(msg)
        vocab = directory / VOCAB
    vocab = read_vocab(vocab, len(state["genes.embedding.weight"]))
    if config.modalities:
        state[modality.TABLE] = modality.modality_table(config, vocab, modalities or {})
    elif modalities:
        msg = f"modalities were given, but {path.name} is no model of several modalities"
        raise CheckpointError(msg)
    return Checkpoint(config, vocab, state, report, path.name)
