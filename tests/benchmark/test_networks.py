"""The table of regulatory networks: what is in it, and that its numbers are right."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.baselines import correlation_network
from scfm.genes import GeneVocab
from scfm.metrics import network_scores
from scfm.models import RegulatoryNetwork


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data(30, n_genes=14)


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    source, target = np.nonzero(rng.random((4, 14)) < 0.4)
    return pd.DataFrame({"source": [f"GENE{i}" for i in source], "target": [f"GENE{i}" for i in target]})


@pytest.fixture(scope="module")
def model(adata):
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *adata.var_names[:10]], specials=["<pad>", "<cls>", "<eoc>"])
    return from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu", precision="float32", name="tiny")


@pytest.fixture(scope="module")
def table(adata, known, model):
    return scfm.benchmark.networks(
        adata,
        known,
        model,
        starts=("static", "code"),
        baselines=("pearson", "deepsem"),
        seeds=(0, 1),
        train={"max_epochs": 2, "accelerator": "cpu"},
        device="cpu",
    )


def scores(table, **chosen):
    for column, wanted in chosen.items():
        table = table[table[column] == wanted]
    return table.set_index("metric")["value"].to_dict()


def test_every_method_and_seed_is_there(table):
    assert (table["task"] == "networks").all()
    runs = table[table["metric"] == "EPR"].groupby(["kind", "name", "method"]).size().to_dict()
    assert runs == {
        ("baseline", "DeepSEM", ""): 2,
        ("baseline", "Pearson correlation", ""): 1,
        ("control", "known network", "shuffled"): 2,
        **{("control", "tiny", f"{start}, shuffled"): 2 for start in ("static", "code")},
        **{("model", "tiny", start): 1 for start in ("static", "code")},
        **{("model", "tiny", f"{start} + DeepSEM"): 2 for start in ("static", "code")},
        **{("random weights", "tiny", start): 2 for start in ("static", "code")},
        **{("random weights", "tiny", f"{start} + DeepSEM"): 2 for start in ("static", "code")},
    }


def test_numbers_are_those_of_the_functions(table, adata, known, model):
    expected = network_scores(known, correlation_network(adata, tfs=known["source"]))
    assert scores(table, name="Pearson correlation") == pytest.approx(expected)
    work = adata.copy()
    RegulatoryNetwork.setup_anndata(work)
    network = RegulatoryNetwork(work, model=model, init="code", device="cpu", seed=0)
    assert scores(table, kind="model", method="code") == pytest.approx(network.score(known))
    network.train(2, seed=0, accelerator="cpu")
    assert scores(table, kind="model", method="code + DeepSEM", seed=0) == pytest.approx(network.score(known), rel=1e-3)


def test_edges_outside_of_the_data_are_left_out(adata, known, model):
    more = pd.concat([known, known.head(2), pd.DataFrame({"source": ["GENE1"], "target": ["nobody"]})])
    options = {"refine": False, "random_weights": False, "baselines": ("spearman",), "seeds": (0,), "device": "cpu"}
    pd.testing.assert_frame_equal(
        scfm.benchmark.networks(adata, more, model, starts=("static",), **options),
        scfm.benchmark.networks(adata, known, model, starts=("static",), **options),
    )


def test_summary_and_plot(table):
    result = scfm.benchmark.summary(table, ["AUPR ratio", "EPR"])
    assert result["AUPR ratio"].is_monotonic_decreasing
    axes = scfm.pl.benchmark(table, ["AUPR ratio", "EPR"], show=False)
    assert len(axes) == 2
    assert len(axes[0].get_yticklabels()) == len(result)
    mpl.pyplot.close("all")


def test_wrong_input(adata, known):
    for options, message in (
        ({"starts": ("other",)}, "start 'other'"),
        ({"baselines": ("other",)}, "baseline 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            scfm.benchmark.networks(adata, known, "scgpt-mini", **options)
    with pytest.raises(ValueError, match="lacks the column source"):
        scfm.benchmark.networks(adata, known.rename(columns={"source": "tf"}))
    with pytest.raises(ValueError, match="upper and lower case"):
        scfm.benchmark.networks(adata, known.apply(lambda column: column.str.lower()))
