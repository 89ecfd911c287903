"""Modalities of a multi-omic vocabulary: which entries are genes, peaks or proteins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...genes import GeneVocab
from .config import SPECIALS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from .config import SCGPTConfig

# name of the buffer with the modality of each vocabulary entry, and what it holds where that is not known
TABLE, UNKNOWN = "modality_of_token", -1


def modality_names(names: Iterable[str]) -> tuple[str, ...]:
    """Vocabulary of modalities as scGPT makes it: sorted names, then the special tokens.

    Examples
    --------
    >>> modality_names(["RNA", "ATAC"])
    ('ATAC', 'RNA', '<pad>', '<cls>', '<eoc>')
    """
    return (*sorted(set(names) - set(SPECIALS)), *SPECIALS)


def multiomic_vocab(vocab: GeneVocab, features: Mapping[str, Sequence[str]]) -> GeneVocab:
    """Vocabulary of a multi-omic model that starts from a pre-trained one (Cui et al. 2024, multi-omic integration).

    Parameters
    ----------
    vocab
        Vocabulary of the pre-trained model.
    features
        Names of the features of each modality. What ``vocab`` has under the same name keeps its embedding.

    Returns
    -------
    The special tokens and those features that ``vocab`` has, in its order; then the others.

    Raises
    ------
    ValueError
        If a name occurs twice, or is that of a special token.
    """
    names = _names(features)
    known = np.isin(vocab.names, names)
    kept = known | ~vocab.is_gene
    new = [name for name in names if name not in vocab]
    taken = [name for name in names if name in vocab.specials]
    if taken:
        msg = f"{taken[0]!r} is a special token of the model and cannot be a feature; rename it"
        raise ValueError(msg)
    ids = None if vocab.ensembl_ids is None else [*vocab.ensembl_ids[kept], *("" for _ in new)]
    return GeneVocab([*vocab.names[kept], *new], specials=vocab.specials, ensembl_ids=ids)


def modality_table(config: SCGPTConfig, vocab: GeneVocab, features: Mapping[str, Sequence[str]]) -> Tensor:
    """Modality of each vocabulary entry as an index into ``config.modalities``, int64; -1 where ``features`` is silent.

    Parameters
    ----------
    config
        Config with the names of the modalities.
    vocab
        The vocabulary. Special tokens have the modality of their own name, or that of padding if there is none.
    features
        Names of the vocabulary entries of each modality.

    Raises
    ------
    ValueError
        If a modality or a name is unknown, or a name belongs to two modalities.
    """
    names = list(config.modalities)
    if unknown := [name for name in features if name not in names]:
        known = ", ".join(name for name in names if name not in SPECIALS)
        msg = f"{unknown[0]!r} is no modality of this model; it has {known or 'none'}"
        raise ValueError(msg)
    _names(features)
    table = np.full(len(vocab), UNKNOWN, dtype=np.int64)
    for token in vocab.specials:
        table[vocab[token]] = names.index(token if token in names else config.pad_token)
    for modality, members in features.items():
        ids = vocab.get_ids(members)
        if (ids < 0).any():
            missing = np.asarray(members, dtype=object)[ids < 0]
            msg = f"{len(missing)} of the {len(ids)} features of {modality} are not in the vocabulary, e.g. {missing[0]!r}"
            raise ValueError(msg)
        table[ids] = names.index(modality)
    return torch.from_numpy(table)


def _names(features: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of all features, each of which occurs once."""
    names = [str(name) for members in features.values() for name in members]
    if len(set(names)) < len(names):
        values, counts = np.unique(np.asarray(names, dtype=object), return_counts=True)
        twice = values[counts > 1]
        msg = (
            f"{len(twice)} features occur more than once, e.g. {twice[0]!r}; give each a name of its own, for example "
            "'p_' before the names of proteins"
        )
        raise ValueError(msg)
    return names
