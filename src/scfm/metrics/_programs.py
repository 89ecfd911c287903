"""Gene programs beside known groups of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def program_recovery(
    programs: Mapping[str, Sequence[str]],
    known_sets: Mapping[str, Sequence[str]],
    universe: Iterable[str],
    *,
    n_random: int = 1000,
    rng: int | np.random.Generator = 0,
) -> pd.DataFrame:
    """How well programs find known groups of genes, against random programs of the same sizes.

    Each known group is compared with the program that fits it best (by F1). Random programs are what is left when the
    genes of the universe are shuffled among programs; the numbers of genes that they share with a group are drawn
    from their exact distribution, the multivariate hypergeometric one.

    Parameters
    ----------
    programs
        Genes of each program. A gene is in one program at most.
    known_sets
        Genes of each known group; groups may overlap.
    universe
        The genes that could have been in a program. Others are ignored.
    n_random
        Number of random sets of programs.
    rng
        Seed of the draws.

    Returns
    -------
    Table with one row for each known group:

    ``n_genes``
        Genes of the group that are in the universe.
    ``program``, ``program_size``, ``overlap``
        The program with the largest F1, its size, and the genes that both have.
    ``precision``, ``recall``, ``F1``
        Share of the program that is in the group, share of the group that is in the program, their harmonic mean.
    ``F1 random``, ``F1 z``, ``F1 p``
        Mean of the best F1 over random programs, distance to it in standard deviations, and share of random sets of programs
        that do at least as well (counting the real one).
    ``together``, ``together random``, ``together p``
        Share of the pairs of genes of the group that are in the same program, and the same for random programs.

    Groups with fewer than two genes in the universe have NaN for all scores.

    Raises
    ------
    ValueError
        If a gene is in two programs, there are no programs, or ``n_random`` is not positive.
    """
    if n_random < 1:
        msg = f"n_random must be positive; got {n_random}"
        raise ValueError(msg)
    genes = pd.Index(pd.unique(np.asarray(list(universe), dtype=object)))
    names = list(programs)
    code = _membership(genes, programs)
    sizes = np.bincount(code[code >= 0], minlength=len(names))
    generator = np.random.default_rng(rng)
    rows = {}
    for name, members in known_sets.items():
        inside = genes.isin(list(members))
        n = int(inside.sum())
        if n < 2:
            rows[name] = {"n_genes": n, "program": "", "program_size": 0, "overlap": 0}
            continue
        found = code[inside]
        shared = np.bincount(found[found >= 0], minlength=len(names))
        drawn = generator.multivariate_hypergeometric([*sizes, len(genes) - sizes.sum()], n, size=n_random)[:, :-1]
        f1, together = _f1(shared, sizes, n), _together(shared, n)
        random_f1, random_together = _f1(drawn, sizes, n).max(1), _together(drawn, n)
        best = int(f1.argmax())
        spread = random_f1.std()
        rows[name] = {
            "n_genes": n,
            "program": names[best],
            "program_size": int(sizes[best]),
            "overlap": int(shared[best]),
            "precision": shared[best] / max(sizes[best], 1),
            "recall": shared[best] / n,
            "F1": f1[best],
            "F1 random": random_f1.mean(),
            "F1 z": (f1[best] - random_f1.mean()) / spread if spread > 0 else np.nan,
            "F1 p": _share_at_least(random_f1, f1[best]),
            "together": together,
            "together random": random_together.mean(),
            "together p": _share_at_least(random_together, together),
        }
    columns = [
        *("n_genes", "program", "program_size", "overlap", "precision", "recall"),
        *("F1", "F1 random", "F1 z", "F1 p", "together", "together random", "together p"),
    ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("known set")


def _membership(genes: pd.Index, programs: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Number of the program of each gene, -1 for none."""
    if not programs:
        msg = "there are no programs to compare with known sets"
        raise ValueError(msg)
    code = np.full(len(genes), -1)
    for number, (name, members) in enumerate(programs.items()):
        places = genes.get_indexer(pd.unique(np.asarray(list(members), dtype=object)))
        places = places[places >= 0]
        if (taken := places[code[places] >= 0]).size:
            msg = f"gene {genes[taken[0]]} of program {name!r} is in another program, too; a gene can be in one only"
            raise ValueError(msg)
        code[places] = number
    return code


def _f1(shared: np.ndarray, sizes: np.ndarray, n: int) -> np.ndarray:
    return 2 * shared / (n + sizes)


def _together(shared: np.ndarray, n: int) -> np.ndarray:
    return (shared * (shared - 1)).sum(-1) / (n * (n - 1))


def _share_at_least(random: np.ndarray, value: float) -> float:
    # the rounding of equal numbers must not decide
    return float((1 + (random >= value - 1e-12).sum()) / (1 + len(random)))
