"""What ``m3 quantize`` writes loads and generates here, and in transformers (gptqmodel, auto-round) and vLLM.

Each of the others runs in the interpreter that M3_GPTQMODEL_PYTHON, M3_AUTOROUND_PYTHON or M3_VLLM_PYTHON names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3.checkpoint import SINGLE, read_json, write_json
from m3.engine.batch_engine import Engine
from m3.engine.core import EngineCore
from m3.engine.request import SamplingParams
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.gptq import GptqConfig
from m3.quantize.job import JobConfig, quantize_checkpoint
from m3.quantize.perplexity import mixed_text
from m3.quantize.scheme import Scheme

pytestmark = pytest.mark.slow
LAYERS, NEW_TOKENS = 4, 8
NO_INT4_GEMM = ("cpu_gemm_wna16", "No WNA16")  # what stock vLLM says on a CPU that its INT4 products are not built for
CASES = {
    "sym": (Scheme(group_size=64), GptqConfig()),
    "asym": (Scheme(group_size=64, symmetric=False), GptqConfig()),
    "act-order": (Scheme(group_size=64), GptqConfig(act_order=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The first layers of SmolLM2."""
    source, folder = resolve("SmolLM2-135M-Instruct"), tmp_path_factory.mktemp("smollm2")
    for path in source.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", {**read_json(source / "config.json"), "num_hidden_layers": LAYERS})
    beyond = tuple(f"model.layers.{index}." for index in range(LAYERS, 100))
    tensors = {name: value for name, value in load_file(source / SINGLE).items() if not name.startswith(beyond)}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=CASES)
def quantised(request, model, tmp_path_factory) -> Path:
    scheme, gptq = CASES[request.param]
    folder = tmp_path_factory.mktemp("quantised") / request.param
    config = JobConfig(method="gptq", scheme=scheme, gptq=gptq)
    quantize_checkpoint(model, folder, config, calibration=prompt(model)[None, :96].view(3, 32))
    return folder


def prompt(folder: Path) -> torch.Tensor:
    return torch.tensor(Tokenizer(folder).encode(mixed_text()[0]))


def elsewhere(loader: str, folder: Path, ids: list[int], tmp_path: Path) -> dict:
    variable = f"M3_{loader.replace('-', '').upper()}_PYTHON"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {loader}")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    script = Path(__file__).with_name("logits_elsewhere.py")
    command = [python, script, loader, folder, tmp_path / "ids.json", tmp_path / "found.pt"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = result.stdout + result.stderr
    if loader == "vllm" and result.returncode and any(words in said for words in NO_INT4_GEMM):
        pytest.skip("this build of vLLM has no INT4 product for this CPU")
    assert result.returncode == 0, said[-3000:]
    return torch.load(tmp_path / "found.pt")


def greedy(folder: Path, ids: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    engine = Engine(EngineCore(load_model(folder, activations="exact")))
    return list(engine.generate([ids], params)[0].tokens)


@pytest.mark.parametrize("loader", ["gptqmodel", "auto-round"])
def test_logits_equal_those_of_transformers(quantised, tmp_path, loader):
    """fp32 sums in another order, over weights that are bitwise the same: 1e-3 of the logits' size, the same tokens."""
    folder = quantised
    if loader == "auto-round":
        folder = tmp_path / "own"
        shutil.copytree(quantised, folder)
        config = read_json(folder / "config.json")
        config["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
        write_json(folder / "config.json", config)
    ids = prompt(quantised)[:48].tolist()
    found = elsewhere(loader, folder, ids, tmp_path)
    ours = load_model(quantised, activations="exact")(torch.tensor([ids]))[0]
    scale = ours.square().mean().sqrt()
    assert (found["logits"] - ours).square().mean().sqrt() <= 1e-3 * scale
    assert found["next"] == greedy(quantised, ids)


def test_vllm_goes_on_as_this_engine_does(quantised, tmp_path):
    ids = prompt(quantised)[:48].tolist()
    assert elsewhere("vllm", quantised, ids, tmp_path)["next"] == greedy(quantised, ids)
