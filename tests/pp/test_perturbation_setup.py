"""``pp.perturbation_setup``: names, pairs, changed genes, and early plain refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scfm import pp


def make(labels, seed: int = 0, n_genes: int = 30) -> ad.AnnData:
    """Counts in which the perturbation A raises gene 0 and lowers gene 1."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels, dtype=object)
    means = np.full((len(labels), n_genes), 4.0)
    is_a = np.array(["A" in str(label).replace("_", "+").split("+") for label in labels])
    means[is_a, 0], means[is_a, 1] = 25, 0.2
    counts = rng.poisson(means).astype(np.float32)
    obs = pd.DataFrame({"condition": labels, "total": counts.sum(1) * 2}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


LABELS = ["ctrl"] * 12 + ["A+ctrl"] * 8 + ["ctrl+A"] * 2 + ["B_A"] * 6 + ["A+B"] * 2 + ["B"] * 5


def test_names_pairs_and_changed_genes(tmp_path):
    adata = make(LABELS)
    pp.perturbation_setup(adata, "condition")
    names = adata.obs["scfm_perturbation"]
    assert names.cat.categories.tolist() == ["ctrl", "A", "A+B", "B"]
    assert names.value_counts().to_dict() == {"ctrl": 12, "A": 10, "A+B": 8, "B": 5}
    pairs = adata.obs["scfm_control"].to_numpy()
    assert (names.to_numpy()[pairs] == "ctrl").all()
    np.testing.assert_array_equal(pairs[:12], np.arange(12))
    record = adata.uns["perturbation"]
    assert record["labels"]["label"].tolist() == ["ctrl", "A+ctrl", "B_A", "B"]
    de = record["de_genes"]
    assert set(de.loc[(de["perturbation"] == "A") & (de["rank"] <= 2), "gene"]) == {"g0", "g1"}
    logs = np.log1p(adata.X.toarray() / adata.X.toarray().sum(1, keepdims=True) * 1e4)
    expected = logs[names == "A"].mean(0) - logs[names == "ctrl"].mean(0)
    first = de[de["perturbation"] == "A"].iloc[0]
    place = adata.var_names.get_loc(first["gene"])
    assert first["change"] == pytest.approx(expected[place], rel=1e-4)
    assert first["std"] == pytest.approx(logs[names == "A"][:, place].std(ddof=1), rel=1e-4)
    means = pd.DataFrame(record["means"], index=record["names"], columns=record["genes"])
    np.testing.assert_allclose(means.loc["A+B"], logs[names == "A+B"].mean(0), rtol=1e-4)
    adata.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_frame_equal(back.uns["perturbation"]["de_genes"], de, check_dtype=False)
    assert back.obs["scfm_perturbation"].cat.categories.tolist() == ["ctrl", "A", "A+B", "B"]


def test_pairs_are_drawn_once_and_by_type():
    adata = make(LABELS * 2)
    adata.obs["type"] = ["x"] * len(LABELS) + ["y"] * len(LABELS)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = pp.perturbation_setup(adata, "condition", cell_type_key="type", rng=3, copy=True)
    second = pp.perturbation_setup(adata, "condition", cell_type_key="type", rng=3, copy=True)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    pairs = first.obs["scfm_control"].to_numpy()
    np.testing.assert_array_equal(pairs, second.obs["scfm_control"])
    types = first.obs["type"].to_numpy()
    assert (types[pairs] == types).all()
    assert "scfm_control" not in adata.obs
    other = pp.perturbation_setup(adata, "condition", cell_type_key="type", rng=4, copy=True)
    assert (other.obs["scfm_control"] != first.obs["scfm_control"]).any()


def test_totals_from_a_column_and_log_normalised_values():
    adata = make(LABELS)
    pp.perturbation_setup(adata, "condition", total_key="total")
    counts = adata.X.toarray()
    logs = np.log1p(counts / counts.sum(1, keepdims=True) * 5e3)
    np.testing.assert_allclose(adata.uns["perturbation"]["means"][0], logs[:12].mean(0), rtol=1e-4)
    given = make(LABELS)
    given.layers["log"] = sparse.csr_matrix(logs.astype(np.float32))
    pp.perturbation_setup(given, "condition", layer="log")
    np.testing.assert_allclose(given.uns["perturbation"]["means"], adata.uns["perturbation"]["means"], rtol=1e-4)


def test_genes_that_were_not_detected_do_not_count():
    adata = make(LABELS)
    values = adata.X.toarray()
    names = np.array(LABELS)
    values[np.isin(names, ["A+ctrl", "ctrl+A"]), 1] = 0  # never seen in A, but in control
    values[:, 2] = 0  # never seen at all
    adata.X = sparse.csr_matrix(values)
    pp.perturbation_setup(adata, "condition", n_de_genes=30)
    record = adata.uns["perturbation"]
    of_a = {
        name: record[name].query("perturbation == 'A'")["gene"].tolist()
        for name in ("de_genes", "non_dropout_de_genes")
    }
    assert "g1" in of_a["de_genes"][:2]
    assert "g1" not in of_a["non_dropout_de_genes"]
    assert "g2" in of_a["non_dropout_de_genes"]
    assert [gene for gene in of_a["de_genes"] if gene != "g1"] == of_a["non_dropout_de_genes"]


def test_names_of_genes_with_separators_are_kept_if_the_data_know_them():
    adata = make(["control"] * 6 + ["g_1"] * 4 + ["g_1_B"] * 4)
    adata.var_names = ["g_1", *adata.var_names[1:]]
    pp.perturbation_setup(adata, "condition")
    assert adata.obs["scfm_perturbation"].cat.categories.tolist() == ["ctrl", "B+g_1", "g_1"]


def test_genes_are_perturbed_by_symbols(tmp_path):
    """Files of GEARS have Ensembl ids as the index of var, and symbols in a column."""
    symbols = ["A", "B", "Y_RNA", *(f"g{i}" for i in range(27))]
    adata = make([*LABELS, *["Y_RNA+ctrl"] * 3, *["A_Y_RNA"] * 3])
    adata.var["gene_name"], adata.var_names = symbols, [f"ENSG{i:011d}" for i in range(30)]
    for options in ({}, {"gene_symbols": "gene_name"}):
        done = pp.perturbation_setup(adata, "condition", copy=True, **options)
        names = ["ctrl", "A", "A+B", "A+Y_RNA", "B", "Y_RNA"]
        assert done.obs["scfm_perturbation"].cat.categories.tolist() == names
        record = done.uns["perturbation"]
        assert record["params"]["gene_symbols"] == "gene_name"
        assert record["genes"].tolist() == adata.var_names.tolist()
        assert record["de_genes"]["gene"].isin(adata.var_names).all()
        done.write_h5ad(tmp_path / "x.h5ad")
        assert ad.read_h5ad(tmp_path / "x.h5ad").uns["perturbation"]["params"]["gene_symbols"] == "gene_name"
    with pytest.raises(KeyError, match="gene_symbols='none'"):
        pp.perturbation_setup(adata, "condition", gene_symbols="none")


def test_genes_are_compared_within_cell_types():
    """A difference between types is no effect of a perturbation that mostly one of them has."""
    labels = ["ctrl"] * 40 + ["A"] * 18 + ["B"] * 6 + ["ctrl"] * 10 + ["A"] * 2 + ["B"] * 30 + ["C"] * 8
    adata = make(labels)
    adata.obs["type"] = types = np.repeat(["x", "y"], [64, 50])
    counts = adata.X.toarray()
    counts[types == "y", 5] *= 30
    adata.X = sparse.csr_matrix(counts)
    pooled = pp.perturbation_setup(adata, "condition", copy=True).uns["perturbation"]["de_genes"]
    assert pooled.query("perturbation == 'B'")["gene"].iloc[0] == "g5"
    done = pp.perturbation_setup(adata, "condition", cell_type_key="type", n_de_genes=30, copy=True)
    de = done.uns["perturbation"]["de_genes"]
    assert set(de.query("perturbation == 'A' and rank <= 2")["gene"]) == {"g0", "g1"}
    of_b = de.query("perturbation == 'B'").set_index("gene")
    assert abs(of_b.loc["g5", "score"]) < 3
    parts = [
        pp.perturbation_setup(adata[types == kind].copy(), "condition", n_de_genes=30, copy=True) for kind in ("x", "y")
    ]
    tables = [part.uns["perturbation"]["de_genes"].query("perturbation == 'B'").set_index("gene") for part in parts]
    for column in ("score", "change", "std"):
        expected = (6 * tables[0][column] + 30 * tables[1][column]) / 36
        pd.testing.assert_series_equal(of_b[column], expected.reindex(of_b.index), rtol=1e-5)
    assert (np.diff(of_b["score"].abs()) <= 0).all()
    # a perturbation of one type has the test in that type
    of_c = de.query("perturbation == 'C'").reset_index(drop=True)
    alone = parts[1].uns["perturbation"]["de_genes"].query("perturbation == 'C'").reset_index(drop=True)
    pd.testing.assert_frame_equal(of_c, alone)


def test_a_name_of_control_that_does_not_occur_is_said(capsys):
    pp.perturbation_setup(make([*LABELS, "A_NTC", "B+ntc"]), "condition", control=["ctrl", "NTC", "none"])
    assert "has no label 'none', which control= names" in capsys.readouterr().err
    pp.perturbation_setup(make(LABELS), "condition", control="ctrl")
    assert "has no label" not in capsys.readouterr().err


def test_one_cell_has_no_test(caplog):
    adata = make([*LABELS, "C"])
    pp.perturbation_setup(adata, "condition")
    assert "C" not in set(adata.uns["perturbation"]["de_genes"]["perturbation"])
    assert "C" in adata.uns["perturbation"]["names"]


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (LABELS, {"perturbation_key": "none"}, KeyError, "Name the column"),
        (["B"] * 5, {}, ValueError, "no usual name of control"),
        (LABELS, {"control": "dmso"}, None, ""),
        (["x"] * 3 + ["B"] * 3, {"control": "y"}, ValueError, "none of 'y'"),
        (["ctrl"] * 5, {}, ValueError, "nothing was perturbed"),
        ([*LABELS, None], {}, ValueError, "1 of 36 cells have no label"),
        (LABELS, {"n_de_genes": 0}, ValueError, "n_de_genes"),
        (LABELS, {"layer": "none"}, KeyError, "no layer 'none'"),
        (LABELS, {"total_key": "none"}, KeyError, "no column 'none'"),
    ],
)
def test_refusals(labels, options, error, message):
    adata = make(labels)
    if error is None:
        pp.perturbation_setup(adata, **{"perturbation_key": "condition"} | options)
        return
    before = set(adata.obs)
    with pytest.raises(error, match=message):
        pp.perturbation_setup(adata, **{"perturbation_key": "condition"} | options)
    assert set(adata.obs) == before
    assert not adata.uns


def test_no_control_cells_of_a_type():
    adata = make(LABELS)
    adata.obs["type"] = ["x"] * 12 + ["y"] * (len(LABELS) - 12)
    with pytest.raises(ValueError, match="no control cells of the type 'y'"):
        pp.perturbation_setup(adata, "condition", cell_type_key="type")


def test_real_cells(shared):
    adata = ad.read_h5ad(shared("data", "singlecell", "norman2019_subset_perturbseq.h5ad"))
    pp.perturbation_setup(adata, "condition_gears", total_key="ncounts")
    table = adata.uns["perturbation"]["labels"]
    assert len(table) == 34
    assert (table["perturbation"].str.count(r"\+") == 1).sum() == 15
    top = adata.uns["perturbation"]["de_genes"].query("perturbation == 'TMSB4X'")
    assert "TMSB4X" in top["gene"].tolist()
