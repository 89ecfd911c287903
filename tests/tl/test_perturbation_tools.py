"""Genetic interactions, reverse perturbation and the atlas."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from perturbed import PAIRS, SINGLES, Learner, make_cells
from scipy.spatial.distance import cdist

from scfm import pp, tl
from scfm.benchmark import perturbation_baseline
from scfm.metrics import genetic_interaction, interaction_magnitude


@pytest.fixture(scope="module")
def cells():
    return make_cells()


@pytest.fixture(scope="module")
def additive(cells):
    return perturbation_baseline(cells, "additive")


# -- interactions --------------------------------------------------------------------------------------------------------


def test_interactions_as_the_metrics_give_them(cells, additive, tmp_path):
    adata = tl.genetic_interactions(cells, additive, n_calls=2, copy=True)
    result = adata.uns["genetic_interactions"]
    table = result["table"].set_index(["source", "pair"])
    means = pd.DataFrame(
        cells.uns["perturbation"]["means"], index=cells.uns["perturbation"]["names"], columns=cells.var_names
    )
    change = means - means.loc["ctrl"]
    assert table.loc["measured"].index.tolist() == sorted(PAIRS)
    effects = [change.loc[name].to_numpy(dtype=float) for name in ("A", "C", "A+C")]
    for name, value in genetic_interaction(*effects).items():
        assert table.loc[("measured", "A+C"), name] == pytest.approx(value, rel=1e-4), name
    de = cells.uns["perturbation"]["de_genes"].query("perturbation == 'A+C'")["gene"]
    few = interaction_magnitude(*(change.loc[name, de].to_numpy() for name in ("A", "C", "A+C")))
    assert table.loc[("measured", "A+C"), "magnitude (least squares)"] == pytest.approx(few["magnitude"], rel=1e-4)
    # sums of single effects have the magnitude of sums, apart from cells that were cut off at zero
    np.testing.assert_allclose(table.loc["predicted", "magnitude"], np.sqrt(2), atol=0.15)
    for source in ("measured", "predicted"):
        part = table.loc[source].sort_values("magnitude")
        assert part["call"].tolist() == ["suppressor"] * 2 + ["synergy"] * 2
    agreement = result["agreement"].set_index("method")
    wide = table["magnitude"].unstack("source")
    assert agreement.loc["theil-sen", "pearson"] == pytest.approx(wide["measured"].corr(wide["predicted"]))
    calls = table["call"].unstack("source")
    assert agreement.loc["theil-sen", "synergy"] == ((calls == "synergy").all(axis=1)).sum()
    adata.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad").uns["genetic_interactions"]
    pd.testing.assert_frame_equal(back["table"], result["table"], check_dtype=False)


def test_synergy_is_found():
    cells = make_cells(n_cells=20)
    rows = (cells.obs["scfm_perturbation"] == "A+B").to_numpy()
    control = (cells.obs["scfm_perturbation"] == "ctrl").to_numpy()
    values = cells.X.toarray()
    values[rows] = values[control].mean(0) + 2.5 * (values[rows] - values[control].mean(0))
    values[(cells.obs["scfm_perturbation"] == "C+D").to_numpy()] = values[control][:20]
    cells.X = np.abs(values)
    pp.perturbation_setup(cells, control="control")
    tl.genetic_interactions(cells, n_calls=1)
    table = cells.uns["genetic_interactions"]["table"].set_index("pair")
    assert table.loc["A+B", "call"] == table.loc["A+B", "call (least squares)"] == "synergy"
    assert table.loc["C+D", "call"] == "suppressor"
    assert "agreement" not in cells.uns["genetic_interactions"]


def test_pairs_that_are_not_measured(cells, additive):
    adata = tl.genetic_interactions(
        cells, additive, pairs=["D+A"], singles="predicted", genes=cells.var_names[:20], copy=True
    )
    table = adata.uns["genetic_interactions"]["table"]
    assert table[["pair", "source"]].to_numpy().tolist() == [["A+D", "predicted"]]
    assert adata.uns["genetic_interactions"]["params"]["n_genes"] == 20


def test_genes_of_the_fit_that_are_given_are_all_used(cells):
    low = cells.copy()
    low.uns["perturbation"] = cells.uns["perturbation"] | {"means": cells.uns["perturbation"]["means"] / 100}
    genes = cells.var_names[:20]
    for options, n_genes in (
        ({}, 20),
        ({"min_mean": 0.03}, int((low.uns["perturbation"]["means"][0, :20] >= 0.03).sum())),
    ):
        record = tl.genetic_interactions(low, genes=genes, **options, copy=True).uns["genetic_interactions"]
        assert record["params"]["n_genes"] == n_genes
    with pytest.raises(ValueError, match="0 genes are left"):
        tl.genetic_interactions(low, copy=True)


def test_measured_pairs_without_single_effects_are_named(cells, capsys):
    some = cells[cells.obs["scfm_perturbation"] != "D"].copy()
    pp.perturbation_setup(some, control="control")
    table = tl.genetic_interactions(some, copy=True).uns["genetic_interactions"]["table"]
    assert set(table["pair"]) == {"A+B", "A+C"}
    assert "2 measured pairs are left out, because they have a gene that was not measured alone: B+D, C+D" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": ["A"]}, ValueError, "has two genes"),
        ({"singles": "predicted"}, ValueError, "with a model"),
        ({"singles": "other"}, ValueError, "singles must be"),
        ({"genes": ["none"]}, KeyError, "no gene none"),
        ({"min_mean": 99.0}, ValueError, "0 genes are left"),
        ({"pairs": ["A+B", "A+X"]}, ValueError, r"not measured alone: A\+X; compare"),
        ({"pairs": ["A+B", "A+D"]}, ValueError, r"these are not: A\+D"),
        ({"n_calls": 0}, ValueError, "n_calls"),
    ],
)
def test_interactions_wrong_input(cells, options, error, message):
    with pytest.raises(error, match=message):
        tl.genetic_interactions(cells, **options, copy=True)


# -- reverse perturbation ------------------------------------------------------------------------------------------------


def test_the_right_perturbation_is_found(cells, additive, tmp_path):
    adata = tl.reverse_perturb(cells, additive, n_profiles=20, k=5, copy=True)
    result = adata.uns["reverse_perturb"]
    assert sorted(result["candidates"]) == sorted([*SINGLES, "A+B", "A+C", "A+D", "B+C", "B+D", "C+D"])
    first = result["ranking"].query("rank == 1").set_index("target")["candidate"]
    assert sorted(first.index) == sorted([*SINGLES, *PAIRS])
    assert (first.index == first).mean() >= 0.75
    hits = result["hits"].set_index("K")
    assert hits.index.tolist() == list(range(1, 11))
    assert hits.loc[1, "exact"] == pytest.approx((first.index == first).mean())
    assert (np.diff(hits["exact"]) >= 0).all()
    assert (hits["relevant"] >= hits["exact"]).all()
    adata.write_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_frame_equal(
        ad.read_h5ad(tmp_path / "x.h5ad").uns["reverse_perturb"]["ranking"], result["ranking"], check_dtype=False
    )


def test_votes_by_counting(cells):
    model, names = Learner(scale=0.5), ["A", "B", "C+D"]
    adata = tl.reverse_perturb(cells, model, names, target=["A+B"], n_profiles=9, k=4, rng=2, copy=True)
    ranking = adata.uns["reverse_perturb"]["ranking"].set_index("candidate")
    control = cells[cells.obs["scfm_perturbation"] == "ctrl"]
    chosen = np.sort(np.random.default_rng(2).choice(control.n_obs, 9, replace=False))
    parts = tl.perturb(control[chosen], names, model, copy=True)
    profiles = np.concatenate([parts.layers[f"perturbed_{name}"] for name in names])
    query = cells[cells.obs["scfm_perturbation"] == "A+B"].X.toarray()
    nearest = np.argsort(cdist(query, profiles), axis=1, kind="stable")[:, :4] // 9
    votes = np.bincount(nearest.ravel(), minlength=3)
    assert ranking.loc[names, "votes"].tolist() == votes.tolist()
    np.testing.assert_allclose(ranking.loc[names, "share"], votes / votes.sum())
    assert "hits" not in adata.uns["reverse_perturb"]  # A+B is no candidate
    assert ranking["relevant"].to_dict() == {"A": True, "B": True, "C+D": False}


def test_targets_in_usual_spellings(cells, additive):
    found = tl.reverse_perturb(cells, additive, target=["A+ctrl", "B_A", "A+B"], n_profiles=4, n_top=1, copy=True)
    assert found.uns["reverse_perturb"]["ranking"]["target"].tolist() == ["A", "A+B"]


def test_mean_profiles_and_groups_of_any_kind(cells, additive):
    adata = cells.copy()
    adata.obs["state"] = np.where(adata.obs["scfm_perturbation"] == "B+D", "ill", "well")
    tl.reverse_perturb(adata, additive, groupby="state", target="ill", method="mean", n_top=3)
    ranking = adata.uns["reverse_perturb"]["ranking"]
    assert ranking["candidate"].iloc[0] == "B+D"
    assert (np.diff(ranking["distance"]) >= 0).all()
    assert "exact" not in ranking
    again = tl.reverse_perturb(adata, additive, groupby="state", target="ill", method="mean", n_top=3, copy=True)
    pd.testing.assert_frame_equal(again.uns["reverse_perturb"]["ranking"], ranking)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groupby": "none"}, KeyError, "no column 'none'"),
        ({"target": "X"}, KeyError, "no group X"),
        ({"candidates": ["X"], "model": Learner("AB")}, ValueError, "cannot perturb X"),
        ({"method": "other"}, ValueError, "method must be"),
        ({"k": 0}, ValueError, "at least 1"),
    ],
)
def test_reverse_wrong_input(cells, additive, options, error, message):
    with pytest.raises(error, match=message):
        tl.reverse_perturb(cells, **{"model": additive} | options, copy=True)


def test_no_controls(cells, additive):
    adata = cells[cells.obs["scfm_perturbation"] != "ctrl"].copy()
    with pytest.raises(ValueError, match="no control cells"):
        tl.reverse_perturb(adata, additive)


# -- atlas ---------------------------------------------------------------------------------------------------------------


def test_atlas(cells, tmp_path):
    genes = list("ABCDEFGH")
    model = Learner(genes, scale=0.6)
    atlas = tl.perturbation_atlas(cells, model, genes, n_cells=6, rng=1)
    assert atlas.shape == (8 + 28, cells.n_vars)
    control = cells[cells.obs["scfm_perturbation"] == "ctrl"]
    chosen = np.sort(np.random.default_rng(1).choice(control.n_obs, 6, replace=False))
    direct = tl.perturb(control[chosen], list(atlas.obs_names), model, keep="summary", copy=True)
    np.testing.assert_allclose(atlas.X, direct.uns["perturb"]["mean_change"], atol=1e-4)
    assert np.isfinite(atlas.obsm["X_umap"]).all()
    table = atlas.uns["perturbation_atlas"]["clusters"].set_index("cluster")
    for cluster, part in atlas.obs.groupby("cluster", observed=True):
        inside = pd.Series([gene for name in part.index for gene in name.split("+")]).value_counts()
        assert table.loc[cluster, "n_perturbations"] == len(part)
        assert inside[table.loc[cluster, "dominant_gene"]] == inside.max()
        assert table.loc[cluster, "share"] == pytest.approx(inside.max() / len(part))
    again = tl.perturbation_atlas(cells, model, genes, n_cells=6, rng=1)
    np.testing.assert_array_equal(again.obs["cluster"], atlas.obs["cluster"])
    atlas.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="too few for a map"):
        tl.perturbation_atlas(cells, model, ["A", "B"])


def test_atlas_without_the_perturbed_genes(cells, monkeypatch):
    """They are left out by symbol where the index holds ids."""
    left = {}
    monkeypatch.setattr(
        "scfm.tl._perturbation_atlas._arrange",
        lambda atlas, used, *rest: (
            left.update(used=used) or atlas.obs.insert(0, "cluster", pd.Categorical(["0"] * len(atlas)))
        ),
    )
    adata = cells.copy()
    adata.var["gene_name"] = ["A", "B", *cells.var_names[2:]]
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    from scfm import pp

    pp.perturbation_setup(adata, control="control", gene_symbols="gene_name")
    for control in (None, adata[adata.obs["scfm_perturbation"] == "ctrl"].copy()):
        tl.perturbation_atlas(adata, Learner(), control=control)
        assert np.flatnonzero(~left["used"]).tolist() == [0, 1]


def test_atlas_needs_one_list_of_genes(cells):
    model = Learner()
    with pytest.raises(ValueError, match="not both"):
        tl.perturbation_atlas(cells, model, ["A", "B"], perturbations=["A"])
