"""What a recipe may say, and how mistakes are named."""

from __future__ import annotations

import pytest

from scfm.train import Recipe

BASE = "name: a\nkind: scgpt\nsources: [a.h5ad]\n"


def read(tmp_path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return Recipe.read(tmp_path / "recipe.yaml")


def test_numbers_may_be_text_as_yaml_reads_them(tmp_path):
    text = BASE + 'max_steps: "40"\nbatch_size: 1.6e1\noptimization: {learning_rate: 1e-3, warmup_steps: "3"}\n'
    recipe = read(
        tmp_path, text + "objective_from: {'4': {cell_prompt: true}}\nvalidation_share: '0.1'\nprecision: 32\n"
    )
    assert (recipe.max_steps, recipe.batch_size, recipe.validation_share) == (40, 16, 0.1)
    assert recipe.objective_from == {4: {"cell_prompt": True}}
    assert recipe.precision == "32-true"
    optimization = recipe.optimization_for("scgpt")
    assert (optimization.learning_rate, optimization.warmup_steps) == (1e-3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "max_steps: many\n", "max_steps must be a number; got 'many'"),
        (BASE + "batch_size: 2.5\n", "batch_size must be a whole number"),
        (BASE + "log_every: 0\n", "log_every must be at least 1"),
        (BASE + "validate_every: 0\n", "validate_every must be at least 1"),
        (BASE + "save_every: 0\n", "save_every must be at least 1"),
        (BASE + "accumulate: true\n", "accumulate must be a number"),
        (BASE + "optimization: {learning_rate: fast}\n", "learning_rate must be a number; got 'fast'"),
        (BASE + "objective_from: {late: {cell_prompt: true}}\n", "objective_from must be a number"),
        (BASE + "precision: bf16-true\n", "precision must be one of 32-true, bf16-mixed, 16-mixed"),
        ("kind: scgpt\nsources: [a.h5ad]\n", "a recipe needs name"),
        ("name: a\nkind: scgpt\n", "a recipe needs sources"),
        ("name: [\n", "is no valid YAML"),
    ],
)
def test_mistakes_name_the_file_and_the_field(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert "recipe.yaml" in str(error.value)


def test_one_source_needs_no_list(tmp_path):
    assert Recipe(name="a", kind="scgpt", sources="one.h5ad").sources == ("one.h5ad",)
    assert Recipe(name="a", kind="scgpt", sources=tmp_path / "one.h5ad").sources == (str(tmp_path / "one.h5ad"),)
