"""Genes of data on those of a model, by name, and the same for the same name ever after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..genes import AliasTable, GeneMatch
from ._fields import GeneField

if TYPE_CHECKING:
    from ..genes import GeneVocab


def align(vocab: GeneVocab, state: dict[str, Any], aliases: Any) -> GeneMatch:
    """Match the genes of registered data to a vocabulary, and write the result into their registry.

    Names that the registry knows already keep what they were matched to, or that they were not.

    Parameters
    ----------
    vocab
        Genes of the model.
    state
        State registry of the :class:`GeneField`; its ``"matched"`` is extended.
    aliases
        Table of other names, as in :func:`scfm.tl.embed`.
    """
    names, matched = state[GeneField.NAMES], state[GeneField.MATCHED]
    match = vocab.match(names, ensembl_ids=state[GeneField.ENSEMBL_IDS], aliases=AliasTable.resolve(aliases) or None)
    replayed = np.array([name in matched for name in names], dtype=bool)
    genes = np.where(match.ids >= 0, vocab.names[match.ids], "")
    genes[replayed] = [matched[name] for name in names[replayed]]
    ids = np.where(replayed, vocab.get_ids(genes), match.ids)
    how = np.where(ids == match.ids, match.how, np.where(ids >= 0, "alias", ""))
    # a name that means several genes, told apart by their Ensembl ids, has to be matched again each time
    once = ~pd.Series(names).duplicated(keep=False).to_numpy()
    matched.update(zip(names[once], genes[once], strict=True))
    return GeneMatch(ids, how, names, vocab)
