"""Official and community checkpoints of CellFM, which hold weights and nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..._errors import CheckpointError
from ...checkpoints import mindspore, torch_file
from ...checkpoints.convert import LoadReport, rename
from ...nn.retention import merge_low_rank
from .._base import Checkpoint
from .config import HEAD_DIM, CellFMConfig
from .gene_list import GENE_LISTS, make_vocab, read_table, vocab_of
from .keys import KEY_TABLE, PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from ...genes import GeneVocab
    from .config import Compat

RELEASED = ("CellFM_80M_weight.ckpt", "base_weight.ckpt")
NANO = "model.pt"

# -- which file ----------------------------------------------------------------------------------------------------------


def recognizes(path: Path) -> bool:
    """Whether a folder, or a weight file, looks like a checkpoint of CellFM."""
    if path.is_file():
        return _is_cellfm(path)
    return path.is_dir() and (any((path / name).is_file() for name in RELEASED) or bool(_weight_files(path)))


def _weight_files(directory: Path) -> list[Path]:
    names = [*directory.glob("*.ckpt"), directory / NANO]
    return sorted(path for path in names if path.is_file() and _is_cellfm(path))


def _is_cellfm(path: Path) -> bool:
    if path.suffix == ".ckpt":
        keys = mindspore.names(path)
    elif path.suffix in (".pt", ".pth"):
        keys = _torch_keys(path)
    else:
        return False
    return any(re.fullmatch(PREFIX + r"gene_emb(\.weight)?", key) for key in keys) and any(
        re.fullmatch(PREFIX + r"value_enc\..+", key) for key in keys
    )


def _torch_keys(path: Path) -> Sequence[str]:
    try:
        content = torch_file.read(path)
    except CheckpointError:
        return ()
    return [key for key in content if isinstance(key, str)] if isinstance(content, dict) else ()


def find_weights(directory: Path, weights: str | None = None) -> Path:
    """The weight file of a folder: the one named, the released one, or the only one."""
    if directory.is_file():
        return directory
    if weights is not None:
        path = directory / weights
        if not path.is_file():
            msg = f"no file {weights} in {directory}"
            raise FileNotFoundError(msg)
        return path
    found = [directory / name for name in RELEASED if (directory / name).is_file()] or _weight_files(directory)
    if not found:
        msg = f"no CellFM weights in {directory}; looked for {', '.join(RELEASED)}, another .ckpt file and {NANO}"
        raise FileNotFoundError(msg)
    if len(found) > 1:
        shown = ", ".join(path.name for path in found)
        msg = f"{directory} holds several weight files: {shown}. Choose one with weights='{found[0].name}'."
        raise CheckpointError(msg)
    return found[0]


# -- reading -------------------------------------------------------------------------------------------------------------


def read(
    directory: Path,
    *,
    weights: str | None = None,
    genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None,
    n_heads: int | None = None,
    merge_lora: bool = True,
    compat: Compat = "",
    leaky_slope: float | None = None,
    ln_eps: float | None = None,
    check_crc: bool = False,
) -> Checkpoint:
    """Read the weights of one file; sizes are taken from their shapes.

    Parameters
    ----------
    directory
        Folder with a weight file, or the file itself.
    weights
        Name of the file, if the folder holds several.
    genes
        Gene names in the order of the model, or the path of a table with a column ``HGNC_gene``. By default
        ``expand_gene_info.csv`` or ``gene_info.csv``, by the size of the model, beside the weights or in
        ``scfm.settings.cachedir``. Models of other sizes get numbered names if none are given.
    n_heads
        Number of heads, which no file tells; by default one for each 32 numbers of the width.
    merge_lora
        Add low-rank updates to the matrices they belong to, or keep them apart to train them.
    compat
        ``"torch-port"`` for weights of the authors' PyTorch port, whose numbers differ.
    leaky_slope, ln_eps
        Constants of the network; by default 0.2 and 1e-7, or 0.01 and 1e-5 for ``compat="torch-port"``.
    check_crc
        Compare the checksum of a MindSpore file, if it has one.

    Raises
    ------
    FileNotFoundError
        If there is no weight file.
    CheckpointError
        If it is damaged or no CellFM model, or the gene list is missing or does not fit.
    """
    path = find_weights(directory, weights)
    state, report = _read_state(path, check_crc=check_crc)
    if merge_lora:
        state = _merge_lora(state, report)
    port = compat == "torch-port"
    constants = {
        "leaky_slope": (0.01 if port else 0.2) if leaky_slope is None else leaky_slope,
        "ln_eps": (1e-5 if port else 1e-7) if ln_eps is None else ln_eps,
    }
    table = state.get("gene_embedding.weight")
    if table is None or table.ndim != 2:
        msg = f"{path} is no CellFM model: it has no gene table 'gene_emb'"
        raise CheckpointError(msg)
    vocab = make_vocab(path, table.shape[0], genes)
    try:
        config = config_of(state, vocab.n_genes, n_heads=n_heads, compat=compat, **constants)
    except ValueError as error:
        msg = f"the weights in {path} do not make a CellFM model: {error}"
        raise CheckpointError(msg) from error
    file = path.name if path == directory else str(path.relative_to(directory))
    return Checkpoint(config, vocab, state, report, weights=weights or "", file=file)


def read_vocab(directory: Path, **options: Any) -> GeneVocab:
    """Genes of a model from its folder, which need not hold the weights; options are those of :func:`read`."""
    genes = options.get("genes")
    lists = [directory / name for name in GENE_LISTS.values() if (directory / name).is_file()]
    if genes is None and len(lists) == 1 and not recognizes(directory):
        return vocab_of(read_table(lists[0]))
    path = find_weights(directory, options.get("weights"))
    return make_vocab(path, _n_rows(path), genes)


def _n_rows(path: Path) -> int:
    """Rows of the gene table, without reading the weights."""
    if path.suffix == ".ckpt":
        shapes = {name: entry.shape for name, entry in mindspore.MindSporeFile(path).entries.items()}
    else:
        shapes = {
            name: tuple(tensor.shape) for name, tensor in torch_file.read(path).items() if hasattr(tensor, "shape")
        }
    rows = [shape[0] for name, shape in shapes.items() if re.fullmatch(PREFIX + r"gene_emb(\.weight)?", name)]
    if not rows:
        msg = f"{path} is no CellFM model: it has no gene table 'gene_emb'"
        raise CheckpointError(msg)
    return rows[0]


def _read_state(path: Path, *, check_crc: bool) -> tuple[dict[str, Tensor], LoadReport]:
    if path.suffix in (".pt", ".pth"):
        content = torch_file.read(path)
        if not isinstance(content, dict) or not _is_cellfm(path):
            msg = f"{path} is no CellFM model"
            raise CheckpointError(msg)
        return rename(content, KEY_TABLE)
    file = mindspore.MindSporeFile(path, check_crc=check_crc)
    state, report = rename(file.read(), KEY_TABLE)
    # projections were joined into new tensors, so their pages in the map have served
    file.release()
    return state, report


def _merge_lora(state: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    out = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
    for key in state.keys() - out.keys():
        if key.endswith("lora_a"):
            owner = key.removesuffix("lora_a")
            try:
                parts = state[f"{owner}weight"], state[key], state[f"{owner}lora_b"]
            except KeyError as error:
                msg = f"the low-rank update of {owner!r} is incomplete: {error} is missing"
                raise CheckpointError(msg) from None
            out[f"{owner}weight"] = merge_low_rank(*parts)
    merged = {upstream for upstream, target in report.renamed.items() if target not in out}
    report.dropped |= dict.fromkeys(sorted(merged), "low-rank update, added to its matrix")
    report.loaded = [key for key in report.loaded if key in out]
    report.renamed = {key: target for key, target in report.renamed.items() if key not in merged}
    return out


def config_of(state: Mapping[str, Tensor], n_genes: int, *, n_heads: int | None, **fields: Any) -> CellFMConfig:
    """Hyper-parameters from the shapes of weights under our names.

    Raises
    ------
    ValueError
        If they do not follow from the shapes.
    """
    dim = state["gene_embedding.weight"].shape[1]
    if n_heads is None:
        if dim % HEAD_DIM:
            msg = f"the width {dim} is no multiple of {HEAD_DIM}, so the number of heads has to be given: n_heads="
            raise ValueError(msg)
        n_heads = dim // HEAD_DIM
    n_layers = _count(state, r"layers\.(\d+)\..+")
    if not n_layers:
        msg = "there are no layers"
        raise ValueError(msg)
    head = "retention" if "head.classes" in state else "mlp" if "head.3.weight" in state else ""
    if head:
        classes = state["head.classes" if head == "retention" else "head.3.weight"].shape[0]
        fields |= {"class_head": head, "n_classes": classes}
        fields |= {"n_head_layers": _count(state, r"head\.layers\.(\d+)\..+")} if head == "retention" else {}
    table = state.get("value_encoder.table.weight")
    low_rank = state.get("layers.0.attention.out.lora_a")
    return CellFMConfig(
        n_genes=n_genes,
        dim=dim,
        n_heads=n_heads,
        n_layers=n_layers,
        n_bins=256 if table is None else table.shape[1],
        lora_rank=0 if low_rank is None else low_rank.shape[0],
        has_cls="cls_token" in state,
        has_zero_embedding="zero_embedding" in state,
        has_depth_tokens="depth_tokens" in state,
        has_gene_decoder="gene_decoder.w1.weight" in state,
        has_cell_decoder="cell_decoder.map.weight" in state,
        has_zero_heads="cell_decoder.zero_head.weight" in state,
        **fields,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    numbers = (int(match[1]) for key in state if (match := re.fullmatch(pattern, key)))
    return max(numbers, default=-1) + 1
