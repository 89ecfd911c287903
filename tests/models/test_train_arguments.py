"""What ``train`` takes: the names of scvi-tools, and mistakes that are named before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch
from scvi.train import SaveCheckpoint

import scfm
from scfm.models import SCGPT, CellTypeClassifier, model_class
from scfm.models._training import choose_optimization, split_cells
from scfm.train import Optimization

RUN = {"accelerator": "cpu", "batch_size": 16, "enable_progress_bar": False}


@pytest.fixture
def model(tiny, make_data):
    adata = make_data()
    SCGPT.setup_anndata(adata)
    return SCGPT(adata, config=tiny["scgpt"], seed=0, device="cpu")


def weights(model):
    return torch.cat([value.flatten().float() for value in model.backbone.module.state_dict().values()])


def after(model, tiny, *positional, **arguments):
    """Weights of a model like ``model`` after training."""
    made = SCGPT(model.adata, config=tiny["scgpt"], seed=0, device="cpu")
    made.train(*positional, **{"max_epochs": 1, **RUN} | arguments if not positional else RUN | arguments)
    return weights(made)


# -- the names of scvi-tools ---------------------------------------------------------------------------------------------


def test_arguments_in_the_order_of_scvi_tools(model):
    model.train(1, "cpu", 1, 0.8, 0.1, batch_size=None, enable_progress_bar=False)
    assert [len(part) for part in (model.train_indices, model.validation_indices, model.test_indices)] == [40, 5, 5]


def test_the_optimiser_of_scvi_tools(model, tiny):
    same = after(model, tiny, lr=1e-2, weight_decay=0.1)
    assert torch.equal(after(model, tiny, plan_kwargs={"lr": 1e-2, "weight_decay": 0.1}), same)
    assert torch.equal(after(model, tiny, lr="1e-2", plan_kwargs={"lr": 1.0, "weight_decay": 0.1}), same)
    assert not torch.equal(after(model, tiny, lr=1e-3, weight_decay=0.1), same)
    with pytest.raises(ValueError, match="not n_epochs_kl_warmup"):
        model.train(1, plan_kwargs={"n_epochs_kl_warmup": 3}, **RUN)


def test_an_optimisation_may_be_a_mapping(model):
    chosen = lambda optimization: choose_optimization(model.backbone, optimization, None, None)
    assert chosen({"preset": "cellfm-tutorials"}).clip == "value"
    changed = chosen({"weight_decay": "1e-2"})
    assert (changed.optimizer, changed.schedule, changed.weight_decay, changed.learning_rate) == (
        "adam",
        "constant",
        0.01,
        1e-4,
    )
    assert chosen(Optimization(gamma=0.5)).gamma == 0.5
    with pytest.raises(ValueError, match="no field rate"):
        chosen({"rate": 1})


def test_how_cells_are_divided(model, tiny):
    model.train(1, shuffle_set_split=False, train_size=None, load_sparse_tensor=True, **RUN)
    np.testing.assert_array_equal(model.validation_indices, np.arange(5))
    np.testing.assert_array_equal(model.train_indices, np.arange(5, 50))
    train, validation, test = split_cells(10, 0.5, 0.2, 0, shuffle=False)
    assert [part.tolist() for part in (validation, train, test)] == [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9]]
    model.train(1, datasplitter_kwargs={"shuffle_set_split": False, "pin_memory": True}, **RUN)
    np.testing.assert_array_equal(model.validation_indices, np.arange(5))
    with pytest.raises(ValueError, match="not external_indexing"):
        model.train(1, datasplitter_kwargs={"external_indexing": []}, **RUN)
    with pytest.raises(TypeError, match="takes no datamodule"):
        model.train(1, datamodule=object(), **RUN)


def test_options_of_the_trainer_in_a_mapping(model):
    model.train(1, trainer_config={"accumulate_grad_batches": 3}, **RUN)
    assert model.trainer.accumulate_grad_batches == 3


def test_task_models_name_what_to_say_instead(tiny, make_data):
    adata = make_data()
    SCGPT.setup_anndata(adata)
    CellTypeClassifier.setup_anndata(adata, labels_key="label")
    network = SCGPT(adata, config=tiny["scgpt"], device="cpu").backbone
    task = CellTypeClassifier(adata, checkpoint=network, device="cpu")
    with pytest.raises(TypeError, match="takes no plan_kwargs here; give lr="):
        task.train(1, plan_kwargs={"lr": 1e-3}, **RUN)


# -- options that act ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "n_epochs"),
    [
        ({"early_stopping_min_delta": 1e6}, 2),
        ({"early_stopping_min_delta": 1e6, "early_stopping_warmup_epochs": 2}, 4),
        ({"early_stopping_min_delta": 1e6, "early_stopping_monitor": "gene_prompt_validation"}, 2),
        ({"early_stopping_mode": "max", "early_stopping_min_delta": 0.0}, 2),
    ],
)
def test_early_stopping_is_that_of_scvi_tools(model, options, n_epochs):
    model.train(6, early_stopping=True, early_stopping_patience=1, lr=1e-2, **options, **RUN)
    assert len(model.history["train_loss_epoch"]) == n_epochs


def test_gradients_are_clipped_as_lightning_is_told(model, tiny):
    free = after(model, tiny, gradient_clip_val=0, lr=1e-2)
    start = weights(SCGPT(model.adata, config=tiny["scgpt"], seed=0, device="cpu"))
    # a gradient that vanishes beside eps moves nothing
    tight = after(model, tiny, gradient_clip_val=1e-12, lr=1e-2)
    assert (tight - start).abs().max() < 1e-2 * (free - start).abs().max()
    value = after(model, tiny, gradient_clip_val=1e-12, gradient_clip_algorithm="value", lr=1e-2)
    assert (value - start).abs().max() < 1e-2 * (free - start).abs().max()


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(model, tiny):
    made = SCGPT(model.adata, config=tiny["scgpt"], seed=0, device="cpu")
    run = {**RUN, "batch_size": 9, "train_size": 0.9, "lr": 1e-12, "log_every_n_steps": 1, "seed": 0}
    model.train(1, **run)
    made.train(1, accumulate_grad_batches=5, **run)
    single = model.history["train_loss_step"]["train_loss_step"]
    assert len(single) == 5
    np.testing.assert_allclose(made.history["train_loss_step"]["train_loss_step"], [single.mean()], rtol=1e-5)


def test_checkpoints_are_models(model, tmp_path, monkeypatch):
    monkeypatch.setattr(scvi.settings, "logging_dir", str(tmp_path))
    model.train(2, enable_checkpointing=True, lr=1e-2, **RUN)
    saved = [path for path in tmp_path.rglob("*") if (path / "scfm.json").is_file()]
    assert saved
    assert SCGPT.load(saved[0], adata=model.adata, accelerator="cpu").is_trained
    keeper = SaveCheckpoint(dirpath=str(tmp_path / "own"), monitor="validation_loss", save_top_k=2)
    model.train(2, callbacks=keeper, lr=1e-2, **RUN)
    assert SCGPT.load(keeper.best_model_path, adata=model.adata, accelerator="cpu").is_trained
    assert model.is_trained
    with pytest.raises(ValueError, match="leave load_best_on_end"):
        model.train(1, callbacks=[SaveCheckpoint(load_best_on_end=True)], **RUN)


def test_a_saved_checkpoint_changes_nothing(model, tiny, tmp_path):
    keeper = SaveCheckpoint(dirpath=str(tmp_path), monitor="validation_loss", save_top_k=-1)
    assert torch.equal(after(model, tiny, 3, callbacks=[keeper]), after(model, tiny, 3))


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": -4}, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"log_every_n_steps": 0}, "log_every_n_steps must be at least 1"),
        ({"lr": "fast"}, "learning_rate must be a number"),
        ({"precision": "bf16-true"}, "precision must be one of 32-true"),
        ({"precision": "64-true"}, "precision must be one of 32-true"),
        ({"strategy": "fsdp"}, "scfm.train.pretrain"),
        ({"objective": {"foo": 1}}, "scgpt has no option 'foo'"),
        ({"objective": {"task": "gen"}}, "task must be one of 'both', 'masked'"),
        ({"objective": {"ratio": 2.0}}, "ratio must lie between 0 and 1"),
        ({"gradient_clip_val": "tight"}, "gradient_clip_val must be a number"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_untrained(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.train(**{"max_epochs": 1, **RUN} | arguments)
    assert not model.is_trained


def test_networks_made_for_fewer_batches_say_so(tiny, make_data):
    adata = make_data()
    SCGPT.setup_anndata(adata, batch_key="batch")
    model = SCGPT(adata, config={**tiny["scgpt"], "use_batch_labels": True, "n_batches": 1}, device="cpu")
    with pytest.raises(ValueError, match="the data have 2 batches and the network was made for 1"):
        model.train(1, **RUN)
    assert not model.is_trained


@pytest.mark.parametrize("objective", [{"task": "masked"}, {"task": "masked", "ratio": 0.2, "max_length": 8}])
def test_scgpt_learns_masked_values(model, objective):
    model.train(1, objective=objective, **RUN)
    assert model.history["cell_prompt_train"].iloc[0, 0] == 0
    assert model.history["gene_prompt_train"].iloc[0, 0] > 0


def test_the_bundled_models_train_in_mixed_precision(kind, make_data):
    backbone = scfm.load(f"{kind}-mini", device="cpu")
    adata = make_data(20)
    adata.var_names = backbone.vocab.genes[: adata.n_vars]
    cls = model_class(kind)
    cls.setup_anndata(adata)
    model = cls(adata, checkpoint=backbone)
    model.train(max_steps=2, precision="bf16-mixed", log_every_n_steps=1, **RUN | {"batch_size": 8})
    assert np.isfinite(model.history["train_loss_step"].to_numpy()).all()
