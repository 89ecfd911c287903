"""Tables of previous and alias symbols in the forms they come in."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest

import scfm
from scfm._gene_aliases import ALIAS, APPROVED, PREVIOUS, UNKNOWN
from scfm.genes import AliasTable

COMPLETE_SET = """hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
HGNC:1\tAAA1\tfirst\tApproved\t"ALIAS1|BOTH"\tOLD1\tENSG00000000001
HGNC:2\tBBB2\tsecond\tApproved\tBOTH\t"OLD2|ALIAS1"\tENSG00000000002
HGNC:3\tGONE\tthird\tEntry Withdrawn\tLOST\t\t
HGNC:4\tNA\tfourth\tApproved\tAAA1\tNULL\t
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "hgnc_complete_set.txt"
    path.write_text(COMPLETE_SET)
    return path


def test_complete_set(path):
    table = AliasTable.read(path)
    names = ["AAA1", "OLD1", "OLD2", "ALIAS1", "BOTH", "LOST", "NULL", "NA", "nothing"]
    symbols, kinds = table.approve(names)
    # ALIAS1 is an alias of AAA1 and a previous symbol of BBB2: the latter is the stronger statement.
    # AAA1 is an approved symbol, so that it cannot be an alias of NA. "NA" and "NULL" are names, not missing values.
    assert symbols.tolist() == ["AAA1", "AAA1", "BBB2", "BBB2", "", "", "NA", "NA", ""]
    assert kinds.tolist() == [APPROVED, PREVIOUS, PREVIOUS, PREVIOUS, UNKNOWN, UNKNOWN, PREVIOUS, APPROVED, UNKNOWN]
    assert table.n_ambiguous == 1
    assert table.symbols(["ENSG00000000002", "ENSG00000000009"]).tolist() == ["BBB2", ""]
    assert table.ensembl_ids(["AAA1", "NA", ""]).tolist() == ["ENSG00000000001", "", ""]
    assert "3 approved symbols" in repr(table)


def test_compressed_csv_with_one_alias_per_row(tmp_path):
    path = tmp_path / "aliases.csv.gz"
    pd.DataFrame({"symbol": ["A", "A", "B"], "alias": ["A", "a1", "b|b2"]}).to_csv(path, index=False)
    symbols, kinds = AliasTable.read(str(path)).approve(["a1", "b2", "A"])
    assert symbols.tolist() == ["A", "B", "A"]
    assert kinds.tolist() == [ALIAS, ALIAS, APPROVED]


def test_two_columns_of_hgnchelper():
    frame = pd.DataFrame(
        {"Symbol": ["OCT4", "POU5F1", "TWO", "TWO"], "Approved.Symbol": ["POU5F1", "POU5F1", "X1", "X2"]}
    )
    assert AliasTable.read(frame).approve(["OCT4", "POU5F1", "TWO"])[0].tolist() == ["POU5F1", "POU5F1", ""]


def test_table_of_ids_and_symbols():
    ids = ["ENSG00000000001.2", "ENSG00000000002.1", "ENSG00000000003.7"]
    table = AliasTable.read(pd.DataFrame({"gene_id": ids, "gene_name": ["A", "B", "B"]}))
    assert table.symbols(["ENSG00000000001", "ENSG00000000003"]).tolist() == ["A", "B"]
    assert table.ensembl_ids(["A", "B"]).tolist() == ["ENSG00000000001", ""]  # two genes are called B


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"symbol": ["A"], "prev_symbol": ["B"]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert AliasTable.read(tmp_path / "t.parquet").approve(["B"])[0].tolist() == ["A"]


def test_wrong_tables_say_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"columns gene; needed are 'symbol'"):
        AliasTable.read(pd.DataFrame({"gene": ["A"]}))
    with pytest.raises(ValueError, match="at least one of"):
        AliasTable.read(pd.DataFrame({"symbol": ["A"]}))
    with pytest.raises(FileNotFoundError, match=r"genenames\.org"):
        AliasTable.read(tmp_path / "absent.txt")


def test_cache_is_optional_and_read_anew_when_it_changes(path):
    assert AliasTable.from_cache() is None
    assert AliasTable.resolve(None) is None
    cached = scfm.settings.cachedir / "hgnc_complete_set.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text(path.read_text())
    first = AliasTable.resolve(None)
    assert first is AliasTable.from_cache()
    assert first.approve(["OLD1"])[0].tolist() == ["AAA1"]
    cached.write_text(path.read_text().replace("OLD1", "OLDER"))
    os.utime(cached, (1, 1))
    assert AliasTable.from_cache().approve(["OLDER"])[0].tolist() == ["AAA1"]
    assert AliasTable.resolve(aliases=False) is None
    assert AliasTable.resolve(first) is first
    assert AliasTable.resolve(path).n_ambiguous == 1


def test_agrees_with_cellfm_where_its_table_is_unambiguous(shared):
    case = shared("golden", "cellfm", "alias_mapping")
    frame = pd.read_csv(case / "hgnc_like.tsv", sep="\t", dtype=str, keep_default_na=False)
    upstream = json.loads((case / "case.json").read_text())["alias_dictionary"]
    # upstream lets the last row win; a name that leads to several genes is refused here
    lists = frame["Alias symbols"].str.split(", ").explode()
    ambiguous = set(lists[lists.duplicated() & (lists != "")])
    table = AliasTable.read(frame)
    symbols, _ = table.approve(list(upstream))
    for name, symbol in zip(upstream, symbols, strict=True):
        assert symbol == ("" if name in ambiguous else upstream[name])
    assert "CLASH" in ambiguous
