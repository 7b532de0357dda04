"""A client and a keeper of OpenAI-compatible servers, as the serving benchmarks need them: thin, so that it costs the
machine little, and exact about when each piece of a stream came."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from bench import harness

OPEN_LIMIT = 600.0  # seconds until a server answers
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass
class Stream:
    """What came of one streamed request. ``times``: of the pieces with text, seconds on the monotonic clock."""

    sent: float
    status: int = 0
    text: str = ""
    times: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None  # an error event, or the body of a refusal
    done: bool = False  # [DONE] came
    completion_tokens: int | None = None

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None where there are fewer than two."""
        tokens = self.completion_tokens or 0
        return (self.times[-1] - self.times[0]) / (tokens - 1) if tokens > 1 and self.times else None


async def events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of server-sent events."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


async def stream(
    client: httpx2.AsyncClient, path: str, body: Mapping[str, Any], *, leave_after: int | None = None
) -> Stream:
    """Send a request and read its stream to the end.

    Args:
        leave_after: hang up after so many pieces of text.
    """
    found = Stream(sent=time.monotonic())
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=request) as response:
        found.status = response.status_code
        if response.status_code != 200:
            found.error = (await response.aread()).decode(errors="replace")
            return found
        async for data in events(response):
            if data == "[DONE]":
                found.done = True
                break
            take(found, json.loads(data))
            if leave_after is not None and len(found.times) >= leave_after:
                break
    return found


def take(found: Stream, row: Mapping[str, Any]) -> None:
    """A chunk of a chat or of a completion."""
    if "error" in row:
        found.error = json.dumps(row["error"])
        return
    if row.get("usage"):
        found.completion_tokens = row["usage"]["completion_tokens"]
    for choice in row["choices"]:
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        if piece:
            found.times.append(time.monotonic())
            found.text += piece
        found.finish_reason = choice.get("finish_reason") or found.finish_reason


# -- servers ----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A server in a process group of its own; what it says goes to ``log``."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> None:
        self.port, self.log = port, log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=dict(environment),
                cwd=log.parent,  # not where a checkout's metadata would be found before others
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, limit: float = OPEN_LIMIT) -> None:
        """Raises harness.UnavailableError if it ends or does not answer in ``limit`` seconds."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise harness.UnavailableError(self.last_words())
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        raise harness.UnavailableError(f"no answer in {limit:.0f} s")

    def last_words(self) -> str:
        """The end of its log: what went wrong."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line or "error" in line]
        return (wrong or lines or ["it ended without a word"])[-1][:200]

    def pids(self) -> list[int]:
        """Of the process and its descendants."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    parents.setdefault(parent, []).append(int(entry.name))
        found, queue = [], [self.process.pid]
        while queue:
            found.append(queue.pop())
            queue += parents.get(found[-1], [])
        return found

    def resident_bytes(self) -> int:
        """Of all its processes; what they share counts for each."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        return total

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it and all of its group."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
