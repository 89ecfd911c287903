"""Classifiers: the fine-tuning steps of the authors' code, class weights, heads of all kinds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY

import scfm
from scfm.backbones import backbone_kinds, from_config
from scfm.backbones.cellfm.objective import Corrupted
from scfm.checkpoints import mindspore
from scfm.genes import GeneVocab
from scfm.models._task import trained_weights
from scfm.tasks.classifier import ClassLearner, class_weights, plain_head
from scfm.train import Optimization, build_optimizer
from scfm.train._presets import clip_gradients
from scfm.train._task_plan import TaskPlan


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def labelled(tokens, labels):
    return replace(
        tokens, per_cell={**tokens.per_cell, "label": torch.as_tensor(np.asarray(labels), dtype=torch.int64)}
    )


# -- the authors' steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def scgpt_step(golden):
    """Learner and labelled tokens of the annotation step of scGPT."""
    data = golden("scgpt", "finetune_annotation")
    path = data.path / "checkpoint" / "model.pt"
    state = torch.load(path, weights_only=True)
    n_tokens, n_pad = state["encoder.embedding.weight"].shape[0], 3
    source = json.loads((data.path.parent / "embed_cells" / "checkpoint" / "vocab.json").read_text())
    vocab = GeneVocab(
        [name for name, _ in sorted(source.items(), key=lambda item: item[1])], specials=("<pad>", "<cls>", "<eoc>")
    )
    assert len(vocab) == n_tokens >= n_pad
    backbone = scfm.load(path, args=data.case["config"], vocab=vocab)
    learner = ClassLearner(backbone, data.case["config"]["n_cls"])
    return data, learner, labelled(backbone.batch(data.input["genes"], data.input["values"]), data.input["labels"])


def test_the_step_of_scgpt(scgpt_step):
    data, learner, tokens = scgpt_step
    assert learner.style == "cls"
    optimization = Optimization(optimizer="adam", learning_rate=1e-4, eps=1e-4, clip="norm", clip_value=1.0)
    module = learner.backbone.module
    with trained_weights(learner, None):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        logits = learner.logits(tokens)
        close(logits[0], data.expected["cls_output"], rtol=1e-4, atol=1e-5)
        loss = learner.loss(tokens)
        close(loss.total, data.expected["loss"], rtol=1e-4)
        right = data.expected["cls_output"].argmax(1) == data.input["labels"]
        assert float(loss.accuracy) == pytest.approx(right.mean())
        loss.total.backward()
        total = torch.stack([p.grad.norm() for p in learner.parameters() if p.grad is not None]).norm()
        close(total, data.expected["total_grad_norm"], rtol=1e-4)
        optimizer = build_optimizer(learner.named_parameters(), optimization)
        clip_gradients(learner, optimization)
        optimizer.step()
    after = {
        "cls_decoder.out_layer.weight": module.classifier.out.weight,
        "cls_decoder.out_layer.bias": module.classifier.out.bias,
        "encoder.enc_norm.weight": module.genes.norm.weight,
    }
    for name, value in after.items():
        close(value, data.expected[f"after_step__{name}"], rtol=1e-4, atol=1e-6)


@pytest.fixture
def scfoundation_step(golden, shared):
    """``scfoundation_step(head)``: learner with the authors' head, and labelled tokens."""
    from scipy import sparse

    data = golden("scfoundation", "finetune_linear_probe")
    genes = shared("data", "vocab", "scfoundation", "OS_scRNA_gene_index.19264.tsv")
    backbone = scfm.load(data.path / "checkpoint", weights="gene", genes=genes)

    def make(head):
        learner = ClassLearner(backbone, 10, head)
        classifier = learner.backbone.module.classifier
        with torch.no_grad():
            for ours, theirs in ((classifier.hidden, "fc1.0"), (classifier.out, "fc1.2")):
                ours.weight.copy_(torch.from_numpy(data.input[f"head_{theirs}.weight"]))
                ours.bias.copy_(torch.from_numpy(data.input[f"head_{theirs}.bias"]))
        parts = (data.input[f"x_{part}"] for part in ("data", "indices", "indptr"))
        rows = sparse.csr_matrix(tuple(parts), shape=data.input["x_shape"]).toarray()
        return learner, labelled(learner.backbone.batch(rows), data.input["labels"])

    return data, make


def test_the_step_of_scfoundation(scfoundation_step):
    data, make = scfoundation_step
    learner, tokens = make("max-pool-padded")
    module, tolerance = learner.backbone.module, {"rtol": 1e-4, "atol": 2e-5}
    learner.set_weights(data.input["class_weights"])
    with trained_weights(learner, None):
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        upstream = dict(zip(data.expected["param_names"].tolist(), data.expected["requires_grad"], strict=True))
        layers = {
            int(name.split("transformer_encoder.")[1].split(".")[0])
            for name, on in upstream.items()
            if on and "transformer_encoder." in name
        }
        assert {int(name.split(".")[2]) for name in trained if name.startswith("encoder.layers.")} == layers
        assert {name.split(".")[0] for name in trained} == {"encoder", "classifier"}
        for part in module.encoder.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        logits = learner.logits(tokens)[0]
        close(logits, data.expected["logits_train"], **tolerance)
        loss = torch.nn.functional.cross_entropy(logits, tokens.per_cell["label"])
        close(loss, data.expected["ce"], rtol=1e-4)
        norm = module.classifier.norm
        close(norm.running_mean, data.expected["running_mean"], **tolerance)
        close(norm.running_var, data.expected["running_var"], **tolerance)
        norm.reset_running_stats()
        weighted = learner.loss(tokens).total
        close(weighted, data.expected["weighted_ce"], rtol=1e-4)
        weighted.backward()
        layer = module.encoder.layers[layers.pop()]
        close(layer.qkv.weight.grad, data.expected["grad_trainable_layer_in_proj"], rtol=1e-3, atol=1e-6)
        close(module.classifier.hidden.weight.grad, data.expected["grad_fc1.0.weight"], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        close(learner.logits(tokens)[0], data.expected["logits_eval_after_1_step"], **tolerance)


def test_scfoundation_without_padding_in_the_maximum(scfoundation_step):
    data, make = scfoundation_step
    from scfm.backbones.scfoundation.classifier import pooled

    learner, tokens = make("max-pool")
    with torch.no_grad():
        close(pooled(learner.backbone.module, tokens), data.expected["pooled_single"], rtol=1e-4, atol=2e-5)
        alone = torch.cat([learner.logits(tokens.select([i]))[0] for i in range(len(tokens))])
        close(alone, learner.logits(tokens)[0], rtol=1e-4, atol=1e-5)


def test_the_step_of_cellfm(golden, shared):
    data = golden("cellfm", "ms_annotation_80m_vocab")
    genes = shared("data", "vocab", "cellfm", "expand_gene_info.csv")
    backbone = scfm.load(data.path / "checkpoint", weights="finetuned.ckpt", genes=genes, n_heads=2)
    learner = ClassLearner(backbone, data.case["config"]["num_cls"])
    assert learner.style == "retention"
    assert learner.backbone is backbone, "the head of a fine-tuned file is kept"
    cells = np.array(data.case["cells_with_loss"])
    tolerance = {name: data.case["tolerance"][name] for name in ("rtol", "atol")}
    tokens = backbone.batch(data.expected["tok_gene"], data.expected["tok_value"])
    with torch.inference_mode():
        logits = learner.logits(tokens)
    for ours, name in zip(logits, ("labelpred_genewise", "labelpred_cellwise"), strict=True):
        expected = data.expected[name][cells]
        # these fixtures have a tolerance relative to the largest number
        bound = tolerance["atol"] + tolerance["rtol"] * np.abs(expected).max()
        close(ours[cells], expected, rtol=0, atol=bound)
    tokens = labelled(tokens.select(cells), data.expected["label"][cells])
    loss = learner.loss(tokens)
    close(loss.total, data.expected["train/loss"], rtol=tolerance["rtol"])
    accuracy = data.case["metrics_over_cells_with_genes"]["accuracy"]
    assert float(loss.accuracy) == pytest.approx(accuracy)


def test_the_step_of_the_port_of_cellfm(golden, shared, tmp_path):
    data = golden("cellfm", "torchport_classification")
    given, expected, config = data.input, data.expected, data.case["config"]
    tolerance = {name: data.case["tolerance"][name] for name in ("rtol", "atol")}
    state = mindspore.read(data.path / "checkpoint" / "CellFM_80M_weight.ckpt")
    names = {k: k.replace(".gamma", ".weight").replace(".beta", ".bias") for k in state}
    head = torch.load(data.path / "checkpoint" / "cls_head.pt", weights_only=True)
    content = {f"extractor.net.{names[k]}": v for k, v in state.items()} | {f"cls.{k}": v for k, v in head.items()}
    torch.save(content, tmp_path / "model.pt")
    genes = shared("data", "vocab", "cellfm", config["vocabulary"])
    backbone = scfm.load(tmp_path, genes=genes, n_heads=config["enc_num_heads"], compat="torch-port")
    padding = given["zero_idx"] == 0
    tokens = backbone.batch(given["gene"], given["input_value"][..., 1], padding=padding, depths=given["ST_feat"])
    shown, target, in_loss = (
        torch.from_numpy(array[~padding])
        for array in (given["input_value"][..., 0], given["raw_value"], given["mask_gene"])
    )
    # the totals of the fixture do not belong to its values, so that counts cannot be told from it
    batch = Corrupted(tokens, shown == 0, in_loss > 0, target, None, tokens.per_cell["depths"])
    options = {"draws": batch, "similarity": config["ecs_threshold"], "padded_length": given["gene"].shape[1]}
    learner = ClassLearner(backbone, config["num_cls"], hide=options)
    assert learner.style == "mlp"
    assert learner.backbone is backbone
    with trained_weights(learner, False):
        for part in learner.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        loss = learner.loss(labelled(tokens, given["label"]))
        close(loss.classes, expected["train/loss_ce"], **tolerance)
        close(loss.hidden, expected["train/loss_mask"], **tolerance)
        close(loss.total, expected["train/loss_total"], **tolerance)
        loss.total.backward()
        rate = data.case["tolerance"]["grad_rtol"]
        # biases before a normalisation have no gradient but rounding
        least = 1e-2 * rate * max(float(value) for name, value in expected.items() if "/gradnorm/" in name)
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"):
            norm = float(backbone.module.head.get_parameter(name).grad.norm())
            assert norm == pytest.approx(float(expected[f"train/gradnorm/cls.{name}"]), rel=rate, abs=least), name


# -- parts ---------------------------------------------------------------------------------------------------------------


def test_class_weights():
    n_cells = np.array([1000, 100, 4, 0])
    assert class_weights(n_cells, None) is None
    balanced, capped = class_weights(n_cells, "balanced"), class_weights(n_cells, "capped")
    np.testing.assert_allclose(balanced, np.array([1, 10, 250, 0]) / 261)
    np.testing.assert_allclose(capped, np.array([1, 10, 50, 0]) / 61)
    with pytest.raises(ValueError, match="class_weights"):
        class_weights(n_cells, "other")


def make_learner(kind, head=None, n_classes=3):
    cls = scfm.backbones.backbone_class(kind)
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(30))], specials=cls.specials)
    backbone = from_config(kind, cls.config_for(dict(TINY[kind]), vocab), vocab, device="cpu")
    return ClassLearner(backbone, n_classes, head), [f"G{i}" for i in range(30)]


def counts(n_cells=8, seed=0):
    from scipy import sparse

    return sparse.csr_matrix(np.random.default_rng(seed).poisson(1.0, (n_cells, 30)).astype(np.float32))


@pytest.mark.parametrize("kind", backbone_kinds())
@pytest.mark.parametrize("head", [None, "linear", "mlp"])
def test_every_head_learns_a_mini_batch_by_heart(kind, head):
    learner, genes = make_learner(kind, head)
    tokens = learner.backbone.tokenize(counts(), genes, **learner.tokenize)
    tokens = labelled(tokens, [0, 1, 2, 0, 1, 2, -1, 0])
    with trained_weights(learner, False):
        for part in learner.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], 5e-3)
        first = float(learner.loss(tokens).total.detach())
        for _ in range(60):
            loss = learner.loss(tokens)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
    assert float(loss.total.detach()) < 0.5 * first
    probabilities = learner.probabilities(tokens)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))


@pytest.mark.parametrize("kind", backbone_kinds())
def test_cells_without_a_label_do_not_count(kind):
    learner, genes = make_learner(kind)
    learner.eval()
    tokens = learner.backbone.tokenize(counts(), genes, **learner.tokenize)
    some = labelled(tokens, [0, 1, 2, -1, -1, -1, -1, -1])
    only = some.select([0, 1, 2])
    torch.testing.assert_close(learner.loss(some).total, learner.loss(only).total, rtol=1e-4, atol=1e-6)
    none = learner.loss(labelled(tokens, [-1] * 8))
    assert float(none.total) == 0


def test_freezing_the_backbone_leaves_the_head():
    for kind in backbone_kinds():
        learner, _ = make_learner(kind)
        with trained_weights(learner, "backbone"):
            trained = {name for name, p in learner.named_parameters() if p.requires_grad}
        assert trained
        assert all(learner.is_head(name) for name in trained)
        assert not any(p.requires_grad for p in learner.parameters())


def test_one_cell_does_not_stop_batch_normalisation():
    head = plain_head("mlp", 4, 2).train()
    before = head[0].running_mean.clone()
    assert torch.isfinite(head(torch.randn(1, 4))).all()
    assert torch.equal(before, head[0].running_mean)
    head(torch.randn(5, 4))
    assert not torch.equal(before, head[0].running_mean)


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="choose one of"):
        make_learner("scgpt", "retention")
    with pytest.raises(ValueError, match="two classes"):
        make_learner("scgpt", n_classes=1)


def test_the_plan_makes_the_tokens_of_the_task():
    from scfm.train import MicroBatch

    learner, genes = make_learner("scfoundation")
    match = learner.backbone.vocab.match(genes)
    plan = TaskPlan(learner, Optimization(), genes=match)
    tokens = plan.tokens(MicroBatch(0, counts()))
    assert int(tokens.flat_ids.max()) < learner.backbone.config.n_genes, "the authors' classifier has no depth tokens"


@pytest.mark.parametrize("kind", ["scgpt", "cellfm"])
def test_heads_that_cannot_learn_along_with_hidden_genes_say_so(kind):
    learner, genes = make_learner(kind)
    tokens = learner.backbone.tokenize(counts(), genes, **learner.tokenize)
    with pytest.raises(scfm.UnsupportedError, match="cannot be learned in one pass with this head"):
        learner.backbone.class_logits_and_loss(tokens)
