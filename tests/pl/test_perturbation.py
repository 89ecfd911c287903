"""``pl.perturbation`` and ``pl.perturbation_atlas``: what is drawn is what the result holds."""

from __future__ import annotations

import io

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from perturbed import Learner, make_cells

from scfm import pl, tl


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=60)
    file.seek(0)
    return plt.imread(file)


@pytest.fixture(scope="module")
def controls():
    cells = make_cells()
    out = cells[cells.obs["scfm_perturbation"] == "ctrl"].copy()
    tl.perturb(out, ["A", "A+B", "A+D"], Learner())
    tl.perturb(out, ["A", "A+B"], Learner(seed=3), key_added="other", keep="summary")
    return out


def test_measured_and_predicted_changes(controls):
    ax = pl.perturbation(controls, "B+A", keys={"mine": "perturb", "theirs": "other"}, show=False)
    genes = controls.uns["perturbation"]["de_genes"].query("perturbation == 'A+B'")["gene"].tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == genes
    assert ax.get_title() == "A+B"
    record = controls.uns["perturbation"]
    change = dict(
        zip(record["genes"], record["means"][list(record["names"]).index("A+B")] - record["means"][0], strict=True)
    )
    bars = next(item for item in ax.containers if isinstance(item, BarContainer))
    np.testing.assert_allclose([bar.get_height() for bar in bars], [change[gene] for gene in genes], rtol=1e-4)
    lines = [
        item for item in ax.containers if isinstance(item, ErrorbarContainer) and item.get_label() in ("mine", "theirs")
    ]
    place = controls.var_names.get_indexer(genes)
    for line, key in zip(lines, ("perturb", "other"), strict=True):
        np.testing.assert_allclose(line[0].get_ydata(), controls.uns[key]["mean_change"][1][place], rtol=1e-5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["measured", "mine", "theirs"]
    image = pixels(ax.figure)
    assert 0.01 < (image[..., :3] < 0.9).any(-1).mean() < 0.9
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 <= right.x0 + 1 for left, right in zip(boxes, boxes[1:], strict=False))
    assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.width


def test_usual_spellings(controls):
    for text in ("A_B", "B+A", "A+ctrl"):
        assert pl.perturbation(controls, text, show=False).get_title() in ("A+B", "A")
    with pytest.raises(KeyError, match="no perturbation 'A_NONE'"):
        pl.perturbation(controls, "A_NONE", show=False)


def test_a_perturbation_that_was_not_measured(controls, tmp_path):
    ax = pl.perturbation(controls, "A+D", n_genes=5, show=False)
    assert not [item for item in ax.containers if isinstance(item, BarContainer)]
    result = controls.uns["perturb"]
    order = np.argsort(-np.abs(result["mean_change"][2]), kind="stable")[:5]
    assert [label.get_text() for label in ax.get_xticklabels()] == result["genes"][order].tolist()
    ax = pl.perturbation(controls, "A", genes=["g3", "g1"], show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["g3", "g1"]
    pl.perturbation(controls, "A", save=tmp_path / "x.png", show=False)
    assert (tmp_path / "x.png").stat().st_size > 3000
    _, given = plt.subplots()
    assert pl.perturbation(controls, "A", ax=given, show=False) is given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": "none"}, "run scfm.tl.perturb first"),
        ({"perturbation": "C"}, "no perturbation 'C'"),
        ({"genes": ["none"]}, "no gene none"),
    ],
)
def test_wrong_input(controls, options, message):
    with pytest.raises(KeyError, match=message):
        pl.perturbation(controls, **{"perturbation": "A", "show": False} | options)


def test_atlas():
    # as tl.perturbation_atlas writes it; two of the six clusters lie on each other
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 6
    obs = pd.DataFrame(
        {"n_genes": 1 + (np.arange(60) > 9), "cluster": pd.Categorical(codes.astype(str))},
        index=[f"p{i}" for i in range(60)],
    )
    middles = np.array([[0, 0], [0.1, 0], [4, 0], [0, 4], [4, 4], [9, 9]])
    atlas = ad.AnnData(np.zeros((60, 2), dtype=np.float32), obs=obs)
    atlas.obsm["X_umap"] = middles[codes] + rng.normal(scale=0.3, size=(60, 2))
    table = {"cluster": list("012345"), "n_perturbations": 10, "dominant_gene": list("ABCDEF"), "share": 0.5}
    atlas.uns["perturbation_atlas"] = {"clusters": pd.DataFrame(table)}
    ax = pl.perturbation_atlas(atlas, show=False)
    points = np.concatenate([np.asarray(item.get_offsets()) for item in ax.collections])
    assert len(points) == atlas.n_obs
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(atlas.obsm["X_umap"][:, 0]), rtol=1e-5)
    clusters = atlas.uns["perturbation_atlas"]["clusters"]
    assert sorted(text.get_text() for text in ax.texts) == sorted(clusters["dominant_gene"])
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    low, high = np.array([box.min for box in boxes]), np.array([box.max for box in boxes])
    overlap = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1)
    assert overlap.sum() == len(boxes)
    assert 0.01 < (pixels(ax.figure)[..., :3] < 0.9).any(-1).mean() < 0.9
    few = pl.perturbation_atlas(atlas, min_share=2.0, show=False)
    assert not few.texts
    with pytest.raises(KeyError, match="no map of perturbations"):
        pl.perturbation_atlas(make_cells(), show=False)
