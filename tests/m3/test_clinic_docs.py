"""docs/clinic.md says what is there: its case is valid, its functions, tests and commands exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from m3.environment.case import find_problems
from m3.environment.cli import app as clinic
from m3.evaluate.cli import app as evaluate

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "clinic.md").read_text(encoding="utf-8")
EQUATIONS = re.findall(r"^\| [\d, ]+ [^|]*\|([^|]*)\|([^|]*)\|$", PAGE, re.MULTILINE)
NAMED = [pair for code, test in EQUATIONS for pair in re.findall(r"`(\S+\.py)` `(\w+)`", code + test)]
COMMANDS = sorted(set(re.findall(r"m3 (clinic|evaluate) (?:rubrics |audit )?([a-z]+)", PAGE)))


def test_the_case_is_valid():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert list(find_problems(json.loads(block))) == []


def test_every_equation_has_code_and_a_test():
    assert len(EQUATIONS) == 14 and len(NAMED) == 29


@pytest.mark.parametrize(("file", "name"), dict.fromkeys(NAMED))
def test_what_an_equation_names_is_there(file, name):
    path = ROOT / file if "/" in file else ROOT / "tests" / "m3" / file
    defined = {getattr(node, "name", None) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    assert name in defined


@pytest.mark.parametrize(("group", "command"), COMMANDS)
def test_a_command_is_there(group, command):
    app = {"clinic": clinic, "evaluate": evaluate}[group]
    found = [*app.registered_commands, *(one for part in app.registered_groups for one in known(part))]
    names = {one.name or one.callback.__name__ for one in found}
    assert command in names | {part.name for part in app.registered_groups}


def known(group):
    return group.typer_instance.registered_commands
