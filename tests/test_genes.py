"""Vocabularies, and genes of a data set looked up in them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfm.genes import AliasTable, GeneVocab, resolve_gene_names

TP53, ACTB, PTEN = "ENSG00000141510", "ENSG00000075624", "ENSG00000171862"

HGNC = pd.DataFrame(
    {
        "symbol": ["POU5F1", "SEPTIN7", "TP53", "MARCHF1", "GAMMA", "DELTA"],
        "prev_symbol": ["OTF3", "SEPT7|CDC10", "", "MARCH1", "OLD1|OLD2", ""],
        "alias_symbol": ["OCT3|OCT4", "CDC3", "p53|LFS1", "RNF171", "SHARED", "SHARED"],
        "ensembl_gene_id": [
            "ENSG00000204531",
            "ENSG00000122545",
            TP53,
            "ENSG00000145416",
            "ENSG00000000100",
            "ENSG00000000200",
        ],
    }
)


TABLE = AliasTable.read(HGNC)


@pytest.fixture
def table():
    return TABLE


class TestVocabulary:
    def test_ids_are_positions_and_specials_are_not_genes(self):
        vocab = GeneVocab(["CD3E", "<pad>", "LYZ"], specials=["<pad>"])
        assert len(vocab) == 3
        assert [vocab[name] for name in vocab] == [0, 1, 2]
        assert vocab.genes.tolist() == ["CD3E", "LYZ"]
        assert vocab.n_genes == 2
        assert vocab.is_gene.tolist() == [True, False, True]
        assert "LYZ" in vocab
        assert "lyz" not in vocab
        ids = vocab.get_ids(["LYZ", "XIST", "<pad>"])
        assert ids.tolist() == [2, -1, 1]
        assert ids.dtype == np.int64

    def test_unknown_name_suggests_the_right_case(self):
        with pytest.raises(KeyError, match="Did you mean C1orf112"):
            GeneVocab(["C1orf112"])["C1ORF112"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"names": ["A", "B", "A"]}, "more than once: A"),
            ({"names": ["A", ""]}, "entry 1"),
            ({"names": []}, "at least one"),
            ({"names": ["A"], "specials": ["<pad>"]}, "<pad> are not among"),
            ({"names": ["A"], "ensembl_ids": [TP53, ACTB]}, "2 Ensembl ids for 1 names"),
        ],
    )
    def test_wrong_vocabularies_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GeneVocab(**arguments)

    def test_survives_json(self):
        vocab = GeneVocab(["<pad>", "A", "B"], specials=["<pad>"], ensembl_ids=["", TP53, ACTB])
        again = GeneVocab.from_dict(json.loads(json.dumps(vocab.to_dict())))
        assert again == vocab
        assert again.match([ACTB]).ids.tolist() == [2]
        assert vocab != GeneVocab(["<pad>", "A", "B"])
        assert vocab != "A"

    def test_names_cannot_be_changed(self):
        with pytest.raises(ValueError, match="read-only"):
            GeneVocab(["A"]).names[0] = "B"


class TestMatching:
    def test_symbol_before_ensembl_before_alias(self, table):
        vocab = GeneVocab(["<pad>", "TP53", "SEPTIN7", "MARCHF1", ACTB], specials=["<pad>"])
        match = vocab.match(
            ["TP53", "weird", "MARCH1", "<pad>", "none"], ensembl_ids=["", ACTB, "", "", ""], aliases=table
        )
        assert match.ids.tolist() == [1, 4, 3, -1, -1]
        assert match.how.tolist() == ["symbol", "ensembl", "alias", "", ""]
        assert match.renamed == {"weird": ACTB, "MARCH1": "MARCHF1"}
        assert match.missing.tolist() == ["<pad>", "none"]
        assert (match.n_matched, match.n_vocab_covered, match.fraction) == (3, 3, 0.6)

    @pytest.mark.parametrize("entry", [TP53, f"{TP53}.4", f"TP53_{TP53}"])
    @pytest.mark.parametrize("name", [TP53, f"{TP53}.18", f"{TP53}.18_PAR_Y", f"P53_{TP53}"])
    def test_ensembl_ids_match_whatever_form_they_have(self, entry, name):
        match = GeneVocab(["ACTB", entry]).match([name])
        assert match.ids.tolist() == [1]
        assert match.how[0] == ("symbol" if name == entry else "ensembl")

    def test_an_entry_that_is_an_id_goes_before_one_that_ends_in_it(self):
        assert GeneVocab([f"X_{TP53}", f"{TP53}.1"]).match([TP53]).ids.tolist() == [1]
        assert GeneVocab([f"X_{TP53}", f"{TP53}.1", "TP53"], ensembl_ids=["", "", TP53]).match([TP53]).ids.tolist() == [
            2
        ]

    def test_ensembl_ids_find_symbols_through_the_table(self, table):
        match = GeneVocab(["MARCHF1", "TP53"]).match([f"{TP53}.2", "ENSG00000145416"], aliases=table)
        assert match.ids.tolist() == [1, 0]
        assert match.how.tolist() == ["ensembl", "ensembl"]

    def test_symbols_find_a_vocabulary_of_ensembl_ids_through_the_table(self, table):
        match = GeneVocab([ACTB, TP53, "ENSG00000204531"]).match(["TP53", "OCT4", "ACTB"], aliases=table)
        assert match.ids.tolist() == [1, 2, -1]
        assert match.how.tolist() == ["ensembl", "alias", ""]

    def test_a_new_symbol_finds_an_old_entry(self, table):
        assert GeneVocab(["SEPT7", "TP53"]).match(["SEPTIN7"], aliases=table).ids.tolist() == [0]

    def test_two_old_entries_of_one_gene_are_not_chosen_between(self, table):
        assert GeneVocab(["SEPT7", "CDC10"]).match(["SEPTIN7"], aliases=table).ids.tolist() == [-1]

    def test_mixed_names_of_one_gene_share_its_entry(self, table):
        match = GeneVocab(["TP53"]).match(["TP53", TP53], aliases=table)
        assert match.ids.tolist() == [0, 0]
        assert match.duplicated == {"TP53": ["TP53", TP53]}

    def test_another_gene_with_a_taken_symbol_is_not_mixed_in(self, table):
        # the data calls a different gene TP53, so the gene with TP53's id must not be added to it
        match = GeneVocab(["TP53"]).match(["TP53", "other"], ensembl_ids=[ACTB, TP53], aliases=table)
        assert match.ids.tolist() == [0, -1]

    def test_an_alias_of_a_gene_that_is_present_is_not_used(self, table):
        match = GeneVocab(["SEPTIN7"]).match(["SEPT7", "SEPTIN7"], aliases=table)
        assert match.ids.tolist() == [-1, 0]

    def test_a_previous_symbol_goes_before_an_alias(self, table):
        match = GeneVocab(["SEPTIN7"]).match(["CDC3", "SEPT7"], aliases=table)
        assert match.ids.tolist() == [-1, 0]

    def test_two_old_names_of_one_gene_are_not_mixed(self, table):
        assert GeneVocab(["GAMMA"]).match(["OLD1", "OLD2"], aliases=table).ids.tolist() == [-1, -1]
        assert GeneVocab(["GAMMA"]).match(["OLD1", "OLD1"], aliases=table).ids.tolist() == [0, 0]

    def test_an_ambiguous_alias_is_not_used(self, table):
        assert GeneVocab(["GAMMA", "DELTA"]).match(["SHARED"], aliases=table).ids.tolist() == [-1]

    def test_an_alias_against_the_evidence_of_the_id_is_not_used(self, table):
        match = GeneVocab(["SEPTIN7"]).match(["SEPT7"], ensembl_ids=["ENSG00000145416"], aliases=table)
        assert match.ids.tolist() == [-1]

    def test_missing_names_and_ids_match_nothing(self):
        match = GeneVocab(["A", TP53]).match(
            np.array(["A", None, np.nan], dtype=object), ensembl_ids=[np.nan, None, ""]
        )
        assert match.ids.tolist() == [0, -1, -1]

    def test_length_of_ids_is_checked(self):
        with pytest.raises(ValueError, match="1 Ensembl ids for 2 genes"):
            GeneVocab(["A"]).match(["A", "B"], ensembl_ids=[TP53])

    def test_no_genes_at_all(self):
        match = GeneVocab(["A"]).match([])
        assert (len(match), match.n_matched, match.fraction, match.hint) == (0, 0, 0.0, "")

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_order_of_genes_changes_nothing(self, data):
        pool = [
            *HGNC["symbol"],
            "OCT4",
            "OTF3",
            "SEPT7",
            "CDC10",
            "CDC3",
            "OLD1",
            "OLD2",
            "SHARED",
            *HGNC["ensembl_gene_id"],
        ]
        names = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12))
        ids = data.draw(
            st.lists(st.sampled_from(["", *HGNC["ensembl_gene_id"]]), min_size=len(names), max_size=len(names))
        )
        entries = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12, unique=True))
        order = data.draw(st.permutations(range(len(names))))
        vocab = GeneVocab(entries)
        match = vocab.match(names, ensembl_ids=ids, aliases=TABLE)
        moved = vocab.match([names[i] for i in order], ensembl_ids=[ids[i] for i in order], aliases=TABLE)
        np.testing.assert_array_equal(moved.ids, match.ids[order])
        np.testing.assert_array_equal(moved.how, match.how[order])
        exact = np.isin(names, entries)
        np.testing.assert_array_equal(match.ids[exact], vocab.get_ids(names)[exact])

    def test_real_vocabulary_and_data(self, shared):
        ids = json.loads(shared("data", "vocab", "scgpt", "whole_human_vocab.json").read_text())
        vocab = GeneVocab(sorted(ids, key=ids.get), specials=["<pad>", "<cls>", "<eoc>"])
        by_symbol = vocab.match(["CD3E", "RP11-309M23.1"])
        assert (by_symbol.how == "symbol").all()
        by_id = vocab.match(["ENSG00000237531.9", "ENSG00000283675"])
        assert by_id.vocab_names.tolist() == ["RP11-309M23.1_ENSG00000237531", "ENSG00000283675.1"]


class TestReport:
    match = GeneVocab(["A", "B", "C"]).match(["A", "B", "A", "zzz"])

    def test_report_has_one_row_per_gene(self):
        report = self.match.report()
        assert report["name"].tolist() == ["A", "B", "A", "zzz"]
        assert report["vocab_name"].tolist() == ["A", "B", "A", ""]
        assert report["n_sharing"].tolist() == [2, 1, 2, 0]

    def test_summary_is_one_line_with_the_numbers(self):
        summary = self.match.summary()
        assert "3 of 4 genes (75.0%)" in summary
        assert "3 by symbol" in summary
        assert "2 of them share 1 entry: A" in summary
        assert "\n" not in summary

    def test_require_any_shows_both_sides_and_the_hint(self):
        with pytest.raises(ValueError, match=r"none of the 2 genes.*Actb, Cd3e.*toy.*ACTB.*mouse") as error:
            GeneVocab(["ACTB"]).match(["Actb", "Cd3e"]).require_any("toy")
        assert "CD3E" not in str(error.value)
        self.match.require_any("toy")

    @pytest.mark.parametrize(
        ("names", "word"),
        [
            (["Actb", "Cd3e", "Gm1992", "mt-Nd1", "Rp1"], "mouse symbols"),
            ([f"ENSMUSG{i:011d}" for i in range(5)], "Ensembl ids of mouse"),
            ([f"ENSDARG{i:011d}.2" for i in range(5)], "Ensembl ids of zebrafish"),
            ([f"ENSXETG{i:011d}" for i in range(5)], "another species"),
            ([f"ENSG{i:011d}" for i in range(5)], "human Ensembl ids"),
            (["0", "1", "2"], "numbers"),
            (["FOO", "C1orf112", "BAR"], ""),
        ],
    )
    def test_hint(self, names, word):
        match = GeneVocab(["ACTB"]).match(names)
        assert word in match.hint
        assert bool(match.hint) == bool(word)

    def test_no_hint_when_genes_match(self):
        assert GeneVocab(["Actb", "Cd3e"]).match(["Actb", "Cd3e"]).hint == ""


class TestCollapse:
    names = ["B", "x", "A", "B", "C"]
    counts = sparse.csr_matrix(np.array([[1, 9, 2, 3, 0], [0, 9, 0, 0, 5], [0, 9, 0, 0, 0]], dtype=np.float32))
    match = GeneVocab(["A", "B", "C"]).match(names)

    def test_sum_adds_at_the_place_of_the_first(self):
        out, ids = self.match.collapse(self.counts)
        assert ids.tolist() == [1, 0, 2]
        assert out.toarray().tolist() == [[4, 2, 0], [0, 0, 5], [0, 0, 0]]

    def test_keep_leaves_duplicates_apart(self):
        out, ids = self.match.collapse(self.counts, "keep")
        assert ids.tolist() == [1, 0, 1, 2]
        assert out.toarray().tolist() == [[1, 2, 3, 0], [0, 0, 0, 5], [0, 0, 0, 0]]

    def test_error_names_the_genes(self):
        with pytest.raises(ValueError, match="B from B, B"):
            self.match.collapse(self.counts, "error")
        with pytest.raises(ValueError, match="sum, keep, error"):
            self.match.collapse(self.counts, "mean")

    def test_error_passes_without_duplicates(self):
        _, ids = GeneVocab(["A", "B"]).match(["B", "A"]).collapse(self.counts[:, :2], "error")
        assert ids.tolist() == [1, 0]

    def test_the_map_is_made_once(self):
        assert self.match.column_map() is self.match.column_map("sum")


class TestResolveNames:
    def test_index_is_the_default(self):
        found = resolve_gene_names(pd.DataFrame({"feature_name": ["X", "Y"]}, index=["A", "B"]))
        assert found.symbols.tolist() == ["A", "B"]
        assert found.ensembl_ids is None
        assert (found.symbols_from, found.ids_from) == ("index", None)

    @pytest.mark.parametrize("index", [[TP53, f"{ACTB}.3"], ["0", "1"], ["ENSMUSG00000029580", "ENSMUSG00000032093"]])
    def test_symbol_column_is_found_when_the_index_is_no_symbol(self, index):
        var = pd.DataFrame({"feature_name": pd.Categorical(["TP53", None])}, index=index)
        found = resolve_gene_names(var)
        assert found.symbols.tolist() == ["TP53", index[1]]
        assert found.symbols_from == "feature_name"
        assert (found.ids_from == "index") == index[0].startswith("ENSG")

    def test_id_column_needs_human_ids(self):
        var = pd.DataFrame({"gene_ids": ["7157", "60"], "ensembl_id": [TP53, ""]}, index=["TP53", "ACTB"])
        found = resolve_gene_names(var)
        assert found.ids_from == "ensembl_id"
        assert found.ensembl_ids.tolist() == [TP53, ""]

    def test_named_columns_are_used(self):
        var = pd.DataFrame({"sym": ["TP53", "ACTB"], "acc": ["a", "b"]}, index=["g1", "g2"])
        found = resolve_gene_names(var, "sym", "acc")
        assert (found.symbols_from, found.ids_from) == ("sym", "acc")
        assert found.symbols.tolist() == ["TP53", "ACTB"]

    def test_missing_columns_are_named(self):
        var = pd.DataFrame({"sym": ["TP53"]}, index=["g1"])
        with pytest.raises(KeyError, match=r"gene_symbols='nope'.*sym"):
            resolve_gene_names(var, "nope")
        with pytest.raises(KeyError, match="gene_ids='nope'"):
            resolve_gene_names(var, gene_ids="nope")
