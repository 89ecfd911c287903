"""The official pair of files: hyper-parameters with the graph in a pickle, weights in a training checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import _logging
from ..._errors import CheckpointError
from ..._settings import settings
from ...checkpoints import restricted_pickle, torch_file
from ...checkpoints.convert import KeyRule, rename
from ...genes import GeneVocab
from .._base import Checkpoint
from .config import REQUIRED_KEYS, SCLongConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

GENE_LIST = "selected_genes_27k.txt"
PAD = "PAD"
_RELEASED_POSITIONS = 27875
_WEIGHTS = "model_state_dict"
_A_WEIGHT = "token_emb.fc1.weight"

_STACKS = {"large_encoder": "large", "mini_encoder": "mini", "decoder": "decoder"}


def _stack_rules(theirs: str, ours: str) -> list[KeyRule]:
    layer = theirs + r"\.net\.layers\.(\d+)\."
    return [
        KeyRule(theirs + r"\.calls_since_last_redraw", f"{ours}.calls_since_redraw"),
        KeyRule(layer + r"0\.norm\.(weight|bias)", ours + r".layers.\1.norm1.\2"),
        KeyRule(layer + r"0\.fn\.fast_attention\.projection_matrix", ours + r".layers.\1.projection"),
        KeyRule(layer + r"0\.fn\.to_q\.(weight|bias)", ours + r".layers.\1.query.\2"),
        KeyRule(layer + r"0\.fn\.to_k\.(weight|bias)", ours + r".layers.\1.key.\2"),
        KeyRule(layer + r"0\.fn\.to_v\.(weight|bias)", ours + r".layers.\1.value.\2"),
        KeyRule(layer + r"0\.fn\.to_out\.(weight|bias)", ours + r".layers.\1.out.\2"),
        KeyRule(layer + r"1\.norm\.(weight|bias)", ours + r".layers.\1.norm2.\2"),
        KeyRule(layer + r"1\.fn\.fn\.w([12])\.(weight|bias)", ours + r".layers.\1.linear\2.\3"),
    ]


KEY_TABLE = (
    KeyRule(r"token_emb\.fc([12])\.(weight|bias)", r"value_embedding.linear\1.\2"),
    KeyRule(r"token_norm\.(weight|bias)", r"value_embedding.norm.\1"),
    KeyRule(r"mask_emb\.weight", "value_embedding.mask.weight"),
    KeyRule(r"pos_emb\.emb\.weight", "gene_table.weight"),
    KeyRule(r"go_conv\.emb\.weight", "go.weight"),
    KeyRule(r"go_conv\.sim_layers\.(\d+)\.lin\.(weight|bias)", r"go.layers.\1.\2"),
    KeyRule(r"base_to_large\.(weight|bias)", r"to_large.\1"),
    KeyRule(r"large_in_norm\.(weight|bias)", r"large_norm.\1"),
    KeyRule(r"large_to_base\.(weight|bias)", r"from_large.\1"),
    KeyRule(r"large_to_base_out_norm\.(weight|bias)", r"from_large_norm.\1"),
    KeyRule(r"decode_norm\.(weight|bias)", r"norm.\1"),
    KeyRule(r"exp_to_out\.(weight|bias)", r"head.\1"),
    *(rule for names in _STACKS.items() for rule in _stack_rules(*names)),
)


def recognizes(path: Path) -> bool:
    """Whether a folder holds hyper-parameters of scLong and a weight file, or ``path`` is such a weight file."""
    if path.is_file():
        return path.suffix in (".pth", ".pt") and _has_hyper_parameters(path.parent)
    return path.is_dir() and bool(_weight_files(path)) and _has_hyper_parameters(path)


def _has_hyper_parameters(directory: Path) -> bool:
    return any(_hyper_parameters(path) is not None for path in sorted(directory.glob("*.pkl")))


def _hyper_parameters(path: Path) -> dict[str, Any] | None:
    """Content of the pickle if it is that of an scLong model."""
    try:
        content = restricted_pickle.read(path)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and content.keys() >= REQUIRED_KEYS else None


def _weight_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in (".pth", ".pt") and path.is_file())


def read(
    directory: Path,
    *,
    weights: str | None = None,
    genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None,
) -> Checkpoint:
    """Read hyper-parameters, graph and weights.

    Parameters
    ----------
    directory
        Folder with one ``.pkl`` of hyper-parameters and a ``.pth`` of weights: a training checkpoint, of which only
        the model is read, or a bare state dict. The weight file itself is understood, too.
    weights
        Name of the weight file, where there are several.
    genes
        Names of the genes in the order of the model, without PAD, or the path of a file with one name in each line. By
        default ``selected_genes_27k.txt`` beside the weights, in the folder above, or in the folder ``sclong`` of
        ``scfm.settings.cachedir``. Models with another number of genes than the released one get numbered names if none
        are given.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    CheckpointError
        If a file is damaged, asks for code to be run, or does not fit the others.
    """
    if directory.is_file():
        directory, weights = directory.parent, directory.name
    weight_file = _choose(
        directory,
        [path for path in _weight_files(directory) if weights in (None, path.name)],
        "weight file (.pth)",
        weights,
    )
    hyper_parameters = [(path, _hyper_parameters(path)) for path in sorted(directory.glob("*.pkl"))]
    found = {path: values for path, values in hyper_parameters if values is not None}
    of_same_name = [path for path in found if weight_file.name.startswith(path.stem)]
    pickle = _choose(directory, of_same_name or list(found), "hyper-parameters of scLong (.pkl)", None)
    try:
        config = SCLongConfig.from_upstream(found[pickle])
        graph = _graph(found[pickle], config.n_positions)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"the hyper-parameters in {pickle} are none that scfm can build: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error
    state, report = rename(_state_dict(weight_file), KEY_TABLE)
    state |= graph
    report.loaded += list(graph)
    vocab = make_vocab(directory, config.n_positions, genes)
    return Checkpoint(config, vocab, state, report, file=weight_file.name)


def _choose(directory: Path, candidates: list[Path], what: str, name: str | None) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        msg = f"{directory} has no {what}{f' with the name {name}' if name else ''}"
        raise FileNotFoundError(msg)
    msg = (
        f"{directory} has several: {', '.join(path.name for path in candidates)}. Choose a {what} with weights=<name>."
    )
    raise CheckpointError(msg)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Weights of the model, memory-mapped; the state of the optimiser, two thirds of the file, is never touched."""
    content = torch_file.read(path)
    state = content.get(_WEIGHTS, content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or _A_WEIGHT not in state:
        msg = f"{path} holds no weights of scLong: neither a training checkpoint with {_WEIGHTS!r} nor a state dict"
        raise CheckpointError(msg)
    return state


def _graph(values: dict[str, Any], n_positions: int) -> dict[str, Tensor]:
    """Edges and weights of the Gene Ontology graph, checked."""
    edges, weight = values["G_go"].to(torch.int64), values["G_go_weight"].to(torch.float32)
    if edges.ndim != 2 or len(edges) != 2 or weight.shape != edges.shape[1:]:
        msg = f"G_go has shape {tuple(edges.shape)} and G_go_weight {tuple(weight.shape)}, which is no graph"
        raise ValueError(msg)
    if edges.numel() and (edges.min() < 0 or edges.max() >= n_positions):
        msg = f"G_go has edges to genes beyond the {n_positions:,} positions of the model"
        raise ValueError(msg)
    return {"go.edges": edges, "go.edge_weight": weight}


def read_vocab(directory: Path, **options: Any) -> GeneVocab:
    """Genes of a model from its folder, which need not hold the weights; options are those of :func:`read`."""
    if options.get("genes") is None and (directory / GENE_LIST).is_file():
        return _with_pad(_read_list(directory / GENE_LIST))
    return read(directory, **options).vocab


def make_vocab(
    directory: Path, n_positions: int, genes: Sequence[str] | np.ndarray | GeneVocab | str | Path | None = None
) -> GeneVocab:
    """Genes of a model, and PAD at the end; see :func:`read` for where they come from."""
    if isinstance(genes, (str, Path)):
        genes = _read_list(Path(genes))
    elif genes is None:
        genes = _find_genes(directory, n_positions - 1)
    vocab = genes if isinstance(genes, GeneVocab) and PAD in genes.specials else _with_pad(list(genes))
    if len(vocab) != n_positions:
        msg = f"the gene list has {vocab.n_genes:,} names, but the model in {directory} has {n_positions - 1:,} genes"
        raise CheckpointError(msg)
    return vocab


def _with_pad(genes: list[str]) -> GeneVocab:
    return GeneVocab([*genes, PAD], specials=[PAD])


def _find_genes(directory: Path, n_genes: int) -> list[str]:
    places = [folder / GENE_LIST for folder in (directory, directory.parent, settings.cachedir / "sclong")]
    for place in places:
        if place.is_file():
            return _read_list(place)
    if n_genes == _RELEASED_POSITIONS - 1:
        msg = (
            f"the gene list {GENE_LIST} is missing. It lies beside the weights in the authors' folder; put it at "
            f"{places[0]} or pass genes=<path>. Looked at: {', '.join(map(str, places))}"
        )
        raise CheckpointError(msg)
    _logging.warning(
        f"{directory} holds a model of {n_genes:,} genes without names; they are called 'gene_0', 'gene_1' and so on. "
        "Pass genes=[...] to name them."
    )
    return [f"gene_{i}" for i in range(n_genes)]


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        msg = f"no gene list at {path}"
        raise FileNotFoundError(msg)
    return path.read_text(encoding="utf-8").split()
