"""The official container ``models.ckpt``: three sets of weights with their configs, and the gene list beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ... import _logging
from ..._errors import CheckpointError
from ..._settings import settings
from ...checkpoints import torch_file
from ...checkpoints.convert import KeyRule, rename
from ...genes import GeneVocab
from .._base import Checkpoint
from .config import SCFoundationConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

CONTAINER = "models.ckpt"
GENE_LIST = "OS_scRNA_gene_index.19264.tsv"
WEIGHTS = ("cell", "rde", "gene")
_RELEASED_GENES = 19264

_STACK = r"model\.(encoder|decoder)\."
_SOFTMAX = _STACK + r"transformer_encoder\.(\d+)\."
_PERFORMER = _STACK + r"performer\."
_LINEAR = _PERFORMER + r"net\.layers\.(\d+)\."

KEY_TABLE = (
    KeyRule(r"model\.token_emb\.mlp\.(weight|bias)", r"value_embedding.linear1.\1"),
    KeyRule(r"model\.token_emb\.mlp2\.(weight|bias)", r"value_embedding.linear2.\1"),
    KeyRule(r"model\.token_emb\.emb\.weight", "value_embedding.bins.weight"),
    KeyRule(r"model\.token_emb\.emb_(mask|pad)\.weight", r"value_embedding.\1.weight"),
    KeyRule(r"model\.pos_emb\.weight", "gene_embedding.weight"),
    KeyRule(r"model\.decoder_embed\.(weight|bias)", r"decoder_input.\1"),
    KeyRule(_STACK + r"norm\.(weight|bias)", r"\1.norm.\2"),
    KeyRule(r"model\.norm\.(weight|bias)", r"norm.\1"),
    KeyRule(r"model\.to_final\.(weight|bias)", r"head.\1"),
    KeyRule(_SOFTMAX + r"self_attn\.in_proj_(weight|bias)", r"\1.layers.\2.qkv.\3"),
    KeyRule(_SOFTMAX + r"self_attn\.out_proj\.(weight|bias)", r"\1.layers.\2.out.\3"),
    KeyRule(_SOFTMAX + r"(linear1|linear2|norm1|norm2)\.(weight|bias)", r"\1.layers.\2.\3.\4"),
    KeyRule(_LINEAR + r"0\.norm\.(weight|bias)", r"\1.layers.\2.norm1.\3"),
    KeyRule(_LINEAR + r"0\.fn\.fast_attention\.projection_matrix", r"\1.layers.\2.projection"),
    KeyRule(_LINEAR + r"0\.fn\.to_q\.(weight|bias)", r"\1.layers.\2.query.\3"),
    KeyRule(_LINEAR + r"0\.fn\.to_k\.(weight|bias)", r"\1.layers.\2.key.\3"),
    KeyRule(_LINEAR + r"0\.fn\.to_v\.(weight|bias)", r"\1.layers.\2.value.\3"),
    KeyRule(_LINEAR + r"0\.fn\.to_out\.(weight|bias)", r"\1.layers.\2.out.\3"),
    KeyRule(_LINEAR + r"1\.norm\.(weight|bias)", r"\1.layers.\2.norm2.\3"),
    KeyRule(_LINEAR + r"1\.fn\.fn\.w([12])\.(weight|bias)", r"\1.layers.\2.linear\3.\4"),
    # performer-pytorch 1.0.11 moved the counter and lists all layers a second time
    KeyRule(_PERFORMER + r"(?:proj_updater\.)?calls_since_last_redraw", r"\1.calls_since_redraw"),
    KeyRule(_PERFORMER + r"proj_updater\.instance\..+", None, "second name of a tensor"),
)


def find_container(path: Path) -> Path | None:
    """``models.ckpt`` itself, in a folder, or in the folder's subfolder ``models``."""
    for candidate in (path, path / CONTAINER, path / "models" / CONTAINER):
        if candidate.is_file():
            return candidate
    return None


def recognizes(directory: Path) -> bool:
    """Whether a folder holds the official container."""
    return directory.is_dir() and find_container(directory) is not None


def read_container(path: Path) -> dict[str, Any]:
    """All weight sets of a container, memory-mapped, without executing code from it."""
    content = torch_file.read(path)
    if not isinstance(content, dict) or not set(WEIGHTS) & content.keys():
        msg = f"{path} is no scFoundation container: it has none of the weight sets {', '.join(WEIGHTS)}"
        raise CheckpointError(msg)
    return content


def read(
    directory: Path,
    *,
    weights: str | None = None,
    genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None,
) -> Checkpoint:
    """Read one set of weights of an official container.

    Parameters
    ----------
    directory
        Folder with ``models.ckpt`` (or with a subfolder ``models`` that has it), or the file itself.
    weights
        ``"cell"`` for cell embeddings, ``"rde"`` for read-depth enhancement (a nearby step of the same run), or
        ``"gene"`` for everything that involves genes (the step with the lowest pre-training error). By default
        ``"cell"``, or the only set of a file that holds a single one.
    genes
        Gene names in the order of the model, or the path of a table with a column ``gene_name``. By default
        ``OS_scRNA_gene_index.19264.tsv`` beside the container, in the folder above, or in the ``scfoundation`` folder
        of ``scfm.settings.cachedir``. Models with another number of genes than the released ones get numbered names
        if none are given.

    Raises
    ------
    FileNotFoundError
        If there is no container.
    CheckpointError
        If it is damaged, lacks the weights, or the gene list is missing or does not fit.
    """
    path = find_container(directory)
    if path is None:
        msg = f"no {CONTAINER} in {directory} or in a folder 'models' below it"
        raise FileNotFoundError(msg)
    content = read_container(path)
    present = [name for name in WEIGHTS if name in content]
    if weights is None:
        weights = "cell" if len(present) > 1 else present[0]
    if weights not in content:
        there = ", ".join(map(repr, present))
        msg = f"{path} has no weights {weights!r}; choose one of {there} with weights="
        raise CheckpointError(msg)
    part = content[weights]
    if not isinstance(part, dict) or not {"state_dict", "config"} <= part.keys():
        msg = f"the weights {weights!r} of {path} are damaged: 'state_dict' or 'config' is missing"
        raise CheckpointError(msg)
    try:
        config = SCFoundationConfig.from_upstream(part["config"])
    except (KeyError, TypeError, ValueError) as error:
        msg = f"the config of {weights!r} in {path} is none of scFoundation: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error
    state, report = rename(part["state_dict"], KEY_TABLE)
    vocab = make_vocab(path, config.n_genes, genes)
    file = path.name if path == directory else str(path.relative_to(directory))
    return Checkpoint(config, vocab, state, report, weights=weights, file=file)


def read_vocab(directory: Path, **options: Any) -> GeneVocab:
    """Genes of a model from its folder, which need not hold the weights; options are those of :func:`read`."""
    if find_container(directory) is None and options.get("genes") is None and (directory / GENE_LIST).is_file():
        return GeneVocab(_read_table(directory / GENE_LIST))
    return read(directory, **options).vocab


def make_vocab(
    path: Path, n_genes: int, genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None
) -> GeneVocab:
    """Genes of a model; see :func:`read` for where they come from.

    Parameters
    ----------
    path
        The container.
    n_genes
        How many there have to be.
    genes
        Names, vocabulary or table to use instead of the gene list beside the container.
    """
    if isinstance(genes, (str, Path)):
        genes = _read_table(Path(genes))
    elif genes is None:
        genes = _find_genes(path, n_genes)
    vocab = genes if isinstance(genes, GeneVocab) else GeneVocab(genes)
    if len(vocab) != n_genes:
        msg = f"the gene list has {len(vocab):,} names, but the model in {path} has {n_genes:,} genes"
        raise CheckpointError(msg)
    return vocab


def _find_genes(path: Path, n_genes: int) -> Sequence[str] | np.ndarray:
    if n_genes == _RELEASED_GENES:
        places = list(_gene_list_places(path))
        for place in places:
            if place.is_file():
                return _read_table(place)
        msg = (
            f"the gene list {GENE_LIST} is missing. It is part of the scFoundation repository "
            f"(github.com/biomap-research/scFoundation, folder 'model'); put it at {places[0]} or pass genes=<path>. "
            f"Looked at: {', '.join(map(str, places))}"
        )
        raise CheckpointError(msg)
    _logging.warning(
        f"{path.name} is a model of {n_genes:,} genes without names; they are called 'gene_0', 'gene_1' and so on. "
        "Pass genes=[...] to name them."
    )
    return [f"gene_{i}" for i in range(n_genes)]


def _gene_list_places(path: Path) -> Iterator[Path]:
    for folder in (path.parent, path.parent.parent, settings.cachedir / "scfoundation"):
        yield folder / GENE_LIST


def _read_table(path: Path) -> np.ndarray:
    if not path.is_file():
        msg = f"no gene list at {path}"
        raise FileNotFoundError(msg)
    # "NA" and the like are gene names here, not missing values
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if "gene_name" not in table:
        msg = f"{path} has no column 'gene_name', so it is no gene list of scFoundation"
        raise CheckpointError(msg)
    return table["gene_name"].to_numpy()
