"""Directories that scfm writes itself: ``scfm.json``, ``vocab.json`` and ``model.safetensors``.

Tensors are read by memory-mapping, so that opening a checkpoint costs neither time nor memory until a weight is used,
and several processes share one copy. No code is executed on reading.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import CheckpointError
from ..nn.low_rank import merged_state
from ._files import new_directory, read_json, recover, sha256
from .convert import LoadReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from ..backbones import Backbone
    from ..genes import GeneVocab

FORMAT = 1
HEADER = "scfm.json"
VOCAB = "vocab.json"
TENSORS = "model.safetensors"

# below this size a hash costs less than a blink, so damage inside the data is always noticed
_ALWAYS_HASH = 64 * 2**20


@dataclass
class Stored:
    """What :func:`read` gives.

    Parameters
    ----------
    path
        The directory.
    kind
        Name of the backbone class.
    name
        Name of the model.
    config
        Hyper-parameters as JSON values.
    vocab
        The genes.
    state_dict
        Weights, memory-mapped, in the floating-point type they were saved in.
    provenance
        Where the weights come from: id, licence, citation and what else was recorded.
    sha256
        Hash of ``model.safetensors`` when it was written.
    report
        What was renamed or dropped when the checkpoint was converted from an official file, if it was.
    """

    path: Path
    kind: str
    name: str
    config: dict[str, Any]
    vocab: GeneVocab
    state_dict: dict[str, Tensor]
    provenance: dict[str, Any]
    sha256: str
    report: LoadReport = field(default_factory=LoadReport)


def is_stored(path: str | Path) -> bool:
    """Whether ``path`` is a directory that scfm wrote."""
    path = Path(path)
    recover(path)
    return (path / HEADER).is_file()


def save(
    path: str | Path,
    *,
    kind: str,
    name: str,
    config: Mapping[str, Any],
    vocab: GeneVocab,
    state_dict: Mapping[str, Tensor],
    provenance: Mapping[str, Any] | None = None,
    report: LoadReport | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint directory; it appears complete or not at all.

    Parameters
    ----------
    path
        Directory to make.
    kind
        Name of the backbone class, as in the entry-point group ``scfm.backbones``.
    name
        Name of the model.
    config
        Hyper-parameters as JSON values.
    vocab
        The genes.
    state_dict
        Weights.
    provenance
        Where the weights come from; has to be JSON-writable.
    report
        Report of the conversion from an official file.
    dtype
        Floating-point type to store the weights in; ``None`` keeps theirs. They are read back into the type that the
        network has, so a small type saves disk space only.
    overwrite
        Replace a directory that scfm wrote before. Anything else that lies at ``path`` is never replaced.

    Returns
    -------
    The directory.

    Raises
    ------
    FileExistsError
        If ``path`` exists and may not be replaced.
    """
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if overwrite and path.exists() and not is_stored(path) and not _is_empty_directory(path):
        msg = f"{path} was not written by scfm and is not replaced even with overwrite=True; choose another path"
        raise FileExistsError(msg)
    header = {
        "format": FORMAT,
        "scfm": version("scfm"),
        "kind": kind,
        "name": name,
        "config": dict(config),
        "provenance": dict(provenance or {}),
    }
    if report is not None:
        header["load_report"] = asdict(report)
    with new_directory(path.resolve(), overwrite=overwrite) as directory:
        (directory / VOCAB).write_text(json.dumps(vocab.to_dict()), encoding="utf-8")
        save_file(_writable(state_dict, dtype), directory / TENSORS, metadata={"format": "pt"})
        header["files"] = {
            file: {"bytes": (directory / file).stat().st_size, "sha256": sha256(directory / file)}
            for file in (TENSORS, VOCAB)
        }
        (directory / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return path


def save_backbone(
    backbone: Backbone, path: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write a backbone with its weights, config, vocabulary and provenance; see :func:`save`.

    Low-rank adapters are added to the weights they belong to, in the file only.
    """
    return save(
        path,
        kind=backbone.kind,
        name=backbone.name,
        config=backbone.config_to_dict(),
        vocab=backbone.vocab,
        state_dict=merged_state(backbone.module),
        provenance=asdict(backbone.provenance),
        report=backbone.load_report,
        dtype=dtype,
        overwrite=overwrite,
    )


def read(path: str | Path, *, verify: bool | None = None) -> Stored:
    """Read a checkpoint directory that scfm wrote.

    Parameters
    ----------
    path
        The directory.
    verify
        Compare the SHA-256 of the files with the one recorded when they were written. By default this is done for
        small files; of large ones the size and the header are checked.

    Raises
    ------
    CheckpointError
        If a file is missing, cut off or changed, or the format is newer than this version of scfm.
    """
    path, header = read_header(path)
    _check_file(path, header, TENSORS, verify=verify)
    state = _read_tensors(path / TENSORS)
    return Stored(
        path=path,
        kind=header["kind"],
        name=header["name"],
        config=header["config"],
        vocab=_vocab(path, header, verify=verify),
        state_dict=state,
        provenance=header["provenance"],
        sha256=header["files"][TENSORS]["sha256"],
        report=_report(header, state),
    )


def read_vocab(path: str | Path) -> GeneVocab:
    """Read only the genes of a checkpoint directory that scfm wrote."""
    path, header = read_header(path)
    return _vocab(path, header, verify=None)


def read_header(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Directory and content of ``scfm.json``, checked for completeness and format version."""
    path = Path(path).expanduser()
    recover(path)
    header = read_json(path / HEADER)
    required = {"format", "kind", "name", "config", "provenance", "files"}
    if not isinstance(header, dict) or not required <= header.keys():
        msg = f"{path / HEADER} is not a header written by scfm; fields {', '.join(sorted(required))} are expected"
        raise CheckpointError(msg)
    if header["format"] > FORMAT:
        msg = (
            f"{path} has format {header['format']} (written by scfm {header.get('scfm')}), this version of scfm reads "
            f"up to {FORMAT}. Upgrade with: pip install -U scfm"
        )
        raise CheckpointError(msg)
    return path, header


def _report(header: dict[str, Any], state: Mapping[str, Tensor]) -> LoadReport:
    values = header.get("load_report") or {}
    known = {f.name for f in fields(LoadReport)}
    report = LoadReport(**{key: value for key, value in values.items() if key in known})
    report.loaded = list(state)
    return report


def _vocab(path: Path, header: dict[str, Any], *, verify: bool | None) -> GeneVocab:
    from ..genes import GeneVocab

    values = read_json(path / VOCAB)
    _check_file(path, header, VOCAB, verify=verify)
    return GeneVocab.from_dict(values)


def _check_file(directory: Path, header: dict[str, Any], name: str, *, verify: bool | None) -> None:
    path, recorded = directory / name, header["files"][name]
    if not path.is_file():
        msg = f"{path} is missing; the checkpoint directory is incomplete. Fetch or save it again."
        raise CheckpointError(msg)
    size = path.stat().st_size
    if size != recorded["bytes"]:
        msg = (
            f"{path} has {size:,} bytes, {recorded['bytes']:,} were written; the file is cut off or was changed. "
            "Delete the directory and fetch or save the checkpoint again."
        )
        raise CheckpointError(msg)
    if verify is None:
        verify = size <= _ALWAYS_HASH
    if verify and sha256(path) != recorded["sha256"]:
        msg = (
            f"{path} is damaged or was changed: its SHA-256 is not the one recorded when it was written. "
            "Delete the directory and fetch or save the checkpoint again."
        )
        raise CheckpointError(msg)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        msg = f"{path} is damaged ({error}). Delete the directory and fetch or save the checkpoint again."
        raise CheckpointError(msg) from error


def _writable(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory: safetensors refuses tied weights and slices of one another."""
    out: dict[str, Tensor] = {}
    taken: list[tuple[int, int]] = []
    for key, value in state.items():
        tensor = value.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.contiguous()
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if any(start < other_end and other_start < end for other_start, other_end in taken):
            tensor = tensor.clone()
        else:
            taken.append((start, end))
        out[key] = tensor
    return out


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None
