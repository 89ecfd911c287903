"""Cell types of new cells by neighbours, a linear classifier and fine-tuning."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab

METHODS = ("knn", "linear", "finetune")
TRAIN = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "lr": 5e-3, "batch_size": 16}


@pytest.fixture
def reference(make_data):
    return make_data(60)


@pytest.fixture
def query(make_data):
    data = make_data(21, seed=0)
    data.obs_names = [f"query{i}" for i in range(21)]
    return data


@pytest.fixture
def model(reference):
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *reference.var_names], specials=["<pad>", "<cls>", "<eoc>"])
    return from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu")


def trained_with(method):
    return {"train": TRAIN} if method == "finetune" else {}


@pytest.mark.parametrize("method", METHODS)
def test_labels_confidence_probabilities_and_record(method, reference, query, model):
    scfm.tl.annotate(
        query, reference, labels_key="label", model=model, method=method, key_added="type", **trained_with(method)
    )
    labels, confidence = query.obs["type"], query.obs["type_confidence"]
    assert list(labels.cat.categories) == ["x", "y", "z"]
    assert pd.isna(labels.iloc[3]), "a cell without counts has no label"
    assert np.isnan(confidence.iloc[3])
    table = query.obsm["type_proba"]
    assert list(table.columns) == ["x", "y", "z"]
    known = labels.notna()
    np.testing.assert_allclose(table[known].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(table[known].max(axis=1), confidence[known], rtol=1e-5)
    chosen = [table.loc[cell, label] for cell, label in labels[known].items()]
    np.testing.assert_allclose(chosen, confidence[known], rtol=1e-5)
    record = query.uns["type"]
    assert record["params"]["method"] == method
    assert record["without_label"] == pytest.approx(1 / 21)
    assert list(record["labels"]) == ["x", "y", "z"]


@pytest.mark.parametrize("method", METHODS)
def test_neither_object_is_changed_beyond_that(method, reference, query, model):
    before = reference.copy(), query.copy()
    out = scfm.tl.annotate(
        query,
        reference,
        labels_key="label",
        model=model,
        method=method,
        min_confidence=0.9,
        copy=True,
        **trained_with(method),
    )
    pd.testing.assert_frame_equal(query.obs, before[1].obs)
    pd.testing.assert_frame_equal(reference.obs, before[0].obs)
    assert set(query.uns) == set(before[1].uns)
    assert set(reference.uns) == set(before[0].uns)
    rejected = out.obs["label_predicted"].isna()
    low = ~(out.obs["label_predicted_confidence"] >= 0.9)
    assert (rejected == low).all()
    assert list(out.obs_names) == list(query.obs_names)


def test_a_saved_classifier_is_a_reference(reference, query, model, tmp_path):
    options = {"labels_key": "label", "model": model, "method": "finetune", "train": TRAIN, "split_by": "batch"}
    scfm.tl.annotate(query, reference, save_model=tmp_path / "model", **options)
    again = query.copy()
    scfm.tl.annotate(again, tmp_path / "model", key_added="again")
    np.testing.assert_allclose(again.obsm["again_proba"], query.obsm["label_predicted_proba"], rtol=1e-5)
    assert again.uns["again"]["params"]["labels_key"] == "label"


def test_the_linear_classifier_learns_what_there_is(reference, query):
    from scfm.tasks.linear import linear_votes

    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 5)) * 4
    codes = np.arange(60) % 3
    known = centers[codes] + rng.normal(size=(60, 5))
    known[0], codes[1] = np.nan, -1
    sought = np.vstack([centers, np.full(5, np.nan)])
    votes = linear_votes(known, codes, sought, 4)
    assert votes.codes.tolist() == [0, 1, 2, -1]
    assert (votes.probabilities[:3, 3] == 0).all()
    assert np.isnan(votes.confidence[3])
    with pytest.raises(ValueError, match="at least two"):
        linear_votes(known, np.zeros(60, int), sought, 4)
    with pytest.raises(ValueError, match="columns"):
        linear_votes(known, codes, sought[:, :3], 4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "svm"}, ValueError, "method"),
        ({"labels_key": None}, ValueError, "labels_key"),
        ({"labels_key": "type"}, KeyError, "no column 'type'"),
        ({"min_confidence": 2}, ValueError, "between 0 and 1"),
        ({"k": 1000}, ValueError, "smaller k"),
        ({"layer": "counts"}, KeyError, "counts"),
        ({"method": "finetune", "layer": "counts"}, KeyError, "counts"),
        ({"method": "finetune", "head": "retention", "train": TRAIN}, ValueError, "choose one of"),
        ({"method": "finetune", "train": TRAIN, "split_by": "donor"}, KeyError, "donor"),
    ],
)
def test_wrong_arguments(options, error, match, reference, query, model):
    with pytest.raises(error, match=match):
        scfm.tl.annotate(query, reference, **({"labels_key": "label", "model": model} | options))
    assert "label_predicted" not in query.obs


def test_wrong_references_and_taken_names(reference, query, model):
    with pytest.raises(TypeError, match="CellTypeClassifier"):
        scfm.tl.annotate(query, 3, labels_key="label", model=model)
    reference.obs["n"] = np.arange(60) / 7
    with pytest.raises(TypeError, match="numbers"):
        scfm.tl.annotate(query, reference, labels_key="n", model=model)
    query.obs["label_predicted"] = "mine"
    with pytest.raises(ValueError, match="key_added"):
        scfm.tl.annotate(query, reference, labels_key="label", model=model)
    assert (query.obs["label_predicted"] == "mine").all()
    with pytest.raises(ValueError, match="no cells"):
        scfm.tl.annotate(query[:0].copy(), reference, labels_key="label", model=model)


def test_confusion_matrix(reference, query, model, tmp_path):
    scfm.tl.annotate(query, reference, labels_key="label", model=model)
    axes = scfm.pl.annotation(query, "label", show=False, save=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    matrix, confidence = axes
    assert [text.get_text() for text in matrix.get_yticklabels()] == ["x", "y", "z"]
    assert [text.get_text() for text in matrix.get_xticklabels()] == ["x", "y", "z", "no label"]
    accuracy = (query.obs["label"].astype(str) == query.obs["label_predicted"].astype(str)).mean()
    assert f"accuracy {accuracy:.2f}" in matrix.get_title()
    assert confidence.get_xlabel() == "confidence"
    mpl.pyplot.close("all")
    with pytest.raises(KeyError, match="no column"):
        scfm.pl.annotation(query, "label", "other", show=False)


def test_real_cells_across_chemistries(shared):
    """Cells of one chemistry are labelled with those of the two others."""
    adata = read_h5ad(shared("data", "singlecell", "pbmc_3tech_symphony_1200.h5ad"))
    new = (adata.obs["batch"] == "5p").to_numpy()
    query, reference = adata[new].copy(), adata[~new].copy()
    share = {}
    for method in ("knn", "linear"):
        scfm.tl.annotate(query, reference, labels_key="cell_type", model="scgpt-mini", method=method, key_added=method)
        share[method] = (query.obs[method].astype(str) == query.obs["cell_type"].astype(str)).mean()
    majority = reference.obs["cell_type"].value_counts(normalize=True).iloc[0]
    assert min(share.values()) > 1.5 * majority


@pytest.fixture(scope="module")
def classifier(make_data):
    data = make_data(60)
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *data.var_names], specials=["<pad>", "<cls>", "<eoc>"])
    backbone = from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu")
    scfm.models.CellTypeClassifier.setup_anndata(data, labels_key="label")
    model = scfm.models.CellTypeClassifier(data, checkpoint=backbone, device="cpu")
    model.train(train_size=1.0, **TRAIN)
    return model


def test_a_classifier_looks_where_it_is_told(classifier, query):
    scfm.tl.annotate(query, classifier, key_added="plain")
    query.layers["other"] = query.X[::-1].copy()
    query.var["symbol"] = query.var_names[::-1]
    scfm.tl.annotate(query, classifier, key_added="layer", layer="other")
    scfm.tl.annotate(query, classifier, key_added="genes", gene_symbols="symbol")
    scfm.tl.annotate(query, classifier, key_added="short", max_length=5)
    expected = query.obsm["plain_proba"].to_numpy()
    np.testing.assert_allclose(query.obsm["layer_proba"].to_numpy()[::-1], expected, rtol=1e-4)
    assert not np.allclose(query.obsm["genes_proba"].iloc[:3], expected[:3], atol=1e-6)
    assert not np.allclose(query.obsm["short_proba"].iloc[:3], expected[:3], atol=1e-6)
    assert query.uns["layer"]["params"]["layer"] == "other"
    assert query.uns["short"]["params"]["tokenize_options"] == {"cls_value": 0.0, "max_length": 5}
    np.testing.assert_array_equal(
        classifier.predict(query, layer="other", soft=True), query.obsm["layer_proba"].to_numpy()
    )
    with pytest.raises(KeyError, match="nowhere"):
        scfm.tl.annotate(query, classifier, layer="nowhere")
    with pytest.raises(TypeError, match="nonsense"):
        scfm.tl.annotate(query, classifier, nonsense=3)


def test_a_classifier_that_was_set_up_with_a_layer_can_be_shown_another(classifier, query, make_data):
    data = make_data(30)
    data.layers["counts"] = data.X.copy()
    scfm.models.CellTypeClassifier.setup_anndata(data, labels_key="label", layer="counts")
    model = scfm.models.CellTypeClassifier(data, checkpoint=classifier.backbone, device="cpu")
    with pytest.raises(KeyError, match="'X' for adata.X"):
        model.predict(query)
    query.layers["counts"] = query.X[::-1].copy()
    np.testing.assert_allclose(
        model.predict(query, soft=True, layer="X"), model.predict(query, soft=True)[::-1], rtol=1e-4
    )


@pytest.mark.parametrize(
    "given",
    [
        {"method": "knn"},
        {"model": "scgpt-mini"},
        {"pooling": "mean"},
        {"head": "linear"},
        {"train": {}},
        {"split_by": "batch"},
        {"k": 5},
        {"class_weight": "balanced"},
        {"precision": "bfloat16"},
        {"weights": "gene"},
    ],
)
def test_what_a_trained_classifier_cannot_be_told(given, classifier, query):
    with pytest.raises(ValueError, match=next(iter(given))):
        scfm.tl.annotate(query, classifier, **given)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *(("knn", {name: value}) for name, value in (("class_weight", "balanced"), ("save_model", "x"), ("train", {}))),
        *(("linear", {name: value}) for name, value in (("k", 3), ("head", "linear"), ("split_by", "batch"))),
        *(("finetune", {name: value}) for name, value in (("k", 3), ("class_weight", "x"), ("precision", "bfloat16"))),
        ("finetune", {"pooling": "mean"}),
    ],
)
def test_arguments_of_another_method_are_refused(method, given, reference, query, model):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        scfm.tl.annotate(query, reference, labels_key="label", model=model, method=method, **given)
    assert "label_predicted" not in query.obs


def test_options_of_the_tokenizer_stand_beside_those_of_the_paper(reference, query, model):
    options = {"labels_key": "label", "model": model, "method": "finetune", "train": TRAIN | {"max_epochs": 1}}
    scfm.tl.annotate(query, reference, max_length=20, duplicates="sum", split_by="batch", **options)
    params = query.uns["label_predicted"]["params"]
    assert params["tokenize_options"] == {"cls_value": 0.0, "max_length": 20, "duplicates": "sum"}
    assert params["split_by"] == "batch"


@pytest.mark.parametrize("method", METHODS)
def test_the_record_says_what_was_done(method, reference, query):
    reference.layers["counts"], query.layers["counts"] = reference.X.copy(), query.X.copy()
    for data in (reference, query):
        data.var_names = ["CD3D", "CD3E", "MS4A1", "NKG7", "GNLY", "LYZ", "CD14", "PPBP", *data.var_names[8:]]
    options = {"pooling": "avg-pool"} if method != "finetune" else {"head": "linear", "pooling": "avg-pool"}
    scfm.tl.annotate(
        query,
        reference,
        labels_key="label",
        model="scgpt-mini",
        method=method,
        layer="counts",
        max_length=50,
        **options,
        **trained_with(method),
    )
    record = query.uns["label_predicted"]
    params = record["params"]
    assert (params["layer"], params["model"], params["pooling"]) == ("counts", "scgpt-mini", "avg-pool")
    assert params["tokenize_options"]["max_length"] == 50
    assert record["genes"]["matched"] >= 5
    assert record["checkpoint"]["sha256"] == scfm.load("scgpt-mini").provenance.sha256 != ""


def test_the_starting_checkpoint_is_known_after_training_with_the_head_of_the_paper(reference, query, tmp_path):
    for data in (reference, query):
        data.var_names = ["CD3D", "CD3E", "MS4A1", "NKG7", "GNLY", "LYZ", "CD14", "PPBP", *data.var_names[8:]]
    options = {"labels_key": "label", "model": "scgpt-mini", "method": "finetune"}
    scfm.tl.annotate(query, reference, train=TRAIN, save_model=tmp_path / "model", **options)
    scfm.tl.annotate(query, tmp_path / "model", key_added="again")
    start = scfm.load("scgpt-mini").provenance.sha256
    assert query.uns["label_predicted"]["checkpoint"]["sha256"] == start
    assert query.uns["again"]["checkpoint"]["sha256"] == start


@pytest.mark.parametrize("method", METHODS)
def test_whole_numbers_are_labels(method, reference, query, model, tmp_path):
    numbers = reference.obs["label"].map({"x": 0.0, "y": 1.0, "z": 2.0}).astype(float)
    numbers.iloc[:2] = np.nan
    reference.obs["cluster"] = numbers
    query.obs["cluster"] = query.obs["label"].map({"x": 0, "y": 1, "z": 2}).astype(int)
    scfm.tl.annotate(query, reference, labels_key="cluster", model=model, method=method, **trained_with(method))
    assert query.obs["cluster_predicted"].cat.categories.tolist() == [0, 1, 2]
    assert list(query.obsm["cluster_predicted_proba"].columns) == ["0", "1", "2"]
    known = query.obs["cluster_predicted"].notna()
    np.testing.assert_allclose(query.obsm["cluster_predicted_proba"][known].sum(axis=1), 1, rtol=1e-5)
    scores = scfm.metrics.annotation_scores(query.obs["cluster"], query.obs["cluster_predicted"])
    right = (query.obs["cluster"][known] == query.obs["cluster_predicted"][known].astype(int)).sum()
    assert scores["accuracy"] == pytest.approx(right / query.n_obs)
    axes = scfm.pl.annotation(query, "cluster", show=False)
    assert f"accuracy {scores['accuracy']:.2f}" in axes[0].get_title()
    mpl.pyplot.close("all")
    query.write_h5ad(tmp_path / "query.h5ad")
    assert read_h5ad(tmp_path / "query.h5ad").obs["cluster_predicted"].cat.categories.tolist() == [0, 1, 2]


def test_a_file_or_a_missing_folder_is_no_reference(query, reference, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scfm.tl.annotate(query, tmp_path / "model")
    reference.write_h5ad(tmp_path / "reference.h5ad")
    for name in ("reference.h5ad", "missing.h5ad"):
        with pytest.raises(ValueError, match=r"anndata\.read_h5ad"):
            scfm.tl.annotate(query, str(tmp_path / name), labels_key="label")


def test_weights_that_the_authors_fine_tune(scfoundation, reference, query, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options.get("weights"))
        raise RuntimeError

    monkeypatch.setattr("scfm.models._task.load", load)
    monkeypatch.setattr("scfm.tl._inputs.load", load)
    for given in ({"method": "finetune"}, {"method": "finetune", "weights": "cell"}, {}, {"weights": "rde"}):
        with pytest.raises(RuntimeError):
            scfm.tl.annotate(query, reference, labels_key="label", model="scfoundation", **given)
    for tool in (scfm.tl.enhance, scfm.tl.reconstruct, scfm.benchmark.enhancement):
        for given in ({}, {"weights": "cell"}):
            with pytest.raises(RuntimeError):
                tool(query, "scfoundation", **given)
    with pytest.raises(RuntimeError):
        scfm.benchmark.cells(query, "scfoundation", labels_key="label", batch_key="batch", task="integration")
    assert asked == ["gene", "cell", None, "rde", *["gene", "cell"] * 3, "rde"]
    with pytest.raises(ValueError, match="loaded already"):
        scfm.tl.annotate(query, reference, labels_key="label", model=scfoundation, weights="gene", method="finetune")
