"""What users do with a model class, for each installed backbone."""

from __future__ import annotations

import pickle
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

import scfm
from scfm.backbones import random_copy
from scfm.models import SCGPT, SCFoundation, model_class
from scfm.models._backbone import load_backbone

RUN = {"accelerator": "cpu", "batch_size": 16, "enable_progress_bar": False}


def fresh(kind, tiny, adata, *, seed=0, **setup):
    cls = model_class(kind)
    cls.setup_anndata(adata, **setup)
    return cls(adata, config=tiny[kind], seed=seed, device="cpu")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.backbone.module.state_dict().items()}


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data()


@pytest.fixture(scope="module")
def trained(kind, tiny, adata):
    """A model after two epochs, and its weights before."""
    model = fresh(kind, tiny, adata, batch_key="batch", labels_key="label")
    before = weights(model)
    model.train(max_epochs=2, lr=1e-2, seed=1, **RUN)
    return model, before


# -- training ----------------------------------------------------------------------------------------------------------


def test_two_epochs_of_training(trained, adata):
    model, before = trained
    assert model.is_trained
    assert not model.backbone.module.training
    assert not any(p.requires_grad for p in model.backbone.module.parameters())
    after = weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("train_loss_epoch", "validation_loss"):
        table = model.history[name]
        assert isinstance(table, pd.DataFrame)
        assert table.index.name == "epoch"
        assert np.isfinite(table[name].to_numpy()).all()
        assert len(table) == 2
    assert model.history["train_loss_step"].index.name == "step"
    assert model.history["train_loss_epoch"].iloc[1, 0] < model.history["train_loss_epoch"].iloc[0, 0]
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(adata.n_obs))
    assert [len(part) for part in parts] == [45, 5, 0]


def test_the_same_seed_gives_the_same_weights(kind, tiny, make_data, monkeypatch):
    results = {}
    for name, seed in (("one", 3), ("settings", None), ("other", 4)):
        monkeypatch.setattr(scvi.settings, "_seed", 3 if seed is None else 5)
        torch.manual_seed(len(name))  # the global state must not matter
        model = fresh(kind, tiny, make_data())
        model.train(max_epochs=1, seed=seed, **RUN)
        results[name] = weights(model)
    assert all(torch.equal(tensor, results["settings"][name]) for name, tensor in results["one"].items())
    assert not all(torch.equal(tensor, results["other"][name]) for name, tensor in results["one"].items())
    one, same, other = (fresh(kind, tiny, make_data(), seed=seed) for seed in (None, 5, 6))
    assert all(torch.equal(tensor, weights(same)[name]) for name, tensor in weights(one).items())
    assert not all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_steps_early_stopping_and_a_second_run(kind, tiny, make_data):
    model = fresh(kind, tiny, make_data())
    model.train(max_steps=4, log_every_n_steps=1, **RUN)
    assert model.trainer.global_step == 4
    assert model.history["train_loss_step"].index.tolist() == [1, 2, 3, 4]
    model.train(max_epochs=20, early_stopping=True, early_stopping_patience=1, lr=1e-12, log_every_n_steps=1, **RUN)
    epochs = model.history["train_loss_epoch"].index
    assert len(epochs) < 12, "a loss that does not fall has to stop the run"
    assert epochs.is_unique
    assert epochs.is_monotonic_increasing
    assert model.history["train_loss_step"].index.is_monotonic_increasing
    with pytest.raises(ValueError, match="held-out cells"):
        model.train(max_epochs=1, train_size=1.0, early_stopping=True, **RUN)
    with pytest.raises(ValueError, match="fit together"):
        model.train(max_epochs=1, train_size=0.9, validation_size=0.5, **RUN)


def test_processes_take_turns_with_the_batches_of_one(adata, kind, tiny, monkeypatch):
    from scfm.engine import InputCheck
    from scfm.models._batches import CellBatches
    from scfm.train import PretrainingPlan

    model = fresh(kind, tiny, adata)
    with model._cells(adata) as task:
        plan = PretrainingPlan(model.backbone, genes=task.match, seed=2)
        check = InputCheck(model.backbone, task.source, task.match, {})

        def batches(rank, world):
            monkeypatch.setattr(CellBatches, "_world", lambda _: (rank, world))
            data = CellBatches(task.source, np.arange(40), 6, "training", seed=plan.seed, check=check)
            data.plan = plan
            epochs = [list(data) for _ in range(2)]
            assert all(len(epoch) == len(data) for epoch in epochs)
            return {b.number: b.cells.flat_ids for epoch in epochs for b in epoch if len(b)}

        alone = batches(0, 1)
        assert sorted(alone) == list(range(14))
        shared = batches(0, 2) | batches(1, 2)
        assert sorted(shared) == sorted(alone)
        assert all(torch.equal(ids, shared[number]) for number, ids in alone.items())


def test_frozen_weights_stay_and_adapters_alone_are_trained(kind, tiny, make_data):
    model = fresh(kind, tiny, make_data())
    before = weights(model)
    model.train(max_epochs=1, lr=1e-2, freeze=0, **RUN)
    after = weights(model)
    frozen = [name for name in before if any(name.startswith(f"{part}.") for part in model.backbone.layer_stacks)]
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert frozen
    assert not {name for name in moved if "calls_since_redraw" not in name} & set(frozen)
    assert moved

    pytest.importorskip("peft")
    scfm.train.add_lora(model.backbone, rank=2)
    untuned = model.get_latent_representation()
    model.train(max_epochs=1, lr=1e-1, **RUN)
    tuned = model.get_latent_representation()
    assert np.nanmax(np.abs(tuned - untuned)) > 1e-4
    state = weights(model)
    assert all(torch.equal(after[name], state.get(name, state.get(_inside(name)))) for name in after if _counts(name))
    scfm.train.merge_lora(model.backbone)
    np.testing.assert_allclose(model.get_latent_representation(), tuned, atol=1e-4)


def _inside(name):
    head, _, tail = name.rpartition(".")
    return f"{head}.base_layer.{tail}"


def _counts(name):
    return "calls_since_redraw" not in name


# -- getters -----------------------------------------------------------------------------------------------------------


def test_cell_embeddings_are_those_of_tl_embed_in_the_order_of_the_cells(trained, adata):
    model, _ = trained
    z = model.get_latent_representation()
    assert z.dtype == np.float32
    assert z.shape == (adata.n_obs, model.backbone.embedding_dim())
    assert np.flatnonzero(np.isnan(z).any(1)).tolist() == [3]
    copy = adata.copy()
    scfm.tl.embed(copy, model.backbone, key_added="X")
    np.testing.assert_array_equal(z, copy.obsm["X"])
    chosen = [7, 2, 2, 30]
    np.testing.assert_allclose(model.get_latent_representation(indices=chosen, batch_size=3), z[chosen], atol=1e-5)
    mask = adata.obs["label"].to_numpy() == "y"
    np.testing.assert_allclose(model.get_latent_representation(indices=mask), z[mask], atol=1e-5)
    assert model.get_latent_representation(indices=[]).shape == (0, z.shape[1])
    other = model.backbone.poolings[-1]
    assert model.get_latent_representation(pooling=other).shape[0] == adata.n_obs
    with pytest.raises(ValueError, match="no pooling"):
        model.get_latent_representation(pooling="sum of all")
    with pytest.raises(TypeError, match="no option"):
        model.get_latent_representation(temperature=1)


def test_gene_embeddings(trained, adata):
    model, _ = trained
    table = model.get_gene_representation()
    assert table.index.equals(adata.var_names)
    row = model.backbone.gene_embeddings()[model.backbone.vocab["GENE7"]]
    np.testing.assert_array_equal(table.loc["GENE7"], row)
    groups = model.get_gene_representation(groupby="label", groups=["y", "x"])
    assert list(groups) == ["y", "x"]
    copy = adata.copy()
    scfm.tl.gene_embeddings(copy, model.backbone, groupby="label", key_added="g")
    np.testing.assert_allclose(groups["y"], copy.varm["g_y"], atol=1e-5)
    some = model.get_gene_representation(contextual=True, genes=["GENE2"], indices=np.arange(10))
    assert some.notna().any(axis=1).to_numpy().nonzero()[0].tolist() == [2]
    with pytest.raises(KeyError, match="no column"):
        model.get_gene_representation(groupby="sex")
    with pytest.raises(KeyError, match="no group w"):
        model.get_gene_representation(groupby="label", groups=["w"])
    with pytest.raises(ValueError, match="static ones"):
        model.get_gene_representation(contextual=False, genes=["GENE2"])


def test_reconstruction(trained, adata):
    model, _ = trained
    expressed = model.get_reconstruction()
    assert sparse.issparse(expressed)
    np.testing.assert_array_equal(expressed.toarray() != 0, adata.X.toarray() != 0)
    with pytest.raises(ValueError, match="'expressed', 'all'"):
        model.get_reconstruction(genes="some")
    try:
        some = model.get_reconstruction(genes=["GENE9", "GENE4"], indices=[5, 3, 1])
    except scfm.UnsupportedError:
        assert model.kind not in ("scgpt", "scfoundation")
        return
    assert some.index.tolist() == ["cell5", "cell3", "cell1"]
    assert some.columns.tolist() == ["GENE9", "GENE4"]
    assert some.isna().all(axis=1).tolist() == [False, True, False]
    whole = model.get_reconstruction(genes="all")
    assert whole.shape == adata.shape
    np.testing.assert_allclose(whole.loc[some.index, some.columns], some, atol=1e-5)


def test_the_module_is_one_of_scvi_tools(trained):
    model, _ = trained
    assert isinstance(model.module, scvi.module.base.BaseModuleClass)
    assert isinstance(model, scvi.model.base.BaseModelClass)
    assert model.device == torch.device("cpu")
    model.to_device("cpu")
    assert model.backbone.device == model.device
    tokens = model.backbone.tokenize_for_training(
        model.adata.X[:3], model.adata.var_names.to_numpy(), torch.Generator().manual_seed(0)
    )
    outputs, _, loss = model.module({"tokens": tokens})
    np.testing.assert_allclose(outputs["z"].numpy(), model.backbone.embed(tokens).numpy(), atol=1e-6)
    assert torch.isfinite(loss.loss)


def test_repr_says_what_the_model_is(trained, capsys):
    model, _ = trained
    assert repr(model) == ""  # as in scvi-tools, which prints it
    text = capsys.readouterr().out
    assert type(model).__name__ in text
    assert "Training status: Trained" in text
    model.view_anndata_setup()
    assert "genes State Registry" in capsys.readouterr().out


def test_the_setup_is_shown_for_names_with_dots(capsys, tmp_path):
    names = ["CD3D", "CD79A", "AL669831.5", "HLA.DRA"]
    adata = anndata.AnnData(
        sparse.csr_matrix(np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]), var=pd.DataFrame(index=names)
    )
    scfm.models.SCGPT.setup_anndata(adata)
    model = scfm.models.SCGPT(adata, checkpoint="scgpt-mini", device="cpu")
    model.save(tmp_path / "model", save_anndata=True)
    for one in (model, scfm.models.SCGPT.load(tmp_path / "model", accelerator="cpu")):
        one.view_anndata_setup()
        assert "genes State Registry" in capsys.readouterr().out
        assert one.adata_manager.summary_stats.n_vars == 4


# -- inputs ------------------------------------------------------------------------------------------------------------


def test_storage_changes_nothing(trained, adata, tmp_path, kind, tiny):
    model, _ = trained
    z = model.get_latent_representation()
    dense, columns = adata.copy(), adata.copy()
    dense.X = adata.X.toarray()
    columns.X = adata.X.tocsc()
    layer = adata.copy()
    adata.copy().write_h5ad(tmp_path / "data.h5ad")
    backed = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    for data in (dense, columns, layer, backed):
        np.testing.assert_allclose(model.get_latent_representation(data), z, atol=1e-5)
    assert backed.isbacked
    with pytest.raises(ValueError, match="view of a backed"):
        model.get_latent_representation(backed[:5])
    losses = []
    for data in (dense, backed):
        other = fresh(kind, tiny, data, seed=1)
        other.train(max_epochs=1, seed=1, **RUN)
        losses.append(other.history["validation_loss"].iloc[0, 0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    other.save(tmp_path / "model", save_anndata=True)
    assert backed.filename == tmp_path / "data.h5ad"
    np.testing.assert_allclose(
        type(model).load(tmp_path / "model", accelerator="cpu").get_latent_representation(),
        other.get_latent_representation(),
        atol=1e-5,
    )


def test_views_are_copied_by_getters_and_refused_by_setup(trained, adata, kind):
    model, _ = trained
    z = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(adata[10:20]), z[10:20], atol=1e-5)
    with pytest.raises(ValueError, match="adata.copy"):
        model_class(kind).setup_anndata(adata[:10])


def test_data_without_setup_are_refused(kind, tiny, make_data):
    cls, data = model_class(kind), make_data()
    with pytest.raises(ValueError, match=f"{cls.__name__}.setup_anndata"):
        cls(data, config=tiny[kind])
    cls.setup_anndata(data)
    with pytest.raises(ValueError, match="make a copy"):
        cls(data.copy(), config=tiny[kind])
    with pytest.raises(ValueError, match="must be provided"):
        cls(config=tiny[kind])
    with pytest.raises(KeyError, match="no layer 'raw'"):
        cls.setup_anndata(data, layer="raw")
    with pytest.raises(KeyError, match="symbols"):
        cls.setup_anndata(data, gene_symbols="symbols")
    with pytest.raises(KeyError, match="donor"):
        cls.setup_anndata(data, batch_key="donor")


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_impossible_values_are_refused(kind, make_data, value):
    data = make_data()
    data.X.data[5] = value
    with pytest.raises(ValueError, match="adata.X does not hold counts"):
        model_class(kind).setup_anndata(data)


def test_fractions_warn_and_are_refused_where_counts_are_needed(kind, tiny, make_data):
    data = make_data()
    data.X.data += 0.25
    with pytest.warns(UserWarning, match="does not hold counts"):
        model_class(kind).setup_anndata(data)
    model = model_class(kind)(data, config=tiny[kind], device="cpu")
    if model.backbone.expected_values({}) == "counts":
        with pytest.raises(ValueError, match=r"adata.X does not hold what"):
            model.train(max_epochs=1, **RUN)
    else:
        model.train(max_epochs=1, **RUN)
        assert model.is_trained


def test_a_network_with_fresh_weights_says_so(kind, tiny, make_data):
    model = fresh(kind, tiny, make_data())
    with pytest.warns(UserWarning, match="not trained yet"):
        model.get_latent_representation()


# -- saving ------------------------------------------------------------------------------------------------------------


def test_save_and_load(trained, adata, tmp_path, monkeypatch, capsys):
    model, _ = trained
    z = model.get_latent_representation()
    model.save(tmp_path / "model")
    with pytest.raises(FileExistsError):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True, save_anndata=True)

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    loaded = type(model).load(tmp_path / "model", accelerator="cpu")
    monkeypatch.undo()
    np.testing.assert_array_equal(loaded.get_latent_representation(), z)
    assert loaded.is_trained
    assert loaded.adata is not adata
    assert dict(loaded.adata_manager.data_registry.batch) == {"attr_name": "obs", "attr_key": "_scvi_batch"}
    assert loaded.init_params_ == model.init_params_
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)
    for name, table in model.history.items():
        pd.testing.assert_frame_equal(loaded.history[name], table)
    assert not [file for file in (tmp_path / "model").rglob("*") if file.suffix in (".pt", ".pkl")]

    np.testing.assert_array_equal(type(model).load(tmp_path / "model", adata, "cpu").get_latent_representation(), z)
    again = adata.copy()
    scfm.tl.embed(again, scfm.load(tmp_path / "model", device="cpu"), key_added="X")
    np.testing.assert_array_equal(again.obsm["X"], z)
    type(model).view_setup_args(tmp_path / "model")
    assert "'batch_key': 'batch'" in capsys.readouterr().out
    assert type(model).load_registry(tmp_path / "model")["model_name"] == type(model).__name__
    loaded.train(max_epochs=1, **RUN)
    assert len(loaded.history["train_loss_epoch"]) == 3


def test_load_without_data_and_with_a_prefix(trained, adata, tmp_path):
    model, _ = trained
    model.save(tmp_path, prefix="first_")
    with pytest.warns(UserWarning, match="loaded without"):
        loaded = type(model).load(tmp_path, prefix="first_", accelerator="cpu")
    assert loaded.adata is None
    with pytest.raises(ValueError, match="give adata="):
        loaded.get_latent_representation()
    np.testing.assert_array_equal(loaded.get_latent_representation(adata.copy()), model.get_latent_representation())
    assert type(model).load(tmp_path, adata=False, prefix="first_", accelerator="cpu").adata is None
    with pytest.raises(ValueError, match="no data"):
        type(model).load(tmp_path, adata=False, prefix="first_").save(tmp_path / "other", save_anndata=True)


def test_other_classes_and_folders_are_refused(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model")
    other = SCFoundation if model.kind == "scgpt" else SCGPT
    with pytest.raises(ValueError, match="different class"):
        other.load(tmp_path / "model")
    with pytest.raises(ValueError, match="no model that scfm saved"):
        type(model).load(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="something else"):
        model.save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_failed_save_leaves_nothing_and_keeps_the_old_model(trained, tmp_path, monkeypatch):
    model, _ = trained
    model.save(tmp_path / "old")
    files = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("scfm.models._saving.json.dumps", lambda *_, **__: 1 / 0)
        for name in ("old", "new"):
            with pytest.raises(ZeroDivisionError):
                model.save(tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == files


# -- other genes -------------------------------------------------------------------------------------------------------


def test_genes_are_found_by_name(trained, adata, tmp_path):
    model, _ = trained
    z = model.get_latent_representation()
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    np.testing.assert_allclose(model.get_latent_representation(shuffled), z, atol=1e-5)
    strangers = pd.DataFrame(index=["STRANGER1", "STRANGER2"])
    extra = anndata.AnnData(
        sparse.hstack([shuffled.X, shuffled.X[:, :2]], "csr"), adata.obs, pd.concat([shuffled.var, strangers])
    )
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", extra, accelerator="cpu")
    if model.kind != "sclong":  # whose values contain the total of all genes of the data
        np.testing.assert_allclose(loaded.get_latent_representation(), z, atol=1e-5)
    assert loaded.get_gene_representation().loc["STRANGER1"].isna().all()

    few = adata[:, :20].copy()
    with pytest.warns(UserWarning, match="only 50% of the 40 genes"):
        model.get_latent_representation(few)
    none = adata.copy()
    none.var_names = [f"STRANGER{i}" for i in range(none.n_vars)]
    for attempt in (model.get_latent_representation, lambda data: type(model).load(tmp_path / "model", data)):
        with pytest.raises(ValueError, match="none of the 40 genes"):
            attempt(none)


def test_query_data(trained, make_data, tmp_path):
    model, _ = trained
    before = weights(model)
    query = make_data(20, seed=5)[:, ::-1].copy()
    expected = model.get_latent_representation(query.copy())
    query.obs["batch"] = "new"
    with pytest.raises(ValueError, match="new not found"):
        model.get_latent_representation(query.copy())
    model.save(tmp_path / "model")
    for reference in (model, tmp_path / "model"):
        tuned = type(model).load_query_data(query, reference, accelerator="cpu")
        np.testing.assert_allclose(tuned.get_latent_representation(), expected, atol=1e-5)
        assert not tuned.is_trained
        assert tuned.history is None
        assert tuned.summary_stats.n_batch == 3
        tuned.train(max_epochs=1, lr=1e-2, **RUN)
        assert tuned.is_trained
        query = query.copy()
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before), "the reference must stay what it is"
    other = SCFoundation if model.kind == "scgpt" else SCGPT
    with pytest.raises(ValueError, match="not a"):
        other.load_query_data(query, model)


def test_a_name_means_the_same_gene_ever_after(kind, tiny, make_data, tmp_path):
    """An alias that a table resolved when the model was made is known without the table later on."""
    data = make_data()
    reference = fresh(kind, tiny, data).backbone
    renamed = make_data()
    renamed.var_names = ["OLD7" if name == "GENE7" else name for name in renamed.var_names]
    cls = model_class(kind)
    table = pd.DataFrame({"symbol": ["GENE7"], "alias_symbol": ["OLD7"]})
    cls.setup_anndata(renamed, aliases=table)
    model = cls(renamed, checkpoint=reference)
    z = model.get_latent_representation()
    model.save(tmp_path / "model")
    query = renamed[:, ::-1].copy()
    loaded = cls.load(tmp_path / "model", query, accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), z, atol=1e-5)
    assert loaded.get_gene_representation().loc["OLD7"].notna().all()
    plain = make_data()
    plain.var_names = renamed.var_names
    cls.setup_anndata(plain)
    assert cls(plain, checkpoint=reference).get_gene_representation().loc["OLD7"].isna().all()


def test_one_setup_serves_models_with_other_genes(kind, tiny, make_data):
    data = make_data()
    first = fresh(kind, tiny, data)
    part = make_data()[:, :30].copy()
    small = fresh(kind, tiny, part).backbone
    second = model_class(kind)(data, checkpoint=small)
    assert first.get_gene_representation().notna().all(axis=None)
    assert second.get_gene_representation().notna().all(axis=1).sum() == 30
    model_class(kind).setup_anndata(data)  # once more, so that the first setup is replayed
    assert first.get_gene_representation().notna().all(axis=None)
    assert second.get_gene_representation().notna().all(axis=1).sum() == 30


# -- where the backbone comes from -------------------------------------------------------------------------------------


def test_a_loaded_backbone_is_copied(kind, tiny, make_data, tmp_path):
    data = make_data()
    backbone = random_copy(fresh(kind, tiny, data).backbone, seed=9)
    state = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    model = model_class(kind)(data, checkpoint=backbone)
    model.train(max_epochs=1, lr=1e-2, **RUN)
    assert all(torch.equal(state[name], tensor) for name, tensor in backbone.module.state_dict().items())
    path = backbone.save(tmp_path / "saved")
    named = model_class(kind)(data, checkpoint=path, device="cpu")
    assert named.backbone.provenance.sha256
    named.train(max_epochs=1, **RUN)
    assert not named.backbone.provenance.sha256, "trained weights are not those of the file"
    other = SCFoundation if kind == "scgpt" else SCGPT
    other.setup_anndata(data)
    with pytest.raises(ValueError, match=f"is a {kind} model"):
        other(data, checkpoint=backbone)
    with pytest.raises(ValueError, match="give one of them"):
        model_class(kind)(data, checkpoint=path, config=tiny[kind])


def test_the_bundled_checkpoint_is_the_default(make_data):
    data = make_data()
    vocab = scfm.backbones.load_vocab("scgpt-mini")
    data.var_names = vocab.genes[: data.n_vars]
    SCGPT.setup_anndata(data)
    model = SCGPT(data, device="cpu")
    assert model.backbone.name == "scgpt-mini"
    assert model.init_params_["non_kwargs"]["checkpoint"] == "scgpt-mini"
    assert np.isfinite(np.delete(model.get_latent_representation(), 3, axis=0)).all()


def test_batches_reach_a_network_that_has_an_input_for_them(tiny, make_data):
    data = make_data()
    SCGPT.setup_anndata(data, batch_key="batch")
    model = SCGPT(data, config={**tiny["scgpt"], "use_batch_labels": True, "n_batches": 2}, device="cpu")
    model.train(max_epochs=1, lr=1e-2, **RUN)
    there = model.get_reconstruction()
    switched = data.copy()
    switched.obs["batch"] = np.where(switched.obs["batch"] == "a", "b", "a")
    assert not np.allclose(model.get_reconstruction(switched).data, there.data, atol=1e-4)


def test_tools_take_a_trained_class(make_data, tiny):
    data = make_data()
    SCGPT.setup_anndata(data)
    model = fresh("scgpt", tiny, data)
    scfm.tl.embed(data, model, key_added="class", progress=False)
    scfm.tl.embed(data, model.backbone, key_added="backbone", progress=False)
    np.testing.assert_array_equal(data.obsm["class"], data.obsm["backbone"])
    with pytest.raises(TypeError, match="not dict"):
        scfm.tl.embed(data, {"scgpt": 1})


def test_kinds_of_other_packages_have_a_class(monkeypatch):
    monkeypatch.setattr("scfm.models.backbone_kinds", lambda: ["genebag"])
    cls = model_class("genebag")
    assert issubclass(cls, scfm.models.FoundationModel)
    assert cls.kind == "genebag"
    with pytest.raises(KeyError, match="no backbone class 'scbag'"):
        model_class("scbag")


def test_importing_scfm_does_not_import_scvi_tools():
    code = "import scfm, sys; assert 'models' in dir(scfm); sys.exit('scvi' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_kind_without_a_mini_model_asks_for_a_checkpoint(monkeypatch):
    monkeypatch.setattr("scfm.models._backbone.find", lambda name: None)
    with pytest.raises(ValueError, match=r"checkpoint= .* config="):
        load_backbone("scgpt", None, device="cpu")
