"""Responses to perturbations over every backbone: set up, train, predict, save, load, and what goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.benchmark._perturbation import _default_split
from scfm.genes import GeneVocab
from scfm.models import GeneticPerturbation
from scfm.models._perturbation_data import de_positions
from scfm.tasks.gears_network import GearsConfig
from scfm.tasks.perturbation_data import PerturbationSplit, canonical, simulation_split, split_perturbations
from scfm.train._adapters import changed

N_GENES, N_KNOWN = 14, 11
GO = {"G0": ["a", "b"], "G1": ["a", "b"], "G2": ["b", "c"], "X1": ["a"], "X2": ["c", "d"], "Z9": ["d"], "G4": ["e"]}
SPLIT = {"train": ["G0", "G1+X1", "X1", "G2"], "validation": ["G0+X1"], "test": ["G1", "X2"]}
FIT = {"batch_size": 8, "progress": False, "accelerator": "cpu"}


def make(n_cells=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array(["control", "G0", "G1+X1", "X1+ctrl", "G2", "X1+G0", "G1", "X2"])[np.arange(n_cells) % 8]
    means = rng.gamma(1.0, 2.0, N_GENES)[None].repeat(n_cells, 0)
    means[labels == "G0", 3] *= 4
    means[labels == "G2", 5] *= 0.1
    counts = rng.poisson(means).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    adata.obs["total"] = counts.sum(1) + 5
    return adata


def prepared(adata, **options):
    # Scanpy's tests of genes run on numba's threads, which change the number of torch's
    threads = torch.get_num_threads()
    scfm.pp.perturbation_setup(adata, "perturbation", **options)
    torch.set_num_threads(threads)
    GeneticPerturbation.setup_anndata(adata)
    return adata


@pytest.fixture(scope="module")
def adata():
    return prepared(make())


@pytest.fixture(scope="module")
def controls(adata):
    return adata[adata.obs["scfm_perturbation"] == "ctrl"].copy()


@pytest.fixture(scope="module")
def backbone(kind):
    """A network of each kind that knows all genes but the last ones, and one that is perturbed but not measured."""
    cls = scfm.backbones.backbone_class(kind)
    names = [*cls.specials, *(f"G{i}" for i in range(N_KNOWN)), "X1"]
    vocab = GeneVocab(names, specials=cls.specials)
    backbone = from_config(kind, cls.config_for(dict(TINY[kind]), vocab), vocab, device="cpu", name=f"tiny-{kind}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    changed(backbone)
    return backbone.to("cpu", "float32")


def build(adata, model=None, **options):
    defaults = {"split": SPLIT, "go": GO, "device": "cpu", "seed": 0, "network": {"hidden": 6}}
    return GeneticPerturbation(adata, model, **(defaults | options))


def build_generator(adata, model, **options):
    return build(adata, model, **({"go": None, "route": "scgpt", "network": {}} | options))


@pytest.fixture(scope="module")
def trained(adata):
    model = build(adata)
    model.train(3, **FIT)
    return model


@pytest.fixture(scope="module")
def generator_model(adata):
    cls = scfm.backbones.backbone_class("scgpt")
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(N_KNOWN)), "X1"], specials=cls.specials)
    backbone = from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu")
    model = build_generator(adata, backbone)
    model.train(2, lr=1e-3, **FIT)
    return model


@pytest.fixture(params=["gears", "generator"])
def any_model(request, trained, generator_model):
    return trained if request.param == "gears" else generator_model


# -- every kind of model -----------------------------------------------------------------------------------------------


def test_gears_on_states_of_every_model(adata, controls, backbone, tmp_path):
    form = {} if backbone.fine_tuning("gears").objective else {"entry_hidden": 6}
    form["hidden"] = 6
    model = build(adata, backbone, route="gears", network=form, cache_dir=tmp_path / "states")
    before = [parameter.clone() for parameter in model.backbone.module.parameters()]
    model.train(2, **FIT)
    assert all(map(torch.equal, before, model.backbone.module.parameters()))
    files = list((tmp_path / "states").iterdir())
    assert len(files) == 1
    config = model.module.network.config
    assert config.states == backbone.gene_state_dim
    assert config.indicator == (backbone.kind == "sclong")
    assert config.entry == ("mlp" if backbone.kind in ("cellfm", "scgpt") else "norm")
    out = model.predict(["G0", "X1+G2"], controls)
    assert out["G0"].shape == (controls.n_obs, N_GENES)
    assert out["G0"].dtype == np.float32
    assert np.isfinite(out["G0"]).all()
    assert not np.allclose(out["G0"], out["X1+G2"])
    # cells by themselves, in another order, and a block at a time
    few = model.predict(["G0"], controls[[5, 2]], batch_size=1)["G0"]
    np.testing.assert_allclose(few, out["G0"][[5, 2]], atol=2e-5)
    # a second model of the same cells finds the states, a saved one needs no cache
    again = build(adata, backbone, route="gears", network=form, cache_dir=tmp_path / "states")
    again.train(2, **FIT)
    assert list((tmp_path / "states").iterdir()) == files
    np.testing.assert_array_equal(again.predict(["G0"], controls)["G0"], out["G0"])
    model.save(tmp_path / "model")
    loaded = GeneticPerturbation.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(loaded.predict(["G0"], controls)["G0"], out["G0"])
    model.save(tmp_path / "light", save_backbone=False)
    assert not (tmp_path / "light" / "backbone").exists()
    with pytest.raises(ValueError, match="give it with model="):
        GeneticPerturbation.load(tmp_path / "light", adata=False)
    light = GeneticPerturbation.load(tmp_path / "light", adata=False, accelerator="cpu", model=backbone)
    np.testing.assert_array_equal(light.predict(["G0"], controls)["G0"], out["G0"])


def test_states_are_those_of_the_model(adata, backbone):
    """What the network is given, against one cell at a time.

    Genes without a state have the mean of those that have one, or the state of their own token of padding.
    """
    model = build(adata, backbone, route="gears", cache_dtype="float32")
    pairs, totals = model._pairs()
    cells = np.array([0, 8, 16])
    states = model._cached(pairs.expression, totals, cells, 0)(cells[[2, 0]]).numpy()
    names = [*map(str, model.genes), *model._perturbed.extra]
    match = backbone.vocab.match(names)
    options = dict(backbone.fine_tuning("gears").tokenize)
    for row, cell in enumerate(cells[[2, 0]]):
        options |= backbone.normalized_input(totals[[cell]])
        tokens = backbone.tokenize(pairs.expression[[cell]], match, **options)
        if options.get("unknown") == "pad":
            assert (match.ids < 0).sum() > 1
            np.testing.assert_allclose(states[row], backbone.gene_states(tokens)[0], atol=1e-4)
            continue
        parts = list(backbone.iter_gene_states(tokens))
        genes, values = torch.cat([p.genes for p in parts]).numpy(), torch.cat([p.values for p in parts]).numpy()
        by_gene = dict(zip(genes.tolist(), values, strict=True))
        for column, gene in enumerate(match.ids.tolist()):
            np.testing.assert_allclose(states[row, column], by_gene.get(gene, values.mean(0)), atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_projection_of_states_can_stay_as_it_is(adata, frozen):
    cls = scfm.backbones.backbone_class("sclong")
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(N_KNOWN)), "X1"], specials=cls.specials)
    backbone = from_config("sclong", cls.config_for(dict(TINY["sclong"]), vocab), vocab, device="cpu")
    model = build(adata, backbone, route="gears", network={"hidden": 6, "frozen_projection": frozen})
    before = model.module.network.project.weight.clone(), model.module.network.gene_weight.clone()
    model.train(1, **FIT)
    assert torch.equal(model.module.network.project.weight, before[0]) == frozen
    assert not torch.equal(model.module.network.gene_weight, before[1])


def test_layers_on_each_graph_and_models_saved_before(adata, controls, tmp_path):
    model = build(adata, network={"hidden": 6, "n_go_layers": 2, "n_coexpression_layers": 3})
    assert (len(model.module.network.go.layers), len(model.module.network.coexpression.layers)) == (2, 3)
    model = build(adata, network={"hidden": 6, "n_graph_layers": 2})
    assert (len(model.module.network.go.layers), len(model.module.network.coexpression.layers)) == (2, 2)
    model.train(1, **FIT)
    model.save(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    text = json.dumps(record)
    assert '"n_go_layers": 2, "n_coexpression_layers": 2' in text
    text = text.replace('"n_go_layers": 2, "n_coexpression_layers": 2', '"n_graph_layers": 2')
    (tmp_path / "model" / "model.json").write_text(text)
    loaded = GeneticPerturbation.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(loaded.predict(["G0"], controls)["G0"], model.predict(["G0"], controls)["G0"])


# -- training ----------------------------------------------------------------------------------------------------------


def test_history_and_the_best_epoch(adata, trained):
    history = pd.concat(trained.history.values(), axis=1)
    assert history.shape[0] == 3
    assert {"train_loss_epoch", "validation_loss", "DE MSE_validation", "Pearson_validation", "kept"} <= set(history)
    assert history["learning_rate"].tolist() == [1e-3, 5e-4, 2.5e-4]
    assert trained.is_trained
    assert "GEARS without a foundation model" in trained.summary_string
    best = int(history["DE MSE_validation"].idxmin())
    assert history["kept"][best] == 1
    shorter = build(adata)
    shorter.train(best + 1, keep_best=False, **FIT)
    for name, tensor in shorter.module.state_dict().items():
        assert torch.equal(tensor, trained.module.state_dict()[name]), name


def test_training_learns(adata, controls):
    model = build(adata)
    model.train(15, lr=3e-2, optimization={"optimizer": "adam", "clip": None}, keep_best=False, **FIT)
    loss = model.history["train_loss_epoch"]["train_loss_epoch"]
    assert loss.iloc[-1] < 0.8 * loss.iloc[0]


@pytest.mark.parametrize("route", ["gears", "generator"])
def test_same_seed_same_weights(route, adata, trained, generator_model):
    state = torch.random.get_rng_state()
    if route == "gears":
        first, second = trained, build(adata)
        second.train(3, **FIT)
    else:
        first, second = generator_model, build_generator(adata, _untrained(generator_model))
        second.train(2, lr=1e-3, **FIT)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name]), name


def _untrained(model):
    return from_config("scgpt", dict(TINY["scgpt"]), model.backbone.vocab, device="cpu")


def test_test_perturbations_are_never_looked_at(adata, controls, trained):
    """Other cells of the test perturbations change nothing."""
    other = make()
    changed_cells = other.obs["perturbation"].isin(SPLIT["test"]).to_numpy()
    other.X = sparse.csr_matrix(np.where(changed_cells[:, None], other.X.toarray()[:, ::-1], other.X.toarray()))
    prepared(other)
    model = build(other)
    model.train(3, **FIT)
    np.testing.assert_array_equal(model.predict(["G0"], controls)["G0"], trained.predict(["G0"], controls)["G0"])


def test_accumulation_of_equal_batches(adata):
    """The mean of the gradients of two batches is another step than their sum, clipped after each as upstream."""
    states = {}
    for name, options in {"mean": {}, "sum": {"sum_accumulated": True}}.items():
        model = build(adata)
        model.train(
            1,
            batch_size=4,
            accumulate=2,
            optimization={"optimizer": "adam", "clip": "value", "clip_value": 1e-3},
            progress=False,
            **options,
        )
        states[name] = model.module.state_dict()["network.gene_weight"]
    assert not torch.equal(*states.values())


def test_a_subset_of_genes_holds_the_perturbed_ones(adata, generator_model):
    learner = generator_model.module
    pairs, _ = generator_model._pairs()
    batch = pairs.batch(np.array([1, 2, 4]))
    flags = learner.flags(batch.perturbed)
    assert flags.sum(1).tolist() == [1, 2, 1]
    learner.most_genes = 4
    wanted = set(np.flatnonzero(flags.any(0)))
    chosen = [set(learner._subset(flags, np.random.default_rng(seed))) for seed in range(8)]
    assert all(wanted <= some and len(some) == 4 for some in chosen)
    assert len(set(map(frozenset, chosen))) == 1  # four are perturbed
    learner.always_include_perturbed = False
    chosen = [set(learner._subset(flags, np.random.default_rng(seed))) for seed in range(8)]
    assert not all(wanted <= some for some in chosen)
    learner.most_genes, learner.always_include_perturbed = 1536, True


def test_genes_that_are_not_measured(generator_model, trained):
    assert generator_model._perturbed.extra == ("X1", "X2")
    pairs, _ = generator_model._pairs()
    assert pairs.expression.shape[1] == N_GENES + 2
    assert pairs.expression[:, N_GENES:].nnz == 0
    assert trained._perturbed.extra == ()
    assert trained._pairs()[0].expression.shape[1] == N_GENES


def test_default_split_and_split_objects(adata):
    model = build(adata, split=None)
    assert isinstance(model.split, PerturbationSplit)
    assert set(model.split.train) | set(model.split.validation) | set(model.split.test) == {
        *("G0", "G1", "G2", "X1", "X2"),
        *("G0+X1", "G1+X1"),
    }
    given = PerturbationSplit(["G0"], ["G1"], ["X2"])
    assert build(adata, split=given).split is given


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_default_split_is_that_of_gears_for_the_labels_of_the_file(seed):
    """The order of genes inside a label decides what is drawn."""
    rng = np.random.default_rng(seed)
    genes = [f"G{i}" for i in range(8)]
    pairs = ["+".join(rng.permutation(pair)) for pair in itertools.combinations(genes, 2)]
    labels = ["ctrl", *(f"{gene}+ctrl" for gene in genes), *pairs]
    data = make(3 * len(labels))
    data.obs["perturbation"] = np.repeat(labels, 3)
    prepared(data)
    model = build(data, split=None, seed=seed)
    expected = split_perturbations(labels, seed=seed)
    assert model.split == expected
    train, test, _ = simulation_split(labels, seed=seed)
    train, validation, _ = simulation_split(train, seed=seed, train_gene_share=0.9, combo_seen2_share=0.9)
    assert set(model.split.test) == set(map(canonical, test))
    assert set(model.split.validation) == set(map(canonical, validation))
    assert model.split != split_perturbations(map(canonical, labels), seed=seed)
    if seed == 1:
        assert _default_split(data, {}) == model.split
        data.obs["perturbation"] = [label.replace("+", "|") for label in data.obs["perturbation"]]
        prepared(data, separators=("|",))
        assert build(data, split=None, seed=seed).split == model.split


def test_default_split_of_too_few():
    few = make()
    few = prepared(few[few.obs["perturbation"].isin(["control", "G0"])].copy())
    with pytest.raises(ValueError, match=r"default split left nothing to train on.*split="):
        build(few, split=None)


def test_a_split_in_other_spellings(adata):
    split = {"train": ["G0+ctrl", "X1_G1", "X1", "G2"], "validation": ["G0_X1"], "test": ["G1", "X2"]}
    assert vars(build(adata, split=split).split) == vars(build(adata).split)


def test_validation_perturbations_without_changed_genes(adata, capsys):
    """One cell has no test of its genes; the scores are those of the others."""
    few = make()
    few = few[(few.obs["perturbation"] != "G1") | (np.arange(60) == 6)].copy()
    prepared(few)
    scores = {}
    for name, held_out in {"both": ["G0+X1", "G1"], "one": ["G0+X1"], "none": ["G1"]}.items():
        model = build(few, split={"train": ["G0", "G2", "X1"], "validation": held_out})
        capsys.readouterr()
        model.train(1, **FIT)
        scores[name] = model.history["DE MSE_validation"].iloc[0, 0] if name != "none" else None
        warned = "'DE MSE'" in capsys.readouterr().err
        assert warned == (name == "none")
    assert "DE MSE_validation" not in model.history
    assert scores["both"] == pytest.approx(scores["one"], rel=1e-5)


def test_symbols_beside_ensembl_ids(adata, controls, trained):
    """Changed genes choose the epoch also where the index of the data, as in files of GEARS, holds ids."""
    other = make()
    other.var["gene_name"] = other.var_names.to_numpy()
    other.var_names = [f"ENSG{i:011d}" for i in range(N_GENES)]
    prepared(other)
    model = build(other)
    assert list(model.genes) == list(trained.genes)
    positions = de_positions(other, model.genes)
    for name, expected in de_positions(adata, trained.genes).items():
        np.testing.assert_array_equal(positions[name], expected)
    model.train(3, **FIT)
    assert "DE MSE_validation" in model.history
    out = model.predict("G0", other[other.obs["scfm_perturbation"] == "ctrl"])["G0"]
    np.testing.assert_array_equal(out, trained.predict("G0", controls)["G0"])
    np.testing.assert_array_equal(out, model.predict("G0", controls)["G0"])


def test_cells_that_were_reordered():
    """Control cells swap their places, so that numbers of control cells still name control cells."""
    adata = prepared(make())
    places = np.arange(adata.n_obs)
    own = np.flatnonzero(adata.obs["scfm_perturbation"] == "ctrl")
    places[own] = own[::-1]
    moved = adata[places].copy()
    GeneticPerturbation.setup_anndata(moved)
    with pytest.raises(ValueError, match=r"another order.*scfm.pp.perturbation_setup again"):
        build(moved).train(1, **FIT)


def test_cell_types_that_are_held_out(adata):
    other = make()
    other.obs["type"] = np.where(np.arange(60) < 30, "p", "q")
    prepared(other, cell_type_key="type")
    split = PerturbationSplit.from_lists(**SPLIT, held_out_cell_types=["q"])
    model = build(other, split=split)
    model.train(1, **FIT)
    with pytest.raises(ValueError, match="nothing to learn from"):
        build(other, split=PerturbationSplit.from_lists(["G0"], held_out_cell_types=["p", "q"])).train(1, **FIT)


# -- predictions -------------------------------------------------------------------------------------------------------


def test_blocks_are_the_whole(any_model, controls):
    names = ["G0", "X1+G1", "ctrl"]
    whole = any_model.predict(names, controls)
    seen = {name: np.full((controls.n_obs, N_GENES), np.nan, np.float32) for name in names}
    for name, rows, values in any_model.iter_predictions(names, controls, 3):
        assert values.shape == (rows.stop - rows.start, N_GENES)
        assert rows.stop - rows.start <= 3
        seen[name][rows] = values
    for name in names:
        np.testing.assert_allclose(seen[name], whole[name], atol=1e-5)
    assert list(whole) == names


def test_twice_the_same_and_independent_of_other_cells(any_model, controls):
    first, second = (any_model.predict("G1+X1", controls)["G1+X1"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    order = np.random.default_rng(0).permutation(controls.n_obs)
    moved = any_model.predict("X1+G1", controls[order])["X1+G1"]
    np.testing.assert_allclose(moved, first[order], atol=1e-5)
    np.testing.assert_allclose(any_model.predict("G1+X1", controls[[3]])["G1+X1"], first[[3]], atol=1e-5)


def test_genes_in_another_order(any_model, controls):
    whole = any_model.predict("G0", controls)["G0"]
    order = np.random.default_rng(1).permutation(N_GENES)
    # the total of a cell is a sum in another order
    np.testing.assert_allclose(any_model.predict("G0", controls[:, order])["G0"], whole[:, order], atol=1e-5)


def test_control_cells_of_the_data_are_the_default(any_model, controls):
    np.testing.assert_array_equal(any_model.predict("G0")["G0"], any_model.predict("G0", controls)["G0"])


def test_usual_spellings_and_repeats(any_model, controls):
    expected = any_model.predict(["G1+X1", "G0"], controls)
    out = any_model.predict(["X1_G1", "G0", "G0", "G0+ctrl", "X1_G1"], controls)
    assert list(out) == ["X1_G1", "G0", "G0+ctrl"]
    np.testing.assert_array_equal(out["X1_G1"], expected["G1+X1"])
    for name in ("G0", "G0+ctrl"):
        np.testing.assert_array_equal(out[name], expected["G0"])


def test_counts_and_their_logarithms_are_the_same(trained, controls):
    logged = controls.copy()
    logged.X = trained._rule.read(controls)[0]
    np.testing.assert_allclose(trained.predict("G0", logged)["G0"], trained.predict("G0", controls)["G0"], atol=1e-5)


def test_total_counts_from_a_column():
    adata = prepared(make(), total_key="total")
    model = build(adata)
    values, totals = model._rule.read(adata)
    expected = np.log1p(adata.X.toarray() / adata.obs["total"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(values.toarray(), expected, rtol=1e-5)
    np.testing.assert_array_equal(totals, adata.obs["total"])
    model.train(1, **FIT)
    with pytest.raises(KeyError, match="no column 'total'"):
        model.predict("G0", anndata.AnnData(adata.X[:8], var=adata.var))


def test_which_genes_can_be_perturbed(trained, generator_model, adata, controls):
    # annotated ones, measured or not, beside those with cells to train on
    assert set(trained.perturbable) == {*GO, "G0", "G1", "G2", "X1"}
    assert np.isfinite(trained.predict("Z9+G0", controls)["Z9+G0"]).all()
    assert set(generator_model.perturbable) == {*(f"G{i}" for i in range(N_KNOWN)), "X1"}
    for model in (trained, generator_model):
        with pytest.raises(ValueError, match=r"cannot perturb G12, NOGENE:"):
            model.iter_predictions(["G0", "NOGENE+G12"], controls)
    without = build(adata, go=None)
    assert set(without.perturbable) == {"G0", "G1", "G2", "X1"}
    chosen = build(adata, perturbable=["Z9"])
    assert set(chosen.perturbable) == {"G0", "G1", "G2", "X1", "X2", "Z9"}
    assert len(chosen._perturbed.names) == 6


def test_untrained_models_say_so(adata, controls, capsys):
    build(adata).predict("G0", controls)
    assert "not trained" in capsys.readouterr().err


# -- saving ------------------------------------------------------------------------------------------------------------


def test_save_and_load(any_model, adata, controls, tmp_path):
    any_model.save(tmp_path / "model")
    with pytest.raises(FileExistsError):
        any_model.save(tmp_path / "model")
    any_model.save(tmp_path / "model", overwrite=True)
    assert not [file for file in (tmp_path / "model").rglob("*") if file.suffix in (".pkl", ".pt")]
    for data in (False, adata):
        loaded = GeneticPerturbation.load(tmp_path / "model", adata=data, accelerator="cpu")
        for name in ("G0", "G1+X1"):
            np.testing.assert_array_equal(loaded.predict(name, controls)[name], any_model.predict(name, controls)[name])
        assert loaded.split.train == any_model.split.train
        assert list(loaded.perturbable) == list(any_model.perturbable)
        assert loaded.route == any_model.route
        assert loaded.history["train_loss_epoch"].equals(any_model.history["train_loss_epoch"])
    loaded.train(1, **FIT)
    assert len(loaded.history["train_loss_epoch"]) == len(any_model.history["train_loss_epoch"]) + 1
    without = GeneticPerturbation.load(tmp_path / "model", adata=False)
    with pytest.raises(ValueError, match="without data"):
        without.train(1)
    with pytest.raises(ValueError, match="without data"):
        without.predict("G0")


def test_another_foundation_model_is_noticed(adata, generator_model, tmp_path):
    model = build(adata, "cellfm-mini", route="gears", network={})
    model.save(tmp_path / "light", save_backbone=False)
    with pytest.raises(ValueError, match="trained on the foundation model cellfm-mini, not on scgpt-mini"):
        GeneticPerturbation.load(tmp_path / "light", adata=False, model="scgpt-mini")
    other = scfm.load("cellfm-mini", device="cpu")
    loaded = GeneticPerturbation.load(tmp_path / "light", adata=False, model=other)
    # a copy in another folder is the same model, other weights by the same name are not
    copy = other.save(tmp_path / "copy")
    again = GeneticPerturbation.load(tmp_path / "light", adata=False, model=copy)
    assert again.backbone.provenance.path != loaded.backbone.provenance.path
    other.provenance = dataclasses.replace(other.provenance, sha256="0" * 64, extra={})
    with pytest.raises(ValueError, match="not on another file of it"):
        GeneticPerturbation.load(tmp_path / "light", adata=False, model=other)
    generator_model.save(tmp_path / "generator")
    with pytest.raises(ValueError, match="leave model= out"):
        GeneticPerturbation.load(tmp_path / "generator", adata=False, model="scgpt-mini")


def test_damage_and_other_data_are_noticed(trained, adata, tmp_path):
    trained.save(tmp_path / "model")
    other = prepared(make()[:, ::-1].copy())
    with pytest.raises(ValueError, match="another order"):
        GeneticPerturbation.load(tmp_path / "model", adata=other)
    with pytest.raises(ValueError, match="different class"):
        scfm.models.RegulatoryNetwork.load(tmp_path / "model", adata=False)
    file = tmp_path / "model" / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        GeneticPerturbation.load(tmp_path / "model", adata=False)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["class"] == "GeneticPerturbation"


def test_a_fine_tuned_file_of_scgpt_predicts_as_it_is(generator_model, adata, controls, tmp_path):
    folder = generator_model.backbone.save(tmp_path / "tuned")
    model = build_generator(adata, folder)
    for name in ("G0", "G1+X1"):
        np.testing.assert_allclose(
            model.predict(name, controls)[name], generator_model.predict(name, controls)[name], atol=1e-6
        )
    with pytest.raises(scfm.UnsupportedError, match="network for perturbations"):
        build(adata, folder, route="gears")


# -- wrong inputs ------------------------------------------------------------------------------------------------------


def test_data_that_are_not_prepared():
    with pytest.raises(ValueError, match="scfm.pp.perturbation_setup"):
        GeneticPerturbation.setup_anndata(make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": {"train": ["NOGENE"]}}, ValueError, "no perturbation of split.train"),
        ({"split": {"train": ["G0"], "test": ["G0"]}}, ValueError, "in two parts"),
        ({"split": {"training": ["G0"]}}, TypeError, "has the parts"),
        ({"split": ["G0"]}, TypeError, "split_perturbations"),
        ({"route": "x"}, ValueError, "'gears' or 'scgpt'"),
        ({"route": "scgpt"}, ValueError, "needs a model"),
        ({"go": pd.DataFrame({"a": [1]})}, ValueError, "columns 'gene' and 'term'"),
        ({"network": {"states": 4}}, ValueError, "no model to give them"),
        ({"network": {"entry": "x"}}, ValueError, "entry must be"),
        ({"network": {"nope": 1}}, TypeError, r"network= has no option 'nope'; there are hidden"),
        ({"network": {"n_genes": 1}}, TypeError, "network= has no option 'n_genes'"),
    ],
)
def test_wrong_options(adata, options, error, message):
    with pytest.raises(error, match=message):
        build(adata, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "x"}, "monitor must be"),
        ({"batch_size": 1}, "at least 2"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"lr": 1e30}, "no longer finite"),
    ],
)
def test_wrong_training(adata, options, message):
    with pytest.raises(ValueError, match=message):
        build(adata).train(**({"max_epochs": 3} | FIT | options))


def test_wrong_options_of_loss_and_generator(adata, generator_model, capsys):
    model = build(adata)
    capsys.readouterr()
    with pytest.raises(TypeError, match="loss= has no option 'nope'; there are gamma, direction"):
        model.train(3, loss={"nope": 1}, **FIT)
    assert "training on" not in capsys.readouterr().err
    with pytest.raises(TypeError, match="network= has no option 'nope'; there are decoder"):
        build_generator(adata, _untrained(generator_model), network={"nope": 1})


def test_wrong_control_cells(trained, adata, controls):
    with pytest.raises(ValueError, match="they lack G0"):
        trained.predict("G0", controls[:, 1:])
    other = anndata.AnnData(controls.X[:, :1], controls.obs, pd.DataFrame(index=["M"]))
    more = anndata.concat([controls, other], axis=1)
    with pytest.raises(ValueError, match="they have others, too"):
        trained.predict("G0", more)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        trained.iter_predictions("G0", controls, 0)
    with pytest.raises(TypeError, match="AnnData"):
        trained.predict("G0", controls.X)
    bad = controls.copy()
    bad.X = bad.X - 5 * bad.X
    with pytest.raises(ValueError, match="negative"):
        trained.predict("G0", bad)


def test_large_states_are_refused_before_they_are_made(adata, generator_model, tmp_path):
    model = build(adata, _untrained(generator_model), route="gears", max_cache_gib=1e-7, cache_dir=tmp_path, network={})
    with pytest.raises(MemoryError, match="max_cache_gib"):
        model.train(1, **FIT)
    assert not list(tmp_path.iterdir())


def test_config_round_trip():
    config = GearsConfig(3, 2, hidden=4, positions="none", indicator=True)
    assert GearsConfig(**vars(config)) == config
