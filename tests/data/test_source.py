"""Every kind of input gives the same blocks."""

from __future__ import annotations

import warnings

import anndata as ad
import dask.array as da
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scfm.data import _matrix, _transpose, open_source

N_CELLS, N_GENES = 41, 23


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(1)
    counts = rng.poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32)
    counts[5] = 0
    return counts


def as_adata(X, **parts) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(X.shape[0])])
    var = pd.DataFrame({"length": np.arange(X.shape[1])}, index=[f"gene{i}" for i in range(X.shape[1])])
    return ad.AnnData(X, obs=obs, var=var, **parts)


def in_blocks(source, size: int = 7) -> np.ndarray:
    blocks = list(source.blocks(size))
    assert [block.start for block in blocks] == list(range(0, source.n_obs, size))
    for block in blocks:
        assert isinstance(block.counts, sparse.csr_matrix)
        assert block.counts.has_canonical_format
        assert block.counts.data.all()
        assert block.counts.dtype in (np.float32, np.float64)
    return sparse.vstack([block.counts for block in blocks]).toarray()


def messy(counts: np.ndarray) -> sparse.csr_matrix:
    """The same matrix with unsorted indices, values in two parts and stored zeros."""
    rows, columns = np.nonzero(counts)
    values = counts[rows, columns]
    half = np.floor(values / 2)
    rows, columns = np.concatenate([rows, rows, [5]]), np.concatenate([columns, columns, [2]])
    values = np.concatenate([half, values - half, [0]]).astype(np.float32)
    order = np.lexsort((-columns, rows))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts)))])
    return sparse.csr_matrix((values[order], columns[order], indptr), shape=counts.shape)


MATRICES = {
    "csr": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "messy": messy,
    "int64": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "uint8": lambda x: x.astype(np.uint8),
    "float64": lambda x: x.astype(np.float64),
    "dask dense": lambda x: da.from_array(x, chunks=(6, 10)),
    "dask sparse": lambda x: da.from_array(x, chunks=(9, -1)).map_blocks(sparse.csr_matrix),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("place", ["X", "layer", "raw"])
def test_in_memory(counts, kind, place):
    matrix = MATRICES[kind](counts)
    if place == "X":
        source = open_source(as_adata(matrix))
    elif place == "layer":
        source = open_source(as_adata(np.zeros_like(counts), layers={"counts": matrix}), layer="counts")
    else:
        adata = as_adata(matrix)
        adata.raw = adata
        source = open_source(adata[:, :4].copy(), use_raw=True)
    assert (source.n_obs, source.n_vars) == counts.shape
    assert list(source.var_names) == [f"gene{i}" for i in range(N_GENES)]
    np.testing.assert_array_equal(in_blocks(source), counts)


@pytest.mark.parametrize("kind", ["csr", "messy", "dense"])
def test_data_are_never_changed(counts, kind):
    adata = as_adata(MATRICES[kind](counts))
    before = adata.X.copy()
    np.testing.assert_array_equal(in_blocks(open_source(adata), size=N_CELLS), counts)
    if sparse.issparse(before):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(adata.X, part), getattr(before, part))
    else:
        np.testing.assert_array_equal(adata.X, before)


def test_large_integers_keep_their_value():
    X = np.array([[2**24 + 1, 0], [3, 1]], dtype=np.int64)
    block = open_source(as_adata(X)).read(0, 2)
    assert block.dtype == np.float64
    np.testing.assert_array_equal(block.toarray(), X)


def test_missing_values_survive(counts):
    broken = counts.copy()
    broken[3, 4] = np.nan
    np.testing.assert_array_equal(in_blocks(open_source(as_adata(broken))), broken)


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "int64"])
@pytest.mark.parametrize("place", ["X", "layer", "raw"])
def test_files(counts, tmp_path, store, kind, place):
    adata = as_adata(MATRICES[kind](counts))
    adata.layers["counts"] = adata.X
    adata.raw = adata
    path = tmp_path / f"cells.{store}"
    getattr(adata, f"write_{store}")(path)
    arguments = {"X": {}, "layer": {"layer": "counts"}, "raw": {"use_raw": True}}[place]
    with open_source(path, **arguments) as source:
        assert list(source.obs_names) == list(adata.obs_names)
        assert list(source.var["length"]) == list(range(N_GENES))
        np.testing.assert_array_equal(in_blocks(source), counts)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("place", ["X", "layer", "raw"])
def test_backed(counts, tmp_path, kind, place):
    adata = as_adata(MATRICES[kind](counts), layers={"counts": counts})
    adata.raw = adata
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    arguments = {"X": {}, "layer": {"layer": "counts"}, "raw": {"use_raw": True}}[place]
    np.testing.assert_array_equal(in_blocks(open_source(backed, **arguments)), counts)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "backed csr", "backed csc", "dask sparse"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(3, 30), slice(None)),
        (np.array([40, 2, 2, 39, 0, 17]), slice(None)),
        (np.arange(N_CELLS) % 3 == 0, np.arange(N_GENES) % 2 == 0),
        (slice(None), np.array([4, 1, 9])),
        (slice(0, 0), slice(None)),
    ],
)
def test_views(counts, tmp_path, kind, rows, columns):
    adata = as_adata(MATRICES[kind.removeprefix("backed ")](counts))
    if kind.startswith("backed"):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    view = adata[rows, columns]
    source = open_source(view)
    expected = counts[rows][:, columns]
    assert (source.n_obs, source.n_vars) == expected.shape
    got = in_blocks(source) if source.n_obs else np.zeros(expected.shape)
    np.testing.assert_array_equal(got, expected)
    assert view.is_view


def test_column_stored_file_in_many_pieces(counts, tmp_path, monkeypatch):
    monkeypatch.setattr(_transpose, "_VALUES_AT_ONCE", 20)
    as_adata(sparse.csc_matrix(counts)).write_h5ad(tmp_path / "cells.h5ad")
    with open_source(tmp_path / "cells.h5ad") as source:
        np.testing.assert_array_equal(in_blocks(source), counts)


def test_dense_in_many_pieces(counts, monkeypatch):
    monkeypatch.setattr(_matrix, "_DENSE_BYTES", 200)
    np.testing.assert_array_equal(in_blocks(open_source(as_adata(counts))), counts)


def test_one_dask_chunk_is_computed_once(counts):
    computed = []

    def note(chunk, block_info=None):
        if block_info:
            computed.append(block_info[0]["chunk-location"][0])
        return chunk

    lazy = da.from_array(counts, chunks=(20, -1)).map_blocks(note, dtype=counts.dtype, meta=np.empty((0, 0)))
    np.testing.assert_array_equal(in_blocks(open_source(as_adata(lazy)), size=4), counts)
    assert computed == [0, 1, 2]


def test_list_has_the_union_of_genes(counts, tmp_path):
    first, second = as_adata(counts[:20, :15]), as_adata(sparse.csc_matrix(counts[20:, 10:]))
    second.var_names = [f"gene{i}" for i in range(10, N_GENES)]
    second = second[:, ::-1].copy()
    second.write_h5ad(tmp_path / "second.h5ad")
    with open_source([first, tmp_path / "second.h5ad"]) as source:
        assert list(source.var_names[:15]) == list(first.var_names)
        expected = counts.copy()
        expected[:20, 15:] = 0
        expected[20:, :10] = 0
        got = pd.DataFrame(in_blocks(source, size=9), columns=source.var_names)
    np.testing.assert_array_equal(got[[f"gene{i}" for i in range(N_GENES)]], expected)
    assert len(source.obs_names) == N_CELLS


def test_list_keeps_genes_of_the_same_name_apart(counts):
    adata = as_adata(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata.var_names = ["same"] * 2 + [f"gene{i}" for i in range(2, N_GENES)]
    source = open_source([adata, adata])
    assert source.n_vars == N_GENES
    np.testing.assert_array_equal(in_blocks(source), np.vstack([counts, counts]))


def test_values_per_cell(counts):
    for kind in ("csr", "csc"):
        assert open_source(as_adata(MATRICES[kind](counts))).values_per_cell() == np.count_nonzero(counts) / N_CELLS
    assert 0 < open_source(as_adata(counts)).values_per_cell() < N_GENES


@pytest.mark.parametrize("empty", [np.zeros((0, 4)), sparse.csr_matrix((0, 4)), sparse.csc_matrix((0, 4))])
def test_no_cells(empty):
    source = open_source(as_adata(empty))
    assert source.n_obs == 0
    assert list(source.blocks(10)) == []
    assert source.values_per_cell() == 0


# -- what cannot be read -------------------------------------------------------------------------------------------------


def test_no_genes():
    with pytest.raises(ValueError, match="no genes"):
        open_source(as_adata(np.zeros((5, 0))))


def test_missing_layer(counts, tmp_path):
    adata = as_adata(counts, layers={"spliced": counts})
    with pytest.raises(KeyError, match="no layer 'count'; layers: 'spliced'"):
        open_source(adata, layer="count")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(KeyError, match="no layer 'count'; layers: 'spliced'"):
        open_source(tmp_path / "cells.h5ad", layer="count")


def test_no_matrix(counts, tmp_path):
    adata = as_adata(counts, layers={"counts": counts})
    del adata.X
    with pytest.raises(ValueError, match="layers: 'counts'"):
        open_source(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="layers: 'counts'"):
        open_source(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="raw"):
        open_source(adata, use_raw=True)
    with pytest.raises(ValueError, match="raw"):
        open_source(tmp_path / "cells.h5ad", use_raw=True)


def test_layer_and_raw(counts):
    with pytest.raises(ValueError, match="not both"):
        open_source(as_adata(counts), layer="counts", use_raw=True)


def test_mudata(counts):
    mdata = mudata.MuData({"rna": as_adata(counts), "prot": as_adata(counts)})
    with pytest.raises(TypeError, match=r"mdata\['rna'\]"):
        open_source(mdata)


def test_other_objects_and_files(counts, tmp_path):
    with pytest.raises(TypeError, match="DataFrame"):
        open_source(pd.DataFrame(counts))
    with pytest.raises(ValueError, match="empty"):
        open_source([])
    with pytest.raises(FileNotFoundError, match="nothing.h5ad"):
        open_source(tmp_path / "nothing.h5ad")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(ValueError, match="cannot be read as .h5ad"):
        open_source(tmp_path / "text.h5ad")
    (tmp_path / "folder.zarr").mkdir()
    with pytest.raises(ValueError, match="zarr"):
        open_source(tmp_path / "folder.zarr")
    (tmp_path / "cells.h5mu").touch()
    with pytest.raises(ValueError, match="modality"):
        open_source(tmp_path / "cells.h5mu")


def test_truncated_file(counts, tmp_path):
    path = tmp_path / "cells.h5ad"
    as_adata(sparse.csr_matrix(counts)).write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="incomplete"):
        open_source(path)
