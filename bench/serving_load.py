"""`m3 serve` under a crowd: many streaming clients for minutes, some of whom hang up, some of whom send nonsense.

What the server must do, and what is counted where it does not: every whole stream says what the same request said when
it was alone, and a stream that its client left is a beginning of it; nonsense is answered with an error below 500; when
all is over no page of the cache is in use; memory does not grow; and SIGTERM under load ends every stream with its last
event or an error, and the process with status 0.

    python -m bench serving_load --minutes 5 --clients 64 --draft DRAFT
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from bench import harness, record
from bench.engine_inputs import Case, Models, Prompts
from bench.serving import ENTRANTS as ARMS
from bench.serving import Plan, command, environment
from bench.serving_client import Server, Stream, free_port, stream
from bench.vllm_server import NAME
from m3.models.tokenizer import Tokenizer

KINDS = 48  # different requests
LEAVE, NONSENSE = 0.2, 0.05  # shares of the requests
NONSENSES: tuple[bytes | dict[str, Any], ...] = (
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    {"model": NAME},
    {"model": "another", "messages": [{"role": "user", "content": "A"}]},
    {"model": NAME, "messages": [{"role": "wizard", "content": "A"}]},
    {"model": NAME, "messages": [{"role": "user", "content": "A"}], "temperature": -1},
    {"model": NAME, "messages": [{"role": "user", "content": "A"}], "max_tokens": "many"},
    {"model": NAME, "messages": [{"role": "user", "content": "A"}], "no_such_field": 1},
    {"model": NAME, "messages": [{"role": "user", "content": "A " * 20000}]},
)
PAGES_USED = 'm3_cache_pages{state="used"}'
SETTLE = 30.0  # seconds that pages may take to come back
END_LIMIT = 60.0  # seconds from SIGTERM to the end of the process


@dataclasses.dataclass
class Ask:
    """A request, and what it says when it is alone."""

    path: str
    body: dict[str, Any]
    text: str = ""
    finish_reason: str | None = None


@dataclasses.dataclass
class Crowd:
    """What the clients saw."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    first: list[float] = dataclasses.field(default_factory=list)
    gaps: list[float] = dataclasses.field(default_factory=list)
    per_token: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def wrong(self, what: str, example: str) -> None:
        self.counts[what] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{what}: {example}"[:300])


def asks(prompts: Prompts, seed: int) -> list[Ask]:
    """Chats and completions of random lengths; greedy, and drawn with a seed."""
    draw, found = random.Random(seed), []
    for index in range(KINDS):
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0}
        body = {"model": NAME, "max_tokens": draw.randint(1, 48), **sampled}
        case = Case(name="load", batch=1, depth=draw.choice((64, 96, 160, 300)), count=1)
        tokens = prompts.batch(case, index)[0]
        if index % 3:
            text = prompts.tokenizer.decode(tokens)[: draw.randint(40, 600)]
            found.append(Ask("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}))
        else:
            found.append(Ask("/v1/completions", {**body, "prompt": tokens}))
    return found


async def learn(client: httpx2.AsyncClient, known: list[Ask]) -> None:
    """What each says alone."""
    for ask in known:
        answer = await stream(client, ask.path, ask.body)
        if not answer.done or answer.error:
            raise harness.UnavailableError(f"alone: {answer.error or 'a stream broke off'}"[:300])
        ask.text, ask.finish_reason = answer.text, answer.finish_reason


async def work(client: httpx2.AsyncClient, known: list[Ask], until: float, crowd: Crowd, draw: random.Random) -> None:
    """One client: a request after another."""
    while time.monotonic() < until:
        chance, ask = draw.random(), draw.choice(known)
        leave = draw.randint(1, 8) if chance < NONSENSE + LEAVE else None
        try:
            if chance < NONSENSE:
                await send_nonsense(client, crowd, draw)
            else:
                judge(await stream(client, ask.path, ask.body, leave_after=leave), ask, leave is not None, crowd)
        except httpx2.TransportError as error:
            crowd.wrong("errors", f"{type(error).__name__}: {error}")


async def send_nonsense(client: httpx2.AsyncClient, crowd: Crowd, draw: random.Random) -> None:
    body = draw.choice(NONSENSES)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    crowd.counts["nonsense"] += 1
    if not 400 <= answer.status_code < 500 or "error" not in answer.json():
        crowd.wrong("nonsense taken", f"{answer.status_code} for {content[:80]!r}")


def judge(answer: Stream, ask: Ask, left: bool, crowd: Crowd) -> None:
    if answer.status != 200 or answer.error:
        crowd.wrong("errors", f"{answer.status} {answer.error}")
        return
    if answer.times:
        crowd.first.append(answer.first)
    crowd.gaps += answer.gaps
    if left and not answer.done:
        crowd.counts["left"] += 1
        if not ask.text.startswith(answer.text):
            crowd.wrong("wrong streams", f"want a beginning of {ask.text!r}; got {answer.text!r}")
        return
    crowd.counts["whole"] += 1
    crowd.tokens += answer.completion_tokens or 0
    if answer.per_token is not None:
        crowd.per_token.append(answer.per_token)
    if not answer.done:
        crowd.wrong("broken streams", answer.text)
    elif (answer.text, answer.finish_reason) != (ask.text, ask.finish_reason):
        crowd.wrong("wrong streams", f"want {ask.text!r}; got {answer.text!r}")


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """Samples of /metrics by name and labels, those of histograms apart."""
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "seconds" not in line]
    return {name: float(value) for name, value in pairs}


async def watch(server: Server, samples: list[tuple[float, int]], until: float) -> None:
    """Resident memory, once a second."""
    while time.monotonic() < until:
        samples.append((time.monotonic(), server.resident_bytes()))
        await asyncio.sleep(1)


async def pages_back(client: httpx2.AsyncClient) -> float:
    """Pages in use when nothing is asked any more, after SETTLE seconds at most."""
    deadline = time.monotonic() + SETTLE
    while True:
        used = (await metrics(client))[PAGES_USED]
        if used == 0 or time.monotonic() > deadline:
            return used
        await asyncio.sleep(0.2)


async def end_under_load(
    server: Server, client: httpx2.AsyncClient, known: list[Ask], clients: int, *, after: float = 3.0
) -> dict[str, Any]:
    """SIGTERM ``after`` seconds, with a stream for each client under way: how each ended, and the process."""
    outcomes: Counter[str] = Counter()

    async def one(index: int) -> None:
        ask = known[index % len(known)]
        try:
            answer = await stream(client, ask.path, {**ask.body, "max_tokens": 400, "ignore_eos": True})
        except httpx2.ConnectError:
            outcomes["never sent"] += 1
            return
        except httpx2.TransportError:
            outcomes["cut"] += 1  # neither a last event nor an error
            return
        refused = answer.status != 200
        whole = answer.finish_reason is not None and answer.done
        outcomes["refused" if refused else "whole" if whole else "told" if answer.error else "cut"] += 1

    tasks = [asyncio.create_task(one(index)) for index in range(clients)]
    await asyncio.sleep(after)
    started = time.monotonic()
    server.terminate()
    await asyncio.gather(*tasks)
    status = await asyncio.to_thread(server.process.wait, END_LIMIT)
    return {"streams": dict(outcomes), "status": status, "seconds": round(time.monotonic() - started, 2)}


async def measure(server: Server, prompts: Prompts, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    limits = httpx2.Limits(max_connections=clients + 2)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        known, crowd, samples = asks(prompts, seed), Crowd(), []
        await learn(client, known)
        started = time.monotonic()
        until = started + seconds
        workers = [work(client, known, until, crowd, random.Random(f"{seed}-{index}")) for index in range(clients)]
        await asyncio.gather(watch(server, samples, until), *workers)
        elapsed = time.monotonic() - started
        leaked, told = await pages_back(client), await metrics(client)
        ended = await end_under_load(server, client, known, clients)
    return {
        "seconds": round(elapsed, 1),
        "counts": dict(crowd.counts),
        "examples": crowd.examples,
        "tokens_s": round(crowd.tokens / elapsed, 1),
        "first_token_s": quantiles(crowd.first),
        "token_s": quantiles(crowd.per_token),
        "gap_s": quantiles(crowd.gaps),
        "pages_left": leaked,
        "memory_mb": growth(samples),
        "metrics": {name: told[name] for name in sorted(told) if name.startswith("m3_") and "_created" not in name},
        "end": ended,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(harness.quantile(values, q / 100), 4) for q in (50, 95, 99)} if values else {}


def growth(samples: list[tuple[float, int]]) -> dict[str, float]:
    """Resident memory, MB: medians of five equal parts of the time."""
    parts = [samples[len(samples) * part // 5 : len(samples) * (part + 1) // 5] for part in range(5)]
    return {
        f"fifth {number}": round(harness.quantile([size for _, size in part], 0.5) / 1e6, 1)
        for number, part in enumerate(parts, 1)
        if part
    }


def failures(row: dict[str, Any]) -> list[str]:
    """What the server did not do as it must."""
    counts, found = row["counts"], []
    found += [f"{counts[what]} {what}" for what in WRONG if counts.get(what)]
    if row["pages_left"]:
        found.append(f"{row['pages_left']:.0f} pages still in use")
    sizes = list(row["memory_mb"].values())
    if len(sizes) == 5 and sizes[4] > sizes[1] * 1.02:
        found.append(f"memory grew from {sizes[1]} to {sizes[4]} MB")
    if row["end"]["status"] != 0 or row["end"]["streams"].get("cut"):
        found.append(f"SIGTERM: {row['end']}")
    return found


WRONG = ("errors", "wrong streams", "broken streams", "nonsense taken")


# -- the command ------------------------------------------------------------------------------------------------------
def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draft", help="folder of a draft model; without it the server decodes plainly")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "serving" / "load.jsonl")


def carry_out(arguments: argparse.Namespace) -> int:
    """One row; status 1 where the server failed in anything."""
    models, port = Models({}), free_port()
    name = "m3_int4_draft" if arguments.draft else "m3_int4"
    plan = Plan(clients=(arguments.clients,), threads=arguments.threads, draft=arguments.draft)
    line = command(ARMS[name], plan, models.path("int4"), port)
    server = Server(line, port, models.folder / "serving_load.log", environment("m3", arguments.threads, models.folder))
    try:
        server.wait_until_ready()
        prompts = Prompts(Tokenizer(models.path("checkpoint")))
        found = asyncio.run(measure(server, prompts, arguments.clients, arguments.minutes * 60, arguments.seed))
    finally:
        server.close()
    commit, dirty = record.commit()
    about = {"op": "serving_load", "arm": name, "clients": arguments.clients, "threads": arguments.threads}
    place = {"machine": record.machine(), "commit": commit, "dirty": dirty, "date": record.now()}
    row = {**about, **found, **place, "command": record.command()}
    row["failures"] = failures(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key not in place}, indent=1))
    for text in row["failures"]:
        print(f"FAILED: {text}", file=sys.stderr)
    return 1 if row["failures"] else 0
