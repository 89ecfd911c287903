"""Runs: they learn, go on after a stop, and do not depend on how they are computed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scfm
from scfm.backbones.sclong import GOGraph
from scfm.cli import main
from scfm.train import Recipe, frequent_genes, pretrain
from scfm.train._keeper import RunKeeper

from .conftest import SMALL


def weights(result) -> dict[str, torch.Tensor]:
    return result.backbone.module.state_dict()


def assert_same_run(one, other) -> None:
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(5)`` lets the next run break at the end of step 5; returns the error."""

    class StopError(Exception):
        pass

    def arrange(step: int):
        original = RunKeeper.on_train_batch_end

        def stopping(self, *args):
            original(self, *args)
            if self.state.step == step:
                monkeypatch.setattr(RunKeeper, "on_train_batch_end", original)
                raise StopError

        monkeypatch.setattr(RunKeeper, "on_train_batch_end", stopping)
        return StopError

    return arrange


# -- learning ------------------------------------------------------------------------------------------------------------


def test_loss_of_held_out_cells_falls_and_the_model_embeds(recipe, tmp_path):
    scgpt = SMALL["scgpt"]["config"] | {"dropout": 0.0}
    longer = recipe(max_steps=60, batch_size=16, log_every=10, validate_every=20, config=scgpt, objective={})
    result = pretrain(longer, out=tmp_path / "model")
    assert (result.n_cells, result.n_validation) == (128, 32)
    assert result.history.index.tolist() == [0, 10, 20, 30, 40, 50, 60]
    curve = result.history["validation_loss"].dropna()
    assert curve.index.tolist() == [0, 20, 40, 60]
    assert curve.iloc[-1] < 0.5 * curve.iloc[0]
    parts = result.history.drop(columns="validation_loss").iloc[1:]
    np.testing.assert_allclose(parts["loss"], parts.drop(columns="loss").sum(axis=1))
    assert len(result.backbone.vocab) == 35 + 3
    loaded = scfm.load(tmp_path / "model")
    adata = AnnData(sparse.csr_matrix(np.ones((3, 40), dtype=np.float32)))
    adata.var_names = [f"G{i}" for i in range(40)]
    scfm.tl.embed(adata, loaded)
    assert np.isfinite(adata.obsm["X_tiny"]).all()
    written = pd.read_csv(tmp_path / "model" / "history.csv", index_col="step")
    pd.testing.assert_frame_equal(written, result.history)
    assert Recipe.read(tmp_path / "model" / "recipe.yaml") == longer
    ax = scfm.pl.training_curve(result.history, show=False)
    assert [line.get_label() for line in ax.lines][:2] == ["loss", "validation loss"]


# -- annotations of genes -------------------------------------------------------------------------------------------------


@pytest.fixture
def annotations(tmp_path):
    """Terms of 20 genes, some of which no file has: five groups of genes with the same terms."""
    lines = [f"G{i}\tGO:{term:07d}" for i in range(0, 60, 3) for term in (i % 5, 10 + i % 5)]
    path = tmp_path / "go.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_graph_of_sclong_comes_from_annotations(recipe, annotations, tmp_path):
    result = pretrain(recipe("sclong", annotations=str(annotations)), out=tmp_path / "model")
    backbone, go = result.backbone, result.backbone.module.go
    expected = GOGraph.from_annotations(annotations, backbone.vocab)
    assert backbone.config.n_edges == len(expected) > 0
    assert torch.equal(go.edges, expected.edges)
    assert torch.equal(go.edge_weight, expected.weight)
    loaded = scfm.load(tmp_path / "model")
    assert torch.equal(loaded.module.go.edges, expected.edges)
    assert torch.equal(scfm.backbones.random_copy(loaded).module.go.edges, expected.edges)
    assert Recipe.read(tmp_path / "model" / "recipe.yaml").annotations == str(annotations)


def test_a_run_goes_on_with_the_same_annotations_only(recipe, annotations, stop_after, tmp_path):
    given = recipe("sclong", annotations=str(annotations))
    whole = pretrain(given)
    with pytest.raises(stop_after(4)):
        pretrain(given, out=tmp_path / "model")
    with pytest.raises(ValueError, match="differs in annotations, config"):
        pretrain(recipe("sclong"), out=tmp_path / "model")
    moved = annotations.rename(tmp_path / "moved.tsv")
    assert_same_run(pretrain(replace(given, annotations=str(moved)), out=tmp_path / "model"), whole)


def test_annotations_that_nothing_is_made_of_are_refused(recipe, annotations):
    with pytest.raises(scfm.UnsupportedError, match="scgpt learns nothing from annotations"):
        pretrain(recipe("scgpt", annotations=str(annotations)))
    with pytest.raises(ValueError, match="annotations and gene_vectors come with the checkpoint"):
        Recipe(name="more", sources=("a.h5ad",), checkpoint="scgpt-mini", annotations="go.tsv")


@pytest.mark.parametrize("kind", list(SMALL))
def test_a_run_goes_on_after_a_stop_as_if_there_was_none(kind, recipe, tmp_path, stop_after):
    whole = pretrain(recipe(kind))
    with pytest.raises(stop_after(5)):
        pretrain(recipe(kind), out=tmp_path)
    assert json.loads((tmp_path / "training/state/state.json").read_text())["step"] == 4
    assert not (tmp_path / "scfm.json").exists()
    assert_same_run(pretrain(recipe(kind), out=tmp_path, resume=True), whole)
    assert_same_run(pretrain(recipe(kind), out=tmp_path), whole)  # nothing is left to do
    assert (whole.history["validation_loss"].iloc[-1] < whole.history["validation_loss"].iloc[0]).all()


def test_a_killed_process_leaves_a_run_that_goes_on(recipe, tmp_path):
    whole = pretrain(recipe())
    recipe().write(tmp_path / "recipe.yaml")
    code = (
        "import os, signal, sys\nfrom scfm.train import pretrain\nfrom scfm.train._keeper import RunKeeper\n"
        "original = RunKeeper.on_train_batch_end\n"
        "def stopping(self, *args):\n    original(self, *args)\n"
        "    if self.state.step == 5:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "RunKeeper.on_train_batch_end = stopping\npretrain(sys.argv[1], out=sys.argv[2])\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert_same_run(pretrain(recipe(), out=out, resume=True), whole)


def test_sums_between_rows_survive_a_stop(recipe, tmp_path, stop_after):
    rare = recipe(log_every=4, validate_every=8, save_every=3)
    with pytest.raises(stop_after(3)):
        pretrain(rare, out=tmp_path)
    assert_same_run(pretrain(rare, out=tmp_path), pretrain(rare))


# -- how a run is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SMALL))
def test_recomputed_activations_change_nothing(kind, recipe, monkeypatch):
    from scfm.train import _recompute

    calls = []
    original = _recompute.checkpoint
    monkeypatch.setattr(_recompute, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    short = recipe(kind, max_steps=3)
    kept = pretrain(short)
    assert not calls
    assert_same_run(pretrain(short, gradient_checkpointing=True), kept)
    assert len(calls) >= 3 * 2  # steps x layers


def test_reading_from_disk_changes_nothing(recipe):
    assert_same_run(pretrain(recipe(in_memory=False, block_size=1)), pretrain(recipe(in_memory=True)))


def test_blocks_and_token_budgets_train_too(recipe):
    pytest.importorskip("scdataset")
    result = pretrain(recipe(in_memory=False, block_size=4, tokens_per_batch=120, accumulate=2))
    assert np.isfinite(result.history["loss"].iloc[1:]).all()


def test_no_cells_need_to_be_held_out(recipe):
    result = pretrain(recipe(in_memory=False, block_size=1, validation_share=0.0, max_steps=2))
    assert (result.n_cells, result.n_validation) == (160, 0)
    assert result.history.index.tolist() == [1, 2]
    assert result.history["validation_loss"].isna().all()


def test_accumulation_averages_micro_batches(recipe):
    """Two micro-batches per step have the gradient of both: one step equals one computed by hand."""
    from scfm.train import MicroBatch, Optimization, PretrainingPlan, build_optimizer
    from scfm.train._cells import Cells
    from scfm.train._outcome import new_backbone
    from scfm.train._pretrain import _divided, _order

    short = recipe("cellfm", max_steps=1, optimization={"preset": "cellfm", "learning_rate": 0.01, "clip": None})
    result = pretrain(short, accumulate=2)
    backbone = new_backbone(short)
    cells = Cells(short.sources, backbone.vocab)
    order = _order(short, cells, _divided(cells.n_cells, short)[0], 2)
    optimization = Optimization.from_dict(short.optimization)
    plan = PretrainingPlan(backbone, optimization, genes=cells.genes, per_step=2)
    plan.module.train()
    optimizer = build_optimizer(plan.module.named_parameters(), optimization)
    visits = order.visits([0, 1])
    for visit in (next(visits), next(visits)):
        (plan.loss(MicroBatch(visit.number, cells.read(np.sort(visit.rows)))).total / 2).backward()
    optimizer.step()
    for name, value in plan.module.state_dict().items():
        torch.testing.assert_close(value, weights(result)[name])


def test_mixed_precision_is_close(recipe):
    exact, mixed = (pretrain(recipe("scfoundation"), precision=p).history["loss"] for p in ("32-true", "bf16-mixed"))
    assert not exact.equals(mixed)
    np.testing.assert_allclose(mixed.iloc[1:], exact.iloc[1:], rtol=0.05)


def test_same_seed_gives_the_same_model(recipe):
    assert_same_run(pretrain(recipe(max_steps=2)), pretrain(recipe(max_steps=2)))
    first, other = (pretrain(recipe(max_steps=2, seed=seed)).history["loss"].iloc[-1] for seed in (0, 1))
    assert first != other


@pytest.mark.parametrize("kind", list(SMALL))
def test_every_kind_trains_in_mixed_precision(kind, recipe, annotations):
    changes = {"annotations": str(annotations)} if kind == "sclong" else {}
    history = pretrain(recipe(kind, max_steps=2, precision="bf16-mixed", **changes)).history
    assert np.isfinite(history["loss"].iloc[1:]).all()


# -- from a checkpoint -----------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint_with_its_genes(recipe, tmp_path):
    before = pretrain(recipe(max_steps=3), out=tmp_path / "before")
    further = recipe(max_steps=2, name="further")
    after = pretrain(further, checkpoint=tmp_path / "before", out=tmp_path / "after")
    assert after.backbone.vocab == before.backbone.vocab
    assert after.backbone.config == before.backbone.config
    assert after.backbone.name == "further"
    extra = after.backbone.provenance.extra["trained_from"]
    assert (extra["id"], len(extra["sha256"])) == ("tiny", 64)
    first, last = before.history["validation_loss"].iloc[0], before.history["validation_loss"].iloc[-1]
    assert abs(after.history["validation_loss"].iloc[0] - last) < 0.2 * abs(first - last)
    unchanged = scfm.load(tmp_path / "before").module.state_dict()
    assert all(torch.equal(value, unchanged[name]) for name, value in weights(before).items())
    assert any(not torch.equal(value, unchanged[name]) for name, value in weights(after).items())


# -- mistakes --------------------------------------------------------------------------------------------------------------


def test_another_run_is_not_mixed_with_an_unfinished_one(recipe, tmp_path):
    pretrain(recipe(max_steps=2), out=tmp_path)
    with pytest.raises(ValueError, match="differs in batch_size"):
        pretrain(recipe(max_steps=4, batch_size=4), out=tmp_path)
    anew = pretrain(recipe(max_steps=4, batch_size=4), out=tmp_path, resume=False)
    assert anew.history.index[-1] == 4
    with pytest.raises(FileNotFoundError, match="no unfinished run"):
        pretrain(recipe(), out=tmp_path / "elsewhere", resume=True)


def test_more_steps_can_be_asked_for_later(recipe, tmp_path):
    constant = recipe(max_steps=2, optimization={"preset": "scfoundation", "warmup_steps": 2})
    pretrain(constant, out=tmp_path)
    more, whole = pretrain(constant, out=tmp_path, max_steps=4), pretrain(replace(constant, max_steps=4))
    assert more.history["loss"].equals(whole.history["loss"])
    assert all(torch.equal(value, weights(more)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(
    ("changes", "arguments", "text"),
    [
        ({"max_steps": None}, {}, "max_steps or max_epochs"),
        ({"sources": ()}, {}, "nothing to train on"),
        ({"batch_size": 500}, {}, "fewer than one optimiser step"),
        ({}, {"loggers": ["wandb"]}, "unknown loggers wandb"),
        ({}, {"loggers": ["tensorboard"]}, "need a folder"),
    ],
)
def test_mistakes_say_what_to_do(recipe, changes, arguments, text):
    with pytest.raises(ValueError, match=text):
        pretrain(recipe(**changes), **arguments)


def test_a_run_in_which_no_cell_counts_is_refused(recipe):
    for in_memory in (True, False):
        with pytest.raises(ValueError, match="none of the 128 cells to train on has 1,000 expressed genes"):
            pretrain(recipe(min_genes=1000, in_memory=in_memory, block_size=1))


def test_resuming_needs_a_folder(recipe):
    with pytest.raises(ValueError, match="give out= with resume=True"):
        pretrain(recipe(), resume=True)


def test_networks_that_see_batches_are_refused(recipe):
    for changes in ({"use_batch_labels": True}, {"input_norm": "dsbn"}):
        config = {**SMALL["scgpt"]["config"], **changes, "n_batches": 2}
        with pytest.raises(scfm.UnsupportedError, match="sees the batch of each cell"):
            pretrain(recipe(config=config))


def test_options_of_the_objective_are_checked(recipe):
    with pytest.raises(ValueError, match="cellfm has no option 'foo'"):
        pretrain(recipe("cellfm", objective={"foo": 1}))


def test_the_cell_prompt_of_scgpt_comes_late_unless_something_is_said(recipe, monkeypatch):
    from scfm.backbones import scgpt

    monkeypatch.setattr(scgpt, "_CELL_PROMPT_FROM", 2)
    published = {"objective": {}, "objective_from": {}}
    late = pretrain(recipe(max_steps=4, **published)).history["cell_prompt"].iloc[1:]
    assert (late.iloc[:2] == 0).all()
    assert (late.iloc[2:] > 0).all()
    throughout = pretrain(recipe(max_steps=2, objective={"cell_prompt": True}, objective_from={})).history
    assert (throughout["cell_prompt"].iloc[1:] > 0).all()


def test_the_published_change_comes_after_a_thousand_iterations():
    backbone = scfm.load("scgpt-mini")
    assert backbone.objective_schedule == {0: {"cell_prompt": False}, 1001: {"cell_prompt": True}}


def test_scgpt_without_a_flag_of_queries_learns_masked_values(recipe):
    config = {**SMALL["scgpt"]["config"], "query_flag": False}
    history = pretrain(recipe(max_steps=2, config=config, objective={}, objective_from={})).history.iloc[1:]
    assert (history["gene_prompt"] > 0).all()
    assert (history["cell_prompt"] == 0).all()


def test_a_warm_up_longer_than_the_run_warns(recipe, capsys):
    pretrain(recipe(max_steps=1, optimization={}))
    assert "never reaches" in capsys.readouterr().err


# -- recipes ---------------------------------------------------------------------------------------------------------------


def test_epochs_are_counted_in_micro_batches(recipe):
    assert pretrain(recipe(max_steps=None, max_epochs=2, accumulate=4)).history.index[-1] == 2 * (128 // 4 // 8)


def test_genes_may_be_given(recipe, tmp_path):
    (tmp_path / "genes.txt").write_text("G7\nG9\nG30\n")
    backbone = pretrain(recipe(max_steps=1, genes=str(tmp_path / "genes.txt"))).backbone
    assert backbone.vocab.genes.tolist() == ["G7", "G9", "G30"]


def test_frequent_genes_are_those_seen_in_most_cells(tmp_path):
    counts = np.zeros((10, 4), dtype=np.float32)
    counts[:9, 2], counts[:5, 0], counts[:1, 3] = 1, 2, 50
    adata = AnnData(sparse.csr_matrix(counts))
    adata.var_names = ["half", "never", "most", "rare"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert frequent_genes([tmp_path / "a.h5ad"], 2) == ["half", "most"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nkind: scgpt\nsources: []\nepochs: 3\n", "epochs"),
        ("name: a\nsources: []\n", "kind .* or checkpoint"),
        ("name: a\nsources: []\ncheckpoint: scgpt\nconfig: {dim: 3}\n", "come with the checkpoint"),
        ("name: a\nkind: scgpt\nsources: []\noptimization: {lr: 3}\n", "no field lr"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(tmp_path / "recipe.yaml")


def test_the_recipes_of_bundled_models_can_be_read():
    folder = Path(scfm.__file__).parent / "checkpoints" / "bundled"
    recipes = [Recipe.read(path) for path in folder.glob("*/recipe.yaml")]
    assert {recipe.name for recipe in recipes} == {path.name for path in folder.iterdir() if path.is_dir()}


def test_command_line(recipe, tmp_path):
    recipe().write(tmp_path / "recipe.yaml")
    arguments = [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--max-steps", "3", "--accelerator", "cpu"]
    assert main(["-q", "pretrain", *arguments, "--accumulate", "2", "--gradient-checkpointing"]) == 0
    assert scfm.load(tmp_path / "out").name == "tiny"
    history = pd.read_csv(tmp_path / "out" / "history.csv", index_col="step")
    assert history.index.tolist() == [0, 1, 2, 3]
    assert main(["-q", "pretrain", *arguments, "--resume"]) == 1  # two micro-batches per step are another run


def test_event_files(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    pretrain(recipe(max_steps=2), out=tmp_path, loggers=["csv", "tensorboard"])
    events = list((tmp_path / "training" / "tensorboard").glob("events.*"))
    assert len(events) == 1
    assert events[0].stat().st_size > 100
