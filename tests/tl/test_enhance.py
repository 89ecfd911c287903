"""``tl.enhance``: expression at another read depth, as dense and sparse layers, tables and files."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm._depth import DepthTarget
from scfm.tl import enhance, reconstruct


@pytest.fixture
def messages(monkeypatch):
    """Log lines of scfm."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger("scfm"), "handlers", [Collect()])
    return lines


def by_backbone(adata, model, target) -> np.ndarray:
    """What the network itself says for the genes it knows."""
    tokens = model.tokenize(adata.X, list(adata.var_names), target=target)
    return model.reconstruct(tokens).numpy()


# -- what is predicted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ({}, "f5"),
        ({"target": "f2.5"}, "f2.5"),
        ({"fold": 3}, "f3"),
        ({"target": "a1"}, "a1"),
        ({"target": "t4"}, "t4"),
        ({"target": 10_000}, "t4"),
        ({"target": np.float32(1000)}, "t3"),
    ],
)
def test_the_layer_is_what_the_network_predicts_at_that_depth(adata, scfoundation, arguments, target):
    assert enhance(adata, scfoundation, clip=False, progress=False, **arguments) is None
    layer = adata.layers["enhanced"]
    assert layer.dtype == np.float32
    assert layer.shape == adata.shape
    np.testing.assert_allclose(layer[:, :50], by_backbone(adata, scfoundation, target), atol=1e-5)
    assert np.isnan(layer[:, 50:]).all()
    assert adata.uns["enhanced"]["params"]["target"] == target
    assert adata.uns["enhanced"]["params"]["scale"] == scfoundation.expression_scale


def test_the_depth_changes_the_prediction(adata, scfoundation):
    enhance(adata, scfoundation, fold=2, key_added="a", progress=False)
    enhance(adata, scfoundation, fold=20, key_added="b", progress=False)
    assert np.nanmax(np.abs(adata.layers["a"] - adata.layers["b"])) > 1e-3


def test_predictions_below_zero_are_cut_unless_they_are_asked_for(adata, scfoundation):
    enhance(adata, scfoundation, clip=False, key_added="raw", progress=False)
    enhance(adata, scfoundation, progress=False)
    raw = adata.layers["raw"]
    assert (raw[:, :50] < 0).any()
    assert (raw[:, :50] > 0).any()
    np.testing.assert_array_equal(adata.layers["enhanced"], np.maximum(raw, 0))
    enhance(adata, scfoundation, genes="expressed", key_added="sparse", progress=False)
    assert adata.layers["sparse"].data.min() == 0


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(12)), batch_size=st.integers(1, 12), block_size=st.integers(1, 12))
def test_cells_do_not_see_each_other(counts, scfoundation, order, batch_size, block_size):
    names = [*scfoundation.vocab.names, *(f"OTHER{i}" for i in range(6))]
    cells = ad.AnnData(sparse.csr_matrix(counts[:12]))
    cells.var_names = names
    enhance(cells, scfoundation, progress=False)
    other = cells[list(order)].copy()
    sizes = {"batch_size": batch_size, "block_size": block_size}
    enhance(other, scfoundation, key_added="again", progress=False, **sizes)
    np.testing.assert_allclose(other.layers["again"], cells.layers["enhanced"][list(order)], atol=1e-5)


def test_the_order_of_genes_does_not_matter(adata, scfoundation):
    enhance(adata, scfoundation, progress=False)
    other = adata[:, ::-1].copy()
    enhance(other, scfoundation, key_added="again", progress=False)
    np.testing.assert_allclose(other.layers["again"], other.layers["enhanced"], atol=1e-5)


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_expressed_genes_become_a_sparse_layer(adata, scfoundation):
    enhance(adata, scfoundation, progress=False)
    enhance(adata, scfoundation, genes="expressed", key_added="sparse", progress=False)
    table = adata.layers["sparse"]
    assert sparse.isspmatrix_csr(table)
    known = adata.X.copy().tolil()
    known[:, 50:] = 0
    rows, columns = known.tocsr().nonzero()
    # a stored zero is a prediction of zero
    assert table.nnz == len(rows)
    np.testing.assert_allclose(
        np.asarray(table[rows, columns]).ravel(), adata.layers["enhanced"][rows, columns], atol=1e-5
    )


def test_chosen_genes_become_a_table(adata, scfoundation):
    enhance(adata, scfoundation, progress=False)
    whole = adata.layers.pop("enhanced")
    enhance(adata, scfoundation, genes=["GENE20", "GENE3"], progress=False)
    table = adata.obsm["enhanced"]
    assert list(table.columns) == ["GENE20", "GENE3"]
    np.testing.assert_allclose(table.to_numpy(), whole[:, [20, 3]], atol=1e-5)
    assert not adata.layers


def test_a_file_takes_the_result_and_an_interrupted_run_goes_on(adata, scfoundation, tmp_path, monkeypatch):
    enhance(adata, scfoundation, progress=False)
    whole = adata.layers.pop("enhanced")
    del adata.uns["enhanced"]
    place = tmp_path / "x.zarr"
    arguments = {"out": place, "block_size": 7, "progress": False}

    done = []
    original = type(scfoundation).iter_reconstruction

    def interrupted(self, tokens, genes=None):
        if sum(done) >= 20:
            raise KeyboardInterrupt
        done.append(len(tokens))
        yield from original(self, tokens, genes)

    monkeypatch.setattr(type(scfoundation), "iter_reconstruction", interrupted)
    with pytest.raises(KeyboardInterrupt):
        enhance(adata, scfoundation, batch_size=7, **arguments)
    assert np.isfinite(zarr.open_array(place)[0, 0])
    assert np.isnan(zarr.open_array(place)[-1, 0])
    assert "enhanced" not in adata.uns

    left = []

    def counted(self, tokens, genes=None):
        left.append(len(tokens))
        yield from original(self, tokens, genes)

    monkeypatch.setattr(type(scfoundation), "iter_reconstruction", counted)
    enhance(adata, scfoundation, **arguments)
    assert 0 < sum(left) < adata.n_obs
    np.testing.assert_allclose(zarr.open_array(place)[...], whole, atol=1e-5)
    assert not adata.layers
    assert adata.uns["enhanced"]["params"]["out"] == str(place)
    # other depths and unclipped values are other results
    for other in ({"fold": 6}, {"clip": False}):
        with pytest.raises(ValueError, match="another run"):
            enhance(adata, scfoundation, **arguments, **other)


def test_a_copy_leaves_the_data_alone_and_can_be_written(adata, scfoundation, tmp_path):
    before = adata.copy()
    copy = enhance(adata, scfoundation, copy=True, progress=False)
    assert not adata.layers
    assert not adata.uns
    assert list(adata.obs) == list(before.obs)
    copy.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(back.layers["enhanced"], copy.layers["enhanced"])
    assert back.uns["enhanced"]["params"]["target"] == "f5"
    enhance(adata, scfoundation, genes="expressed", progress=False)
    adata.write_h5ad(tmp_path / "y.h5ad")


def test_counts_can_lie_in_a_layer_or_a_file(adata, scfoundation, tmp_path):
    enhance(adata, scfoundation, key_added="plain", progress=False)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="layer="):
        enhance(adata, scfoundation, progress=False)
    enhance(adata, scfoundation, layer="counts", progress=False)
    np.testing.assert_array_equal(adata.layers["enhanced"], adata.layers["plain"])
    adata.X = adata.layers["counts"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    enhance(backed, scfoundation, key_added="again", progress=False)
    np.testing.assert_array_equal(backed.layers["again"], adata.layers["plain"])


# -- depths -----------------------------------------------------------------------------------------------------------


def test_the_record_knows_how_deep_the_cells_are(adata, scfoundation):
    counts = adata.X.tolil()
    counts[2] = 0
    adata.X = counts.tocsr()
    enhance(adata, scfoundation, target=1000, progress=False)
    totals = adata.X[:, :50].toarray().sum(1)
    expected = np.where(totals > 0, totals / 1000, np.nan)
    np.testing.assert_allclose(adata.obs["enhanced_depth_share"], expected, rtol=1e-6)
    depth = adata.uns["enhanced"]["depth"]
    assert depth["median"] == pytest.approx(np.median(totals[totals > 0]))
    assert depth["median_wanted"] == pytest.approx(1000)
    assert depth["share_deeper"] == 0
    enhance(adata, scfoundation, fold=4, progress=False)
    shares = adata.obs["enhanced_depth_share"].to_numpy()
    np.testing.assert_allclose(shares[totals > 0], 0.25, rtol=1e-6)


def test_empty_cells_have_no_prediction(adata, scfoundation, messages):
    counts = adata.X.tolil()
    counts[2] = 0
    # one single count has no depth either: its logarithm is zero
    counts[5] = 0
    counts[5, 7] = 1
    adata.X = counts.tocsr()
    enhance(adata, scfoundation, progress=False)
    missing = np.isnan(adata.layers["enhanced"][:, :50])
    assert list(np.flatnonzero(missing.all(1))) == [2, 5]
    assert missing.sum() == 2 * 50
    assert sum("2 of 37 cells" in line for line in messages) == 1
    enhance(adata, scfoundation, genes="expressed", key_added="sparse", progress=False)
    assert adata.layers["sparse"][[2, 5]].nnz == 0


@pytest.mark.parametrize("arguments", [{"target": 20}, {"fold": 0.5}, {"target": "a-1"}])
def test_asking_for_fewer_counts_than_there_are_is_said(adata, scfoundation, messages, arguments):
    enhance(adata, scfoundation, progress=False, **arguments)
    assert any("down-sample" in line for line in messages)
    assert adata.uns["enhanced"]["depth"]["share_deeper"] > 0.1


@pytest.mark.parametrize("arguments", [{}, {"fold": 1}, {"target": "a0"}, {"target": 10**5}])
def test_enough_depth_goes_without_a_word(adata, scfoundation, messages, arguments):
    enhance(adata, scfoundation, progress=False, **arguments)
    assert not any("down-sample" in line for line in messages)
    assert adata.uns["enhanced"]["depth"]["share_deeper"] == 0


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_models_that_cannot_say_who_can(adata, model):
    if "enhances_depth" in model.capabilities:
        enhance(adata, model, progress=False)
        assert "enhanced" in adata.layers
        return
    with pytest.raises(scfm.UnsupportedError, match=r"read-depth enhancement\. Models that can: .*scfoundation"):
        enhance(adata, model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "5"}, ValueError, "is no read depth"),
        ({"target": "x5"}, ValueError, "is no read depth"),
        ({"target": "f-5"}, ValueError, "is no read depth"),
        ({"target": "tinf"}, ValueError, "is no read depth"),
        ({"target": 4}, ValueError, "'t4'"),
        ({"target": np.nan}, ValueError, "'t4'"),
        ({"target": True}, TypeError, "must be a number or a text"),
        ({"target": [1e4]}, TypeError, "must be a number or a text"),
        ({"fold": "5"}, TypeError, "fold must be a number"),
        ({"fold": 0}, ValueError, "above 0"),
        ({"target": "f5", "fold": 5}, ValueError, "give one of them"),
        ({"genes": "some"}, ValueError, "'expressed', 'all'"),
        ({"genes": ["OTHER1"]}, KeyError, "does not know OTHER1"),
        ({"genes": "expressed", "out": "x"}, ValueError, "genes='all'"),
        ({"duplicates": "keep"}, ValueError, "duplicates='sum'"),
        ({"layer": "none"}, KeyError, "no layer"),
    ],
)
def test_wrong_arguments(adata, scfoundation, arguments, error, message):
    with pytest.raises(error, match=message):
        enhance(adata, scfoundation, **arguments)
    assert not adata.layers
    assert not adata.uns


def test_a_result_too_large_for_memory_is_refused(adata, scfoundation, monkeypatch):
    monkeypatch.setattr("scfm.engine._expression._MEMORY_BYTES", 1000)
    with pytest.raises(MemoryError, match="out="):
        enhance(adata, scfoundation)


@given(st.sampled_from("tfa"), st.floats(0.01, 1000))
def test_a_depth_survives_its_text(rule, number):
    assert DepthTarget.parse(str(DepthTarget(rule, number))) == DepthTarget(rule, number)


def test_reconstruct_and_enhance_agree(adata, scfoundation):
    enhance(adata, scfoundation, target="a1", clip=False, progress=False)
    reconstruct(adata, scfoundation, genes="all", target="a1", key_added="other", progress=False)
    np.testing.assert_array_equal(adata.layers["enhanced"], adata.layers["other"])
