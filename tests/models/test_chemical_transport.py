"""Cells after a treatment: the class around CellOT."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import scfm
from scfm.models import ChemicalTransport

N_GENES = 30
SHORT = {
    "max_iter": 6,
    "check_every": 3,
    "batch_size": 32,
    "inner_iter": 2,
    "codec_epochs": 2,
    "start_steps": 5,
    "progress": False,
}
TINY = {"latent": 5, "hidden": 16, "potential": (8, 8), "seed": 1}
METHODS = {"transport", "latent shift", "mean shift", "no change", "decoded truth"}


def treated(n: int = 120, seed: int = 0, genes: list[str] | None = None) -> anndata.AnnData:
    """Two cell types, of which a treatment raises the first five genes."""
    rng = np.random.default_rng(seed)
    kind, treatment = np.arange(n) % 2, np.arange(n) // 2 % 3
    means = np.random.default_rng(7).gamma(1.0, 2.0, size=(2, N_GENES))[kind]
    means[:, :5] += 6.0 * (treatment == 1)[:, None]
    means[:, 5:10] += 6.0 * (treatment == 2)[:, None]
    obs = pd.DataFrame(
        {
            "condition": np.array(["control", "up", "other"])[treatment],
            "kind": np.array(["T", "B"])[kind],
            "split": np.where(np.arange(n) % 10 == 9, "test", "train"),
        },
        index=[f"c{i}" for i in range(n)],
    )
    names = [f"GENE{i}" for i in range(N_GENES)] if genes is None else genes
    return anndata.AnnData(
        sparse.csr_matrix(rng.poisson(means).astype(np.float32)), obs=obs, var=pd.DataFrame(index=names)
    )


def log_normalised(adata: anndata.AnnData) -> np.ndarray:
    copy = anndata.AnnData(adata.X.copy())
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    return copy.X.toarray()


@pytest.fixture(scope="module")
def adata():
    data = treated()
    ChemicalTransport.setup_anndata(data, "condition", split_key="split")
    return data


@pytest.fixture(scope="module")
def trained(adata):
    model = ChemicalTransport(adata, **TINY)
    model.train(**SHORT)
    return model


def test_every_treatment_gets_a_transport(adata, trained):
    assert list(trained.perturbable) == ["other", "up"]
    parts = trained.train_indices, trained.validation_indices, trained.test_indices
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(120))
    np.testing.assert_array_equal(adata.obs["split"].iloc[trained.test_indices], "test")
    assert {"loss_g_up", "loss_f_up", "MMD_validation_up", "MMD_validation_other"} <= set(trained.history)
    assert list(trained.history["loss_g_up"].index) == [3, 6]
    # the strongest markers are the genes that the treatment raises
    assert set(trained._marker_order["up"][:5]) == set(range(5))


def test_predictions_belong_to_their_cells(adata, trained):
    controls = adata[adata.obs["condition"] == "control"]
    values = trained.predict("up")
    assert values.shape == controls.shape
    assert values.dtype == np.float32
    order = np.random.default_rng(0).permutation(controls.n_obs)
    np.testing.assert_allclose(trained.predict("up", controls[order]), values[order], atol=1e-5)
    np.testing.assert_allclose(trained.predict("up", controls[:3], batch_size=2), values[:3], atol=1e-5)
    genes = np.random.default_rng(1).permutation(N_GENES)
    np.testing.assert_allclose(trained.predict("up", controls[:, genes]), values[:, genes], atol=1e-5)
    np.testing.assert_array_equal(trained.predict("up"), values)
    blocks = list(trained.iter_predictions(["up", "other"], controls, batch_size=15))
    assert [(name, rows.start, rows.stop) for name, rows, _ in blocks] == [
        (name, start, min(start + 15, 40)) for name in ("up", "other") for start in (0, 15, 30)
    ]
    np.testing.assert_allclose(np.concatenate([block for name, _, block in blocks if name == "up"]), values, atol=1e-5)
    assert trained.predict("up", controls[:0]).shape == (0, N_GENES)


def test_table_of_scores(adata, trained):
    table = trained.evaluate(n_markers=5)
    assert set(table["method"]) == METHODS
    assert set(table["genes"]) == {"all", "top 5"}
    assert np.isfinite(table[["l2", "Pearson", "MMD"]].to_numpy()).all()
    test = adata[trained.test_indices]
    log, condition = log_normalised(test), test.obs["condition"].to_numpy()
    rows = table.query("perturbation == 'up' and genes == 'all'").set_index("method")
    distance = np.linalg.norm(log[condition == "up"].mean(0) - log[condition == "control"].mean(0))
    assert rows.loc["no change", "l2"] == pytest.approx(distance, rel=1e-5)
    assert rows.loc["mean shift", "l2"] < rows.loc["no change", "l2"]
    grouped = trained.evaluate(adata, groupby="kind", perturbations=["up"])
    assert set(grouped["group"]) == {"T", "B"}
    assert set(grouped["perturbation"]) == {"up"}
    assert (grouped["n_control"] == 20).all()


@pytest.mark.parametrize("space", ["pca", "autoencoder", "obsm", "model", "fine-tuned"])
def test_save_and_load(space, tmp_path, capsys):
    backbone = scfm.load("cellfm-mini", device="cpu") if space in ("model", "fine-tuned") else None
    genes = None
    if backbone is not None:
        genes = list(backbone.vocab.names[backbone.vocab.is_gene][: N_GENES - 1]) + ["NOGENE"]
    adata = treated(36, genes=genes)
    adata.obsm["X_some"] = log_normalised(adata)[:, :7]
    ChemicalTransport.setup_anndata(adata, "condition")
    kind = {"obsm": {"use_rep": "X_some"}, "model": {"model": backbone}}.get(space, {"space": space})
    if space == "fine-tuned":
        kind = {"model": backbone, "fine_tune": True}
        before = backbone.module.cls_token.detach().clone()
    model = ChemicalTransport(adata, **kind, **TINY)
    with pytest.raises(RuntimeError, match="not trained"):
        model.predict("up")
    capsys.readouterr()
    model.train(**SHORT | {"codec_epochs": 1}, test_size=0.2)
    # once, not for each batch
    assert capsys.readouterr().err.count("1 unknown genes of the panel") == (backbone is not None)
    assert len(model.test_indices) == 6
    values = model.predict("up")
    assert np.isfinite(values).all()
    if space == "fine-tuned":
        assert not np.array_equal(model.backbone.module.cls_token.detach(), before)
        np.testing.assert_array_equal(backbone.module.cls_token.detach(), before)
    model.save(tmp_path / "transport")
    loaded = ChemicalTransport.load(tmp_path / "transport", adata)
    np.testing.assert_allclose(loaded.predict("up"), values, atol=1e-5)
    rows = model.test_indices
    np.testing.assert_array_equal(loaded.test_indices, rows)
    without = ChemicalTransport.load(tmp_path / "transport", adata=False)
    codes = without.get_latent_representation(adata)
    assert codes.shape == (36, 5)
    np.testing.assert_allclose(codes, model.get_latent_representation(), atol=1e-5)
    moved = without.get_latent_representation(adata, "up")
    assert np.abs(moved - codes).max() > 0
    with pytest.raises(ValueError, match="loaded without data"):
        without.predict("up")


def test_tools_for_genes_refuse_treatments(adata, trained):
    controls = adata[adata.obs["condition"] == "control"].copy()
    with pytest.raises(TypeError, match=r"ChemicalTransport is no model for perturbed genes.*predict"):
        scfm.tl.perturb(controls, ["up"], trained)


def test_the_same_seed_gives_the_same_model(adata, trained):
    again = ChemicalTransport(adata, **TINY)
    again.train(**SHORT)
    np.testing.assert_array_equal(again.predict("up"), trained.predict("up"))


def test_cells_without_anything_known_are_nan():
    backbone = scfm.load("scgpt-mini", device="cpu")
    genes = list(backbone.vocab.names[backbone.vocab.is_gene][: N_GENES - 1]) + ["NOGENE"]
    adata = treated(60, genes=genes)
    counts = adata.X.toarray()
    counts[6] = 0
    counts[6, -1] = 3
    adata.X = sparse.csr_matrix(counts)
    ChemicalTransport.setup_anndata(adata, "condition")
    model = ChemicalTransport(adata, backbone, **TINY)
    model.train(**SHORT)
    values = model.predict("up", adata)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(values).any(1)), [6])
    assert 6 not in np.concatenate([model.train_indices, model.validation_indices])


def test_errors(adata, trained):
    with pytest.raises(ValueError, match="has no cells called 'DMSO'; it has control, other, up"):
        ChemicalTransport.setup_anndata(treated(), "condition", control="DMSO")
    with pytest.raises(ValueError, match="no treated cells"):
        ChemicalTransport.setup_anndata(adata[adata.obs["condition"] == "control"].copy(), "condition")
    with pytest.raises(KeyError, match="no column 'nothing'"):
        ChemicalTransport.setup_anndata(treated(), "condition", split_key="nothing")
    with pytest.raises(ValueError, match="give one of them"):
        ChemicalTransport(adata, "scgpt-mini", space="pca")
    with pytest.raises(ValueError, match="space must be"):
        ChemicalTransport(adata, space="umap")
    with pytest.raises(ValueError, match="fine_tune=True trains"):
        ChemicalTransport(adata, fine_tune=True)
    with pytest.raises(KeyError, match="obsm has no slot 'X_none'"):
        ChemicalTransport(adata, use_rep="X_none")
    with pytest.raises(ValueError, match="has not learned the treatment 'IFN'; it knows other, up"):
        trained.predict("IFN")
    with pytest.raises(ValueError, match="need the 30 genes of the model, but they lack GENE29"):
        trained.predict("up", adata[:, :29])
    with pytest.raises(ValueError, match="start must be"):
        trained.train(start="somewhere")
    with pytest.raises(ValueError, match="no shares"):
        ChemicalTransport(adata, **TINY).train(validation_size=0.6, test_size=0.5)
    all_train = treated()
    all_train.obs["split"] = "train"
    ChemicalTransport.setup_anndata(all_train, "condition", split_key="split")
    model = ChemicalTransport(all_train, **TINY)
    model.train(**SHORT)
    with pytest.raises(ValueError, match="no cells are set aside"):
        model.evaluate()
