"""Atlases in the layout of scGPT's: read, built, written, and what is wrong with a folder."""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np
import pandas as pd
import pytest

from scfm import MissingExtraError
from scfm.tasks.atlas import AtlasIndex, _set_probes
from scfm.tasks.neighbors import find_neighbors, vote

faiss = pytest.importorskip("faiss")

# scGPT's description with fewer components, lists and bits
FACTORY = "PCA8,IVF6_HNSW4,PQ4x4"


@pytest.fixture(autouse=True)
def _one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def cells():
    """Cells of four types, well apart."""
    rng = np.random.default_rng(0)
    types = rng.integers(0, 4, 500)
    return (rng.normal(size=(4, 16))[types] * 3 + rng.normal(size=(500, 16)) * 0.3).astype(np.float32), types


NAMES = np.array(["T cell", "B cell", "NK/T cell", "Ärzte"])


def released(folder, cells, *, labels=None, strings=None, index=None):
    """Write the files as the authors do, with faiss and h5py alone."""
    embedding, types = cells
    if index is None:
        index = faiss.index_factory(embedding.shape[1], FACTORY, faiss.METRIC_L2)
        index.train(embedding)
        index.add(embedding)
    folder.mkdir()
    faiss.write_index(index, str(folder / "index.faiss"))
    labels = NAMES[types].astype(object) if labels is None else labels
    with h5py.File(folder / "meta.h5ad", "w") as file:
        file.create_dataset("meta_labels", data=labels, dtype=strings or h5py.string_dtype())
    (folder / "index_config.json").write_text(json.dumps({"index_desc": FACTORY}))
    return folder


def test_read_what_was_released(tmp_path, cells):
    atlas = AtlasIndex.read(released(tmp_path / "atlas", cells))
    embedding, types = cells
    assert len(atlas) == 500
    assert atlas.dim == 16
    assert list(atlas.categories) == sorted(NAMES)
    np.testing.assert_array_equal(atlas.categories[atlas.codes], NAMES[types])
    np.testing.assert_allclose(atlas.proportions, [(NAMES[types] == name).mean() for name in sorted(NAMES)])
    assert atlas.config == {"index_desc": FACTORY}
    assert repr(atlas) == "AtlasIndex(500 cells, 4 labels, 16 columns, IndexPreTransform)"

    neighbors = atlas.search(embedding[:40] + 0.01, 20)
    whole = faiss.read_index(str(tmp_path / "atlas" / "index.faiss"))
    faiss.extract_index_ivf(whole).nprobe = 6
    distances, _ = whole.search(embedding[:40] + 0.01, 20)
    np.testing.assert_allclose(neighbors.distances, distances, rtol=1e-5, atol=1e-5)
    votes = vote(neighbors, atlas.codes, 4, weights="proportion", proportions=atlas.proportions)
    np.testing.assert_array_equal(atlas.categories[votes.codes], NAMES[types[:40]])


def test_lists_stay_on_disk(tmp_path, cells):
    atlas = AtlasIndex.read(released(tmp_path / "atlas", cells))
    lists = faiss.extract_index_ivf(atlas.index).invlists
    assert isinstance(faiss.downcast_InvertedLists(lists), faiss.OnDiskInvertedLists)


@pytest.mark.parametrize(("n_lists", "probes"), [(6, 6), (20, 16), (1000, 16), (1001, 32), (4001, 64), (16384, 128)])
def test_lists_that_are_searched(n_lists, probes):
    """As scGPT does it, but never more lists than there are."""
    quantizer = faiss.IndexFlatL2(2)
    centers = np.random.default_rng(0).normal(size=(n_lists, 2)).astype(np.float32)
    quantizer.add(centers)
    lists = faiss.IndexIVFFlat(quantizer, 2, n_lists)
    lists.is_trained = True
    _set_probes(lists, None)
    assert lists.nprobe == probes


def test_number_of_lists_can_be_chosen(tmp_path, cells):
    folder = released(tmp_path / "atlas", cells)
    assert AtlasIndex.read(folder, nprobe=2).nprobe == 2
    with pytest.raises(ValueError, match="the index has 6 lists; got 7"):
        AtlasIndex.read(folder, nprobe=7)
    with pytest.raises(ValueError, match="the index has no lists"):
        AtlasIndex.build(*cells, nprobe=2)
    few = AtlasIndex.read(folder, nprobe=1).search(cells[0][:5], 400)
    assert (few.indices >= 0).any(1).all()
    assert (few.indices[:, -1] == -1).all()
    np.testing.assert_array_equal(np.isnan(few.distances), few.indices == -1)


def test_strings_of_fixed_width(tmp_path, cells):
    labels = np.char.encode(NAMES[cells[1]], "utf-8")
    atlas = AtlasIndex.read(released(tmp_path / "atlas", cells, labels=labels, strings=labels.dtype))
    assert atlas.categories[atlas.codes[3]] == NAMES[cells[1][3]]


def test_many_labels_are_read_in_parts(tmp_path, cells, monkeypatch):
    folder = released(tmp_path / "atlas", cells)
    whole = AtlasIndex.read(folder)
    monkeypatch.setattr("scfm.tasks.atlas._LABELS_AT_A_TIME", 7)
    parts = AtlasIndex.read(folder)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    assert parts.categories.equals(whole.categories)
    whole.write(tmp_path / "other")
    np.testing.assert_array_equal(AtlasIndex.read(tmp_path / "other").codes, whole.codes)


def test_flat_atlas_is_exact(cells):
    embedding, types = cells
    embedding = embedding.copy()
    embedding[7, 2] = np.nan
    labels = pd.Series(NAMES[types]).where(np.arange(500) % 5 > 0)
    atlas = AtlasIndex.build(embedding, labels)
    usable = np.flatnonzero(labels.notna() & np.isfinite(embedding).all(1))
    assert len(atlas) == len(usable) == 399
    query = embedding[:30] + 0.05
    found, exact = atlas.search(query, 15), find_neighbors(embedding[usable], query, 15)
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.indices[7], -1)
    np.testing.assert_array_equal(atlas.categories[atlas.codes], labels[usable])


@pytest.mark.parametrize("factory", ["Flat", FACTORY])
def test_write_and_read(tmp_path, cells, factory):
    record = {"checkpoint": {"id": "x", "sha256": "abc"}, "params": {"rng": np.int64(0), "a": np.arange(2)}}
    atlas = AtlasIndex.build(cells[0], NAMES[cells[1]], factory=factory, record=record)
    atlas.write(tmp_path / "atlas")
    assert sorted(path.name for path in (tmp_path / "atlas").iterdir()) == [
        "index.faiss",
        "index_config.json",
        "meta.h5ad",
    ]
    again = AtlasIndex.read(tmp_path / "atlas")
    # a copy of an atlas whose vectors lie on disk holds them itself
    again.write(tmp_path / "copy")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        again.write(tmp_path / "atlas")
    again.write(tmp_path / "atlas", overwrite=True)
    (tmp_path / "atlas" / "index.faiss").unlink()
    for one in (again, AtlasIndex.read(tmp_path / "copy")):
        assert one.config["embedding"] == {
            "checkpoint": {"id": "x", "sha256": "abc"},
            "params": {"rng": 0, "a": [0, 1]},
        }
        assert one.config["index_desc"] == factory
        np.testing.assert_array_equal(one.codes, atlas.codes)
        found, expected = one.search(cells[0][:20]), atlas.search(cells[0][:20])
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_without_config(tmp_path, cells):
    folder = released(tmp_path / "atlas", cells)
    (folder / "index_config.json").unlink()
    assert AtlasIndex.read(folder).config == {}
    (folder / "index_config.json").write_text("{")
    with pytest.raises(ValueError, match="index_config.json is no JSON file"):
        AtlasIndex.read(folder)


@pytest.mark.parametrize("name", ["index.faiss", "meta.h5ad"])
def test_missing_and_damaged_files(tmp_path, cells, name):
    folder = released(tmp_path / "atlas", cells)
    (folder / name).write_bytes(b"something else" * 20)
    with pytest.raises(ValueError, match=f"{name} is no .* or is damaged"):
        AtlasIndex.read(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file '{name}'; an atlas is a folder with"):
        AtlasIndex.read(folder)


def test_labels_do_not_fit(tmp_path, cells):
    folder = released(tmp_path / "atlas", cells, labels=np.array(["x"] * 499, dtype=object))
    with pytest.raises(ValueError, match="500 cells in its index but 499 labels"):
        AtlasIndex.read(folder)
    with h5py.File(folder / "meta.h5ad", "w") as file:
        file["meta_labels"] = np.arange(500)
    with pytest.raises(ValueError, match="no list of strings 'meta_labels'; it has 'meta_labels'"):
        AtlasIndex.read(folder)


def test_inner_products_are_refused(tmp_path, cells):
    index = faiss.IndexFlatIP(16)
    index.add(cells[0])
    with pytest.raises(ValueError, match="inner product"):
        AtlasIndex.read(released(tmp_path / "atlas", cells, index=index))


def test_wrong_queries(cells):
    atlas = AtlasIndex.build(cells[0], NAMES[cells[1]])
    with pytest.raises(ValueError, match="embeddings with 16 columns, the query has shape"):
        atlas.search(np.ones((3, 15)))
    with pytest.raises(ValueError, match="the reference has 500 cells in its index; choose a smaller k"):
        atlas.search(cells[0][:2], 501)
    assert atlas.search(np.ones((0, 16)), 3).indices.shape == (0, 3)


def test_wrong_cells(cells):
    embedding, types = cells
    with pytest.raises(ValueError, match="one label for each row"):
        AtlasIndex.build(embedding, types[:-1])
    with pytest.raises(ValueError, match="no cell has both"):
        AtlasIndex.build(embedding, [None] * 500)
    with pytest.raises(ValueError, match="faiss cannot build 'nonsense' from 500 cells with 16 columns"):
        AtlasIndex.build(embedding, types, factory="nonsense")
    with pytest.raises(ValueError, match="faiss cannot build 'IVF600,Flat'"):
        AtlasIndex.build(embedding, types, factory="IVF600,Flat")


def test_faiss_is_not_there(tmp_path, cells, monkeypatch):
    folder = released(tmp_path / "atlas", cells)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"an atlas needs .*scfm\[faiss\]"):
        AtlasIndex.read(folder)
    with pytest.raises(MissingExtraError, match=r"scfm\[faiss\]"):
        AtlasIndex.build(*cells)
