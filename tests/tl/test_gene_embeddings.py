"""``tl.gene_embeddings``: static vectors in ``varm``, and means of gene states over groups of cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scfm
from scfm.tl import gene_embeddings


def states_of_each_cell(adata, model) -> dict[tuple[int, int], np.ndarray]:
    """State of each gene (vocabulary id) in each cell, one cell at a time."""
    out = {}
    for i in range(adata.n_obs):
        tokens = model.tokenize(adata.X[i], list(adata.var_names))
        for rows in model.iter_gene_states(tokens):
            out |= {(i, int(gene)): value.numpy() for gene, value in zip(rows.genes, rows.values, strict=True)}
    return out


def test_static_embeddings_are_the_rows_of_the_model(adata, model):
    assert gene_embeddings(adata, model) is None
    table = model.gene_embeddings().numpy()
    slot = adata.varm[model.name]
    assert slot.dtype == np.float32
    np.testing.assert_array_equal(slot[7], table[model.vocab["GENE7"]])
    assert np.isnan(slot[50:]).all()
    record = adata.uns[f"{model.name}_genes"]
    assert record["genes"]["matched"] == 50
    assert not record["params"]["contextual"]


def test_static_embeddings_need_no_counts(adata, model):
    del adata.X
    gene_embeddings(adata, model, key_added="vectors")
    assert np.isfinite(adata.varm["vectors"][:50]).all()


def test_contextual_embeddings_are_means_over_the_cells_of_a_group(adata, model):
    adata.obs["kind"] = pd.Categorical(["a", "b", "b", None] * 9 + ["a"])
    gene_embeddings(adata, model, groupby="kind", progress=False)
    states = states_of_each_cell(adata, model)
    for group in ("a", "b"):
        cells = np.flatnonzero(adata.obs["kind"] == group)
        slot = adata.varm[f"{model.name}_{group}"]
        assert slot.shape == (adata.n_vars, model.gene_state_dim)
        for column in (0, 4, 30, 52):
            gene = int(model.vocab.get_ids([adata.var_names[column]])[0])
            expected = [states[cell, gene] for cell in cells if (cell, gene) in states]
            assert adata.varm[f"{model.name}_n_cells"][group].iloc[column] == len(expected)
            if expected:
                np.testing.assert_allclose(slot[column], np.mean(expected, axis=0), atol=1e-5)
            else:
                assert np.isnan(slot[column]).all()


def test_the_means_do_not_depend_on_sizes_and_on_other_genes_that_are_wanted(adata, model):
    gene_embeddings(adata, model, contextual=True, progress=False)
    whole = adata.varm[f"{model.name}_contextual"]
    gene_embeddings(adata, model, contextual=True, batch_size=3, block_size=5, key_added="small", progress=False)
    np.testing.assert_allclose(adata.varm["small_contextual"], whole, atol=1e-5)
    some = ["GENE9", "GENE1"]
    gene_embeddings(adata, model, contextual=True, genes=some, key_added="some", progress=False)
    rows = adata.var_names.isin(some)
    np.testing.assert_allclose(adata.varm["some_contextual"][rows], whole[rows], atol=1e-5)
    assert np.isnan(adata.varm["some_contextual"][~rows]).all()


def test_empty_cells_do_not_take_part(adata, model):
    gene_embeddings(adata, model, contextual=True, progress=False)
    more = adata.copy()
    counts = more.X.tolil()
    counts[3] = 0
    more.X = counts.tocsr()
    gene_embeddings(more, model, contextual=True, progress=False)
    keep = np.arange(adata.n_obs) != 3
    rest = adata[keep].copy()
    gene_embeddings(rest, model, contextual=True, progress=False)
    slot = f"{model.name}_contextual"
    np.testing.assert_allclose(more.varm[slot], rest.varm[slot], atol=1e-5)


def test_genes_that_share_an_entry_get_the_same_row(adata, model):
    adata.var_names = [*adata.var_names[:-1], "GENE3"]
    for contextual in (False, True):
        gene_embeddings(adata, model, contextual=contextual, key_added="x", progress=False)
        slot = adata.varm["x_contextual" if contextual else "x"]
        np.testing.assert_array_equal(slot[3], slot[-1])


def test_result_can_be_written(adata, model, tmp_path):
    adata.obs["kind"] = ["T cell", "B/plasma"] * 18 + ["T cell"]
    gene_embeddings(adata, model, groupby="kind", progress=False)
    adata.write_h5ad(tmp_path / "x.h5ad")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groupby": "nothing"}, KeyError, "no column 'nothing'"),
        ({"groupby": "kind", "groups": ["c"]}, KeyError, "no group c"),
        ({"groups": ["a"], "contextual": True}, ValueError, "needs groupby"),
        ({"contextual": False, "groupby": "kind"}, ValueError, "do not depend on cells"),
        ({"contextual": True, "genes": ["OTHER1"]}, KeyError, "does not know OTHER1"),
        ({"contextual": True, "genes": ["ABSENT"]}, KeyError, "no gene ABSENT"),
    ],
)
def test_wrong_arguments(adata, scgpt, arguments, error, message):
    adata.obs["kind"] = "a"
    with pytest.raises(error, match=message):
        gene_embeddings(adata, scgpt, **arguments)


def test_too_many_groups_are_refused_before_anything_is_computed(adata, scgpt, monkeypatch):
    monkeypatch.setattr("scfm.engine._gene_means._SUM_BYTES", 1000)
    with pytest.raises(MemoryError, match="genes="):
        gene_embeddings(adata, scgpt, contextual=True)


def test_values_are_checked(adata, scfoundation):
    adata.X = sparse.csr_matrix(adata.X) * 0.5
    with pytest.raises(ValueError, match="recover_counts"):
        gene_embeddings(adata, scfoundation, contextual=True)


def test_public_name():
    assert scfm.tl.gene_embeddings is gene_embeddings
