"""Plots of gene programs, enrichment and similarity: they draw what the results hold."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scfm

GROUPS = ["B cell", "T cell", "NK/ILC"]
N_PROGRAMS = 6
HUBS = ["LYZ", "NKG7", "CD79A", "CD3D", "PPBP", "HLA-DRA"]


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    names = [str(i + 1) for i in range(N_PROGRAMS)]
    programs = {name: np.array([HUBS[i], *(f"GENE{i}{j}" for j in range(5 + i))]) for i, name in enumerate(names)}
    activity = pd.DataFrame(rng.random((3, N_PROGRAMS)), index=pd.Index(GROUPS, name="group"), columns=names)
    rows = [
        {"group": group, "program": name, "score": 9.0 - rank, "difference": 1.0, "p_adjusted": 1e-5}
        for group, order in zip(GROUPS, (["1", "2"], ["3", "1"], ["4", "5"]), strict=True)
        for rank, name in enumerate(order)
    ]
    rows.append({"group": "B cell", "program": "6", "score": -3.0, "difference": -1.0, "p_adjusted": 1e-5})
    summary = pd.DataFrame({"n_genes": [len(programs[name]) for name in names]}, index=pd.Index(names, name="program"))
    summary["coherence"] = np.linspace(0.9, 0.4, N_PROGRAMS)
    summary["coexpression"] = np.linspace(0.5, 0.1, N_PROGRAMS)
    adata = ad.AnnData(np.ones((3, 2), dtype=np.float32))
    adata.uns["gene_programs"] = {
        "programs": programs,
        "summary": summary,
        "activity": activity,
        "markers": pd.DataFrame(rows),
    }
    table = pd.DataFrame(
        {
            "program": ["1", "1", "2", "3"],
            "library": "lib",
            "term": ["REACTOME_MHC_CLASS_II_ANTIGEN_PRESENTATION", "b (GO:0000001)", "b (GO:0000001)", "c" * 90],
            "overlap": [8, 3, 2, 2],
            "p_adjusted": [1e-12, 1e-3, 1e-4, 0.5],
            "significant": [True, True, True, False],
        }
    )
    adata.uns["enrichment"] = {"table": table, "params": {"key": "gene_programs"}}
    genes = np.array([f"G{i}" for i in range(12)])
    vectors = rng.normal(size=(12, 30)) + np.repeat([[0.0], [2.0]], 6, axis=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    adata.uns["gene_similarity"] = {"genes": genes, "markers": genes[[2, 7]], "similarity": unit @ unit.T}
    return adata


def pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def is_drawn(figure) -> bool:
    """Whether there are several colours, on the edge nothing but background."""
    image = pixels(figure)
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return len(np.unique(image.reshape(-1, 3), axis=0)) > 20 and (edge == 255).all()


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def overlaps(figure, labels) -> bool:
    figure.canvas.draw()
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    return any(low.y1 > high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_programs_that_mark_groups_are_drawn_group_after_group(adata, tmp_path):
    ax = scfm.pl.gene_programs(adata, show=False, save=tmp_path / "a.png")
    names = texts(ax.get_yticklabels())
    assert [name.rpartition("(")[2].rstrip(")") for name in names] == ["1", "2", "3", "4", "5"]
    assert names[0] == "LYZ, GENE00, GENE01, GENE02 +2  (1)"
    assert texts(ax.get_xticklabels()) == GROUPS
    dots = ax.collections[0]
    assert len(dots.get_offsets()) == 5 * 3
    # colours are activities, each program from 0 to 1 over groups; the largest dot has the largest statistic
    shown = adata.uns["gene_programs"]["activity"][["1", "2", "3", "4", "5"]]
    expected = ((shown - shown.min()) / (shown.max() - shown.min())).to_numpy().T
    np.testing.assert_allclose(np.asarray(dots.get_array()).reshape(5, 3), expected)
    sizes = dots.get_sizes().reshape(5, 3)
    assert sizes[0, 0] == sizes[2, 1] == sizes[3, 2] == sizes.max()
    assert sizes[1, 1] == sizes.min()
    assert is_drawn(ax.figure)
    assert not overlaps(ax.figure, ax.get_yticklabels())
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_heat_map_of_chosen_programs(adata):
    ax = scfm.pl.gene_programs(adata, ["6", "2"], kind="heatmap", scale=False, n_genes=1, show=False)
    assert texts(ax.get_yticklabels()) == ["HLA-DRA +10  (6)", "NKG7 +6  (2)"]
    shown = adata.uns["gene_programs"]["activity"][["6", "2"]].to_numpy().T
    np.testing.assert_allclose(ax.images[0].get_array(), shown)
    assert is_drawn(ax.figure)


def test_without_groups_the_coherence_is_drawn(adata):
    del adata.uns["gene_programs"]["activity"], adata.uns["gene_programs"]["markers"]
    ax = scfm.pl.gene_programs(adata, show=False)
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, adata.uns["gene_programs"]["summary"]["coherence"])
    np.testing.assert_allclose(
        ax.collections[0].get_offsets()[:, 0], adata.uns["gene_programs"]["summary"]["coexpression"]
    )
    assert is_drawn(ax.figure)


def test_axes_of_your_own(adata):
    _, ax = plt.subplots()
    assert scfm.pl.gene_programs(adata, ax=ax, show=False) is ax
    _, ax = plt.subplots()
    assert scfm.pl.enrichment(adata, ax=ax, show=False) is ax


def test_enrichment_draws_the_best_sets_of_each_program(adata, tmp_path):
    ax = scfm.pl.enrichment(adata, show=False, save=tmp_path / "a.png")
    assert texts(ax.get_xticklabels()) == ["LYZ (1)", "NKG7 (2)"]
    assert texts(ax.get_yticklabels()) == ["REACTOME MHC class II antigen presentation", "b"]
    dots = ax.collections[0]
    assert {tuple(map(int, place)) for place in dots.get_offsets()} == {(0, 0), (0, 1), (1, 1)}
    np.testing.assert_allclose(sorted(dots.get_array()), [3, 4, 12])
    assert dots.get_sizes().argmax() == 0
    assert is_drawn(ax.figure)
    ax = scfm.pl.enrichment(adata, ["3"], significant=False, show=False)
    assert texts(ax.get_xticklabels()) == ["CD79A (3)"]
    label = texts(ax.get_yticklabels())[0]
    assert "…" in label
    assert len(label) <= 61
    # names that would look the same are not cut
    table = adata.uns["enrichment"]["table"]
    table["term"] = ["a" * 40 + middle + "z" * 40 for middle in "wxyz"]
    ax = scfm.pl.enrichment(adata, show=False)
    assert texts(ax.get_yticklabels()) == table["term"][:3].tolist()


def test_similarity_is_clustered_and_markers_stand_out(adata, tmp_path):
    grid = scfm.pl.gene_similarity(adata, show=False, save=tmp_path / "a.png")
    labels = grid.ax_heatmap.get_yticklabels()
    assert set(texts(labels)) == {f"G{i}" for i in range(12)}
    bold = {label.get_text() for label in labels if label.get_fontweight() == "bold"}
    assert bold == {"G2", "G7"}
    order = [int(name[1:]) for name in texts(labels)]
    expected = adata.uns["gene_similarity"]["similarity"][np.ix_(order, order)]
    np.testing.assert_allclose(grid.ax_heatmap.collections[0].get_array().reshape(12, 12), expected)
    # the genes with a common part stand together
    assert max(order.index(i) for i in range(6, 12)) - min(order.index(i) for i in range(6, 12)) == 5
    assert is_drawn(grid.figure)
    assert not overlaps(grid.figure, labels)
    grid = scfm.pl.gene_similarity(adata, markers=["G1"], show=False, figsize=(5, 5))
    assert {t.get_text() for t in grid.ax_heatmap.get_xticklabels() if t.get_fontweight() == "bold"} == {"G1"}


def test_markers_among_many_genes_have_names(adata):
    rng = np.random.default_rng(0)
    genes = np.array([f"G{i}" for i in range(150)])
    values = np.corrcoef(rng.normal(size=(150, 20)))
    adata.uns["gene_similarity"] = {"genes": genes, "similarity": values, "markers": genes[[3, 70, 71, 149]]}
    grid = scfm.pl.gene_similarity(adata, show=False)
    names = grid.ax_heatmap.texts
    assert {text.get_text() for text in names} == {"G3", "G70", "G71", "G149"}
    assert not overlaps(grid.figure, names)
    order = genes[grid.dendrogram_row.reordered_ind]
    for text in names:
        assert order[int(text.xy[1])] == text.get_text()


def test_one_group_is_not_scaled_away(adata):
    activity = adata.uns["gene_programs"]["activity"].iloc[:1]
    adata.uns["gene_programs"]["activity"] = activity
    markers = adata.uns["gene_programs"]["markers"]
    adata.uns["gene_programs"]["markers"] = markers[markers["group"] == activity.index[0]]
    ax = scfm.pl.gene_programs(adata, show=False)
    assert not any("scaled" in axis.get_ylabel() for axis in ax.figure.axes)


def test_wrong_input_says_what_to_run(adata):
    for function, slot in (
        ("gene_programs", "gene_programs"),
        ("enrichment", "enrichment"),
        ("gene_similarity", "gene_similarity"),
    ):
        with pytest.raises(KeyError, match=f"tl.{slot} first"):
            getattr(scfm.pl, function)(ad.AnnData(np.ones((2, 2), dtype=np.float32)), show=False)
    with pytest.raises(KeyError, match="no program 77"):
        scfm.pl.gene_programs(adata, ["77"], show=False)
    with pytest.raises(ValueError, match="dotplot or heatmap"):
        scfm.pl.gene_programs(adata, kind="violin", show=False)
    with pytest.raises(KeyError, match="no significant result for the program 3"):
        scfm.pl.enrichment(adata, ["3"], show=False)
    adata.uns["enrichment"]["table"]["significant"] = False
    with pytest.raises(ValueError, match="significant=False"):
        scfm.pl.enrichment(adata, show=False)
