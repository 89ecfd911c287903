"""``tl.gene_programs``: graph, clusters, scores, activity, co-expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.tl import gene_programs
from scfm.tl._log_expression import most_variable, open_log_expression

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
N_MODULES, SIZE, N_OTHERS, N_CELLS = 5, 8, 12, 90
NAMES = [f"M{m}G{i}" for m in range(N_MODULES) for i in range(SIZE)] + [f"OTHER{i}" for i in range(N_OTHERS)]


def planted(seed: int = 0) -> ad.AnnData:
    """Modules of genes that vary together over cells and have similar vectors; each group of cells has one module on."""
    rng = np.random.default_rng(seed)
    module = np.repeat(np.arange(N_MODULES), SIZE)
    group = np.arange(N_CELLS) % 3
    level = np.full((N_CELLS, N_MODULES), 0.3)
    level[np.arange(N_CELLS), group] = 4.0
    level *= rng.gamma(4.0, 0.25, size=level.shape)
    means = np.hstack([level[:, module], np.full((N_CELLS, N_OTHERS), 1.0)])
    counts = rng.poisson(means).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=NAMES))
    adata.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    adata.obs["kind"] = pd.Categorical(np.array(["a", "b", "c/d"])[group])
    centres = 3 * rng.normal(size=(N_MODULES, 10))
    vectors = np.vstack(
        [centres[module] + 0.3 * rng.normal(size=(len(module), 10)), 9 * rng.normal(size=(N_OTHERS, 10))]
    )
    adata.varm["vectors"] = vectors.astype(np.float32)
    return adata


@pytest.fixture
def cells():
    return planted()


def run(adata, **options):
    defaults = {
        "use_rep": "vectors",
        "n_neighbors": 6,
        "n_top_genes": None,
        "resolution": [1.0, 3.0],
        "stability_seeds": 2,
    }
    return gene_programs(adata, **(defaults | options))


def groups_of_genes(adata, key: str = "gene_programs") -> set[frozenset[str]]:
    return {frozenset(map(str, genes)) for genes in adata.uns[key]["programs"].values()}


# -- programs ----------------------------------------------------------------------------------------------------------------


def test_planted_modules_become_programs(cells):
    before = cells.X.copy()
    assert run(cells, groupby="kind", genes=NAMES[: N_MODULES * SIZE]) is None
    planted_modules = {frozenset(NAMES[m * SIZE : (m + 1) * SIZE]) for m in range(N_MODULES)}
    assert groups_of_genes(cells) == planted_modules
    result = cells.uns["gene_programs"]
    programs, summary = result["programs"], result["summary"]
    assert list(summary.index) == [str(i + 1) for i in range(len(programs))]
    assert (np.diff(summary["n_genes"]) <= 0).all()
    assert summary["n_genes"].tolist() == [len(programs[name]) for name in summary.index]
    assert (summary["coherence"] > 0.9).all()
    assert (summary["stability"] == 1).all()
    for name, genes in programs.items():
        assert set(cells.var_names[cells.var["gene_program"] == name]) == set(genes)
        assert summary.loc[name, "top_genes"] == ", ".join(genes[:5])
    assert cells.var["gene_program"].isna().sum() == cells.n_vars - sum(map(len, programs.values()))
    assert (before != cells.X).nnz == 0
    # module 0 is on in group a, 1 in b, 2 in c/d
    activity, markers = result["activity"], result["markers"]
    assert list(activity.index) == ["a", "b", "c/d"]
    for number, group in enumerate(activity.index):
        name = next(name for name, genes in programs.items() if f"M{number}G0" in genes)
        assert activity[name].idxmax() == group
        first = markers[markers["group"] == group].iloc[0]
        assert first["program"] == name
        assert first["difference"] > 0
        assert first["p_adjusted"] < 1e-6


def test_coherence_and_order_are_those_of_cosines(cells):
    run(cells)
    result = cells.uns["gene_programs"]
    vectors = pd.DataFrame(np.asarray(cells.varm["vectors"], dtype=float), index=cells.var_names)
    log = sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, copy=True), copy=True)
    expression = pd.DataFrame(log.X.toarray().astype(float), columns=cells.var_names)
    for name, genes in result["programs"].items():
        unit = vectors.loc[genes].to_numpy()
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosine, n = unit @ unit.T, len(genes)
        assert result["summary"].loc[name, "coherence"] == pytest.approx((cosine.sum() - n) / (n * (n - 1)), abs=1e-6)
        assert (np.diff(cosine.sum(1)) <= 1e-6).all()
        correlation = np.corrcoef(expression[list(genes)].to_numpy().T)
        expected = (correlation.sum() - n) / (n * (n - 1))
        assert result["summary"].loc[name, "coexpression"] == pytest.approx(expected, abs=1e-4)


def test_of_several_resolutions_the_one_of_largest_gain_is_taken(cells):
    run(cells, resolution=[0.05, 1.0, 2.0, 50.0])
    sweep = cells.uns["gene_programs"]["sweep"]
    taken = cells.uns["gene_programs"]["params"]["resolution_taken"]
    assert sweep.loc[sweep["gain"].idxmax(), "resolution"] == taken
    row = sweep.set_index("resolution").loc[taken]
    assert row["n_programs"] == len(cells.uns["gene_programs"]["programs"])
    assert row["n_genes"] == cells.var["gene_program"].notna().sum()
    assert sweep["n_clusters"].is_monotonic_increasing
    run(cells, resolution=taken, key_added="one")
    assert groups_of_genes(cells, "one") == groups_of_genes(cells)
    assert "one" in cells.var


@few
@given(seed=st.integers(0, 1000))
def test_neither_the_order_of_genes_nor_that_of_cells_matters(seed):
    cells = planted()
    cells.X = cells.X.copy()
    run(cells, groupby="kind", ctrl_size=2)
    rng = np.random.default_rng(seed)
    other = cells[rng.permutation(cells.n_obs), rng.permutation(cells.n_vars)].copy()
    other.uns.clear()
    run(other, groupby="kind", ctrl_size=2)
    assert groups_of_genes(other) == groups_of_genes(cells)
    assert list(other.uns["gene_programs"]["programs"]["1"]) == list(cells.uns["gene_programs"]["programs"]["1"])
    scores = other.obsm["X_gene_programs"].loc[cells.obs_names]
    np.testing.assert_allclose(scores, cells.obsm["X_gene_programs"], atol=1e-5)
    np.testing.assert_allclose(
        other.uns["gene_programs"]["activity"], cells.uns["gene_programs"]["activity"], atol=1e-5
    )
    for slot in ("gene_programs_distances", "gene_programs_connectivities"):
        back = other[:, cells.var_names].varp[slot]
        np.testing.assert_allclose(back.toarray(), cells.varp[slot].toarray(), atol=1e-5)


def test_the_global_random_state_is_left_alone_and_seeds_are_recorded(cells):
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    run(cells, rng=5)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert cells.uns["gene_programs"]["params"]["rng"] == 5
    first = cells.obsm["X_gene_programs"].copy()
    run(cells, rng=5)
    pd.testing.assert_frame_equal(cells.obsm["X_gene_programs"], first)


def test_chosen_genes_and_genes_without_vectors(cells):
    cells.varm["vectors"][NAMES.index("M0G0")] = np.nan
    cells.varm["vectors"][NAMES.index("M0G1")] = 0
    run(cells, genes=NAMES[:24], score=False)
    result = cells.uns["gene_programs"]
    assert set(result["genes"]) == set(NAMES[2:24])
    assert "X_gene_programs" not in cells.obsm
    assert "coexpression" not in result["summary"]
    del cells.X  # nothing is read if genes are given and there are no scores
    run(cells, genes=NAMES[:24], score=False)


def test_result_survives_a_file(cells, tmp_path):
    run(cells, groupby="kind")
    cells.write_h5ad(tmp_path / "x.h5ad")
    stored = ad.read_h5ad(tmp_path / "x.h5ad")
    for name in ("summary", "sweep", "activity", "markers"):
        table, expected = stored.uns["gene_programs"][name], cells.uns["gene_programs"][name]
        pd.testing.assert_frame_equal(
            table, expected, check_dtype=False, check_categorical=False, check_index_type=False
        )
    for name, genes in cells.uns["gene_programs"]["programs"].items():
        assert list(stored.uns["gene_programs"]["programs"][name]) == list(genes)
    pd.testing.assert_frame_equal(stored.obsm["X_gene_programs"], cells.obsm["X_gene_programs"], check_index_type=False)
    pd.testing.assert_series_equal(stored.var["gene_program"], cells.var["gene_program"], check_index_type=False)


def test_a_copy_leaves_the_original_as_it_was(cells):
    other = run(cells, copy=True)
    assert "gene_programs" in other.uns
    assert not cells.uns
    assert not cells.varp
    assert "gene_program" not in cells.var


# -- graph -------------------------------------------------------------------------------------------------------------------


def test_golden_graph_of_static_embeddings(golden):
    case = golden("scgpt", "gene_network")
    checkpoint = golden("scgpt", "embed_cells").path / "checkpoint"
    genes = [str(gene) for gene in case.expected["genes"]]
    # the graph is made of genes sorted by name, and put back into the order of the data
    adata = ad.AnnData(np.ones((3, len(genes)), dtype=np.float32), var=pd.DataFrame(index=genes))
    gene_programs(
        adata, checkpoint, genes=genes, resolution=float(case.case["config"]["leiden_resolution"]), score=False
    )
    np.testing.assert_allclose(
        adata.varp["gene_programs_distances"].toarray(), case.expected["knn_distances"], atol=1e-5
    )
    graph = adata.varp["gene_programs_connectivities"].toarray()
    np.testing.assert_allclose(graph, case.expected["knn_connectivities"], atol=1e-5)
    scfm.tl.gene_embeddings(adata, checkpoint, key_added="static")
    np.testing.assert_allclose(adata.varm["static"], case.expected["embedding"], atol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_graph_is_that_of_scanpy(cells, metric):
    run(cells, metric=metric)
    work = ad.AnnData(np.asarray(cells.varm["vectors"], dtype=np.float64))
    sc.pp.neighbors(work, n_neighbors=6, use_rep="X", metric=metric)
    for name in ("distances", "connectivities"):
        np.testing.assert_allclose(cells.varp[f"gene_programs_{name}"].toarray(), work.obsp[name].toarray(), atol=2e-4)


def test_genes_with_equal_vectors_are_no_trouble(cells):
    cells.varm["vectors"][:20] = cells.varm["vectors"][0]
    run(cells)
    graph = cells.varp["gene_programs_connectivities"]
    assert np.isfinite(graph.data).all()
    assert (graph != graph.T).nnz == 0
    assert cells.varp["gene_programs_distances"].diagonal().sum() == 0
    assert (cells.varp["gene_programs_distances"].getnnz(1) == 5).all()


# -- co-expression -----------------------------------------------------------------------------------------------------------


def test_coexpression_is_the_same_with_correlations(cells):
    run(cells, model="coexpression", use_rep=None, groupby="kind")
    log = sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, copy=True), copy=True)
    work = ad.AnnData(log.X.toarray().T.astype(np.float64))
    sc.pp.neighbors(work, n_neighbors=6, use_rep="X", metric="correlation")
    for name in ("distances", "connectivities"):
        np.testing.assert_allclose(cells.varp[f"gene_programs_{name}"].toarray(), work.obsp[name].toarray(), atol=1e-4)
    result = cells.uns["gene_programs"]
    assert result["params"]["metric"] == "correlation"
    np.testing.assert_allclose(result["summary"]["coherence"], result["summary"]["coexpression"], atol=1e-4)
    # the modules that differ between groups are there; the two others do not vary
    run(cells, model="coexpression", use_rep=None, genes=NAMES[: 3 * SIZE], resolution=1.0)
    assert groups_of_genes(cells) == {frozenset(NAMES[m * SIZE : (m + 1) * SIZE]) for m in range(3)}


def test_constant_genes_have_no_correlation(cells):
    counts = cells.X.tolil()
    counts[:, :3] = 0
    cells.X = counts.tocsr()
    run(cells, model="coexpression", use_rep=None, genes=NAMES[:30])
    assert set(cells.uns["gene_programs"]["genes"]) == set(NAMES[3:30])


# -- scores ------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scanpy(cells):
    log = sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, copy=True), copy=True)
    # as many control genes as there are, so that there is nothing to draw
    run(cells, ctrl_size=cells.n_vars)
    for name, genes in cells.uns["gene_programs"]["programs"].items():
        sc.tl.score_genes(log, list(genes), ctrl_size=log.n_vars)
        np.testing.assert_allclose(cells.obsm["X_gene_programs"][name], log.obs["score"], atol=1e-5)


def test_counts_and_their_logarithms_give_the_same(cells, tmp_path):
    run(cells, ctrl_size=3, groupby="kind")
    other = cells.copy()
    other.layers["log"] = sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, copy=True), copy=True).X
    other.X = None
    run(other, ctrl_size=3, layer="log", groupby="kind")
    np.testing.assert_allclose(other.obsm["X_gene_programs"], cells.obsm["X_gene_programs"], atol=1e-5)
    dense = cells.copy()
    dense.X = dense.X.toarray()
    run(dense, ctrl_size=3)
    np.testing.assert_allclose(dense.obsm["X_gene_programs"], cells.obsm["X_gene_programs"], atol=1e-6)
    planted().write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    run(backed, ctrl_size=3, groupby="kind")
    np.testing.assert_allclose(backed.obsm["X_gene_programs"], cells.obsm["X_gene_programs"], atol=1e-6)
    backed.file.close()


def test_blocks_of_cells_make_no_difference(cells, monkeypatch):
    run(cells, model="coexpression", use_rep=None, ctrl_size=3)
    whole = cells.copy()
    monkeypatch.setattr("scfm.tl._log_expression._BLOCK_VALUES", 500)
    run(cells, model="coexpression", use_rep=None, ctrl_size=3)
    np.testing.assert_allclose(cells.obsm["X_gene_programs"], whole.obsm["X_gene_programs"], atol=1e-6)
    assert groups_of_genes(cells) == groups_of_genes(whole)


def test_cells_without_counts_have_no_scores(cells):
    counts = cells.X.tolil()
    counts[4] = 0
    cells.X = counts.tocsr()
    run(cells, groupby="kind")
    scores = cells.obsm["X_gene_programs"]
    assert scores.iloc[4].isna().all()
    assert scores.drop(index="cell4").notna().all().all()
    assert cells.uns["gene_programs"]["activity"].notna().all().all()


def test_groups_that_are_missing_or_have_one_cell(cells, capsys):
    kind = cells.obs["kind"].astype(object)
    kind.iloc[:10] = None
    kind.iloc[10] = "lone"
    cells.obs["kind"] = pd.Categorical(kind)
    run(cells, groupby="kind")
    result = cells.uns["gene_programs"]
    assert set(result["activity"].index) == {"a", "b", "c/d", "lone"}
    assert "lone" not in set(result["markers"]["group"])
    assert "groups of one cell" in capsys.readouterr().err
    scores = cells.obsm["X_gene_programs"]
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    inside = (cells.obs["kind"] == "a").to_numpy()
    np.testing.assert_allclose(result["activity"].loc["a"], scaled[inside].mean(), atol=1e-5)


# -- choice of genes ---------------------------------------------------------------------------------------------------------


def test_genes_whose_logarithms_vary_most_are_taken():
    rng = np.random.default_rng(1)
    means = 0.3 + rng.gamma(0.5, 2.0, size=300)
    counts = rng.poisson(means * rng.gamma(1.0, 1.0, size=(200, 300))).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=[f"G{i:03d}" for i in range(300)]))
    log = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    variance = log.X.toarray().astype(np.float64).var(0, ddof=1)
    with open_log_expression(adata, None) as expression:
        moments = expression.moments()
    np.testing.assert_allclose(moments.std**2, variance, rtol=1e-5)
    chosen = most_variable(moments, np.ones(300, dtype=bool), 80)
    assert {*np.flatnonzero(chosen)} == {*np.argsort(-variance)[:80]}
    adata.varm["vectors"] = rng.normal(size=(300, 5)).astype(np.float32)
    gene_programs(adata, use_rep="vectors", n_top_genes=80, score=False, resolution=1.0)
    assert set(adata.uns["gene_programs"]["genes"]) == set(adata.var_names[chosen])


def test_groups_of_blood_genes_are_found_with_all_defaults(shared):
    adata = ad.read_h5ad(shared("data", "singlecell", "pbmc3k_counts_seurat_labels.h5ad"))
    known = {
        "T cells": ["CD3D", "CD3E", "CD3G"],
        "cytotoxic": ["NKG7", "GNLY", "PRF1", "GZMA", "GZMB", "CST7"],
        "B cells": ["CD79A", "CD79B", "MS4A1"],
        "monocytes": ["LYZ", "S100A8", "S100A9", "CST3", "FCN1"],
        "HLA class II": ["HLA-DRA", "HLA-DRB1", "HLA-DPA1", "HLA-DPB1", "CD74"],
    }
    for model in ("scgpt-mini", "cellfm-mini"):
        gene_programs(adata, model, score=False)
        result = adata.uns["gene_programs"]
        table = scfm.metrics.program_recovery(result["programs"], known, result["genes"])
        assert (table["n_genes"] == [len(genes) for genes in known.values()]).all()
        assert (table["overlap"] >= 3).all(), table
        assert (table.drop("monocytes")["together"] == 1).all(), table
        assert (table["together p"] < 0.01).all(), table


def test_a_model_by_name_with_its_record(cells):
    vocab = scfm.backbones.load_vocab("scgpt-mini")
    cells.var_names = [*vocab.genes[: cells.n_vars - 2], "UNKNOWN1", "UNKNOWN2"]
    gene_programs(cells, "scgpt-mini", resolution=1.0, min_genes=3)
    result = cells.uns["gene_programs"]
    assert result["checkpoint"]["id"] == "scgpt-mini"
    assert result["gene_match"]["missing"] == 2
    assert "UNKNOWN1" not in result["genes"]


# -- wrong input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_rep": "nothing"}, KeyError, "no slot 'nothing'"),
        ({"genes": ["ABSENT", *NAMES[:5]]}, KeyError, "no gene ABSENT"),
        ({"genes": ["ABSENT"], "model": "coexpression", "use_rep": None}, KeyError, "no gene ABSENT"),
        ({"genes": NAMES[:2]}, ValueError, "at least three"),
        ({"groupby": "nothing"}, KeyError, "no column 'nothing'"),
        ({"groupby": "kind", "score": False}, ValueError, "needs the scores"),
        ({"n_top_genes": 1}, ValueError, "n_top_genes"),
        ({"n_neighbors": 1}, ValueError, "at least 2"),
        ({"metric": "manhattan"}, ValueError, "euclidean, cosine"),
        ({"resolution": -1.0}, ValueError, "must be positive"),
        ({"resolution": []}, ValueError, "must be positive"),
        ({"min_genes": 1}, ValueError, "at least 2"),
        ({"min_genes": 50}, ValueError, "lower resolution="),
        ({"layer": "nothing"}, KeyError, "no layer 'nothing'"),
        ({"rng": "seed"}, TypeError, "rng"),
    ],
)
def test_wrong_arguments(cells, options, error, message):
    with pytest.raises(error, match=message):
        run(cells, **options)
    assert "gene_programs" not in cells.uns


def test_values_that_are_no_expression_are_refused(cells):
    cells.layers["scaled"] = cells.X.toarray() - 1.5
    with pytest.raises(ValueError, match=r"layer 'scaled'.*adata\.raw"):
        run(cells, layer="scaled")
    cells.layers["zeros"] = cells.X * 0
    with pytest.raises(ValueError, match="nothing but zeros"):
        run(cells, layer="zeros")
    cells.var_names = ["SAME"] * cells.n_vars
    with pytest.raises(ValueError, match="var_names_make_unique"):
        run(cells)
