"""Several processes do together what one does alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import scfm
from scfm.train import pretrain

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from scfm.train import pretrain
result = pretrain(sys.argv[1], out=sys.argv[2], strategy=sys.argv[3], devices=2, accelerator="cpu", progress=False)
assert not any(p.requires_grad for p in result.backbone.module.parameters())
"""


def run_two(recipe, out, strategy: str) -> None:
    """Train in two processes that talk through gloo."""
    folder = out.parent
    (folder / "run.py").write_text(SCRIPT)
    recipe.write(folder / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(folder / "run.py"), str(folder / "recipe.yaml"), str(out), strategy]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("scgpt", "ddp"),
        pytest.param("scgpt", "fsdp", marks=pytest.mark.slow),
        pytest.param("sclong", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_that_accumulates(kind, strategy, recipe, tmp_path):
    """With dropout, clipping, new random features on the way, and validation shared by the processes."""
    alone = pretrain(recipe(kind, max_steps=5, accumulate=2), out=tmp_path / "one")
    run_two(recipe(kind, max_steps=5), tmp_path / "two", strategy)
    history = pd.read_csv(tmp_path / "two" / "history.csv", index_col="step")
    pd.testing.assert_frame_equal(history, alone.history, rtol=1e-5)
    together = scfm.load(tmp_path / "two").module.state_dict()
    for name, value in alone.backbone.module.state_dict().items():
        # gradients of key biases are rounding errors, to which Adam gives the same weight as to all others
        noisy = strategy != "ddp" or name.endswith("qkv.bias")
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-3 if noisy else 1e-5)
    one, two = (load_file(tmp_path / name / "training/state/optimizer.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(value.shape == two[name].shape for name, value in one.items())


@pytest.mark.slow
def test_processes_take_up_the_run_of_one(recipe, tmp_path):
    """A state does not depend on how many processes wrote it."""
    whole = pretrain(recipe(max_steps=5, accumulate=2))
    pretrain(recipe(max_steps=3, accumulate=2), out=tmp_path / "out")
    run_two(recipe(max_steps=5), tmp_path / "out", "fsdp")
    history = pd.read_csv(tmp_path / "out" / "history.csv", index_col="step")
    pd.testing.assert_series_equal(history["loss"], whole.history["loss"], rtol=1e-5)
    assert json.loads((tmp_path / "out/training/state/state.json").read_text())["step"] == 5
