"""Molecules as graphs and fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")

from scfm.tasks.molecules import ATOM_FEATURES, BOND_FEATURES, MoleculeBatch, molecules_of, morgan_fingerprints

ASPIRIN, CAFFEINE, ETHANOL = "CC(=O)OC1=CC=CC=C1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "CCO"


def test_features_are_those_of_deepce(golden):
    data = golden("sclong", "chem_perturb_deepce")
    batch = MoleculeBatch.of(molecules_of(data.input["smiles"].tolist()), dtype=torch.float64)
    # the authors sort the atoms of the whole batch by degree
    order = np.argsort(batch.degrees.numpy(), kind="stable")
    np.testing.assert_array_equal(batch.atoms.numpy()[order], data.input["atom"])
    np.testing.assert_array_equal(batch.bonds.numpy(), data.input["bond"])
    np.testing.assert_array_equal(batch.lengths, data.input["mask"].sum(1))


def test_one_indicator_of_each_kind_for_every_atom():
    (molecule,) = molecules_of([CAFFEINE])
    assert molecule.atoms.shape == (14, ATOM_FEATURES)
    assert molecule.bonds.shape == (15, BOND_FEATURES)
    for start, stop in ((0, 44), (44, 50), (50, 55), (55, 61)):
        np.testing.assert_array_equal(molecule.atoms[:, start:stop].sum(1), 1)
    degrees = np.bincount(molecule.ends.ravel(), minlength=14)
    np.testing.assert_array_equal(molecule.atoms[:, 44:50].argmax(1), degrees)
    assert (np.diff(degrees) >= 0).all()


def test_elements_and_ions():
    salt, strange, triple = molecules_of(["[Na+].[Cl-]", "[U]", "C#N"])
    np.testing.assert_array_equal(np.flatnonzero(salt.atoms[0]), [10, 44, 50, 55])
    assert salt.bonds.shape == (0, BOND_FEATURES)
    assert strange.atoms[0, 43] == 1  # uranium is not in the list
    np.testing.assert_array_equal(triple.bonds, [[0, 0, 1, 0, 0, 0]])


def test_batch_keeps_molecules_apart():
    one, two = molecules_of([ETHANOL, ASPIRIN])
    batch = MoleculeBatch.of([one, two, one])
    assert batch.lengths == [3, 13, 3]
    owner = np.repeat(np.arange(3), batch.lengths)
    np.testing.assert_array_equal(owner[batch.source], owner[batch.target])
    np.testing.assert_array_equal(batch.atoms[:3], batch.atoms[-3:])
    # each bond stands there in both directions
    pairs = {(int(a), int(b)) for a, b in zip(batch.source, batch.target, strict=True)}
    assert pairs == {(b, a) for a, b in pairs}


def test_wrong_smiles_are_named():
    with pytest.raises(ValueError, match=r"cannot read 2 SMILES: 'C\(C', ''"):
        molecules_of([ETHANOL, "C(C", ""])
    with pytest.raises(ValueError, match=r"'FS\(F\)\(F\)\(F\)\(F\)F' has an atom with more than 5"):
        molecules_of(["FS(F)(F)(F)(F)F"])
    with pytest.raises(TypeError, match="a list of SMILES"):
        molecules_of(ETHANOL)
    with pytest.raises(ValueError, match="nan"):
        morgan_fingerprints([float("nan")])


def test_fingerprints():
    prints = morgan_fingerprints([ASPIRIN, CAFFEINE, ASPIRIN], n_bits=256)
    assert prints.shape == (3, 256)
    assert set(np.unique(prints)) == {0, 1}
    np.testing.assert_array_equal(prints[0], prints[2])
    assert (prints[0] != prints[1]).any()
    assert morgan_fingerprints([], n_bits=8).shape == (0, 8)
