"""What /openapi.json promises, held to by schemathesis: requests made from the schema, good and bad, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from letters_model import make_letters_model
from loopback import serving
from schemathesis.specs.openapi.checks import positive_data_acceptance

from m3.engine.engine import AsyncEngine
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend
from m3.text.embed import LexicalEmbedder

KEY = "k"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", max_tokens=4, embedder=LexicalEmbedder(8))
    with serving(build(backend, api_keys=[KEY])) as url:
        yield url.removesuffix("/v1")


@pytest.fixture(scope="module")
def api(url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


EMBEDS = "/v1/embeddings"


def sent(case: schemathesis.Case) -> None:
    """Send it, with a model that is there (else nearly all would be 404), and few tokens; check the answer.

    A body of the right form may still be refused: fields that exclude each other, tokens that the model lacks.
    """
    body: Any = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = "lexical-8" if case.path == EMBEDS else "letters"
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) is int and body[name] > 4:
                body[name] = 4
    response = case.call(headers={"Authorization": f"Bearer {KEY}"})
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"} or case.path.startswith("/health")


OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/update_weights_from_disk"),
]
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
CASES = [(*operation, mode) for operation in OPERATIONS for mode in MODES if operation[0] == "POST" or mode is MODES[0]]
IDS = [f"{method} {path} {mode.value}" for method, path, mode in CASES]


def test_every_operation_is_tried(api):
    assert {(one.ok().method.upper(), one.ok().path) for one in api.get_all_operations()} == set(OPERATIONS)


def try_cases(api: schemathesis.BaseSchema, method: str, path: str, mode: Any, count: int) -> None:
    operation = api[path][method]

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        sent(case)

    run()


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=IDS)
def test_the_schema_is_kept(api, method, path, mode):
    try_cases(api, method, path, mode, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=IDS)
def test_the_schema_is_kept_for_long(api, method, path, mode):
    try_cases(api, method, path, mode, 400)
