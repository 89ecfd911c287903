"""Names of perturbations, and which of them are trained on, validated on and tested on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..checkpoints._files import write_text

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Sequence

    How = Literal["simulation", "single", "double"]

CONTROL = "ctrl"
SEPARATOR = "+"
SEPARATORS = ("+", "_")
SUBGROUPS = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")
# of the training perturbations, GEARS validates on those that the same procedure leaves out with these shares
_VALIDATION_SHARE = 0.9
_MANIFEST = "scfm perturbation split"

# usual names of cells that nothing was done to, without regard to capitals
_CONTROLS = re.compile(
    r"((neg(ative)?[-_ ]?)?(ctrl|control)s?|non[-_ ]?target(ing|ed)?|nt|safe[-_ ]?target(ing)?|"
    r"unperturbed|untreated|unstimulated|mock|vehicle|dmso|scrambled?|intergenic)([-_ ]?\d+)?",
    re.IGNORECASE,
)
# an unknown name costs more than a known one, so that the fewest unknown genes win
_KNOWN_COST, _UNKNOWN_COST = 2, 3


# -- names ---------------------------------------------------------------------------------------------------------------


def is_control(name: str, control: Collection[str] | None = None) -> bool:
    """Whether a name stands for control.

    Parameters
    ----------
    name
        The name.
    control
        Names of control, without regard to capitals, besides ``"ctrl"``; by default the usual ones, such as ``"control"``,
        ``"non-targeting"``, ``"NegCtrl0"`` and ``"NT_0123"``.
    """
    if control is None:
        return _CONTROLS.fullmatch(name) is not None
    return name.casefold() in {CONTROL, *(other.strip().casefold() for other in control)}


def parse_perturbation(
    text: str,
    control: Collection[str] | None = None,
    separators: Sequence[str] = SEPARATORS,
    *,
    known: Collection[str] = (),
) -> tuple[str, ...]:
    """Genes of a perturbation in any usual spelling: ``"A"``, ``"A+ctrl"``, ``"ctrl+A"``, ``"A+B"``, ``"A_B"``.

    Where a separator may belong to the name of a gene, the names in ``known`` decide: of all readings that with the fewest
    genes is taken, unknown names counting more, and never one with a separator in an unknown name.

    Parameters
    ----------
    text
        The label.
    control
        Names of control, see :func:`is_control`.
    separators
        Characters between genes.
    known
        Names of genes that are known.

    Returns
    -------
    The genes in the order of the label, each once; none for control.

    Raises
    ------
    ValueError
        If the label is empty, or holds a name without a letter or number.
    """
    text = str(text).strip()
    known = known if isinstance(known, (set, frozenset, dict)) else set(known)
    parts = re.split(f"([{re.escape(''.join(separators))}])", text) if separators else [text]
    words, between = parts[::2], parts[1::2]

    # best[end]: cost and pieces of the best reading of the words before end
    best: list[tuple[int, tuple[str, ...]] | None] = [(0, ())]
    for end in range(1, len(words) + 1):
        readings = []
        for start in range(end):
            piece = words[start] + "".join(
                gap + word for gap, word in zip(between[start : end - 1], words[start + 1 : end], strict=True)
            )
            piece, before = piece.strip(), best[start]
            sure = piece in known or is_control(piece, control)
            if before is not None and (sure or (end == start + 1 and piece)):
                readings.append((before[0] + (_KNOWN_COST if sure else _UNKNOWN_COST), (*before[1], piece)))
        best.append(min(readings, default=None))
    if best[-1] is None or not any(character.isalnum() for character in text):
        msg = f"{text!r} is no perturbation; write genes with {' or '.join(map(repr, separators))} between them, such as 'KLF1+CEBPA'"
        raise ValueError(msg)
    return tuple(dict.fromkeys(piece for piece in best[-1][1] if not is_control(piece, control)))


def canonical(genes: str | Iterable[str]) -> str:
    """One name for all spellings: genes in the order of their names, joined by ``"+"``; ``"ctrl"`` for none.

    Parameters
    ----------
    genes
        The genes, or a name with ``"+"`` between them.
    """
    genes = genes.split(SEPARATOR) if isinstance(genes, str) else genes
    return SEPARATOR.join(sorted({gene.strip() for gene in genes} - {CONTROL, ""})) or CONTROL


def canonical_of(text: str, known: Collection[str], control: Collection[str] | None = None) -> str:
    """Canonical name of a perturbation in any usual spelling; ``"_"`` separates genes only where all of them are known.

    Parameters
    ----------
    text, known, control
        As in :func:`parse_perturbation`.
    """
    known = known if isinstance(known, (set, frozenset, dict)) else set(known)
    genes = parse_perturbation(text, control, known=known)
    if not all(gene in known for gene in genes):
        genes = parse_perturbation(text, control, (SEPARATOR,), known=known)
    return canonical(genes)


def genes_of(name: str) -> tuple[str, ...]:
    """Genes of a canonical name; none for control."""
    return () if name == CONTROL else tuple(name.split(SEPARATOR))


# -- splits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerturbationSplit:
    """Which perturbations a model is trained on, validated on and tested on.

    Parameters
    ----------
    train, validation, test
        Canonical names, without control, which is always trained on.
    subgroups
        Test perturbations by what training has seen of them, see :func:`subgroups_of`.
    held_out_cell_types
        Cell types whose perturbed cells are left out of training.
    params
        How the split was made.

    Raises
    ------
    ValueError
        If a perturbation is in two parts.
    """

    train: list[str]
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    subgroups: dict[str, list[str]] = field(default_factory=dict)
    held_out_cell_types: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        together = [*self.train, *self.validation, *self.test]
        if twice := sorted({name for name in together if together.count(name) > 1}):
            msg = f"these perturbations are in two parts of the split, or twice in one: {', '.join(twice[:10])}"
            raise ValueError(msg)

    @classmethod
    def from_lists(
        cls,
        train: Iterable[str],
        validation: Iterable[str] = (),
        test: Iterable[str] = (),
        *,
        held_out_cell_types: Iterable[str] = (),
        control: Collection[str] | None = None,
        known: Collection[str] = (),
    ) -> PerturbationSplit:
        """A split of your own, from names in any spelling with ``"+"``; control and repeats are dropped.

        To test on a cell type that training has not seen perturbed, list it in ``held_out_cell_types``. Names with ``"_"`` between
        genes are understood where these are ``known``, see :func:`parse_perturbation`.
        """
        known = frozenset(known)
        parts = [
            sorted({canonical_of(name, known, control) for name in part} - {CONTROL})
            for part in (train, validation, test)
        ]
        types = [str(name) for name in held_out_cell_types]
        return cls(*parts, subgroups_of(parts[2], parts[0]), types, {"how": "user"})

    def of_cells(self, perturbations: Sequence[str], cell_types: Sequence[str] | None = None) -> np.ndarray:
        """Part of each cell: ``"train"``, ``"validation"``, ``"test"``, or ``""`` where the split does not name it.

        Parameters
        ----------
        perturbations
            Canonical name of each cell. Control cells are trained on, whatever their type.
        cell_types
            Type of each cell, for splits that hold out types.
        """
        names = np.asarray(perturbations).astype(str)
        out = np.full(len(names), "", dtype="<U10")
        for part in ("validation", "test", "train"):
            out[np.isin(names, getattr(self, part))] = part
        if self.held_out_cell_types:
            if cell_types is None:
                msg = "the split holds out cell types; give the type of each cell"
                raise ValueError(msg)
            out[np.isin(np.asarray(cell_types).astype(str), self.held_out_cell_types)] = "test"
        out[names == CONTROL] = "train"
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a manifest, a JSON file that appears complete or not at all."""
        names = ("train", "validation", "test", "subgroups", "held_out_cell_types", "params")
        values = {"format": _MANIFEST, "version": 1} | {name: getattr(self, name) for name in names}
        write_text(Path(path).expanduser(), json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerturbationSplit:
        """Read a manifest.

        Raises
        ------
        ValueError
            If the file is no such manifest.
        """
        try:
            values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            right = values.pop("format") == _MANIFEST and values.pop("version") == 1
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            right = False
        if not right:
            msg = f"{path} is no manifest of a split; make one with PerturbationSplit.save"
            raise ValueError(msg)
        return cls(**values)


def subgroups_of(names: Iterable[str], train: Iterable[str]) -> dict[str, list[str]]:
    """Perturbations by what training has seen: singles, and pairs of which 0, 1 or 2 genes were perturbed in training.

    Parameters
    ----------
    names
        Canonical names of one or two genes; those of more count as pairs of the genes that were seen, at most 2.
    train
        Canonical names that are trained on.
    """
    seen = {gene for name in train for gene in genes_of(name)}
    out: dict[str, list[str]] = {name: [] for name in SUBGROUPS}
    for name in sorted(names):
        genes = genes_of(name)
        n_seen = sum(gene in seen for gene in genes)
        out["unseen_single" if len(genes) == 1 else f"combo_seen{min(n_seen, 2)}"].append(name)
    return {name: members for name, members in out.items() if members}


def simulation_split(
    names: Sequence[str], *, seed: int = 1, train_gene_share: float = 0.75, combo_seen2_share: float = 0.75
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Leave perturbations out exactly as GEARS does, with the numbers that its seeds give.

    Parameters
    ----------
    names
        Singles as ``"A"`` or ``"A+ctrl"``, pairs as ``"A+B"``. The order of the genes of a pair matters for what is drawn.
    seed
        Seed of NumPy's legacy generator.
    train_gene_share
        Share of the genes that count as seen.
    combo_seen2_share
        Share of the pairs of seen genes that stay in training.

    Returns
    -------
    Names that stay, names that are left out, and these by subgroup, all as given.

    References
    ----------
    Roohani et al., GEARS, Nature Biotechnology 42, 927 (2024), split "simulation".
    """
    members = {name: tuple(gene for gene in name.split(SEPARATOR) if gene != CONTROL) for name in names}
    members = {name: genes for name, genes in members.items() if genes}
    genes = np.unique([gene for some in members.values() for gene in some])
    seen = set(np.random.RandomState(seed).choice(genes, int(len(genes) * train_gene_share), replace=False))
    n_seen = {name: sum(gene in seen for gene in some) for name, some in members.items()}
    singles = [name for name, some in members.items() if len(some) == 1]
    combos = [name for name, some in members.items() if len(some) > 1]
    both = np.array(sorted(name for name in combos if n_seen[name] > 1), dtype=object)
    kept = set(np.random.RandomState(seed).choice(both, int(len(both) * combo_seen2_share), replace=False))
    groups = {
        "combo_seen0": [name for name in combos if n_seen[name] == 0],
        "combo_seen1": [name for name in combos if n_seen[name] == 1],
        "combo_seen2": [name for name in both if name not in kept],
        "unseen_single": [name for name in singles if not n_seen[name]],
    }
    left_out = [name for group in groups.values() for name in group]
    stay = [name for name in members if name not in set(left_out)]
    return stay, left_out, groups


def split_perturbations(
    perturbations: Iterable[str],
    how: How = "simulation",
    *,
    seed: int = 1,
    train_gene_share: float = 0.75,
    combo_seen2_share: float = 0.75,
    seen: Literal[0, 1, 2] = 2,
    control: Collection[str] | None = None,
    known: Collection[str] = (),
) -> PerturbationSplit:
    """Split perturbations, so that a model is tested on what it has not been trained on.

    Parameters
    ----------
    perturbations
        Labels in any usual spelling, such as ``adata.obs["condition"].unique()``. The split of GEARS depends on the spelling
        (the order of the genes of a pair), so give the labels of the file for the same split as in papers.
    how
        ``"simulation"``
            As GEARS: genes that are never perturbed in training, alone or in pairs, and some pairs of the others; see
            :func:`simulation_split`. Validation is the same again within what is left, with shares of 0.9.
        ``"single"``
            Single perturbations only; some of the genes are left out.
        ``"double"``
            Test pairs of which training has seen ``seen`` genes. With 2, all singles and some pairs are trained on; with 1 or 0,
            the other genes of each test pair are left out of training and validation altogether. What is validated on does not
            count as seen.
    seed
        Seed of what is drawn.
    train_gene_share
        Share of the genes that are trained on.
    combo_seen2_share
        Share of the pairs of such genes that are trained on.
    seen
        For ``"double"``.
    control, known
        As in :func:`parse_perturbation`.

    Returns
    -------
    The split, with canonical names. For lists of your own, and for cell types that are held out, see
    :meth:`PerturbationSplit.from_lists`.

    Raises
    ------
    ValueError
        If there is no perturbation, an option is unknown, or a share is not between 0 and 1.
    """
    for share_name, share in {"train_gene_share": train_gene_share, "combo_seen2_share": combo_seen2_share}.items():
        if not 0 < share < 1:
            msg = f"{share_name} is a share above 0 and below 1; got {share!r}"
            raise ValueError(msg)
    if how not in ("simulation", "single", "double"):
        msg = f"how must be 'simulation', 'single' or 'double'; got {how!r}"
        raise ValueError(msg)
    if seen not in (0, 1, 2):
        msg = f"seen is how many genes of a test pair training has seen, 0, 1 or 2; got {seen!r}"
        raise ValueError(msg)
    # the order of genes in the first spelling of each perturbation counts
    spelled: dict[str, str] = {}
    for text in perturbations:
        genes = parse_perturbation(text, control, known=known)
        spelled.setdefault(canonical(genes), SEPARATOR.join(genes))
    spelled.pop(CONTROL, None)
    if not spelled:
        msg = "there is no perturbation to split, only control"
        raise ValueError(msg)
    names = {name: label for label, name in spelled.items()}
    params = {"how": how, "seed": int(seed), "train_gene_share": train_gene_share}
    params |= {"combo_seen2_share": combo_seen2_share} | ({"seen": seen} if how == "double" else {})

    def finished(train: Iterable[str], validation: Iterable[str], test: Iterable[str]) -> PerturbationSplit:
        parts = [sorted(names[label] for label in part) for part in (train, validation, test)]
        return PerturbationSplit(*parts, subgroups_of(parts[2], parts[0]), [], params)

    labels = list(names)
    if how == "single":
        labels = [label for label in labels if SEPARATOR not in label]
    if how != "double":
        train, test, groups = simulation_split(
            labels, seed=seed, train_gene_share=train_gene_share, combo_seen2_share=combo_seen2_share
        )
        train, validation, _ = simulation_split(
            train, seed=seed, train_gene_share=_VALIDATION_SHARE, combo_seen2_share=_VALIDATION_SHARE
        )
        made = finished(train, validation, test)
        # GEARS counts a gene as seen by the first draw, whether or not a perturbation of it is left
        subgroups = {name: sorted(names[label] for label in groups[name]) for name in SUBGROUPS if groups[name]}
        return PerturbationSplit(made.train, made.validation, made.test, subgroups, [], params)
    return finished(*_double_split(labels, seed, train_gene_share, combo_seen2_share, seen))


def _double_split(
    labels: list[str], seed: int, gene_share: float, pair_share: float, seen: int
) -> tuple[list[str], list[str], list[str]]:
    rng = np.random.default_rng(seed)
    members = {label: set(label.split(SEPARATOR)) for label in sorted(labels)}
    pairs = [label for label, genes in members.items() if len(genes) > 1]
    if seen == 2:
        order = list(rng.permutation(np.array(pairs, dtype=object)))
        n_test = max(1, round(len(pairs) * (1 - pair_share))) if pairs else 0
        candidates = order[:n_test]
        rest = sorted(set(members) - set(candidates))
    else:
        genes = sorted(set().union(*members.values()))
        away = set(
            rng.choice(np.array(genes, dtype=object), max(1, round(len(genes) * (1 - gene_share))), replace=False)
        )
        candidates = [label for label in pairs if members[label] & away]
        rest = [label for label, some in members.items() if not some & away]
    n_validation = round(len(rest) * (1 - _VALIDATION_SHARE))
    held_out = [label for label in rest if len(members[label]) > 1] or rest
    validation = sorted(rng.permutation(np.array(held_out, dtype=object))[: min(n_validation, len(held_out) // 2)])
    train = [label for label in rest if label not in set(validation)]
    trained, used = (set().union(*(members[label] for label in part)) for part in (train, rest))
    if seen == 2:
        return train, validation, [label for label in candidates if members[label] <= trained]
    # a gene that only validation has is neither seen nor left out
    test = [label for label in candidates if len(members[label] & trained) == len(members[label] & used) == seen]
    return train, validation, test
