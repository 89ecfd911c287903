"""``benchmark.enhancement``: scores of a model and its baselines on counts that were held out."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from tiny import TINY

import scfm
from scfm import baselines
from scfm.backbones import GeneRows, backbone_class, from_config
from scfm.benchmark import enhancement, thin_counts
from scfm.genes import GeneVocab

N_KNOWN, N_UNKNOWN, N_CELLS = 60, 5, 48
SYMBOLS = [f"GENE{i}" for i in range(N_KNOWN)]
FEW = {"rates": (0.1, 0.5), "seeds": (0,), "n_cells": None, "min_counts": 20, "progress": False}
SCORES = ["MAE", "MRE", "PCC", "PCC per cell"]


def make_backbone(kind: str):
    vocab = GeneVocab(SYMBOLS, specials=[])
    if specials := backbone_class(kind).specials:
        names = [*specials, *SYMBOLS] if kind == "cellfm" else [*SYMBOLS, *specials]
        vocab = GeneVocab(names, specials=list(specials))
    config = backbone_class(kind).config_for(TINY[kind], vocab)
    return from_config(kind, config, vocab, name=kind, seed=3, device="cpu", precision="float32")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return make_backbone("scfoundation")


@pytest.fixture
def adata() -> ad.AnnData:
    """Two kinds of cells, with 100 counts and more."""
    rng = np.random.default_rng(8)
    profiles = rng.gamma(0.5, 2.0, (2, N_KNOWN + N_UNKNOWN))
    rates = profiles[np.arange(N_CELLS) % 2] * rng.uniform(1, 8, (N_CELLS, 1)) + 0.2
    var = pd.DataFrame(index=[*SYMBOLS, *(f"OTHER{i}" for i in range(N_UNKNOWN))])
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    return ad.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=var)


def log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


def scores_by_hand(counts: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Scores over the values of the original cells that are not zero, from dense arrays."""
    truth, expressed = log_normalised(counts), counts > 0
    x, p = truth[expressed], predicted[expressed]
    within = [np.corrcoef(truth[i, expressed[i]], predicted[i, expressed[i]])[0, 1] for i in range(len(counts))]
    errors = np.abs(x - p).mean(), ((x - p) ** 2 / x).mean()
    return dict(zip(SCORES, [*errors, np.corrcoef(x, p)[0, 1], np.mean(within)], strict=True))


def row(table: pd.DataFrame, method: str, rate: float) -> pd.Series:
    found = table[(table["method"] == method) & (table["rate"] == rate)]
    assert len(found) == 1
    return found.iloc[0]


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_every_method_at_every_rate_with_every_seed(adata, model):
    before = adata.copy()
    table = enhancement(adata, model, rates=(0.2, 0.5), seeds=(4, 9), n_cells=10, min_counts=20, progress=False)
    assert list(table.columns) == ["method", "rate", "seed", *SCORES, "n_cells"]
    methods = ["observed", "gene_mean", "knn", "scfoundation", "scfoundation-random"]
    expected = {(method, rate, seed) for method in methods for rate in (0.2, 0.5) for seed in (4, 9)}
    assert set(table[["method", "rate", "seed"]].itertuples(index=False, name=None)) == expected
    assert len(table) == len(expected)
    assert (table["n_cells"] == 10).all()
    assert np.isfinite(table[SCORES]).all(axis=None)
    # the draws of reads differ
    by_seed = table[table["method"] == "observed"].groupby("rate")["MAE"].nunique()
    assert (by_seed == 2).all()
    assert list(adata.obs) == list(before.obs)
    assert not adata.uns
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())


def test_nothing_taken_away_is_restored_perfectly(adata, model):
    table = enhancement(adata, model, **FEW | {"rates": (1.0,)})
    same = row(table, "observed", 1.0)
    assert same["MAE"] == 0
    assert same["MRE"] == 0
    assert same["PCC"] == pytest.approx(1)


def test_a_perfect_model_makes_no_error(adata, model, monkeypatch):
    truth = torch.from_numpy(log_normalised(adata.X[:, :N_KNOWN].toarray().astype(np.float64)))
    given = thin_counts(adata.X[:, :N_KNOWN], 0.5, genes=SYMBOLS).toarray()

    def knows_the_answer(self, tokens, genes=None):
        # cells are recognised by the values that they still have
        values = torch.zeros(len(tokens), N_KNOWN)
        known = tokens.flat_ids < N_KNOWN
        values[tokens.flat_cells[known], tokens.flat_ids[known]] = tokens.flat_values[known]
        cells = torch.cdist(values, torch.from_numpy(log_normalised(given)).float()).argmin(1)
        genes = torch.as_tensor(genes)
        rows = torch.arange(len(tokens)).repeat_interleave(len(genes))
        yield GeneRows(rows, genes.repeat(len(tokens)), truth[cells[:, None], genes].flatten())

    monkeypatch.setattr(type(model), "iter_reconstruction", knows_the_answer)
    table = enhancement(adata, model, **FEW | {"rates": (0.5,)}, random_weights=False, batch_size=5)
    perfect = row(table, "scfoundation", 0.5)
    assert perfect["MAE"] == pytest.approx(0, abs=1e-5)
    assert perfect["MRE"] == pytest.approx(0, abs=1e-8)
    assert perfect["PCC"] == pytest.approx(1)
    assert row(table, "observed", 0.5)["MAE"] > 0.1


@pytest.mark.parametrize("rate", FEW["rates"])
def test_scores_are_those_of_dense_arithmetic(adata, model, rate):
    table = enhancement(adata, model, **FEW, block_size=7)
    counts = adata.X[:, :N_KNOWN].toarray().astype(np.float64)
    thinned = thin_counts(counts, rate, genes=SYMBOLS).toarray()
    tokens = model.tokenize(sparse.csr_matrix(thinned), SYMBOLS, target=f"f{1 / rate:g}")
    predicted = {
        "observed": log_normalised(thinned),
        "gene_mean": np.log1p(np.tile(np.expm1(log_normalised(thinned)).mean(0), (N_CELLS, 1))),
        "scfoundation": model.reconstruct(tokens).clamp(min=0).numpy().astype(np.float64),
    }
    for method, values in predicted.items():
        expected = scores_by_hand(counts, values)
        for score in SCORES:
            assert row(table, method, rate)[score] == pytest.approx(expected[score], rel=1e-4, abs=1e-5), method


def test_all_cells_are_neighbours_where_there_are_few(adata, model):
    few = adata[:9].copy()
    table = enhancement(few, model, **FEW, baselines=("knn",), random_weights=False)
    counts = few.X[:, :N_KNOWN].toarray().astype(np.float64)
    together = thin_counts(counts, 0.5, genes=SYMBOLS).toarray().sum(0, keepdims=True)
    expected = scores_by_hand(counts, np.repeat(log_normalised(together), 9, axis=0))
    for score in SCORES:
        assert row(table, "knn", 0.5)[score] == pytest.approx(expected[score], rel=1e-5)


def test_neighbours_help_where_cells_are_alike(adata, model):
    table = enhancement(adata, model, **FEW, random_weights=False)
    assert row(table, "knn", 0.1)["MAE"] < row(table, "observed", 0.1)["MAE"]
    assert row(table, "knn", 0.5)["PCC"] > row(table, "gene_mean", 0.5)["PCC"]


# -- what does not matter ---------------------------------------------------------------------------------------------


def test_neither_order_nor_unknown_genes_nor_sizes_matter(adata, model):
    rng = np.random.default_rng(0)
    baselines = ("observed", "gene_mean")
    first = enhancement(adata, model, **FEW, baselines=baselines)
    other = adata[rng.permutation(N_CELLS)][:, rng.permutation(N_KNOWN)].copy()
    # the counts of a gene may lie in two columns
    half = other[:, :1].copy()
    half.X = sparse.csr_matrix(np.floor(half.X.toarray() / 2))
    other.X = sparse.hstack([other.X[:, :1] - half.X, other.X[:, 1:]], format="csr")
    with pytest.warns(UserWarning, match="not unique"):
        other = ad.concat([other, half], axis=1, merge="same")
    again = enhancement(other, model, **FEW, baselines=baselines, batch_size=3, block_size=5)
    pd.testing.assert_frame_equal(first, again, rtol=1e-5, atol=1e-6)


def test_counts_can_lie_in_a_layer(adata, model):
    expected = enhancement(adata, model, **FEW, baselines=())
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.3
    pd.testing.assert_frame_equal(enhancement(adata, model, **FEW, baselines=(), layer="counts"), expected)
    with pytest.raises(ValueError, match="layer="):
        enhancement(adata, model, **FEW)


def test_the_choice_of_cells_has_a_seed(adata, model):
    arguments = FEW | {"n_cells": 12, "baselines": ("observed",), "random_weights": False, "rates": (0.5,)}
    tables = [enhancement(adata, model, **arguments, random_state=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0]["MAE"][0] != tables[2]["MAE"][0]


# -- cells that cannot be scored ----------------------------------------------------------------------------------------


def test_shallow_cells_are_not_scored_but_baselines_see_them(adata, model):
    counts = adata.X.toarray()
    shallow = counts[:10] // 20
    shallow[:, 0] = 1
    counts[:10] = shallow
    limit = int(shallow[:, :N_KNOWN].sum(1).max())
    adata.X = sparse.csr_matrix(counts)
    arguments = FEW | {"baselines": ("observed", "gene_mean"), "random_weights": False, "min_counts": limit}
    table = enhancement(adata, model, **arguments)
    assert (table["n_cells"] == N_CELLS - 10).all()
    without = enhancement(adata[10:].copy(), model, **arguments)
    same = table["method"] != "gene_mean"
    pd.testing.assert_frame_equal(table[same], without[same])
    assert (table[~same]["MAE"].to_numpy() != without[~same]["MAE"].to_numpy()).all()


def test_cells_that_lose_everything_leave_all_methods(adata, model):
    arguments = FEW | {"rates": (0.01,), "min_counts": 0}
    table = enhancement(adata, model, **arguments)
    left = np.asarray(thin_counts(adata.X[:, :N_KNOWN], 0.01, genes=SYMBOLS).sum(1)).ravel()
    # one single read gives no depth either
    assert 0 < (left > 1).sum() < N_CELLS
    assert (table["n_cells"] == (left > 1).sum()).all()
    nothing = enhancement(adata, model, **arguments | {"rates": (1e-9,), "baselines": ("observed",)})
    assert (nothing["n_cells"] == 0).all()
    assert nothing[SCORES].isna().all(axis=None)


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scgpt", "cellfm", "sclong"])
def test_models_that_cannot_say_who_can(adata, kind):
    with pytest.raises(scfm.UnsupportedError, match=r"read-depth enhancement\. Models that can: .*scfoundation"):
        enhancement(adata, make_backbone(kind), **FEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": ()}, "rates must be different"),
        ({"rates": (0.5, 0.5)}, "rates must be different"),
        ({"rates": (0,)}, "above 0 and up to 1"),
        ({"rates": (2,)}, "above 0 and up to 1"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"baselines": ("magic",)}, "choose among observed, gene_mean, knn, scvi"),
        ({"baselines": "knn"}, "baselines must be a list"),
        ({"n_cells": 0}, "n_cells must be a positive"),
        ({"min_counts": 10**6}, "choose a smaller min_counts="),
    ],
)
def test_wrong_arguments(adata, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        enhancement(adata, model, **FEW | arguments)


@pytest.mark.parametrize("n_cells", [1, 2])
def test_hardly_any_cells(adata, model, n_cells):
    table = enhancement(adata[:n_cells].copy(), model, **FEW)
    assert (table["n_cells"] == n_cells).all()
    assert np.isfinite(table["MAE"]).all()


def test_scvi_learns_from_cells_that_have_counts(adata, model, monkeypatch):
    counts = adata.X[:, :N_KNOWN].toarray().astype(np.float64)
    counts[5] = 0
    adata = ad.AnnData(sparse.csr_matrix(counts), var=adata.var[:N_KNOWN])
    predictors = []

    def short(shallow, *, random_state):
        predictors.append(baselines.scvi_expression(shallow, random_state=random_state, max_epochs=1))
        return predictors[-1]

    monkeypatch.setattr("scfm.benchmark._imputation.baselines", SimpleNamespace(scvi_expression=short))
    arguments = FEW | {"rates": (0.5,), "baselines": ("scvi",), "random_weights": False}
    table = enhancement(adata, model, **arguments)
    assert list(table["method"]) == ["scvi", "scfoundation"]
    assert (table["n_cells"] == N_CELLS - 1).all()
    expected = scores_by_hand(np.delete(counts, 5, axis=0), predictors[0].predict().astype(np.float64))
    for score in SCORES:
        assert row(table, "scvi", 0.5)[score] == pytest.approx(expected[score], rel=1e-5)
