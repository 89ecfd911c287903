"""Molecules as graphs of atoms, and as fingerprints, from SMILES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ATOM_FEATURES, BOND_FEATURES = 62, 6
# a bond is counted at both of its ends; organic atoms have no more
MAX_DEGREE = 5
# the last entry of each list stands for everything else, too
_SYMBOLS = (
    *("C", "N", "O", "S", "F", "Si", "P", "Cl", "Br", "Mg", "Na", "Ca", "Fe", "As", "Al", "I", "B", "V", "K", "Tl"),
    *("Yb", "Sb", "Sn", "Ag", "Pd", "Co", "Se", "Ti", "Zn", "H", "Li", "Ge", "Cu", "Au", "Ni", "Cd", "In", "Mn", "Zr"),
    *("Cr", "Pt", "Hg", "Pb", "Unknown"),
)
_HYDROGENS = 5
_VALENCES = 6
_SHOWN = 5


@dataclass(frozen=True)
class Molecule:
    """Atoms and bonds of one molecule.

    Parameters
    ----------
    atoms
        Features of the atoms, float32, ``(atoms, 62)``; atoms with fewer neighbours come first.
    bonds
        Features of the bonds, float32, ``(bonds, 6)``.
    ends
        Atoms at both ends of each bond, int64, ``(bonds, 2)``.
    """

    atoms: np.ndarray
    bonds: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class MoleculeBatch:
    """Several molecules as one graph, atoms of one molecule after those of another.

    Parameters
    ----------
    atoms
        Features, ``(atoms, 62)``.
    bonds
        Features, ``(bonds, 6)``.
    target, source
        Atoms at both ends of each bond, in both directions, ``(2 * bonds,)``.
    bond
        Number of that bond, ``(2 * bonds,)``.
    lengths
        Atoms of each molecule.
    """

    atoms: Tensor
    bonds: Tensor
    target: Tensor
    source: Tensor
    bond: Tensor
    lengths: list[int]

    @classmethod
    def of(
        cls, molecules: Sequence[Molecule], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> MoleculeBatch:
        """Put molecules together; the same one may occur several times."""
        lengths = [len(molecule.atoms) for molecule in molecules]
        shifts = np.cumsum([0, *lengths[:-1]])
        ends = np.concatenate([molecule.ends + shift for molecule, shift in zip(molecules, shifts, strict=True)])
        bond = np.arange(len(ends))

        def tensor(values: np.ndarray, kind: torch.dtype) -> Tensor:
            return torch.from_numpy(values).to(device, kind)

        return cls(
            tensor(np.concatenate([molecule.atoms for molecule in molecules]), dtype),
            tensor(np.concatenate([molecule.bonds for molecule in molecules]), dtype),
            tensor(np.concatenate([ends[:, 0], ends[:, 1]]), torch.int64),
            tensor(np.concatenate([ends[:, 1], ends[:, 0]]), torch.int64),
            tensor(np.concatenate([bond, bond]), torch.int64),
            lengths,
        )

    @property
    def degrees(self) -> Tensor:
        """Neighbours of each atom, ``(atoms,)``."""
        return torch.bincount(self.target, minlength=len(self.atoms))


def molecules_of(smiles: Sequence[str]) -> list[Molecule]:
    """Graphs with the features of neural fingerprints, as DeepCE has them.

    An atom has 44 values for its element (43 and "other"), 6 for its number of neighbours, 5 for its hydrogens, 6 for its implicit
    valence and one for aromaticity; a bond has 4 for its kind, one for conjugation and one for being in a ring. Hydrogens are no
    atoms, unless the SMILES says so.

    Parameters
    ----------
    smiles
        One SMILES for each molecule; those that occur again are read once.

    Raises
    ------
    MissingExtraError
        If rdkit is not installed.
    ValueError
        If a SMILES cannot be read, or has an atom with more than five neighbours; all of them are named.

    References
    ----------
    Duvenaud et al., Convolutional networks on graphs for learning molecular fingerprints, NeurIPS 2015; Pham et al., DeepCE,
    Nature Machine Intelligence 3, 247 (2021).
    """
    known = {text: _graph(molecule) for text, molecule in _read(smiles).items()}
    if crowded := [text for text, molecule in known.items() if molecule is None]:
        msg = f"{_named(crowded)} an atom with more than {MAX_DEGREE} neighbours, for which there are no weights; leave such drugs out"
        raise ValueError(msg)
    return [known[str(text)] for text in smiles]


def morgan_fingerprints(smiles: Sequence[str], *, radius: int = 2, n_bits: int = 1024) -> np.ndarray:
    """Which of many circular substructures a molecule has (Morgan fingerprints of rdkit).

    Parameters
    ----------
    smiles
        One SMILES for each molecule.
    radius
        Bonds from the centre to the edge of a substructure.
    n_bits
        Length of the fingerprint.

    Returns
    -------
    Zeros and ones, uint8, ``(molecules, n_bits)``.

    Raises
    ------
    MissingExtraError
        If rdkit is not installed.
    ValueError
        If a SMILES cannot be read.
    """
    generators = require("rdkit.Chem.rdFingerprintGenerator", purpose="fingerprints of molecules")
    generator = generators.GetMorganGenerator(radius=radius, fpSize=n_bits)
    known = {text: generator.GetFingerprintAsNumPy(molecule) for text, molecule in _read(smiles).items()}
    rows = [known[str(text)] for text in smiles]
    return np.stack(rows).astype(np.uint8) if rows else np.zeros((0, n_bits), dtype=np.uint8)


def _read(smiles: Sequence[str]) -> dict[str, Any]:
    """Molecules of rdkit by SMILES, each once; what cannot be read is named."""
    if isinstance(smiles, str):
        msg = f"a list of SMILES is needed, not the text {smiles!r}"
        raise TypeError(msg)
    chem = require("rdkit.Chem", purpose="reading molecules")
    log = require("rdkit.rdBase", purpose="reading molecules")
    with log.BlockLogs():
        # a missing value becomes text that is no SMILES; the empty SMILES is a molecule without atoms
        read = {text: chem.MolFromSmiles(text) if text.strip() else None for text in dict.fromkeys(map(str, smiles))}
    if wrong := [text for text, molecule in read.items() if molecule is None or not molecule.GetNumAtoms()]:
        shown = ", ".join(map(repr, wrong[:_SHOWN]))
        msg = f"rdkit cannot read {len(wrong):,} SMILES: {shown}{' ...' if len(wrong) > _SHOWN else ''}; correct them or leave these drugs out"
        raise ValueError(msg)
    return read


def _named(smiles: list[str]) -> str:
    shown = ", ".join(map(repr, smiles[:_SHOWN]))
    return f"{shown}{' ...' if len(smiles) > _SHOWN else ''} {'has' if len(smiles) == 1 else 'have'}"


def _graph(molecule: Any) -> Molecule | None:
    chem = require("rdkit.Chem", purpose="reading molecules")
    atoms = list(molecule.GetAtoms())
    degrees = np.array([atom.GetDegree() for atom in atoms])
    if degrees.max() > MAX_DEGREE:
        return None
    order = np.argsort(degrees, kind="stable")
    place = np.argsort(order)
    features = np.zeros((len(atoms), ATOM_FEATURES), dtype=np.float32)
    for row, number in zip(features, order, strict=True):
        atom = atoms[number]
        start = 0
        for size, value in (
            (len(_SYMBOLS), _SYMBOLS.index(atom.GetSymbol()) if atom.GetSymbol() in _SYMBOLS else len(_SYMBOLS)),
            (MAX_DEGREE + 1, atom.GetDegree()),
            (_HYDROGENS, atom.GetTotalNumHs()),
            (_VALENCES, atom.GetValence(chem.ValenceType.IMPLICIT)),
        ):
            row[start + min(value, size - 1)] = 1
            start += size
        row[start] = atom.GetIsAromatic()
    kinds = (chem.BondType.SINGLE, chem.BondType.DOUBLE, chem.BondType.TRIPLE, chem.BondType.AROMATIC)
    bonds = list(molecule.GetBonds())
    described = [
        [*(bond.GetBondType() == kind for kind in kinds), bond.GetIsConjugated(), bond.IsInRing()] for bond in bonds
    ]
    ends = [[place[bond.GetBeginAtomIdx()], place[bond.GetEndAtomIdx()]] for bond in bonds]
    return Molecule(
        features,
        np.array(described, dtype=np.float32).reshape(-1, BOND_FEATURES),
        np.array(ends, dtype=np.int64).reshape(-1, 2),
    )
