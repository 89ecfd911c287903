"""``scfm.load``: from a name or a path to a backbone."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _logging
from .._errors import CheckpointError, UnsupportedError
from .._settings import settings
from ..checkpoints import _registry, store
from ..checkpoints._pins import pinned
from ..checkpoints.fetch import fetch_files, show_licence
from ._base import Backbone, Provenance
from ._build import filled
from ._kinds import backbone_class, backbone_kinds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._settings import Precision
    from ..checkpoints import Entry
    from ..genes import GeneVocab
    from ._base import Checkpoint


def load(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    weights: str | None = None,
    **options: Any,
) -> Backbone:
    """Load a foundation model.

    Parameters
    ----------
    name_or_path
        One of

        - a name or alias of :func:`scfm.checkpoints.list`, such as ``"scgpt"``; what is missing is downloaded,
        - a directory with an official checkpoint as its authors release it, or a weight file in it,
        - a directory that scfm saved.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device such as ``"cuda:1"``.
    precision
        ``"auto"`` (float32; bfloat16 on CUDA), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    weights
        Which weight set of a checkpoint that holds several, for example ``"gene"`` of scFoundation.
    options
        What else the reader of the official checkpoint takes; see the documentation of the model.

    Returns
    -------
    A :class:`scfm.Backbone` in evaluation mode.

    Raises
    ------
    ValueError
        If no checkpoint has this name.
    FileNotFoundError
        If the path does not exist, or a file has to be fetched by hand.
    scfm.CheckpointError
        If a file is damaged, belongs to another model or does not fit the network key by key.
    scfm.UnsupportedError
        If the checkpoint is known but the installed scfm has no network for it.
    scfm.OfflineError, scfm.LicenseError
        See :func:`scfm.checkpoints.fetch`.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.load("scgpt-mini")
    >>> model.kind
    'scgpt'
    """
    source = _locate(name_or_path)
    if source.stored:
        _no_options(source, weights, options)
        backbone = _load_stored(source)
    elif source.entry is not None:
        backbone = _load_released(source.entry, weights, options)
    else:
        backbone = _load_local(source, weights, options)
    return backbone.to(device, precision)


def load_vocab(name_or_path: str | Path, **options: Any) -> GeneVocab:
    """Load only the genes of a model.

    Parameters
    ----------
    name_or_path
        As in :func:`scfm.load`; the weights are not downloaded if the model can do without.
    options
        As in :func:`scfm.load`.
    """
    source = _locate(name_or_path)
    if source.stored:
        return store.read_vocab(source.directory)
    if source.entry is not None:
        cls, files = _class_of(source.entry), source.entry.required_files
        if cls.read_vocab.__func__ is not Backbone.read_vocab.__func__:
            files = [file for file in files if file.role in ("vocabulary", "config")]
        directory = fetch_files(source.entry, files)
    else:
        cls, directory = _recognized_class(source), source.directory
    with _reading(directory):
        return cls.read_vocab(directory, **options)


# -- what a name or a path means -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A directory, with the file in it that the user named, or an entry of the registry."""

    directory: Path
    file: str | None = None
    entry: Entry | None = None

    @property
    def stored(self) -> bool:
        if self.entry is not None:
            return self.entry.bundled is not None
        return store.is_stored(self.directory)


def _locate(name_or_path: str | Path) -> _Source:
    if isinstance(name_or_path, str) and (entry := _registry.find(name_or_path)) is not None:
        return _Source(entry.directory, entry=entry)
    path = Path(name_or_path).expanduser()
    if path.is_dir() or store.is_stored(path):
        return _Source(path)
    if path.is_file():
        return _Source(path.parent, file=path.name)
    if isinstance(name_or_path, Path) or os.sep in name_or_path or path.suffix:
        msg = (
            f"{path} does not exist; give a checkpoint directory, its weight file, or a name of scfm.checkpoints.list()"
        )
        raise FileNotFoundError(msg)
    raise ValueError(_registry.unknown_name(name_or_path))


def _class_of(entry: Entry) -> type[Backbone]:
    if entry.backbone not in backbone_kinds():
        msg = (
            f"{entry.name!r} is a released checkpoint, but the installed scfm has no network for {entry.backbone!r}; "
            f"it has {', '.join(backbone_kinds()) or 'none'}. scfm.checkpoints.fetch({entry.name!r}) gets the files."
        )
        raise UnsupportedError(msg)
    return backbone_class(entry.backbone)


def _recognized_class(source: _Source) -> type[Backbone]:
    """The one installed backbone class that knows the directory."""
    candidates = [source.directory / source.file] if source.file else []
    kinds = [k for k in backbone_kinds() if any(_recognizes(k, path) for path in [*candidates, source.directory])]
    if len(kinds) == 1:
        return backbone_class(kinds[0])
    if kinds:
        msg = (
            f"{source.directory} looks like a checkpoint of {' and of '.join(kinds)}; "
            "put the files of each model into a directory of its own"
        )
        raise CheckpointError(msg)
    wanted = [f"{store.HEADER} (written by scfm)"]
    for kind in backbone_kinds():
        sets = dict.fromkeys(
            ", ".join(file.name for file in entry.required_files)
            for entry in _registry.entries().values()
            if entry.backbone == kind and entry.bundled is None
        )
        wanted += [f"{names} ({kind})" for names in sets]
    found = sorted(path.name for path in source.directory.iterdir())
    shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    msg = (
        f"{source.directory} holds no checkpoint that scfm knows. Looked for: {'; '.join(wanted)}. "
        f"Found: {shown or 'nothing'}."
    )
    raise CheckpointError(msg)


def _recognizes(kind: str, path: Path) -> bool:
    try:
        return backbone_class(kind).recognizes(path)
    except (ImportError, AttributeError) as error:
        _logging.warning(f"the backbone class {kind!r} that some package provides cannot be imported: {error}")
        return False


def _no_options(source: _Source, weights: str | None, options: dict[str, Any]) -> None:
    given = [*(["weights"] if weights else []), *options]
    if given:
        msg = (
            f"{source.directory} was saved by scfm and holds one set of weights with its config; "
            f"{', '.join(given)} can be given for official checkpoints only"
        )
        raise ValueError(msg)


# -- the three kinds of source ---------------------------------------------------------------------------------------


def _load_stored(source: _Source) -> Backbone:
    stored = store.read(source.directory)
    if stored.kind not in backbone_kinds():
        msg = f"{source.directory} holds a {stored.kind!r} model; installed are {', '.join(backbone_kinds()) or 'none'}"
        raise UnsupportedError(msg)
    if source.entry is not None:
        show_licence(source.entry)
    recorded = stored.provenance
    provenance = Provenance(
        id=stored.name,
        path=str(source.directory),
        sha256=stored.sha256,
        licence=recorded.get("licence", ""),
        citation=recorded.get("citation", ""),
        weights=recorded.get("weights", ""),
        extra={**recorded.get("extra", {}), "source": {key: recorded.get(key, "") for key in ("id", "sha256")}},
    )
    return _from_stored(stored, name=stored.name, provenance=provenance)


def _load_local(source: _Source, weights: str | None, options: dict[str, Any]) -> Backbone:
    cls = _recognized_class(source)
    if source.file is not None and source.file not in _released_names(cls.kind):
        if weights is not None:
            msg = f"weights={weights!r} was given together with the file {source.file}; give the directory instead"
            raise ValueError(msg)
        weights = source.file
    checkpoint = _read_official(cls, source.directory, weights, options)
    path = _weight_file(cls.kind, source.directory, checkpoint)
    digest = pinned(path)
    same = [e for e in _registry.entries().values() if any(f.sha256 == digest for f in e.files)]
    if same:
        show_licence(same[0])
        name, provenance = same[0].name, _provenance(same[0], path, digest, checkpoint.weights)
    else:
        name, provenance = cls.kind, _presumed_provenance(cls.kind, path, digest, checkpoint.weights)
    return _from_checkpoint(cls, checkpoint, name=name, provenance=provenance)


def _load_released(entry: Entry, weights: str | None, options: dict[str, Any]) -> Backbone:
    cls = _class_of(entry)
    if weights is None and entry.weights:
        weights = entry.weights[0]
    directory = fetch_files(entry, entry.required_files)
    show_licence(entry)
    path = directory / entry.weight_file.name
    provenance = _provenance(entry, path, pinned(path), weights or "")
    if options:  # they may change config and weights, so what was converted without them does not apply
        checkpoint = _read_official(cls, directory, weights, options)
        return _from_checkpoint(cls, checkpoint, name=entry.name, provenance=provenance)
    converted = settings.cachedir / "converted" / "-".join(filter(None, (entry.name, weights, provenance.sha256[:12])))
    if (backbone := _from_cache(converted, entry.name, provenance)) is not None:
        return backbone
    checkpoint = _read_official(cls, directory, weights, {})
    backbone = _from_checkpoint(cls, checkpoint, name=entry.name, provenance=provenance)
    _to_cache(backbone, converted)
    return _from_cache(converted, entry.name, provenance) or backbone


def _from_cache(converted: Path, name: str, provenance: Provenance) -> Backbone | None:
    """A checkpoint that was converted before; ``None`` if there is none or an older scfm made it."""
    if not store.is_stored(converted):
        return None
    try:
        return _from_stored(store.read(converted), name=name, provenance=provenance)
    except CheckpointError as error:
        _logging.info(f"the converted copy of {name} is made anew ({error})")
        return None


def _to_cache(backbone: Backbone, converted: Path) -> None:
    try:
        store.save_backbone(backbone, converted, overwrite=True)
    except OSError as error:  # a read-only cache, a full disk, or another process that was faster
        _logging.debug(f"the converted checkpoint is not kept: {error}")


# -- parts -----------------------------------------------------------------------------------------------------------


def _read_official(cls: type[Backbone], directory: Path, weights: str | None, options: dict[str, Any]) -> Checkpoint:
    if weights is not None:
        options = {"weights": weights, **options}
    with _reading(directory):
        return cls.read_official(directory, **options)


def _from_checkpoint(cls: type[Backbone], checkpoint: Checkpoint, *, name: str, provenance: Provenance) -> Backbone:
    module = filled(
        cls,
        checkpoint.config,
        checkpoint.vocab,
        checkpoint.state_dict,
        checkpoint.report,
        what=provenance.path,
    )
    return cls(
        module,
        checkpoint.config,
        checkpoint.vocab,
        name=name,
        load_report=checkpoint.report,
        provenance=provenance,
    )


def _from_stored(stored: store.Stored, *, name: str, provenance: Provenance) -> Backbone:
    cls = backbone_class(stored.kind)
    try:
        config = cls.config_from_dict(stored.config)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"the config in {stored.path / store.HEADER} is none of {cls.__name__} in this version of scfm: {error}"
        raise CheckpointError(msg) from error
    module = filled(cls, config, stored.vocab, stored.state_dict, stored.report, what=str(stored.path))
    return cls(module, config, stored.vocab, name=name, load_report=stored.report, provenance=provenance)


def _provenance(entry: Entry, path: Path, sha256: str, weights: str) -> Provenance:
    return Provenance(
        id=entry.name,
        path=str(path),
        sha256=sha256,
        licence=entry.licence.name,
        citation=str(entry.citation),
        weights=weights,
    )


def _released_names(kind: str) -> set[str]:
    """Names the authors give to weight files."""
    return {entry.weight_file.name for entry in _registry.entries().values() if entry.backbone == kind}


def _usual_weight_files(kind: str) -> list[str]:
    return [e.weight_file.name for e in _registry.entries().values() if e.backbone == kind and e.bundled is None]


def _weight_file(kind: str, directory: Path, checkpoint: Checkpoint) -> Path:
    """The file that was read: the one the reader names, one that the authors use, or the largest."""
    for name in (checkpoint.file, checkpoint.weights, *_usual_weight_files(kind)):
        if name and (directory / name).is_file():
            return directory / name
    return max((path for path in directory.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


def _presumed_provenance(kind: str, path: Path, sha256: str, weights: str) -> Provenance:
    """For files whose hash does not tell what they are: what holds if they are released weights of their kind."""
    provenance = Provenance(id=path.resolve().parent.name, path=str(path), sha256=sha256, weights=weights)
    entry = next((e for e in _registry.entries().values() if e.backbone == kind and e.bundled is None), None)
    if entry is None:
        return provenance
    show_licence(entry, presumed=True)
    licence = f"{entry.licence.name} (if these are the released weights)"
    return replace(provenance, licence=licence, citation=str(entry.citation))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file provokes into an error that names the place."""
    try:
        yield
    except (CheckpointError, UnsupportedError):
        raise
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        RuntimeError,
    ) as error:
        msg = (
            f"a file in {path} cannot be read as what it should be: {type(error).__name__}: {error}. It is damaged, "
            "cut off, or belongs to another model; fetch it again."
        )
        raise CheckpointError(msg) from error
