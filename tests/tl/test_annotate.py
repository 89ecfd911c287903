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


@pytest.mark.parametrize("method", METHODS)
def test_labels_confidence_probabilities_and_record(method, reference, query, model):
    scfm.tl.annotate(query, reference, labels_key="label", model=model, method=method, train=TRAIN, key_added="type")
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
        query, reference, labels_key="label", model=model, method=method, train=TRAIN, min_confidence=0.9, copy=True
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
    reference.obs["n"] = np.arange(60.0)
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
