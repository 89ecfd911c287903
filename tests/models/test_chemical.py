"""Signatures of drugs: the class around DeepCE."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi

pytest.importorskip("rdkit")

import scfm
from scfm.models import ChemicalPerturbation

SMILES = ["CC(=O)OC1=CC=CC=C1C(=O)O", "CCO", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "CCN", "c1ccccc1O", "CC(C)O"]
SMALL = {"dim": 8, "hidden": 8, "heads": 2, "layers": 1, "feedforward": 16, "convolutions": (4,)}
GENES = ["CD3D", "CD79A", "LYZ", "NKG7", "MS4A1", "GNLY", "CST3", "NOGENE"]


def signatures(seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    drug = np.repeat(np.arange(len(SMILES)), 4)
    dose = np.tile([0.1, 1.0, 10.0, 10.0], len(SMILES))
    profiles = rng.standard_normal((len(SMILES), len(GENES)))
    values = profiles[drug] * np.log10(dose * 100)[:, None] + 0.1 * rng.standard_normal((len(drug), len(GENES)))
    obs = pd.DataFrame(
        {
            "smiles": np.array(SMILES)[drug],
            "dose": dose,
            "line": np.array(["A", "B"])[np.arange(len(drug)) % 2],
            "split": np.array(["train", "train", "train", "train", "dev", "test"])[drug],
        },
        index=[f"s{i}" for i in range(len(drug))],
    )
    return anndata.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def adata():
    data = signatures()
    ChemicalPerturbation.setup_anndata(data, dose_key="dose", cell_line_key="line", split_key="split")
    return data


@pytest.fixture(scope="module")
def trained(adata):
    model = ChemicalPerturbation(adata, network=SMALL, seed=1)
    model.train(max_epochs=3, batch_size=8, lr=2e-2, progress=False)
    return model


def test_trains_on_the_split_and_predicts_anything(adata, trained, tmp_path):
    assert isinstance(trained, scvi.model.base.BaseModelClass)
    assert trained.doses == ("0.1", "1", "10")
    assert trained.cell_lines == ("A", "B")
    np.testing.assert_array_equal(trained.train_indices, np.arange(16))
    np.testing.assert_array_equal(trained.validation_indices, np.arange(16, 20))
    np.testing.assert_array_equal(trained.test_indices, np.arange(20, 24))
    assert {"train_loss_epoch", "Pearson_validation", "RMSE_validation"} <= set(trained.history)
    assert trained.history["train_loss_epoch"].iloc[-1, 0] < trained.history["train_loss_epoch"].iloc[0, 0]
    whole = trained.predict()
    assert whole.shape == (24, 8)
    assert whole.index.equals(adata.obs_names)
    order = np.random.default_rng(0).permutation(24)
    pd.testing.assert_frame_equal(trained.predict(adata[order]), whole.iloc[order], rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(trained.predict(adata.obs, batch_size=1), whole, rtol=1e-5, atol=1e-6)
    new = trained.predict(["CCCC", SMILES[1]], dose=[3.0, 1], cell_line="B")
    assert list(new.index) == ["CCCC", SMILES[1]]
    np.testing.assert_allclose(new.iloc[1], whole.iloc[5], atol=1e-6)
    assert set(trained.score()) >= {"RMSE", "Pearson", "Spearman"}

    trained.save(tmp_path / "drugs")
    loaded = ChemicalPerturbation.load(tmp_path / "drugs", adata=False)
    pd.testing.assert_frame_equal(loaded.predict(adata), whole, rtol=1e-6, atol=1e-7)
    assert loaded.is_trained
    assert loaded.doses == trained.doses
    pd.testing.assert_frame_equal(loaded.history["train_loss_epoch"], trained.history["train_loss_epoch"])
    with pytest.raises(ValueError, match="loaded without data"):
        loaded.predict()
    with pytest.raises(ValueError, match="loaded without data"):
        loaded.train()
    with pytest.raises(FileExistsError):
        trained.save(tmp_path / "drugs")
    with pytest.raises(ValueError, match="other genes"):
        ChemicalPerturbation.load(tmp_path / "drugs", signatures()[:, ::-1].copy())


def test_the_same_seed_gives_the_same_model(adata, trained):
    again = ChemicalPerturbation(adata, network=SMALL, seed=1)
    again.train(max_epochs=3, batch_size=8, lr=2e-2, progress=False)
    np.testing.assert_array_equal(again.predict(), trained.predict())


def test_drugs_to_validate_on_are_whole_drugs():
    data = signatures()
    ChemicalPerturbation.setup_anndata(data, dose_key="dose")
    model = ChemicalPerturbation(data, network=SMALL, precision="float64")
    model.train(max_epochs=1, validation_size=0.3, progress=False)
    held_out, rest = (set(data.obs["smiles"].iloc[rows]) for rows in (model.validation_indices, model.train_indices))
    assert held_out
    assert not held_out & rest
    assert model.cell_lines == ()
    with pytest.raises(ValueError, match="no samples are set aside"):
        model.score()
    with pytest.raises(ValueError, match="takes no cell_line="):
        model.predict(["CCO"], dose=1.0, cell_line="A")


@pytest.mark.parametrize("source", ["model", "table"])
def test_vectors_of_genes(adata, source):
    backbone = scfm.load("scgpt-mini", device="cpu")
    if source == "model":
        model = ChemicalPerturbation(adata, backbone, network=SMALL)
    else:
        table = backbone.gene_embeddings().numpy()
        ids = backbone.vocab.match(GENES[:-1]).ids
        model = ChemicalPerturbation(adata, gene_vectors=pd.DataFrame(table[ids], index=GENES[:-1]), network=SMALL)
    vectors = model.module.genes.numpy()
    assert list(model.unknown_genes) == ["NOGENE"]
    np.testing.assert_array_equal(vectors[-1], 0)
    expected = backbone.gene_embeddings().numpy()[backbone.vocab.match(GENES[:-1]).ids]
    np.testing.assert_allclose(vectors[:-1], expected, rtol=1e-6)
    assert not any(parameter is model.module.genes for parameter in model.module.parameters())


def test_errors(adata, trained):
    for wrong, message in (
        ({"dose": 1000.0, "cell_line": "A"}, "knows no dose 1000; it has seen 0.1, 1, 10"),
        ({"dose": 1.0, "cell_line": "C"}, "knows no cell line C"),
        ({"dose": [1.0, 1.0], "cell_line": "A"}, "has 2 values for 1 drugs"),
        ({"dose": 1.0}, "needs cell_line="),
    ):
        with pytest.raises(ValueError, match=message):
            trained.predict(["CCO"], **wrong)
    with pytest.raises(ValueError, match="cannot read 1 SMILES: 'C1C'"):
        trained.predict(["C1C"], dose=1.0, cell_line="A")
    with pytest.raises(ValueError, match="go with a list of SMILES"):
        trained.predict(adata, dose=1.0)
    with pytest.raises(KeyError, match="no column 'line'"):
        trained.predict(adata.obs.drop(columns="line"))
    with pytest.raises(ValueError, match="preset must be"):
        trained.train(preset="best")
    with pytest.raises(KeyError, match="no column 'molecule'"):
        ChemicalPerturbation.setup_anndata(signatures(), smiles_key="molecule")
    with pytest.raises(ValueError, match="none of the genes has a vector"):
        ChemicalPerturbation(adata, gene_vectors=pd.DataFrame(np.ones((2, 3)), index=["X1", "X2"]))
    bad = signatures()
    bad.obs["smiles"] = [*SMILES[:1] * 23, ""]
    ChemicalPerturbation.setup_anndata(bad)
    with pytest.raises(ValueError, match="1 samples have no SMILES"):
        ChemicalPerturbation(bad)
    bad.obs["split"] = "both"
    ChemicalPerturbation.setup_anndata(bad, split_key="split")
    bad.obs["smiles"] = SMILES[0]
    with pytest.raises(ValueError, match=r"has to hold 'train', 'validation', 'test'; it holds 'both'"):
        ChemicalPerturbation(bad, network=SMALL).train()
