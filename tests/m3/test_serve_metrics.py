"""What /metrics tells, and what the log tells: numbers of requests, and nothing that was said."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_cases import make_draft
from letters_model import make_letters_model
from loopback import EchoBackend, ask, serving, until
from prometheus_client.parser import text_string_to_metric_families

from m3.engine.core import EngineCore
from m3.engine.engine import AsyncEngine
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.serve import logs
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend
from m3.serve.patient_backend import PatientBackend
from tests.m3.clinic_cases import small_case

TALK: Any = [{"role": "user", "content": "Hello, how are you?"}]
CHAT = {"path": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    with serving(build(EngineBackend(AsyncEngine.from_model(folder), "letters"))) as url:
        yield url


def told(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The value of each sample by its name and labels."""
    text = ask(f"{url.removesuffix('/v1')}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_the_numbers_are_those_of_the_requests(url):
    before = told(url)
    assert of(before, "m3_engine_requests", state="running") == of(before, "m3_generation_tokens_total") == 0
    asked: Any = {"model": "letters", "messages": TALK, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        first = client.chat.completions.create(**asked)
        list(client.chat.completions.create(**asked, stream=True))
        client.completions.create(model="letters", prompt="Hi", max_tokens=3, extra_body={"ignore_eos": True})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**asked, "messages": []})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("a/made/up/name")
    until(lambda: of(told(url), "m3_requests_under_way") == 0)
    now = told(url)
    prompt = first.usage.prompt_tokens
    assert of(now, "m3_prompt_tokens_total") == 2 * prompt + 2
    assert of(now, "m3_generation_tokens_total") == of(now, "m3_engine_generated_tokens_total") == 8 + 8 + 3
    assert of(now, "m3_requests_total", status="200", **CHAT) == 2
    assert of(now, "m3_requests_total", status="400", **CHAT) == 1
    assert of(now, "m3_requests_total", status="404", path="/v1/models/{name:path}") == 1
    assert not any("made" in str(key) for key in now)
    assert of(now, "m3_time_to_first_token_seconds_count", **CHAT) == 2
    assert of(now, "m3_inter_token_latency_seconds_count", **CHAT) <= 2 * 8
    assert of(now, "m3_request_seconds_count", **CHAT) == 3
    assert of(now, "m3_request_seconds_sum", **CHAT) >= of(now, "m3_time_to_first_token_seconds_sum", **CHAT) > 0
    assert of(now, "m3_engine_finished_total", reason="length") == 3
    assert of(now, "m3_engine_up") == 1


def test_the_cache_is_told(url):
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        for _ in range(2):
            client.chat.completions.create(
                model="letters", messages=[{"role": "user", "content": "x" * 60}], max_tokens=1
            )
    until(lambda: of(told(url), "m3_cache_pages", state="used") == 0)
    now = told(url)
    assert 0 < of(now, "m3_cache_pages", state="cached") < of(now, "m3_cache_pages", state="total")
    assert of(now, "m3_cached_prompt_tokens_total") == 64


DRAFT = ("m3_draft_tokens_total", "m3_accepted_tokens_total", "m3_draft_trees_total", "m3_acceptance_length")


def test_an_engine_without_a_draft_tells_zeros(url):
    now = told(url)
    assert [of(now, name) for name in DRAFT] == [0, 0, 0, 0]


def test_a_draft_is_told(folder):
    model = load_model(folder)
    engine = AsyncEngine(EngineCore(model, draft=make_draft(model)), Tokenizer(folder))
    asked: Any = {"model": "letters", "messages": TALK, "max_tokens": 40, "temperature": 0}
    asked |= {"n": 4, "extra_body": {"ignore_eos": True}}
    with serving(build(EngineBackend(engine, "letters"))) as url:
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            usage = client.chat.completions.create(**asked).usage.completion_tokens_details
        now = told(url)
    drafted, accepted, trees, length = (of(now, name) for name in DRAFT)
    assert drafted > 0 and trees > 0 and length == 1 + accepted / trees
    assert 1 <= length <= 1 + max(shape.steps for shape in engine.core.speculation.shapes), (
        "of a request, not of a batch"
    )
    assert usage.accepted_prediction_tokens == accepted
    assert usage.accepted_prediction_tokens + usage.rejected_prediction_tokens == drafted


def test_each_application_counts_alone():
    with serving(build(EchoBackend())) as one, serving(build(PatientBackend([small_case()]))) as other:
        body = json.dumps({"model": "echo", "messages": TALK})
        assert ask(f"{one}/chat/completions", body).status == 200
        assert of(told(one), "m3_requests_total", status="200", **CHAT) == 1
        assert not any(name == "m3_requests_total" and dict(labels) == CHAT for name, labels in told(other))
        assert not any(name.startswith("m3_engine") for name, _ in told(other))


# -- the log ----------------------------------------------------------------------------------------------------------
SECRETS = ("my-chest-hurts", "key-secret", "made-up", "header-secret", "query-secret", "name-secret")


def everything(records: list[logging.LogRecord]) -> str:
    return "\n".join(form.format(record) for record in records for form in (logs.JsonLines(), logs.TextLines()))


def test_nothing_that_was_said_is_in_the_log(caplog):
    keys = ["key-secret"]
    app = build(EchoBackend(), api_keys=keys)
    with serving(app) as url, caplog.at_level(logging.DEBUG, logger="m3"):
        ok = {"model": "echo", "messages": [{"role": "user", "content": "my-chest-hurts"}]}
        fails = {"model": "echo", "messages": [{"role": "user", "content": "fail: my-chest-hurts"}]}
        wrong = [{**ok, "model": "name-secret"}, {**ok, "name-secret": 1}, {**ok, "user": ["my-chest-hurts"]}]
        for row in [ok, {**ok, "stream": True}, fails, {**fails, "stream": True}, *wrong]:
            ask(f"{url}/chat/completions", json.dumps(row), key="key-secret")
        ask(f"{url}/chat/completions", "{my-chest-hurts", key="key-secret")
        ask(f"{url}/models/made-up", key="key-secret")
        ask(f"{url}/made-up?query-secret=1", key="key-secret")
        ask(f"{url}/models", key="key-secret-wrong")
        ask(f"{url}/models", key="key-secret", method="MADE-UP")
        until(lambda: sum(record.message == "request" for record in caplog.records) == 12)
    text = everything(caplog.records)
    assert not [secret for secret in SECRETS if secret in text.lower()]
    rows = [json.loads(logs.JsonLines().format(record)) for record in caplog.records]
    requests = [row for row in rows if row["event"] == "request"]
    assert [row["status"] for row in requests] == [200, 200, 500, 500, 404, 400, 400, 400, 404, 404, 401, 405]
    assert len({row["request_id"] for row in requests}) == 12
    assert {row["path"] for row in requests} == {
        "/v1/chat/completions", "/v1/models/{name:path}", "/v1/models", "unknown",
    }  # fmt: skip
    assert [row["error"] for row in rows if row["event"] == "failed"] == ["RuntimeError"] * 2


def test_a_line_of_the_log():
    record = logging.LogRecord("m3.serve", logging.INFO, "file", 1, "%s", ("request",), None)
    record.created, record.msecs = 0.25, 250.0
    record.fields = {"status": 200, "outcome": None}
    assert json.loads(logs.JsonLines().format(record)) == {
        "time": "1970-01-01T00:00:00.250Z", "level": "info", "logger": "m3.serve", "event": "request",
        "status": 200, "outcome": None,
    }  # fmt: skip
    assert logs.TextLines().format(record).endswith(" INFO m3.serve request status=200")


def test_an_exception_is_told_without_its_words():
    try:
        raise ValueError("my-chest-hurts")
    except ValueError as error:
        record = logging.LogRecord("a", 40, "f", 1, "broken", (), (ValueError, error, error.__traceback__))
    for form in (logs.JsonLines(), logs.TextLines()):
        line = form.format(record)
        assert "ValueError" in line and "test_serve_metrics.py" in line and "my-chest-hurts" not in line
