"""Regulatory networks over every backbone: start, train, get, score, save, load, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.metrics import cosine_adjacency, network_scores, similarity_adjacency
from scfm.models import RegulatoryNetwork, _network_start
from scfm.train._adapters import changed

TRAIN = {"accelerator": "cpu", "batch_size": 16, "adjacency_lr": 1e-3}
N_KNOWN = 12


@pytest.fixture(scope="module")
def cells(make_data):
    adata = make_data(40, n_genes=15)
    adata.layers["log"] = adata.X.log1p()
    return adata


@pytest.fixture
def adata(cells):
    # data that were saved with a network and loaded again pass for the ones they are a copy of, until these are set up
    RegulatoryNetwork.setup_anndata(cells, layer="log")
    return cells


@pytest.fixture(scope="module")
def counts(make_data):
    adata = make_data(40, n_genes=15)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    RegulatoryNetwork.setup_anndata(adata, counts_layer="counts")
    return adata


@pytest.fixture(scope="module")
def backbone(kind, counts):
    """A network of each kind that knows all genes but the last three."""
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *counts.var_names[:N_KNOWN]], specials=cls.specials)
    backbone = from_config(kind, cls.config_for(dict(TINY[kind]), vocab), vocab, device="cpu", name="tiny")
    # fresh norms leave states of mean zero
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    changed(backbone)
    return backbone.to("cpu", "float32")


@pytest.fixture(scope="module")
def network(cells):
    RegulatoryNetwork.setup_anndata(cells, layer="log")
    network = RegulatoryNetwork(cells, tfs=["GENE1", "GENE2", "GENE9", "not there"], device="cpu", seed=0)
    network.train(7, n_averaged=3, seed=0, **TRAIN)
    return network


KNOWN = pd.DataFrame({"source": ["GENE1", "GENE1", "GENE2"], "target": ["GENE3", "GENE4", "GENE1"]})


def states_by_hand(backbone, adata):
    """States ``(genes, cells, dim)``, one cell at a time."""
    out = np.zeros((adata.n_vars, adata.n_obs, backbone.gene_state_dim), dtype=np.float32)
    for cell in range(adata.n_obs):
        tokens = backbone.tokenize(adata.layers["counts"][cell], adata.var_names.to_numpy())
        for part in backbone.iter_gene_states(tokens, list(adata.var_names[:N_KNOWN])):
            names = backbone.vocab.names[part.genes.numpy()]
            out[adata.var_names.get_indexer(names), cell] = part.values.numpy()
    return out


def test_starts_are_what_they_say(backbone, counts):
    states = states_by_hand(backbone, counts)
    unknown = counts.var_names[N_KNOWN:]
    expected = {
        "paper": cosine_adjacency(states.mean(-1)),
        "code": similarity_adjacency(states, uniform_if_empty=True).astype(np.float32),
        "static": cosine_adjacency(
            np.vstack(
                [
                    backbone.gene_embeddings().numpy()[backbone.vocab.get_ids(counts.var_names[:N_KNOWN])],
                    np.zeros((3, backbone.gene_embeddings().shape[1])),
                ]
            )
        ),
    }
    for init, adjacency in expected.items():
        start = RegulatoryNetwork(counts, model=backbone, init=init, scale=1.0, device="cpu").get_adjacency()
        np.testing.assert_allclose(start, adjacency, atol=2e-5, err_msg=init)
        off = ~np.eye(counts.n_vars, dtype=bool)[N_KNOWN:]
        np.testing.assert_allclose(start.loc[unknown].to_numpy()[off], 1 / 14, rtol=1e-5)
    contextual = RegulatoryNetwork(counts, model=backbone, init="contextual", scale=1.0, device="cpu").get_adjacency()
    assert not np.allclose(contextual, expected["static"], atol=1e-3)
    assert (contextual.loc[unknown].to_numpy()[off] == np.float32(1 / 14)).all()


def test_states_of_mean_zero_say_nothing(counts):
    cls = scfm.backbones.backbone_class("scgpt")
    vocab = GeneVocab([*cls.specials, *counts.var_names], specials=cls.specials)
    fresh = from_config("scgpt", cls.config_for(dict(TINY["scgpt"]), vocab), vocab, device="cpu", precision="float32")
    start = RegulatoryNetwork(counts, model=fresh, init="paper", scale=1.0, device="cpu").get_adjacency().to_numpy()
    assert (start[~np.eye(15, dtype=bool)] == np.float32(1 / 14)).all()


def test_states_that_do_not_fit_into_memory_give_the_same(backbone, counts, monkeypatch):
    whole = RegulatoryNetwork(counts, model=backbone, init="code", device="cpu").get_adjacency()
    monkeypatch.setattr(_network_start, "_IN_MEMORY_BYTES", 0)
    again = RegulatoryNetwork(counts, model=backbone, init="code", device="cpu").get_adjacency()
    pd.testing.assert_frame_equal(whole, again)


def test_training_after_a_model(backbone, counts):
    network = RegulatoryNetwork(counts, model=backbone, device="cpu")
    before = network.get_adjacency()
    network.train(3, **TRAIN)
    assert np.isfinite(network.get_adjacency()).all(axis=None)
    assert not before.equals(network.get_adjacency())
    assert f"paper of {backbone.provenance.id}" in network.summary_string


@pytest.mark.parametrize(("inverse", "name"), [("exact", "inverse"), ("cholesky", "cholesky_inverse")])
def test_golden(golden, make_data, inverse, name):
    case = golden("sclong", "grn_deepsem")
    config, adata = case.case["config"], make_data(10, n_genes=case.case["config"]["n_gene"])
    RegulatoryNetwork.setup_anndata(adata)
    network = RegulatoryNetwork(
        adata, adjacency=case.input["adj_A"], inverse=inverse, scale=1.0, hidden=config["n_hidden"], device="cpu"
    )
    off = ~np.eye(config["n_gene"], dtype=bool)
    np.testing.assert_allclose(network.get_adjacency().to_numpy()[off], case.input["adj_A"][off], rtol=1e-6)
    network.module.load_published(torch.load(case.path / "checkpoint" / "vae_ead.pt", weights_only=True))
    x, mask, noise = (torch.from_numpy(case.input[key]) for key in ("x", "mask", "noise"))
    loss = network.module.loss(x, mask, noise, alpha=config["alpha"], beta=config["beta"])
    np.testing.assert_allclose(loss.total.item(), case.expected[f"{name}/total"], **case.case["tolerance"])


@pytest.mark.parametrize("init", ["code", "correlation", "random"])
def test_starts_leave_an_inverse(counts, adata, init):
    cls = scfm.backbones.backbone_class("scgpt")
    vocab = GeneVocab([*cls.specials, *counts.var_names], specials=cls.specials)
    model = from_config("scgpt", cls.config_for(dict(TINY["scgpt"]), vocab), vocab, device="cpu", precision="float32")
    options = {"model": model} if init == "code" else {}
    plain, exact = (
        RegulatoryNetwork(counts, init=init, inverse=name, device="cpu", **options).get_adjacency()
        for name in ("cholesky", "exact")
    )
    assert np.abs(np.linalg.eigvals(exact)).max() <= 0.9 + 1e-5
    ratio = exact.to_numpy()[plain != 0] / plain.to_numpy()[plain != 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert ratio[0] < 1


def test_edges_are_those_of_the_adjacency(network, adata):
    adjacency, edges = network.get_adjacency(), network.get_edges()
    assert list(adjacency.index) == list(adjacency.columns) == list(adata.var_names)
    assert set(edges["source"]) == {"GENE1", "GENE2", "GENE9"}
    assert len(edges) == 3 * 14
    for source, target, weight in edges.head(5).itertuples(index=False):
        assert adjacency.loc[target, source] == pytest.approx(weight)
    assert edges["weight"].abs().is_monotonic_decreasing
    assert len(network.get_edges(top_n=4)) == 4
    assert set(network.get_edges(tfs=["GENE5"])["source"]) == {"GENE5"}


def test_edges_are_averaged_over_the_last_epochs(network):
    kept = network._kept.numpy()
    assert kept.shape == (3, 15, 15)
    np.testing.assert_allclose(network.get_adjacency(), kept.mean(0), rtol=1e-5, atol=1e-8)
    assert not np.array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[-1], network.module.network.detach())


def test_scores(network):
    assert network.score(KNOWN) == network_scores(KNOWN, network.get_edges())
    more = pd.concat([KNOWN, pd.DataFrame({"source": KNOWN["source"].iloc[0], "target": ["not measured", "nor this"]})])
    assert network.score(more) == network.score(KNOWN)
    assert network.score(more, unmeasured="count") == network_scores(more, network.get_edges())
    assert network.score(more, unmeasured="count")["EPR"] != network.score(KNOWN)["EPR"]
    each = network.score(KNOWN, average="scores")
    assert set(each) == set(network.score(KNOWN))
    assert 0 < each["AUPR"] <= 1


def test_history_goes_on(adata):
    network = RegulatoryNetwork(adata, device="cpu", seed=0)
    network.train(3, **TRAIN)
    network.train(2, **TRAIN)
    assert list(network.history["train_loss_epoch"].index) == list(range(5))
    assert {"reconstruction_train", "gaussian_train", "sparsity_train"} <= set(network.history)
    assert network.is_trained


def test_the_same_seed_gives_the_same_network(adata):
    results = []
    for seed in (0, 0, 1):
        network = RegulatoryNetwork(adata, device="cpu", seed=seed)
        network.train(3, seed=seed, **TRAIN)
        results.append(network.get_adjacency())
    pd.testing.assert_frame_equal(*results[:2])
    assert not results[0].equals(results[2])


def test_save_and_load(network, adata, tmp_path):
    network.save(tmp_path / "network")
    assert {file.suffix for file in (tmp_path / "network").iterdir()} == {".json", ".safetensors"}
    for data in (adata, False):
        again = RegulatoryNetwork.load(tmp_path / "network", data, accelerator="cpu")
        pd.testing.assert_frame_equal(again.get_edges(), network.get_edges())
        pd.testing.assert_frame_equal(again.history["train_loss_epoch"], network.history["train_loss_epoch"])
        assert again.score(KNOWN, average="scores") == network.score(KNOWN, average="scores")
        assert again.summary_string == network.summary_string
    with pytest.raises(ValueError, match="adata="):
        again.train(1)
    again = RegulatoryNetwork.load(tmp_path / "network", adata, accelerator="cpu")
    again.train(2, seed=3, **TRAIN)
    network_again = RegulatoryNetwork.load(tmp_path / "network", adata, accelerator="cpu")
    network_again.train(2, seed=3, **TRAIN)
    pd.testing.assert_frame_equal(again.get_adjacency(), network_again.get_adjacency())


def test_save_with_data_and_over_something_else(network, tmp_path):
    network.save(tmp_path / "network", save_anndata=True)
    assert RegulatoryNetwork.load(tmp_path / "network", accelerator="cpu").adata.n_vars == 15
    with pytest.raises(FileExistsError):
        network.save(tmp_path / "network")
    network.save(tmp_path / "network", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        network.save(tmp_path / "other", overwrite=True)


def test_what_is_loaded_has_to_fit(network, adata, tmp_path):
    network.save(tmp_path / "network")
    other = adata[:, ::-1].copy()
    other.uns.clear()  # scvi-tools takes a copy for the original
    with pytest.raises(ValueError, match="other genes"):
        RegulatoryNetwork.load(tmp_path / "network", other, accelerator="cpu")
    file = tmp_path / "network" / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        RegulatoryNetwork.load(tmp_path / "network", False)
    with pytest.raises(ValueError, match="different class"):
        scfm.models.CellTypeClassifier.load(tmp_path / "network", False)


def test_starts_from_a_table(adata):
    values = np.random.default_rng(0).normal(0, 0.01, (15, 15))
    table = pd.DataFrame(values, index=adata.var_names, columns=adata.var_names)
    one = RegulatoryNetwork(adata, adjacency=values, device="cpu").get_adjacency()
    other = RegulatoryNetwork(adata, adjacency=table.iloc[::-1, ::-1], device="cpu").get_adjacency()
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "other"}, ValueError, "'contextual'"),
        ({"init": "paper"}, ValueError, "needs model="),
        ({"init": "random", "model": "scgpt-mini"}, ValueError, "leave model= out"),
        ({"adjacency": np.zeros((15, 15)), "init": "random"}, ValueError, "leave init="),
        ({"adjacency": np.zeros((3, 3))}, ValueError, r"\(3, 3\)"),
        (
            {"adjacency": pd.DataFrame(np.zeros((2, 2)), index=["GENE0", "x"], columns=["GENE0", "x"])},
            ValueError,
            "GENE1",
        ),
        ({"inverse": "other"}, ValueError, "'cholesky'"),
        ({"tfs": ["gene1"]}, ValueError, "names have to be the same"),
        ({"tfs": "GENE1"}, TypeError, "list of names"),
    ],
)
def test_wrong_arguments(adata, options, error, message):
    with pytest.raises(error, match=message):
        RegulatoryNetwork(adata, device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"alpha": -1}, "alpha"),
        ({"lr": 0}, "rates"),
    ],
)
def test_wrong_training(adata, options, message):
    with pytest.raises(ValueError, match=message):
        RegulatoryNetwork(adata, device="cpu").train(**options)


def test_wrong_data(make_data, network):
    adata = make_data(10, n_genes=4)
    with pytest.raises(KeyError, match="no layer 'counts'"):
        RegulatoryNetwork.setup_anndata(adata, counts_layer="counts")
    with pytest.raises(KeyError, match="no layer 'log'"):
        RegulatoryNetwork.setup_anndata(adata, layer="log")
    adata.var_names = ["a", "b", "b", "c"]
    RegulatoryNetwork.setup_anndata(adata)
    with pytest.raises(ValueError, match="not unique"):
        RegulatoryNetwork(adata)
    adata.var_names = list("abcd")
    adata.X.data[0] = np.nan
    with pytest.raises(ValueError, match="NaN|missing"):
        RegulatoryNetwork.setup_anndata(adata)
    with pytest.raises(ValueError, match="upper and lower case"):
        network.score(pd.DataFrame({"source": ["Gene1"], "target": ["Gene2"]}))
    with pytest.raises(ValueError, match="lacks the column"):
        network.score(pd.DataFrame({"tf": ["GENE1"]}))


def test_unknown_genes_and_counts_that_are_none(adata, make_data):
    other = make_data(10, n_genes=4)
    other.var_names = list("abcd")
    RegulatoryNetwork.setup_anndata(other)
    with pytest.raises(ValueError, match="scgpt-mini"):
        RegulatoryNetwork(other, model="scgpt-mini", init="static", device="cpu")
