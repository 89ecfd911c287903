"""``scfm.pp.recover_counts``: round trips on real and made-up cells, and refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm


def make(counts, **obs):
    n_obs, n_vars = counts.shape
    return ad.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(n_obs)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_vars)]),
    )


def normalized(adata, target_sum=1e4, base=None, **options):
    out = sc.pp.normalize_total(adata, target_sum=target_sum, copy=True, **options)
    if base is not None:
        sc.pp.log1p(out, base=None if base == "e" else base)
    return out


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.4, 3.0, size=80), (30, 80))
    counts[np.arange(30), rng.integers(0, 80, 30)] = 1
    return make(counts)


def totals_of(adata):
    return np.asarray(adata.X.sum(1)).ravel()


def with_rows(matrix, rows, values):
    dense = matrix.toarray()
    dense[rows] = values
    return sparse.csr_matrix(dense)


def assert_same(matrix, counts):
    assert sparse.issparse(matrix)
    assert matrix.format == "csr"
    assert (matrix != counts.X).nnz == 0


@pytest.mark.parametrize("target_sum", [1e4, 1e6, None])
@pytest.mark.parametrize(("base", "name"), [(None, "none"), ("e", "natural"), (2, "base 2"), (10, "base 10")])
def test_round_trip_with_evidence(counts, target_sum, base, name):
    adata = normalized(counts, target_sum, base)
    target = np.median(totals_of(counts)) if target_sum is None else target_sum
    assert scfm.pp.recover_counts(adata) is None
    assert_same(adata.layers["counts"], counts)
    evidence = adata.uns["recover_counts"]
    assert evidence["kind"] == ("normalized" if base is None else "log-normalized")
    assert (evidence["log_base"], evidence["share_recovered"], evidence["n_uncertain"]) == (name, 1.0, 0)
    assert evidence["target_sum"] == pytest.approx(target, rel=1e-4)
    assert evidence["max_deviation"] < 0.01
    scale = target / totals_of(counts)
    assert evidence["scale_min"] == pytest.approx(scale.min(), rel=1e-5)
    assert evidence["scale_median"] == pytest.approx(np.median(scale), rel=1e-5)


@pytest.mark.parametrize("convert", [sparse.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.float64)])
def test_other_storage(counts, convert):
    adata = normalized(counts, base="e")
    adata.X = convert(adata.X)
    scfm.pp.recover_counts(adata)
    assert_same(adata.layers["counts"], counts)


def test_backed_and_dask(counts, tmp_path):
    da = pytest.importorskip("dask.array")
    adata = normalized(counts, base="e")
    adata.layers["lognorm"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    scfm.pp.recover_counts(backed)
    assert_same(backed.layers["counts"], counts)
    backed.file.close()
    adata.layers["lognorm"] = da.from_array(adata.X.toarray(), chunks=(7, 80))
    scfm.pp.recover_counts(adata, layer="lognorm", key_added="again")
    assert_same(adata.layers["again"], counts)


def test_result_is_independent_of_the_input(counts):
    adata = normalized(counts)
    scfm.pp.recover_counts(adata)
    before = adata.layers["counts"].copy()
    adata.X.indices[:] = 0
    adata.X.data[:] = 0
    assert (adata.layers["counts"] != before).nnz == 0


def test_copy_view_and_storage(counts, tmp_path):
    adata = normalized(counts, base="e")
    out = scfm.pp.recover_counts(adata, copy=True)
    assert "counts" not in adata.layers
    out.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").uns["recover_counts"]["kind"] == "log-normalized"
    view = adata[3:9]
    with pytest.warns(ad.ImplicitModificationWarning):
        scfm.pp.recover_counts(view)
    assert_same(view.layers["counts"], counts[3:9])


def test_counts_come_back_as_they_are(counts):
    counts.X.data *= 2  # no common divisor may be taken out of real counts
    counts.X = with_rows(counts.X, 3, np.eye(80)[7] * 2**24)
    scfm.pp.recover_counts(counts, key_added="same")
    assert_same(counts.layers["same"], counts)
    assert counts.uns["recover_counts"]["kind"] == "counts"


def test_logarithm_without_normalisation_keeps_even_cells(counts):
    counts.X = with_rows(counts.X, 4, counts.X[4].toarray() * 2)
    adata = sc.pp.log1p(counts, copy=True)
    scfm.pp.recover_counts(adata)
    assert_same(adata.layers["counts"], counts)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_empty_cells_stay_empty(counts):
    counts.X = with_rows(counts.X, [0, 7], 0)
    adata = normalized(counts, base="e")
    scfm.pp.recover_counts(adata)
    assert_same(adata.layers["counts"], counts)
    assert adata.uns["recover_counts"]["n_empty_cells"] == 2


@pytest.mark.parametrize("shape", [(0, 5), (4, 5)])
def test_nothing_to_recover(shape):
    adata = make(np.zeros(shape))
    scfm.pp.recover_counts(adata)
    assert adata.layers["counts"].shape == shape
    assert adata.layers["counts"].nnz == 0
    assert adata.uns["recover_counts"]["kind"] == "empty"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, "e", 2, 10]), st.sampled_from([1e3, 1e4, None]))
def test_size_factors_settle_common_divisors(seed, base, target_sum):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 4.0, 40), (25, 40))
    counts[np.arange(20), rng.integers(0, 40, 20)] = 1
    counts[20:] *= rng.integers(2, 30, (5, 1))
    counts[:, 0] += counts.sum(1) == 0
    adata = normalized(make(counts, total=counts.sum(1)), target_sum, base)
    scfm.pp.recover_counts(adata, size_factors="total")
    assert_same(adata.layers["counts"], make(counts))
    scfm.pp.recover_counts(adata, size_factors=counts.sum(1) / 7.0, key_added="again")
    assert_same(adata.layers["again"], make(counts))


def test_wrong_size_factors_are_refused(counts):
    adata = normalized(counts, base="e")
    adata.obs["wrong"] = np.random.default_rng(1).random(30) + 1
    with pytest.raises(ValueError, match="size_factors are not multiples"):
        scfm.pp.recover_counts(adata, size_factors="wrong")
    with pytest.raises(KeyError, match=r"'absent'.*wrong"):
        scfm.pp.recover_counts(adata, size_factors="absent")
    with pytest.raises(ValueError, match="30 non-negative numbers"):
        scfm.pp.recover_counts(adata, size_factors=[1.0, 2.0])
    with pytest.raises(ValueError, match="zeros for cells that have counts"):
        scfm.pp.recover_counts(adata, size_factors=np.zeros(30))
    assert "counts" not in adata.layers


def test_scaled_values_point_at_raw(counts):
    adata = normalized(counts, base="e")
    adata.raw = adata
    adata.X = adata.X.toarray()
    sc.pp.scale(adata)
    with pytest.raises(ValueError, match=r"Centring and scaling cannot be undone.*adata\.raw.*use_raw=True"):
        scfm.pp.recover_counts(adata)
    scfm.pp.recover_counts(adata, use_raw=True)
    assert_same(adata.layers["counts"], counts)
    adata.raw = None
    with pytest.raises(ValueError, match=r"from before sc\.pp\.scale"):
        scfm.pp.recover_counts(adata)
    with pytest.raises(ValueError, match="raw is not set"):
        scfm.pp.recover_counts(adata, use_raw=True)


def test_raw_with_more_genes_is_recovered_before_genes_are_chosen(counts):
    adata = normalized(counts, base="e")
    adata.raw = adata
    chosen = adata[:, ["g70", "g3", "g41"]].copy()
    scfm.pp.recover_counts(chosen, use_raw=True)
    assert_same(chosen.layers["counts"], counts[:, ["g70", "g3", "g41"]])
    chosen.var_names = ["g70", "g3", "new"]
    with pytest.raises(ValueError, match="1 genes of adata are not in adata.raw, the first is 'new'"):
        scfm.pp.recover_counts(chosen, use_raw=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_values_are_refused(counts, value):
    adata = normalized(counts)
    adata.X.data[5] = value
    with pytest.raises(ValueError, match="1 NaN|1 infinite"):
        scfm.pp.recover_counts(adata)


def test_imputed_values_are_refused(counts):
    counts.X = sparse.csr_matrix(np.random.default_rng(1).gamma(1.0, 5.0, size=counts.shape))
    with pytest.raises(ValueError, match="not multiples of one number per cell"):
        scfm.pp.recover_counts(counts)


def test_failing_cells_are_counted_and_named(counts):
    adata = normalized(counts, base="e")
    adata.X = with_rows(adata.X, [5, 11], np.random.default_rng(1).gamma(1.0, size=(2, 80)))
    with pytest.raises(ValueError, match=r"counts of 2 of 30 cells in adata\.X cannot be recovered \(c5, c11.*Remove"):
        scfm.pp.recover_counts(adata)
    assert "counts" not in adata.layers
    assert "recover_counts" not in adata.uns


def test_missing_layer(counts):
    with pytest.raises(KeyError, match="no layer 'lognorm'; layers: none"):
        scfm.pp.recover_counts(counts, layer="lognorm")


def test_foreign_layer_is_not_overwritten_silently(counts, capsys):
    adata = normalized(counts)
    adata.layers["counts"] = counts.X.copy()
    scfm.pp.recover_counts(adata)
    assert "layers['counts'] is overwritten" in capsys.readouterr().err
    scfm.pp.recover_counts(adata)
    assert "overwritten" not in capsys.readouterr().err


def test_bundled_data_of_scanpy():
    adata = sc.datasets.pbmc68k_reduced()
    scfm.pp.recover_counts(adata, use_raw=True)
    evidence = adata.uns["recover_counts"]
    assert (evidence["log_base"], evidence["decimals"]) == ("natural", 3)
    # Scanpy normalised to 10,000 by the totals of all genes, which the object still holds
    totals = adata.obs["n_counts"].to_numpy()
    lognorm = adata.raw.X
    again = adata.layers["counts"].multiply(1e4 / totals[:, None]).tocsr()
    np.testing.assert_allclose(np.log1p(again.toarray()), lognorm.toarray(), atol=6e-4)


def test_bundled_data_of_scanpy_against_its_counts(shared):
    adata = sc.datasets.pbmc68k_reduced()
    scfm.pp.recover_counts(adata, use_raw=True)
    truth = ad.read_h5ad(shared("data", "singlecell", "pbmc68k_reduced_counts.h5ad"))
    assert truth.obs_names.equals(adata.obs_names)
    assert_same(adata.layers["counts"], truth)


@pytest.mark.parametrize("name", ["kang2018_ifnb_scgen_subset", "pbmc3k_counts_seurat_labels"])
@pytest.mark.parametrize(("target_sum", "base"), [(1e4, "e"), (None, None)])
def test_real_counts(shared, name, target_sum, base):
    counts = ad.read_h5ad(shared("data", "singlecell", f"{name}.h5ad"))
    adata = normalized(counts, target_sum, base)
    scfm.pp.recover_counts(adata)
    assert_same(adata.layers["counts"], counts)


def test_log_normalised_as_distributed(shared):
    adata = ad.read_h5ad(shared("data", "singlecell", "kang2018_ifnb_scgen_subset.h5ad"))
    scfm.pp.recover_counts(adata, layer="lognorm", key_added="again")
    assert_same(adata.layers["again"], adata)


@pytest.mark.parametrize("name", ["sciplex3_celllines_2247", "hesc_chu2016_100", "oligodendroglioma_infercnv"])
def test_real_values_that_are_no_counts(shared, name):
    adata = ad.read_h5ad(shared("data", "singlecell", f"{name}.h5ad"))
    with pytest.raises(ValueError, match="not multiples of one number per cell"):
        scfm.pp.recover_counts(adata)


def test_counts_that_the_notebook_of_cellfm_recovers(golden):
    data = golden("cellfm", "alias_mapping")
    adata = ad.AnnData(sparse.csr_matrix(data.input["lognorm"]))
    scfm.pp.recover_counts(adata)
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), data.expected["recovered_counts"])
