"""The architecture as a test: what docs/architecture.md promises about files, names, imports and ops."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3kernels import dispatch
from m3kernels.__main__ import EXAMPLES, calls

ROOT = Path(__file__).parent.parent
FAMILIES = sorted(path.parent.name for path in (ROOT / "m3kernels").glob("*/ops.py"))
FLOORS = ("m3kernels", "m3", "bench", "tests")
PYTHON = [*sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")), ROOT / "setup.py"]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
KERNELS = [path for path in PYTHON if "m3kernels" in path.relative_to(ROOT).parts[:1]]

PYTHON_LINES, KERNEL_LINES = 600, 1000
VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc|managers?|handlers?|new|v2|common)(_|$)")
FOLDERS_NAMED_COMMON = {"csrc/common"}
# m3kernels knows mathematics; these are names of algorithms and models, which live in m3.
FOREIGN_NAMES = re.compile(
    r"\b(grpo|gspo|dapo|spar|mopd|qwen\w*|llama\w*|baichuan\w*|eagle\w*|smollm\w*)\b", re.IGNORECASE
)
TRITON = re.compile(
    r"_triton\.py|triton_\w+\.py"
)  # files that may import triton: rooms and the kernels behind their doors


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name)


@functools.cache
def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


# -- one word, four places --------------------------------------------------------------------------------------------
def test_there_is_a_family():
    assert "int4" in FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["csrc/{}", "m3kernels/{}", "bench/{}.py", "tests/kernels/test_{}.py"])
def test_one_word_four_places(family, place):
    assert (ROOT / place.format(family)).exists()


def test_every_folder_of_csrc_is_a_family_or_common():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders == {"common", *FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["__init__.py", "types.py", "reference.py", "ops.py", "_cpu.py", "_triton.py"])
def test_same_rooms_everywhere(family, file):
    assert (ROOT / "m3kernels" / family / file).is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_private_file_of_a_family_is_a_room(family):
    rooms = {f"_{room}.py" for room in dispatch.NAMES} - {"_reference.py"}
    private = {path.name for path in (ROOT / "m3kernels" / family).glob("_*.py")} - {"__init__.py"}
    assert private <= rooms


# -- files ------------------------------------------------------------------------------------------------------------
@each(PYTHON)
def test_python_file_opens_with_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "want a module docstring"


@each(NATIVE)
def test_native_file_opens_with_what_it_is(path):
    assert path.read_text().startswith("// ")


@each(PYTHON + NATIVE)
def test_file_has_one_subject(path):
    kernel = path.suffix != ".py" or bool(TRITON.fullmatch(path.name))
    limit = KERNEL_LINES if kernel else PYTHON_LINES
    assert len(path.read_text().splitlines()) <= limit


@each(PYTHON + NATIVE)
def test_file_name_says_something(path):
    assert not VAGUE.search(path.stem)
    folders = [
        ROOT / Path(*path.relative_to(ROOT).parts[:depth]) for depth in range(1, len(path.relative_to(ROOT).parts))
    ]
    assert not [
        name(folder) for folder in folders if VAGUE.search(folder.name) and name(folder) not in FOLDERS_NAMED_COMMON
    ]


@each(NATIVE)
def test_native_code_includes_no_torch_header(path):
    assert not re.findall(r"#\s*include\s*[<\"](?:torch|ATen|c10)/.*", path.read_text())


@each(KERNELS + NATIVE)
def test_kernels_know_no_names(path):
    assert not FOREIGN_NAMES.findall(path.read_text())


EVERYTHING = ("Exception", "BaseException")


def calls_something(line: ast.stmt) -> bool:
    return any(isinstance(inner, ast.Call) for inner in ast.walk(line))


@each(PYTHON)
def test_no_error_is_swallowed(path):
    """No handler that does nothing, and nothing that catches everything and goes on."""
    swallowed = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            idle = all(isinstance(line, (ast.Pass, ast.Expr)) and not calls_something(line) for line in node.body)
            broad = node.type is None or ast.unparse(node.type) in EVERYTHING
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if idle or (broad and not raises):
                swallowed.append(node.lineno)
        elif isinstance(node, ast.Call) and "suppress" in (
            getattr(node.func, "id", ""),
            getattr(node.func, "attr", ""),
        ):
            swallowed += [node.lineno for arg in node.args if ast.unparse(arg) in EVERYTHING]
    assert swallowed == []


# -- imports ----------------------------------------------------------------------------------------------------------
@each(KERNELS)
def test_m3kernels_stands_alone(path):
    allowed = {"torch", "m3kernels"} | sys.stdlib_module_names
    if TRITON.fullmatch(path.name):
        allowed |= {"triton"}
    assert imported(path) <= allowed


@each([path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("m3kernels", "m3")])
def test_nobody_imports_bench_or_tests(path):
    assert not imported(path) & {"bench", "tests"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["__init__.py", "types.py", "ops.py"])
def test_only_dispatch_chooses_a_room(family, file):
    tree = ast.parse((ROOT / "m3kernels" / family / file).read_text())
    wanted = [
        alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    ]
    wanted += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    rooms = {f"_{room}" for room in dispatch.NAMES}
    assert not [module for module in wanted if module.rpartition(".")[2] in rooms]


@each([path for path in KERNELS if path.name not in ("dispatch.py", "__main__.py")])
def test_only_dispatch_reads_the_backend_from_the_environment(path):
    assert not re.search(r"environ.*M3KERNELS_BACKEND", path.read_text())


IMPORT_ALONE = """
import sys
import torch
before = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "m3", "transformers", "vllm", "bench", "tests"}:
            raise ImportError("m3kernels imported " + name)
sys.meta_path.insert(0, Refuse())
import m3kernels
for family in %r:
    __import__("m3kernels." + family)
assert not torch.cuda.is_initialized(), "CUDA was started"
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"m3kernels", "torch"}))
"""


def test_import_does_nothing_but_declare_names(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE % (FAMILIES,)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=child_environment(),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# -- ops --------------------------------------------------------------------------------------------------------------
def registered() -> list[str]:
    for family in FAMILIES:
        importlib.import_module(f"m3kernels.{family}")
    names = torch._C._dispatch_get_all_op_names()
    return sorted(full.partition("::")[2].partition(".")[0] for full in names if full.startswith("m3kernels::"))


def family_of(op: str) -> str:
    return next(family for family in FAMILIES if hasattr(importlib.import_module(f"m3kernels.{family}.reference"), op))


@pytest.mark.parametrize("op", registered())
def test_op_has_a_public_function_with_a_contract(op):
    package = importlib.import_module(f"m3kernels.{family_of(op)}")
    assert op in package.__all__
    assert inspect.getdoc(getattr(package, op))


@pytest.mark.parametrize("op", registered())
def test_op_has_a_fake(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"m3kernels::{op}", "Meta")


@pytest.mark.parametrize("op", registered())
def test_op_is_not_named_like_its_family(op):
    assert op not in FAMILIES


def rooms_built() -> list[tuple[str, str]]:
    """(family, room) of every room that exists as a file, the reference aside."""
    pairs = [(family, room) for family in FAMILIES for room in dispatch.NAMES]
    return [(family, room) for family, room in pairs if (ROOT / "m3kernels" / family / f"_{room}.py").exists()]


@pytest.mark.parametrize(("family", "room"), rooms_built())
def test_room_takes_the_arguments_of_the_reference(family, room):
    if room != "cpu":
        pytest.importorskip("triton" if room == "triton" else "m3kernels._cuda_ext")
    module = importlib.import_module(f"m3kernels.{family}._{room}")
    reference = importlib.import_module(f"m3kernels.{family}.reference")
    served = [op for op in registered() if family_of(op) == family and hasattr(module, op)]
    assert served, "a room serves at least one op"
    assert callable(module.unsupported)
    for op in served:
        wanted = list(inspect.signature(getattr(reference, op)).parameters)
        assert list(inspect.signature(getattr(module, op)).parameters) == wanted, op


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_owns_inputs_and_tolerance(family):
    reference = importlib.import_module(f"m3kernels.{family}.reference")
    assert callable(reference.make_inputs)
    assert reference.TOLERANCE
    assert reference.unsupported("any") == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_of_a_family_has_an_example_for_the_report(family):
    ops = [op for op in registered() if family_of(op) == family]
    assert sorted(EXAMPLES[family]()) == ops
    assert sorted(op for op, _ in calls(family)) == ops
