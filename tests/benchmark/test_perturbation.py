"""``benchmark.perturbation``: all methods on the same perturbations, scored as the metrics do."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from perturbed import Learner, make_cells

from scfm import benchmark, pp
from scfm.metrics import de_quantiles, perturbation_scores
from scfm.tasks.perturbation_data import PerturbationSplit


@pytest.fixture(scope="module")
def cells():
    return make_cells(n_cells=16)


SPLIT = PerturbationSplit.from_lists(["A", "B", "C", "A+C"], test=["A+B", "D", "C+D", "B+D"])


@pytest.fixture(scope="module")
def table(cells):
    models = {"learner": Learner("ABC"), "by seed": lambda data, split, seed: Learner("ABCD", seed=seed)}
    vectors = pd.DataFrame(np.eye(4), index=list("ABCD"))
    return benchmark.perturbation(cells, models, split=SPLIT, gene_vectors={"own": vectors}, seeds=(0, 1))


def test_form_of_the_table(table, cells):
    assert list(table.columns) == ["task", "kind", "name", "method", "held_out", "seed", "metric", "value"]
    assert set(table["name"]) == {
        "no change", "perturbed mean", "matching mean", "additive", "linear, random vectors", "linear, own vectors",
        "learner", "by seed", "half of the cells",
    }  # fmt: skip
    assert set(table["held_out"]) == {"unseen_single", "combo_seen1", "combo_seen2"}
    counts = table[table["metric"] == "conditions"].groupby("held_out")["value"].unique()
    assert {name: list(value) for name, value in counts.items()} == {
        "unseen_single": [1],
        "combo_seen1": [2],
        "combo_seen2": [1],
    }
    assert not table.duplicated(["name", "held_out", "seed", "metric"]).any()
    wide = benchmark.summary(table, ["DE MSE"])
    assert len(wide) == 9


def test_scores_are_those_of_the_metrics(table, cells):
    means = pd.DataFrame(cells.uns["perturbation"]["means"], index=cells.uns["perturbation"]["names"])
    genes, other_genes = (
        {name: cells.var_names.get_indexer(part["gene"]) for name, part in cells.uns["perturbation"][table].groupby("perturbation")}
        for table in ("de_genes", "non_dropout_de_genes")
    )  # fmt: skip
    control = means.loc["ctrl"].to_numpy()
    guess = means.loc["A"] + means.loc["B"] - means.loc["ctrl"]
    expected = perturbation_scores(
        means.loc[["A+B"]].to_numpy(), guess.to_numpy()[None], control,
        centroid=means.loc[SPLIT.train].to_numpy().mean(0), de_genes=[genes["A+B"]],
        non_dropout_de_genes=[other_genes["A+B"]],
        quantiles=de_quantiles(cells[cells.obs["scfm_perturbation"] == "A+B"].X, ["A+B"] * 16, [genes["A+B"]]),
    ).iloc[0]  # fmt: skip
    assert "DE within quantiles" in expected
    assert "non-dropout DE MSE" in expected
    found = table.query("name == 'additive' and held_out == 'combo_seen2' and seed == 0").set_index("metric")["value"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_what_cannot_be_predicted_counts_as_no_change(table):
    def of(name, metric, group="unseen_single"):
        rows = table.query("name == @name and metric == @metric and held_out == @group and seed == 0")
        return rows["value"].item()

    assert of("learner", "predicted") == 0
    assert of("by seed", "predicted") == 1
    assert of("learner", "predicted", "combo_seen1") == 0
    assert of("learner", "MSE") == pytest.approx(of("no change", "MSE"), rel=1e-5)
    assert of("no change", "Pearson delta") == 0
    assert of("no change", "DE direction") == of("no change", "non-dropout DE direction") == 0
    seeds = table.query("name == 'by seed' and metric == 'MSE'").groupby("held_out")["value"].nunique()
    assert (seeds == 2).all()


def test_order_of_methods_on_additive_data(table):
    mean = table.groupby(["name", "metric"])["value"].mean().unstack()
    assert mean["MSE"].idxmin() in ("half of the cells", "additive")
    assert mean.loc["half of the cells", "Pearson delta"] > mean.loc["perturbed mean", "Pearson delta"]
    assert mean.loc["half of the cells", "centroid accuracy"] > 0.9
    assert mean.loc["perturbed mean", "rank"] == pytest.approx(0.5)
    assert abs(mean.loc["half of the cells", "E-distance"]) < mean.loc["no change", "E-distance"]


def test_conditions_and_same_result_twice(cells):
    options = {"split": SPLIT, "baselines": ["additive"], "by": "condition", "ceiling": False}
    first, second = (benchmark.perturbation(cells, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert set(first["held_out"]) == set(SPLIT.test)


def test_unseen_cell_type():
    cells = make_cells(types=True)
    names = [name for name in cells.obs["scfm_perturbation"].cat.categories if name != "ctrl"]
    split = PerturbationSplit.from_lists(names, held_out_cell_types=["y"])
    table = benchmark.perturbation(cells, {"learner": Learner()}, split=split, baselines=["matching_mean", "no_change"])
    assert set(table["held_out"]) == {"unseen_cell_type: y"}
    mean = table.groupby(["name", "metric"])["value"].mean().unstack()
    assert mean.loc["matching mean", "Pearson delta"] > 0.5
    assert mean.loc["no change", "conditions"] == len(names)


def test_cell_type_composition_is_no_part_of_a_shift():
    rng = np.random.default_rng(0)
    types = np.repeat(["x", "y"], 300)
    values = rng.normal(3, 0.3, (600, 20))
    values[types == "y", :5] += 2
    perturbed = rng.random(600) < np.where(types == "x", 0.2, 0.8)
    values[perturbed, 10] += 1
    obs = pd.DataFrame({"perturbation": np.where(perturbed, "A", "ctrl"), "type": types}, index=map(str, range(600)))
    cells = ad.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))
    pp.perturbation_setup(cells, control="ctrl", cell_type_key="type")
    split = PerturbationSplit.from_lists(["A"], held_out_cell_types=["y"])
    table = benchmark.perturbation(cells, split=split, baselines=["no_change", "perturbed_mean"], ceiling=False)
    scores = table[table["metric"].isin(["MSE", "Pearson delta"])].pivot_table(
        index="metric", columns="name", values="value"
    )
    assert scores.loc["MSE", "perturbed mean"] < scores.loc["MSE", "no change"] / 5
    assert scores.loc["Pearson delta", "perturbed mean"] > 0.95
    baseline = benchmark.perturbation_baseline(cells, "perturbed_mean", split=split).baseline
    shift = (baseline.predict_means(["A"]).iloc[0] - baseline.control).to_numpy()
    np.testing.assert_allclose(shift, np.eye(20)[10], atol=0.25)


def test_all_cell_types_are_held_out():
    cells = make_cells(types=True)
    split = PerturbationSplit.from_lists(["A"], held_out_cell_types=["x", "y"])
    with pytest.raises(ValueError, match=r"no perturbation of split.train has cells"):
        benchmark.perturbation(cells, split=split)


def test_splits_by_default_and_principal_components(cells):
    measured = cells.copy()
    measured.var_names = ["A", "B", "C", "D", *measured.var_names[4:]]
    pp.perturbation_setup(measured, control="control")
    table = benchmark.perturbation(measured, baselines=["ridge_pca"], ceiling=False)
    assert set(table["name"]) == {"linear, PCA vectors"}
    assert np.isfinite(table.query("metric == 'MSE'")["value"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ["other"]}, "no baseline 'other'"),
        ({"baselines": ["ridge_pca"]}, "no gene that is perturbed"),
        ({"by": "gene"}, "by must be"),
        ({"n_cells": 1}, "n_cells"),
        ({"split": PerturbationSplit(["A"], [], ["X"])}, "no perturbation that is tested on"),
        ({"split": PerturbationSplit(["X"], [], ["A"])}, "no perturbation of split.train"),
    ],
)
def test_wrong_input(cells, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.perturbation(cells, **{"split": SPLIT} | options)


def test_split_of_the_model(cells):
    learner = Learner()
    learner.split = SPLIT
    table = benchmark.perturbation(cells, {"learner": learner}, baselines=[], by="condition", ceiling=False)
    assert set(table["held_out"]) == set(SPLIT.test)
    with pytest.raises(ValueError, match=r"learner was trained on A\+C"):
        benchmark.perturbation(
            cells, {"learner": learner}, split=PerturbationSplit(["A", "B"], [], ["A+C"]), baselines=[]
        )


def test_no_such_baseline(cells):
    with pytest.raises(ValueError, match="no baseline 'other'"):
        benchmark.perturbation_baseline(cells, "other")


def test_a_split_as_a_mapping(cells):
    mapping = {"train": ["A", "B", "C", "A_C"], "test": ["B+A", "D", "D_C", "B+D"]}
    options = {"baselines": ["additive"], "ceiling": False}
    given = benchmark.perturbation(cells, split=mapping, **options)
    pd.testing.assert_frame_equal(given, benchmark.perturbation(cells, split=SPLIT, **options))
