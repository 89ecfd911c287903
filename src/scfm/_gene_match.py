"""What the genes of a data set are in a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._columns import ColumnMap, Duplicates, check_duplicates
from ._gene_names import mismatch_hint, some

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from .genes import GeneVocab


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Genes of a data set and what they are in a vocabulary; made by :meth:`GeneVocab.match`.

    Parameters
    ----------
    ids
        Vocabulary id of each gene, -1 where there is none, int64, shape ``(n_vars,)``.
    how
        ``"symbol"``, ``"ensembl"``, ``"alias"`` or ``""`` for each gene, shape ``(n_vars,)``.
    names
        Names in the data, shape ``(n_vars,)``.
    vocab
        The vocabulary.
    """

    ids: np.ndarray
    how: np.ndarray
    names: np.ndarray
    vocab: GeneVocab

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_matched(self) -> int:
        """Number of genes of the data that have an entry."""
        return int((self.ids >= 0).sum())

    @cached_property
    def n_vocab_covered(self) -> int:
        """Number of entries of the vocabulary that the data has."""
        return len(np.unique(self.ids[self.ids >= 0]))

    @property
    def fraction(self) -> float:
        """Share of the genes of the data that have an entry."""
        return self.n_matched / len(self) if len(self) else 0.0

    @cached_property
    def vocab_names(self) -> np.ndarray:
        """Name of each gene in the vocabulary, empty where there is none, shape ``(n_vars,)``."""
        return np.where(self.ids >= 0, self.vocab.names[self.ids], "")

    @property
    def missing(self) -> np.ndarray:
        """Names of genes without an entry."""
        return self.names[self.ids < 0]

    @property
    def renamed(self) -> dict[str, str]:
        """Name in the vocabulary of the genes that are called otherwise in the data."""
        rows = (self.ids >= 0) & (self.names != self.vocab_names)
        return dict(zip(self.names[rows], self.vocab_names[rows], strict=True))

    @cached_property
    def duplicated(self) -> dict[str, list[str]]:
        """Names in the data, by name in the vocabulary, where several genes share one entry."""
        rows = np.flatnonzero(self.ids >= 0)
        several = rows[pd.Series(self.ids[rows]).duplicated(keep=False).to_numpy()]
        return pd.Series(self.names[several]).groupby(self.vocab_names[several], sort=False).agg(list).to_dict()

    @cached_property
    def hint(self) -> str:
        """What may be wrong when less than a tenth of the genes is known; empty otherwise."""
        return mismatch_hint(self.names) if len(self) and self.fraction < 0.1 else ""

    def report(self) -> pd.DataFrame:
        """Table with one row per gene: ``name``, ``vocab_name``, ``id``, ``how``, ``n_sharing`` genes on that entry."""
        table = pd.DataFrame({"name": self.names, "vocab_name": self.vocab_names, "id": self.ids, "how": self.how})
        table["n_sharing"] = table.groupby("id")["id"].transform("size").where(table["id"] >= 0, 0)
        return table

    def summary(self) -> str:
        """One line for the log."""
        counts = {how: int((self.how == how).sum()) for how in ("symbol", "ensembl", "alias")}
        ways = ", ".join(f"{n:,} by {how}" for how, n in counts.items() if n)
        text = f"{self.n_matched:,} of {len(self):,} genes ({self.fraction:.1%}) are known to the model"
        text += f" ({ways})" if ways else ""
        if self.duplicated:
            n = sum(map(len, self.duplicated.values()))
            entries = "entry" if len(self.duplicated) == 1 else "entries"
            text += f"; {n:,} of them share {len(self.duplicated):,} {entries}: {some(self.duplicated)}"
        return text

    def require_any(self, model: str = "the model") -> None:
        """Raise ``ValueError`` if no gene is known; the message shows names of both sides."""
        if self.n_matched:
            return
        msg = (
            f"none of the {len(self):,} genes of the data ({some(self.names)}) is among the {self.vocab.n_genes:,} genes "
            f"of {model} ({some(self.vocab.genes)}). {self.hint}"
        ).rstrip()
        raise ValueError(msg)

    def column_map(self, duplicates: Duplicates = "sum") -> ColumnMap:
        """The column selection behind :meth:`collapse`; made once per rule."""
        check_duplicates(duplicates)
        if duplicates == "error" and self.duplicated:
            shown = [f"{name} from {', '.join(names)}" for name, names in self.duplicated.items()]
            msg = (
                f"{len(shown):,} entries of the vocabulary are met by several genes of the data: {'; '.join(shown[:5])}. "
                "Use duplicates='sum' to add their counts."
            )
            raise ValueError(msg)
        maps = self.__dict__.setdefault("_column_maps", {})
        if duplicates not in maps:
            maps[duplicates] = ColumnMap.from_ids(self.ids, duplicates=duplicates)
        return maps[duplicates]

    def collapse(self, counts: csr_matrix, duplicates: Duplicates = "sum") -> tuple[csr_matrix, np.ndarray]:
        """Keep the columns of known genes.

        Parameters
        ----------
        counts
            Counts of the data, shape ``(cells, n_vars)``.
        duplicates
            What happens to genes that share an entry: ``"sum"`` adds them at the place of the first, ``"keep"``
            leaves them separate, ``"error"`` raises ``ValueError``.

        Returns
        -------
        Counts of shape ``(cells, columns)`` and the vocabulary id of each column.
        """
        columns = self.column_map(duplicates)
        return columns.apply(counts), columns.ids
