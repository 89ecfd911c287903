"""``tl.gene_similarity``: cosines of static, stored and contextual vectors of genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scfm.tl import gene_embeddings, gene_similarity

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def as_table(result) -> pd.DataFrame:
    return pd.DataFrame(result["similarity"], index=result["genes"], columns=result["genes"])


def test_golden_cosines_of_static_embeddings(golden):
    case = golden("scgpt", "gene_network")
    checkpoint = golden("scgpt", "embed_cells").path / "checkpoint"
    genes = [str(gene) for gene in case.expected["genes"]]
    adata = ad.AnnData(np.ones((2, len(genes)), dtype=np.float32), var=pd.DataFrame(index=genes))
    gene_similarity(adata, checkpoint, n_genes=None)
    table = as_table(adata.uns["gene_similarity"])
    names = case.expected["sim_gene0_names"]
    np.testing.assert_allclose(table.loc[genes[0], names], case.expected["sim_gene0"], atol=1e-5)
    # the edges above the threshold of the case, with those of genes to themselves
    strong = {(str(a), str(b)) for a, b in case.expected["edges_0.3"]}
    mine = {(a, b) for a in genes for b in genes if table.loc[a, b] > case.case["config"]["threshold"]}
    assert {frozenset(edge) for edge in mine} == {frozenset(edge) for edge in strong}


def test_genes_of_the_largest_summed_similarity_are_kept(adata, model):
    assert gene_similarity(adata, model, n_genes=7) is None
    result = adata.uns["gene_similarity"]
    table = model.gene_embeddings().numpy()[model.vocab.get_ids([f"GENE{i}" for i in range(50)])].astype(float)
    full = cosines(table)
    best = np.argsort(-full.sum(1))[:7]
    assert result["genes"].tolist() == [f"GENE{i}" for i in best]
    assert result["similarity"].dtype == np.float32
    np.testing.assert_allclose(result["similarity"], full[np.ix_(best, best)], atol=1e-5)
    assert result["params"]["n_compared"] == 50


def test_markers_are_kept_beside_them(adata, scgpt, capsys):
    gene_similarity(adata, scgpt, n_genes=5, key_added="plain")
    few_genes = adata.uns["plain"]["genes"].tolist()
    markers = [f"GENE{i}" for i in range(50) if f"GENE{i}" not in few_genes][:2] + [few_genes[0], "OTHER1", "ABSENT"]
    gene_similarity(adata, scgpt, n_genes=5, markers=markers)
    result = adata.uns["gene_similarity"]
    assert result["markers"].tolist() == markers[:3]
    assert set(result["genes"]) == {*few_genes, *markers[:3]}
    assert result["similarity"].shape == (7, 7)
    assert "2 of 5 markers have no vector" in capsys.readouterr().err


def test_states_in_the_cells_of_a_group(adata, model):
    adata.obs["kind"] = pd.Categorical(["a", "b", "b", None] * 9 + ["a"])
    gene_similarity(adata, model, groupby="kind", group="b", n_cells=None, n_genes=None, progress=False)
    result = adata.uns["gene_similarity"]
    gene_embeddings(adata, model, groupby="kind", progress=False)
    slot = pd.DataFrame(np.asarray(adata.varm[f"{model.name}_b"]), index=adata.var_names)
    np.testing.assert_allclose(result["similarity"], cosines(slot.loc[result["genes"]].to_numpy(float)), atol=1e-4)
    assert set(result["genes"]) == set(slot.dropna().index)
    assert result["params"]["n_cells"] == 18
    assert f"{model.name}_contextual" not in adata.varm


def test_the_draw_of_cells_depends_on_the_seed_and_not_on_their_order(adata, scgpt):
    adata.obs["kind"] = pd.Categorical(["a"] * 30 + ["b"] * 7)
    options = {"groupby": "kind", "group": "a", "n_cells": 8, "n_genes": None, "progress": False}
    gene_similarity(adata, scgpt, **options)
    first = as_table(adata.uns["gene_similarity"])
    other = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    gene_similarity(other, scgpt, **options)
    again = as_table(other.uns["gene_similarity"])
    pd.testing.assert_frame_equal(again.loc[first.index, first.index], first, atol=1e-5)
    gene_similarity(adata, scgpt, **options, rng=1)
    second = as_table(adata.uns["gene_similarity"])
    assert (
        set(second.index) != set(first.index)
        or np.abs(second.loc[first.index, first.index] - first).to_numpy().max() > 1e-4
    )


@few
@given(seed=st.integers(0, 1000))
def test_the_order_of_genes_does_not_matter(adata, seed):
    vectors = np.random.default_rng(3).normal(size=(adata.n_vars, 6)).astype(np.float32)
    adata.varm["vectors"] = vectors
    other = adata[:, np.random.default_rng(seed).permutation(adata.n_vars)].copy()
    for one in (adata, other):
        gene_similarity(one, use_rep="vectors", n_genes=10)
    first, second = adata.uns["gene_similarity"], other.uns["gene_similarity"]
    assert first["genes"].tolist() == second["genes"].tolist()
    np.testing.assert_allclose(first["similarity"], second["similarity"], atol=1e-6)


def test_result_survives_a_file(adata, scgpt, tmp_path):
    gene_similarity(adata, scgpt, n_genes=5, markers=["GENE1"])
    adata.write_h5ad(tmp_path / "x.h5ad")
    stored = ad.read_h5ad(tmp_path / "x.h5ad").uns["gene_similarity"]
    for name in ("genes", "markers", "similarity"):
        np.testing.assert_array_equal(stored[name], adata.uns["gene_similarity"][name])
    copy = gene_similarity(adata, scgpt, key_added="other", copy=True)
    assert "other" in copy.uns
    assert "other" not in adata.uns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groupby": "kind"}, ValueError, "go together"),
        ({"group": "a"}, ValueError, "go together"),
        ({"groupby": "kind", "group": "a", "use_rep": "x"}, ValueError, "give one of them"),
        ({"groupby": "kind", "group": "z"}, KeyError, "there are a, b"),
        ({"groupby": "nothing", "group": "z"}, KeyError, "no column 'nothing'"),
        ({"n_genes": 1}, ValueError, "at least 2"),
        ({"use_rep": "nothing"}, KeyError, "no slot 'nothing'"),
        ({"genes": ["ABSENT"]}, KeyError, "no gene ABSENT"),
        ({"markers": "GENE1"}, TypeError, "list of genes"),
    ],
)
def test_wrong_arguments(adata, scgpt, options, error, message):
    adata.obs["kind"] = pd.Categorical(["a"] * 30 + ["b"] * 7)
    with pytest.raises(error, match=message):
        gene_similarity(adata, scgpt, **options)
