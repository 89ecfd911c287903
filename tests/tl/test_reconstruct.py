"""``tl.reconstruct``: predicted expression as sparse layers, tables of chosen genes, and files."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from scipy import sparse

from scfm import engine
from scfm.data import open_source
from scfm.tl import reconstruct


def predictions(adata, model, genes=None) -> dict[tuple[int, int], float]:
    out = {}
    for i in range(adata.n_obs):
        tokens = model.tokenize(adata.X[i], list(adata.var_names))
        for rows in model.iter_reconstruction(tokens, genes):
            out |= {(i, int(gene)): float(value) for gene, value in zip(rows.genes, rows.values, strict=True)}
    return out


def test_expressed_genes_become_a_sparse_layer(adata, model):
    # scGPT keeps 30 tokens of longer cells, so that some expressed genes have no prediction
    assert reconstruct(adata, model, progress=False) is None
    table = adata.layers[f"{model.name}_reconstructed"]
    assert sparse.isspmatrix_csr(table)
    assert table.dtype == np.float32
    expected = predictions(adata, model)
    assert table.nnz == len(expected)
    for (cell, gene), value in expected.items():
        column = adata.var_names.get_loc(model.vocab.names[gene])
        assert table[cell, column] == pytest.approx(value, abs=1e-5)
        assert adata.X[cell, column] > 0
    record = adata.uns[f"{model.name}_reconstructed"]
    assert record["params"]["scale"] == model.expression_scale


def test_all_genes_become_a_dense_layer(adata, model):
    reconstruct(adata, model, genes="all", progress=False)
    layer = adata.layers[f"{model.name}_reconstructed"]
    assert layer.shape == adata.shape
    assert np.isnan(layer[:, 50:]).all()
    expected = predictions(adata[:2], model, genes=[model.vocab["GENE8"]])
    assert layer[1, 8] == pytest.approx(expected[1, model.vocab["GENE8"]], abs=1e-5)
    assert np.isfinite(layer[:, :50]).all()


def test_chosen_genes_become_a_table(adata, model):
    reconstruct(adata, model, genes="all", key_added="whole", progress=False)
    narrow = adata[:, [*range(10), 20]].copy()
    del narrow.layers["whole"]
    # counts of genes that are gone would change what the model sees
    reconstruct(adata, model, genes=["GENE20", "GENE3"], key_added="some", batch_size=2, progress=False)
    table = adata.obsm["some"]
    assert list(table.columns) == ["GENE20", "GENE3"]
    assert list(table.index) == list(adata.obs_names)
    np.testing.assert_allclose(table.to_numpy(), adata.layers["whole"][:, [20, 3]], atol=1e-5)
    # genes of the model that the data lacks can be predicted too
    reconstruct(narrow, model, genes=["GENE45"], progress=False)
    assert np.isfinite(narrow.obsm[f"{model.name}_reconstructed"]["GENE45"]).all()


def test_empty_cells_have_no_prediction(adata, model):
    counts = adata.X.tolil()
    counts[2] = 0
    adata.X = counts.tocsr()
    reconstruct(adata, model, genes=["GENE1"], key_added="some", progress=False)
    assert list(np.flatnonzero(adata.obsm["some"]["GENE1"].isna())) == [2]
    reconstruct(adata, model, key_added="expressed", progress=False)
    assert adata.layers["expressed"][2].nnz == 0


def test_a_file_can_take_the_result(adata, model, tmp_path):
    reconstruct(adata, model, genes="all", key_added="whole", progress=False)
    whole = adata.layers.pop("whole")
    reconstruct(adata, model, genes="all", out=tmp_path / "x.zarr", block_size=7, progress=False)
    np.testing.assert_allclose(zarr.open_array(tmp_path / "x.zarr")[...], whole, atol=1e-5)
    assert not adata.layers


def test_columns_that_share_a_gene_get_the_same_prediction(adata, model):
    adata.var_names = [*adata.var_names[:-1], "GENE1"]
    reconstruct(adata, model, progress=False)
    table = adata.layers[f"{model.name}_reconstructed"].toarray()
    np.testing.assert_array_equal(table[:, 1], table[:, -1])


def test_results_can_be_written(adata, model, tmp_path):
    reconstruct(adata, model, progress=False)
    reconstruct(adata, model, genes=["GENE1"], progress=False)
    adata.write_h5ad(tmp_path / "x.h5ad")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genes": "some"}, ValueError, "'expressed', 'all'"),
        ({"genes": ["OTHER1"]}, KeyError, "does not know OTHER1"),
        ({"out": "x"}, ValueError, "genes='all'"),
        ({"duplicates": "keep"}, ValueError, "duplicates='sum'"),
    ],
)
def test_wrong_arguments(adata, scgpt, arguments, error, message):
    with pytest.raises(error, match=message):
        reconstruct(adata, scgpt, **arguments)


def test_a_result_too_large_for_memory_is_refused(adata, scgpt, monkeypatch):
    monkeypatch.setattr("scfm.engine._expression._MEMORY_BYTES", 1000)
    with pytest.raises(MemoryError, match="out="):
        reconstruct(adata, scgpt, genes="all")


@pytest.mark.parametrize("batch_size", [None, 4])
def test_other_genes_of_each_cell_are_the_same_numbers(adata, model, batch_size):
    counts = adata.X.tolil()
    counts[3] = 0
    adata.X = counts.tocsr()
    reconstruct(adata, model, genes="all", key_added="whole", progress=False)
    chosen = sparse.random_array(
        (adata.n_obs, len(model.vocab)), density=0.2, rng=np.random.default_rng(1), format="csr"
    )
    known = np.zeros(len(model.vocab), dtype=bool)
    columns = np.array([model.vocab[f"GENE{i}"] for i in range(50)])
    known[columns] = True
    chosen = sparse.csr_matrix(chosen.multiply(known))
    chosen.eliminate_zeros()
    chosen.sort_indices()
    match = model.vocab.match(list(adata.var_names))
    with open_source(adata) as source:
        task = engine.Task(model, source, match, {})
        values = engine.predict_at(task, chosen, batch_size=batch_size, progress=False)
        nothing = engine.predict_at(task, sparse.csr_matrix(chosen.shape), progress=False)
    assert values.shape == (chosen.nnz,)
    assert nothing.shape == (0,)
    whole = np.full(chosen.shape, np.nan, dtype=np.float32)
    whole[:, columns] = adata.layers["whole"][:, :50]
    np.testing.assert_allclose(values, whole[chosen.nonzero()], atol=1e-5)
    assert np.isnan(values[chosen.indptr[3] : chosen.indptr[4]]).all()
    assert np.isfinite(values[: chosen.indptr[3]]).all()
