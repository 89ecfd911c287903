"""Key tables: from the names in an official file to the names in our networks, with nothing left unsaid."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class KeyRule:
    r"""One row of a key table.

    Parameters
    ----------
    pattern
        Regular expression that has to match a whole upstream key.
    target
        Template of our key (``\1`` refers to groups); ``None`` drops the key on purpose.
    reason
        Why a key is dropped.
    part
        Number of the tensor among those that our key joins, and how many these are; they are laid one below the other.
        ``None`` if the tensor is the whole of it.
    """

    pattern: str
    target: str | None
    reason: str = ""
    part: tuple[int, int] | None = None


@dataclass
class LoadReport:
    """What happened to every key of a checkpoint.

    Parameters
    ----------
    loaded
        Tensors of the network that were filled.
    renamed
        Names in the file and in the network, where they differ.
    dropped
        Keys that were left out, and why.
    missing
        Tensors of the network that the file lacks.
    unexpected
        Keys that no rule knows.
    reshaped
        Shapes in the file and in the network, where they differ.
    fresh
        Tensors that were made anew when the network got another form, see :func:`scfm.backbones.rebuilt`.
    partly
        Rows filled and rows there are, of tensors filled in part.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    partly: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every weight of the network was filled and no key was left without a rule."""
        return not (self.missing or self.unexpected or self.reshaped)

    def raise_for_errors(self, what: str) -> None:
        """Raise :class:`scfm.CheckpointError` if the report is not :attr:`ok`."""
        if self.ok:
            return
        parts = []
        if self.unexpected:
            parts.append(f"keys that no rule knows: {_some(self.unexpected)}")
        if self.missing:
            parts.append(f"weights missing from the file: {_some(self.missing)}")
        if self.reshaped:
            shapes = [f"{k} is {was} in the file, {want} in the model" for k, (was, want) in self.reshaped.items()]
            parts.append(f"shapes that differ: {_some(shapes)}")
        msg = f"{what} does not fit the model. " + "; ".join(parts)
        raise CheckpointError(msg)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.renamed)} of them renamed"]
        reasons = dict.fromkeys(self.dropped.values())
        grouped = {reason: [key for key, why in self.dropped.items() if why == reason] for reason in reasons}
        lines += [f"dropped on purpose: {_some(keys)} ({reason})" for reason, keys in grouped.items()]
        lines += [f"filled in part: {key} ({rows:,} of {n:,} rows)" for key, (rows, n) in self.partly.items()]
        for title in ("fresh", "missing", "unexpected"):
            if keys := getattr(self, title):
                lines.append(f"{title}: {_some(keys)}")
        if self.reshaped:
            lines.append(f"reshaped: {_some(self.reshaped)}")
        return "\n".join(lines)


def _some(names: Iterable[str], n: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


def rename(state: Mapping[str, Tensor], rules: Sequence[KeyRule]) -> tuple[dict[str, Tensor], LoadReport]:
    """Apply a key table; the first rule that matches a key decides.

    Returns
    -------
    The tensors under our names, and a report in which keys that no rule matched stand as ``unexpected``.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    report = LoadReport()
    for key, tensor in state.items():
        rule, match = next(((rule, m) for pattern, rule in compiled if (m := pattern.fullmatch(key))), (None, None))
        if rule is None:
            report.unexpected.append(key)
            continue
        if rule.target is None:
            report.dropped[key] = rule.reason
            continue
        target = match.expand(rule.target)
        if target in out or rule.part in parts.get(target, {}):
            msg = f"two keys of the file, one of them {key!r}, both map to {target!r}"
            raise CheckpointError(msg)
        if rule.part is None:
            out[target] = tensor
        else:
            parts.setdefault(target, {})[rule.part] = tensor
        report.loaded.append(target)
        if target != key:
            report.renamed[key] = target
    for target, tensors in parts.items():
        out[target] = _joined(target, tensors)
    report.loaded = list(dict.fromkeys(report.loaded))
    return out, report


def _joined(target: str, tensors: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Tensors one below the other, in the order of their numbers."""
    wanted = {(i, n) for _, n in tensors for i in range(n)}
    if wanted != tensors.keys():
        msg = f"{len(wanted - tensors.keys())} of the {len(wanted)} tensors that make up {target!r} are missing"
        raise CheckpointError(msg)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors.values()}
    if len(shapes) > 1 or any(tensor.ndim == 0 for tensor in tensors.values()):
        msg = f"the tensors that make up {target!r} differ in shape: {', '.join(map(str, shapes))}"
        raise CheckpointError(msg)
    return torch.cat([tensors[part] for part in sorted(tensors)])


def check_against(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], report: LoadReport, *, optional: Sequence[str] = ()
) -> LoadReport:
    """Compare renamed tensors with a network's state dict; fills ``missing``, ``unexpected`` and ``reshaped``.

    ``optional`` holds regular expressions of network keys that a file may lack.
    """
    optional_patterns = [re.compile(pattern) for pattern in optional]
    for key, tensor in state.items():
        if key not in expected:
            report.unexpected.append(key)
        elif tuple(tensor.shape) != tuple(expected[key].shape):
            report.reshaped[key] = (tuple(tensor.shape), tuple(expected[key].shape))
    report.missing += [
        key for key in expected if key not in state and not any(p.fullmatch(key) for p in optional_patterns)
    ]
    return report
