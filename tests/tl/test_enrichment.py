"""``tl.enrichment``: over-representation of gene sets in programs, offline."""

from __future__ import annotations

import gzip
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, hypergeom

import scfm
from scfm.tl import enrichment

gseapy = pytest.importorskip("gseapy")

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GENES = [f"G{i}" for i in range(60)]
PROGRAMS = {"1": GENES[:10], "2": GENES[10:18], "3": GENES[18:24]}
SETS = {
    "first": [*GENES[:9], "ABSENT1", "ABSENT2"],
    "mixed": [GENES[0], GENES[12], GENES[20], GENES[40]],
    "elsewhere": GENES[30:40],
    "unknown": ["ABSENT3", "ABSENT4"],
}


@pytest.fixture
def adata():
    adata = ad.AnnData(
        np.ones((3, 80), dtype=np.float32), var=pd.DataFrame(index=[*GENES, *(f"N{i}" for i in range(20))])
    )
    adata.uns["gene_programs"] = {
        "programs": {name: np.asarray(genes) for name, genes in PROGRAMS.items()},
        "summary": pd.DataFrame({"n_genes": [10, 8, 6]}, index=pd.Index(["1", "2", "3"], name="program")),
        "genes": np.asarray(GENES),
    }
    return adata


def expected_p(program: list[str], genes: list[str], background: list[str]) -> tuple[int, float]:
    inside = set(background)
    program, genes = set(program) & inside, set(genes) & inside
    shared = len(program & genes)
    return shared, hypergeom.sf(shared - 1, len(inside), len(genes), len(program))


def test_p_values_are_hypergeometric_within_the_background(adata):
    assert enrichment(adata, SETS) is None
    table, params = adata.uns["enrichment"]["table"], adata.uns["enrichment"]["params"]
    # "unknown" has no gene of the background, so three sets are tested
    assert (params["n_programs"], params["n_terms"], params["n_background"]) == (3, 3, 60)
    assert set(zip(table["program"], table["term"], strict=True)) == {
        ("1", "first"),
        ("1", "mixed"),
        ("2", "mixed"),
        ("3", "mixed"),
    }
    for row in table.to_dict("records"):
        shared, p = expected_p(PROGRAMS[row["program"]], SETS[row["term"]], GENES)
        assert row["overlap"] == shared == len(row["genes"].split(";"))
        assert row["p_value"] == pytest.approx(p)
        assert row["p_adjusted"] == pytest.approx(min(1, p * 9))
        assert row["significant"] == (p * 9 < 0.05)
        assert row["program_size"] == len(PROGRAMS[row["program"]])
    first = table.iloc[0]
    assert (first["program"], first["term"], first["term_size"]) == ("1", "first", 9)
    assert first["significant"]
    assert table["significant"].sum() == 1


def test_false_discovery_rates_are_those_of_scipy_within_a_program(adata):
    rng = np.random.default_rng(0)
    sets = {f"set{i}": list(rng.choice(GENES, 8, replace=False)) for i in range(30)}
    enrichment(adata, sets, correction="fdr_bh")
    table = adata.uns["enrichment"]["table"]
    for name, part in table.groupby("program"):
        missing = 30 - len(part)  # sets that share no gene with the program: P is 1
        expected = false_discovery_control([*part["p_value"], *np.ones(missing)])[: len(part)]
        np.testing.assert_allclose(part["p_adjusted"], expected, err_msg=name)


def test_files_and_mappings_give_the_same(adata, tmp_path):
    lines = "".join("\t".join([name, "no description", *genes]) + "\n" for name, genes in SETS.items())
    (tmp_path / "mine.gmt").write_text(lines + "\n")
    with gzip.open(tmp_path / "zipped.gmt.gz", "wt") as file:
        file.write(lines)
    enrichment(adata, SETS, key_added="mapping")
    enrichment(adata, tmp_path / "mine.gmt", key_added="file")
    enrichment(adata, str(tmp_path / "zipped.gmt.gz"), key_added="zipped")
    first, file, zipped = (adata.uns[key]["table"] for key in ("mapping", "file", "zipped"))
    assert set(file["library"]) == {"mine"}
    assert set(zipped["library"]) == {"zipped"}
    for other in (file, zipped):
        pd.testing.assert_frame_equal(other.drop(columns="library"), first.drop(columns="library"))
    enrichment(adata, [tmp_path / "mine.gmt", SETS])
    both = adata.uns["enrichment"]
    assert both["params"]["n_terms"] == 6
    assert set(both["table"]["library"]) == {"mine", "given_2"}


@few
@given(order=st.permutations(range(4)))
def test_the_order_of_sets_does_not_matter(adata, order):
    enrichment(adata, SETS, key_added="a")
    names = list(SETS)
    enrichment(adata, {names[i]: SETS[names[i]][::-1] for i in order}, key_added="b")
    pd.testing.assert_frame_equal(adata.uns["a"]["table"], adata.uns["b"]["table"])


def test_genes_of_your_own_with_all_genes_as_background(adata):
    enrichment(adata, SETS, programs=GENES[:6])
    result = adata.uns["enrichment"]
    assert set(result["table"]["program"]) == {"genes"}
    assert result["params"]["n_background"] == 80
    assert result["table"]["p_value"].iloc[0] == pytest.approx(
        expected_p(GENES[:6], SETS["first"], list(adata.var_names))[1]
    )
    enrichment(adata, SETS, programs={"mine": [*GENES[:6], "N1"]}, background=GENES[:30])
    table = adata.uns["enrichment"]["table"]
    assert set(table["program"]) == {"mine"}
    assert table["program_size"].iloc[0] == 6  # N1 is not in the background
    assert table["p_value"].iloc[0] == pytest.approx(expected_p(GENES[:6], SETS["first"], GENES[:30])[1])


def test_sizes_of_sets_are_counted_within_the_background(adata):
    enrichment(adata, SETS, min_size=5)
    assert adata.uns["enrichment"]["params"]["n_terms"] == 2
    enrichment(adata, SETS, min_size=1, max_size=9)
    assert set(adata.uns["enrichment"]["table"]["term"]) == {"first", "mixed"}


def test_nothing_shared_is_an_empty_table(adata):
    enrichment(adata, {"elsewhere": SETS["elsewhere"]})
    table = adata.uns["enrichment"]["table"]
    assert len(table) == 0
    assert {"program", "term", "p_adjusted", "significant", "genes"} <= set(table)


def test_result_survives_a_file(adata, tmp_path):
    adata.uns["gene_programs"]["programs"]["10"] = adata.uns["gene_programs"]["programs"].pop("3")
    adata.uns["gene_programs"]["summary"].index = pd.Index(["1", "2", "10"], name="program")
    enrichment(adata, SETS)
    adata.write_h5ad(tmp_path / "x.h5ad")
    stored = ad.read_h5ad(tmp_path / "x.h5ad")
    expected = adata.uns["enrichment"]["table"]
    pd.testing.assert_frame_equal(
        stored.uns["enrichment"]["table"], expected, check_dtype=False, check_index_type=False
    )
    # the order of programs comes from the summary, not from the sorted keys of the file
    enrichment(stored, SETS, key_added="again")
    assert list(dict.fromkeys(stored.uns["again"]["table"]["program"])) == ["1", "2", "10"]
    copy = enrichment(adata, SETS, key_added="other", copy=True)
    assert "other" in copy.uns
    assert "other" not in adata.uns


# -- the server ---------------------------------------------------------------------------------------------------------------


def test_offline_libraries_are_refused_with_what_to_do(adata):
    scfm.settings.offline = True
    for options in ({}, {"method": "enrichr"}):
        with pytest.raises(scfm.OfflineError, match=r"\.gmt"):
            enrichment(adata, "Reactome_2022", **options)


def test_a_library_is_downloaded_once_and_tested_here(adata, monkeypatch):
    scfm.settings.offline = False
    asked = []
    monkeypatch.setattr(gseapy, "get_library", lambda name, organism: asked.append((name, organism)) or SETS)
    enrichment(adata, "Reactome_2022", organism="mouse")
    assert asked == [("Reactome_2022", "mouse")]
    assert set(adata.uns["enrichment"]["table"]["library"]) == {"Reactome_2022"}


def test_answers_of_enrichr_become_the_same_table(adata, monkeypatch):
    scfm.settings.offline = False

    class Answer:
        results = pd.DataFrame(
            {
                "Gene_set": ["KEGG"],
                "Term": ["a"],
                "Overlap": ["2/40"],
                "P-value": [1e-4],
                "Odds Ratio": [3.0],
                "Combined Score": [9.0],
                "Genes": ["G1;G0"],
            }
        )

    monkeypatch.setattr(gseapy, "get_library", lambda name, organism: {"a": [], "b": []})
    monkeypatch.setattr(gseapy, "enrichr", lambda genes, libraries, **options: Answer)
    enrichment(adata, "KEGG", method="enrichr")
    table = adata.uns["enrichment"]["table"]
    assert table["program"].tolist() == ["1", "2", "3"]
    np.testing.assert_allclose(table["p_adjusted"], 1e-4 * 3 * 2)
    assert table["overlap"].tolist() == [2, 2, 2]
    assert table["genes"].tolist() == ["G0;G1"] * 3

    def broken(*_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(gseapy, "enrichr", broken)
    with pytest.raises(scfm.OfflineError, match="did not answer"):
        enrichment(adata, "KEGG", method="enrichr")


# -- wrong input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "options", "error", "message"),
    [
        (SETS, {"key": "nothing"}, KeyError, "gene_programs first"),
        (SETS, {"method": "fisher"}, ValueError, "hypergeometric, enrichr"),
        (SETS, {"correction": "none"}, ValueError, "bonferroni, fdr_bh"),
        (SETS, {"programs": "G1"}, TypeError, "needs a list"),
        (SETS, {"programs": {"mine": []}}, ValueError, "no genes"),
        (SETS, {"min_size": 30}, ValueError, "none of the 4 gene sets"),
        ({"x": ["ABSENT1", "ABSENT2"]}, {}, ValueError, "are the names symbols"),
        ("absent.gmt", {}, FileNotFoundError, r"absent\.gmt"),
        ([], {}, ValueError, "names no gene sets"),
        (SETS, {"method": "enrichr"}, ValueError, "its own libraries"),
    ],
)
def test_wrong_arguments(adata, sets, options, error, message):
    with pytest.raises(error, match=message):
        enrichment(adata, sets, **options)


def test_programs_outside_the_background_are_named(adata, capsys):
    enrichment(adata, SETS, programs={"inside": GENES[:5], "outside": ["FOO", "BAR"]}, min_size=2)
    assert "'outside'" in capsys.readouterr().err
    assert adata.uns["enrichment"]["params"]["n_programs"] == 1
    with pytest.raises(ValueError, match="the names the same kind"):
        enrichment(adata, SETS, programs=["FOO", "BAR"])


def test_an_empty_file_is_said_to_be_empty(adata, tmp_path):
    (tmp_path / "empty.gmt").write_text("")
    with pytest.raises(ValueError, match="holds no gene set"):
        enrichment(adata, tmp_path / "empty.gmt")


def test_a_line_that_is_no_set_is_named(adata, tmp_path):
    (tmp_path / "x.gmt").write_text("a\tno\tG1\tG2\nonly a name\n")
    with pytest.raises(ValueError, match="line 2"):
        enrichment(adata, tmp_path / "x.gmt")


def test_without_gseapy_the_error_names_the_extra(adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "gseapy", None)
    with pytest.raises(scfm.MissingExtraError, match=r"scfm\[enrichment\]"):
        enrichment(adata, SETS)
