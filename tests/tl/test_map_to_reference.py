"""``tl.map_to_reference``: labels of the nearest reference cells, and what is written, reused and refused."""

from __future__ import annotations

import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.tasks.atlas import AtlasIndex
from scfm.tl import embed, map_to_reference

few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
N_QUERY, N_REFERENCE = 30, 90


def cells(seed: int, n: int) -> ad.AnnData:
    """Three types in ``obsm["X_rep"]``, far from each other."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 3, n)
    obs = pd.DataFrame({"kind": np.array(["B", "NK/T", "Mono"])[types]}, index=[f"{seed}-{i}" for i in range(n)])
    obs["lymphoid"] = types < 2
    adata = ad.AnnData(sparse.csr_matrix((n, 4), dtype=np.float32), obs=obs)
    adata.obsm["X_rep"] = (10 * np.eye(3)[types] + rng.normal(size=(n, 3))).astype(np.float32)
    return adata


@pytest.fixture
def query() -> ad.AnnData:
    return cells(1, N_QUERY)


@pytest.fixture
def reference() -> ad.AnnData:
    reference = cells(0, N_REFERENCE)
    reference.obs["kind"] = pd.Categorical(
        reference.obs["kind"], categories=["NK/T", "B", "Mono", "nobody"], ordered=True
    )
    return reference


def mapped(query, reference, labels_key="kind", **arguments) -> ad.AnnData:
    return map_to_reference(query, reference, labels_key, use_rep="X_rep", copy=True, **arguments)


# -- what is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["uniform", "distance", "proportion"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_labels_are_right(query, reference, weights, metric):
    before, names = query.copy(), list(query.obs_names)
    out = mapped(query, reference, weights=weights, metric=metric)
    assert list(query.obs) == list(before.obs)
    assert not query.uns
    label = out.obs["kind_mapped"]
    assert list(label.astype(str)) == list(query.obs["kind"])
    assert label.dtype == reference.obs["kind"].dtype
    assert (out.obs["kind_mapped_confidence"] == 1).all()
    table = out.obsm["kind_mapped_proba"]
    assert list(table.columns) == ["NK_T", "B", "Mono", "nobody"]
    assert list(table.index) == list(out.obs_names) == names
    assert (table.dtypes == np.float32).all()
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(table.to_numpy().argmax(1), label.cat.codes)


def test_record(query, reference):
    reference.obs.loc[reference.obs_names[:7], "kind"] = np.nan
    reference.obsm["X_rep"][10] = np.nan
    query.obsm["X_rep"][[3, 8, 9]] = np.nan
    assert map_to_reference(query, reference, "kind", use_rep="X_rep", k=5, min_confidence=0.5) is None
    record = query.uns["kind_mapped"]
    assert record["params"] == {
        "labels_key": "kind",
        "use_rep": "X_rep",
        "k": 5,
        "metric": "euclidean",
        "weights": "uniform",
        "index": "exact",
        "min_confidence": 0.5,
    }
    assert record["reference"] == {"n_obs": N_REFERENCE, "n_used": N_REFERENCE - 8, "kind": "AnnData"}
    assert record["rejected"] == 0
    assert record["without_label"] == 3 / N_QUERY
    assert list(record["labels"]) == ["NK/T", "B", "Mono", "nobody"]
    assert record["scfm_version"] == scfm.__version__


def test_cells_without_embedding_keep_their_place(query, reference):
    expected = mapped(query, reference)
    query.obsm["X_rep"][[0, 11, 29]] = np.nan
    out = mapped(query, reference)
    lost = np.isin(np.arange(N_QUERY), [0, 11, 29])
    for name in ("kind_mapped", "kind_mapped_confidence"):
        assert out.obs[name].isna().to_numpy().tolist() == lost.tolist()
        assert list(out.obs[name][~lost]) == list(expected.obs[name][~lost])
    assert out.obsm["kind_mapped_proba"][lost].isna().all(axis=None)


def test_rejection(query, reference):
    between = reference.obsm["X_rep"][:N_QUERY].mean(0) + np.zeros((N_QUERY, 1), dtype=np.float32)
    query.obsm["X_rep"][5:25] = (query.obsm["X_rep"] * 0.2 + between * 0.8)[5:25]
    free = mapped(query, reference, k=15)
    strict = mapped(query, reference, k=15, min_confidence=0.8)
    rejected = free.obs["kind_mapped_confidence"] < 0.8
    assert 0 < rejected.sum() < N_QUERY
    assert strict.obs["kind_mapped"].isna().equals(rejected)
    assert list(strict.obs["kind_mapped"][~rejected]) == list(free.obs["kind_mapped"][~rejected])
    assert free.obs["kind_mapped"].notna().all()
    pd.testing.assert_series_equal(strict.obs["kind_mapped_confidence"], free.obs["kind_mapped_confidence"])
    pd.testing.assert_frame_equal(strict.obsm["kind_mapped_proba"], free.obsm["kind_mapped_proba"])
    assert strict.uns["kind_mapped"]["rejected"] == rejected.mean()
    # a share of votes that is just reached is enough
    share = float(free.obs["kind_mapped_confidence"].min())
    assert mapped(query, reference, k=15, min_confidence=share).obs["kind_mapped"].notna().all()


def test_several_columns(query, reference):
    reference.obs["text"] = reference.obs["kind"].astype(str).astype(object)
    reference.obs.loc[reference.obs["kind"] == "B", "text"] = None
    out = mapped(query, reference, ["kind", "lymphoid", "text"])
    assert list(out.obs["lymphoid_mapped"]) == list(query.obs["lymphoid"])
    assert list(out.obsm["lymphoid_mapped_proba"].columns) == ["False", "True"]
    assert list(out.obs["text_mapped"].cat.categories) == ["Mono", "NK/T"]
    assert out.uns["text_mapped"]["reference"]["n_used"] == (reference.obs["kind"] != "B").sum()
    for column in ("kind", "lymphoid", "text"):
        alone = mapped(query, reference, column)
        pd.testing.assert_series_equal(out.obs[f"{column}_mapped"], alone.obs[f"{column}_mapped"])


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_results_survive_writing(query, reference, tmp_path, store):
    reference.uns["kind_colors"] = ["red", "green", "blue", "black"]
    reference.obs["slash"] = reference.obs["kind"].astype(str).replace({"B": "NK_T"})
    map_to_reference(query, reference, ["kind", "lymphoid", "slash"], use_rep="X_rep", min_confidence=0.1)
    getattr(query, f"write_{store}")(tmp_path / f"out.{store}")
    again = getattr(ad, f"read_{store}")(tmp_path / f"out.{store}")
    for column in ("kind_mapped", "lymphoid_mapped", "slash_mapped"):
        assert list(again.obs[column]) == list(query.obs[column])
        pd.testing.assert_frame_equal(again.obsm[f"{column}_proba"], query.obsm[f"{column}_proba"])
        assert list(again.uns[column]["labels"]) == list(query.uns[column]["labels"])
    assert list(again.obsm["slash_mapped_proba"]) == ["Mono", "NK_T", "NK_T_1"]
    assert list(again.uns["kind_mapped_colors"]) == ["red", "green", "blue", "black"]
    map_to_reference(again, reference, "kind", use_rep="X_rep")  # a result of an earlier run may be replaced


def test_columns_of_the_user_are_safe(query, reference):
    query.obs["kind_mapped"] = "mine"
    with pytest.raises(ValueError, match="obs has a column 'kind_mapped' already"):
        map_to_reference(query, reference, "kind", use_rep="X_rep")
    map_to_reference(query, reference, "kind", use_rep="X_rep", key_added="new")
    assert (query.obs["kind_mapped"] == "mine").all()
    assert {"new", "new_confidence"} <= set(query.obs)
    assert list(query.obsm) == ["X_rep", "new_proba"]
    assert list(query.uns) == ["new"]
    map_to_reference(query, reference, "kind", use_rep="X_rep", key_added="kind_mapped")
    assert (query.obs["kind_mapped"] != "mine").all()
    out = mapped(query, reference, ["kind", "lymphoid"], key_added=["a", "b"])
    assert {"a_proba", "b_proba"} <= set(out.obsm)
    with pytest.raises(ValueError, match="one name for each of the 2 columns"):
        mapped(query, reference, ["kind", "lymphoid"], key_added="a")


def test_a_view_becomes_a_copy_and_the_original_stays(query, reference):
    expected = mapped(query, reference).obs["kind_mapped"][4:12]
    view = query[4:12]
    with pytest.warns(ad.ImplicitModificationWarning):
        map_to_reference(view, reference[:], "kind", use_rep="X_rep")
    assert "kind_mapped" not in query.obs
    assert list(view.obs["kind_mapped"]) == list(expected)


def test_frames_and_files_as_embeddings(query, reference, tmp_path):
    expected = mapped(query, reference).obs["kind_mapped"]
    reference.obsm["X_rep"] = pd.DataFrame(reference.obsm["X_rep"], index=reference.obs_names)
    query.write_h5ad(tmp_path / "query.h5ad")
    backed = ad.read_h5ad(tmp_path / "query.h5ad", backed="r")
    map_to_reference(backed, reference, "kind", use_rep="X_rep")
    assert list(backed.obs["kind_mapped"]) == list(expected)
    with pytest.raises(ValueError, match="a view of a backed AnnData cannot hold results"):
        map_to_reference(backed[:5], reference, "kind", use_rep="X_rep")
    backed.file.close()


# -- what changes nothing ------------------------------------------------------------------------------------------------


@few_examples
@given(st.permutations(range(N_QUERY)), st.permutations(range(N_REFERENCE)), st.sampled_from([1, 7, 40]))
def test_order_of_cells(query, reference, queries, rows, k):
    reference.obs["kind"] = reference.obs["kind"].astype(str)
    straight = mapped(query, reference, k=k, weights="distance")
    moved = mapped(query[list(queries)].copy(), reference[list(rows)].copy(), k=k, weights="distance")
    assert straight.obs["kind_mapped_confidence"].nunique() == (1 if k < 40 else N_QUERY)
    assert list(moved.obs_names) == list(query.obs_names[list(queries)])
    moved = moved[straight.obs_names]
    assert list(moved.obs["kind_mapped"]) == list(straight.obs["kind_mapped"])
    np.testing.assert_allclose(moved.obsm["kind_mapped_proba"], straight.obsm["kind_mapped_proba"], atol=1e-6)


def test_faiss_finds_the_same(query, reference):
    pytest.importorskip("faiss")
    for metric in ("euclidean", "cosine"):
        exact, faiss = (mapped(query, reference, k=40, metric=metric, index=index) for index in ("exact", "faiss"))
        assert exact.obs["kind_mapped_confidence"].nunique() > 1
        assert list(faiss.obs["kind_mapped"]) == list(exact.obs["kind_mapped"])
        pd.testing.assert_frame_equal(faiss.obsm["kind_mapped_proba"], exact.obsm["kind_mapped_proba"])


# -- with a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(adata):
    reference = adata[10:].copy()
    reference.obs["kind"] = np.array(["a", "b", "c"])[np.arange(reference.n_obs) % 3]
    return adata[:10].copy(), reference


def test_both_are_embedded(pair, model):
    query, reference = pair
    slot = f"X_{model.name}"
    map_to_reference(query, reference, "kind", model=model, k=3, progress=False)
    assert not reference.obsm
    assert not reference.uns
    np.testing.assert_allclose(query.obsm[slot], embed(query, model, copy=True).obsm[slot], atol=1e-6)
    assert query.uns[model.name]["checkpoint"]["id"] == model.name
    record = query.uns["kind_mapped"]
    assert record["params"]["use_rep"] == slot
    assert record["embedding"]["checkpoint"]["id"] == model.name
    assert record["embedding"]["params"]["pooling"] == model.default_pooling
    embed(reference, model)
    again = map_to_reference(query, reference, "kind", use_rep=slot, k=3, copy=True)
    assert list(again.obs["kind_mapped"]) == list(query.obs["kind_mapped"])
    # a cell is nearest to itself, or to another one with the same embedding
    _, same = np.unique(reference.obsm[slot].round(4), axis=0, return_inverse=True)
    reference.obs["same"] = same.astype(str)
    assert reference.obs["same"].nunique() > 10
    nearest = map_to_reference(reference, reference, "same", model=model, k=1, copy=True)
    assert list(nearest.obs["same_mapped"]) == list(reference.obs["same"])


def test_query_cells_without_known_genes(pair, model):
    query, reference = pair
    counts = query.X.toarray()
    counts[4, :50] = 0
    query.X = sparse.csr_matrix(counts)
    map_to_reference(query, reference, "kind", model=model, k=3, progress=False)
    assert query.obs["kind_mapped"].isna().tolist() == [i == 4 for i in range(10)]
    assert query.obs["kind_mapped_confidence"].isna().tolist() == [i == 4 for i in range(10)]
    assert query.uns["kind_mapped"]["without_label"] == 0.1


@pytest.fixture
def saved(scgpt, tmp_path):
    """A model from a folder, whose weights have a checksum."""
    scgpt.save(tmp_path / "saved")
    return scfm.load(tmp_path / "saved", device="cpu", precision="float32")


def spoil(adata, model):
    """Make visible whether the embedding is taken: cells get that of the cell at the other end."""
    slot = f"X_{model.name}"
    adata.obsm[slot] = adata.obsm[slot][::-1].copy()


def test_embeddings_with_the_same_record_are_taken(pair, saved, tmp_path, capsys):
    query, reference = pair
    for adata in pair:
        embed(adata, saved, layer=None, tie_break="left", batch_size=2)
        spoil(adata, saved)
    query.write_h5ad(tmp_path / "query.h5ad")
    query = ad.read_h5ad(tmp_path / "query.h5ad")
    slot = f"X_{saved.name}"
    before = [adata.obsm[slot].copy() for adata in (query, reference)]
    arguments = {"model": saved, "k": 1, "tie_break": "left", "copy": True}
    capsys.readouterr()
    out = map_to_reference(query, reference, "kind", **arguments)
    lines = capsys.readouterr().err
    assert f"taking obsm['{slot}'] of the reference" in lines
    assert f"taking obsm['{slot}'] of the query" in lines
    assert out.uns["kind_mapped"]["params"]["use_rep"] == slot
    expected = map_to_reference(query, reference, "kind", use_rep=slot, k=1, copy=True)
    assert list(out.obs["kind_mapped"]) == list(expected.obs["kind_mapped"])
    for adata, array in zip((query, reference), before, strict=True):
        np.testing.assert_array_equal(adata.obsm[slot], array)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rng": 1}, "it was made with rng=0 instead of 1"),
        ({"tie_break": "left"}, "it was made with tokenize_options=None"),
        ({"layer": "counts"}, "it was made with layer=None instead of 'counts'"),
        ({"duplicates": "sum"}, "it was made with duplicates=None instead of 'sum'"),
    ],
)
def test_embeddings_with_other_options_are_not_taken(pair, saved, capsys, change, reason):
    query, reference = pair
    for adata in pair:
        adata.layers["counts"] = adata.X.copy()
        embed(adata, saved)
        spoil(adata, saved)
    slot = f"X_{saved.name}"
    before = query.obsm[slot].copy()
    capsys.readouterr()
    out = map_to_reference(query, reference, "kind", model=saved, k=1, copy=True, **change)
    lines = capsys.readouterr().err
    assert f"obsm['{slot}'] of the reference is not used: {reason}" in lines
    assert f"obsm['{slot}'] of the query is not used: {reason}" in lines
    np.testing.assert_array_equal(out.obsm[slot], before)  # a slot that is taken stays what it is
    assert "use_rep" not in out.uns["kind_mapped"]["params"]
    for adata in pair:
        del adata.obsm[slot]
    fresh = map_to_reference(query, reference, "kind", model=saved, k=1, copy=True, **change)
    assert list(out.obs["kind_mapped"]) == list(fresh.obs["kind_mapped"])


@pytest.mark.parametrize("record", [None, {"params": {}}, "text", {"checkpoint": {"id": "other"}, "params": {}}])
def test_embeddings_of_unknown_origin_are_not_taken(pair, saved, record):
    query, reference = pair
    expected = map_to_reference(query, reference, "kind", model=saved, k=1, copy=True)
    for adata in pair:
        embed(adata, saved)
        spoil(adata, saved)
        adata.uns[saved.name] = record
    out = map_to_reference(query, reference, "kind", model=saved, k=1, copy=True)
    assert list(out.obs["kind_mapped"]) == list(expected.obs["kind_mapped"])


def test_weights_without_checksum_are_not_recognised(pair, scgpt, capsys):
    query, reference = pair
    embed(query, scgpt)
    map_to_reference(query, reference, "kind", model=scgpt, k=1)
    assert "not used: the weights have no checksum" in capsys.readouterr().err


def test_a_number_for_each_gene_needs_the_same_genes(pair, model):
    query, reference = pair
    other = query[:, ::-1].copy()
    by_gene = [p for p in model.poolings if model.pooling_options(p, model.vocab.match(query.var_names))]
    assert bool(by_gene) == (model.kind == "sclong")
    for pooling in by_gene:
        map_to_reference(query, reference, "kind", model=model, pooling=pooling, k=1, copy=True)
        with pytest.raises(ValueError, match="both need the same genes in the same order"):
            map_to_reference(other, reference, "kind", model=model, pooling=pooling, k=1)
    straight, moved = (map_to_reference(one, reference, "kind", model=model, k=1, copy=True) for one in (query, other))
    assert list(moved.obs["kind_mapped"]) == list(straight.obs["kind_mapped"])


# -- atlases -------------------------------------------------------------------------------------------------------------


def test_atlas(query, reference, tmp_path):
    pytest.importorskip("faiss")
    atlas = AtlasIndex.build(reference.obsm["X_rep"], reference.obs["kind"].astype(str))
    out = mapped(query, atlas, weights="proportion")
    assert list(out.obs["kind_mapped"].astype(str)) == list(query.obs["kind"])
    assert out.uns["kind_mapped"]["params"]["k"] == 50
    assert out.uns["kind_mapped"]["params"]["index"] == "atlas"
    assert out.uns["kind_mapped"]["reference"] == {"n_obs": N_REFERENCE, "n_used": N_REFERENCE, "kind": "atlas"}
    plain = reference.copy()
    plain.obs["kind"] = plain.obs["kind"].astype(str)
    exact = mapped(query, plain, k=50, weights="proportion")
    pd.testing.assert_frame_equal(out.obsm["kind_mapped_proba"], exact.obsm["kind_mapped_proba"])
    atlas.write(tmp_path / "atlas")
    again = mapped(query, tmp_path / "atlas", None, weights="proportion")
    assert list(again.obs["atlas_mapped"]) == list(out.obs["kind_mapped"])
    with pytest.raises(ValueError, match="an atlas has one set of labels; got 2 names"):
        mapped(query, atlas, ["a", "b"])
    with pytest.raises(ValueError, match="leave metric= and index= at their defaults"):
        mapped(query, atlas, metric="cosine")
    with pytest.raises(ValueError, match=f"k={N_REFERENCE + 1} neighbours"):
        mapped(query, atlas, k=N_REFERENCE + 1)
    query.obsm["X_rep"] = query.obsm["X_rep"][:, :2]
    with pytest.raises(ValueError, match="embeddings with 3 columns"):
        mapped(query, atlas)


def test_atlas_of_another_model_is_refused(pair, saved, scgpt):
    pytest.importorskip("faiss")
    query, reference = pair
    embed(reference, saved)
    slot = f"X_{saved.name}"
    atlas = AtlasIndex.build(reference.obsm[slot], reference.obs["kind"], record=reference.uns[saved.name])
    out = map_to_reference(query, atlas, "kind", model=saved, k=3, copy=True)
    exact = map_to_reference(query, reference, "kind", model=saved, k=3, copy=True)
    assert list(out.obs["kind_mapped"]) == list(exact.obs["kind_mapped"])
    with pytest.raises(ValueError, match="the atlas does not fit that of the query: .* made by the checkpoint"):
        map_to_reference(query, atlas, "kind", model=scgpt, k=3)
    with pytest.raises(ValueError, match="made with rng=0 instead of 5"):
        map_to_reference(query, atlas, "kind", model=saved, k=3, rng=5)
    assert not query.obsm


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_wrong_references(query, reference, tmp_path):
    with pytest.raises(TypeError, match="adata must be an AnnData object; got str"):
        map_to_reference("query.h5ad", reference, "kind")
    with pytest.raises(TypeError, match="reference must be an AnnData object, an AtlasIndex or its folder; got DataFr"):
        map_to_reference(query, reference.obs, "kind")
    with pytest.raises(FileNotFoundError, match="no folder with an atlas"):
        map_to_reference(query, tmp_path, "kind")
    with pytest.raises(ValueError, match="the reference has no cells"):
        mapped(query, reference[:0].copy())
    with pytest.raises(ValueError, match="adata has no cells"):
        mapped(query[:0].copy(), reference)


def test_wrong_labels(query, reference):
    with pytest.raises(KeyError, match="obs of the reference has no column 'type'; there are kind, lymphoid"):
        mapped(query, reference, "type")
    reference.obs["age"] = np.arange(N_REFERENCE)
    with pytest.raises(TypeError, match=r"holds numbers.*astype\('category'\)"):
        mapped(query, reference, "age")
    reference.obs["age"] = (reference.obs["age"] % 2).astype("category")
    assert list(mapped(query, reference, "age").obsm["age_mapped_proba"]) == ["0", "1"]
    reference.obs["mixed"] = pd.Series([1, "a"] * 45, index=reference.obs_names, dtype=object)
    with pytest.raises(TypeError, match="must hold text, categories, or True and False"):
        mapped(query, reference, "mixed")
    reference.obs["when"] = pd.Timestamp("2024-01-01")
    with pytest.raises(TypeError, match="must hold text, categories, or True and False; it is datetime64"):
        mapped(query, reference, "when")
    reference.obs["nothing"] = pd.Categorical([None] * N_REFERENCE, categories=["a"])
    with pytest.raises(ValueError, match=r"no cell of the reference has a label in obs\['nothing'\]"):
        mapped(query, reference, "nothing")
    for none in (None, [], ["kind", "kind"]):
        with pytest.raises(ValueError, match="labels_key must name columns"):
            mapped(query, reference, none)


def test_too_few_reference_cells(query, reference):
    reference.obs["rare"] = pd.Categorical(["x"] * 4 + [None] * (N_REFERENCE - 4))
    with pytest.raises(ValueError, match="k=10 .* has 4 cells with a label in 'rare'; choose a smaller k"):
        mapped(query, reference, "rare")
    reference.obsm["X_rep"][:3] = np.nan
    with pytest.raises(ValueError, match="has 1 cells with a label in 'rare' and an embedding"):
        mapped(query, reference, "rare", k=2)
    with pytest.raises(ValueError, match="in 'rare' and an embedding"):
        map_to_reference(query, reference, ["kind", "rare"], use_rep="X_rep", k=2)
    assert "kind_mapped" not in query.obs  # nothing is written by half
    assert (mapped(query, reference, "rare", k=1).obs["rare_mapped"] == "x").all()


def test_wrong_slots(query, reference):
    with pytest.raises(KeyError, match="obsm of the reference has no slot 'X_other'; there are X_rep"):
        map_to_reference(query, reference, "kind", use_rep="X_other")
    reference.obsm["X_other"] = sparse.csr_matrix(reference.obsm["X_rep"])
    with pytest.raises(TypeError, match="must be a dense array of numbers"):
        map_to_reference(query, reference, "kind", use_rep="X_other")
    reference.obsm["X_other"] = reference.obsm["X_rep"]
    with pytest.raises(KeyError, match="obsm of the query has no slot 'X_other'"):
        map_to_reference(query, reference, "kind", use_rep="X_other")
    reference.obsm["X_rep"] = np.ones((N_REFERENCE, 5))
    with pytest.raises(ValueError, match="the reference has 5 columns and the query 3"):
        mapped(query, reference)


def test_wrong_options(query, reference, monkeypatch):
    with pytest.raises(ValueError, match="min_confidence is a share of votes between 0 and 1; got 90"):
        mapped(query, reference, min_confidence=90)
    with pytest.raises(TypeError, match="no model is run, so that there is no option 'n_neighbors'"):
        mapped(query, reference, n_neighbors=3)
    with pytest.raises(ValueError, match="weights must be one of uniform"):
        mapped(query, reference, weights="majority")
    with pytest.raises(ValueError, match="k must be a positive whole number"):
        mapped(query, reference, k=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(scfm.MissingExtraError, match=r"scfm\[faiss\]"):
        mapped(query, reference, index="faiss")
    assert list(query.obs) == ["kind", "lymphoid"]
    assert list(query.obsm) == ["X_rep"]


# -- real cells ----------------------------------------------------------------------------------------------------------


def test_from_one_chemistry_to_the_others(shared, tmp_path):
    """Five-prime cells label three-prime cells of two versions, with the bundled model."""
    pbmc = ad.read_h5ad(shared("data", "singlecell", "pbmc_3tech_symphony_1200.h5ad"))
    reference, query = pbmc[pbmc.obs["batch"] == "5p"].copy(), pbmc[pbmc.obs["batch"] != "5p"].copy()
    embed(reference, "scgpt-mini", progress=False)
    truth = query.obs["cell_type"].astype(str)
    map_to_reference(query, reference, ["cell_type", "cell_type_coarse"], model="scgpt-mini", progress=False)
    accuracy = (query.obs["cell_type_mapped"].astype(str) == truth).mean()
    coarse = (query.obs["cell_type_coarse_mapped"].astype(str) == query.obs["cell_type_coarse"].astype(str)).mean()
    assert accuracy > truth.value_counts(normalize=True).max() + 0.2
    assert coarse > query.obs["cell_type_coarse"].value_counts(normalize=True).max() + 0.2
    # cells with more votes for their label are right more often
    sure = query.obs["cell_type_mapped_confidence"] >= 0.9
    assert 0.1 < sure.mean() < 0.9
    assert (query.obs["cell_type_mapped"].astype(str) == truth)[sure].mean() > accuracy + 0.05
    query.write_h5ad(tmp_path / "query.h5ad")
    again = ad.read_h5ad(tmp_path / "query.h5ad")
    rng = np.random.default_rng(0)
    again.obs["shuffled"] = rng.permutation(again.obs["cell_type"])
    reference.obs["shuffled"] = rng.permutation(reference.obs["cell_type"])
    map_to_reference(again, reference, "shuffled", model="scgpt-mini", progress=False)
    assert (again.obs["shuffled_mapped"].astype(str) == truth).mean() < accuracy - 0.2
    if (found := pytest.importorskip("faiss")) is not None:
        found.omp_set_num_threads(1)
        arguments = {"model": "scgpt-mini", "copy": True, "progress": False, "index": "faiss"}
        faiss = map_to_reference(again, reference, "cell_type", **arguments)
        assert list(faiss.obs["cell_type_mapped"]) == list(query.obs["cell_type_mapped"])
