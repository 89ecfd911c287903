"""``tl.gene_network`` and ``tl.cell_type_genes``: cosine and attention networks, edge selection, memory."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from tiny import TINY

import scfm
from scfm import engine
from scfm.backbones import backbone_class, from_config, rebuilt
from scfm.genes import GeneVocab
from scfm.tl import cell_type_genes, gene_network
from scfm.tl._network_edges import cosine_blocks, select_edges

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GENES = [f"GENE{i}" for i in (1, 4, 9, 3, 30, 12)]
# so that every pair of genes is in every cell
ALL_GENES = {"scgpt": {"include_zeros": True, "max_length": 64}}


@pytest.fixture
def grouped(adata):
    adata.obs["kind"] = pd.Categorical(["a", "b", "b", None] * 9 + ["a"], categories=["a", "b", "nobody"])
    return adata


@pytest.fixture(scope="module")
def cellfm():
    specials = backbone_class("cellfm").specials
    vocab = GeneVocab([*specials, *(f"GENE{i}" for i in range(50))], specials=specials)
    config = backbone_class("cellfm").config_for(TINY["cellfm"], vocab)
    return from_config("cellfm", config, vocab, name="cellfm", device="cpu", precision="float32")


def edge_table(adata, key="gene_network") -> pd.DataFrame:
    return adata.uns[key]["edges"]


# -- golden cases --------------------------------------------------------------------------------------------------------


def test_golden_cosine_network(golden):
    data = golden("scgpt", "gene_network")
    backbone = scfm.load(golden("scgpt", "embed_cells").path / "checkpoint")
    adata = ad.AnnData(np.zeros((1, 60), np.float32), var=pd.DataFrame(index=data.expected["genes"]))
    gene_network(adata, backbone, threshold=data.case["config"]["threshold"], self_loops=True)
    found = {frozenset(pair) for pair in edge_table(adata)[["source", "target"]].to_numpy()}
    assert found == {frozenset(pair) for pair in data.expected["edges_0.3"]}
    assert len(edge_table(adata)) == len(data.expected["edges_0.3"])
    gene_network(adata, backbone, threshold=-2, self_loops=True)
    names = data.expected["sim_gene0_names"]
    row = adata.varp["gene_network"][adata.var_names.get_loc(names[0])].toarray()[0]
    np.testing.assert_allclose(row[adata.var_names.get_indexer(names)], data.expected["sim_gene0"], atol=1e-5)


@pytest.fixture
def grn(golden):
    """Cells, model and case of the attention network of scGPT; position 0 of its maps is <cls>."""
    data = golden("scgpt", "attention_grn")
    path = data.path / "checkpoint" / "model.pt"
    n = len(torch.load(path, weights_only=True, mmap=True)["encoder.embedding.weight"])
    vocab = [*(f"gene{i}" for i in range(n - 3)), "<pad>", "<cls>", "<eoc>"]
    backbone = scfm.load(path, args=data.case["config"], vocab=vocab, device="cpu", precision="float32")
    adata = ad.AnnData(
        sparse.csr_matrix(data.input["values"][:, 1:]),
        obs=pd.DataFrame({"condition": data.input["condition"]}, index=[f"cell{i}" for i in range(6)]),
        var=pd.DataFrame(index=[f"gene{i}" for i in data.input["genes"][0, 1:]]),
    )
    options = {"include_zeros": True, "n_bins": None, "cls_value": 0, "min_cells": 1, "method": "attention"}
    options |= {"groupby": "condition", "control": "ctrl", "perturbed": "TF1+ctrl"}
    return data, backbone, adata, options


@pytest.mark.parametrize("mean", ["true_mean", "upstream_mean"])
def test_golden_attention_network(grn, mean):
    data, backbone, adata, options = grn
    gene_network(adata, backbone, threshold=-2, self_loops=True, mean=mean, **options)
    for condition, name in (("control", "ctrl"), ("perturbed", "TF1+ctrl")):
        found = adata.varp[f"gene_network_{condition}"].toarray().T  # queries in rows, as upstream has it
        np.testing.assert_allclose(found, data.expected[f"{mean}__{name}"][1:, 1:], atol=2e-4)
        assert np.abs(found - data.expected[f"{mean}__{name}"][1:, 1:]).max() < 1e-6
    factor = adata.var_names.get_loc(f"gene{int(data.input['tf_token'])}")
    for condition in ("control", "perturbed", "difference"):
        column = adata.varp[f"gene_network_{condition}"][factor].toarray()[0]
        prefix = f"{mean.removesuffix('_mean')}__{condition}__top10"
        place, score = data.expected[f"{prefix}_pos"], data.expected[f"{prefix}_score"]
        place, score = place[place > 0] - 1, score[place > 0]
        np.testing.assert_allclose(column[place], score, atol=2e-4)
        # ties may come in any order, but nothing else is as high
        np.testing.assert_allclose(np.sort(column)[::-1][: len(score)], score, atol=2e-4)


def test_golden_attention_map_of_sclong(golden):
    data = golden("sclong", "attention_map")
    backbone = scfm.load(data.path / "checkpoint", device="cpu", precision="float32")
    top = data.expected["top_indices"][0]
    genes = backbone.vocab.is_gene
    adata = ad.AnnData(
        sparse.csr_matrix(data.input["x"][:, genes]), var=pd.DataFrame(index=backbone.vocab.names[genes])
    )
    names, known = backbone.vocab.names[top], genes[top]
    gene_network(
        adata,
        backbone,
        method="attention",
        normalization="as_is",
        threshold=-1,
        self_loops=True,
        attention_options={"upstream_compat": True},
    )
    found = adata.varp["gene_network"].toarray().T
    columns = adata.var_names.get_indexer(names[known])
    expected = data.expected["large_enc_attentions"][0, 0][np.ix_(known, known)]
    assert known.sum() > 30
    np.testing.assert_allclose(found[np.ix_(columns, columns)], expected, rtol=0.02, atol=0.002)
    others = np.setdiff1d(np.arange(adata.n_vars), columns)
    assert not found[others].any()  # no token of the large encoder


def test_golden_ranks_of_cellfm_by_cell_type(golden, shared):
    data = golden("cellfm", "ms_annotation_80m_vocab")
    config = data.case["config"]
    backbone = scfm.load(
        data.path / "checkpoint",
        weights="finetuned.ckpt",
        genes=shared("data", "vocab", "cellfm", config["vocabulary"]),
        n_heads=config["enc_num_heads"],
    )
    # cell 5 is longer than the input of the authors, who drew some of its genes; cell 6 has no gene
    cells = [0, 1, 2, 3, 4, 7]
    options = {"rank": "upstream", "padded_length": config["pad_len"]}
    given = backbone.batch(data.expected["tok_gene"], data.expected["tok_value"]).select(cells)
    ranks = backbone.cell_attention(given, **options).numpy()
    expected = data.expected["cls_attention_rank"][cells][:, : ranks.shape[1]]
    assert np.abs(ranks - expected)[~given.padding].max() <= 1.01 / 2048
    assert (np.abs(ranks - expected)[~given.padding] < 1e-6).mean() > 0.99
    adata = ad.AnnData(
        sparse.csr_matrix(data.expected["log1p"][cells]),
        var=pd.DataFrame(index=data.expected["genes_after_intersection"]),
    )
    adata.obs["kind"] = ["p", "q", "p", "q", "p", "q"]
    cell_type_genes(
        adata,
        backbone,
        groupby="kind",
        n_genes=10_000,
        min_cells=1,
        pre_normalized=True,
        attention_options=options,
    )
    table = adata.uns["cell_type_genes"]["table"]
    # through the tool: the mean over the cells of a type that have the gene
    ids, ranks = data.expected["tok_gene"][cells], data.expected["cls_attention_rank"][cells]
    names = backbone.vocab.names
    for kind in "pq":
        rows = adata.obs["kind"].to_numpy() == kind
        flat, values = ids[rows].ravel(), ranks[rows].ravel()
        expected = pd.Series(values[flat > 0]).groupby(names[flat[flat > 0]]).mean()
        found = table[table["group"] == kind].set_index("gene")["score"]
        assert set(found.index) == set(expected.index)
        # tokens come in the order of the vocabulary here, which decides between scores that are equal, many of them 0
        difference = np.abs(found[expected.index].to_numpy() - expected.to_numpy())
        assert difference.max() <= 2 / 2048
        assert (difference < 1e-6).mean() > 0.9


# -- cosine --------------------------------------------------------------------------------------------------------------


def test_cosine_network_of_every_model(adata, model):
    gene_network(adata, model, genes=GENES, top_k=2)
    table = model.gene_embeddings().numpy()[model.vocab.get_ids(GENES)]
    cosine = table @ table.T / np.outer(*[np.linalg.norm(table, axis=1)] * 2)
    np.fill_diagonal(cosine, -2)
    expected = {frozenset((GENES[i], GENES[j])) for i in range(len(GENES)) for j in np.argsort(-cosine[i])[:2]}
    edges = edge_table(adata)
    assert {frozenset(pair) for pair in edges[["source", "target"]].to_numpy()} == expected
    assert len(edges) == len(expected)
    assert (np.diff(edges["weight"]) <= 0).all()
    matrix = adata.varp["gene_network"]
    assert matrix.shape == (adata.n_vars, adata.n_vars)
    assert (matrix != matrix.T).nnz == 0
    assert matrix.nnz == 2 * len(edges)
    record = adata.uns["gene_network"]
    assert record["params"]["top_k"] == 2
    assert set(record["nodes"]) == set(GENES)


def test_by_default_highly_variable_genes_or_a_program(adata, scgpt):
    adata.var["highly_variable"] = adata.var_names.isin(GENES)
    gene_network(adata, scgpt)
    assert set(adata.uns["gene_network"]["nodes"]) == set(GENES)
    adata.uns["gene_programs"] = {"programs": {"1": np.array(GENES[:3])}}
    gene_network(adata, scgpt, program="1")
    assert set(adata.uns["gene_network"]["nodes"]) == set(GENES[:3])
    with pytest.raises(KeyError, match="no gene program '7'"):
        gene_network(adata, scgpt, program="7")


@few
@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-0.5, 0.5))
def test_order_of_genes_and_size_of_blocks_do_not_matter(seed, top_k, threshold):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(12, 5)).astype(np.float32)
    order = rng.permutation(12)
    whole = select_edges(cosine_blocks(values), threshold=threshold, top_k=top_k)
    single = select_edges(
        (block for i in range(12) for block in cosine_blocks(values, np.array([i]))), threshold=threshold, top_k=top_k
    )
    assert set(zip(single.source, single.target, strict=True)) == set(zip(whole.source, whole.target, strict=True))
    moved = select_edges(cosine_blocks(values[order]), threshold=threshold, top_k=top_k)
    back = set(zip(order[moved.source], order[moved.target], strict=True))
    assert back == set(zip(whole.source, whole.target, strict=True))
    assert np.bincount(whole.source, minlength=12).max() <= top_k
    assert (whole.weight > threshold).all()


def test_ties_go_to_the_gene_that_comes_first():
    scores = np.array([[9.0, 1, 1, 1, np.nan]])
    edges = select_edges([(np.array([0]), scores)], top_k=2)
    np.testing.assert_array_equal(edges.target, [1, 2])
    edges = select_edges([(np.array([0]), scores)], top_k=2, self_loops=True)
    assert set(edges.target) == {0, 1, 2}


# -- attention -----------------------------------------------------------------------------------------------------------


def maps_of_each_cell(adata, model, genes, **options) -> list[np.ndarray]:
    ids = torch.from_numpy(model.vocab.get_ids(genes))
    tokenize = ALL_GENES.get(model.kind, {})
    return [
        model.attention(
            model.tokenize(adata.X[i], list(adata.var_names), **tokenize), genes=ids, **model.network_attention
        )[0].numpy()
        for i in range(adata.n_obs)
    ]


def test_attention_is_averaged_over_the_cells_that_have_both_genes(grouped, model):
    gene_network(
        grouped,
        model,
        method="attention",
        genes=GENES,
        groupby="kind",
        threshold=-1,
        min_cells=2,
        self_loops=True,
        progress=False,
        **ALL_GENES.get(model.kind, {}),
    )
    maps = np.stack(maps_of_each_cell(grouped, model, GENES))
    columns = grouped.var_names.get_indexer(GENES)
    assert list(grouped.varp) == ["gene_network_a", "gene_network_b"]  # an empty category is no group
    for group in "ab":
        some = maps[(grouped.obs["kind"] == group).to_numpy()]
        there = np.isfinite(some).sum(0)
        with np.errstate(invalid="ignore"):
            expected = np.where(there >= 2, np.nansum(some, 0) / there, 0)
        found = grouped.varp[f"gene_network_{group}"].toarray()[np.ix_(columns, columns)]
        np.testing.assert_allclose(found, expected.T, atol=1e-5)


def test_edges_go_from_key_to_query_and_the_difference_is_perturbed_minus_control(grouped, scgpt):
    options = {"method": "attention", "genes": GENES, "groupby": "kind", "include_zeros": True, "progress": False}
    gene_network(grouped, scgpt, control="a", perturbed="b", threshold=-2, **options)
    slots = {name: grouped.varp[f"gene_network_{name}"].toarray() for name in ("control", "perturbed", "difference")}
    # cells that are too long lose genes at random, so that a pair can lack in a group
    both = (slots["perturbed"] != 0) & (slots["control"] != 0)
    assert both.sum() > 20
    np.testing.assert_allclose(slots["difference"], (slots["perturbed"] - slots["control"]) * both, atol=1e-6)
    assert grouped.uns["gene_network"]["directed"]
    edges = edge_table(grouped).query("condition == 'control'")
    row = edges.iloc[0]
    at = grouped.var_names.get_indexer([row["source"], row["target"]])
    assert slots["control"][at[0], at[1]] == pytest.approx(row["weight"], abs=1e-6)
    gene_network(grouped, scgpt, genes=GENES)
    assert list(grouped.varp) == ["gene_network"]  # those of the earlier run are gone


@few
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12))
def test_order_of_cells_and_sizes_of_batches_do_not_matter(counts, scgpt, seed, batch_size, block_size):
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(50)] + [f"OTHER{i}" for i in range(6)])
    obs = pd.DataFrame({"kind": list("abb") * 4}, index=[f"cell{i}" for i in range(12)])
    adata = ad.AnnData(sparse.csr_matrix(counts[:12]), obs=obs, var=var)
    options = {"method": "attention", "genes": GENES, "groupby": "kind", "threshold": -1, "progress": False}
    gene_network(adata, scgpt, **options)
    other = adata[np.random.default_rng(seed).permutation(12)].copy()
    gene_network(other, scgpt, batch_size=batch_size, block_size=block_size, **options)
    for slot in adata.varp:
        np.testing.assert_allclose(other.varp[slot].toarray(), adata.varp[slot].toarray(), atol=1e-5)


def test_no_more_than_one_map_for_each_group_is_in_memory(scgpt, monkeypatch):
    n_genes, n_cells, n_groups = 1_200, 40, 2
    one = 4 * n_genes**2  # a map as the model gives it
    rng = np.random.default_rng(0)

    def visit(*, compute, consume, batch_size, **options):
        assert batch_size * one < 128 * 2**20
        for cell in range(n_cells):
            consume(np.array([cell]), torch.from_numpy(rng.random((1, n_genes, n_genes), dtype=np.float32)))

    monkeypatch.setattr("scfm.engine._attention_means.visit", visit)
    monkeypatch.setattr(engine.Task, "inputs", {})
    task = engine.Task(scgpt, None, None, {})

    def large_tensors() -> set[int]:
        large = [item for item in gc.get_objects() if torch.is_tensor(item) and item.numel() >= n_genes**2]
        return {item.untyped_storage().data_ptr() for item in large}

    before = large_tensors()
    tracemalloc.start()
    means = engine.AttentionMeans(task, np.arange(n_cells) % n_groups, n_groups, np.arange(n_genes))
    means.run(None)
    # tracemalloc sees the memory of numpy, in which the maps lie here
    left, peak = tracemalloc.get_traced_memory()
    assert left < 0.5 * one
    assert peak < 2.5 * one
    # and these are all large tensors: one map of float64 for each group
    assert large_tensors() - before == {means._sums.untyped_storage().data_ptr()}
    assert means._sums.untyped_storage().nbytes() == n_groups * 2 * one
    tracemalloc.reset_peak()
    total = sum(block.sum() for _, block, _ in means.blocks(0))
    assert tracemalloc.get_traced_memory()[1] - left < 2 * one  # a block at a time
    tracemalloc.stop()
    assert total == pytest.approx(n_genes**2 / 2, rel=0.01)


def test_groups_that_would_share_a_slot_are_refused(grouped, scgpt):
    grouped.obs["slash"] = ["T/B", "T_B"] * (grouped.n_obs // 2) + ["T/B"] * (grouped.n_obs % 2)
    with pytest.raises(ValueError, match="same slot"):
        gene_network(grouped, scgpt, method="attention", groupby="slash")


def test_with_zeros_no_gene_is_left_out_by_the_limit_of_tokens(grouped, scgpt):
    model = rebuilt(scgpt, replace(scgpt.config, max_length=5))
    options = {"method": "attention", "include_zeros": True, "min_cells": 1, "top_k": 3}
    gene_network(grouped, model, **options)
    short = grouped.uns["gene_network"]["edges"]
    gene_network(grouped, scgpt, **options)
    pd.testing.assert_frame_equal(short, grouped.uns["gene_network"]["edges"])


def test_too_many_genes_for_the_memory(scgpt):
    task = engine.Task(scgpt, None, None, {})
    with pytest.raises(MemoryError, match="fewer with genes= or groups="):
        engine.AttentionMeans(task, np.zeros(3, int), 10, np.arange(10_000))


# -- cells to genes ------------------------------------------------------------------------------------------------------


def test_genes_of_cell_types_are_those_with_the_highest_mean_ranks(grouped, scgpt, cellfm):
    grouped.var["feature"] = ["lncRNA", "protein coding"] * 28
    for model in (scgpt, cellfm):
        cell_type_genes(grouped, model, groupby="kind", n_genes=7, feature_key="feature", min_cells=3, progress=False)
        table = grouped.uns["cell_type_genes"]["table"]
        assert list(table["group"].unique()) == ["a", "b"]
        for group, part in table.groupby("group"):
            rows = np.flatnonzero(grouped.obs["kind"] == group)
            ranks: dict[str, list[float]] = {}
            for row in rows:
                tokens = model.tokenize(grouped.X[row], list(grouped.var_names))
                names = model.vocab.names[tokens.ids[0]]
                found = model.cell_attention(tokens)[0].numpy()
                for name, rank in zip(names[len(names) - len(found) :], found, strict=True):
                    ranks.setdefault(name, []).append(rank)
            means = pd.Series({name: np.mean(some) for name, some in ranks.items() if len(some) >= 3})
            np.testing.assert_allclose(part["score"], means.nlargest(7), atol=1e-5)
            np.testing.assert_allclose(means[part["gene"]], part["score"], atol=1e-5)
            assert part["rank"].tolist() == list(range(1, 8))
            kinds = grouped.var["feature"][part["gene"]]
            assert part["feature"].tolist() == kinds.tolist()


def test_attention_of_cls_is_the_row_of_the_whole_map(adata, cellfm, scgpt):
    tokens = cellfm.tokenize(adata.X[5], list(adata.var_names))
    whole = cellfm.attention(tokens, rank=False, average_heads=False)[0, :, 0, 1:]
    expected = (whole.argsort(dim=-1, stable=True).argsort(-1) / whole.shape[-1]).mean(0)
    np.testing.assert_allclose(cellfm.cell_attention(tokens)[0], expected, atol=1e-6)
    tokens = scgpt.tokenize(adata.X[:6], list(adata.var_names))
    whole = scgpt.attention(tokens.select([5]), scores="raw", average_heads=False)[0, :, 0, 1:]
    expected = (whole.argsort(dim=-1, stable=True).argsort(-1) / whole.shape[-1]).mean(0)
    n = len(expected)
    np.testing.assert_allclose(scgpt.cell_attention(tokens)[5, :n], expected, atol=1e-6)
    some = scgpt.cell_attention(tokens, ["GENE9", "GENE30"])
    assert some[5, 0] == scgpt.cell_attention(tokens)[5][tokens.ids[5, 1:] == scgpt.vocab["GENE9"]]


# -- files and wrong input -----------------------------------------------------------------------------------------------


def test_results_can_be_written_and_read(grouped, scgpt, tmp_path):
    gene_network(grouped, scgpt, genes=GENES, key_added="alike")
    gene_network(grouped, scgpt, method="attention", genes=GENES, groupby="kind", progress=False)
    cell_type_genes(grouped, scgpt, groupby="kind", progress=False)
    grouped.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    for key in ("alike", "gene_network"):
        pd.testing.assert_frame_equal(edge_table(again, key), edge_table(grouped, key), check_dtype=False)
    pd.testing.assert_frame_equal(
        again.uns["cell_type_genes"]["table"], grouped.uns["cell_type_genes"]["table"], check_dtype=False
    )
    assert (again.varp["alike"] != grouped.varp["alike"]).nnz == 0


def test_copy_leaves_the_object_as_it_is(adata, scgpt):
    out = gene_network(adata, scgpt, genes=GENES, copy=True)
    assert not adata.uns
    assert not adata.varp
    assert "gene_network" in out.uns


def test_a_network_without_edges_is_said_to_be_empty(adata, scgpt, tmp_path, capsys):
    gene_network(adata, scgpt, genes=GENES, threshold=1.5)
    assert edge_table(adata).empty
    assert "no edge is strong enough" in "".join(capsys.readouterr())
    adata.write_h5ad(tmp_path / "x.h5ad")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": ["GENE1", "NONE"]}, KeyError, "no gene NONE"),
        ({"genes": ["OTHER1", "OTHER2"]}, ValueError, "at least two"),
        ({"genes": ["OTHER1", "OTHER2"], "method": "attention"}, ValueError, "at least two"),
        ({"method": "pearson"}, ValueError, "cosine, attention"),
        ({"groupby": "kind"}, ValueError, "gene_embeddings"),
        ({"method": "attention", "groupby": "none"}, KeyError, "no column 'none'"),
        ({"method": "attention", "groupby": "kind", "groups": ["c"]}, KeyError, "no group c"),
        ({"method": "attention", "groupby": "kind", "groups": ["nobody"]}, KeyError, "no group nobody"),
        ({"method": "attention", "groupby": "kind", "control": "a"}, ValueError, "perturbed="),
        ({"method": "attention", "groupby": "kind", "control": "a", "perturbed": "a"}, ValueError, "same group"),
        ({"method": "attention", "use_rep": "x"}, ValueError, "needs the model"),
        ({"method": "attention", "mean": "median"}, ValueError, "true_mean"),
        ({"method": "attention", "min_cells": 0}, ValueError, "min_cells"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"use_rep": "none"}, KeyError, "varm has no slot 'none'"),
        ({"program": "1"}, KeyError, "gene_programs first"),
        ({"include_zeros": True}, TypeError, "reads no cells"),
    ],
)
def test_wrong_input(grouped, scgpt, options, error, message):
    with pytest.raises(error, match=message):
        gene_network(grouped, scgpt, progress=False, **options)
    assert not grouped.uns
    assert not grouped.varp


def test_models_without_attention_name_those_that_have_it(adata, scgpt, monkeypatch):
    monkeypatch.setattr(type(scgpt), "capabilities", frozenset({"embeds", "gene_embeddings"}))
    with pytest.raises(scfm.UnsupportedError, match="cellfm, scfoundation, sclong"):
        gene_network(adata, scgpt, method="attention", genes=GENES)
    adata.obs["kind"] = "a"
    with pytest.raises(scfm.UnsupportedError, match="cannot give attention of the token of a cell"):
        cell_type_genes(adata, scgpt, groupby="kind")
