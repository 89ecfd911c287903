"""``tl.tf_targets``, ``tl.tf_activity`` and ``tl.write_adjacencies``."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial.distance import jensenshannon

import scfm
from scfm.metrics import regulon_specificity
from scfm.tl import gene_network, tf_activity, tf_targets, write_adjacencies

TFS = ["GENE3", "GENE1", "GENE7"]
PRIOR = pd.DataFrame({"tf": ["GENE1", "GENE1", "GENE3", "GENE8"], "target": ["GENE2", "GENE4", "GENE9", "GENE1"]})


def targets(adata, key="tf_targets") -> pd.DataFrame:
    return adata.uns[key]["targets"]


# -- targets -------------------------------------------------------------------------------------------------------------


def test_each_factor_is_compared_by_its_own_vector(adata, model):
    tf_targets(adata, model, tfs=TFS, top_n=8, prior=PRIOR)
    table = model.gene_embeddings().numpy()[model.vocab.get_ids(adata.var_names[:50])].astype(float)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    found = targets(adata)
    assert found["tf"].tolist() == np.repeat(TFS, 8).tolist()
    for factor in TFS:
        row = pd.Series(table @ table[adata.var_names.get_loc(factor)], index=adata.var_names[:50]).drop(factor)
        best = row.nlargest(8)
        part = found[found["tf"] == factor]
        assert part["target"].tolist() == best.index.tolist()
        np.testing.assert_allclose(part["score"], best, atol=1e-6)
        assert part["rank"].tolist() == list(range(1, 9))
        known = set(PRIOR.loc[PRIOR["tf"] == factor, "target"])
        assert part["known"].tolist() == [gene in known for gene in part["target"]]
    assert found.groupby("tf")["target"].agg(tuple).nunique() == 3


def test_a_prior_can_restrict_and_names_the_factors(adata, scgpt, tmp_path):
    tf_targets(adata, scgpt, prior=PRIOR, use_prior="restrict")
    pairs = set(zip(targets(adata)["tf"], targets(adata)["target"], strict=True))
    assert pairs == set(zip(PRIOR["tf"], PRIOR["target"], strict=True))
    assert targets(adata)["known"].all()
    PRIOR.to_csv(tmp_path / "prior.csv", index=False)
    tf_targets(adata, scgpt, prior=tmp_path / "prior.csv", use_prior="restrict", key_added="file")
    pd.testing.assert_frame_equal(targets(adata, "file"), targets(adata))


def test_factors_from_a_file(adata, scgpt, tmp_path):
    (tmp_path / "tfs.txt").write_text("# factors\nGENE1\n\nGENE3  # second\nNONE\n")
    tf_targets(adata, scgpt, tfs=tmp_path / "tfs.txt", top_n=3)
    assert adata.uns["tf_targets"]["tfs"].tolist() == ["GENE1", "GENE3"]


def test_attention_targets_are_the_row_of_the_factor_in_the_network(adata, scgpt):
    adata.obs["kind"] = list("ab" * 18) + ["a"]
    options = {"method": "attention", "groupby": "kind", "control": "a", "perturbed": "b", "progress": False}
    genes = [f"GENE{i}" for i in range(12)]
    gene_network(adata, scgpt, genes=genes, threshold=-2, **options)
    tf_targets(adata, scgpt, tfs=TFS[:2], genes=genes, top_n=4, **options)
    for (condition, factor), part in targets(adata).groupby(["condition", "tf"]):
        row = adata.varp[f"gene_network_{condition}"][adata.var_names.get_loc(factor)].toarray()[0]
        there = row != 0
        np.testing.assert_allclose(part["score"], np.sort(row[there])[::-1][: len(part)], atol=1e-6)
        np.testing.assert_allclose(row[adata.var_names.get_indexer(part["target"])], part["score"], atol=1e-6)
        assert factor not in set(part["target"])
    assert set(targets(adata)["condition"]) == {"control", "perturbed", "difference"}


def test_golden_targets_by_attention(golden):
    import torch

    data = golden("scgpt", "attention_grn")
    path = data.path / "checkpoint" / "model.pt"
    n = len(torch.load(path, weights_only=True, mmap=True)["encoder.embedding.weight"])
    vocab = [*(f"gene{i}" for i in range(n - 3)), "<pad>", "<cls>", "<eoc>"]
    backbone = scfm.load(path, args=data.case["config"], vocab=vocab, device="cpu", precision="float32")
    names = [f"gene{i}" for i in data.input["genes"][0]]
    adata = ad.AnnData(
        sparse.csr_matrix(data.input["values"][:, 1:]),
        obs=pd.DataFrame({"condition": data.input["condition"]}, index=[f"cell{i}" for i in range(6)]),
        var=pd.DataFrame(index=names[1:]),
    )
    factor = f"gene{int(data.input['tf_token'])}"
    for mean in ("true", "upstream"):
        tf_targets(
            adata,
            backbone,
            tfs=[factor],
            top_n=10,
            method="attention",
            groupby="condition",
            control="ctrl",
            perturbed="TF1+ctrl",
            min_cells=1,
            mean=f"{mean}_mean",
            include_zeros=True,
            n_bins=None,
            cls_value=0,
        )
        for condition, part in targets(adata).groupby("condition"):
            place = data.expected[f"{mean}__{condition}__top10_pos"]
            score = data.expected[f"{mean}__{condition}__top10_score"]
            place, score = place[place > 0], score[place > 0]  # position 0 is <cls>
            part = part.iloc[: len(score)]
            np.testing.assert_allclose(part["score"], score, atol=2e-4)
            expected = pd.Series(score, index=[names[i] for i in place])
            # equal scores may come in either order
            inside = part[part["score"] > score[-1] + 1e-6]
            np.testing.assert_allclose(expected[inside["target"]], inside["score"], atol=2e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "tfs="),
        ({"tfs": ["NONE"]}, ValueError, "none of the 1 regulators"),
        ({"tfs": ["OTHER1"]}, ValueError, "knows none"),
        ({"tfs": "no_such_file.txt"}, FileNotFoundError, "no_such_file"),
        ({"tfs": TFS, "top_n": 0}, ValueError, "top_n"),
        ({"tfs": TFS, "use_prior": "restrict"}, ValueError, "prior="),
        ({"tfs": TFS, "prior": pd.DataFrame({"a": ["x"]})}, ValueError, "column with regulators"),
        ({"tfs": TFS, "prior": PRIOR.iloc[:0]}, ValueError, "no rows"),
        ({"tfs": TFS, "prior": "none.csv"}, FileNotFoundError, "none.csv"),
        ({"tfs": TFS, "genes": ["NONE"]}, KeyError, "no gene NONE"),
        ({"tfs": TFS, "groupby": "kind"}, ValueError, "method='attention'"),
    ],
)
def test_wrong_input(adata, scgpt, options, error, message):
    with pytest.raises(error, match=message):
        tf_targets(adata, scgpt, **options)
    assert not adata.uns


def test_resources_are_not_downloaded_offline(adata, scgpt):
    scfm.settings.offline = True
    with pytest.raises(scfm.OfflineError, match="give a table or a file"):
        tf_targets(adata, scgpt, prior="collectri")


# -- adjacencies ---------------------------------------------------------------------------------------------------------


def test_adjacencies_are_those_of_pyscenic(adata, scgpt, tmp_path):
    tf_targets(adata, scgpt, tfs=TFS, top_n=40)
    for name in ("adjacencies.tsv", "adjacencies.tsv.gz"):
        write_adjacencies(adata, tmp_path / name)
        table = pd.read_table(tmp_path / name)
        assert table.columns.tolist() == ["TF", "target", "importance"]
        positive = targets(adata)[targets(adata)["score"] > 0]
        np.testing.assert_allclose(table["importance"], 100 * positive["score"], rtol=1e-6)
        assert table["target"].tolist() == positive["target"].tolist()
        assert 0 < len(table) < len(targets(adata))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(KeyError, match="tf_targets first"):
        write_adjacencies(adata, tmp_path / "x.tsv", key="none")


def test_a_failed_write_leaves_the_old_file(adata, scgpt, tmp_path, monkeypatch):
    tf_targets(adata, scgpt, tfs=TFS, top_n=4)
    write_adjacencies(adata, tmp_path / "a.tsv")
    before = (tmp_path / "a.tsv").read_bytes()

    def fail(self, path, **options):
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        write_adjacencies(adata, tmp_path / "a.tsv")
    assert (tmp_path / "a.tsv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# -- activity ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def regulated():
    """Cells of two types, in each of which the targets of one factor are high."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (30, 60)).astype(np.float32)
    kind = np.arange(30) % 2
    counts[kind == 0, 10:20] += 12
    counts[kind == 1, 20:30] += 12
    counts[4] = 0
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame({"kind": np.array(["a", "b"])[kind]}))
    adata.obs_names = [f"cell{i}" for i in range(30)]
    adata.var_names = [f"GENE{i}" for i in range(60)]
    net = pd.DataFrame({"source": ["F"] * 10 + ["G"] * 10 + ["few"] * 2, "target": adata.var_names[10:32]})
    return adata, net


def test_activity_is_high_where_the_targets_are(regulated):
    pytest.importorskip("decoupler")
    adata, net = regulated
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    tf_activity(adata, net=net, groupby="kind", top_share=0.2, min_targets=5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    table = adata.obsm["X_tf_activity"]
    assert list(table.columns) == ["F", "G"]
    assert table.iloc[4].isna().all()
    assert table.drop(index="cell4").notna().all(axis=None)
    own = (adata.obs["kind"] == "a").to_numpy() & table["F"].notna().to_numpy()
    assert table["F"][own].min() > table["F"][(adata.obs["kind"] == "b").to_numpy()].max()
    specificity = adata.uns["tf_activity"]["specificity"]
    assert specificity.idxmax(axis=1).to_dict() == {"a": "F", "b": "G"}
    assert adata.uns["tf_activity"]["n_targets"]["n_targets"].to_dict() == {"F": 10, "G": 10}
    other = adata[::-1].copy()
    tf_activity(other, net=net, top_share=0.2)
    pd.testing.assert_frame_equal(other.obsm["X_tf_activity"].loc[adata.obs_names], table)


def test_activity_from_targets_that_were_found(adata, scgpt, tmp_path):
    pytest.importorskip("decoupler")
    adata.obs["kind"] = list("ab" * 18) + ["a"]
    tf_targets(adata, scgpt, tfs=TFS, top_n=10)
    tf_activity(adata, groupby="kind", top_share=0.3)
    assert set(adata.obsm["X_tf_activity"].columns) == set(TFS)
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_frame_equal(again.obsm["X_tf_activity"], adata.obsm["X_tf_activity"], check_dtype=False)
    pd.testing.assert_frame_equal(
        again.uns["tf_activity"]["specificity"], adata.uns["tf_activity"]["specificity"], check_names=False
    )
    pd.testing.assert_frame_equal(targets(again), targets(adata), check_dtype=False)
    with pytest.raises(ValueError, match="no factor has 11 targets"):
        tf_activity(adata, min_targets=11)
    adata.uns["tf_targets"]["targets"]["condition"] = ["x"] * 15 + ["y"] * 15
    with pytest.raises(ValueError, match="x, y"):
        tf_activity(adata)


def test_activity_needs_targets_and_columns(adata):
    pytest.importorskip("decoupler")
    with pytest.raises(KeyError, match="tf_targets first"):
        tf_activity(adata)
    with pytest.raises(KeyError, match="no column 'kind'"):
        tf_activity(adata, net=PRIOR, groupby="kind")
    with pytest.raises(ValueError, match="top_share"):
        tf_activity(adata, net=PRIOR, top_share=0)


# -- specificity ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 2]))
def test_specificity_is_one_minus_the_jensen_shannon_distance(seed, base):
    rng = np.random.default_rng(seed)
    scores = rng.random((25, 4)) * (rng.random((25, 4)) > 0.3)
    groups = np.array(["x", "y", "z", None], dtype=object)[rng.integers(0, 4, 25)]
    groups[:3] = ["x", "y", "z"]
    table = regulon_specificity(scores, groups, base=base)
    for group in "xyz":
        member = (groups == group) / (groups == group).sum()
        expected = [1 - jensenshannon(column / column.sum(), member, base=base) for column in scores.T]
        np.testing.assert_allclose(table.loc[group], expected, atol=1e-7)


def test_specificity_at_its_ends():
    table = regulon_specificity(np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), ["a", "a", "b"], base=2)
    np.testing.assert_allclose(table, [[1, 0, np.nan], [0, 1, np.nan]], atol=1e-7)
    with pytest.raises(ValueError, match="not negative"):
        regulon_specificity(np.array([[-1.0]]), ["a"])
    with pytest.raises(ValueError, match="groups of 2"):
        regulon_specificity(np.ones((3, 1)), ["a", "b"])
    with pytest.raises(ValueError, match="no cell has a group"):
        regulon_specificity(np.ones((1, 1)), [None])
