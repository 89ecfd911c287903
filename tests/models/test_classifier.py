"""The cell-type classifier over every backbone: set up, train, predict, save, load, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.models import CellTypeClassifier

RUN = {"accelerator": "cpu", "enable_progress_bar": False}


def backbone_of(kind, tiny, adata):
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *adata.var_names], specials=cls.specials)
    return from_config(kind, cls.config_for(dict(tiny[kind]), vocab), vocab, device="cpu", precision="float32")


def fresh(kind, tiny, adata, **options):
    CellTypeClassifier.setup_anndata(adata, labels_key="label", batch_key="batch")
    return CellTypeClassifier(adata, checkpoint=backbone_of(kind, tiny, adata), device="cpu", seed=1, **options)


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data(60)


@pytest.fixture(scope="module")
def trained(kind, tiny, adata):
    model = fresh(kind, tiny, adata)
    model.train(max_epochs=30, batch_size=12, min_cells=1, lr=3e-3, seed=0, **RUN)
    return model


def test_training_learns_and_holds_out_whole_batches(trained, adata):
    batches = adata.obs["batch"].to_numpy()
    assert set(batches[trained.train_indices]).isdisjoint(batches[trained.validation_indices])
    assert trained.is_trained
    assert {"train_loss_epoch", "validation_loss", "accuracy_train", "accuracy_validation"} <= set(trained.history)
    predicted = trained.predict()
    assert predicted.shape == (adata.n_obs,)
    usable = np.arange(adata.n_obs) != 3
    assert pd.isna(predicted[3]), "a cell without counts has no label"
    assert (predicted == adata.obs["label"].to_numpy())[usable].mean() > 0.6


def test_probabilities_belong_to_labels(trained, adata):
    table = trained.predict(soft=True)
    assert list(table.columns) == ["x", "y", "z"]
    assert list(table.index) == list(adata.obs_names)
    known = table.notna().all(axis=1)
    np.testing.assert_allclose(table[known].sum(1), 1, rtol=1e-5)
    assert (table[known].idxmax(axis=1) == trained.predict()[known]).all()
    rejected = trained.predict(min_confidence=0.999999)
    assert pd.isna(rejected).sum() > pd.isna(trained.predict()).sum()


def test_other_cells_need_no_setup_no_labels_and_no_order(trained, adata, tmp_path):
    expected = trained.predict(soft=True).to_numpy()
    query = adata[::-1, ::-1].copy()
    query.obs = query.obs[[]]
    np.testing.assert_allclose(trained.predict(query, soft=True).to_numpy()[::-1], expected, rtol=2e-4, atol=1e-5)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for data in (backed, tmp_path / "cells.h5ad"):
        np.testing.assert_allclose(trained.predict(data, soft=True).to_numpy(), expected, rtol=2e-4, atol=1e-5)
    part = trained.predict(adata, indices=[5, 2], soft=True)
    assert list(part.index) == ["cell5", "cell2"]
    np.testing.assert_allclose(part.to_numpy(), expected[[5, 2]], rtol=2e-4, atol=1e-5)


def test_save_and_load(trained, adata, tmp_path):
    trained.save(tmp_path / "model")
    loaded = CellTypeClassifier.load(tmp_path / "model", adata, accelerator="cpu")
    np.testing.assert_array_equal(loaded.predict(soft=True), trained.predict(soft=True))
    alone = CellTypeClassifier.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(alone.predict(adata, soft=True), trained.predict(soft=True))
    with pytest.raises(ValueError, match="without data"):
        alone.predict()
    assert loaded.learner.style == trained.learner.style
    assert loaded.summary_string.startswith("CellTypeClassifier")
    backbone = scfm.load(tmp_path / "model", device="cpu")
    assert backbone.kind == trained.backbone.kind


def test_damage_to_the_head_is_noticed(kind, tiny, adata, tmp_path):
    model = fresh(kind, tiny, adata, head="linear")
    model.save(tmp_path / "model")
    file = tmp_path / "model" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        CellTypeClassifier.load(tmp_path / "model", adata)


def test_query_data_go_on_with_the_same_classes(trained, make_data):
    query = make_data(30, seed=5)
    query.obs["label"] = "x"
    model = CellTypeClassifier.load_query_data(query, trained)
    assert list(model.classes) == list(trained.classes)
    np.testing.assert_array_equal(model.predict(soft=True), trained.predict(query, soft=True))


def test_the_same_seed_gives_the_same_model(kind, tiny, make_data):
    def run():
        model = fresh(kind, tiny, make_data(30))
        model.train(max_epochs=2, batch_size=8, min_cells=1, seed=3, **RUN)
        return model.predict(soft=True)

    np.testing.assert_array_equal(run(), run())


def test_adapters_and_a_frozen_backbone_train_the_head_beside_them(kind, tiny, adata):
    for options, training in (({"lora": 2}, {}), ({}, {"freeze": "backbone"})):
        model = fresh(kind, tiny, adata, **options)
        names = dict(model.learner.named_parameters())
        before = {name: p.detach().clone() for name, p in names.items()}
        model.train(max_epochs=1, batch_size=12, min_cells=1, **training, **RUN)
        changed = {name for name, p in names.items() if not np.array_equal(p.detach(), before[name])}
        assert any(model.learner.is_head(name) for name in changed)
        assert all(model.learner.is_head(name) or ".lora_" in name for name in changed)


# -- what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one(tiny):
    return lambda adata, **options: fresh("scgpt", tiny, adata, **options)


def test_wrong_columns_and_labels(make_data):
    adata = make_data(12)
    with pytest.raises(KeyError, match="no column 'type'"):
        CellTypeClassifier.setup_anndata(adata, labels_key="type")
    assert list(adata.obs) == ["batch", "label"]
    adata.obs["label"] = "only"
    with pytest.raises(ValueError, match="fewer than two labels"):
        CellTypeClassifier.setup_anndata(adata, labels_key="label")


def test_rare_classes_are_left_out_and_never_predicted(one, make_data, caplog):
    adata = make_data(40)
    adata.obs.loc[adata.obs_names[:2], "label"] = "rare"
    model = one(adata)
    model.train(max_epochs=1, train_size=1.0, min_cells=3, **RUN)
    assert "rare (2)" in caplog.text
    assert "rare" not in model.predict()
    assert (model.predict(soft=True)["rare"].dropna() == 0).all()
    with pytest.raises(ValueError, match="smaller min_cells"):
        model.train(max_epochs=1, min_cells=1000, **RUN)


def test_missing_labels_are_not_trained_on(one, make_data):
    adata = make_data(40)
    adata.obs["label"] = adata.obs["label"].astype(object)
    adata.obs.iloc[:10, 1] = np.nan
    model = one(adata)
    model.train(max_epochs=1, **RUN)
    assert set(range(10)).isdisjoint(model.train_indices)
    assert set(range(10)).isdisjoint(model.validation_indices)
    assert len(model.predict()) == 40


def test_random_cells_to_validate_on_are_said_to_be_too_good(make_data, tiny, caplog):
    adata = make_data(40)
    CellTypeClassifier.setup_anndata(adata, labels_key="label")
    model = CellTypeClassifier(adata, checkpoint=backbone_of("scgpt", tiny, adata))
    model.train(max_epochs=1, **RUN)
    assert "split_by=" in caplog.text
    with pytest.raises(KeyError, match="donor"):
        model.train(max_epochs=1, split_by="donor", **RUN)


def test_class_weights_have_to_name_the_classes(one, make_data):
    model = one(make_data(40))
    with pytest.raises(KeyError, match="each class"):
        model.train(max_epochs=1, class_weights={"x": 1.0}, **RUN)
    model.train(max_epochs=1, class_weights={"x": 1.0, "y": 2.0, "z": 3.0}, **RUN)
    np.testing.assert_array_equal(model.learner.weights, [1, 2, 3])


def test_data_without_known_genes_or_layer(one, make_data):
    model = one(make_data(40))
    strange = make_data(5)
    strange.var_names = [f"OTHER{i}" for i in range(strange.n_vars)]
    with pytest.raises(ValueError, match="none of"):
        model.predict(strange)


@pytest.mark.parametrize("kind", ["cellfm"])
def test_classes_are_learned_along_with_hidden_genes(kind, tiny, adata, tmp_path):
    model = fresh(kind, tiny, adata, hide={"mask_ratio": 0.3})
    assert model.learner.style == "mlp"
    assert model.learner.hide == {"mask_ratio": 0.3, "similarity": 0.8}
    model.train(max_epochs=30, batch_size=12, min_cells=1, lr=3e-3, freeze=False, seed=0, **RUN)
    assert {"hidden_train", "hidden_validation", "classes_train"} <= set(model.history)
    losses = model.history["hidden_train"].to_numpy().ravel()
    assert losses[-5:].mean() < losses[:5].mean()
    usable = np.arange(adata.n_obs) != 3
    predicted = model.predict()
    assert (predicted == adata.obs["label"].to_numpy())[usable].mean() > 0.6
    model.save(tmp_path / "model")
    again = CellTypeClassifier.load(tmp_path / "model", adata, accelerator="cpu")
    assert again.learner.hide == model.learner.hide
    np.testing.assert_array_equal(again.predict()[usable], predicted[usable])


@pytest.mark.parametrize(("kind", "head"), [("cellfm", "retention"), ("cellfm", "linear"), ("scgpt", None)])
def test_hidden_genes_need_a_head_for_it(kind, head, tiny, adata):
    with pytest.raises(ValueError, match="hide= needs a head"):
        fresh(kind, tiny, adata, head=head, hide=True)


@pytest.mark.parametrize("kind", ["scfoundation", "scgpt"])
def test_the_epoch_with_the_best_f1_counts_where_the_paper_says_so(kind, tiny, make_data, monkeypatch):
    from scfm.metrics import annotation_scores

    adata = make_data(60)
    model = fresh(kind, tiny, adata)
    model.train(max_epochs=8, batch_size=12, min_cells=1, lr=3e-3, seed=0, **RUN)
    history = model.history["macro F1_validation"].iloc[:, 0]
    held_out = model.validation_indices
    held_out = held_out[held_out != 3]
    scores = annotation_scores(adata.obs["label"].to_numpy()[held_out], model.predict()[held_out])
    if kind == "scfoundation":
        assert model.recipe.monitor == "macro F1"
        assert scores["macro F1"] == pytest.approx(history.max())
    else:
        assert model.recipe.monitor == "loss"
        best = model.history["validation_loss"].iloc[:, 0].to_numpy().argmin()
        assert scores["macro F1"] == pytest.approx(history.iloc[best])
        with pytest.raises(ValueError, match="monitor"):
            model.train(max_epochs=1, monitor="AUROC", **RUN)


def test_the_first_of_the_best_is_put_back():
    from types import SimpleNamespace

    import torch

    from scfm.models._training import KeepBest

    for mode, epochs, best in (("max", [0.2, 0.7, 0.7, 0.5], 1), ("min", [0.6, 0.3, 0.4], 1)):
        keep, plan = KeepBest("score", mode), SimpleNamespace(module=torch.nn.Linear(1, 1))
        for epoch, score in enumerate(epochs):
            torch.nn.init.constant_(plan.module.weight, epoch)
            trainer = SimpleNamespace(callback_metrics={"score": score}, sanity_checking=False, current_epoch=epoch)
            keep.on_validation_end(trainer, plan)
        keep.on_train_end(trainer, plan)
        assert plan.module.weight.item() == keep.epoch == best


def test_mixed_precision_has_its_own_epsilon(one, make_data, monkeypatch):
    used = []

    def fit(model, make_plan, *_, **options):
        used.append((make_plan.args[1].eps, options["precision"]))

    monkeypatch.setattr("scfm.models._task.fit", fit)
    model = one(make_data(30))
    for options in ({}, {"precision": "16-mixed"}, {"precision": "16-mixed", "optimization": "cellfm-tutorials"}):
        model.train(max_epochs=1, min_cells=1, **options, **RUN)
    assert used[:2] == [(1e-8, "32-true"), (1e-4, "16-mixed")]
    assert used[2] == (scfm.train.Optimization.from_dict({"preset": "cellfm-tutorials"}).eps, "16-mixed")


def test_annotation_of_scgpt_sees_all_chosen_genes(one, make_data):
    model = one(make_data(30))
    assert model.learner.tokenize == {"cls_value": 0.0, "max_length": 3001}
    assert one(make_data(30), tokenize={"max_length": 7}).learner.tokenize == {"cls_value": 0.0, "max_length": 7}
    assert one(make_data(30), head="linear").learner.tokenize == {}


def test_numbers_are_the_same_classes_with_and_without_missing_ones(one, make_data):
    adata = make_data(40)
    adata.obs["label"] = adata.obs["label"].map({"x": 0.0, "y": 1.0, "z": 2.0})
    adata.obs.iloc[5, 1] = np.nan
    model = one(adata)
    assert list(model.classes) == ["0", "1", "2"]
    model.train(max_epochs=1, min_cells=1, **RUN)
    assert 5 not in model.train_indices
    query = make_data(30)
    query.obs["label"] = query.obs["label"].map({"x": 0, "y": 1, "z": 2})
    again = CellTypeClassifier.load_query_data(query, model)
    again.train(max_epochs=1, min_cells=1, **RUN)
    assert len(again.train_indices) > 0


def test_columns_of_other_libraries_are_not_offered(one, make_data):
    model = one(make_data(30))
    with pytest.raises(KeyError, match="batch, label") as error:
        model.train(max_epochs=1, split_by="zzz", **RUN)
    assert "_scvi" not in str(error.value)
