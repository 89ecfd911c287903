"""The Gene Ontology graph: readers, similarities, and the convolution against dense formulas."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.backbones import from_config
from scfm.backbones.sclong import GOGraph, SCLongConfig, graph
from scfm.backbones.sclong.annotations import from_mapping, read_annotations
from scfm.backbones.sclong.layers import GOConvolution
from scfm.genes import GeneVocab

GENES = [f"GENE{i}" for i in range(30)]
VOCAB = GeneVocab([*GENES, "PAD"], specials=["PAD"])


def annotations(seed, n_terms=12):
    rng = np.random.default_rng(seed)
    table = rng.random((len(GENES), n_terms)) < 0.25
    return {
        gene: [f"GO:{t:07d}" for t in np.flatnonzero(row)] for gene, row in zip(GENES, table, strict=True) if row.any()
    }


def by_definition(terms, min_similarity, neighbors):
    """Pair by pair, as the paper describes it."""
    edges = {}
    for target in terms:
        found = []
        for source in terms:
            a, b = set(terms[source]), set(terms[target])
            similarity = len(a & b) / len(a | b)
            if similarity > min_similarity:
                found.append((-similarity, VOCAB[source]))
        edges |= {(source, VOCAB[target]): -value for value, source in sorted(found)[:neighbors]}
    return edges


def as_dict(made):
    return dict(zip(map(tuple, made.edges.T.tolist()), made.weight.tolist(), strict=True))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), neighbors=st.integers(1, 8), bound=st.sampled_from([0.0, 0.1, 0.25, 0.5]))
def test_graph_follows_the_definition(seed, neighbors, bound):
    terms = annotations(seed)
    made = as_dict(GOGraph.from_annotations(terms, VOCAB, min_similarity=bound, neighbors=neighbors))
    expected = by_definition(terms, bound, neighbors)
    assert made.keys() == expected.keys()
    for edge, weight in expected.items():
        assert made[edge] == pytest.approx(weight, rel=1e-6)


def test_size_of_blocks_changes_nothing(monkeypatch):
    whole = GOGraph.from_annotations(annotations(0), VOCAB)
    monkeypatch.setattr(graph, "_BLOCK_PAIRS", 70)
    parts = GOGraph.from_annotations(annotations(0), VOCAB)
    assert torch.equal(whole.edges, parts.edges)
    assert torch.equal(whole.weight, parts.weight)


def test_the_bound_is_strict_and_unknown_genes_are_left_out():
    terms = {"GENE0": [*"abcdefghij"], "GENE1": ["a"], "OTHER": ["a"], "GENE2": []}
    made = as_dict(GOGraph.from_annotations(terms, VOCAB))
    assert made == {(0, 0): 1.0, (1, 1): 1.0}, "a similarity of exactly 0.1 is no edge"


def test_pairs_keep_the_order_of_the_table_on_ties():
    pairs = pd.DataFrame({"source": ["GENE5", "GENE2", "GENE1"], "target": "GENE0", "importance": [0.5, 0.5, 0.7]})
    made = GOGraph.from_pairs(pairs, VOCAB, neighbors=2)
    assert as_dict(made) == {(1, 0): pytest.approx(0.7), (5, 0): pytest.approx(0.5)}
    assert made.to_frame(VOCAB)["source"].tolist() == ["GENE1", "GENE5"]
    with pytest.raises(ValueError, match="no column importance"):
        GOGraph.from_pairs(pairs[["source", "target"]], VOCAB)


def test_annotations_under_other_names_are_matched():
    table = pd.DataFrame(
        {
            "symbol": ["TP53"],
            "hgnc_id": ["HGNC:1"],
            "ensembl_gene_id": ["ENSG00000141510"],
            "alias_symbol": [""],
            "prev_symbol": [""],
        }
    )
    vocab = GeneVocab(["ENSG00000141510", "PAD"], specials=["PAD"])
    assert len(GOGraph.from_annotations({"TP53": ["a"]}, vocab)) == 0
    assert as_dict(GOGraph.from_annotations({"TP53": ["a"]}, vocab, aliases=table)) == {(0, 0): 1.0}


# -- files ---------------------------------------------------------------------------------------------------------------

GENE2GO = """#tax_id\tGeneID\tGO_ID\tEvidence\tQualifier\tGO_term\tPubMed\tCategory
9606\t1\tGO:0000001\tIEA\tenables\tx\t-\tFunction
9606\t1\tGO:0000001\tIDA\tenables\tx\t-\tFunction
9606\t1\tGO:0000002\tIEA\tNOT involved_in\tx\t-\tProcess
9606\t2\tGO:0000001\tIEA\tpart_of\tx\t-\tComponent
9606\t3\tGO:0000001\tIEA\tpart_of\tx\t-\tComponent
10090\t1\tGO:0000003\tIEA\tpart_of\tx\t-\tComponent
"""
GAF = """!gaf-version: 2.2
!generated-by: GOC
UniProtKB\tP1\tNA\tenables\tGO:0000001\tPMID:1\tIEA\t\tF\tname\tsyn\tprotein\ttaxon:9606\t20240101\tGOC\t\t
UniProtKB\tP1\tNA\tNOT|enables\tGO:0000002\tPMID:1\tIEA\t\tF\tname\tsyn\tprotein\ttaxon:9606\t20240101\tGOC\t\t
UniProtKB\tP2\tB\tpart_of\tGO:0000001\tPMID:1\tIEA\t\tF\t"quoted\tsyn\tprotein\ttaxon:9606|taxon:1280\t20240101\tGOC\t\t
UniProtKB\tP3\tC\tpart_of\tGO:0000001\tPMID:1\tIEA\t\tF\tname\tsyn\tprotein\ttaxon:10090\t20240101\tGOC\t\t
"""


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        return path

    return to


def pairs_of(table):
    return sorted(zip(table["gene"], table["term"], strict=True))


@pytest.mark.parametrize("name", ["gene2go", "gene2go.gz"])
def test_gene2go(write, name):
    path = write(name, GENE2GO)
    table = read_annotations(path, names={1: "A", "2": "B"})
    assert pairs_of(table) == [("A", "GO:0000001"), ("B", "GO:0000001")]
    assert pairs_of(read_annotations(path, names={1: "a"}, taxon=10090)) == [("a", "GO:0000003")]
    with pytest.raises(ValueError, match="give names="):
        read_annotations(path)


@pytest.mark.parametrize("name", ["goa_human.gaf", "goa_human.gaf.gz"])
def test_gaf(write, name):
    path = write(name, GAF)
    assert pairs_of(read_annotations(path)) == [("B", "GO:0000001"), ("NA", "GO:0000001")]
    assert pairs_of(read_annotations(path, gene_column="id")) == [("P1", "GO:0000001"), ("P2", "GO:0000001")]
    assert pairs_of(read_annotations(path, names={"B": "ENSG1"})) == [("ENSG1", "GO:0000001")]


@pytest.mark.parametrize("separator", ["\t", ","])
def test_tables_of_two_columns(write, separator):
    path = write("terms.txt", f"# genes\nA{separator}GO:1\nA{separator}GO:1\nNA{separator}GO:2\n")
    assert pairs_of(read_annotations(path)) == [("A", "GO:1"), ("NA", "GO:2")]
    with pytest.raises(ValueError, match="format must be"):
        read_annotations(path, "obo")
    assert pairs_of(from_mapping({"A": ["GO:1", "GO:1"], "NA": ("GO:2",), "B": []})) == [("A", "GO:1"), ("NA", "GO:2")]


def test_a_file_can_be_given_instead_of_a_table(write):
    path = write("terms.tsv", "".join(f"{g}\t{t}\n" for g, terms in annotations(1).items() for t in terms))
    assert as_dict(GOGraph.from_annotations(path, VOCAB)) == as_dict(GOGraph.from_annotations(annotations(1), VOCAB))


# -- the convolution -----------------------------------------------------------------------------------------------------


def dense_convolution(module):
    """Adjacency matrix written out, rows are targets."""
    n = len(module.weight)
    adjacency = torch.zeros(n, n, dtype=module.weight.dtype)
    adjacency.index_put_((module.edges[1], module.edges[0]), module.edge_weight, accumulate=True)
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-30).rsqrt(), 0)
    x = module.weight
    for i, layer in enumerate(module.layers):
        x = scale[:, None] * (adjacency @ (scale[:, None] * (x if i == 0 else x.relu())))
        x = x @ layer.weight.T + layer.bias
    return x


@pytest.mark.parametrize("n_layers", [1, 2])
def test_convolution_is_the_dense_product(n_layers):
    made = GOGraph.from_annotations(annotations(3), VOCAB)
    module = GOConvolution(len(VOCAB), 6, len(made), n_layers, max_norm=False)
    module.edges, module.edge_weight = made.edges, made.weight
    module = module.double()
    torch.testing.assert_close(module(), dense_convolution(module))
    # genes without edges, and PAD, have the bias of a single layer
    if n_layers == 1:
        torch.testing.assert_close(module()[-1], module.layers[0].bias)
    grads = torch.autograd.grad(module().square().sum(), [module.weight, module.layers[0].weight])
    expected = torch.autograd.grad(dense_convolution(module).square().sum(), [module.weight, module.layers[0].weight])
    torch.testing.assert_close(grads, expected)


def test_a_graph_can_be_given_to_a_new_model():
    config = SCLongConfig(
        n_positions=31, top_length=5, dim=6, large_dim=6, large_depth=1, mini_depth=1, decoder_depth=1, large_heads=1
    )
    backbone = from_config("sclong", config, VOCAB)
    before = backbone.gene_embeddings(kind="go")
    torch.testing.assert_close(before, before[:1].expand_as(before), msg="without a graph all genes are alike")
    backbone.set_go_graph(GOGraph.from_annotations(annotations(0), VOCAB))
    after = backbone.gene_embeddings(kind="go")
    torch.testing.assert_close(after, dense_convolution(backbone.module.go))
    assert (after - before).abs().max() > 0.01
    assert backbone.config.n_edges == backbone.module.go.edges.shape[1] > 0
    with pytest.raises(ValueError, match="genes beyond"):
        backbone.set_go_graph(GOGraph(torch.tensor([[0], [40]]), torch.ones(1)))
