"""Who may ask, and how much: API keys, limits, rates, and a body that is read no further than allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.requests import Request

from m3.serve.schema import RequestError
from m3kernels.checks import refuse

OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/version", "/openapi.json", "/", "/favicon.ico")
OPEN_FOLDERS = ("/consult/",)  # the page's files
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?(?:"|\Z)', re.DOTALL)  # of JSON, whole or not; linear in any input
BRACKET = re.compile(rb"[\[\]{}]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask for; the numbers are ours.

    body_bytes, body_seconds: of a request, until all of it has come. header_bytes, header_seconds: of its head (the
    command's server keeps them). depth: of nested JSON. messages: of a chat. n: answers to a prompt; choices: answers
    of a request, all its prompts together. at_once: requests under way, of the server; at_once_a_key: of a key (or of
    everybody, where there are no keys). a_minute: requests of a key; None: any number.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    header_bytes: int = 32 * 2**10
    header_seconds: float = 15.0
    depth: int = 64
    messages: int = 2048
    n: int = 16
    choices: int = 256
    at_once: int = 512
    at_once_a_key: int = 512
    a_minute: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise refuse("Limits", field.name, "above 0", value)

    def check_answers(self, n: int, prompts: int = 1) -> None:
        """Raises RequestError 400: more answers than a request may ask for."""
        if n > self.n:
            raise RequestError(400, f"n: want at most {self.n}", param="n")
        if n * prompts > self.choices:
            raise RequestError(400, f"prompt: want at most {self.choices} answers in all", param="prompt")


class Keys:
    """API keys; with none, anything goes. They are kept as digests, and all of them are compared each time."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        if any(not key or key != key.strip() for key in keys):
            raise refuse("serve", "api_keys", "keys without space around them", "an empty one, or one with space")
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: str) -> int | None:
        """The number of the key in a header "Bearer KEY", read as Latin-1; None: no key of ours."""
        kind, _, sent = authorization.partition(" ")
        digest, found = _digest(sent.strip().encode("latin-1", "replace")), None
        for number, key in enumerate(self._digests):
            if hmac.compare_digest(digest, key):
                found = number
        return found if kind.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(file: Path) -> list[str]:
    """Keys of a file, one a line; empty lines and those that begin with # are none."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def is_open(path: str) -> bool:
    """Whether a path wants no key; whatever is not named here does."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class Bucket:
    """So many a minute, of which as many at once (a token bucket)."""

    def __init__(self, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.a_minute, self._clock = a_minute, clock
        self._left, self._then = float(a_minute), clock()

    def take(self) -> float:
        """Take one; 0, or the seconds until there is one."""
        now = self._clock()
        self._left = min(self.a_minute, self._left + (now - self._then) * self.a_minute / 60)
        self._then = now
        if self._left < 1:
            return (1 - self._left) * 60 / self.a_minute
        self._left -= 1
        return 0.0


# -- bodies -----------------------------------------------------------------------------------------------------------
async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, read no further than allowed, not nested deeper than allowed.

    Raises:
        RequestError: 413: too long; 408: it did not come in time; 400: nested too deep.
    """
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.body_bytes)
    except TimeoutError as error:
        want = f"body: want all of it within {limits.body_seconds:g} seconds"
        raise RequestError(408, want, code="request_timeout", headers={"Connection": "close"}) from error
    if depth(body) > limits.depth:
        raise RequestError(400, f"body: want JSON nested at most {limits.depth} deep", code="json_too_deep")
    return body


async def _read(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "")
    body = bytearray()
    if not (told.isdecimal() and len(told) < 20 and int(told) > most):
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise RequestError(
        413, f"body: want at most {most} bytes", code="request_too_large", headers={"Connection": "close"}
    )


def depth(body: bytes) -> int:
    """Brackets that are open at once, at most, outside strings; of any bytes."""
    deepest = now = 0
    for bracket in BRACKET.findall(STRING.sub(b"", body)):
        now += 1 if bracket in b"[{" else -1
        deepest = max(deepest, now)
    return deepest
