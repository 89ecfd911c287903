"""What is released: the entries of ``registry.json`` and the checkpoints bundled with scfm."""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import _logging
from .._errors import CheckpointError
from .._settings import settings
from ._files import read_json

if TYPE_CHECKING:
    import pandas as pd

Commercial = Literal["yes", "no", "unstated"]
Status = Literal["bundled", "cached", "downloadable", "by hand"]

_WRAP = {"width": 110, "break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class Licence:
    """The licence of weights.

    Parameters
    ----------
    name
        Short name.
    url
        Where the text stands.
    commercial
        Whether it permits commercial use.
    text
        What it means, in plain words.
    """

    name: str
    url: str
    commercial: Commercial
    text: str

    @property
    def needs_consent(self) -> bool:
        """Whether a download needs ``settings.accept_licenses``."""
        return self.commercial != "yes"


@dataclass(frozen=True)
class Citation:
    """The paper to cite."""

    text: str
    doi: str = ""

    def __str__(self) -> str:
        return f"{self.text} https://doi.org/{self.doi}" if self.doi else self.text


@dataclass(frozen=True)
class RemoteFile:
    """One file of a checkpoint.

    Parameters
    ----------
    name
        File name inside the directory of the checkpoint.
    role
        ``"weights"``, ``"config"``, ``"vocabulary"`` or ``"side"``.
    required
        Whether the model can be loaded without it.
    url
        Where it can be downloaded; ``None`` if it has to be fetched by hand.
    bytes, bytes_exact
        Size, and whether it is exact or an estimate.
    sha256, hash_source, hash_verified
        Known hash, where it comes from, and whether it is certain. A file that differs from a certain hash is
        refused, one that differs from an uncertain hash is reported.
    licence
        Licence of this file if it is an open one that differs from the licence of the weights.
    """

    name: str
    role: Literal["weights", "config", "vocabulary", "side"]
    required: bool = True
    url: str | None = None
    bytes: int | None = None
    bytes_exact: bool = False
    sha256: str | None = None
    hash_source: str = ""
    hash_verified: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class ByHand:
    """How to get files that no plain link leads to."""

    link: str
    text: str


@dataclass(frozen=True)
class Mirror:
    """A copy that somebody other than the authors keeps; used only when asked for by name."""

    name: str
    link: str
    note: str
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Entry:
    """One released checkpoint.

    Parameters
    ----------
    name, aliases
        Names to load it by.
    backbone
        Kind of network.
    title
        What it is, in one line.
    files
        Its files.
    licence, citation, source
        Licence of the weights, paper, home page.
    weights
        Names of the weight sets if one file holds several; the first is the default.
    by_hand
        How to fetch what has no plain link.
    mirrors
        Copies that others keep.
    bundled
        Directory inside the package, for checkpoints that come with scfm.
    """

    name: str
    backbone: str
    title: str
    files: tuple[RemoteFile, ...]
    licence: Licence
    citation: Citation
    source: str = ""
    aliases: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    by_hand: ByHand | None = None
    mirrors: tuple[Mirror, ...] = ()
    bundled: Path | None = None

    @property
    def directory(self) -> Path:
        """Where its files lie, or are put."""
        return self.bundled or settings.cachedir / self.name

    @property
    def required_files(self) -> tuple[RemoteFile, ...]:
        """The files without which the model cannot be loaded."""
        return tuple(file for file in self.files if file.required)

    @property
    def weight_file(self) -> RemoteFile:
        """The file with the weights."""
        return next(file for file in self.files if file.role == "weights")

    @property
    def size(self) -> str:
        """Size of the required files in words."""
        sizes = [file.bytes for file in self.required_files if file.role == "weights" or file.bytes]
        if any(size is None for size in sizes):
            return "unknown"
        exact = all(file.bytes_exact for file in self.required_files)
        return ("" if exact else "about ") + human_bytes(sum(sizes))

    @property
    def status(self) -> Status:
        """Whether it is here, can be downloaded, or has to be fetched by hand."""
        if self.bundled:
            return "bundled"
        missing = [file for file in self.required_files if not (self.directory / file.name).is_file()]
        if not missing:
            return "cached"
        return "downloadable" if all(file.url for file in missing) else "by hand"

    def file(self, name: str) -> RemoteFile:
        """The file called ``name``."""
        for file in self.files:
            if file.name == name:
                return file
        msg = f"{self.name} has no file {name!r}; its files are {', '.join(file.name for file in self.files)}"
        raise ValueError(msg)

    def mirror(self, name: str) -> Mirror:
        """The mirror called ``name``, if files can be downloaded from it."""
        usable = {mirror.name: mirror for mirror in self.mirrors if mirror.files}
        if name not in usable:
            msg = f"{self.name} has no mirror {name!r} to download from; there are: {', '.join(usable) or 'none'}"
            raise ValueError(msg)
        return usable[name]

    def __repr__(self) -> str:
        licence = self.licence
        rows = {
            "title": self.title,
            "backbone": self.backbone,
            "also called": ", ".join(self.aliases),
            "weight sets": ", ".join(self.weights),
            "status": f"{self.status}, {self.size}",
            "directory": str(self.directory),
            "files": ", ".join(file.name + ("" if file.required else " (optional)") for file in self.files),
            "by hand": f"{self.by_hand.text} {self.by_hand.link}" if self.by_hand else "",
            "mirrors": "; ".join(f"{mirror.name} ({mirror.note}) {mirror.link}" for mirror in self.mirrors),
            "licence": f"{licence.name}; commercial use: {licence.commercial}. {licence.text} {licence.url}",
            "cite": str(self.citation),
            "source": self.source,
        }
        lines = [
            textwrap.fill(text, initial_indent=f"  {title:<13}", subsequent_indent=" " * 15, **_WRAP)
            for title, text in rows.items()
            if text
        ]
        return "\n".join([f"Checkpoint {self.name}", *lines])


def human_bytes(number: float) -> str:
    """A number of bytes in words, decimal units."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _released() -> list[Entry]:
    return _read_registry(Path(str(files(__package__) / "registry.json")))


def _of_other_packages() -> list[Entry]:
    """Entries of packages that name a module with a ``registry.json`` in the entry-point group ``scfm.registries``."""
    found = []
    for point in entry_points(group="scfm.registries"):
        try:
            spec = find_spec(point.value)  # finds the file without importing the package
            found += _read_registry(Path(spec.submodule_search_locations[0]) / "registry.json")
        except (CheckpointError, ImportError, AttributeError, OSError, ValueError, KeyError, TypeError) as error:
            _logging.warning(
                f"the checkpoints of the package {point.value!r} are left out: its registry.json cannot be read "
                f"({type(error).__name__}: {error})"
            )
    return found


def _read_registry(path: Path) -> list[Entry]:
    table: dict[str, Any] = read_json(path)
    licences = {key: Licence(**values) for key, values in table["licences"].items()}
    citations = {key: Citation(**values) for key, values in table["citations"].items()}
    return [
        Entry(
            name=row["name"],
            backbone=row["backbone"],
            title=row["title"],
            files=tuple(RemoteFile(**values) for values in row["files"]),
            licence=licences[row["licence"]],
            citation=citations[row["citation"]],
            source=row["source"],
            aliases=tuple(row.get("aliases", ())),
            weights=tuple(row.get("weights", ())),
            by_hand=ByHand(**row["by_hand"]) if row.get("by_hand") else None,
            mirrors=tuple(Mirror(**values) for values in row.get("mirrors", ())),
        )
        for row in table["checkpoints"]
    ]


def bundled_directory() -> Path:
    """Where the checkpoints lie that come with scfm."""
    return Path(str(files(__package__) / "bundled"))


def _bundled() -> list[Entry]:
    """Every directory in ``bundled/`` that scfm wrote; what the table shows stands in its header."""
    entries = []
    for header_path in sorted(bundled_directory().glob("*/scfm.json")):
        header = read_json(header_path)
        extra = header["provenance"].get("extra", {})
        entries.append(
            Entry(
                name=header["name"],
                backbone=header["kind"],
                title=extra.get("title", f"small {header['kind']} for demonstrations, made by scfm"),
                files=tuple(
                    RemoteFile(
                        name=name,
                        role="weights" if name.endswith(".safetensors") else "vocabulary",
                        bytes=values["bytes"],
                        bytes_exact=True,
                        sha256=values["sha256"],
                        hash_source="written by scfm",
                        hash_verified=True,
                    )
                    for name, values in header["files"].items()
                ),
                licence=Licence(
                    name=header["provenance"].get("licence") or "BSD-3-Clause",
                    url=extra.get("licence_url", ""),
                    commercial=extra.get("commercial", "yes"),
                    text=extra.get("licence_text", "Comes with scfm."),
                ),
                citation=Citation(text=header["provenance"].get("citation", "")),
                bundled=header_path.parent,
            )
        )
    return entries


@cache
def entries() -> dict[str, Entry]:
    """All checkpoints by name: the bundled ones, the released ones, and those of other packages under free names."""
    own = [*_bundled(), *_released()]
    taken = {name for entry in own for name in (entry.name, *entry.aliases)}
    others = [entry for entry in _of_other_packages() if not taken & {entry.name, *entry.aliases}]
    return {entry.name: entry for entry in [*own, *others]}


@cache
def _names() -> dict[str, str]:
    return {name: entry.name for entry in entries().values() for name in (entry.name, *entry.aliases)}


def find(name: str) -> Entry | None:
    """The entry called ``name``, by name or alias, in any case; ``None`` if there is none."""
    canonical = _names().get(name.lower())
    return None if canonical is None else entries()[canonical]


def close_matches(name: str) -> list[str]:
    """Names of checkpoints that look like ``name``."""
    matches = difflib.get_close_matches(name.lower(), list(_names()), n=3, cutoff=0.5)
    return list(dict.fromkeys(_names()[match] for match in matches))


def info(name: str) -> Entry:
    """Everything known about one checkpoint.

    Parameters
    ----------
    name
        Name or alias, see :func:`scfm.checkpoints.list`.

    Returns
    -------
    The entry; printing it shows files, licence and citation.

    Raises
    ------
    ValueError
        If no checkpoint has this name.

    Examples
    --------
    >>> import scfm
    >>> scfm.checkpoints.info("scfoundation").licence.commercial
    'no'
    """
    entry = find(name)
    if entry is None:
        raise ValueError(unknown_name(name))
    return entry


def unknown_name(name: str) -> str:
    """Error text for a name that is not in the registry."""
    matches = close_matches(name)
    hint = f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
    return f"there is no checkpoint called {name!r}.{hint} scfm.checkpoints.list() shows all names."


def list_checkpoints() -> pd.DataFrame:
    """Table of all checkpoints.

    Returns
    -------
    :class:`pandas.DataFrame` with one row per checkpoint: ``name``, ``backbone``, ``title``, ``size``, ``licence``,
    ``commercial`` (whether the licence permits commercial use: yes, no, unstated) and ``status`` (bundled with scfm,
    cached on this machine, downloadable, or to be fetched by hand as :func:`scfm.checkpoints.info` describes).
    """
    import pandas as pd

    columns = ["name", "backbone", "title", "size", "licence", "commercial", "status"]
    rows = [
        (e.name, e.backbone, e.title, e.size, e.licence.name, e.licence.commercial, e.status)
        for e in entries().values()
    ]
    return pd.DataFrame(rows, columns=columns)
