"""The physician behind a server: what the engine's says, token by token; servers without ids; new weights."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letters_model import make_letters_model
from loopback import serving
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from m3.engine.engine import AsyncEngine
from m3.environment.episode import run_inquiry
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Trajectory
from m3.rollout.chat import ChatError, Failure
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend
from m3.train.policy_model import PolicyModel
from m3.train.rollouts import EnginePhysician, Physician
from m3.train.served_physician import ServedPhysician
from m3.train.teachers import ModelTeacher, ServedTeacher
from tests.m3.clinic_cases import small_case
from tests.m3.train_cases import draw_samples, with_one_thread

one_thread = pytest.fixture(scope="module", autouse=True)(with_one_thread)
CASE = small_case()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def url(folder: Path, tmp_path: Path) -> Iterator[str]:
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", weights_from=tmp_path)
    with serving(build(backend)) as url:
        yield url


def consulted(physician: Physician, seed: int) -> Any:
    return run_inquiry(CASE, physician, ScriptedPatient(CASE, seed=0), seed=seed, max_turns=3)


def told(trajectory: Trajectory) -> list[Any]:
    """Messages as JSON."""
    return [json.loads(json.dumps(message.to_json())) for message in trajectory.messages]


def test_consultations_are_those_of_the_engine(folder, weights, url):
    async def main() -> tuple[list[Trajectory], list[Trajectory]]:
        served = ServedPhysician(url, "letters", source=folder, weights=weights, max_tokens=12)
        await served.check()
        there = await asyncio.gather(*(consulted(served, seed) for seed in range(4)))
        await served.close()
        async with AsyncEngine.from_model(folder) as engine:
            here = EnginePhysician(engine, "letters", max_tokens=12)
            return there, [await consulted(here, seed) for seed in range(4)]

    there, here = asyncio.run(main())
    gaps = []
    for one, other in zip(there, here, strict=True):
        for row, wanted in zip(told(one), told(other), strict=True):
            if row["role"] == "assistant":
                pair = [one["m3"]["meta"]["sampled"].pop("logprobs") for one in (row, wanted)]
                gaps += [abs(a - b) for a, b in zip(*pair, strict=True)]
            assert row == wanted
    assert len(gaps) > 40 and max(gaps) < 1e-5  # softmax(logits) and the law of the sampler: the same but for rounding


# -- servers that will not do -----------------------------------------------------------------------------------------
def choice(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The only choice of an answer; ids of the prompt are those that were sent where they are not given."""
    whole = {"index": 0, "text": "Hi", "finish_reason": "stop", "token_ids": [40, 41],
             "logprobs": {"token_logprobs": [-1.0, -2.0]}}  # fmt: skip
    return lambda asked: {**whole, "prompt_token_ids": asked["prompt"], **fields}


def theirs(complete: Callable[[Request], Awaitable[JSONResponse]]) -> Starlette:
    """A server that is not ours."""
    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


BAD = {
    "text alone": (choice(token_ids=None), "returns token_ids .* which returned None"),
    "no token": (choice(token_ids=[]), "returns token_ids"),
    "ids as text": (choice(token_ids=["token_id:4"]), "returns token_ids"),
    "another prompt": (choice(prompt_token_ids=[1, 2]), "takes a prompt of .* ids as it is; .*read 2 other ones"),
    "no log-probabilities": (choice(logprobs=None), "tells the log-probability of each of 2 tokens; .*told None"),
    "one too few": (choice(logprobs={"token_logprobs": [-1.0]}), "tells the log-probability of each of 2 tokens"),
    "one unknown": (choice(logprobs={"token_logprobs": [-1.0, None]}), "tells the log-probability of each of 2 tokens"),
}


@pytest.mark.parametrize(("answer", "match"), BAD.values(), ids=BAD)
def test_a_server_that_tells_too_little_is_refused(folder, weights, answer, match):
    async def complete(request: Request) -> JSONResponse:
        row = {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
        return JSONResponse({**row, "choices": [answer(await request.json())]})

    async def main(url: str) -> None:
        physician = ServedPhysician(url, "m", source=folder, weights=weights)
        try:
            await physician.check()
        finally:
            await physician.close()

    want = f"ServedPhysician: base_url: want a server that {match}"
    with serving(theirs(complete)) as url, pytest.raises(ValueError, match=want):
        asyncio.run(main(url))


@pytest.mark.parametrize(("status", "failure"), [(400, Failure.refused), (503, Failure.unreachable)])
def test_a_server_that_fails_is_a_failure_with_a_name(folder, weights, status, failure):
    async def complete(request: Request) -> JSONResponse:
        return JSONResponse({"error": {"message": "no"}}, status)

    async def main(url: str) -> None:
        physician = ServedPhysician(url, "m", source=folder, weights=weights, max_retries=0)
        try:
            await physician.check()
        finally:
            await physician.close()

    with serving(theirs(complete)) as url, pytest.raises(ChatError) as caught:
        asyncio.run(main(url))
    assert caught.value.failure is failure


# -- new weights ------------------------------------------------------------------------------------------------------
def halved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor * 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}


def test_the_server_draws_with_the_new_weights(folder, weights, url):
    hook = f"{url.removesuffix('/v1')}/update_weights_from_disk"

    async def main() -> tuple[list[Trajectory], Trajectory]:
        served = ServedPhysician(url, "letters", source=folder, weights=weights, refresh=hook, max_tokens=12)
        before = await consulted(served, 1)
        await served.refresh(halved(folder), 1)
        await served.refresh(halved(folder), 2)
        after = await consulted(served, 1)
        await served.close()
        async with AsyncEngine.from_model(folder) as engine:
            here = EnginePhysician(engine, "letters", max_tokens=12)
            await here.refresh(halved(folder), 2)
            return [before, after], await consulted(here, 1)

    [before, after], wanted = asyncio.run(main())
    said = [[m.token_ids for m in one.messages if m.role == "assistant"] for one in (before, after, wanted)]
    assert said[1] == said[2] != said[0]
    assert {v for m in told(after) if m["role"] == "assistant" for v in m["m3"]["meta"]["sampled"]["versions"]} == {2}
    assert [path.name for path in weights.iterdir()] == ["version-000002"]
    assert PolicyModel.load(weights / "version-000002").tensors().keys() == halved(folder).keys()


def physician(folder: Path, weights: Path, hook: str) -> ServedPhysician:
    return ServedPhysician("http://127.0.0.1:9/v1", "m", source=folder, weights=weights, refresh=hook)


def test_a_command_is_told_folder_and_version(folder, weights, tmp_path):
    line = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(' '.join(sys.argv[1:]))"
    served = physician(folder, weights, f'{sys.executable} -c "{line}" {{folder}} v{{version}}')
    asyncio.run(served.refresh(halved(folder), 3))
    assert (tmp_path / "told").read_text() == f"{weights}/version-000003 v3" and served.version == 3
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (weights / "version-000003").iterdir()
    }


FAILING = {
    "a command that fails": (f"{sys.executable} -c \"raise SystemExit('no room')\"", RuntimeError, "1: no room"),
    "nobody there": ("http://127.0.0.1:9/update", RuntimeError, "ConnectError"),
    "no hook": ("", ValueError, "want a URL or a command"),
}


@pytest.mark.parametrize(("hook", "error", "match"), FAILING.values(), ids=FAILING)
def test_weights_that_were_not_taken_are_an_error(folder, weights, hook, error, match):
    served = physician(folder, weights, hook)
    with pytest.raises(error, match=match):
        asyncio.run(served.refresh(halved(folder), 1))
    assert served.version == 0


def test_a_url_that_says_no_is_told(folder, weights, tmp_path):
    with serving(build(EngineBackend(AsyncEngine.from_model(folder), "letters"))) as url:
        served = physician(folder, weights, f"{url.removesuffix('/v1')}/update_weights_from_disk")
        with pytest.raises(RuntimeError, match=r"status 403: .*takes no weights"):
            asyncio.run(served.refresh(halved(folder), 1))


# -- a teacher there --------------------------------------------------------------------------------------------------
def test_a_teacher_on_our_server_says_what_one_here_says(folder, url):
    samples = draw_samples("t", streams=())

    async def main() -> list[torch.Tensor]:
        teacher = ServedTeacher(url, "letters")
        try:
            return await teacher.logprobs(samples)
        finally:
            await teacher.close()

    wanted = asyncio.run(ModelTeacher(PolicyModel.load(folder), "here").logprobs(samples))
    for one, other in zip(asyncio.run(main()), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
