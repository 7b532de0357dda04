"""Who may ask, and how much: keys, origins, sizes, depths, rates, slow clients; what an error tells."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fastapi
import pytest
from loopback import EchoBackend, serving, until

from m3.serve import security
from m3.serve.app import build
from m3.serve.listening import Protocol
from m3.serve.security import Bucket, Keys, Limits, depth, read_keys

KEYS = ["key-one", "key-two", "clé"]
ROW = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}


class Answered:
    """A response, with its headers."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


def ask(url: str, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answered:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    with contextlib.closing(connection):
        sent = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
        connection.request(method, path, body, sent)
        return Answered(connection.getresponse())


def chat(url: str, row: Any = ROW, **headers: str) -> Answered:
    return ask(url, "/v1/chat/completions", method="POST", body=json.dumps(row).encode(), **headers)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build(EchoBackend(), api_keys=KEYS)) as url:
        yield url


# -- keys -------------------------------------------------------------------------------------------------------------
GUARDED = ["/v1/models", "/v1/models/echo", "/v1/nothing", "/metrics", "/tokenize", "/detokenize", "/nothing",
           "/update_weights_from_disk", "/v1", "//v1/models"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_good(url, key):
    assert chat(url, Authorization=f"Bearer {key}").status == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer key-on", "Bearer key-onee", "Basic key-one", "key-one"])
def test_another_is_not(url, header):
    got = chat(url, Authorization=header)
    assert (got.status, got.error["code"], got.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_all_but_health_is_guarded(url, path, method):
    assert ask(url, path, method=method).status == 401


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/version", "/openapi.json"])
def test_health_is_open(url, path):
    assert ask(url, path).status == 200


def test_the_schema_says_what_is_guarded():
    paths = build(EchoBackend(), api_keys=KEYS, page=True).openapi()["paths"]
    opened = {path for path, methods in paths.items() if not any("security" in one for one in methods.values())}
    assert opened == {"/health", "/health/live", "/health/ready", "/version"}


def test_the_page_is_open():
    with serving(build(EchoBackend(), api_keys=KEYS, page=True)) as url:
        assert [ask(url, path).status for path in ("/", "/consult/consult.js", "/consult/none")] == [200, 200, 404]


def test_all_keys_are_compared(monkeypatch):
    compared = []

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(security.hmac, "compare_digest", spy)
    keys = Keys(KEYS)
    sent = [f"Bearer {key}".encode().decode("latin-1") for key in (*KEYS, "x")]
    assert [keys.find(header) for header in sent] == [0, 1, 2, None]
    assert compared == [(32, 32)] * 12


@pytest.mark.parametrize("key", ["", " a", "a\n"])
def test_a_key_that_nobody_can_send_is_refused(key):
    with pytest.raises(ValueError, match="api_keys"):
        Keys(["b", key])


def test_keys_of_a_file(tmp_path):
    (tmp_path / "keys").write_text("# ours\none\n\n  two \n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]


# -- origins ----------------------------------------------------------------------------------------------------------
def test_no_other_origin_may_ask(url):
    got = ask(url, "/v1/models", Authorization="Bearer key-one", Origin="https://evil.example")
    assert got.status == 200 and "access-control-allow-origin" not in got.headers
    got = ask(url, "/v1/models", method="OPTIONS", Origin="https://evil.example", Access_Control_Request_Method="GET")
    assert "access-control-allow-origin" not in got.headers


def test_an_origin_that_was_named_may():
    with serving(build(EchoBackend(), api_keys=KEYS, cors=["https://clinic.example"])) as url:
        good = {"Origin": "https://clinic.example"}
        asked = ask(url, "/v1/chat/completions", method="OPTIONS", Access_Control_Request_Method="POST", **good)
        assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, "https://clinic.example")
        assert chat(url, Authorization="Bearer key-one", **good).headers["access-control-allow-origin"]
        got = chat(url, **good)  # its page can read why
        assert got.status == 401 and got.headers["access-control-allow-origin"] == "https://clinic.example"
        assert "access-control-allow-origin" not in chat(url, Origin="https://evil.example").headers


# -- ids --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_every_answer_has_an_id(url, path):
    assert len(ask(url, path).headers["x-request-id"]) == 32
    assert ask(url, path, X_Request_Id="mine-1.a_b").headers["x-request-id"] == "mine-1.a_b"


@pytest.mark.parametrize("sent", ["a b", "a" * 129, 'a"', "é", "{}"])
def test_a_strange_id_is_not_taken(url, sent):
    assert ask(url, "/health", X_Request_Id=sent).headers["x-request-id"] != sent


# -- sizes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"", 0), (b"[]", 1), (b'{"a": [[1], {"b": []}]}', 4), (b'"[[["', 0), (rb'["\"[[", [1]]', 2),
        (b"[" * 9, 9), (b'"[[[', 0), (b'["\\', 1), (b"]]][[", 0), (rb'"\\"[[', 2), (b'"a"[{"[": "{"}]', 2),
    ],
)  # fmt: skip
def test_the_depth_of_a_body(body, wanted):
    assert depth(body) == wanted


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'"\\', b"[", b'"a', b'["\\"'])
def test_the_depth_is_found_in_one_pass(piece):
    body = piece * (2**20 // len(piece))
    begun = time.process_time()
    depth(body)
    assert time.process_time() - begun < 2


def limited(**limits: Any) -> contextlib.AbstractContextManager[str]:
    return serving(build(EchoBackend(), limits=Limits(**limits)))


def deep(levels: int) -> dict[str, Any]:
    inner: Any = {}
    for _ in range(levels - 2):
        inner = {"a": inner}
    return {**ROW, "chat_template_kwargs": inner}


def test_limits_of_a_request():
    with limited(depth=10, messages=3, n=2) as url:
        assert (chat(url, deep(10)).status, chat(url, deep(11)).error["code"]) == (200, "json_too_deep")
        brackets = {**ROW, "messages": [{"role": "user", "content": "[{" * 50}]}
        assert chat(url, brackets).status == 200
        assert chat(url, {**ROW, "messages": ROW["messages"] * 4}).error["param"] == "messages"
        assert chat(url, {**ROW, "n": 3}).error["param"] == "n"


def test_a_body_that_says_it_is_too_long_is_not_read():
    with limited(body_bytes=1000) as url:
        host, port = urllib.parse.urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_in_time_is_given_up():
    with limited(body_seconds=0.2) as url:
        host, port = urllib.parse.urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{")
            said = b"".join(iter(lambda: connection.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 408") and b"request_timeout" in said


@pytest.mark.parametrize(("name", "value"), [("depth", 0), ("body_seconds", -1.0), ("a_minute", 0)])
def test_a_limit_of_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"Limits: {name}"):
        Limits(**{name: value})


# -- rates ------------------------------------------------------------------------------------------------------------
def test_so_many_a_minute():
    now = [0.0]
    bucket = Bucket(6, lambda: now[0])
    assert [bucket.take() for _ in range(7)] == [0] * 6 + [10.0]
    now[0] = 10.0
    assert [bucket.take(), bucket.take()] == [0, 10.0]
    now[0] = 1e6
    assert [bucket.take() for _ in range(7)] == [0] * 6 + [10.0]


def test_the_rate_is_of_a_key():
    with serving(build(EchoBackend(), api_keys=KEYS, limits=Limits(a_minute=2))) as url:
        first = [chat(url, Authorization="Bearer key-one") for _ in range(3)]
        assert [got.status for got in first] == [200, 200, 429]
        assert first[2].error["code"] == "rate_limit_exceeded" and 1 <= int(first[2].headers["retry-after"]) <= 30
        assert chat(url, Authorization="Bearer key-two").status == 200
        assert ask(url, "/v1/models", Authorization="Bearer key-one").status == 200


@pytest.mark.parametrize("limit", ["at_once", "at_once_a_key"])
def test_so_many_at_once(limit):
    backend = EchoBackend()
    with serving(build(backend, api_keys=KEYS, limits=Limits(**{limit: 1}))) as url:
        hangs = {"model": "echo", "messages": [{"role": "user", "content": "then hang"}], "stream": True}
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(hangs), {"Authorization": "Bearer key-one"})
        connection.getresponse().read(20)
        got = chat(url, Authorization="Bearer key-one")
        assert (got.status, got.error["code"], got.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert chat(url, Authorization="Bearer key-two").status == (200 if limit == "at_once_a_key" else 429)
        connection.close()
        until(lambda: chat(url, Authorization="Bearer key-one").status == 200)


# -- errors -----------------------------------------------------------------------------------------------------------
def test_every_error_is_an_error_object(url):
    key = {"Authorization": "Bearer key-one"}
    got = [
        ask(url, "/v1/nothing", **key),
        ask(url, "/v1/models/", method="PUT", **key),
        ask(url, "/v1/chat/completions", method="POST", body=b"{", **key),
        ask(url, "/v1/models/other", **key),
    ]
    assert [(one.status, one.error["type"]) for one in got] == [
        (404, "invalid_request_error"), (405, "invalid_request_error"),
        (400, "invalid_request_error"), (404, "invalid_request_error"),
    ]  # fmt: skip
    assert got[1].headers["allow"] == "GET"


def test_a_mistake_of_ours_outside_a_backend_tells_nothing(caplog):
    app = build(EchoBackend())

    async def broken(request: fastapi.Request) -> None:
        raise RuntimeError("secret")

    app.add_api_route("/broken", broken)
    with serving(app) as url:
        got = ask(url, "/broken")
    assert (got.status, got.error["type"], got.error["code"]) == (500, "server_error", "internal_error")
    assert b"secret" not in got.body and "secret" not in caplog.text and "RuntimeError" in str(got.error)


# -- the process's own ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def listening() -> Iterator[tuple[str, int]]:
    """The command's server, patient for half a second, on a thread."""
    import uvicorn

    protocol = type("Quick", (Protocol,), {"head_seconds": 0.5})
    app = build(EchoBackend())
    config = uvicorn.Config(
        app, port=0, http=protocol, log_config=None, h11_max_incomplete_event_size=4096, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[:2]
    server.should_exit = True
    thread.join(20)


def say(address: tuple[str, int], data: bytes) -> bytes:
    """What is answered until the connection is closed."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_head_that_is_too_long(listening):
    got = say(listening, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 9000)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431") and json.loads(body)["error"]["code"] == "invalid_http"


def test_a_head_that_is_no_http(listening):
    got = say(listening, b"nonsense\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 400") and b'"invalid_http"' in got and b"nonsense" not in got


@pytest.mark.parametrize(
    "begun", [b"", b"GET /health HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
def test_a_head_that_does_not_come_is_given_up(listening, begun):
    started = time.monotonic()
    say(listening, begun)
    assert 0.3 < time.monotonic() - started < 5


def test_a_slow_answer_is_not_given_up(listening):
    row = {"model": "echo", "messages": [{"role": "user", "content": "then hang"}], "stream": True}
    body = json.dumps(row).encode()
    with socket.create_connection(listening, timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(100)
        time.sleep(0.8)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            while connection.recv(65536):
                pass
