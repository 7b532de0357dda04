"""docs/training.md says what is there: its recipe is read, its functions, tests and commands exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from m3.train.cli import app, pipeline_app
from m3.train.recipe import read

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(\S+\.py)` `(\w+)`", PAGE)
COMMANDS = sorted(set(re.findall(r"m3 (train|pipeline) ([a-z-]+)", PAGE)))


def test_the_recipes_are_read(tmp_path):
    found = []
    for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / "recipe.toml").write_text(block, encoding="utf-8")
        recipe = read(tmp_path / "recipe.toml", ["optim.lr=1e-6"])
        found.append((recipe.stage, recipe.source.groups, recipe.algorithm, recipe.optim.lr))
    assert found == [("task-rl", 4, "spar", 1e-6), ("mopd", 4, "mopd", 1e-6)]


def test_every_equation_has_code_and_a_test():
    assert len(NAMED) == 18


@pytest.mark.parametrize(("file", "name"), dict.fromkeys(NAMED))
def test_what_an_equation_names_is_there(file, name):
    path = ROOT / file if "/" in file else ROOT / "tests" / "m3" / file
    defined = {getattr(node, "name", None) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    assert name in defined


@pytest.mark.parametrize(("group", "command"), COMMANDS)
def test_a_command_is_there(group, command):
    found = {"train": app, "pipeline": pipeline_app}[group].registered_commands
    assert command in {one.name or one.callback.__name__ for one in found}
