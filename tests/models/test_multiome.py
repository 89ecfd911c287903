"""One embedding from several modalities: set up, train, embed, save, load, and what goes wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mudata import MuData
from scipy import sparse

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.metrics import label_silhouette
from scfm.models import MultiomeIntegrator
from scfm.models._multiome_data import JointRows, Modalities, open_joint

pytestmark = pytest.mark.filterwarnings("ignore:.*pull_on_update.*:FutureWarning", "ignore:Cannot join columns")

RUN = {"accelerator": "cpu", "enable_progress_bar": False}
GENES = [f"GENE{i}" for i in range(24)]
PEAKS = [f"chr1:{i}-{i + 500}" for i in range(0, 15000, 1000)]
PROTEINS = ["CD3", "CD19", "CD56", "CD14"]
FEATURES = {"rna": GENES, "atac": PEAKS, "protein": PROTEINS}
MODALITIES = {"rna": "rna", "atac": "atac", "protein": "prot"}


def part(names, cells, rng, kinds, scale=1.5):
    means = rng.gamma(0.7, scale, (3, len(names)))[kinds]
    counts = sparse.csr_matrix(rng.poisson(means).astype(np.float32))
    return anndata.AnnData(counts, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=names))


def make(n_cells=36, seed=0, kinds=("rna", "protein"), lacking=()):
    """MuData with some modalities; ``lacking`` has pairs of a kind and the cells that are not in it."""
    rng = np.random.default_rng(seed)
    cells = np.array([f"cell{i}" for i in range(n_cells)])
    parts = {MODALITIES[kind]: part(FEATURES[kind], cells, rng, np.arange(n_cells) % 3) for kind in kinds}
    for kind, rows in lacking:
        data = parts[MODALITIES[kind]]
        parts[MODALITIES[kind]] = data[~data.obs_names.isin(cells[rows])].copy()
    return assembled(parts, cells)


def assembled(parts, cells=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = MuData(parts)
        if cells is not None and list(mdata.obs_names) != list(cells):
            mdata = mdata[list(cells)].copy()
    mdata.obs["batch"] = np.array(["a", "b"])[np.arange(mdata.n_obs) % 2]
    return mdata


@pytest.fixture(scope="module")
def pretrained(tiny):
    """A tiny scGPT that knows two thirds of the genes, and others."""
    cls = scfm.backbones.backbone_class("scgpt")
    vocab = GeneVocab([*cls.specials, *(f"OTHER{i}" for i in range(5)), *GENES[8:]], specials=cls.specials)
    config = replace(cls.config_for(dict(tiny["scgpt"]), vocab), dropout=0.1)
    return from_config("scgpt", config, vocab, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def fresh(pretrained):
    def new(mdata, *, setup=None, **options):
        MultiomeIntegrator.setup_mudata(mdata, **(setup or {}))
        return MultiomeIntegrator(mdata, checkpoint=pretrained, **{"device": "cpu", "seed": 1, **options})

    return new


@pytest.fixture(scope="module")
def mosaic():
    """Three modalities; some cells lack one, cell 4 has no counts of RNA and nothing else."""
    lacking = [("protein", np.arange(0, 36, 3)), ("atac", np.arange(4, 36, 5)), ("protein", [4])]
    mdata = make(kinds=("rna", "atac", "protein"), lacking=lacking)
    mdata["rna"].X = sparse.diags(np.arange(36) != 4, dtype=np.float32) @ mdata["rna"].X
    return mdata


@pytest.fixture(scope="module")
def trained(fresh, mosaic):
    model = fresh(mosaic, setup={"batch_key": "batch"}, n_top_peaks=10, tokenize={"include_zeros": True})
    model.train(max_epochs=3, batch_size=8, seed=0, **RUN)
    return model


# -- what it does --------------------------------------------------------------------------------------------------------


def test_training_learns_from_all_modalities(trained, mosaic):
    assert trained.is_trained
    losses = trained.history["train_loss_epoch"].to_numpy().ravel()
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert {"validation_loss", "gep_train", "gepc_validation", "dar_train"} <= set(trained.history)
    assert (trained.history["dar_train"] > 0).all().all()
    assert (trained.history["ecs_train"] == 0).all().all()
    latent = trained.get_latent_representation()
    assert latent.shape == (36, 16)
    assert latent.dtype == np.float32
    assert np.isnan(latent[4]).all(), "a cell without any value has no embedding"
    assert np.isfinite(np.delete(latent, 4, 0)).all()
    assert sorted([*trained.train_indices, *trained.validation_indices]) == list(range(36))
    config = trained.backbone.config
    assert config.modalities == ("atac", "protein", "rna", "<pad>", "<cls>", "<eoc>")
    assert (config.n_batches, config.use_batch_labels, config.discriminator) == (2, True, True)
    assert (config.input_norm, config.explicit_zeros, config.ecs_threshold) == ("none", False, 0.8)


def test_training_finds_kinds_of_cells(fresh):
    """Where counts leave no doubt about the kind of a cell, its embedding comes to hold the kind and predicts them."""
    rng, n = np.random.default_rng(0), 96
    cells, kinds = [f"cell{i}" for i in range(n)], np.arange(n) % 3
    mdata = assembled({"rna": part(GENES, cells, rng, kinds, 30.0), "prot": part(PROTEINS, cells, rng, kinds, 30.0)})
    model = fresh(mdata)
    before = label_silhouette(model.get_latent_representation(), kinds)
    steady = scfm.train.Optimization("adam", 1e-2)
    model.train(max_epochs=50, batch_size=16, optimization=steady, keep_best=False, seed=0, **RUN)
    # the variance of bins from 1 to 50 is 208, so that less is known of held-out cells from what they are
    assert model.history["gep_validation"].iloc[-1, 0] < 130
    assert model.history["gepc_validation"].iloc[-1, 0] < 130
    after = label_silhouette(model.get_latent_representation(), kinds)
    assert before < 0.5
    assert after > 0.8


def test_what_the_paper_does_is_the_default(fresh):
    both = fresh(make())
    recipe = both.recipe
    assert (recipe.batch_size, recipe.max_epochs, recipe.n_top_genes) == (16, 25, 1200)
    assert dict(recipe.optimization) == {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": "steps",
        "unit": "epoch",
        "step_size": 1,
        "gamma": 0.95,
    }
    assert both.learner.tokenize == {"cls_value": 0.0, "include_zeros": False, "max_length": 4001}
    assert both.learner.options == {"mask_ratio": 0.4, "ecs_weight": 0.0, "dar_weight": 1.0}
    assert both.backbone.config.n_batches == 0
    peaks = fresh(make(kinds=("rna", "atac")))
    assert peaks.learner.tokenize["include_zeros"]
    assert fresh(make(), setup={"batch_key": "batch"}).backbone.config.n_batches == 2
    one = make()
    one.obs["batch"] = "a"
    assert fresh(one, setup={"batch_key": "batch"}).backbone.config.n_batches == 0


def test_pretrained_embeddings_are_kept_and_everything_else_is_fresh(fresh, pretrained):
    model = fresh(make(), n_layers=1)
    vocab = model.backbone.vocab
    assert list(vocab.names) == ["<pad>", "<cls>", "<eoc>", *GENES[8:], *sorted(GENES[:8]), *_prefixed(PROTEINS)]
    old, new = pretrained.module.state_dict(), model.backbone.module.state_dict()
    rows = pretrained.vocab.get_ids(GENES[8:])
    assert torch.equal(new["genes.embedding.weight"][3:19], old["genes.embedding.weight"][rows])
    assert model.backbone.config.n_layers == 1
    assert model.learner.parts == ("decoder", "layers", "modalities", "mvc", "query_flag", "values")
    assert model.learner.is_head("network.layers.0.qkv.weight")
    assert not model.learner.is_head("network.genes.embedding.weight")
    assert fresh(make()).backbone.config.n_layers == 2


def _prefixed(names):
    return sorted(f"p_{name}" for name in names)


def test_freezing_leaves_the_table_alone(fresh):
    model = fresh(make())
    before = {name: p.detach().clone() for name, p in model.learner.named_parameters()}
    model.train(max_epochs=1, batch_size=12, freeze="backbone", seed=0, **RUN)
    changed = {name for name, p in model.learner.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed
    assert not any(name.startswith("network.genes.") for name in changed)


def test_features_are_embedded_by_modality(trained):
    table = trained.get_feature_representation()
    assert table.shape == (24 + 10 + 4, 16)
    assert list(table.loc["protein"].index) == sorted(PROTEINS)
    assert set(table.loc["atac"].index) < set(PEAKS)
    expected = trained.backbone.gene_embeddings()[trained.backbone.vocab["p_CD14"]]
    np.testing.assert_array_equal(table.loc[("protein", "CD14")], expected)
    assert trained.get_feature_representation(["protein"]).index.get_level_values(0).unique().tolist() == ["protein"]
    with pytest.raises(KeyError, match="no 'methylation'"):
        trained.get_feature_representation(["methylation"])
    for method in (trained.get_gene_representation, trained.get_reconstruction):
        with pytest.raises(scfm.UnsupportedError):
            method()


def test_nothing_but_uns_is_changed(fresh):
    mdata = make(kinds=("rna", "atac", "protein"))
    before = mdata.copy()
    model = fresh(mdata, setup={"batch_key": "batch"}, n_top_peaks=6)
    model.train(max_epochs=1, batch_size=12, seed=0, **RUN)
    model.get_latent_representation()
    pd.testing.assert_frame_equal(mdata.obs, before.obs)
    assert set(mdata.uns) - set(before.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}
    for name in mdata.mod:
        assert (mdata[name].X != before[name].X).nnz == 0
        assert dict(mdata[name].uns) == dict(before[name].uns)
        pd.testing.assert_frame_equal(mdata[name].var, before[name].var)


def test_looks(trained):
    text = trained.summary_string
    assert "24 genes (all), 10 peaks (accessibility), 4 proteins (all), 2 batches in 'batch'" in text
    assert trained.modalities == MODALITIES
    assert list(trained.batches) == ["a", "b"]
    trained.view_anndata_setup()


# -- features ------------------------------------------------------------------------------------------------------------


def test_peaks_open_in_half_of_the_cells_are_chosen(fresh):
    mdata = make(kinds=("rna", "atac"))
    dense = np.zeros((36, 15), dtype=np.float32)
    for column in range(15):
        dense[: 2 * column + 3, column] = 1 + column  # the height of a count does not matter
    mdata.mod["atac"].X = sparse.csr_matrix(dense)
    share = (dense > 0).mean(0)
    expected = np.array(PEAKS)[np.argsort(np.abs(share - 0.5), kind="stable")[:5]]
    model = fresh(mdata, n_top_peaks=5)
    assert model.feature_choice.how["atac"] == "accessibility"
    assert set(model.feature_choice.names["atac"]) == set(expected)
    assert len(fresh(mdata, n_top_peaks="all").feature_choice.names["atac"]) == 15
    with pytest.raises(ValueError, match="n_top_peaks must be positive"):
        fresh(mdata, n_top_peaks=0)


def test_highly_variable_genes_are_chosen_on_the_cells_with_rna(fresh):
    mdata = make(60, lacking=[("rna", np.arange(40, 60))])
    model = fresh(mdata, n_top_genes=7)
    choice = model.feature_choice
    assert len(choice.names["rna"]) == 7
    assert choice.how["rna"] in ("seurat_v3", "cell_ranger")
    alone = assembled({"rna": mdata["rna"].copy(), "prot": mdata["prot"][:40].copy()})
    assert list(fresh(alone, n_top_genes=7).feature_choice.names["rna"]) == list(choice.names["rna"])
    assert fresh(mdata, n_top_genes="all").feature_choice.how["rna"] == "all"


def test_genes_under_other_names_get_the_pretrained_embedding(pretrained, tiny):
    ids = {f"ENSG{i:011d}": gene for i, gene in enumerate(GENES[8:])}
    cls = type(pretrained)
    vocab = GeneVocab([*cls.specials, *GENES[8:]], specials=cls.specials, ensembl_ids=["", "", "", *ids])
    backbone = from_config("scgpt", cls.config_for(dict(tiny["scgpt"]), vocab), vocab, device="cpu")
    mdata = make()
    symbols = mdata.copy()
    mdata["rna"].var_names = [*GENES[:8], *(f"{name}.3" for name in ids)]
    mdata.update()
    MultiomeIntegrator.setup_mudata(mdata)
    model = MultiomeIntegrator(mdata, checkpoint=backbone, device="cpu", seed=1)
    assert set(model.feature_choice.names["rna"]) == set(GENES)
    np.testing.assert_array_equal(model.get_latent_representation(symbols), model.get_latent_representation())


def test_duplicate_features_are_summed(fresh):
    mdata = make()
    model = fresh(mdata)
    counts = mdata["prot"].X.toarray()
    doubled = anndata.AnnData(
        np.concatenate([counts[:, :2] // 2, counts[:, 2:], counts[:, :2] - counts[:, :2] // 2], 1),
        obs=mdata["prot"].obs,
    )
    doubled.var_names = [*PROTEINS, *PROTEINS[:2]]
    query = assembled({"rna": mdata["rna"].copy(), "prot": doubled})
    np.testing.assert_allclose(
        model.get_latent_representation(query), model.get_latent_representation(), rtol=1e-4, atol=1e-5
    )


# -- cells that lack modalities ------------------------------------------------------------------------------------------


def test_a_missing_modality_gives_no_tokens(trained, mosaic):
    backbone, kinds = trained.backbone, np.array(["atac", "protein", "rna"])
    with trained._cells(mosaic) as task:
        tokens = backbone.tokenize(task.source.read(0, 36), task.match, **task.options)
    of_token = backbone.module.modality_of_token[tokens.flat_ids].numpy()
    there = {kind: set(tokens.flat_cells[of_token == i].tolist()) for i, kind in enumerate(kinds)}
    # a cell that is in a modality has tokens of all its chosen features, zeros included, if any has a count
    for kind, name in MODALITIES.items():
        chosen = trained.feature_choice.names[kind]
        data = mosaic[name]
        columns = [label.removeprefix("p_") for label in chosen]
        expressed = np.asarray(data[:, columns].X.sum(1)).ravel() > 0
        expected = mosaic.obs_names.get_indexer(data.obs_names[expressed])
        assert there[kind] == set(expected.tolist())
        assert (of_token == list(kinds).index(kind)).sum() == len(chosen) * len(expected)


def test_not_measured_and_nothing_but_zeros_are_the_same(trained, mosaic):
    padded = mosaic["prot"][mosaic["prot"].obs_names].copy()
    lacking = [name for name in mosaic.obs_names if name not in padded.obs_names]
    zeros = anndata.AnnData(
        sparse.csr_matrix((len(lacking), 4), dtype=np.float32), obs=pd.DataFrame(index=lacking), var=padded.var
    )
    query = assembled(
        {"rna": mosaic["rna"].copy(), "atac": mosaic["atac"].copy(), "prot": anndata.concat([padded, zeros])},
        mosaic.obs_names,
    )
    np.testing.assert_allclose(
        trained.get_latent_representation(query), trained.get_latent_representation(), rtol=1e-4, atol=1e-5
    )


def test_another_cells_missing_modality_changes_nothing(trained, mosaic):
    expected = trained.get_latent_representation()
    query = assembled(
        {"rna": mosaic["rna"].copy(), "atac": mosaic["atac"].copy(), "prot": mosaic["prot"][1:].copy()},
        mosaic.obs_names,
    )
    changed = mosaic.obs_names.get_loc(mosaic["prot"].obs_names[0])
    actual = trained.get_latent_representation(query)
    others = np.arange(36) != changed
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-4, atol=1e-5)
    assert not np.allclose(actual[changed], expected[changed], atol=1e-3)


def test_query_data_may_lack_a_modality(trained, mosaic, caplog):
    query = assembled({"rna": mosaic["rna"].copy()})
    latent = trained.get_latent_representation(query)
    assert "no modality 'atac', 'prot'" in caplog.text
    assert np.isfinite(np.delete(latent, 4, 0)).all()
    assert np.isnan(latent[4]).all()
    only = assembled({"prot": mosaic["prot"].copy()})
    assert np.isfinite(trained.get_latent_representation(only)).all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_the_matrix_is_that_of_the_modalities(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    parts, rows, expected = [], [], []
    for width in rng.integers(1, 6, 3):
        dense = rng.poisson(1.0, (int(rng.integers(1, 9)), width)).astype(np.float32)
        row = np.where(rng.random(n) < 0.6, rng.integers(0, len(dense), n), -1)
        columns = rng.permutation(width)[: int(rng.integers(1, width + 1))]
        source = scfm.data.open_source(anndata.AnnData(sparse.csc_matrix(dense) if width % 2 else dense))
        parts.append((source.reader, row, columns))
        expected.append(np.where(row[:, None] >= 0, dense[row][:, columns], 0))
        rows.append(row)
    expected = np.concatenate(expected, 1)
    reader = JointRows(parts, n)
    assert reader.shape == expected.shape
    start = int(rng.integers(0, n))
    stop = int(rng.integers(start, n + 1))
    np.testing.assert_array_equal(reader.read(start, stop).toarray(), expected[start:stop])


def test_cells_are_those_of_obs_in_its_order(mosaic):
    layout = Modalities(MODALITIES, dict.fromkeys(MODALITIES))
    with open_joint(mosaic, layout, {"protein": np.array([1, 3])}) as source:
        assert list(source.obs_names) == list(mosaic.obs_names)
        assert list(source.var_names) == [PROTEINS[1], PROTEINS[3]]
        dense = source.read(0, 36).toarray()
    place = mosaic.obs_names.get_indexer(mosaic["prot"].obs_names)
    np.testing.assert_array_equal(dense[place], mosaic["prot"].X.toarray()[:, [1, 3]])
    assert (np.delete(dense, place, 0) == 0).all()


# -- the same result, whatever the order ---------------------------------------------------------------------------------


def test_order_batch_size_and_other_cells_change_nothing(trained, mosaic, tmp_path):
    expected = trained.get_latent_representation()
    parts = {
        name: mosaic[name][::-1, np.random.default_rng(1).permutation(mosaic[name].n_vars)].copy()
        for name in mosaic.mod
    }
    query = assembled(dict(reversed(parts.items())))
    shuffled = mosaic.obs_names.get_indexer(query.obs_names)
    assert sorted(shuffled) == list(range(36))
    assert list(shuffled) != list(range(36))
    np.testing.assert_allclose(trained.get_latent_representation(query), expected[shuffled], rtol=1e-4, atol=1e-5)
    for options in ({"batch_size": 1}, {"batch_size": 36}):
        np.testing.assert_allclose(trained.get_latent_representation(**options), expected, rtol=1e-4, atol=1e-5)
    some = trained.get_latent_representation(indices=[7, 2])
    np.testing.assert_allclose(some, expected[[7, 2]], rtol=1e-4, atol=1e-5)
    mask = np.arange(36) < 3
    np.testing.assert_allclose(trained.get_latent_representation(indices=mask), expected[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained.get_latent_representation(mosaic[5:9]), expected[5:9], rtol=1e-4, atol=1e-5)
    mosaic.write_h5mu(tmp_path / "cells.h5mu")
    np.testing.assert_allclose(
        trained.get_latent_representation(tmp_path / "cells.h5mu"), expected, rtol=1e-4, atol=1e-5
    )


def test_cells_that_are_too_long_keep_a_part_that_depends_on_them_alone(trained, mosaic):
    first = trained.get_latent_representation(max_length=9)
    assert not np.allclose(first[:3], trained.get_latent_representation()[:3], atol=1e-3)
    again = trained.get_latent_representation(mosaic[::-1].copy(), max_length=9)[::-1]
    np.testing.assert_allclose(again, first, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_weights_in_any_order_of_features(fresh):
    def weights(order):
        mdata = make(24, kinds=("rna", "atac", "protein"))
        rng = np.random.default_rng(order)
        parts = {
            name: part[:, rng.permutation(part.n_vars) if order else slice(None)].copy()
            for name, part in mdata.mod.items()
        }
        model = fresh(assembled(parts), setup={"batch_key": "batch"}, n_top_peaks=6)
        before = torch.random.get_rng_state()
        model.train(max_epochs=2, batch_size=8, seed=3, **RUN)
        assert torch.equal(torch.random.get_rng_state(), before)
        return model.backbone.vocab.names, model.backbone.module.state_dict()

    names, first = weights(0)
    for order in (0, 7):
        others, second = weights(order)
        assert list(others) == list(names)
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), name


# -- saving --------------------------------------------------------------------------------------------------------------


def test_save_and_load(trained, mosaic, tmp_path):
    expected = trained.get_latent_representation()
    trained.save(tmp_path / "model", save_anndata=True)
    assert {file.name for file in (tmp_path / "model").iterdir()} >= {"model.json", "mdata.h5mu"}
    loaded = MultiomeIntegrator.load(tmp_path / "model", accelerator="cpu")
    assert list(loaded.adata.obs_names) == list(mosaic.obs_names)
    np.testing.assert_array_equal(loaded.get_latent_representation(), expected)
    assert loaded.feature_choice.how == trained.feature_choice.how
    assert loaded.learner.parts == trained.learner.parts
    assert loaded.learner.options == trained.learner.options
    assert loaded.summary_string == trained.summary_string
    pd.testing.assert_frame_equal(loaded.get_feature_representation(), trained.get_feature_representation())
    pd.testing.assert_frame_equal(loaded.history["gep_train"], trained.history["gep_train"])
    loaded.train(max_epochs=1, batch_size=12, seed=0, **RUN)
    assert len(loaded.history["train_loss_epoch"]) == 4

    alone = MultiomeIntegrator.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(alone.get_latent_representation(mosaic), expected)
    with pytest.raises(ValueError, match="without data"):
        alone.get_latent_representation()

    backbone = scfm.load(tmp_path / "model", device="cpu")
    assert backbone.config.modalities == trained.backbone.config.modalities
    with trained._cells(mosaic) as task:
        tokens = backbone.tokenize(task.source.read(0, 36), task.match, **task.options)
    np.testing.assert_allclose(backbone.embed(tokens).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_query_data_go_on_with_the_same_features_and_new_batches(trained, tmp_path):
    query = make(20, seed=5)
    query.obs["batch"] = np.array(["b", "new"])[np.arange(20) % 2]
    model = MultiomeIntegrator.load_query_data(query, trained)
    assert list(model.batches) == ["a", "b", "new"]
    np.testing.assert_allclose(
        model.get_latent_representation(), trained.get_latent_representation(query), rtol=1e-5, atol=1e-6
    )
    old, new = trained.backbone.module.state_dict(), model.backbone.module.state_dict()
    assert new["batches.embedding.weight"].shape == (3, 16)
    assert torch.equal(new["batches.embedding.weight"][:2], old["batches.embedding.weight"])
    assert torch.equal(new["discriminator.out.weight"][:2], old["discriminator.out.weight"])
    model.train(max_epochs=1, batch_size=8, seed=0, **RUN)
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"new in obs\['batch'\] are batches that the model does not know"):
        MultiomeIntegrator.load(tmp_path / "model", query)


@pytest.mark.parametrize("kinds", [("rna",), ("protein",)])
def test_query_data_with_one_modality_go_on(trained, kinds):
    query = make(20, seed=6, kinds=kinds)
    model = MultiomeIntegrator.load_query_data(query, trained)
    expected = trained.get_latent_representation(query)
    np.testing.assert_allclose(model.get_latent_representation(), expected, rtol=1e-5, atol=1e-6)
    model.train(max_epochs=1, batch_size=8, seed=0, **RUN)
    after = model.get_latent_representation()
    there = np.isfinite(expected).all(1)
    assert (np.isfinite(after).all(1) == there).all()
    assert not np.allclose(after[there], expected[there], atol=1e-4)


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_modalities_that_are_not_there_or_not_enough():
    mdata = make()
    with pytest.raises(KeyError, match="no modality 'peaks'; there are 'rna', 'prot'"):
        MultiomeIntegrator.setup_mudata(mdata, modalities={"rna": "rna", "atac": "peaks"})
    with pytest.raises(KeyError, match="'methylation' is none of these"):
        MultiomeIntegrator.setup_mudata(mdata, modalities={"rna": "rna", "methylation": "prot"})
    with pytest.raises(ValueError, match="one role only"):
        MultiomeIntegrator.setup_mudata(mdata, modalities={"rna": "rna", "protein": "rna"})
    for modalities in ({"rna": "rna"}, {"protein": "prot", "rna": None}, {"atac": "rna", "protein": "prot"}):
        with pytest.raises(ValueError, match="needs RNA and at least one more modality"):
            MultiomeIntegrator.setup_mudata(mdata, modalities=modalities)
    with pytest.raises(ValueError, match="needs RNA and at least one more modality"):
        MultiomeIntegrator.setup_mudata(make(kinds=("rna",)))
    MultiomeIntegrator.setup_mudata(mdata, modalities={"rna_layer": "rna", "protein_layer": "prot"})


def test_wrong_objects_layers_and_columns(fresh):
    mdata = make()
    for setup in (MultiomeIntegrator.setup_mudata, MultiomeIntegrator.setup_anndata):
        with pytest.raises(TypeError, match="expected MuData, got AnnData"):
            setup(mdata["rna"])
    with pytest.raises(ValueError, match=r"copy\(\)"):
        MultiomeIntegrator.setup_mudata(mdata[:5])
    with pytest.raises(KeyError, match="modality 'prot': there is no layer 'counts'"):
        MultiomeIntegrator.setup_mudata(mdata, protein_layer="counts")
    with pytest.raises(KeyError, match="no column 'donor'"):
        MultiomeIntegrator.setup_mudata(mdata, batch_key="donor")
    with pytest.raises(KeyError, match="gene_symbols='symbol' is not a column"):
        MultiomeIntegrator.setup_mudata(mdata, gene_symbols="symbol")
    with pytest.raises(ValueError, match="set up your AnnData with MultiomeIntegrator"):
        MultiomeIntegrator(make(), checkpoint="scgpt-mini")
    with pytest.raises(TypeError, match="expected MuData, got AnnData"):
        MultiomeIntegrator(mdata["rna"], checkpoint="scgpt-mini")
    model = fresh(mdata)
    with pytest.raises(TypeError, match="expected MuData"):
        model.get_latent_representation(mdata["rna"])
    with pytest.raises(TypeError, match="no option 'nonsense'"):
        model.get_latent_representation(nonsense=1)
    with pytest.raises(ValueError, match="a number or 'all'"):
        MultiomeIntegrator(mdata, n_top_genes="many")
    with pytest.raises(ValueError, match="n_layers must be positive"):
        fresh(mdata, n_layers=0)
    with pytest.raises(ValueError, match="features are chosen on data"):
        MultiomeIntegrator(registry=model.registry_, checkpoint=model.backbone)


def test_cells_that_link_nothing():
    mdata = make(lacking=[("rna", np.arange(20)), ("protein", np.arange(20, 36))])
    with pytest.raises(ValueError, match="no cell is in both rna and prot"):
        MultiomeIntegrator.setup_mudata(mdata)
    chain = make(kinds=("rna", "atac", "protein"), lacking=[("rna", np.arange(20)), ("protein", np.arange(24, 36))])
    MultiomeIntegrator.setup_mudata(chain)
    twice = make()
    twice["prot"].obs_names = ["cell0"] * 36
    with pytest.raises(ValueError, match="occur more than once"):
        MultiomeIntegrator.setup_mudata(twice)
    with pytest.raises(ValueError, match="shares features, not cells"):
        MultiomeIntegrator.setup_mudata(MuData({"rna": make()["rna"], "prot": make()["prot"]}, axis=1))


@pytest.mark.parametrize(("value", "message"), [(-1, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
@pytest.mark.parametrize("name", ["rna", "prot"])
def test_values_that_are_no_counts(fresh, name, value, message):
    mdata = make()
    model = fresh(make())
    wrong = mdata[name].X.toarray()
    wrong[3, 1] = value
    mdata.mod[name].X = sparse.csr_matrix(wrong)
    with pytest.raises(ValueError, match=f"modality '{name}'.*{message}"):
        MultiomeIntegrator.setup_mudata(mdata)
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(mdata)


def test_fractions_warn():
    mdata = make()
    mdata["prot"].X = mdata["prot"].X / 3
    with pytest.warns(UserWarning, match="modality 'prot'.*does not hold counts"):
        MultiomeIntegrator.setup_mudata(mdata)


def test_genes_and_features_that_are_not_known(fresh):
    strange = make()
    strange["rna"].var_names = [f"STRANGE{i}" for i in range(24)]
    strange.update()
    with pytest.raises(ValueError, match="none of the 24 genes"):
        fresh(strange)
    model = fresh(make())
    strange["prot"].var_names = list("abcd")
    with pytest.raises(ValueError, match="none of the 28 features"):
        model.get_latent_representation(strange)
    with pytest.raises(ValueError, match="none of the modalities"):
        model.get_latent_representation(assembled({"other": make()["rna"]}))
    few = make()
    few.mod["rna"] = few["rna"][:, :5].copy()
    few.update()
    with pytest.warns(UserWarning, match="only 32% of the 28 features"):
        model.get_latent_representation(few)


def test_features_of_two_modalities_with_one_name(fresh):
    mdata = make(kinds=("rna", "atac"))
    mdata["atac"].var_names = ["GENE3", *PEAKS[1:]]
    mdata.update()
    with pytest.raises(ValueError, match="occur more than once, e.g. 'GENE3'"):
        fresh(mdata)


def test_other_models_say_who_can(tiny):
    mdata = make()
    MultiomeIntegrator.setup_mudata(mdata)
    for kind in set(tiny) - {"scgpt"}:
        cls = scfm.backbones.backbone_class(kind)
        vocab = GeneVocab([*cls.specials, *GENES], specials=cls.specials)
        backbone = from_config(kind, cls.config_for(dict(tiny[kind]), vocab), vocab, device="cpu")
        with pytest.raises(scfm.UnsupportedError, match="Models that can: scgpt"):
            MultiomeIntegrator(mdata, checkpoint=backbone)


# -- real data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cite_seq(shared):
    adata = anndata.read_h5ad(shared("data", "singlecell", "pbmc10k_citeseq_totalvi.h5ad"))[:48].copy()
    counts = adata.obsm["protein_counts"]
    protein = anndata.AnnData(
        counts.to_numpy(dtype=np.float32), obs=adata.obs[[]].copy(), var=pd.DataFrame(index=counts.columns)
    )
    return adata, protein


def test_rna_and_proteins_of_blood(cite_seq):
    mdata = assembled({"rna": cite_seq[0].copy(), "prot": cite_seq[1].copy()})
    MultiomeIntegrator.setup_mudata(mdata)
    model = MultiomeIntegrator(mdata, checkpoint="scgpt-mini", n_top_genes=80, device="cpu", seed=0)
    assert len(model.feature_choice.names["rna"]) == 80
    assert len(model.feature_choice.names["protein"]) == 14
    model.train(max_epochs=2, batch_size=8, seed=0, **RUN)
    assert np.diff(model.history["train_loss_epoch"].to_numpy().ravel()) < 0
    assert np.isfinite(model.get_latent_representation()).all()


def test_mosaic_of_blood(cite_seq, tmp_path):
    """Half of the cells have no proteins."""
    adata, protein = cite_seq
    mdata = assembled({"rna": adata.copy(), "prot": protein[::2].copy()}, adata.obs_names)
    MultiomeIntegrator.setup_mudata(mdata)
    model = MultiomeIntegrator(mdata, checkpoint="scgpt-mini", n_top_genes=60, device="cpu", seed=0)
    model.train(max_epochs=1, seed=0, **RUN)
    latent = model.get_latent_representation()
    assert np.isfinite(latent).all()
    alone = model.get_latent_representation(assembled({"rna": adata.copy()}))
    np.testing.assert_allclose(latent[1::2], alone[1::2], rtol=1e-3, atol=1e-4)
    assert not np.allclose(latent[::2], alone[::2], atol=1e-2)
    model.save(tmp_path / "model")
    loaded = MultiomeIntegrator.load(tmp_path / "model", mdata, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), latent)


def test_rna_and_peaks_of_blood(shared):
    adata = anndata.read_h5ad(shared("data", "singlecell", "pbmc_multiome_muon_1000.h5ad"))[:32].copy()
    names = list(adata.uns["peak_names"])
    peaks = anndata.AnnData(adata.obsm["peak_counts"], obs=adata.obs[[]].copy(), var=pd.DataFrame(index=names))
    mdata = assembled({"rna": adata, "atac": peaks})
    MultiomeIntegrator.setup_mudata(mdata)
    model = MultiomeIntegrator(mdata, checkpoint="scgpt-mini", n_top_peaks=30, device="cpu", seed=0)
    assert model.learner.tokenize["include_zeros"]
    assert model.feature_choice.how == {"rna": "all", "atac": "accessibility"}
    model.train(max_epochs=2, batch_size=8, seed=0, **RUN)
    assert np.diff(model.history["train_loss_epoch"].to_numpy().ravel()) < 0
    latent = model.get_latent_representation()
    assert latent.shape == (32, 64)
    assert np.isfinite(latent).all()
