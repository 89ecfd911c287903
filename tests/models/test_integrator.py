"""Integration of batches over every backbone: set up, train, embed, save, load, new batches, and what goes wrong."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.models import BatchIntegrator, CellTypeClassifier
from scfm.models._integrator import split_within
from scfm.models._variable_genes import variable_genes

RUN = {"accelerator": "cpu", "batch_size": 10, "enable_progress_bar": False}
N_TOP = 25


def backbone_of(kind, tiny, adata):
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *adata.var_names], specials=cls.specials)
    return from_config(kind, cls.config_for(dict(tiny[kind]), vocab), vocab, device="cpu", precision="float32")


def fresh(kind, tiny, adata, **options):
    BatchIntegrator.setup_anndata(adata, batch_key="batch")
    return BatchIntegrator(adata, checkpoint=backbone_of(kind, tiny, adata), device="cpu", seed=1, **options)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.learner.state_dict().items()}


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data(30)


@pytest.fixture(scope="module")
def trained(kind, tiny, adata):
    """A model after two epochs, and its weights before."""
    model = fresh(kind, tiny, adata, n_top_genes=N_TOP)
    before = weights(model)
    model.train(max_epochs=2, lr=1e-2, seed=1, keep_best=False, **RUN)
    return model, before


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


# -- training ------------------------------------------------------------------------------------------------------------


def test_two_epochs(trained, adata):
    model, before = trained
    assert model.is_trained
    assert not model.learner.training
    after = weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(adata.n_obs))
    for batch in ("a", "b"):
        assert (adata.obs["batch"].iloc[model.validation_indices] == batch).sum() == 1, (
            "cells of each batch are held out"
        )
    names = {
        "scgpt": ["gep", "gep_zero", "gepc", "gepc_zero", "ecs", "dar"],
        "cellfm": ["genes", "cells", "zeros_genes", "zeros_cells", "similarity"],
    }.get(model.backbone.kind, ["pretraining", "confusion", "classifier", "accuracy"])
    expected = {f"{name}_{stage}" for name in names for stage in ("train", "validation")}
    assert expected | {"train_loss_epoch", "validation_loss"} <= set(model.history)
    assert all(np.isfinite(table.to_numpy()).all() and len(table) for table in model.history.values())
    assert len(model.history["validation_loss"]) == 2
    assert model.history["train_loss_epoch"].iloc[1, 0] < model.history["train_loss_epoch"].iloc[0, 0]


def test_the_setup_changes_uns_only(adata, make_data):
    assert list(adata.obs.columns) == list(make_data(30).obs.columns)
    assert all(name.startswith("_scvi") for name in adata.uns)


def test_the_same_seed_gives_the_same_embedding(kind, tiny, make_data):
    def run(seed):
        model = fresh(kind, tiny, make_data(20), n_top_genes=N_TOP)
        model.train(max_steps=2, seed=seed, **RUN)
        return model.get_latent_representation()

    torch.manual_seed(5)
    one = run(3)
    torch.manual_seed(6)  # the global state must not matter
    np.testing.assert_array_equal(one, run(3))
    assert np.nanmax(np.abs(one - run(4))) > 0


def test_mini_batches_of_one_batch_where_the_paper_has_them(kind, tiny, adata, monkeypatch):
    model = fresh(kind, tiny, adata, n_top_genes=N_TOP)
    seen = []
    loss = model.learner.loss
    monkeypatch.setattr(model.learner, "loss", lambda tokens, generator: seen.append(tokens) or loss(tokens, generator))
    model.train(max_epochs=1, seed=0, **RUN)
    batches = [len(set(tokens.per_cell["batch"].tolist())) for tokens in seen]
    assert sum(map(len, seen)) == adata.n_obs - 1, "each cell once, but for the one without counts"
    assert set(batches) == {1} if model.recipe.by_batch else max(batches) == 2


@pytest.mark.parametrize("kind", ["scgpt", "sclong"])
def test_the_best_epoch_is_that_of_the_part_that_is_monitored(kind, tiny, adata, monkeypatch):
    from scfm.models import _training

    kept = []
    monkeypatch.setattr(_training.KeepBest, "on_train_end", lambda self, *_: kept.append(self))
    model = fresh(kind, tiny, adata)
    model.train(max_epochs=3, seed=0, **RUN)
    part = "gep" if kind == "scgpt" else "pretraining"
    table = model.history[f"{part}_validation"].iloc[:, 0]
    assert kept[0].monitor == f"validation_{part}"
    assert kept[0].best == pytest.approx(table.min())
    assert kept[0].epoch == table.argmin()


def test_adapters_and_a_frozen_backbone(kind, tiny, adata):
    pytest.importorskip("peft")
    model = fresh(kind, tiny, adata, n_top_genes=N_TOP, lora=2)
    before = weights(model)
    model.train(max_steps=2, lr=1e-2, seed=0, **RUN)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in model.learner.named_parameters()}
    assert any(".lora_" in name for name in moved)
    assert all(".lora_" in name or model.learner.is_head(name) for name in moved & parameters)

    model = fresh(kind, tiny, adata, n_top_genes=N_TOP)
    before = weights(model)
    model.train(max_steps=2, lr=1e-2, seed=0, freeze="backbone", **RUN)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved & parameters
    assert all(model.learner.is_head(name) for name in moved & parameters)


# -- embeddings ----------------------------------------------------------------------------------------------------------


def test_embedding(trained, adata):
    model, _ = trained
    z = model.get_latent_representation()
    assert z.dtype == np.float32
    assert z.shape == (adata.n_obs, model.backbone.embedding_dim(model.learner.pooling))
    assert np.flatnonzero(np.isnan(z).any(1)).tolist() == [3]
    close(model.get_latent_representation(indices=[7, 2, 2, 29], batch_size=3), z[[7, 2, 2, 29]])
    mask = (adata.obs["batch"] == "b").to_numpy()
    close(model.get_latent_representation(indices=mask), z[mask])
    if model.backbone.kind == "scgpt":
        np.testing.assert_allclose(np.linalg.norm(z[4:], axis=1), 1, rtol=1e-5)
    with pytest.raises(TypeError, match="no option"):
        model.get_latent_representation(temperature=1)
    with pytest.raises(TypeError, match="leave batch_labels= out"):
        model.get_latent_representation(batch_labels=np.zeros(adata.n_obs))


def test_other_cells_in_any_order_and_storage(trained, adata, tmp_path):
    model, _ = trained
    z = model.get_latent_representation()
    close(model.get_latent_representation(adata[::-1, ::-1].copy())[::-1], z)
    dense = adata.copy()
    dense.X = dense.X.toarray()
    close(model.get_latent_representation(dense), z)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for data in (backed, tmp_path / "cells.h5ad"):
        close(model.get_latent_representation(data), z)
        close(model.get_latent_representation(data, indices=[5, 2]), z[[5, 2]])


def test_training_on_backed_and_dense_data_gives_the_same(kind, tiny, make_data, tmp_path):
    data = make_data(20)
    data.write_h5ad(tmp_path / "cells.h5ad")
    dense = data.copy()
    dense.X = dense.X.toarray()
    results = []
    for each in (data, dense, anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")):
        model = fresh(kind, tiny, each, n_top_genes=N_TOP)
        model.train(max_steps=2, seed=0, **RUN)
        results.append((model.gene_choice.genes, model.get_latent_representation()))
    for genes, z in results[1:]:
        np.testing.assert_array_equal(genes, results[0][0])
        close(z, results[0][1])


def test_only_the_chosen_genes_count(trained, adata):
    model, _ = trained
    choice = model.gene_choice
    assert len(choice.genes) == N_TOP
    assert choice.how in ("seurat_v3", "cell_ranger")
    z = model.get_latent_representation()
    changed = adata.copy()
    others = ~changed.var_names.isin(choice.genes)
    counts = changed.X.tolil()
    counts[:, others] = 7
    counts[3] = 0
    changed.X = counts.tocsr()
    if model.backbone.kind != "sclong":  # whose values contain the total of all genes of the data
        close(model.get_latent_representation(changed), z)
    with pytest.raises(ValueError, match="none of the 15 genes"):
        model.get_latent_representation(changed[:, others].copy())


def test_gene_states_and_reconstruction_use_the_batches(trained, adata):
    model, _ = trained
    table = model.get_gene_representation(contextual=True, genes=["GENE2"], indices=np.arange(5))
    assert table.notna().any(axis=1).to_numpy().nonzero()[0].tolist() == [2]
    assert model.get_reconstruction(indices=[]).shape == (0, adata.n_vars)


# -- batches -------------------------------------------------------------------------------------------------------------


def test_each_cell_has_the_normalisation_of_its_batch(tiny, make_data):
    model = fresh("scgpt", tiny, make_data(20))
    with pytest.warns(UserWarning, match="not been trained on cells of a, b"):
        model.get_latent_representation()
    model.train(max_epochs=1, lr=1e-2, seed=0, **RUN)
    z = model.get_latent_representation()
    swapped = make_data(20)
    swapped.obs["batch"] = swapped.obs["batch"].map({"a": "b", "b": "a"})
    other = model.get_latent_representation(swapped)
    assert np.nanmin(np.abs(z - other).max(1)) > 1e-4
    alone = make_data(20)[:1].copy()
    close(model.get_latent_representation(alone), z[:1])


def test_unseen_batches(trained, make_data):
    model, _ = trained
    query = make_data(20, seed=4)
    expected = None if model._uses_batches else model.get_latent_representation(query)
    query.obs["batch"] = "c"
    if model._uses_batches:
        with pytest.raises(ValueError, match="load_query_data"):
            model.get_latent_representation(query)
        del query.obs["batch"]
        with pytest.raises(KeyError, match="no column 'batch'"):
            model.get_latent_representation(query)
    else:
        close(model.get_latent_representation(query), expected)
        del query.obs["batch"]
        close(model.get_latent_representation(query), expected)
    assert model._uses_batches == (model.backbone.kind == "scgpt")


def test_query_data_add_batches_and_keep_the_old(trained, adata, make_data, tmp_path):
    model, _ = trained
    reference = model.get_latent_representation()
    before = weights(model)
    query = make_data(20, seed=4)[:, ::-1].copy()
    query.obs["batch"] = np.where(np.arange(20) < 12, "0new", "b")
    model.save(tmp_path / "model")
    for source in (model, tmp_path / "model"):
        tuned = BatchIntegrator.load_query_data(query, source, accelerator="cpu")
        assert tuned.batches.tolist() == ["a", "b", "0new"], "known batches keep their numbers"
        assert not tuned.is_trained
        np.testing.assert_array_equal(tuned.gene_choice.genes, model.gene_choice.genes)
        close(tuned.get_latent_representation(adata), reference)
        if model._uses_batches:
            with pytest.warns(UserWarning, match="cells of 0new"):
                tuned.get_latent_representation()
        started = weights(tuned)
        tuned.train(max_steps=3, lr=1e-2, seed=0, **RUN)
        z = tuned.get_latent_representation()
        assert np.isnan(z).any(1).nonzero()[0].tolist() == [3]
        if model._uses_batches:
            state = weights(tuned)
            for which, moved in (("0", False), ("1", True), ("2", True)):
                name = f"network.domain_norms.{which}.running_mean"
                assert torch.equal(state[name], started[name]) != moved
        query = query.copy()
        query.uns.clear()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items()), "the reference stays"
    with pytest.raises(ValueError, match="load_query_data"):
        BatchIntegrator.load(tmp_path / "model", query, accelerator="cpu")


# -- saving --------------------------------------------------------------------------------------------------------------


def test_save_and_load(trained, adata, tmp_path):
    model, _ = trained
    z = model.get_latent_representation()
    model.save(tmp_path / "model", save_anndata=True)
    for data in (None, adata):
        loaded = BatchIntegrator.load(tmp_path / "model", data, accelerator="cpu")
        np.testing.assert_array_equal(loaded.get_latent_representation(), z)
        assert loaded.learner.options == model.learner.options
        assert loaded.learner.tokenize == model.learner.tokenize
        assert loaded.learner.parts == model.learner.parts
        assert loaded.summary_string == model.summary_string
    for name, tensor in weights(model).items():
        assert torch.equal(weights(loaded)[name], tensor), name
    alone = BatchIntegrator.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(alone.get_latent_representation(adata), z)
    assert scfm.load(tmp_path / "model", device="cpu").kind == model.backbone.kind
    loaded.train(max_epochs=1, seed=0, **RUN)
    assert len(loaded.history["train_loss_epoch"]) == 3
    with pytest.raises(ValueError, match="different class"):
        CellTypeClassifier.load(tmp_path / "model")


def test_repr(trained, capsys):
    model, _ = trained
    repr(model)
    text = capsys.readouterr().out
    assert "2 batches in 'batch', 25 genes" in text
    assert model.learner.objective in text
    assert "Training status: Trained" in text
    model.view_anndata_setup()
    assert "a, b" in capsys.readouterr().out


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_data_that_cannot_be_integrated(make_data):
    data = make_data(20)
    with pytest.raises(KeyError, match="no column 'donor'; there are batch, label"):
        BatchIntegrator.setup_anndata(data, batch_key="donor")
    with pytest.raises(KeyError, match="no column 'type'"):
        BatchIntegrator.setup_anndata(data, batch_key="batch", labels_key="type")
    with pytest.raises(TypeError, match="batch_key"):
        BatchIntegrator.setup_anndata(data)
    one = make_data(20)
    one.obs["batch"] = pd.Categorical(["a"] * 20, categories=["a", "b"])
    with pytest.raises(ValueError, match=r"one batch only \(a\)"):
        BatchIntegrator.setup_anndata(one, batch_key="batch")
    gap = make_data(20)
    gap.obs.loc["cell4", "batch"] = np.nan
    with pytest.raises(ValueError, match="1 cells have no batch"):
        BatchIntegrator.setup_anndata(gap, batch_key="batch")
    assert not [name for name in gap.obs if name.startswith("_scvi")]
    numbers = make_data(20)
    numbers.obs["batch"] = np.arange(20) % 2
    BatchIntegrator.setup_anndata(numbers, batch_key="batch", labels_key="label")


def test_wrong_arguments(tiny, make_data):
    data = make_data(20)
    for options, error, message in (
        ({"n_top_genes": "many"}, ValueError, "a number, 'all' or None"),
        ({"n_top_genes": 0}, ValueError, "must be positive"),
        ({"n_top_genes": 5, "genes": ["GENE1"]}, ValueError, "give one of them"),
        ({"genes": ["GENE1", "GENE99"]}, KeyError, "GENE99"),
        ({"objective": "mnn"}, ValueError, "paper, adversarial"),
        ({"pooling": "sum of all"}, ValueError, "no pooling"),
        ({"options": {"temperature": 2}}, TypeError, "temperature"),
    ):
        with pytest.raises(error, match=message):
            fresh("scgpt", tiny, data, **options).train(max_epochs=1, **RUN)


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_genes_by_default_named_or_all(tiny, make_data):
    data = make_data(20)
    by_default = fresh("scgpt", tiny, data)
    assert by_default.gene_choice.how == "all", "there are fewer than the paper takes"
    assert fresh("cellfm", tiny, data).gene_choice is None
    assert fresh("scgpt", tiny, data, n_top_genes="all").gene_choice is None
    named = fresh("scgpt", tiny, data, genes=["GENE7", "GENE2", "GENE7"])
    assert named.gene_choice.genes.tolist() == ["GENE2", "GENE7"]
    assert named.gene_choice.how == "given"


def chosen(data, tiny, n, **layers):
    backbone = backbone_of("scgpt", tiny, data)
    match = backbone.vocab.match(data.var_names)
    with scfm.data.open_source(data) as source:
        return variable_genes(source, match, data.obs["batch"].to_numpy(), n)


def test_variable_genes_are_those_of_scanpy_among_known_ones(tiny, make_data, monkeypatch):
    import scanpy as sc

    data = make_data(60)
    expected = sc.pp.highly_variable_genes(data, flavor="seurat_v3", n_top_genes=12, batch_key="batch", inplace=False)
    choice = chosen(data, tiny, 12)
    assert choice.how == "seurat_v3"
    assert choice.genes.tolist() == sorted(data.var_names[expected["highly_variable"]])
    order = np.random.default_rng(0).permutation(data.n_vars)
    assert chosen(data[:, order].copy(), tiny, 12).genes.tolist() == choice.genes.tolist()

    monkeypatch.setattr("scfm.models._variable_genes.find_spec", lambda _: None)
    log = data.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    expected = sc.pp.highly_variable_genes(log, flavor="cell_ranger", n_top_genes=12, batch_key="batch", inplace=False)
    for values in (data, log):
        choice = chosen(values, tiny, 12)
        assert choice.how == "cell_ranger"
        assert choice.genes.tolist() == sorted(data.var_names[expected["highly_variable"]])


def test_a_fit_that_fails_and_tiny_batches_do_not_stop_the_choice(tiny, make_data, monkeypatch):
    import scanpy as sc

    data = make_data(60)
    data.obs.loc["cell5", "batch"] = "z"
    assert len(chosen(data, tiny, 12).genes) == 12
    original = sc.pp.highly_variable_genes

    def fail(*arguments, flavor, **options):
        if flavor == "seurat_v3":
            msg = "reciprocal condition number"
            raise ValueError(msg)
        return original(*arguments, flavor=flavor, **options)

    monkeypatch.setattr("scfm.models._variable_genes.sc.pp.highly_variable_genes", fail)
    choice = chosen(data, tiny, 12)
    assert (choice.how, len(choice.genes)) == ("cell_ranger", 12)


def test_duplicated_and_unknown_genes(tiny, make_data):
    data = make_data(60)
    backbone = backbone_of("scgpt", tiny, data)
    names = data.var_names.to_numpy(copy=True)
    names[30:35] = [f"OTHER{i}" for i in range(5)]
    names[35] = "GENE1"
    match = backbone.vocab.match(names)
    with scfm.data.open_source(data) as source:
        choice = variable_genes(source, match, data.obs["batch"].to_numpy(), 33)
    assert len(choice.genes) == len(set(choice.genes)) == 33
    assert set(choice.genes) <= set(names) & set(backbone.vocab.names)


# -- splits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train_size", "validation_size"), [(0.9, None), (0.5, 0.25), (1.0, None)])
def test_cells_of_each_batch_are_divided_alike(train_size, validation_size):
    groups = np.repeat([0, 1, 2], [40, 8, 1])
    train, validation, left = split_within(groups, train_size, validation_size, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation, left])), np.arange(49))
    assert np.isin([0, 1, 2], groups[train]).all()
    sizes = [np.bincount(groups[part], minlength=3)[0] for part in (train, validation)]
    assert sizes == [
        round(40 * train_size),
        round(40 * (1 - train_size if validation_size is None else validation_size)),
    ]


def test_the_network_of_scgpt_can_have_another_form(tiny, make_data, tmp_path):
    adata = make_data(30)
    default = fresh("scgpt", tiny, adata).backbone.config
    assert (default.ecs_threshold, default.input_norm, default.explicit_zeros) == (0.8, "dsbn", True)
    options = {"ecs_threshold": 0.6, "input_norm": "none", "explicit_zeros": False, "mask_ratio": 0.3}
    model = fresh("scgpt", tiny, adata, options=options)
    config = model.backbone.config
    assert (config.ecs_threshold, config.input_norm, config.explicit_zeros) == (0.6, "none", False)
    model.train(max_epochs=1, seed=0, **RUN)
    assert (model.history["gep_zero_train"] == 0).all().all()
    model.save(tmp_path / "model")
    loaded = BatchIntegrator.load(tmp_path / "model", adata, accelerator="cpu")
    assert loaded.backbone.config == config
    close(loaded.get_latent_representation(), model.get_latent_representation())
    loaded.train(max_epochs=1, **RUN)
    with pytest.raises(ValueError, match="input_norm"):
        fresh("scgpt", tiny, adata, options={"input_norm": "layer"})
    with pytest.raises(ValueError, match="ecs_threshold"):
        fresh("scgpt", tiny, adata, options={"ecs_threshold": 6})


def test_the_reason_why_a_fit_failed_is_text(make_data, monkeypatch, caplog):
    from scfm.models import _variable_genes

    fit = _variable_genes._table

    def fails(work, flavor, **options):
        if flavor == "seurat_v3":
            raise ValueError(b"There are other near singularities as well.")
        return fit(work, flavor, **options)

    monkeypatch.setattr(_variable_genes, "_table", fails)
    monkeypatch.setattr(_variable_genes, "find_spec", lambda _: True)
    adata = make_data(30)
    vocab = GeneVocab(adata.var_names, specials=[])
    with scfm.data.open_source(adata) as source:
        variable_genes(source, vocab.match(adata.var_names), adata.obs["batch"].to_numpy(), 10)
    assert "(There are other near singularities as well)" in caplog.text
