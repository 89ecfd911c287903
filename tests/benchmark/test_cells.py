"""The table of models, baselines and controls: what is in it, and that its numbers are right."""

from __future__ import annotations

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.models._splits import held_out_within

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
        ("random weights", "tiny", "finetune"): 4,
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
        ("random weights", "tiny", "finetune"),
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
    assert len(labels) == 12
    mpl.pyplot.close("all")
    with pytest.raises(KeyError, match="no score"):
        scfm.pl.benchmark(annotation, "AUROC", show=False)
    with pytest.raises(ValueError, match="no column task"):
        scfm.pl.benchmark(annotation.drop(columns="task"), show=False)


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


def test_columns_of_one_gene_are_summed_before_anything_runs(adata, model, caplog):
    options = {"labels_key": "label", "batch_key": "batch", "methods": ("knn",), "seeds": (0,), "random_weights": False}
    expected = scfm.benchmark.cells(adata, model, **options)
    twice = anndata.concat([adata, adata[:, :3]], axis=1, merge="first")
    half = twice.X.toarray()
    half[:, :3] -= half[:, -3:] // 2
    half[:, -3:] //= 2
    twice.X = sparse.csr_matrix(half)
    assert not twice.var_names.is_unique
    pd.testing.assert_frame_equal(scfm.benchmark.cells(twice, model, **options), expected)
    assert "3 columns have the name of another gene" in caplog.text


def test_numbers_are_labels(adata, model):
    options = {"labels_key": "label", "batch_key": "batch", "methods": ("knn",), "seeds": (0,), "random_weights": False}
    expected = scfm.benchmark.cells(adata, model, **options)
    numbers = adata.copy()
    numbers.obs["label"] = numbers.obs["label"].astype(str).map({"x": 0.0, "y": 1.0, "z": 2.0})
    numbers.obs["batch"] = numbers.obs["batch"].astype(str).map({"a": 1.0, "b": 2.0})
    found = scfm.benchmark.cells(numbers, model, held_out=[1, 2.0], **options)
    assert list(dict.fromkeys(found["held_out"])) == ["1", "2"]
    np.testing.assert_allclose(found["value"], expected["value"])


def test_a_missing_package_is_noticed_before_anything_runs(adata, monkeypatch):
    def missing(name, **_):
        raise scfm.MissingExtraError(name)

    monkeypatch.setattr("scfm.benchmark._cells.require", missing)
    options = {"labels_key": "label", "batch_key": "batch", "task": "integration"}
    with pytest.raises(scfm.MissingExtraError, match="harmonypy"):
        scfm.benchmark.cells(adata, "no such model", baselines=("harmony",), **options)


def test_fine_tuning_starts_from_other_weights_than_embedding(adata, model, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options.get("weights"))
        return model

    monkeypatch.setattr("scfm.tl._inputs.load", load)
    scfm.benchmark.cells(
        adata,
        "scfoundation",
        labels_key="label",
        batch_key="batch",
        methods=("knn", "finetune"),
        held_out=["a"],
        baselines=(),
        seeds=(0,),
        random_weights=False,
        train=TRAIN,
    )
    assert asked == [None, "gene"]


def test_cells_of_every_batch_and_type_are_held_out_and_said_to_be_optimistic(adata, model):
    options = {"labels_key": "label", "batch_key": "batch", "methods": ("knn",), "seeds": (0,), "random_weights": False}
    table = scfm.benchmark.cells(adata, model, split="within", **options)
    assert set(table["held_out"]) == {"within (optimistic)"}
    query = held_out_within(adata.obs["batch"].to_numpy(), adata.obs["label"].to_numpy())
    sizes = adata.obs.groupby(["batch", "label"], observed=True).size()
    held_out = adata.obs[query].groupby(["batch", "label"], observed=True).size()
    assert (held_out == np.ceil(0.3 * sizes)).all()
    np.testing.assert_array_equal(query, held_out_within(*adata.obs[["batch", "label"]].to_numpy().T))
    other = held_out_within(*adata.obs[["batch", "label"]].to_numpy().T, seed=1)
    assert (other != query).any()
    result = scfm.baselines.logistic_labels(adata[~query], adata[query], "label")
    accuracy = (result.labels.to_numpy() == adata.obs["label"][query].to_numpy()).mean()
    found = value(table, name="HVG", method="logistic regression", metric="accuracy")
    np.testing.assert_allclose(found, accuracy)
    for wrong in (
        {"split": "random"},
        {"split": "within", "held_out": ["a"]},
        {"split": "within", "task": "integration"},
    ):
        with pytest.raises(ValueError, match="split"):
            scfm.benchmark.cells(
                adata, model, **({name: x for name, x in options.items() if name != "methods"} | wrong)
            )


def test_the_share_to_test_on_is_rounded_up():
    groups = np.repeat(["a", "b", "b"], [10, 1, 4])
    labels = np.repeat(["x", "x", "y"], [10, 1, 4])
    held_out = held_out_within(groups, labels)
    assert [int(held_out[part].sum()) for part in (slice(0, 10), slice(10, 11), slice(11, 15))] == [3, 1, 2]
