"""Names of perturbations and splits: all spellings, GEARS exactly, and what a split must not do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.tasks.perturbation_data import (
    PerturbationSplit,
    canonical,
    canonical_of,
    genes_of,
    parse_perturbation,
    simulation_split,
    split_perturbations,
    subgroups_of,
)


@pytest.mark.parametrize(
    ("text", "genes"),
    [
        ("A", ("A",)),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("B+A", ("B", "A")),
        ("B_A", ("B", "A")),
        (" A + B ", ("A", "B")),
        ("A+A", ("A",)),
        ("HLA-A+NKX2-1", ("HLA-A", "NKX2-1")),
        ("A+B+C", ("A", "B", "C")),
        ("control", ()),
        ("ctrl", ()),
        ("non-targeting", ()),
        ("Non_Targeting", ()),
        ("NegCtrl0_NegCtrl0", ()),
        ("KLF1_NegCtrl0", ("KLF1",)),
        ("control_1", ()),
        ("Control 12", ()),
        ("non-targeting_0001", ()),
        ("NT_0123", ()),
        ("KLF1_NT_0123", ("KLF1",)),
        ("NT-7+KLF1", ("KLF1",)),
        ("scramble-2", ()),
        ("NT5E", ("NT5E",)),
        ("KLF1_1", ("KLF1", "1")),
        ("CTRL1A", ("CTRL1A",)),
    ],
)
def test_usual_spellings(text, genes):
    assert parse_perturbation(text) == genes


def test_known_names_decide_where_a_separator_may_belong_to_a_name():
    assert parse_perturbation("Y_RNA") == ("Y", "RNA")
    assert parse_perturbation("Y_RNA", known={"Y_RNA"}) == ("Y_RNA",)
    assert parse_perturbation("Y_RNA_KLF1", known={"Y_RNA"}) == ("Y_RNA", "KLF1")
    assert parse_perturbation("KLF1_Y_RNA+ctrl", known={"Y_RNA", "KLF1"}) == ("KLF1", "Y_RNA")
    assert parse_perturbation("A_B", separators=("+",)) == ("A_B",)
    assert parse_perturbation("drug", control=["drug"]) == ()
    assert parse_perturbation("control", control=["drug"]) == ("control",)


def test_parts_that_are_known_are_taken_apart():
    known = {"KLF1", "CEBPE", "Y_RNA"}
    assert canonical_of("KLF1_CEBPE", known) == canonical_of("CEBPE+KLF1", known) == "CEBPE+KLF1"
    assert canonical_of("KLF1_ctrl", known) == canonical_of("NT_01_KLF1", known) == "KLF1"
    assert canonical_of("Y_RNA_KLF1", known) == "KLF1+Y_RNA"
    assert canonical_of("KLF1_OTHER", known) == "KLF1_OTHER"
    assert canonical_of("B+OTHER_ONE", known) == "B+OTHER_ONE"
    split = PerturbationSplit.from_lists(["KLF1_CEBPE", "A_B"], known=known)
    assert split.train == ["A_B", "CEBPE+KLF1"]


@pytest.mark.parametrize("text", ["", "+", "A++B", " _ "])
def test_no_perturbation(text):
    with pytest.raises(ValueError, match="is no perturbation"):
        parse_perturbation(text)


def test_canonical_names():
    assert canonical("B+A") == canonical(("A", "B", "ctrl")) == "A+B"
    assert canonical("ctrl") == canonical(()) == canonical("ctrl+ctrl") == "ctrl"
    assert genes_of("A+B") == ("A", "B")
    assert genes_of("ctrl") == ()


@pytest.mark.parametrize("seed", [1, 2])
def test_golden_split_of_gears(golden, seed):
    case = golden("scfoundation", "gears_utils")
    expected = json.loads((case.path / "expected.json").read_text())
    names = [name for name in np.unique(case.input["condition"]) if name != "ctrl"]
    # the order of the list must not matter
    names = list(np.random.default_rng(seed).permutation(names))
    train, test, groups = simulation_split(names, seed=seed)
    inner, validation, inner_groups = simulation_split(train, seed=seed, train_gene_share=0.9, combo_seen2_share=0.9)
    split = expected[f"split_seed{seed}"]
    assert sorted([*inner, "ctrl"]) == split["train"]
    assert sorted(validation) == split["val"]
    assert sorted(test) == split["test"]
    for found, name in ((groups, "test"), (inner_groups, "val")):
        assert {key: sorted(part) for key, part in found.items()} == expected[f"{name}_subgroup_seed{seed}"]


def test_golden_split_through_the_public_function(golden):
    case = golden("scfoundation", "gears_utils")
    expected = json.loads((case.path / "expected.json").read_text())["split_seed1"]
    names = np.unique(case.input["condition"])
    # the file has pairs in both orders, which are one perturbation; without them the split is the same function
    once = [
        name for name in names if "+".join(name.split("+")[::-1]) not in names or name < "+".join(name.split("+")[::-1])
    ]
    split = split_perturbations(once, seed=1)
    singles = {part: [n for n in map(canonical, expected[key]) if len(genes_of(n)) == 1]
               for part, key in (("train", "train"), ("validation", "val"), ("test", "test"))}  # fmt: skip
    for part, wanted in singles.items():
        assert [name for name in getattr(split, part) if len(genes_of(name)) == 1] == sorted(wanted)
    assert set(split.train) | set(split.validation) | set(split.test) == {canonical(n) for n in once} - {"ctrl"}


GENES = [f"G{n:02d}" for n in range(14)]
perturbations = st.lists(
    st.one_of(st.sampled_from(GENES), st.tuples(st.sampled_from(GENES), st.sampled_from(GENES)).map("+".join)),
    min_size=4,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(
    perturbations, st.sampled_from(["simulation", "single", "double"]), st.integers(0, 50), st.sampled_from([0, 1, 2])
)
def test_parts_are_disjoint_and_subgroups_say_what_training_has_seen(names, how, seed, seen):
    split = split_perturbations([*names, "ctrl"], how, seed=seed, seen=seen)
    parts = [*split.train, *split.validation, *split.test]
    assert len(set(parts)) == len(parts)
    assert set(parts) <= {canonical(name) for name in names}
    assert split == split_perturbations([*names, "ctrl"], how, seed=seed, seen=seen)
    assert sorted(name for group in split.subgroups.values() for name in group) == split.test
    trained = {gene for name in [*split.train, *split.validation] for gene in genes_of(name)}
    if how == "simulation":
        assert set(parts) == {canonical(name) for name in names}
        for name in [*split.subgroups.get("unseen_single", []), *split.subgroups.get("combo_seen0", [])]:
            assert not set(genes_of(name)) & trained
    if how == "single":
        assert all(len(genes_of(name)) == 1 for name in parts)
    if how == "double":
        # what only validation has seen is neither seen nor left out
        for part in (trained, {gene for name in split.train for gene in genes_of(name)}):
            assert all(len(set(genes_of(name)) & part) == seen for name in split.test)


def test_manifest(tmp_path):
    split = split_perturbations(["A", "B", "C", "D", "A+B", "C+D", "A+C"], seed=3)
    split.save(tmp_path / "split.json")
    assert PerturbationSplit.load(tmp_path / "split.json") == split
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no manifest"):
        PerturbationSplit.load(tmp_path / "other.json")


def test_lists_and_cell_types():
    split = PerturbationSplit.from_lists(["B+A", "ctrl", "A+B", "ctrl+C"], test=["D", "A+C", "A+D"])
    assert split.train == ["A+B", "C"]
    assert split.subgroups == {"unseen_single": ["D"], "combo_seen1": ["A+D"], "combo_seen2": ["A+C"]}
    assert split.of_cells(["A+B", "ctrl", "D", "E"]).tolist() == ["train", "train", "test", ""]
    split = PerturbationSplit.from_lists(["A"], held_out_cell_types=["NK"])
    assert split.of_cells(["A", "A", "ctrl"], ["NK", "B", "NK"]).tolist() == ["test", "train", "train"]
    with pytest.raises(ValueError, match="type of each cell"):
        split.of_cells(["A"])
    with pytest.raises(ValueError, match="two parts"):
        PerturbationSplit.from_lists(["A+B"], ["B+A"])
    assert subgroups_of([], []) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "other"}, "how must be"),
        ({"train_gene_share": 1.0}, "train_gene_share is a share"),
        ({"seen": 3}, "seen is how many"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        split_perturbations(["A", "B"], **options)


def test_nothing_to_split():
    with pytest.raises(ValueError, match="only control"):
        split_perturbations(["ctrl", "control"])
