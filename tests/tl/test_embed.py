"""``tl.embed``: what it writes, and that nothing but a cell's own counts changes its embedding."""

from __future__ import annotations

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.backbones import random_copy
from scfm.tl import embed

few_examples = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def embedding(adata, model, **arguments) -> np.ndarray:
    out = embed(adata, model, copy=True, progress=False, **arguments)
    return out.obsm[f"X_{model.name}"] if isinstance(out, ad.AnnData) else np.asarray(out)


# -- what is written -----------------------------------------------------------------------------------------------------


def test_results_and_record(adata, model):
    before = adata.copy()
    assert embed(adata, model) is None
    assert list(adata.obsm) == [f"X_{model.name}"]
    assert list(adata.uns) == [model.name]
    slot = adata.obsm[f"X_{model.name}"]
    assert slot.dtype == np.float32
    assert slot.shape == (adata.n_obs, model.embedding_dim())
    assert np.isfinite(slot).all()
    record = adata.uns[model.name]
    assert record["params"]["pooling"] == model.default_pooling
    assert record["params"]["rng"] == 0
    assert record["checkpoint"]["id"] == model.provenance.id
    assert record["genes"] == {"matched": 50, "missing": 6, "renamed": 0, "fraction": 50 / 56}
    assert record["scfm_version"] == scfm.__version__
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    assert list(adata.obs_names) == list(before.obs_names)
    assert list(adata.var_names) == list(before.var_names)


def test_the_network_of_the_model_is_what_is_run(adata, model):
    tokens = model.tokenize(adata.X, list(adata.var_names))
    for pooling in model.poolings:
        options = model.pooling_options(pooling, model.vocab.match(adata.var_names))
        expected = model.embed(tokens, pooling=pooling, **options).numpy()
        np.testing.assert_allclose(embedding(adata, model, pooling=pooling), expected, atol=1e-6)


def test_key_added_and_copy(adata, scgpt):
    out = embed(adata, scgpt, key_added="mine", copy=True)
    assert not adata.obsm
    assert not adata.uns
    assert list(out.obsm) == list(out.uns) == ["mine"]


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_results_survive_writing(adata, scgpt, tmp_path, store):
    embed(adata, scgpt, tie_break="left", batch_size=3)
    getattr(adata, f"write_{store}")(tmp_path / f"out.{store}")
    again = getattr(ad, f"read_{store}")(tmp_path / f"out.{store}")
    np.testing.assert_array_equal(again.obsm["X_scgpt"], adata.obsm["X_scgpt"])
    record = again.uns["scgpt"]
    assert record["params"]["tokenize_options"]["tie_break"] == "left"
    assert set(record) == {"params", "checkpoint", "genes", "scfm_version"}
    assert float(record["genes"]["fraction"]) == 50 / 56


def test_a_view_becomes_a_copy_and_the_original_stays(adata, scgpt):
    whole = embedding(adata, scgpt)
    view = adata[5:20, ::-1]
    with pytest.warns(ad.ImplicitModificationWarning):
        embed(view, scgpt)
    assert not adata.obsm
    assert not view.is_view
    np.testing.assert_allclose(view.obsm["X_scgpt"], whole[5:20], atol=1e-5)


def test_log_lines(adata, scgpt, capsys):
    embed(adata, scgpt)
    lines = capsys.readouterr().err
    for part in ("embedding 37 cells", "50 of 56 genes (89.3%)", "finished (0:00:", "'X_scgpt', cell embedding"):
        assert part in lines
    scfm.settings.verbosity = 1
    embed(adata, scgpt)
    assert capsys.readouterr().err == ""


def test_seed_is_recorded_and_repeats_the_run(adata, scgpt):
    out = embed(adata, scgpt, rng=np.random.default_rng(3), copy=True)
    seed = int(out.uns["scgpt"]["params"]["rng"])
    np.testing.assert_array_equal(embedding(adata, scgpt, rng=seed), out.obsm["X_scgpt"])
    assert not np.allclose(embedding(adata, scgpt, rng=seed + 1), out.obsm["X_scgpt"])
    with pytest.raises(TypeError, match="rng"):
        embed(adata, scgpt, rng="1")


def test_global_random_state_is_neither_used_nor_changed(adata, scgpt):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = embedding(adata, scgpt)
    drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert drawn == (torch.rand(1), np.random.rand())  # noqa: NPY002
    np.testing.assert_array_equal(embedding(adata, scgpt), first)


def test_options_of_the_tokenizer(adata, scgpt, scfoundation):
    left, random = embedding(adata, scgpt, tie_break="left"), embedding(adata, scgpt)
    assert not np.allclose(left, random)
    with pytest.raises(TypeError, match="scfoundation has no option 'tie_break'; its tokenizer takes .*target"):
        embed(adata, scfoundation, tie_break="left")
    with pytest.raises(TypeError, match="scfoundation has no option 'draws'"):
        embed(adata, scfoundation, draws=[1])
    with pytest.raises(ValueError, match="scgpt has no pooling 'mean'; choose one of cls"):
        embed(adata, scgpt, pooling="mean")


def test_options_per_cell(adata, scfoundation):
    logs = adata.copy()
    totals = np.asarray(adata.X.sum(1)).ravel()
    logs.X = sparse.csr_matrix(np.log1p(adata.X.toarray() / totals[:, None] * 1e4))
    options = {"pre_normalized": "A", "total_counts": totals}
    whole = embedding(logs, scfoundation, **options)
    parts = embedding(logs, scfoundation, **options, block_size=5)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    with pytest.raises(ValueError, match="total_counts must have one entry for each of the 37 cells"):
        embed(logs, scfoundation, pre_normalized="A", total_counts=totals[:-1])


def test_bulk_counts_are_scaled_to_the_median_of_all_samples(adata, scfoundation):
    whole = embedding(adata, scfoundation, input_type="bulk")
    parts = embedding(adata, scfoundation, input_type="bulk", block_size=4)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_loaded_model_stays_as_it_is_unless_told(adata, scgpt):
    scfm.settings.precision = "bfloat16"
    embed(adata, scgpt)
    assert scgpt.dtype == torch.float32
    assert adata.uns["scgpt"]["params"]["precision"] == "float32"
    embed(adata, scgpt, precision="bfloat16")
    assert adata.uns["scgpt"]["params"]["precision"] == "bfloat16"
    scgpt.to("cpu", "float32")
    with pytest.raises(ValueError, match="loaded already"):
        embed(adata, scgpt, weights="cell")


def test_model_saved_in_a_folder(adata, scgpt, tmp_path):
    scgpt.save(tmp_path / "My model")
    embed(adata, tmp_path / "My model", device="cpu", precision="float32")
    (slot,) = adata.obsm
    assert "/" not in slot
    np.testing.assert_allclose(adata.obsm[slot], embedding(adata, scgpt), atol=1e-6)
    assert len(adata.uns[slot.removeprefix("X_")]["checkpoint"]["sha256"]) == 64


# -- what changes nothing ------------------------------------------------------------------------------------------------


@few_examples
@given(
    batch_size=st.none() | st.integers(1, 40),
    tokens_per_batch=st.none() | st.integers(1, 2000),
    block_size=st.none() | st.integers(1, 40),
)
def test_sizes(adata, model, batch_size, tokens_per_batch, block_size):
    sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
    np.testing.assert_allclose(embedding(adata, model, **sizes), embedding(adata, model), atol=2e-6)


@few_examples
@given(st.permutations(range(37)), st.permutations(range(56)))
def test_order_of_cells_and_genes(adata, model, cells, genes):
    got = embedding(adata[list(cells), list(genes)].copy(), model, block_size=16)
    np.testing.assert_allclose(got, embedding(adata, model)[list(cells)], atol=1e-5)


@few_examples
@given(st.lists(st.integers(0, 36), min_size=1, unique=True))
def test_other_cells(adata, model, cells):
    got = embedding(adata[cells].copy(), model)
    np.testing.assert_allclose(got, embedding(adata, model)[cells], atol=2e-6)


@pytest.mark.parametrize(
    "form",
    [
        sparse.csc_matrix,
        np.asarray,
        sparse.csr_array,
        lambda x: x.astype(np.int64),
        lambda x: sparse.csr_matrix(x.astype(np.float64)),
        lambda x: da.from_array(x, chunks=(10, 20)),
        lambda x: da.from_array(x, chunks=(10, -1)).map_blocks(sparse.csr_matrix),
    ],
    ids=["csc", "dense", "csr_array", "int64", "float64", "dask dense", "dask sparse"],
)
def test_storage_in_memory(adata, model, counts, form):
    expected = embedding(adata, model)
    other = ad.AnnData(form(counts), obs=adata.obs, var=adata.var)
    np.testing.assert_allclose(embedding(other, model, block_size=15), expected, atol=1e-6)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_storage_on_disk(adata, model, counts, form, tmp_path):
    expected = embedding(adata, model)
    ad.AnnData(form(counts), obs=adata.obs, var=adata.var).write_h5ad(tmp_path / "cells.h5ad")
    ad.AnnData(form(counts), obs=adata.obs, var=adata.var).write_zarr(tmp_path / "cells.zarr")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    embed(backed, model, block_size=15)
    np.testing.assert_allclose(backed.obsm[f"X_{model.name}"], expected, atol=1e-6)
    for path in (tmp_path / "cells.h5ad", str(tmp_path / "cells.zarr")):
        np.testing.assert_allclose(embedding(path, model, block_size=15), expected, atol=1e-6)


def test_list_of_files_with_different_genes(adata, model, tmp_path):
    expected = embedding(adata, model)
    first, second = adata[:20].copy(), adata[20:, ::-1].copy()
    seen = np.asarray(first.X.sum(0)).ravel() > 0
    first[:, seen].copy().write_h5ad(tmp_path / "first.h5ad")
    got = embedding([tmp_path / "first.h5ad", second], model, block_size=15)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def without_totals(model) -> dict[str, str]:
    """Options with which genes that the model does not know play no part: scLong counts them into the depth of a cell."""
    return {"normalization": "as_is"} if model.kind == "sclong" else {}


def test_unknown_genes(adata, model):
    options = without_totals(model)
    known = embedding(adata[:, :50].copy(), model, **options)
    np.testing.assert_allclose(embedding(adata, model, **options), known, atol=1e-6)


def test_number_of_threads(adata, model):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = embedding(adata, model)
        torch.set_num_threads(2)
        np.testing.assert_allclose(embedding(adata, model), one, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_names_of_genes(adata, model):
    expected = embedding(adata, model)
    by_id = adata.copy()
    ids = [f"ENSG{i:011d}.{i % 7}" for i in range(50)] + [f"OTHER{i}" for i in range(6)]
    by_id.var_names = ids
    np.testing.assert_allclose(embedding(by_id, model), expected, atol=1e-6)
    mixed = adata.copy()
    mixed.var_names = [ids[i] if i % 3 else name for i, name in enumerate(adata.var_names)]
    np.testing.assert_allclose(embedding(mixed, model), expected, atol=1e-6)
    column = adata.copy()
    column.var["symbol"] = list(adata.var_names)
    column.var_names = [f"row{i}" for i in range(56)]
    np.testing.assert_allclose(embedding(column, model, gene_symbols="symbol"), expected, atol=1e-6)


def test_duplicated_genes_are_summed(adata, model, capsys):
    split = adata.copy()
    half = sparse.csr_matrix(np.floor(adata.X.toarray() / 2))
    split.X = adata.X - half
    twice = ad.AnnData(
        sparse.hstack([split.X, half], format="csr"), obs=adata.obs, var=pd.concat([adata.var, adata.var])
    )
    capsys.readouterr()
    # the largest value of a cell, by which scLong scales by default, may be that of an unknown gene
    options = {"normalization": "log1p_1e4"} if model.kind == "sclong" else {}
    got = embedding(twice, model, **options)
    assert "share 50 entries" in capsys.readouterr().err
    np.testing.assert_allclose(got, embedding(adata, model, **options), atol=1e-6)
    with pytest.raises(ValueError, match="duplicates='sum'"):
        embed(twice, model, duplicates="error")


def test_layer_and_raw(adata, model):
    expected = embedding(adata, model)
    other = adata.copy()
    other.layers["counts"] = adata.X
    other.raw = adata
    other.X = -other.X
    np.testing.assert_array_equal(embedding(other, model, layer="counts"), expected)
    np.testing.assert_array_equal(embedding(other[:, :10].copy(), model, use_raw=True), expected)


# -- several models, random weights ----------------------------------------------------------------------------------------


def test_several_models_in_one_call(adata, scgpt, scfoundation, tmp_path):
    embed(adata, [scgpt, scfoundation], progress=False)
    assert list(adata.obsm) == ["X_scgpt", "X_scfoundation"]
    for one in (scgpt, scfoundation):
        np.testing.assert_array_equal(adata.obsm[f"X_{one.name}"], embedding(adata, one))
        assert adata.uns[one.name]["checkpoint"]["id"] == one.provenance.id
    adata.write_h5ad(tmp_path / "x.h5ad")
    arrays = embed(tmp_path / "x.h5ad", [scgpt, scfoundation], out=tmp_path / "out", progress=False)
    assert list(arrays) == ["scgpt", "scfoundation"]
    np.testing.assert_allclose(arrays["scgpt"][...], adata.obsm["X_scgpt"], atol=1e-6)
    assert (tmp_path / "out" / "scfoundation").is_dir()


def test_several_models_need_several_names(adata, scgpt, scfoundation):
    with pytest.raises(ValueError, match="called after them"):
        embed(adata, [scgpt, scfoundation], key_added="x")
    with pytest.raises(ValueError, match="two of the models are called 'scgpt'"):
        embed(adata, [scgpt, scgpt])


def test_random_weights_are_those_of_a_random_copy(adata, model):
    embed(adata, model, random_weights=True, rng=4, progress=False)
    copy = random_copy(model, seed=4)
    assert list(adata.obsm) == [f"X_{model.name}-random"]
    options = {"rng": 4} if model.kind == "scgpt" else {}
    np.testing.assert_allclose(adata.obsm[f"X_{model.name}-random"], embedding(adata, copy, **options), atol=1e-6)
