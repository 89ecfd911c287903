"""A model in another form: other hyper-parameters or other genes, around the weights that fit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import _logging
from ..checkpoints.convert import LoadReport
from ..nn.low_rank import merged_state
from ._build import from_config

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from ..genes import GeneVocab
    from ._base import Backbone


def rebuilt(
    backbone: Backbone,
    config: Any,
    *,
    vocab: GeneVocab | None = None,
    seed: int = 0,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    name: str | None = None,
) -> Backbone:
    """Make a copy with another config, and other genes if wanted, that keeps every weight that fits.

    The network is built with fresh weights; then each tensor of the original replaces the one with the same name and
    the same shape. Of tables with a row for each vocabulary entry (``vocab_tables`` of the class), rows go to the entry
    of the same name. A head, batch labels or a second modality can so be added to a pre-trained model.

    Parameters
    ----------
    backbone
        The model; it is not changed. Adapters are added to their weights in the copy.
    config
        Config of the copy, or its values as a dict.
    vocab
        Vocabulary of the copy, by default that of the original.
    seed
        Seed of the fresh weights. The global random state is neither used nor changed.
    include
        Regular expressions for whole names of the tensors that are taken over; all by default.
    exclude
        Regular expressions for whole names of tensors that are not.
    name
        Name of the copy, by default that of the original.

    Returns
    -------
    A float32 copy on the same device. In its ``load_report``, ``loaded`` lists the tensors that were kept, ``partly``
    those kept in some rows only, ``fresh`` those made anew, and ``dropped`` those of the original that found no place.

    Raises
    ------
    ValueError
        If a pattern fits no tensor, or ``vocab`` is another one and the class does not name its ``vocab_tables``.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import scfm
    >>> model = scfm.load("scgpt-mini")
    >>> tuned = scfm.backbones.rebuilt(model, replace(model.config, n_batches=2, use_batch_labels=True))
    >>> sorted(tuned.load_report.dropped)
    ['decoder.fc.0.weight', 'mvc.W.weight']
    """
    vocab = backbone.vocab if vocab is None else vocab
    same_genes = np.array_equal(vocab.names, backbone.vocab.names)
    if not (same_genes or backbone.vocab_tables):
        msg = (
            f"{type(backbone).__name__} does not say which tensors have a row for each vocabulary entry, so its genes "
            "cannot be exchanged; name them in its class variable vocab_tables"
        )
        raise ValueError(msg)
    copy = from_config(
        backbone.kind,
        config,
        vocab,
        seed=seed,
        name=name or backbone.name,
        device=str(backbone.device),
        precision="float32",
    )
    old, new = merged_state(backbone.module), copy.module.state_dict()
    allowed = _allowed([*old, *(key for key in new if key not in old)], include, exclude)
    report = LoadReport()
    for key, tensor in old.items():
        target = new.get(key)
        if target is None:
            report.dropped[key] = "the new network has no such tensor"
        elif key not in allowed:
            report.dropped[key] = "left out on request"
        elif not same_genes and key in backbone.constants and key not in backbone.vocab_tables:
            report.dropped[key] = "it belongs to the genes of the original"
            _logging.warning(f"{key} of {backbone.name} belongs to other genes; give the copy its own")
        elif not same_genes and key in backbone.vocab_tables and tensor.shape[1:] == target.shape[1:]:
            n_rows = _copy_rows(tensor, target, backbone.vocab, vocab)
            report.loaded.append(key)
            if n_rows < len(target):
                report.partly[key] = (n_rows, len(target))
        elif tensor.shape == target.shape:
            target.copy_(tensor)
            report.loaded.append(key)
        else:
            report.dropped[key] = f"its shape is {tuple(tensor.shape)}, that of the new one {tuple(target.shape)}"
    kept = set(report.loaded)
    report.fresh = [key for key in new if key not in kept]
    copy.load_report = report
    copy.provenance = _provenance(backbone, seed)
    return copy


def _allowed(names: list[str], include: Collection[str] | None, exclude: Collection[str]) -> set[str]:
    """Names of the tensors that may be taken over."""
    matched = {p: {name for name in names if re.fullmatch(p, name)} for p in (*(include or ()), *exclude)}
    for pattern, found in matched.items():
        if not found:
            msg = f"no tensor of the model has a name like {pattern!r}; there are {', '.join(names[:5])} and others"
            raise ValueError(msg)
    chosen = set(names) if include is None else set().union(*(matched[pattern] for pattern in include))
    return chosen.difference(*(matched[pattern] for pattern in exclude))


def _copy_rows(old: Tensor, new: Tensor, old_vocab: GeneVocab, new_vocab: GeneVocab) -> int:
    """Copy rows by the name of their vocabulary entry, and rows after the vocabulary in their order; their number."""
    source = old_vocab.get_ids(new_vocab.names)
    known = np.flatnonzero(source >= 0)
    extra = min(len(old) - len(old_vocab), len(new) - len(new_vocab))
    rows = np.concatenate([known, len(new_vocab) + np.arange(extra)])
    source = np.concatenate([source[known], len(old_vocab) + np.arange(extra)])
    new[torch.from_numpy(rows).to(new.device)] = old[torch.from_numpy(source).to(old.device)].to(new)
    return len(rows)


def _provenance(backbone: Backbone, seed: int) -> Any:
    """Licence and citation stay those of the original; its file is not what the copy holds."""
    origin = backbone.provenance
    extra = {**origin.extra, "rebuilt": {"id": origin.id, "sha256": origin.start_sha256, "seed": seed}}
    return replace(origin, path="", sha256="", extra=extra)
