"""``pl.gene_network`` and ``pl.tf_specificity``: what is drawn is what the result holds, and names do not overlap."""

from __future__ import annotations

import io

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from scfm import pl, tl
from scfm.pl._graph_layout import layout, push_apart


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def make(n_genes: int, seed: int = 0, **options) -> ad.AnnData:
    """Genes in groups of ten with similar vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(-(-n_genes // 10), 16))
    vectors = centres[np.arange(n_genes) // 10] + rng.normal(scale=0.6, size=(n_genes, 16))
    var = pd.DataFrame(index=[f"GENE-{i}{'LONG' * (i % 3)}" for i in range(n_genes)])
    adata = ad.AnnData(np.zeros((1, n_genes), dtype=np.float32), var=var)
    adata.varm["vectors"] = vectors.astype(np.float32)
    tl.gene_network(adata, use_rep="vectors", **options)
    return adata


def pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=60)
    file.seek(0)
    return plt.imread(file)


def drawn(ax) -> dict:
    lines = next(item for item in ax.collections if isinstance(item, LineCollection))
    return {"names": [text.get_text() for text in ax.texts], "lines": lines}


@pytest.mark.parametrize("n_genes", [2, 10, 30, 100])
def test_names_of_up_to_a_hundred_genes_do_not_overlap_and_are_in_the_picture(n_genes):
    adata = make(n_genes, top_k=3)
    ax = pl.gene_network(adata, show=False)
    edges = adata.uns["gene_network"]["edges"]
    assert len(drawn(ax)["lines"].get_segments()) == min(len(edges), 3 * n_genes)
    names = drawn(ax)["names"]
    assert set(names) <= set(edges["source"]) | set(edges["target"])
    assert len(names) == len(set(names)) >= 0.9 * n_genes
    figure = ax.figure
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    low, high = np.array([box.min for box in boxes]), np.array([box.max for box in boxes])
    overlap = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1)
    assert overlap.sum() == len(names)  # with themselves
    assert (low > 0).all()
    assert (high < [figure.bbox.width, figure.bbox.height]).all()
    legend = ax.get_legend().get_window_extent()
    assert legend.xmax <= figure.bbox.width
    assert legend.xmin > high[:, 0].max()
    assert min(text.get_fontsize() for text in ax.texts) >= 6
    image = pixels(figure)
    assert 0.01 < (image[..., :3] < 0.9).any(-1).mean() < 0.9


@pytest.mark.parametrize("n_genes", [10, 40, 100])
def test_every_gene_with_an_edge_and_every_known_edge_is_drawn(n_genes):
    adata = make(n_genes, top_k=5)
    edges = adata.uns["gene_network"]["edges"]
    weakest = edges[edges["source"] != edges["target"]].tail(3)
    ax = pl.gene_network(adata, known=weakest[["source", "target"]], show=False)
    assert set(drawn(ax)["names"]) == set(edges["source"]) | set(edges["target"])
    assert min(drawn(ax)["lines"].get_linewidths()) > 0
    red = [tuple(color[:3]) for color in drawn(ax)["lines"].get_colors()].count(to_rgb("#d1495b"))
    assert red == 3
    assert len(drawn(ax)["lines"].get_segments()) <= 3 * n_genes


@pytest.mark.parametrize("layout_engine", [None, "constrained"])
def test_on_given_axes_names_and_legend_have_room(layout_engine):
    adata = make(40, top_k=5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout=layout_engine)
    pl.gene_network(adata, ax=left, show=False)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in left.texts]
    low, high = np.array([box.min for box in boxes]), np.array([box.max for box in boxes])
    overlap = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1)
    assert overlap.sum() == len(boxes)
    for patch, text in zip(left.patches, left.texts, strict=True):
        frame, name = patch.get_window_extent(), text.get_window_extent()
        assert frame.xmin - 1 <= name.xmin < name.xmax <= frame.xmax + 1
    legend = left.get_legend().get_window_extent()
    assert high[:, 0].max() < legend.xmin
    assert legend.xmax <= left.get_window_extent().xmax + 1 < right.get_window_extent().xmin


def test_groups_without_edges_say_what_to_do():
    adata = make(10, top_k=3)
    adata.uns["gene_network"]["edges"] = adata.uns["gene_network"]["edges"].assign(condition="a").iloc[:0]
    with pytest.raises(ValueError, match="lower the threshold"):
        pl.gene_network(adata, show=False)


def test_width_of_lines_follows_the_weight_and_known_edges_are_red():
    adata = make(20, top_k=3)
    edges = adata.uns["gene_network"]["edges"]
    known = edges.iloc[[0, 5]][["target", "source"]].set_axis(["source", "target"], axis=1)
    ax = pl.gene_network(adata, known=known, tfs=[edges["source"].iloc[0]], show=False)
    lines = drawn(ax)["lines"]
    widths, colors = np.array(lines.get_linewidths()), np.array(lines.get_colors())
    red = colors[:, 0] > colors[:, 2] + 0.2
    assert red.sum() == 2
    np.testing.assert_allclose(np.sort(widths)[[0, -1]], [0.5, 3.0])
    expected = np.sort(edges["weight"].to_numpy()[: len(widths)])
    expected = 0.5 + 2.5 * (expected - expected[0]) / (expected[-1] - expected[0])
    np.testing.assert_allclose(np.sort(widths), expected, atol=1e-6)
    bold = [text.get_text() for text in ax.texts if text.get_weight() == "bold"]
    assert bold == [edges["source"].iloc[0]]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"factor", "known edge", "weight"} <= set(labels)


def test_genes_have_the_colour_of_their_program():
    adata = make(20, top_k=2)
    adata.var["gene_program"] = pd.Categorical(["1"] * 10 + ["2"] * 9 + [None])
    ax = pl.gene_network(adata, show=False)
    faces = {text.get_text(): patch.get_facecolor() for text, patch in zip(ax.texts, ax.patches, strict=True)}
    inside = [faces[name] for name in adata.var_names if name in faces]
    assert len(set(inside)) == 3
    assert len({faces[name] for name in adata.var_names[:10]}) == 1
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"gene program", "1", "2"} <= set(labels)
    adata.var["kind"] = "same"
    ax = pl.gene_network(adata, color="kind", show=False)
    assert len({patch.get_facecolor() for patch in ax.patches}) == 1


def test_of_a_large_network_the_strongest_edges_are_drawn():
    adata = make(400, top_k=4)
    ax = pl.gene_network(adata, max_genes=25, max_edges=30, show=False)
    edges = adata.uns["gene_network"]["edges"]
    assert 2 <= len(drawn(ax)["names"]) <= 25
    assert {edges["source"].iloc[0], edges["target"].iloc[0]} <= set(drawn(ax)["names"])
    assert len(drawn(ax)["lines"].get_segments()) <= 30
    assert "of 400 genes" in ax.get_title()


def directed() -> ad.AnnData:
    adata = make(6, top_k=2)
    edges = adata.uns["gene_network"]["edges"]
    parts = [edges.assign(condition="control"), edges.iloc[:3].assign(condition="difference")]
    adata.uns["gene_network"] |= {"edges": pd.concat(parts, ignore_index=True), "directed": True}
    return adata


def test_conditions_and_arrows():
    adata = directed()
    ax = pl.gene_network(adata, show=False)
    assert ax.get_title().startswith("difference: ")
    assert len(drawn(ax)["lines"].get_segments()) == 3
    arrows = next(item for item in ax.collections if isinstance(item, PatchCollection))
    assert len(arrows.get_paths()) == 3
    ax = pl.gene_network(adata, condition="control", show=False)
    assert len(drawn(ax)["lines"].get_segments()) > 3


def test_the_picture_is_the_same_each_time_and_can_be_saved(tmp_path):
    adata = make(15, top_k=2)
    first, second = (pixels(pl.gene_network(adata, show=False).figure) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    pl.gene_network(adata, save=tmp_path / "x.png", show=False)
    assert (tmp_path / "x.png").stat().st_size > 5_000
    _, ax = plt.subplots()
    assert pl.gene_network(adata, ax=ax, show=False) is ax


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "none"}, KeyError, "gene_network first"),
        ({"condition": "x"}, KeyError, "no conditions"),
        ({"genes": ["NONE"]}, KeyError, "no gene NONE"),
        ({"genes": ["GENE-0"]}, ValueError, "no edge to draw"),
        ({"color": "none"}, KeyError, "no column 'none'"),
        ({"max_genes": 1}, ValueError, "at least 2"),
    ],
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        pl.gene_network(make(6, top_k=2), show=False, **options)


# -- layout --------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_boxes_are_pushed_apart(seed, n):
    rng = np.random.default_rng(seed)
    sizes = np.column_stack([rng.uniform(0.2, 0.9, n), np.full(n, 0.2)])
    places = push_apart(rng.normal(size=(n, 2)) * rng.choice([0, 0.3, 2]), sizes)
    assert_apart(places, sizes)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 50), st.integers(1, 120))
def test_layout_of_any_graph(seed, n, n_edges):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, n, (2, n_edges))
    sizes = np.column_stack([rng.uniform(0.3, 0.9, n), np.full(n, 0.2)])
    places = layout(n, source[source != target], target[source != target], sizes)
    assert np.isfinite(places).all()
    assert_apart(places, sizes)
    np.testing.assert_allclose((places - sizes / 2).min(0), 0, atol=1e-9)


def assert_apart(places, sizes):
    lacking = (sizes[:, None] + sizes[None]) / 2 - np.abs(places[:, None] - places[None])
    overlap = (lacking > 1e-9).all(-1)
    assert overlap.sum() == len(places)


def test_neighbours_in_the_graph_are_near_in_the_picture():
    chain = np.arange(9)
    places = layout(10, chain, chain + 1, np.full((10, 2), [0.3, 0.2]))
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert np.linalg.norm(places[0] - places[-1]) > 4 * steps.max()


# -- specificity ---------------------------------------------------------------------------------------------------------


def specific() -> ad.AnnData:
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.zeros((3, 1), dtype=np.float32))
    table = pd.DataFrame(rng.random((7, 50)), index=list("abcdefg"), columns=[f"TF{i}" for i in range(50)])
    adata.uns["tf_activity"] = {"specificity": table}
    return adata


def test_the_most_specific_factors_of_each_type_are_named():
    adata = specific()
    table = adata.uns["tf_activity"]["specificity"]
    axes = pl.tf_specificity(adata, n_top=3, show=False)
    assert [ax.get_title() for ax in axes] == list("abcdefg")
    for ax, group in zip(axes, table.index, strict=True):
        assert [text.get_text() for text in ax.texts] == table.loc[group].nlargest(3).index.tolist()
        points = np.concatenate([item.get_offsets() for item in ax.collections])
        np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(table.loc[group]))
    figure = axes[0].figure
    figure.canvas.draw()
    for ax in axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the dot
        assert all(lower.y1 <= upper.y0 + 1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert 0.005 < (pixels(figure)[..., :3] < 0.9).any(-1).mean() < 0.9
    assert len(pl.tf_specificity(adata, groups=["c"], show=False)) == 1
    with pytest.raises(KeyError, match="no cell type z"):
        pl.tf_specificity(adata, groups=["z"])
    with pytest.raises(KeyError, match="groupby="):
        pl.tf_specificity(adata, key="none")


def test_names_of_few_factors_stand_beside_the_dots():
    scores = pd.DataFrame({f"TF{i}": [0.9 - 0.1 * i] for i in range(4)}, index=["T cells"])
    adata = ad.AnnData(np.zeros((1, 1), dtype=np.float32))
    adata.uns["tf_activity"] = {"specificity": scores}
    axes = np.ravel(pl.tf_specificity(adata, show=False))
    figure = axes[0].figure
    figure.canvas.draw()
    dots = np.concatenate([axes[0].transData.transform(item.get_offsets()) for item in axes[0].collections])
    assert min(Text.get_window_extent(text).xmin for text in axes[0].texts) > dots[:, 0].max()
