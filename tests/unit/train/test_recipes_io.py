"""Recipes: precedence, sources, and errors that name file, key and the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import UserError
from train.effects import ineffective_keys
from train.recipes_io import (
    dump_run_yaml,
    find_recipe,
    flatten,
    load_run_config,
    to_plain,
)

RECIPE = """
stage: prune
task: vqa
out: runs/x
model: blocksworld-student
data: {train: data/train, batch: 16}
optim: {lr: 1e-3, betas: [0.9, 0.95]}
prune: {sparsity: 0.3}
loss: {answer: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_defaults_then_recipe_then_overrides(recipe: Path) -> None:
    config, sources = load_run_config(recipe, ["optim.lr=3e-4", "data.val=null", "loss.answer=0.5"])
    assert config.optim.lr == 3e-4 and config.optim.betas == (0.9, 0.95)
    assert config.data.batch == 16 and config.loss == {"answer": 0.5}
    assert sources["optim.lr"] == "override"
    assert sources["optim.betas"] == sources["prune.sparsity"] == "recipe"
    assert sources["optim.eps"] == sources["prune.lr"] == "default"
    assert sources.keys() == flatten(to_plain(config)).keys()


def test_an_override_makes_a_section(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("prune: {sparsity: 0.3}", ""))
    config, sources = load_run_config(recipe, ["prune.sparsity=0.5"])
    assert config.prune is not None and config.prune.sparsity == 0.5
    assert sources["prune.sparsity"] == "override"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.lrr=1"], ["override of", "optim.lrr", 'did you mean "lr"?']),
        (["data.region.probabilty=1"], ["data.region.probabilty", '"probability"']),
        (["prune.sparsty=1"], ["prune.sparsty", '"sparsity"']),
        (["optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["engine.precision=fp8"], ["engine.precision", "'fp8'"]),
        (["optim.lr"], ["section.key=value"]),
        (["out.x=1"], ["out is 'runs/x'"]),
        (["optim.lr=[1"], ["not YAML"]),
    ],
)
def test_wrong_overrides_are_explained(
    recipe: Path, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        load_run_config(recipe, overrides)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stage: prune\nstage: distill\n", "'stage' appears twice"),
        ("- a\n", "mapping"),
        ("a: [\n", "not readable as YAML"),
        ("stage: prune\n", "task: required"),
        (RECIPE + "optmi: {lr: 1}\n", 'did you mean "optim"?'),
    ],
)
def test_wrong_files_are_explained(recipe: Path, text: str, part: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_run_config(recipe, [])
    assert part in str(error.value) and str(recipe) in str(error.value)


def test_a_run_file_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    config, _ = load_run_config(recipe, ["seed=7"])
    dump_run_yaml(config, tmp_path / "run" / "run.yaml", {"world_size": 2})
    assert "world_size: 2" in (tmp_path / "run" / "run.yaml").read_text()
    assert load_run_config(tmp_path / "run" / "run.yaml", [])[0] == config


def test_every_shipped_recipe_resolves() -> None:
    names = sorted(path.stem for path in Path("train/recipes").glob("*.yaml"))
    for name in names:
        load_run_config(find_recipe(name), [])
    with pytest.raises(FileNotFoundError, match="shipped are"):
        find_recipe("no-such-recipe")


def test_keys_without_effect_are_named(recipe: Path) -> None:
    config, sources = load_run_config(recipe, ["data.region.probability=0.5", "data.mlm_max=3"])
    warned = "\n".join(ineffective_keys(config, sources))
    assert "data.region.probability has no effect" in warned and "data.mlm_max" in warned
    assert "prune." not in warned


@given(
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, min_size=1)
    ).filter(lambda value: isinstance(value, dict))
)
def test_flatten_keeps_every_leaf(values: dict) -> None:
    flat = flatten(values)
    for dotted, leaf in flat.items():
        here = values
        for part in dotted.split("."):
            here = here[part]
        assert here == leaf
