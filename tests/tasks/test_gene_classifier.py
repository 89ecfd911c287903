"""Heads of gene function: the CellFM reference, the folds, and the training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.checkpoints import mindspore
from scfm.metrics import gene_function_scores
from scfm.tasks.gene_classifier import GeneHead, HeadTraining, class_folds, gene_loss, random_folds, train_head

# layers of the authors' network for functions; the block that they never apply is left out
GO_LAYERS = {"input_block.0": 0, "input_block.1": 1, "output_block.0": 3, "output_block.3": 6, "output_block.6": 9}
BINARY_LAYERS = {"mlp.0": 0, "mlp.3": 3, "mlp.6": 6}


@pytest.fixture
def case(golden):
    return golden("cellfm", "gene_function_heads")


def close(case, value, name):
    expected, tolerance = case.expected[name], case.case["tolerance"]
    limit = tolerance["atol"] + tolerance["rtol"] * np.abs(expected).max()
    assert np.abs(np.asarray(value) - expected).max() <= limit, name


def published(head, state, layers):
    names = {name: name.rpartition(".") for name in state}
    head.load_state_dict(
        {f"layers.{layers[stem]}.{last}": state[name] for name, (stem, _, last) in names.items() if stem in layers}
    )
    return head.eval()


def test_golden_binary(case):
    state = mindspore.read(case.path / "checkpoint" / "binary_head.ckpt")
    head = published(GeneHead("binary", case.case["config"]["E"], 2), state, BINARY_LAYERS)
    vectors = torch.from_numpy(case.input["gene_table"][case.input["gene_id"]])
    with torch.no_grad():
        logits = head(vectors)
    close(case, logits, "binary_logits")
    close(case, gene_loss(logits, torch.from_numpy(case.input["label_binary"]).long()), "binary_loss")


def test_golden_functions(case):
    config = case.case["config"]
    state = torch.load(case.path / "checkpoint" / "go_head.pt", weights_only=True)
    labels = case.input["label_multi"]
    head = published(GeneHead("go", config["E"], labels.shape[1], hidden=config["hidden"]), state, GO_LAYERS)
    with torch.no_grad():
        logits = head(torch.from_numpy(case.input["gene_table"][case.input["gene_id"]]))
    close(case, logits, "go_logits")
    close(case, gene_loss(logits, torch.from_numpy(labels)), "go_bce")
    close(case, gene_loss(logits, torch.from_numpy(labels), as_published=True), "go_loss_as_written")
    scores = gene_function_scores(labels, logits.sigmoid().numpy())
    close(case, scores["AUPR"], "aupr_micro")
    close(case, scores["Fmax"], "fmax")


def test_published_loss_is_doubled_only_where_both_answers_occur():
    logits = torch.zeros(3, 2)
    for targets, factor in ((torch.ones(3, 2), 1), (torch.zeros(3, 2), 1), (torch.eye(3, 2), 2)):
        assert gene_loss(logits, targets, as_published=True) == factor * gene_loss(logits, targets)


def test_folds_by_hand():
    classes = np.array(["a"] * 13 + ["b"] * 6)
    folds = class_folds(classes)
    order = np.random.RandomState(0).permutation(13)
    # 13 / 5 is rounded to 3, so that the last fold has one gene only
    assert [sorted(np.flatnonzero(folds[:13] == k)) for k in range(5)] == [
        sorted(order[3 * k : 3 * k + 3]) for k in range(5)
    ]
    assert np.bincount(folds[13:]).tolist() == [1, 1, 1, 1, 2]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(5, 60), min_size=1, max_size=4), st.integers(0, 5), st.randoms())
def test_folds_hold_every_gene_once_and_do_not_mix_classes(sizes, seed, random):
    classes = np.repeat(np.arange(len(sizes)), sizes)
    folds = class_folds(classes, seed=seed)
    for number, size in enumerate(sizes):
        counts = np.bincount(folds[classes == number], minlength=5)
        assert counts.sum() == size
        assert (counts[:4] == round(size / 5)).all()
    # genes of the other classes in between change nothing
    order = list(range(len(classes)))
    random.shuffle(order)
    order = sorted(order, key=lambda gene: gene if classes[gene] == 0 else 0)
    stay = [gene for gene in order if classes[gene] == 0]
    np.testing.assert_array_equal(class_folds(classes[order], seed=seed)[classes[order] == 0], folds[stay])


def test_folds_without_classes():
    folds = random_folds(23, 4, seed=1)
    assert np.bincount(folds).tolist() == [6, 6, 6, 5]


def test_too_few_genes_for_folds():
    with pytest.raises(ValueError, match="class 'b' has 4 genes"):
        class_folds(np.array(["a"] * 9 + ["b"] * 4))
    with pytest.raises(ValueError, match="two folds"):
        class_folds(np.zeros(9), 1)


def data(n=80, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.normal(size=(n, dim))).float()
    return vectors, (vectors[:, 0] + vectors[:, 1] > 0).long()


@pytest.mark.parametrize("style", ["binary", "go", "linear"])
def test_heads_learn(style):
    vectors, classes = data(160)
    targets = classes if style != "go" else torch.stack([classes, 1 - classes], 1).float()
    head = GeneHead(style, 8, 2, hidden=16, seed=1)
    history = list(train_head(head, vectors[:120], targets[:120], HeadTraining(15, 8, lr=3e-3)))
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    head.eval()
    with torch.no_grad():
        predicted = head(vectors[120:])
    right = predicted.argmax(1) == classes[120:] if style != "go" else (predicted[:, 0] > 0) == classes[120:].bool()
    assert right.float().mean() > 0.75


def test_the_best_epoch_is_kept():
    vectors, classes = data(24)
    validation = vectors[16:], classes[16:]
    # far too high a rate, so that the loss of the genes that were held out rises again
    training = HeadTraining(40, 4, lr=0.1, seed=2)
    head = GeneHead("linear", 8, 2, seed=0)
    losses = [
        epoch["validation_loss"]
        for epoch in train_head(head, vectors[:16], classes[:16], training, validation=validation)
    ]
    assert np.argmin(losses) < len(losses) - 1
    with torch.no_grad():
        assert gene_loss(head.eval()(validation[0]), validation[1]).item() == pytest.approx(min(losses))


def test_last_genes_are_dropped_where_the_authors_drop_them():
    vectors, classes = data(10)
    batches = []
    head = GeneHead("linear", 8, 2)
    head.register_forward_hook(lambda _, given, __: batches.append(len(given[0])))
    list(train_head(head, vectors, classes, HeadTraining(1, 4, drop_last=True)))
    assert batches == [4, 4]
    batches.clear()
    list(train_head(head, vectors, classes, HeadTraining(1, 4)))
    assert batches == [4, 4, 2]
    batches.clear()
    list(train_head(head, vectors, classes, HeadTraining(1, 64, drop_last=True)))
    assert batches == [10], "a set smaller than one step is one step"


def test_the_same_seed_gives_the_same_head_whatever_the_global_state():
    vectors, classes = data()
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        head = GeneHead("binary", 8, 2, seed=3)
        list(train_head(head, vectors, classes, HeadTraining(3, 8)))
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(head.layers[0].weight.detach())
    assert torch.equal(*weights)


def test_wrong_heads():
    with pytest.raises(ValueError, match="'linear'"):
        GeneHead("tree", 8, 2)
    with pytest.raises(ValueError, match="head='linear'"):
        GeneHead("binary", 3, 2)
    too_large = torch.full((4, 2), 3e38)
    with pytest.raises(ValueError, match="lower lr="):
        list(train_head(GeneHead("linear", 2, 2), too_large, torch.tensor([0, 1, 0, 1]), HeadTraining(3, 2, lr=1.0)))
