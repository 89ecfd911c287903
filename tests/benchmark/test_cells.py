"""The table of models, baselines and controls: what is in it, and that its numbers are right."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab

TRAIN = {"max_epochs": 1, "accelerator": "cpu", "batch_size": 16}


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data(60)


@pytest.fixture(scope="module")
def model(adata):
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *adata.var_names], specials=["<pad>", "<cls>", "<eoc>"])
    return from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu", name="tiny")


@pytest.fixture(scope="module")
def annotation(adata, model):
    return scfm.benchmark.cells(
        adata,
        model,
        labels_key="label",
        batch_key="batch",
        methods=("knn", "linear", "finetune"),
        baselines=("hvg_pca", "knn", "logistic", "majority", "shuffled"),
        seeds=(0, 1),
        train=TRAIN,
    )


def value(table, **chosen):
    for column, wanted in chosen.items():
        table = table[table[column] == wanted]
    return table["value"].to_numpy()


def test_every_model_baseline_and_control_is_there_for_each_group(annotation):
    runs = annotation[annotation["metric"] == "accuracy"].groupby(["kind", "name", "method"]).size().to_dict()
    assert runs == {
        ("model", "tiny", "knn"): 2,
        ("model", "tiny", "linear"): 2,
        ("model", "tiny", "finetune"): 4,
        ("random weights", "tiny", "knn"): 4,
        ("random weights", "tiny", "linear"): 4,
        ("baseline", "HVG + PCA", "knn"): 2,
        ("baseline", "HVG + PCA", "linear"): 2,
        ("baseline", "HVG", "knn"): 2,
        ("baseline", "HVG", "logistic regression"): 2,
        ("control", "largest class", ""): 2,
        ("control", "shuffled labels", "logistic regression"): 4,
    }
    assert set(annotation["held_out"]) == {"a", "b"}


def test_a_held_out_group_is_predicted_from_the_others(annotation, adata):
    query = (adata.obs["batch"] == "a").to_numpy()
    result = scfm.baselines.logistic_labels(adata[~query], adata[query], "label")
    expected = (result.labels.to_numpy() == adata.obs["label"][query].to_numpy()).mean()
    found = value(annotation, name="HVG", method="logistic regression", held_out="a", metric="accuracy")
    np.testing.assert_allclose(found, expected)
    labels = adata.obs["label"].to_numpy()
    names, counts = np.unique(labels[~query], return_counts=True)
    majority = (labels[query] == names[counts.argmax()]).mean()
    np.testing.assert_allclose(value(annotation, name="largest class", held_out="a", metric="accuracy"), majority)


def test_controls_are_worse_than_what_learns(annotation):
    good = value(annotation, name="HVG", method="logistic regression", metric="accuracy").mean()
    assert good > value(annotation, kind="control", name="shuffled labels", metric="accuracy").mean() + 0.2


def test_types_that_the_reference_lacks_are_left_out_and_counted(adata, model):
    odd = adata.copy()
    odd.obs["label"] = odd.obs["label"].astype(str)
    first = np.flatnonzero(odd.obs["batch"] == "a")[:6]
    odd.obs.iloc[first, odd.obs.columns.get_loc("label")] = "only in a"
    options = {"labels_key": "label", "batch_key": "batch", "random_weights": False, "seeds": (0,)}
    table = scfm.benchmark.cells(odd, model, methods=("knn",), held_out=["a"], **options)
    np.testing.assert_allclose(value(table, metric="unseen"), 6 / 30)
    assert set(table["held_out"]) == {"a"}


def test_integration(adata, model):
    before = adata.copy()
    table = scfm.benchmark.cells(
        adata,
        model,
        labels_key="label",
        batch_key="batch",
        task="integration",
        methods=("zero-shot", "finetune"),
        baselines=("hvg_pca", "shuffled"),
        seeds=(0,),
        train={"tiny": TRAIN},
    )
    assert set(zip(table["kind"], table["name"], table["method"], strict=True)) == {
        ("model", "tiny", "zero-shot"),
        ("model", "tiny", "finetune"),
        ("random weights", "tiny", "zero-shot"),
        ("baseline", "HVG + PCA", ""),
        ("control", "shuffled cells", "HVG + PCA"),
    }
    assert list(dict.fromkeys(table["metric"]))[:3] == ["Overall", "AvgBIO", "AvgBATCH"]
    overall = 0.6 * value(table, metric="AvgBIO") + 0.4 * value(table, metric="AvgBATCH")
    np.testing.assert_allclose(value(table, metric="Overall"), overall)
    pca = value(table, name="HVG + PCA", method="", metric="AvgBIO")
    assert pca > value(table, kind="control", metric="AvgBIO")
    assert adata.obs.equals(before.obs)
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.uns) == set(before.uns)


def test_summary_has_means_and_spreads(annotation):
    table = scfm.benchmark.summary(annotation, ["accuracy", "macro F1"])
    assert list(table.columns) == ["accuracy", "accuracy ±", "macro F1", "macro F1 ±", "runs"]
    assert table["accuracy"].is_monotonic_decreasing
    row = table.loc[("annotation", "model", "tiny", "finetune")]
    values = value(annotation, name="tiny", method="finetune", metric="accuracy")
    np.testing.assert_allclose([row["accuracy"], row["accuracy ±"]], [values.mean(), values.std(ddof=1)])
    assert row["runs"] == 4
    one = scfm.benchmark.summary(annotation[(annotation["held_out"] == "a") & (annotation["seed"] == 0)])
    assert one["macro F1"].notna().all()
    assert one["macro F1 ±"].isna().all()


def test_picture(annotation, tmp_path):
    axes = scfm.pl.benchmark(annotation, ["macro F1", "accuracy"], show=False, save=tmp_path / "figure.png")
    assert [ax.get_title() for ax in axes] == ["macro F1", "accuracy"]
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    means = annotation[annotation["metric"] == "macro F1"].groupby(["name", "method", "kind"])["value"].mean()
    assert labels[-1].split(",")[0] == means.idxmax()[0]
    assert len(labels) == 11
    mpl.pyplot.close("all")
    with pytest.raises(KeyError, match="no score"):
        scfm.pl.benchmark(annotation, "AUROC", show=False)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"task": "cooking"}, ValueError, "task"),
        ({"methods": ("zero-shot",)}, ValueError, "no method"),
        ({"baselines": ("harmony",)}, ValueError, "no baseline"),
        ({"labels_key": "type"}, KeyError, "type"),
        ({"batch_key": None}, ValueError, "at random"),
        ({"task": "integration", "batch_key": None, "split_by": "batch"}, ValueError, "batch_key"),
        ({"held_out": ["c"]}, KeyError, "no group c"),
        ({"layer": "counts"}, KeyError, "no layer"),
    ],
)
def test_wrong_arguments(options, error, match, adata, model):
    with pytest.raises(error, match=match):
        scfm.benchmark.cells(adata, model, **({"labels_key": "label", "batch_key": "batch", "seeds": (0,)} | options))


def test_one_group_or_one_label(adata, model):
    odd = adata[adata.obs["batch"] == "a"].copy()
    with pytest.raises(ValueError, match="fewer than two groups"):
        scfm.benchmark.cells(odd, model, labels_key="label", batch_key="batch")
    odd = adata.copy()
    odd.obs["label"] = "x"
    with pytest.raises(ValueError, match="fewer than two labels"):
        scfm.benchmark.cells(odd, model, labels_key="label", batch_key="batch")
