"""The table of gene function: what is in it, and that all methods see the same genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny import TINY

import scfm
from scfm.backbones import from_config
from scfm.genes import GeneVocab
from scfm.models import GeneClassifier

TRAIN = {"max_epochs": 2}


@pytest.fixture(scope="module")
def adata(make_data):
    return make_data(30, n_genes=36)


@pytest.fixture(scope="module")
def labels(adata):
    return pd.Series(np.where(np.arange(40) % 2, "a", "b"), index=[f"GENE{i}" for i in range(40)])


@pytest.fixture(scope="module")
def model(adata):
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *adata.var_names[:30]], specials=["<pad>", "<cls>", "<eoc>"])
    return from_config("scgpt", dict(TINY["scgpt"]), vocab, device="cpu", precision="float32", name="tiny")


@pytest.fixture(scope="module")
def table(adata, labels, model):
    return scfm.benchmark.gene_function(
        labels,
        model,
        adata=adata,
        states=("static", "contextual"),
        head="linear",
        n_folds=3,
        seeds=(0, 1),
        train=TRAIN,
        device="cpu",
    )


def test_every_method_fold_and_seed_is_there(table):
    assert (table["task"] == "gene function").all()
    assert set(table["held_out"]) == set("012")
    runs = table[table["metric"] == "AUROC"].groupby(["kind", "name", "method"]).size()
    assert runs.index.tolist() == [
        ("baseline", "co-expression (PMI + SVD)", ""),
        ("baseline", "expression statistics", ""),
        ("baseline", "random vectors", ""),
        ("control", "shuffled labels", ""),
        ("model", "tiny", "contextual"),
        ("model", "tiny", "static"),
        ("random weights", "tiny", "contextual"),
        ("random weights", "tiny", "static"),
    ]
    assert (runs == 6).all()


def test_numbers_are_those_of_the_class(table, labels, model):
    chosen = table[(table["kind"] == "model") & (table["method"] == "static") & (table["seed"] == 1)]
    alone = GeneClassifier(model, labels.head(30), head="linear", device="cpu", seed=1)
    assert len(alone.genes) == 30
    np.testing.assert_allclose(chosen["value"], alone.cross_validate(3, **TRAIN)["value"], rtol=1e-5)


def test_functions_without_cells(model):
    rng = np.random.default_rng(0)
    functions = pd.DataFrame(rng.integers(0, 2, (30, 2)), index=[f"GENE{i}" for i in range(30)], columns=["f", "g"])
    table = scfm.benchmark.gene_function(
        functions, model, random_weights=False, n_folds=2, seeds=(0,), train=TRAIN, device="cpu"
    )
    assert set(table["name"]) == {"tiny", "random vectors", "shuffled labels"}
    result = scfm.benchmark.summary(table, ["AUPR", "Fmax"])
    assert (result["runs"] == 2).all()


def test_wrong_input(labels, model, adata):
    for options, message in (
        ({"states": ("other",)}, "state 'other'"),
        ({"adata": adata, "baselines": ("other",)}, "baseline 'other'"),
        ({"states": ("contextual",)}, "adata="),
        ({"baselines": ("expression",)}, "adata="),
    ):
        with pytest.raises(ValueError, match=message):
            scfm.benchmark.gene_function(labels, model, **options)
    with pytest.raises(ValueError, match="too few for 5 folds"):
        scfm.benchmark.gene_function(labels.tail(12), model, device="cpu")
