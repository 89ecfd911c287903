"""``scfm.pp.check_counts`` on every kind of matrix."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import scfm


@pytest.fixture
def adata():
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (30, 50)).astype(np.float32))
    adata = ad.AnnData(
        counts,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(50)]),
    )
    adata.layers["counts"] = counts.copy()
    adata.layers["lognorm"] = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True).X
    return adata


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.tocsc(),
        lambda x: x.toarray(),
        lambda x: sparse.csr_array(x),
        lambda x: x.astype(np.int64),
        lambda x: x.toarray().astype(np.uint16),
    ],
    ids=["csr", "csc", "dense", "csr_array", "int64", "dense uint16"],
)
def test_counts_in_memory(adata, convert):
    adata.X = convert(adata.X)
    check = scfm.pp.check_counts(adata)
    assert check.ok
    assert (check.kind, check.source, check.integer_share) == ("counts", "adata.X", 1.0)
    assert check.max == adata.layers["counts"].max()


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("layer", [None, "lognorm"])
def test_backed(adata, form, layer, tmp_path):
    for name in ("X", "lognorm"):
        matrix = adata.X if name == "X" else adata.layers[name]
        matrix = matrix.toarray() if form == "dense" else matrix.asformat(form)
        if name == "X":
            adata.X = matrix
        else:
            adata.layers[name] = matrix
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert scfm.pp.check_counts(backed, layer=layer, raise_error=False).kind == (
        "counts" if layer is None else "log-normalized"
    )
    assert scfm.pp.check_counts(backed[5:9, 3:]).ok
    backed.file.close()


def test_dask(adata):
    da = pytest.importorskip("dask.array")
    adata.layers["lazy"] = da.from_array(adata.layers["lognorm"].toarray(), chunks=(7, 50))
    adata.X = da.from_array(adata.X.toarray(), chunks=(11, 20)).map_blocks(sparse.csr_matrix)
    adata.X = adata.X.rechunk((11, 50))
    assert scfm.pp.check_counts(adata).ok
    assert scfm.pp.check_counts(adata, layer="lazy", raise_error=False).kind == "log-normalized"


def test_views(adata):
    view = adata[::3, 10:20]
    assert scfm.pp.check_counts(view).ok
    assert view.is_view


def test_what_is_wrong_and_what_to_do(adata):
    with pytest.raises(ValueError, match=r"layer 'lognorm' does not hold counts.*log-normalised to 10,000") as error:
        scfm.pp.check_counts(adata, layer="lognorm")
    text = str(error.value)
    assert "layer=" in text
    assert "scfm.pp.recover_counts" in text
    assert "There are counts in layer 'counts' and adata.X." in text


def test_scaled_with_raw(adata):
    adata.raw = adata
    adata.X = adata.layers["lognorm"].toarray()
    sc.pp.scale(adata)
    del adata.layers["counts"]
    check = scfm.pp.check_counts(adata, raise_error=False)
    assert check.kind == "scaled"
    assert not check.ok
    assert check.n_negative == (adata.X < 0).sum()
    assert check.other_counts == ("adata.raw.X",)
    assert "use_raw=True" in check.message


@pytest.mark.parametrize(("value", "field"), [(np.nan, "n_nan"), (np.inf, "n_infinite"), (-1.0, "n_negative")])
def test_single_bad_values(adata, value, field):
    dense = adata.X.toarray()
    dense[3, 4] = value
    adata.X = sparse.csr_matrix(dense)
    check = scfm.pp.check_counts(adata, raise_error=False)
    assert getattr(check, field) == 1
    assert not check.ok
    with pytest.raises(ValueError, match=r"adata\.X does not hold counts"):
        scfm.pp.check_counts(adata)


def test_fractions(adata):
    adata.X = adata.X.multiply(np.random.default_rng(1).random((30, 50))).tocsr()
    with pytest.raises(ValueError, match="RSEM"):
        scfm.pp.check_counts(adata)


def test_missing_layer_lists_the_others(adata):
    with pytest.raises(KeyError, match=r"no layer 'raw_counts'; layers: 'counts', 'lognorm'"):
        scfm.pp.check_counts(adata, layer="raw_counts")


def test_no_matrix():
    with pytest.raises(ValueError, match="adata.X is empty"):
        scfm.pp.check_counts(ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])))


def test_empty_objects(adata):
    assert scfm.pp.check_counts(adata[:0]).kind == "empty"
    with pytest.raises(ValueError, match="no genes"):
        scfm.pp.check_counts(adata[:, :0])


def test_cells_without_counts_are_counted(adata):
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(30) >= 2)[:, None])
    check = scfm.pp.check_counts(adata)
    assert check.n_empty_cells == 2
    assert "2 cells have none" in check.message


def test_nothing_is_written(adata):
    before = adata.copy()
    scfm.pp.check_counts(adata)
    assert list(adata.uns) == list(before.uns)
    assert (adata.X != before.X).nnz == 0
