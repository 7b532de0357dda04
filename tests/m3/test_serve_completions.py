"""Token in, token out over HTTP: ids and log-probabilities are the engine's; new weights, where allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from letters_model import make_letters_model
from loopback import EchoBackend, ask, serving
from safetensors.torch import load_file, save_file

from m3.engine.batch_engine import Engine
from m3.engine.engine import AsyncEngine
from m3.engine.open import open_core
from m3.engine.request import SamplingParams
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend

PROMPT = [95, 31, 32, 33, 96, 40]
IDS = {"extra_body": {"return_token_ids": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", weights_from=folder.parent)
    with serving(build(backend, api_keys=["k"])) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*open_core(folder))


def test_ids_come_back_with_the_log_probability_of_each(client, engine):
    params = SamplingParams(temperature=0.7, top_k=9, seed=4, max_tokens=30, keep_end=True, logprobs="raw")
    [wanted] = engine.generate([PROMPT], params)
    more = {"extra_body": {"return_token_ids": True, "top_k": 9}}
    got = client.completions.create(
        model="letters", prompt=PROMPT, temperature=0.7, seed=4, max_tokens=30, logprobs=0, **more
    )
    choice = got.choices[0]
    assert (choice.token_ids, choice.prompt_token_ids) == (wanted.tokens, PROMPT)
    assert choice.logprobs.token_logprobs == wanted.logprobs
    assert "".join(choice.logprobs.tokens) == choice.text == wanted.text
    assert choice.logprobs.text_offset == list(range(len(wanted.text)))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, len(wanted.tokens))


def test_the_end_is_one_of_the_ids(client, engine):
    """A prompt and seed whose answer ends by itself, found with the engine."""
    params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=60, keep_end=True) for seed in range(40)]
    done = engine.generate([PROMPT] * 40, params)
    seed = next(seed for seed, one in enumerate(done) if one.finish_reason == "stop")
    asked = {"model": "letters", "prompt": PROMPT, "temperature": 1.5, "seed": seed, "max_tokens": 60}
    choice = client.completions.create(**asked, **IDS).choices[0]
    assert choice.finish_reason == "stop" and choice.token_ids == done[seed].tokens
    assert choice.token_ids[-1] in (2, 96)
    assert not hasattr(client.completions.create(**asked).choices[0], "token_ids")


def test_a_token_may_end_an_answer(client, engine):
    [whole] = engine.generate([PROMPT], SamplingParams(max_tokens=20))
    place = next(n for n, token in enumerate(whole.tokens) if token != whole.tokens[0])
    stop = {"extra_body": {"stop_token_ids": [whole.tokens[place]], "return_token_ids": True}}
    choice = client.completions.create(model="letters", prompt=PROMPT, temperature=0, max_tokens=20, **stop).choices[0]
    assert (choice.token_ids, choice.finish_reason) == (whole.tokens[: place + 1], "stop")


def test_log_probabilities_of_a_prompt(client, engine):
    [wanted] = engine.generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=True))
    choice = client.completions.create(
        model="letters", prompt=PROMPT, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    ).choices[0]
    assert choice.prompt_logprobs[0] is None
    told = [row[str(token)]["logprob"] for row, token in zip(choice.prompt_logprobs[1:], PROMPT[1:], strict=True)]
    assert told == wanted.prompt_logprobs


def test_text_is_a_prompt_too(client, engine):
    [wanted] = engine.generate(["Hello"], SamplingParams(max_tokens=5))
    got = client.completions.create(model="letters", prompt="Hello", temperature=0, max_tokens=5)
    assert got.choices[0].text == wanted.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [5] * 600}, "prompt"),
        ({"prompt": [[1, 2], ["a"]]}, "prompt"),
        ({"prompt": [[1, 2], []]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "letters", "prompt": PROMPT, **fields})
    assert caught.value.param.startswith(param)


def test_models_and_keys_are_checked(url, client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="others", prompt=PROMPT)
    assert ask(f"{url}/completions", json.dumps({"model": "letters", "prompt": PROMPT})).status == 401
    assert ask(f"{url.removesuffix('/v1')}/update_weights_from_disk", "{}").status == 401


def test_a_backend_of_chats_alone_has_no_completions():
    with serving(build(EchoBackend())) as url:
        assert ask(f"{url}/completions", "{}").status == 404


# -- weights ----------------------------------------------------------------------------------------------------------
def test_weights_are_taken_from_the_disk(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    wanted = Engine(*open_core(folder))
    wanted.core.update_weights({name: tensor * 0.5 for name, tensor in tensors.items()}, 1)
    [after] = wanted.generate([PROMPT], SamplingParams(max_tokens=8, logprobs="raw"))
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", weights_from=tmp_path)
    with serving(build(backend)) as url:
        update = f"{url.removesuffix('/v1')}/update_weights_from_disk"

        def drawn() -> tuple[list[int], list[float]]:
            asked = {"model": "letters", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 0}
            choice = ask(f"{url}/completions", json.dumps({**asked, "return_token_ids": True})).json()["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]

        before = drawn()
        assert ask(update, json.dumps({"model_path": str(tmp_path), "weight_version": "7"})).status == 200
        assert drawn() == (after.tokens, after.logprobs) != before
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x08\0\0\0")
        (tmp_path / "other").mkdir()
        save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "other" / "model.safetensors")
        statuses = {
            name: ask(update, json.dumps({"model_path": str(tmp_path / name)})).status
            for name in ("torn", "other", "none", "..")
        }
        assert statuses == {"torn": 400, "other": 400, "none": 400, "..": 403}
        assert drawn() == (after.tokens, after.logprobs)


def test_a_server_that_was_not_asked_takes_no_weights(folder):
    with serving(build(EngineBackend(AsyncEngine.from_model(folder), "letters"))) as url:
        body = json.dumps({"model_path": str(folder)})
        assert ask(f"{url.removesuffix('/v1')}/update_weights_from_disk", body).status == 403
