"""``tl.perturb``: layers, summary, files, memory, and what must not change a prediction."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbed import Learner, make_cells
from scipy import sparse

from scfm import tl


@pytest.fixture(scope="module")
def cells():
    return make_cells()


@pytest.fixture
def controls(cells):
    return cells[cells.obs["scfm_perturbation"] == "ctrl"].copy()


def test_layers_and_summary(controls, tmp_path):
    before = controls.X.toarray().copy()
    tl.perturb(controls, ["A", "B+A", "A+ctrl"], Learner(), n_top_genes=7)
    assert list(controls.layers) == ["perturbed_A", "perturbed_A+B"]
    np.testing.assert_array_equal(controls.X.toarray(), before)
    result = controls.uns["perturb"]
    assert result["perturbations"].tolist() == ["A", "A+B"]
    change = controls.layers["perturbed_A+B"].astype(float) - before
    np.testing.assert_allclose(result["mean_change"][1], change.mean(0), atol=1e-5)
    np.testing.assert_allclose(result["std_cells"][1], change.std(0, ddof=1), atol=1e-4)
    np.testing.assert_allclose(result["control"], before.mean(0), rtol=1e-5)
    table = result["summary"].query("perturbation == 'A+B'")
    assert table["rank"].tolist() == list(range(1, 8))
    order = np.argsort(-np.abs(change.mean(0)))[:7]
    assert table["gene"].tolist() == controls.var_names[order].tolist()
    np.testing.assert_allclose(table["change"], change.mean(0)[order], atol=1e-5)
    controls.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(back.layers["perturbed_A+B"], controls.layers["perturbed_A+B"])
    np.testing.assert_array_equal(back.uns["perturb"]["mean_change"], result["mean_change"])
    pd.testing.assert_frame_equal(back.uns["perturb"]["summary"], result["summary"], check_dtype=False)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 36), st.integers(1, 40))
def test_a_cell_depends_on_itself_alone(cells, seed, n, batch_size):
    controls = cells[cells.obs["scfm_perturbation"] == "ctrl"].copy()
    chosen = np.random.default_rng(seed).permutation(controls.n_obs)[:n]
    some = tl.perturb(controls[chosen], "A+C", Learner(), batch_size=batch_size, copy=True)
    tl.perturb(controls, "A+C", Learner())
    np.testing.assert_allclose(some.layers["perturbed_A+C"], controls.layers["perturbed_A+C"][chosen], rtol=1e-6)


def test_twice_is_equal(controls):
    first, second = (tl.perturb(controls, ["A", "D"], Learner(), rng=5, copy=True) for _ in range(2))
    for name in first.layers:
        np.testing.assert_array_equal(first.layers[name], second.layers[name])
    assert not controls.layers


def test_several_models_are_averaged_and_differ(controls):
    one, two = Learner(seed=1), Learner(seed=2)
    tl.perturb(controls, ["A", "B"], [one, two])
    parts = [tl.perturb(controls, ["A", "B"], model, copy=True) for model in (one, two)]
    mean = np.mean([part.layers["perturbed_B"] for part in parts], axis=0)
    np.testing.assert_allclose(controls.layers["perturbed_B"], mean, atol=1e-5)
    changes = np.stack([part.uns["perturb"]["mean_change"] for part in parts])
    np.testing.assert_allclose(controls.uns["perturb"]["std_models"], changes.std(0, ddof=1), atol=1e-5)
    assert controls.uns["perturb"]["summary"]["std_models"].notna().all()
    assert "std_models" not in parts[0].uns["perturb"]


def test_forms_of_the_result(controls, tmp_path):
    tl.perturb(controls, ["A", "A+B"], Learner())
    dense, summary = dict(controls.layers), controls.uns["perturb"]["mean_change"]
    alone = tl.perturb(controls, ["A", "A+B"], Learner(), keep="summary", key_added="other", copy=True)
    assert list(alone.layers) == list(dense)
    np.testing.assert_array_equal(alone.uns["other"]["mean_change"], summary)
    thin = tl.perturb(controls, ["A"], Learner(), sparse_below=2.0, key_added="thin", copy=True).layers["thin_A"]
    assert sparse.issparse(thin)
    np.testing.assert_array_equal(thin.toarray(), np.where(dense["perturbed_A"] < 2, 0, dense["perturbed_A"]))
    half = tl.perturb(controls, ["A"], Learner(), dtype="float16", copy=True).layers["perturbed_A"]
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, dense["perturbed_A"], rtol=1e-3, atol=1e-3)
    tl.perturb(controls, ["A", "A+B"], Learner(), out=tmp_path / "out.h5ad")
    back = ad.read_h5ad(tmp_path / "out.h5ad")
    for name, values in dense.items():
        np.testing.assert_array_equal(back.layers[name], values)
    assert back.obs_names.equals(controls.obs_names)


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_blocks_of_cells_and_chunks_of_a_file_need_not_meet(controls, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr("scfm.tl._perturb._CHUNK", 3 * 4 * controls.n_vars)
    tl.perturb(controls, ["A", "B"], Learner())
    tl.perturb(controls, ["A", "B"], Learner(), out=tmp_path / "out.h5ad", batch_size=batch_size, key_added="file")
    with h5py.File(tmp_path / "out.h5ad") as store:
        assert store["layers/file_A"].chunks == (3, controls.n_vars)
        for name in "AB":
            np.testing.assert_allclose(store[f"layers/file_{name}"], controls.layers[f"perturbed_{name}"], rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5ad"]
    with pytest.raises(FileExistsError, match="exists"):
        tl.perturb(controls, "A", Learner(), out=tmp_path / "out.h5ad")


def test_a_file_appears_complete_or_not_at_all(controls, tmp_path):
    class Breaks(Learner):
        def iter_predictions(self, *args, **kwargs):
            for number, part in enumerate(super().iter_predictions(*args, **kwargs)):
                if number == 3:
                    raise OSError("no space")
                yield part

    with pytest.raises(OSError, match="no space"):
        tl.perturb(controls, ["A", "B"], Breaks(), out=tmp_path / "out.h5ad")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space"):
        tl.perturb(controls, ["A", "B"], Breaks())
    assert not controls.layers
    assert "perturb" not in controls.uns


def test_memory_does_not_grow_with_cells_and_perturbations(tmp_path):
    n_cells, n_genes, names = 400, 200, [f"P{i}" for i in range(40)]
    rng = np.random.default_rng(0)
    adata = ad.AnnData(sparse.random(n_cells, n_genes, 0.2, "csr", dtype=np.float32, random_state=rng))
    layers = n_cells * n_genes * 4 * len(names)  # 12.8 MB
    learner = Learner(names)
    peaks = {}
    for how in ({"keep": "summary"}, {"out": tmp_path / "x.h5ad"}):
        tracemalloc.start()
        tl.perturb(adata, names, learner, batch_size=16, **how)
        peaks[next(iter(how))] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < layers / 4, peaks
    assert learner.largest == 16 * n_genes * 4


def test_real_predictor_from_a_baseline(cells):
    from scfm.benchmark import perturbation_baseline

    controls = cells[cells.obs["scfm_perturbation"] == "ctrl"].copy()
    tl.perturb(controls, ["A+D"], perturbation_baseline(cells, "additive"))
    means = pd.DataFrame(cells.uns["perturbation"]["means"], index=cells.uns["perturbation"]["names"])
    expected = means.loc["A"] + means.loc["D"] - 2 * means.loc["ctrl"]
    found = controls.uns["perturb"]["mean_change"][0]
    assert np.corrcoef(found, expected)[0, 1] > 0.99


@pytest.mark.parametrize("baseline", ["no_change", "perturbed_mean", "matching_mean"])
def test_baselines_answer_for_genes_that_they_do_not_know(cells, controls, baseline):
    from scfm.benchmark import perturbation_baseline
    from scfm.tasks.perturbation_data import PerturbationSplit

    split = PerturbationSplit.from_lists(["A", "B"], test=["C"])
    model = perturbation_baseline(cells, baseline, split=split)
    assert "C" not in model.perturbable
    found = tl.perturb(controls, ["C"], model, copy=True)
    means = pd.DataFrame(cells.uns["perturbation"]["means"], index=cells.uns["perturbation"]["names"])
    change = 0 if baseline == "no_change" else (means.loc["A"] + means.loc["B"]).to_numpy() / 2 - means.loc["ctrl"]
    _, _, expected = next(model.iter_predictions(["C"], controls, len(controls)))
    np.testing.assert_allclose(found.layers["perturbed_C"], expected, rtol=1e-5)
    # cut at zero, so not exactly
    np.testing.assert_allclose(found.uns["perturb"]["mean_change"][0], change * np.ones(cells.n_vars), atol=0.2)
    with pytest.raises(ValueError, match="cannot perturb C"):
        tl.perturb(controls, ["C"], [model, Learner("AB")])


def test_the_real_class(cells, tmp_path):
    from scfm.models import GeneticPerturbation

    adata = cells.copy()
    GeneticPerturbation.setup_anndata(adata)
    model = GeneticPerturbation(
        adata, network={"hidden": 8}, split={"train": ["A", "B", "C", "A+B"]}, seed=0, device="cpu"
    )
    controls = adata[adata.obs["scfm_perturbation"] == "ctrl"].copy()
    order = np.random.default_rng(0).permutation(controls.n_obs)[:20]
    some = controls[order].copy()
    tl.perturb(controls, ["A+C", "B"], model, batch_size=7)
    model.save(tmp_path / "model")
    tl.perturb(some, ["A+C", "B"], tmp_path / "model")
    for name in ("perturbed_A+C", "perturbed_B"):
        assert np.isfinite(some.layers[name]).all()
        np.testing.assert_allclose(some.layers[name], controls.layers[name][order], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot perturb D"):
        tl.perturb(controls, "D", model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["A", "X+Y"], Learner()), ValueError, "cannot perturb X, Y"),
        (([], Learner()), ValueError, "no perturbations"),
        (("A", object()), TypeError, "object is no model"),
        (("A", []), ValueError, "no model"),
        (("A", Learner(), {"keep": "all"}), ValueError, "keep must be"),
        (("A", Learner(), {"dtype": "int8"}), ValueError, "dtype must be"),
        (("A", Learner(), {"batch_size": 0}), ValueError, "batch_size must be"),
        (("A", Learner(), {"out": "x.csv"}), ValueError, "new .h5ad file"),
    ],
)
def test_wrong_input(controls, arguments, error, message):
    with pytest.raises(error, match=message):
        tl.perturb(controls, arguments[0], arguments[1], **(arguments[2] if len(arguments) > 2 else {}))


def test_no_cells(controls):
    with pytest.raises(ValueError, match="no cells"):
        tl.perturb(controls[:0], "A", Learner())
