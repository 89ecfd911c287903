"""Gene function over every backbone: vectors, labels, cross-validation, predict, save, load, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.models import GeneClassifier
from scfm.tasks.gene_classifier import class_folds

N_GENES = 60
NAMES = [f"GENE{i}" for i in range(N_GENES)]


@pytest.fixture(scope="module")
def backbone(kind):
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *NAMES[:40]], specials=cls.specials)
    return from_config(
        kind, cls.config_for(dict(TINY[kind]), vocab), vocab, device="cpu", precision="float32", name="tiny"
    )


@pytest.fixture(scope="module")
def vectors():
    values = np.random.default_rng(0).normal(size=(N_GENES, 8)).astype(np.float32)
    return pd.DataFrame(values, index=NAMES)


@pytest.fixture(scope="module")
def labels(vectors):
    return pd.Series(np.where(vectors[0] + vectors[1] > 0, "yes", "no"), index=vectors.index)


@pytest.fixture(scope="module")
def functions(vectors):
    return pd.DataFrame(
        {"up": (vectors[0] > 0).astype(int), "down": (vectors[1] < 0).astype(int), "rare": (vectors[2] > 1).astype(int)}
    )


@pytest.fixture(scope="module")
def trained(vectors, labels):
    model = GeneClassifier(labels=labels, embeddings=vectors, head="linear", device="cpu", seed=0)
    model.train(max_epochs=60)
    return model


def test_vectors_are_those_of_the_model(backbone, labels):
    model = GeneClassifier(backbone, labels, device="cpu")
    assert list(model.genes) == NAMES[:40]
    assert list(model.unknown_genes) == NAMES[40:]
    static = backbone.gene_embeddings().numpy()[backbone.vocab.get_ids(NAMES[:40])]
    np.testing.assert_array_equal(model._table.take(model._rows), static)
    model.train(max_epochs=2)
    table = model.predict_proba(["GENE3", "GENE50", "<pad>"])
    assert table.loc["GENE3"].sum() == pytest.approx(1)
    assert table.loc[["GENE50", "<pad>"]].isna().all(axis=None)
    assert list(model.predict_proba().index) == list(backbone.vocab.genes)


def test_states_in_cells(backbone, labels, make_data):
    adata = make_data(20, n_genes=30)
    model = GeneClassifier(backbone, labels, adata=adata, device="cpu")
    scfm.tl.gene_embeddings(adata, backbone, contextual=True, key_added="m")
    states = adata.varm["m_contextual"]
    finite = np.isfinite(states).all(1)
    assert set(model.genes) == set(adata.var_names[finite])
    order = adata.var_names.get_indexer(model.genes)
    np.testing.assert_allclose(model._table.take(model._rows), states[order], rtol=1e-5, atol=1e-6)
    again = GeneClassifier(labels=labels, adata=adata, use_rep="m_contextual", device="cpu")
    np.testing.assert_allclose(again._table.take(again._rows), states[order], rtol=1e-5, atol=1e-6)


def test_it_learns(trained, labels):
    predicted = trained.predict(labels.index)
    assert (predicted["label"] == labels).mean() > 0.85
    table = trained.predict_proba(labels.index)
    assert list(table.columns) == ["no", "yes"]
    np.testing.assert_allclose(table.max(axis=1), predicted["confidence"])
    assert (table.idxmax(axis=1) == predicted["label"]).all()
    assert list(trained.history.columns) == ["train_loss", "validation_loss"]


def test_functions(vectors, functions):
    model = GeneClassifier(labels=functions, embeddings=vectors, head="linear", device="cpu")
    model.train(max_epochs=80)
    predicted = model.predict(NAMES)
    assert list(predicted.columns) == ["up", "down", "rare"]
    assert (predicted == functions).to_numpy().mean() > 0.85
    strict = model.predict(NAMES, threshold=0.99)
    assert strict.to_numpy().sum() < predicted.to_numpy().sum()
    assert model.predict(["x"]).isna().all(axis=None)
    scores = model.cross_validate(3, max_epochs=40)
    mean = scores.groupby("metric")["value"].mean()
    assert mean["AUPR"] > 0.55
    assert GeneClassifier(labels=functions, embeddings=vectors, device="cpu").style == "go"


def test_cross_validation_tests_on_genes_that_it_has_not_seen(vectors, labels, monkeypatch):
    model = GeneClassifier(labels=labels, embeddings=vectors, device="cpu", head="linear")
    seen = []
    fit = model._fit

    def spy(genes, training, size, seed):
        train, validation = model._divide(genes, size, seed)
        seen.append((set(train), set(validation)))
        return fit(genes, training, size, seed)

    monkeypatch.setattr(model, "_fit", spy)
    table = model.cross_validate(max_epochs=40, validation_size=0.2)
    assert list(table.columns) == ["fold", "n_train", "n_validation", "n_test", "metric", "value"]
    assert set(table["metric"]) == {"accuracy", "macro F1", "AUPR", "AUROC", "Fmax"}
    folds = class_folds((labels == "yes").to_numpy().astype(int))
    for number, (train, validation) in enumerate(seen):
        test = set(np.flatnonzero(folds == number))
        assert not train & validation
        assert train | validation == set(range(N_GENES)) - test
        row = table[table["fold"] == number].iloc[0]
        assert (row["n_train"], row["n_validation"], row["n_test"]) == (len(train), len(validation), len(test))
        for part in (train, validation):
            assert 0 < labels.iloc[sorted(part)].eq("yes").mean() < 1
    assert table.loc[table["metric"] == "accuracy", "value"].mean() > 0.65
    assert not model.is_trained


def test_shuffled_labels_cannot_be_learned(vectors, labels):
    other = pd.Series(np.random.default_rng(3).permutation(labels), index=labels.index)
    table = GeneClassifier(labels=other, embeddings=vectors, device="cpu", head="linear").cross_validate(max_epochs=40)
    assert table.loc[table["metric"] == "AUROC", "value"].mean() < 0.7


def test_own_folds(vectors, labels):
    folds = pd.Series(np.arange(N_GENES) % 3 - 1, index=labels.index)
    table = GeneClassifier(labels=labels, embeddings=vectors, device="cpu").cross_validate(folds=folds, max_epochs=1)
    assert set(table["fold"]) == {0, 1}
    assert (table["n_test"] == N_GENES // 3).all()


def test_the_same_seed_gives_the_same(vectors, labels):
    tables = [
        GeneClassifier(labels=labels, embeddings=vectors, device="cpu", seed=seed).cross_validate(max_epochs=2)
        for seed in (0, 0, 1)
    ]
    pd.testing.assert_frame_equal(*tables[:2])
    assert not tables[0].equals(tables[2])


def test_order_of_labels_does_not_change_what_a_gene_is(vectors, labels):
    one, other = (
        GeneClassifier(labels=given, embeddings=table, device="cpu")
        for given, table in ((labels, vectors), (labels[::-1], vectors.iloc[::-1]))
    )
    assert list(one.genes) == list(other.genes)[::-1]
    np.testing.assert_array_equal(one._codes, other._codes[::-1])
    np.testing.assert_array_equal(one._table.take(one._rows), other._table.take(other._rows)[::-1])


def test_genes_by_ensembl_id_and_alias(vectors, make_data):
    adata = make_data(10, n_genes=3)
    adata.var["ensembl_id"] = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
    adata.varm["v"] = vectors.to_numpy()[:3]
    labels = pd.Series(["a", "b", "b"], index=["ENSG00000000002.4", "GENE0", "GENE2"])
    model = GeneClassifier(labels=labels, adata=adata, use_rep="v", device="cpu")
    np.testing.assert_array_equal(model._table.take(model._rows), vectors.to_numpy()[[1, 0, 2]])
    twice = pd.Series(["a", "b", "a", None], index=["ENSG00000000001", "GENE1", "GENE0", "GENE2"])
    assert list(GeneClassifier(labels=twice, adata=adata, use_rep="v", device="cpu").genes) == [
        "ENSG00000000001",
        "GENE1",
    ]
    with pytest.raises(ValueError, match="another label under another name: GENE0"):
        GeneClassifier(
            labels=twice.replace({"GENE0": "b"}).set_axis(twice.index).where(twice.index != "GENE0", "b"),
            adata=adata,
            use_rep="v",
        )


def test_unknown_genes_are_said(vectors, labels, capsys):
    GeneClassifier(labels=pd.concat([labels, pd.Series(["yes"], index=["nobody"])]), embeddings=vectors)
    said = capsys.readouterr().err
    assert "1 labelled genes have no vector and are left out: nobody" in said


def test_ids_without_a_table_of_ids_say_what_is_missing():
    labels = pd.Series(["a", "b"] * 4, index=[f"ENSG{i:011d}" for i in range(8)])
    with pytest.raises(ValueError, match="give aliases="):
        GeneClassifier("scgpt-mini", labels)


@pytest.mark.parametrize("several", [False, True])
def test_save_and_load(vectors, labels, functions, several, tmp_path):
    model = GeneClassifier(
        labels=functions if several else labels, embeddings=vectors, device="cpu", hidden=16, standardize=True
    )
    model.train(max_epochs=3)
    model.save(tmp_path / "model")
    assert {file.suffix for file in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    again = GeneClassifier.load(tmp_path / "model", device="cpu")
    pd.testing.assert_frame_equal(again.predict_proba(), model.predict_proba())
    pd.testing.assert_frame_equal(again.predict(["GENE1", "x"]), model.predict(["GENE1", "x"]))
    pd.testing.assert_frame_equal(again.cross_validate(max_epochs=1), model.cross_validate(max_epochs=1))
    assert repr(again) == repr(model)
    assert again.is_trained
    with pytest.raises(FileExistsError):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        GeneClassifier.load(tmp_path / "model")
    with pytest.raises(ValueError, match="no GeneClassifier"):
        GeneClassifier.load(tmp_path)


def test_untrained_models_say_so(vectors, labels, capsys):
    GeneClassifier(labels=labels, embeddings=vectors).predict(["GENE1"])
    assert "not trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda labels: labels.to_dict(), {}, TypeError, "Series or DataFrame"),
        (lambda labels: labels.where(labels == "yes"), {}, ValueError, "1 classes"),
        (
            lambda labels: labels.set_axis([f"x{i}" for i in range(len(labels))]),
            {},
            ValueError,
            "none of the labelled genes",
        ),
        (lambda labels: pd.concat([labels, labels.map({"yes": "no", "no": "yes"})]), {}, ValueError, "contradict"),
        (lambda labels: pd.concat([labels, pd.Series(["third"], index=["x"])]), {}, ValueError, "third"),
        (lambda labels: pd.DataFrame({"a": 2, "b": 1}, index=labels.index), {}, ValueError, "0 and 1"),
        (lambda labels: labels, {"head": "tree"}, ValueError, "'linear'"),
        (lambda labels: labels, {"model": "scgpt-mini"}, ValueError, "one source"),
        (lambda labels: labels, {"embeddings": None}, ValueError, "none"),
        (lambda labels: labels, {"embeddings": None, "use_rep": "X"}, KeyError, "'X'"),
    ],
)
def test_wrong_arguments(vectors, labels, change, options, error, message):
    with pytest.raises(error, match=message):
        GeneClassifier(labels=change(labels), **{"embeddings": vectors} | options)


def test_wrong_training(vectors, labels):
    model = GeneClassifier(labels=labels, embeddings=vectors)
    with pytest.raises(ValueError, match="max_epochs"):
        model.train(max_epochs=0)
    with pytest.raises(ValueError, match="validation_size"):
        model.train(validation_size=1)
    with pytest.raises(ValueError, match="too few for 40 folds"):
        model.cross_validate(40)
    with pytest.raises(ValueError, match="does not name GENE1"):
        model.cross_validate(folds=pd.Series([0], index=["GENE0"]))
