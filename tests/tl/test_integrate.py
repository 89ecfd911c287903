"""Integration of batches: without training, with a balanced graph, and by fine-tuning."""

from __future__ import annotations

import sys

import anndata
import numpy as np
import pytest
import scanpy as sc

import scfm
from scfm.backbones._fine_tuning import ZeroShot
from scfm.models import BatchIntegrator

TRAIN = {"max_epochs": 1, "batch_size": 10, "accelerator": "cpu"}


@pytest.fixture
def cells(adata):
    adata.obs["batch"] = np.array(["a", "b", "c"])[np.arange(adata.n_obs) % 3]
    return adata


@pytest.fixture
def with_empty_cell(cells):
    counts = cells.X.tolil()
    counts[4] = 0
    cells.X = counts.tocsr()
    return cells


def integrate(adata, model, **options):
    return scfm.tl.integrate(adata, model, batch_key="batch", **options)


# -- zero-shot -----------------------------------------------------------------------------------------------------------


def test_zero_shot_is_the_embedding_that_the_authors_integrate_with(model, cells):
    assert integrate(cells, model) is None
    z = cells.obsm[f"X_{model.kind}_integrated"]
    recipe = {"scfoundation": {"target": "t4.5"}, "sclong": {"pooling": "eq11"}}.get(model.kind, {})
    scfm.tl.embed(cells, model, key_added="X", **recipe)
    np.testing.assert_array_equal(z, cells.obsm["X"])
    if model.kind == "sclong":
        assert z.shape == cells.shape, "Eq. 11 has a number for each gene of the data"
    record = cells.uns[f"{model.kind}_integrated"]
    params = record["params"]
    assert (params["method"], params["batch_key"], params["n_batches"]) == ("zero-shot", "batch", 3)
    assert params["pooling"] == recipe.get("pooling", model.default_pooling)
    assert record["genes"]["matched"] == 50
    assert list(cells.obs.columns) == ["batch"]


def test_own_pooling_options_and_name(scfoundation, cells):
    integrate(cells, scfoundation, pooling="max", target="t5", key_added="joint")
    scfm.tl.embed(cells, scfoundation, pooling="max", target="t5", key_added="X")
    np.testing.assert_array_equal(cells.obsm["joint"], cells.obsm["X"])
    assert cells.uns["joint"]["params"]["pooling"] == "max"
    assert "scfoundation_integrated" not in cells.uns


def test_chosen_genes(scgpt, cells):
    integrate(cells, scgpt, n_top_genes=20)
    params = cells.uns["scgpt_integrated"]["params"]
    assert params["n_top_genes"] == 20
    BatchIntegrator.setup_anndata(cells, batch_key="batch")
    genes = BatchIntegrator(cells, checkpoint=scgpt, n_top_genes=20, device="cpu").gene_choice
    assert params["flavor"] == genes.how
    part = cells[:, genes.genes].copy()
    scfm.tl.embed(part, scgpt, key_added="X")
    np.testing.assert_allclose(cells.obsm["X_scgpt_integrated"], part.obsm["X"], atol=1e-6)


def test_the_weights_that_the_authors_integrate_with(scfoundation, scgpt, cells, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options.get("weights"))
        return scfoundation

    monkeypatch.setattr("scfm.tl._inputs.load", load)
    integrate(cells, "scfoundation")
    integrate(cells, "scfoundation", weights="cell")
    integrate(cells, "some/folder")
    assert asked == ["rde", "cell", None]
    assert scgpt.zero_shot("integration") == ZeroShot()


def test_a_copy_and_a_view(scgpt, cells):
    out = integrate(cells, scgpt, copy=True)
    assert not cells.obsm
    assert not cells.uns
    part = cells[::2]
    integrate(part, scgpt)
    np.testing.assert_allclose(part.obsm["X_scgpt_integrated"], out.obsm["X_scgpt_integrated"][::2], atol=1e-5)


# -- balanced graph ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bbknn():
    return pytest.importorskip("bbknn.matrix")


def test_each_cell_has_neighbours_in_every_batch(bbknn, scfoundation, with_empty_cell, tmp_path):
    cells = with_empty_cell
    integrate(cells, scfoundation, method="bbknn")
    z, key = cells.obsm["X_scfoundation_integrated"], "scfoundation_integrated_neighbors"
    assert np.isnan(z).all(1).nonzero()[0].tolist() == [4]
    graph = cells.uns[key]
    assert graph["params"]["use_rep"] == "X_scfoundation_integrated"
    assert graph["params"]["n_pcs"] == z.shape[1]
    distances = cells.obsp[graph["distances_key"]]
    connectivities = cells.obsp[graph["connectivities_key"]]
    assert distances.shape == connectivities.shape == (cells.n_obs, cells.n_obs)
    assert distances[4].nnz == connectivities[4].nnz == connectivities[:, [4]].nnz == 0
    np.testing.assert_allclose((connectivities - connectivities.T).toarray(), 0, atol=1e-6)
    batches = cells.obs["batch"].to_numpy()
    for cell in (0, 1, 20):
        found = distances[cell].indices
        apart = np.linalg.norm(z - z[cell], axis=1)
        for batch in "abc":
            own = np.flatnonzero((batches == batch) & np.isfinite(apart) & (np.arange(len(z)) != cell))
            nearest = own[np.argsort(apart[own])][: 2 if batch == batches[cell] else 3]
            assert set(nearest) <= set(found), "the cell itself is one of three in its own batch"
    np.testing.assert_allclose(distances[0].data, np.linalg.norm(z - z[0], axis=1)[distances[0].indices], rtol=1e-4)
    sc.tl.leiden(cells, neighbors_key=key, flavor="igraph", n_iterations=2)
    sc.tl.umap(cells, neighbors_key=key, maxiter=5)
    assert cells.obsm["X_umap"].shape == (cells.n_obs, 2)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert (again.obsp[graph["connectivities_key"]] != connectivities).nnz == 0


def test_options_of_the_graph(bbknn, scgpt, cells):
    integrate(cells, scgpt, method="bbknn", bbknn={"neighbors_within_batch": 2}, key_added="joint")
    assert cells.uns["joint_neighbors"]["params"]["n_neighbors"] == 6
    first = cells.obsp["joint_neighbors_connectivities"].copy()
    integrate(cells, scgpt, method="bbknn", bbknn={"neighbors_within_batch": 2}, key_added="joint")
    assert (first != cells.obsp["joint_neighbors_connectivities"]).nnz == 0
    cells.obs["batch"] = np.where(np.arange(cells.n_obs) < 2, "few", cells.obs["batch"])
    with pytest.raises(ValueError, match=r"batch few in obs\['batch'\] has 2 cells"):
        integrate(cells, scgpt, method="bbknn")


def test_a_batch_whose_cells_are_not_known_is_too_small_for_a_graph(bbknn, scgpt, cells):
    counts = cells.X.tolil()
    counts[6::3] = 0  # two cells of batch a are left
    cells.X = counts.tocsr()
    with pytest.raises(ValueError, match="batch a"):
        integrate(cells, scgpt, method="bbknn")


def test_the_package_is_named_if_it_is_missing(scgpt, cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "bbknn.matrix", None)
    with pytest.raises(scfm.MissingExtraError, match=r"pip install 'scfm\[bbknn\]'"):
        integrate(cells, scgpt, method="bbknn")


# -- fine-tuning ---------------------------------------------------------------------------------------------------------


def test_fine_tuning(model, with_empty_cell, tmp_path):
    cells = with_empty_cell
    cells.uns["mine"], before = 1, cells.X.copy()
    integrate(cells, model, method="finetune", train=TRAIN, n_top_genes=30, save_model=tmp_path / "model", rng=3)
    key = f"X_{model.kind}_integrated"
    z = cells.obsm[key]
    assert np.isnan(z).all(1).nonzero()[0].tolist() == [4]
    assert set(cells.uns) == {"mine", f"{model.kind}_integrated"}, "no trace of the setup is left"
    assert list(cells.obs.columns) == ["batch"]
    assert (before != cells.X).nnz == 0
    params = cells.uns[f"{model.kind}_integrated"]["params"]
    assert params["objective"] == ("paper" if model.integrates else "adversarial")
    assert (params["epochs"], params["n_top_genes"], params["rng"]) == (1, 30, 3)
    trained = BatchIntegrator.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_allclose(trained.get_latent_representation(cells), z, atol=1e-6)
    untrained = integrate(cells, model, copy=True).obsm[key]
    assert untrained.shape != z.shape or np.nanmax(np.abs(untrained - z)) > 1e-5
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    integrate(backed, model, method="finetune", train=TRAIN, n_top_genes=30, key_added="again", rng=3)
    np.testing.assert_allclose(backed.obsm["again"], z, atol=1e-5)
    assert set(backed.uns) == {"mine", f"{model.kind}_integrated", "again"}


def test_arguments_of_the_class(scgpt, cells):
    options = {"method": "finetune", "train": TRAIN, "objective": "adversarial"}
    integrate(cells, scgpt, **options, integrator={"options": {"adversary_weight": 0.5}, "genes": ["GENE1", "GENE2"]})
    params = cells.uns["scgpt_integrated"]["params"]
    assert params["objective"] == "adversarial"
    assert params["loss_options"] == {"adversary_weight": 0.5}
    assert params["n_top_genes"] == 2
    # a setup of the user's own survives
    BatchIntegrator.setup_anndata(cells, batch_key="batch")
    model = BatchIntegrator(cells, checkpoint=scgpt, device="cpu")
    before = dict(cells.uns)
    integrate(cells, scgpt, **options)
    assert {name: value for name, value in cells.uns.items() if "_scvi" in name} == {
        name: value for name, value in before.items() if "_scvi" in name
    }
    model.train(enable_progress_bar=False, **TRAIN)
    part = cells[::2]
    integrate(part, scgpt, **options)
    assert part.obsm["X_scgpt_integrated"].shape == (19, 16)


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_wrong_arguments(scgpt, cells):
    for options, error, message in (
        ({"method": "harmony"}, ValueError, "method must be one of 'zero-shot', 'bbknn', 'finetune'"),
        ({"train": TRAIN}, ValueError, "train= belongs to method='finetune'"),
        ({"save_model": "x", "method": "bbknn"}, ValueError, "save_model= belongs to method='finetune'"),
        ({"bbknn": {}}, ValueError, "bbknn= belongs to method='bbknn'"),
        ({"layer": "raw"}, KeyError, "no layer 'raw'"),
        ({"temperature": 1}, TypeError, "no option 'temperature'"),
        ({"pooling": "sum"}, ValueError, "no pooling 'sum'"),
        ({"n_top_genes": 0}, ValueError, "must be positive"),
        ({"method": "finetune", "train": {"max_epochs": 1, "train_size": 2.0}}, ValueError, "no shares"),
    ):
        with pytest.raises(error, match=message):
            integrate(cells, scgpt, **options)
        assert not cells.obsm
        assert not cells.uns, "nothing is left of a run that failed"


@pytest.mark.parametrize("method", ["zero-shot", "bbknn", "finetune"])
def test_batches_that_cannot_be_integrated(scgpt, cells, method):
    with pytest.raises(KeyError, match="no column 'donor'; there are batch"):
        scfm.tl.integrate(cells, scgpt, batch_key="donor", method=method)
    one = cells[cells.obs["batch"] == "a"].copy()
    with pytest.raises(ValueError, match="one batch only"):
        integrate(one, scgpt, method=method)
    cells.obs.loc["cell3", "batch"] = np.nan
    with pytest.raises(ValueError, match="1 cells have no batch"):
        integrate(cells, scgpt, method=method)


def test_models_that_cannot(scgpt, cells, monkeypatch):
    monkeypatch.setattr(type(scgpt), "capabilities", frozenset({"gene_embeddings"}))
    for method in ("zero-shot", "finetune"):
        with pytest.raises(scfm.UnsupportedError, match="cell embeddings. Models that can"):
            integrate(cells, scgpt, method=method)
    monkeypatch.setattr(type(scgpt), "capabilities", frozenset({"embeds"}))
    with pytest.raises(scfm.UnsupportedError, match="pre-training objective. Models that can"):
        integrate(cells, scgpt, method="finetune", objective="adversarial")


def test_the_record_names_the_weights_that_training_started_from(make_data):
    cells = make_data(30)
    cells.var_names = ["CD3D", "CD3E", "MS4A1", "NKG7", "GNLY", "LYZ", "CD14", "PPBP", *cells.var_names[8:]]
    start = scfm.load("scgpt-mini").provenance.sha256
    train = {"max_epochs": 1, "accelerator": "cpu", "batch_size": 10}
    integrate(cells, "scgpt-mini", method="finetune", train=train)
    assert cells.uns["scgpt-mini_integrated"]["checkpoint"]["sha256"] == start != ""
