"""Features of several modalities: which ones are chosen, and what those of other data are to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from .. import _logging
from .._counts import CountStats
from ..genes import GeneMatch, GeneVocab
from ._alignment import align
from ._fields import GeneField
from ._multiome_data import ATAC, PROTEIN, RNA
from ._variable_genes import variable_genes

if TYPE_CHECKING:
    from mudata import MuData

    from ..data import CellSource
    from ._multiome_data import Modalities

    Number = int | Literal["all"]

# keeps proteins apart from the genes of the same name
PREFIX = "p_"
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class FeatureChoice:
    """Which features were chosen, and how.

    Parameters
    ----------
    names
        Their names in the vocabulary of the network by kind of modality, sorted.
    how
        How they were chosen, by kind: for genes a flavour of :func:`scanpy.pp.highly_variable_genes`, for peaks
        ``"accessibility"``, or ``"all"``.
    """

    names: dict[str, np.ndarray]
    how: dict[str, str]

    def __str__(self) -> str:
        words = {RNA: "genes", ATAC: "peaks", PROTEIN: "proteins"}
        return ", ".join(f"{len(names):,} {words[kind]} ({self.how[kind]})" for kind, names in self.names.items())


def choose_features(
    mdata: MuData,
    modalities: Modalities,
    match: GeneMatch,
    batches: np.ndarray,
    *,
    n_top_genes: Number,
    n_top_peaks: Number,
) -> FeatureChoice:
    """Choose features of each modality by itself, on the cells that are in it.

    Genes vary most within batches (:func:`variable_genes`), whether or not the model knows them. Peaks are those whose
    accessibility, open or not, has the highest variance over cells, that is, those open in closest to half of the cells;
    equal ones go by name. Proteins are all taken.

    Parameters
    ----------
    mdata
        The data; the counts of RNA are read into memory.
    modalities
        What its modalities are.
    match
        Which gene of the pre-trained model each gene is.
    batches
        Batch of each cell.
    n_top_genes, n_top_peaks
        How many, or ``"all"``.
    """
    names, how = {}, {}
    for kind, part in modalities.of(mdata).items():
        with modalities.open(mdata, kind) as source:
            if kind == RNA:
                rows = mdata.obs_names.get_indexer(part.obs_names)
                names[kind], how[kind] = _genes(source, match, batches[rows], n_top_genes)
            elif kind == ATAC:
                names[kind], how[kind] = _peaks(source, n_top_peaks)
            else:
                names[kind], how[kind] = np.unique(protein_names(source)), "all"
    choice = FeatureChoice(names, how)
    _logging.info(f"    {choice}")
    return choice


def _genes(source: CellSource, match: GeneMatch, batches: np.ndarray, n: Number) -> tuple[np.ndarray, str]:
    entries = np.where(match.ids >= 0, match.vocab_names, match.names).astype(object)
    every = np.unique(entries[entries != ""])
    if n == "all":
        return every, "all"
    vocab = GeneVocab(every)
    known = GeneMatch(vocab.get_ids(entries), match.how, match.names, vocab)
    choice = variable_genes(source, known, batches, n)
    return choice.genes, choice.how


def _peaks(source: CellSource, n: Number) -> tuple[np.ndarray, str]:
    names, column = np.unique(source.var_names.to_numpy(dtype=str), return_inverse=True)
    if n != "all" and n < 1:
        msg = f"n_top_peaks must be positive; got {n}"
        raise ValueError(msg)
    if n == "all" or len(names) <= n:
        return names.astype(object), "all"
    open_in, stats = np.zeros(len(names), dtype=np.int64), CountStats()
    for block in source.blocks(_ROWS_AT_ONCE):
        stats.update(block.counts)
        if stats.n_negative or stats.n_nan or stats.n_infinite:
            msg = f"{source.where} does not hold counts: it {stats.problem()}. {stats.remedy()}"
            raise ValueError(msg)
        counts = block.counts
        # sorting changes a matrix in place, so it must not share memory with the data
        ones, shape = np.ones(counts.nnz, dtype=np.float32), (counts.shape[0], len(names))
        peaks = csr_matrix((ones, column[counts.indices], counts.indptr.copy()), shape=shape)
        peaks.sum_duplicates()
        open_in += peaks.getnnz(0)
    # the variance of a share is highest at one half
    order = np.argsort(np.abs(2 * open_in - source.n_obs), kind="stable")
    return np.sort(names[order[:n]]).astype(object), "accessibility"


def protein_names(source: CellSource) -> np.ndarray:
    """Names of proteins as vocabulary entries."""
    return np.array([PREFIX + name for name in source.var_names.astype(str)], dtype=object)


def feature_labels(kind: str, names: np.ndarray) -> list[str]:
    """Names of features as the data have them."""
    return [name.removeprefix(PREFIX) if kind == PROTEIN else name for name in names]


def match_features(
    mdata: MuData, modalities: Modalities, choice: FeatureChoice, vocab: GeneVocab, state: dict[str, Any], aliases: Any
) -> tuple[dict[str, np.ndarray], GeneMatch]:
    """Find the chosen features in any data.

    Parameters
    ----------
    mdata
        The data, whose modalities may have their features in any order, or may be missing.
    modalities
        What its modalities are.
    choice
        The chosen features.
    vocab
        Vocabulary of the network.
    state
        State of the genes as of :class:`GeneField`; what is matched is noted there.
    aliases
        Table of other names, as in :func:`scfm.tl.embed`.

    Returns
    -------
    Numbers of the found features by kind of modality, in the order of the vocabulary, and what each of them is there.
    """
    columns, ids, how, names = {}, [], [], []
    for kind in modalities.of(mdata):
        with modalities.open(mdata, kind) as source:
            own = source.var_names.to_numpy(dtype=str).astype(object)
            entries = protein_names(source) if kind == PROTEIN else own
        found = vocab.get_ids(entries)
        ways = np.full(len(own), "symbol", dtype=object)
        if kind == RNA:
            match = align(vocab, state, aliases)
            found, ways, own = match.ids, match.how, match.names
        wanted = np.zeros(len(vocab), dtype=bool)
        wanted[vocab.get_ids(choice.names[kind])] = True
        kept = np.flatnonzero((found >= 0) & wanted[found])
        # what is random about a token depends on its place, which must not depend on the order of the features
        kept = kept[np.argsort(found[kept], kind="stable")]
        columns[kind] = kept
        ids.append(found[kept])
        how.append(ways[kept])
        names.append(own[kept])
    joined = [np.concatenate(part) if part else np.zeros(0, dtype=object) for part in (ids, how, names)]
    return columns, GeneMatch(joined[0].astype(np.int64), joined[1], joined[2], vocab)


def note_new_genes(state: dict[str, Any], choice: FeatureChoice) -> None:
    """Note that chosen genes that the pre-trained model does not know are entries under their own name."""
    matched, names = state[GeneField.MATCHED], set(choice.names[RNA])
    matched.update({name: name for name, entry in matched.items() if not entry and name in names})
