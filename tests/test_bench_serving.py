"""The serving benchmarks: what they count of a server, against a stand-in that can be told to misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bench import harness, record, serving, serving_load, serving_report
from bench.engine_inputs import Case
from bench.serving import ENTRANTS, Plan, ServerArm, Visit, closed_loop, latencies
from bench.serving_client import Server, Stream, free_port, stream
from bench.serving_load import Ask, Crowd, failures, growth, judge

# Writes the sum of its prompt, a digit a piece: "b" after it where the request is told to break off or to err.
STAND_IN = """
import asyncio, json, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

if sys.argv[2] == "dies":
    raise RuntimeError("Error: no such model")

async def completions(request):
    try:
        body = await request.json()
        count, prompt = int(body["max_tokens"]), body["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return JSONResponse({"error": {"message": "want more"}}, 400)
    async def events():
        for place in range(count):
            await asyncio.sleep(0.002)
            yield "data: %s\\n\\n" % json.dumps({"choices": [{"text": str((sum(prompt) + place) % 10)}]})
            if body.get("how") == "errs":
                yield 'data: {"error": {"message": "it failed"}}\\n\\n'
            if body.get("how") == "breaks":
                return
        yield "data: %s\\n\\n" % json.dumps({"choices": [{"text": "", "finish_reason": "length"}]})
        yield "data: %s\\n\\n" % json.dumps({"choices": [], "usage": {"completion_tokens": count}})
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")

app = Starlette(routes=[
    Route("/health", lambda request: JSONResponse({})),
    Route("/version", lambda request: JSONResponse({"version": "7"})),
    Route("/metrics", lambda request: PlainTextResponse("# HELP\\nm3_cache_pages{state=\\"used\\"} 0.0\\nm3_x 1\\n")),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", completions, methods=["POST"]),
])
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
PATH = "/v1/completions"


def start(folder: Path, how: str = "serves") -> Server:
    port = free_port()
    return Server([sys.executable, "-c", STAND_IN, str(port), how], port, folder / "log", os.environ)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("server"))
    try:
        found.wait_until_ready(60)
        yield found
    finally:
        found.close()


def ask(server: Server, body: dict[str, Any], **options: Any) -> Stream:
    async def one() -> Stream:
        async with httpx2.AsyncClient(base_url=server.url) as client:
            return await stream(client, PATH, body, **options)

    return asyncio.run(one())


# -- a stream ---------------------------------------------------------------------------------------------------------
def test_a_stream_is_read_to_its_end(server: Server) -> None:
    found = ask(server, {"prompt": [3], "max_tokens": 5})
    assert (found.text, found.done, found.finish_reason, found.completion_tokens) == ("34567", True, "length", 5)
    assert len(found.times) == 5 and found.first > 0 and len(found.gaps) == 4
    assert found.per_token == pytest.approx(sum(found.gaps) / 4)


def test_a_client_leaves_after_some_pieces(server: Server) -> None:
    found = ask(server, {"prompt": [3], "max_tokens": 500}, leave_after=2)
    assert (found.text, found.done, found.completion_tokens) == ("34", False, None)


def test_errors_are_seen_before_and_in_a_stream(server: Server) -> None:
    refused = ask(server, {"prompt": [3]})
    assert refused.status == 400 and refused.error is not None and "want more" in refused.error
    assert not ask(server, {"prompt": [3], "max_tokens": 4, "how": "breaks"}).done
    told = ask(server, {"prompt": [3], "max_tokens": 1, "how": "errs"})
    assert told.error is not None and "it failed" in told.error


# -- servers side by side ---------------------------------------------------------------------------------------------
def test_clients_of_a_closed_loop_answer_in_order(server: Server) -> None:
    prompts = [[number] for number in range(9)]
    found = asyncio.run(closed_loop(server.url, prompts, 4, {"max_tokens": 2}))
    assert [each.text for each in found] == [f"{n % 10}{(n + 1) % 10}" for n in range(9)]


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    server = start(tmp_path, "dies")
    with pytest.raises(harness.UnavailableError, match="no such model"):
        server.wait_until_ready(60)
    server.close()


def test_an_arm_whose_answer_broke_off_is_absent(server: Server) -> None:
    arm = ServerArm("m3_int4", ENTRANTS["m3_int4"], server, serving.software("m3", server.url))
    assert arm.software == "m3 7"
    assert [each.text for each in arm.ask([[1], [2]], 2, {"max_tokens": 1})] == ["1", "2"]
    with pytest.raises(harness.UnavailableError, match="broke off"):
        arm.ask([[1], [2]], 2, {"max_tokens": 2, "how": "breaks"})


def test_an_arm_that_is_not_served_says_what_it_needs() -> None:
    with pytest.raises(harness.UnavailableError, match="--program llama=PATH"):
        serving.program(Plan(), "llama")
    with pytest.raises(ValueError, match="serving: arms: want some of"):
        Plan(arms=("nobody",))
    with_draft = serving.command(ENTRANTS["m3_int4_draft"], Plan(draft="/here"), Path("model"), 1)
    plain = serving.command(ENTRANTS["m3_int4"], Plan(draft="here"), Path("model"), 1)
    assert with_draft == [*plain, "--draft", "/here"]


def row_of(server: Server, name: str, texts: list[str], seconds: float, tokens: int = 4) -> ServerArm:
    arm = ServerArm(name, ENTRANTS[name], server, "stand-in 7")
    arm.case = Case(name="c1", batch=len(texts), depth=8, count=4)
    streams = [
        Stream(sent=0, status=200, text=text, times=[0.5, 0.6, 0.8], done=True, completion_tokens=tokens)
        for text in texts
    ]
    arm.visits = [Visit(seconds=seconds, streams=streams)] * 3
    return arm


def test_a_draft_that_changes_the_text_and_a_wrong_length_get_no_time(server: Server) -> None:
    plain, same = row_of(server, "m3_int4", ["a"], 1), row_of(server, "m3_int4_draft", ["a"], 1)
    other = row_of(server, "m3_int4_draft", ["b"], 1)
    assert not serving.differs(same, [plain, same]) and serving.differs(other, [plain, other])
    assert serving.wrong_lengths(row_of(server, "m3_int4", ["a"], 1, tokens=3)) and not serving.wrong_lengths(plain)


def test_rows_and_their_table(server: Server, tmp_path: Path) -> None:
    arms = [row_of(server, "m3_int4_draft", ["a", "b"], 2.0), row_of(server, "llama_q4_0", ["a", "b"], 3.0)]
    gates = {arm.name: harness.Gate(error=0.01, tolerance=0.05) for arm in arms}
    found = serving.rows(arms[0].case, 1, Plan(), arms, gates, {"vllm_bf16": "not here"})
    record.append(tmp_path / "rows.jsonl", found)
    assert record.read(tmp_path / "rows.jsonl") == found
    absent, ours, theirs = found
    assert absent.gate == "absent: not here" and absent.requests_s is None
    assert (ours.requests_s, ours.tokens_s) == (1.0, 4.0) and theirs.requests_s == pytest.approx(2 / 3)
    assert ours.first_p50_s == 0.5 and ours.token_p50_s == pytest.approx(0.1)
    lines = serving_report.case_table(found).splitlines()
    assert lines[2].startswith("| m3_int4_draft") and "1.50 (1.50 - 1.50)" in lines[3] and "not here" in lines[4]
    assert len(serving_report.sections(found)) == 1


def test_latencies_are_over_all_streams() -> None:
    streams = [Stream(sent=0, times=[1, 2, 4], completion_tokens=3), Stream(sent=1, times=[4], completion_tokens=1)]
    found = latencies(streams)
    assert found["first_p50_s"] == 2.0 and found["token_p95_s"] == 1.5 and found["gap_p95_s"] == pytest.approx(1.95)


# -- a crowd ----------------------------------------------------------------------------------------------------------
KNOWN = Ask("/v1/chat/completions", {}, text="hello", finish_reason="stop")
WHOLE = Stream(sent=0, status=200, text="hello", finish_reason="stop", times=[1, 2], done=True, completion_tokens=2)


@pytest.mark.parametrize(
    ("answer", "left", "counted"),
    [
        (WHOLE, False, {"whole": 1}),
        (WHOLE, True, {"whole": 1}),  # it was over before its client left
        (dataclasses.replace(WHOLE, text="hel", done=False), True, {"left": 1}),
        (dataclasses.replace(WHOLE, text="her", done=False), True, {"left": 1, "wrong streams": 1}),
        (dataclasses.replace(WHOLE, text="hellO"), False, {"whole": 1, "wrong streams": 1}),
        (dataclasses.replace(WHOLE, finish_reason="length"), False, {"whole": 1, "wrong streams": 1}),
        (dataclasses.replace(WHOLE, done=False), False, {"whole": 1, "broken streams": 1}),
        (dataclasses.replace(WHOLE, status=503, error="full"), False, {"errors": 1}),
    ],
)
def test_what_a_crowd_counts(answer: Stream, left: bool, counted: dict[str, int]) -> None:
    crowd = Crowd()
    judge(answer, KNOWN, left, crowd)
    assert dict(crowd.counts) == counted


def test_clients_work_until_the_time_is_over(server: Server) -> None:
    known = [Ask(PATH, {"prompt": [number], "max_tokens": 12}) for number in range(3)]
    crowd = Crowd()

    async def run() -> float:
        async with httpx2.AsyncClient(base_url=server.url) as client:
            await serving_load.learn(client, known)
            known[2].text = "not what it says"
            until = asyncio.get_running_loop().time() + 1.0
            await asyncio.gather(
                *(serving_load.work(client, known, until, crowd, random.Random(seed)) for seed in range(8))
            )
            return await serving_load.pages_back(client)

    assert asyncio.run(run()) == 0
    assert min(crowd.counts[what] for what in ("whole", "left", "nonsense", "wrong streams")) > 0
    assert not crowd.counts["errors"] and not crowd.counts["nonsense taken"] and crowd.examples


def test_a_killed_server_that_cuts_its_streams_is_found_out(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        server.wait_until_ready(60)
        known = [Ask(PATH, {"prompt": [1]})]

        async def run() -> dict[str, Any]:
            async with httpx2.AsyncClient(base_url=server.url) as client:
                ending = asyncio.create_task(serving_load.end_under_load(server, client, known, 2, after=0.6))
                await asyncio.sleep(0.3)
                server.process.kill()
                return await ending

        found = asyncio.run(run())
    finally:
        server.close()
    assert found["streams"] == {"cut": 2} and found["status"] != 0


def test_failures_name_what_was_wrong() -> None:
    good: dict[str, Any] = {"counts": {"whole": 9}, "pages_left": 0.0, "end": {"status": 0, "streams": {"whole": 2}}}
    flat = growth([(float(second), 100_000_000 + second) for second in range(50)])
    assert list(flat) == [f"fifth {n}" for n in range(1, 6)]
    assert failures({**good, "memory_mb": flat}) == []
    grown = growth([(float(second), 100_000_000 + second * 1_000_000) for second in range(50)])
    bad = {"counts": {"errors": 2}, "pages_left": 3.0, "memory_mb": grown, "end": {"status": -9, "streams": {"cut": 1}}}
    assert [text.split()[0] for text in failures(bad)] == ["2", "3", "memory", "SIGTERM:"]
