"""Integration: the fine-tuning steps of the authors' code, and the extension for all other models."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from tiny import TINY

import scfm
from scfm.backbones import TokenBatch, backbone_class, backbone_kinds, from_config
from scfm.backbones.cellfm.keys import KEY_TABLE
from scfm.backbones.cellfm.objective import Draws
from scfm.genes import GeneVocab
from scfm.models._task import trained_weights
from scfm.tasks.integration import BatchClassifier, IntegrationLearner
from scfm.train import Optimization, build_optimizer
from scfm.train._plan import MicroBatch
from scfm.train._task_plan import TaskPlan

N_GENES = 30
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def without_dropout(learner):
    for part in learner.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


def make(kind, seed=1):
    cls = backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *GENES], specials=cls.specials)
    return from_config(kind, cls.config_for(dict(TINY[kind]), vocab), vocab, seed=seed, device="cpu")


@pytest.fixture(scope="module", params=backbone_kinds())
def backbone(request):
    return make(request.param)


def counts_of(seed, n_cells=7):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.poisson(1.5, (n_cells, N_GENES)) + np.eye(n_cells, N_GENES)).astype(np.float32))


def tokens_of(learner, counts, n_batches=2, seed=0):
    match = learner.backbone.vocab.match(GENES)
    tokens = learner.tokens(counts, match, torch.Generator().manual_seed(seed))
    labels = torch.arange(len(tokens)) % n_batches
    return replace(tokens, per_cell={**tokens.per_cell, "batch": labels})


# -- the step of scGPT ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scgpt_step(golden):
    """Learner, tokens of the integration step of scGPT and the golden case."""
    data = golden("scgpt", "finetune_integration")
    config = data.case["config"]
    names = [f"gene{i}" for i in range(config["ntoken"])]
    names[config["pad_id"]], names[config["cls_id"]], names[config["cls_id"] + 1] = "<pad>", "<cls>", "<eoc>"
    backbone = scfm.load(data.path / "checkpoint" / "model.pt", args=config, vocab=names, device="cpu")
    tokens = backbone.batch(data.input["genes"], data.input["target"], batch_labels=data.input["batch_labels"])
    mask = torch.as_tensor(data.input["values"] == config["mask_value"])[~tokens.padding]
    learner = IntegrationLearner(backbone, config["num_batch_labels"], options={"mask": mask}, continued=True)
    assert learner.objective == "paper"
    assert learner.backbone is backbone, "the file has all that the objective needs"
    return data, learner, tokens


def test_the_step_of_scgpt(scgpt_step):
    data, learner, tokens = scgpt_step
    expected, module = data.expected, learner.backbone.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    recipe = learner.recipe
    optimization = replace(Optimization.from_dict(recipe.optimization), eps=1e-4)  # as upstream with half precision
    plan = TaskPlan(learner, optimization, genes=None, steps_per_epoch=10)
    with trained_weights(learner, None):
        without_dropout(learner)
        loss = plan.loss(MicroBatch(0, tokens))
        names = {
            "gep": "gep",
            "gep_zero": "nzlp",
            "gepc": "gepc",
            "gepc_zero": "gepc_nzlp",
            "ecs": "ecs10",
            "dar": "dab",
        }
        for ours, theirs in names.items():
            close(getattr(loss, ours), expected[f"loss_{theirs}"], rtol=1e-5, err_msg=ours)
        close(loss.total, expected["loss"], rtol=1e-5)
        loss.total.backward()
        ours = {name.removeprefix("network."): p.grad for name, p in learner.named_parameters() if p.grad is not None}
        renamed = learner.backbone.load_report.renamed
        theirs = {
            renamed.get(name, name): norm
            for name, norm in zip(expected["grad_names"], expected["grad_norms"], strict=True)
        }
        assert ours.keys() == theirs.keys()
        for name, norm in theirs.items():
            assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
        total = torch.stack([gradient.norm() for gradient in ours.values()]).norm()
        assert total.item() == pytest.approx(expected["total_grad_norm"].item(), rel=1e-3)
        optimizer = build_optimizer(learner.named_parameters(), optimization)
        plan.configure_gradient_clipping(optimizer)
        clipped = {name: gradient.clone() for name, gradient in ours.items()}
        optimizer.step()
    after = module.state_dict()
    for name, gradient in clipped.items():
        close(after[name], before[name] - 1e-4 * gradient / (gradient.abs() + 1e-4), atol=1e-7, rtol=1e-5)
    domain = data.case["config"]["domain"]
    for name, old in before.items():
        if "running" in name:
            moved = not torch.equal(after[name], old)
            assert moved == name.startswith(f"domain_norms.{domain}."), name


def test_the_embedding_of_scgpt(scgpt_step):
    data, learner, _ = scgpt_step
    labels = data.input["eval_batch_labels"]
    first_of_chunk = labels[np.arange(len(labels)) // 4 * 4]  # upstream normalises chunks like their first cell
    arrays = data.input["genes"], data.input["target"]
    upstream = learner.backbone.batch(*arrays, batch_labels=labels, domain_labels=first_of_chunk)
    close(learner.backbone.embed(upstream), data.expected["eval__X_scGPT_bs4"], atol=3e-4)
    own = learner.backbone.embed(learner.backbone.batch(*arrays, batch_labels=labels))
    same = labels == first_of_chunk
    assert not same.all()
    close(own[same], data.expected["eval__X_scGPT_bs4"][same], atol=3e-4)
    np.testing.assert_allclose(own.norm(dim=1), 1, atol=1e-5)


# -- the step of CellFM --------------------------------------------------------------------------------------------------


def cellfm_tokens(data, backbone):
    """Counts behind the arrays of the golden case, and everything random about it."""
    given = data.input
    genes, length = given["gene"], given["gene"].shape[1]
    expressed = given["zero_idx"][:, -length:] > 0
    n_expressed, totals = expressed.sum(1), np.expm1(given["ST_feat"].astype(np.float64)) * 1000

    def ragged(there, values, **parts):
        offsets = torch.from_numpy(np.concatenate([[0], there.sum(1).cumsum()]))
        return TokenBatch(torch.from_numpy(genes[there].astype(np.int64)), values, offsets, 0, 0.0, **parts)

    total = torch.from_numpy(totals[:, 1])
    tokens = ragged(expressed, torch.from_numpy(given["raw_value"][expressed]), per_cell={"total": total})
    thinned = totals[:, 0] != totals[:, 1]
    shown = np.rint(np.expm1(given["input_value"][..., 1].astype(np.float64)) * totals[:, :1] / 1e4)
    hidden = given["input_value"][..., 0] == 0
    raw = np.rint(np.expm1(given["raw_value"].astype(np.float64)) * totals[:, 1:] / 1e4)
    counts = np.where(thinned[:, None], np.where(hidden, 0, shown), raw)
    for cell in np.flatnonzero(thinned):  # hidden genes have what is missing from the total
        unseen = np.flatnonzero(hidden[cell] & expressed[cell])
        counts[cell, unseen] = 1
        counts[cell, unseen[-1]] += totals[cell, 0].round() - counts[cell, expressed[cell]].sum()
    is_padded = data.case["config"]["pad_zero"]
    taken = expressed if is_padded else np.ones_like(expressed)
    zeros = None
    if not is_padded:
        zeros = ragged(~expressed, torch.zeros(int((~expressed).sum())))
    draws = Draws(
        torch.from_numpy(hidden[taken]),
        torch.from_numpy((given["mask_gene"] > 0)[taken]),
        torch.from_numpy(counts[expressed]),
        torch.from_numpy(thinned),
        zeros,
    )
    assert n_expressed.tolist() == data.case["lengths"]
    assert thinned.any()
    assert not thinned.all()
    return tokens, draws


@pytest.mark.parametrize("case", ["ms_integration_padzero", "ms_integration_zero_sampling"])
def test_the_step_of_cellfm(golden, case):
    data = golden("cellfm", case)
    config, tolerance = data.case["config"], data.case["tolerance"]
    backbone = scfm.load(
        data.path / "checkpoint",
        genes=[f"G{i}" for i in range(1, config["n_genes"] + 1)],
        n_heads=config["enc_num_heads"],
        device="cpu",
    )
    tokens, draws = cellfm_tokens(data, backbone)
    options = {"draws": draws, "zeros_over": "all", "similarity": config["ecs_threshold"] if config["ecs"] else None}
    learner = IntegrationLearner(backbone, 2, options=options)
    assert learner.backbone.config.has_zero_heads

    def check(actual, name):
        expected = data.expected[name]
        close(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=name)

    with trained_weights(learner, None):
        without_dropout(learner)
        loss = learner.loss(tokens)
        check(loss.genes, "loss_mse_gene")
        check(loss.cells, "loss_mse_cell")
        assert (loss.zeros_genes is not None) == config["effective_add_zero"]
        if config["effective_add_zero"]:
            check(loss.zeros_genes, "loss_bce_gene")
            check(loss.zeros_cells, "loss_bce_cell")
        check(loss.total, "train/loss")
        loss.total.backward()
        gradients = {n.removeprefix("network."): p.grad for n, p in learner.named_parameters() if p.grad is not None}
        norms = {k.removeprefix("train/gradnorm/"): float(v) for k, v in data.expected.items() if "/gradnorm/" in k}
        assert len(norms) > 30
        for key, expected in norms.items():
            rule, match = next((r, m) for r in KEY_TABLE if (m := re.fullmatch(r.pattern, key)))
            gradient = gradients.get(match.expand(rule.target))
            if gradient is not None and rule.part is not None:
                gradient = gradient.chunk(rule.part[1])[rule.part[0]]
            got = 0.0 if gradient is None else float(gradient.norm())
            bound = tolerance["grad_rtol"] * max(norms.values()) * 1e-2
            assert got == pytest.approx(expected, rel=tolerance["grad_rtol"], abs=bound), key
    close(
        learner.backbone.embed(tokens),
        data.expected["backbone_cell_emb"],
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


# -- what a learner makes of a model -------------------------------------------------------------------------------------


def test_the_recipes_of_the_papers():
    scgpt = IntegrationLearner(make("scgpt"), 3)
    recipe, config = scgpt.recipe, scgpt.backbone.config
    assert (recipe.batch_size, recipe.max_epochs, recipe.n_top_genes, recipe.by_batch) == (64, 15, 1200, True)
    assert (recipe.keep, recipe.monitor) == ("best", "gep")
    optimization = Optimization.from_dict(recipe.optimization)
    assert (optimization.optimizer, optimization.learning_rate, optimization.gamma) == ("adam", 1e-4, 0.9)
    assert (config.n_batches, config.input_norm, config.use_batch_labels) == (3, "dsbn", True)
    assert config.explicit_zeros
    assert config.discriminator
    counts = counts_of(0)
    tokens = tokens_of(scgpt, counts)
    assert tokens.is_rectangular, "zeros are tokens, too"
    assert tokens.max_length == N_GENES + 1
    assert (tokens.flat_values[tokens.offsets[:-1]] == 0).all()

    cellfm = IntegrationLearner(make("cellfm"), 3)
    recipe = cellfm.recipe
    assert (recipe.batch_size, recipe.max_epochs, recipe.keep, recipe.n_top_genes) == (4, 30, "last", None)
    optimization = Optimization.from_dict(recipe.optimization)
    assert (optimization.learning_rate, optimization.weight_decay) == (1e-4, 1e-5)
    assert (optimization.clip, optimization.clip_value) == ("value", 2.0)
    assert cellfm.options == {"mask_ratio": 0.5, "zero_length": 2048, "similarity": 0.8}
    loss = cellfm.loss(tokens_of(cellfm, counts), torch.Generator().manual_seed(0))
    assert loss.zeros_genes is not None
    assert loss.similarity is not None


def test_parts_that_a_task_needs_are_made_and_are_trained_beside_adapters(backbone):
    learner = IntegrationLearner(backbone, 3)
    trained = {name for name, _ in learner.named_parameters() if learner.is_head(name)}
    assert trained
    if not backbone.integrates:
        assert learner.backbone is backbone
        assert all(name.startswith("head.") for name in trained)
        return
    fresh = {f"network.{name}" for name in learner.backbone.load_report.fresh}
    parameters = {name for name, _ in learner.named_parameters()}
    assert fresh & parameters <= trained
    assert not any(".layers." in name for name in trained)
    kept = learner.backbone.module.state_dict()
    for name, tensor in backbone.module.state_dict().items():
        if name in learner.backbone.load_report.loaded:
            assert torch.equal(tensor, kept[name]), name


def test_batches_of_other_data_are_forgotten_and_own_ones_are_kept():
    first = IntegrationLearner(make("scgpt"), 3, seed=1)
    for i, norm in enumerate(first.backbone.module.domain_norms):
        norm.running_mean.fill_(i + 1.0)
        norm.running_var.fill_(i + 2.0)
    before = first.backbone.module.state_dict()
    again = IntegrationLearner(first.backbone, 3, seed=2).backbone.module.state_dict()
    more = IntegrationLearner(first.backbone, 5, seed=2, continued=True, parts=first.parts)
    after = more.backbone.module.state_dict()
    assert more.parts == first.parts
    for name, tensor in before.items():
        if name.startswith(("domain_norms.", "batches.embedding", "discriminator.out")) and "num_batches" not in name:
            assert torch.equal(after[name][: len(tensor)] if "domain" not in name else after[name], tensor), name
            assert not torch.equal(again[name], tensor), name
        elif not name.startswith(first.backbone.batch_modules):
            assert torch.equal(again[name], tensor), name
            assert torch.equal(after[name], tensor), name
    assert len(after["batches.embedding.weight"]) == len(after["discriminator.out.bias"]) == 5
    assert (after["domain_norms.4.running_var"] == 1).all()


def test_what_is_not_possible_is_said(backbone, monkeypatch):
    with pytest.raises(ValueError, match="paper, adversarial"):
        IntegrationLearner(backbone, 2, "harmony")
    if not backbone.integrates:
        with pytest.raises(ValueError, match="objective='adversarial'"):
            IntegrationLearner(backbone, 2, "paper")
        with pytest.raises(scfm.UnsupportedError, match="those of cellfm, scgpt do"):
            backbone.integration_loss(backbone.tokenize(counts_of(0), GENES))
        with pytest.raises(scfm.UnsupportedError, match="no fine-tuning for integration"):
            backbone.integration_config(2)
    monkeypatch.setattr(type(backbone), "capabilities", frozenset({"embeds"}))
    with pytest.raises(scfm.UnsupportedError, match="Models that can"):
        IntegrationLearner(backbone, 2, "adversarial")
    monkeypatch.setattr(type(backbone), "capabilities", frozenset({"pretrains"}))
    with pytest.raises(scfm.UnsupportedError, match="cell embeddings"):
        IntegrationLearner(backbone, 2)


# -- the extension for all models ----------------------------------------------------------------------------------------


def test_the_loss_of_the_extension(backbone):
    learner = IntegrationLearner(backbone, 2, "adversarial")
    weighted = IntegrationLearner(backbone, 2, "adversarial", options={"adversary_weight": 3.0})
    tokens = tokens_of(learner, counts_of(1))
    with trained_weights(learner, None):
        without_dropout(learner)
        loss = learner.loss(tokens, torch.Generator().manual_seed(0))
        close(loss.total, (loss.pretraining + loss.confusion + loss.classifier).detach(), rtol=1e-6)
        assert 0 <= loss.accuracy <= 1
        for part, trains in (("pretraining", "network"), ("confusion", "network"), ("classifier", "head")):
            gradients = torch.autograd.grad(
                getattr(loss, part), list(learner.parameters()), retain_graph=True, allow_unused=True
            )
            reached = {
                name.partition(".")[0]
                for (name, _), gradient in zip(learner.named_parameters(), gradients, strict=True)
                if gradient is not None and gradient.abs().max() > 0
            }
            assert reached == {trains}, part
    with trained_weights(weighted, None):
        without_dropout(weighted)
        other = weighted.loss(tokens, torch.Generator().manual_seed(0))
    close(other.confusion, 3 * loss.confusion.detach(), rtol=1e-4)
    close(other.pretraining, loss.pretraining.detach(), rtol=1e-4)


def test_confusion_is_least_where_the_classifier_knows_no_more_than_the_sizes_of_batches():
    classifier = BatchClassifier(5, 2).double()
    classifier.seen.copy_(torch.tensor([30.0, 10.0]))
    cells, batches = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 2
    with torch.no_grad():
        assert classifier.eval()(cells, batches)[2] > 0
        classifier.out.weight.zero_()
        classifier.out.bias.copy_(torch.tensor([0.75, 0.25]).log() / 10)
        logits, cross_entropy, confusion = classifier(cells, batches)
    close(logits.softmax(1), np.tile([0.75, 0.25], (8, 1)), atol=1e-7)
    close(cross_entropy, -(np.log(0.75) + np.log(0.25)) / 2, atol=1e-6)
    close(confusion, 0, atol=1e-7)
    assert classifier.seen.tolist() == [30, 10]
    classifier.train()(cells[:3], batches[:3])
    assert classifier.seen.tolist() == [32, 11], "cells count in training only"


def test_embeddings_learn_to_tell_nothing_of_batches():
    """A linear encoder of cells in which batches are apart: they come together, and what else there is stays."""
    generator = torch.Generator().manual_seed(0)
    kinds, batches = torch.arange(80) % 2, torch.arange(80) // 40
    cells = torch.randn(80, 4, generator=generator)
    cells[:, 0] += 4.0 * kinds
    cells[:, 1] += 4.0 * batches
    encoder = torch.eye(4).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = BatchClassifier(4, 2).train()
    optimizer = torch.optim.Adam([encoder, *classifier.parameters()], lr=3e-3)

    def apart(of):
        z = (cells @ encoder).detach()
        return float((z[of == 1].mean(0) - z[of == 0].mean(0)).norm() / z.std(0).norm())

    before = apart(batches)
    for _ in range(600):
        z = cells @ encoder
        _, cross_entropy, confusion = classifier(z, batches)
        optimizer.zero_grad()
        (cross_entropy + confusion + (z[:, 0] - cells[:, 0]).square().mean()).backward()
        optimizer.step()
    assert apart(batches) < 0.3 * before
    assert apart(kinds) > before / 2


def test_the_adversary_sees_the_tokens_that_are_embedded():
    learner = IntegrationLearner(make("scfoundation"), 2)
    assert learner.tokenize == {"target": "t4.5"}
    counts = counts_of(2)
    tokens = tokens_of(learner, counts)
    shown = learner.backbone.tokenize(counts, GENES, target="t4.5")
    assert torch.equal(tokens.flat_values, shown.flat_values)
    assert not torch.equal(tokens.flat_values, tokens.training.flat_values), "the objective has T = S"


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), n_cells=st.integers(1, 9))
def test_choosing_cells_chooses_them_in_both_kinds_of_tokens(backbone, seed, n_cells):
    learner = IntegrationLearner(backbone, 2, "adversarial")
    counts = counts_of(seed, n_cells)
    tokens = tokens_of(learner, counts, seed=seed)
    order = np.random.default_rng(seed).permutation(n_cells)[: 1 + n_cells // 2]
    for chosen in (order, slice(0, len(order))):
        part = tokens.select(chosen)
        for whole, some in ((tokens, part), (tokens.training, part.training)):
            rows = np.arange(n_cells)[chosen]
            assert some.lengths.tolist() == whole.lengths[rows].tolist()
            for i, row in enumerate(rows):
                assert torch.equal(some.select([i]).flat_ids, whole.select([row]).flat_ids)
                assert torch.equal(some.select([i]).flat_values, whole.select([row]).flat_values)
        assert part.per_cell["batch"].tolist() == (np.arange(n_cells)[chosen] % 2).tolist()


def test_a_classifier_of_batches_takes_one_cell():
    classifier = BatchClassifier(5, 3).train()
    for n_cells in (1, 4):
        logits, cross_entropy, confusion = classifier(torch.randn(n_cells, 5), torch.arange(n_cells) % 3)
        assert logits.shape == (n_cells, 3)
        assert torch.isfinite(torch.stack([cross_entropy, confusion])).all()
