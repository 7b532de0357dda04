"""Servers of a small model side by side: requests per second and latencies of `m3 serve` and of others.

Every arm is a server in a process group of its own, all of them up at once; a round visits each once, in shuffled
order, with the same prompts of tokens, after waiting until none of them burns CPU. In a visit some clients each send a
completion, read its stream, and send the next; every answer has the same number of tokens, the end token ignored.

Gate: answers to other prompts, greedy and with their natural end, are read by a plain model in fp32 that holds the
arm's own weights, unpacked (bench/engine.py tells how). An arm with a draft must write, in every round, what its twin
writes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from bench import engine, harness, record, serving_report, vllm_server
from bench.engine_inputs import Case, Models, Prompts
from bench.record import ServingRow
from bench.serving_client import Server, Stream, free_port, stream
from bench.vllm_server import NAME
from m3.models.tokenizer import Tokenizer

DEPTH, COUNT = 96, 64  # tokens of a prompt and of an answer
CHAIN = 3  # tokens that vLLM drafts, which has no trees
GATE_CASE = Case(name="gate", batch=4, depth=DEPTH, count=40)
CLIENTS = (1, 4, 16)
# Nats a token, of any arm: its text is encoded again, not always to the tokens that it was, and who computes in bf16
# takes other sides in near ties. The answer to another prompt costs 0.8 and more (bench/engine.py).
TOLERANCE = 5e-2
QUIET_SLICE, QUIET_LIMIT, QUIET_SHARE = 0.05, 2.0, 0.1
REQUEST_LIMIT = 600.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrant:
    """An arm as it is asked for. ``twin``: the arm that must write the same."""

    kind: str  # m3, vllm, vllm_m3 (with our plug-in) or llama
    model: str  # of Models
    weights: str
    draft: bool = False
    twin: str | None = None


ENTRANTS = {
    "m3_int4_draft": Entrant(kind="m3", model="int4", weights="int4", draft=True, twin="m3_int4"),
    "m3_int4": Entrant(kind="m3", model="int4", weights="int4"),
    "m3_bf16": Entrant(kind="m3", model="checkpoint", weights="bf16"),
    "vllm_bf16": Entrant(kind="vllm", model="checkpoint", weights="bf16"),
    "vllm_int4": Entrant(kind="vllm", model="int4_dense_head", weights="int4"),  # its own product
    "vllm_m3_int4": Entrant(kind="vllm_m3", model="int4", weights="int4"),
    "vllm_m3_int4_draft": Entrant(kind="vllm_m3", model="int4", weights="int4", draft=True),
    "llama_q4_0": Entrant(kind="llama", model="q4_0", weights="int4"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    clients: tuple[int, ...] = CLIENTS
    arms: tuple[str, ...] = tuple(ENTRANTS)
    threads: int = 2
    rounds: int = 5
    per_client: int = 2  # requests of a client in a visit
    draft: str | None = None  # folder
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)  # in place of what Models would make
    programs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # vllm: an interpreter; llama: llama-server

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ENTRANTS]
        if unknown:
            raise ValueError(f"serving: arms: want some of {', '.join(ENTRANTS)}; got {', '.join(unknown)}")


# -- servers ----------------------------------------------------------------------------------------------------------
def program(plan: Plan, kind: str) -> str:
    if kind == "m3":
        return sys.executable
    named = kind.removesuffix("_m3")
    if named not in plan.programs:
        raise harness.UnavailableError(f"needs --program {named}=PATH")
    return str(Path(plan.programs[named]).expanduser())


def command(entrant: Entrant, plan: Plan, model: Path, port: int) -> list[str]:
    """How its server is started. Room for all clients; the rest is each server's own choice."""
    run, most = program(plan, entrant.kind), max(plan.clients)
    drafter = str(Path(plan.draft).resolve()) if entrant.draft and plan.draft else ""  # servers start elsewhere
    match entrant.kind:
        case "m3":
            draft = ["--draft", drafter] if drafter else []
            options = ["--weights", "bf16", "--name", NAME, "--threads", str(plan.threads), *draft]
            return [run, "-P", "-m", "m3", "serve", str(model), "--port", str(port), *options]
        case "vllm" | "vllm_m3":
            options = ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", str(most)]
            if drafter:
                chain = {"method": "eagle3", "model": drafter, "num_speculative_tokens": CHAIN}
                options += ["--speculative-config", json.dumps(chain)]
            return vllm_server.command(run, model, port, options)
        case _:
            options = ["--threads", str(plan.threads), "--parallel", str(most), "--ctx-size", str(1024 * most)]
            return [run, "--model", str(model), "--port", str(port), "--alias", NAME, *options]


def environment(kind: str, threads: int, place: Path) -> dict[str, str]:
    """``place``: a folder of the server's own."""
    if kind in ("vllm", "vllm_m3"):
        return vllm_server.environment(place, plugin=kind == "vllm_m3", threads=threads)
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    found.pop("PYTHONPATH", None)
    if kind == "m3":
        found["PYTHONPATH"] = str(record.ROOT)
    return found


class ServerArm(harness.Arm):
    """A server under the clients of a case; ``visits`` says what each of its visits brought."""

    def __init__(self, name: str, entrant: Entrant, server: Server, software: str) -> None:
        self.name, self.entrant, self.server, self.software = name, entrant, server, software
        self.computes, self.parts = entrant.weights, engine.PROMPT_SETS
        self.tolerance = TOLERANCE
        self.rounding: float | None = None
        self.visits: list[Visit] = []

    def load(self, case: Case, clients: int, prompts: Prompts) -> None:
        """Take a case; forget the one before."""
        self.case, self.clients, self.prompts, self.visits = case, clients, prompts, []

    def run(self, part: int) -> None:
        started = time.perf_counter()
        body = {"max_tokens": self.case.count, "ignore_eos": True}
        streams = self.ask(self.prompts.batch(self.case, part), self.clients, body)
        self.visits.append(Visit(seconds=time.perf_counter() - started, streams=streams))

    def ask(self, prompts: Sequence[list[int]], clients: int, body: Mapping[str, Any]) -> list[Stream]:
        """Greedy answers in the order of the prompts.

        Raises:
            harness.UnavailableError: a request was refused, or broke off.
        """
        found = asyncio.run(closed_loop(self.server.url, prompts, clients, {"temperature": 0, "model": NAME, **body}))
        broken = next((each for each in found if not each.done or each.error), None)
        if broken is not None:
            raise harness.UnavailableError(f"{self.name}: {(broken.error or 'a stream broke off')[:200]}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """What the clients of one visit saw."""

    seconds: float
    streams: list[Stream]


async def closed_loop(url: str, prompts: Sequence[list[int]], clients: int, body: Mapping[str, Any]) -> list[Stream]:
    """``clients`` clients send the prompts, each its next when its last is answered."""
    found: dict[int, Stream] = {}
    queue = iter(enumerate(prompts))
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=REQUEST_LIMIT, limits=limits) as client:

        async def work() -> None:
            for index, prompt in queue:
                found[index] = await stream(client, "/v1/completions", {**body, "prompt": prompt})

        await asyncio.gather(*(work() for _ in range(clients)))
    return [found[index] for index in range(len(prompts))]


def open_arm(name: str, plan: Plan, models: Models, say: Callable[[str], None]) -> ServerArm:
    entrant = ENTRANTS[name]
    if entrant.draft and plan.draft is None:
        raise harness.UnavailableError("needs --draft FOLDER")
    port = free_port()
    line = command(entrant, plan, models.path(entrant.model), port)
    say(f"  opening {name}")
    place = models.folder / "serving" / name
    place.mkdir(parents=True, exist_ok=True)
    server = Server(line, port, place / "log", environment(entrant.kind, plan.threads, place))
    try:
        server.wait_until_ready()
        if entrant.kind == "vllm_m3" and "quantization=m3_int4" not in server.log.read_text(errors="replace"):
            raise harness.UnavailableError("vLLM did not take the plug-in")
        return ServerArm(name, entrant, server, software(entrant.kind, server.url))
    except BaseException:
        server.close()
        raise


def software(kind: str, url: str) -> str:
    """The server and its version, as it tells them."""
    if kind == "llama":
        return f"llama.cpp {httpx2.get(f'{url}/props', timeout=30).json().get('build_info', '?')}"
    told = httpx2.get(f"{url}/version", timeout=30)
    return f"{kind.removesuffix('_m3')} {told.json().get('version', '?') if told.status_code == 200 else '?'}"


# -- gate and clock ---------------------------------------------------------------------------------------------------
def gate(arm: ServerArm, tokenizer: Tokenizer, judges: engine.Judges) -> harness.Gate:
    """The regret of what the arm writes, by its text; nan where an answer is empty."""
    prompts = arm.prompts.batch(GATE_CASE, engine.PROMPT_SETS)
    streams = arm.ask(prompts, GATE_CASE.batch, {"max_tokens": GATE_CASE.count})
    taken = [tokenizer.encode(each.text, special_tokens=False) for each in streams]
    if not all(taken):
        return harness.Gate(error=math.nan, tolerance=arm.tolerance)
    own = judges.regrets(engine.REFERENCES[arm.entrant.model], prompts, taken)
    unquantised = judges.regrets(engine.UNQUANTISED, prompts, taken)
    arm.rounding = sum(unquantised) / len(unquantised)
    return harness.Gate(error=sum(own) / len(own), tolerance=arm.tolerance)


def wrong_lengths(arm: ServerArm) -> bool:
    counts = {each.completion_tokens for visit in arm.visits for each in visit.streams}
    return counts != {arm.case.count}


def differs(arm: ServerArm, arms: Sequence[ServerArm]) -> bool:
    """Whether the arm wrote in any round what its twin, if that was timed, did not."""
    twin = next((other for other in arms if other.name == arm.entrant.twin), None)

    def texts(of: ServerArm) -> list[list[str]]:
        return [[each.text for each in visit.streams] for visit in of.visits]

    return twin is not None and texts(arm) != texts(twin)


def settle(arms: Sequence[ServerArm]) -> None:
    """Wait until no server burns CPU."""

    def busy() -> float:
        total = 0
        for arm in arms:
            for pid in arm.server.pids():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / engine.TICK

    deadline = time.perf_counter() + QUIET_LIMIT
    while time.perf_counter() < deadline:
        before = busy()
        time.sleep(QUIET_SLICE)
        if busy() - before < QUIET_SHARE * QUIET_SLICE + 1 / engine.TICK:
            return


# -- rows -------------------------------------------------------------------------------------------------------------
def run(plan: Plan, say: Callable[[str], None]) -> Iterator[list[ServingRow]]:
    """The rows of each number of clients."""
    models = Models(plan.models)
    tokenizer = Tokenizer(models.path("checkpoint"))
    prompts, judges = Prompts(tokenizer), engine.Judges(models, plan.threads)
    arms: list[ServerArm] = []
    try:
        arms, absent = harness.build(plan.arms, lambda name: open_arm(name, plan, models, say), say)
        for arm in arms:
            arm.load(GATE_CASE, 1, prompts)
        timed, gates = harness.pass_gates(arms, lambda arm: gate(arm, tokenizer, judges), absent, say)
        for clients in plan.clients:
            say(f"{clients} client(s)")
            yield run_case(clients, plan, prompts, timed, dict(gates), dict(absent), say)
    finally:
        for worker in judges.workers.values():
            worker.close()
        for arm in arms:
            arm.server.close()


def run_case(
    clients: int,
    plan: Plan,
    prompts: Prompts,
    arms: Sequence[ServerArm],
    gates: dict[str, harness.Gate],
    absent: Mapping[str, str],
    say: Callable[[str], None],
) -> list[ServingRow]:
    case = Case(name=f"c{clients}", batch=max(clients * plan.per_client, 4), depth=DEPTH, count=COUNT)
    for arm in arms:
        arm.load(case, clients, prompts)

    def visit(arm: harness.Arm, part: int) -> float:
        assert isinstance(arm, ServerArm)
        settle(arms)
        arm.run(part)
        return arm.visits[-1].seconds

    harness.interleave(arms, seconds=0.0, min_rounds=plan.rounds, visit=visit)
    for arm in arms:
        del arm.visits[0]  # the round that does not count
    for arm in arms:
        if wrong_lengths(arm) or differs(arm, arms):
            say(f"  {arm.name}: wrote another number of tokens, or others than {arm.entrant.twin}: no time")
            gates[arm.name] = harness.Gate(error=math.nan, tolerance=arm.tolerance)
    return rows(case, clients, plan, [arm for arm in arms if gates[arm.name].passed], gates, absent)


def rows(
    case: Case,
    clients: int,
    plan: Plan,
    arms: Sequence[ServerArm],
    gates: Mapping[str, harness.Gate],
    absent: Mapping[str, str],
) -> list[ServingRow]:
    """A row per arm: with times for those in ``arms``, without for those that failed their gate or are absent."""
    commit, dirty = record.commit()
    place: dict[str, Any] = {
        "op": "serving",
        "shape": f"{case.name}.p{case.depth}.n{case.count}",
        "clients": clients,
        "prompt_tokens": case.depth,
        "new_tokens": case.count,
        "device": "cpu",
        "threads": plan.threads,
        "case_threads": plan.threads,
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(),
        "date": record.now(),
        "command": record.command(),
    }
    times = {arm.name: [visit.seconds / case.batch for visit in arm.visits] for arm in arms}
    named = {arm.name: arm for arm in arms}
    found = []
    for name in [*absent, *gates]:
        entrant, result = ENTRANTS[name], gates.get(name)
        about: dict[str, Any] = {"arm": name, "weights": entrant.weights, "draft": entrant.draft}
        if result is None or name in absent:
            found.append(ServingRow(**place, **about, software=entrant.kind, gate=f"absent: {absent[name]}"))
            continue
        about |= {"error": result.error, "tolerance": result.tolerance}
        if name not in named:
            found.append(ServingRow(**place, **about, software=entrant.kind, gate="failed"))
            continue
        arm, value = named[name], harness.spread(times[name])
        found.append(
            ServingRow(
                **place,
                **about,
                **latencies([each for visit in arm.visits for each in visit.streams]),
                software=arm.software,
                gate="passed",
                median_s=value.median,
                p20_s=value.p20,
                p80_s=value.p80,
                rounds=len(times[name]),
                ratios=harness.ratios(times, name),
                requests_s=1 / value.median,
                tokens_s=case.count / value.median,
                resident_bytes=arm.server.resident_bytes(),
                rounding=arm.rounding,
            )
        )
    return found


def latencies(streams: Sequence[Stream]) -> dict[str, float]:
    """Of all streams of the visits, seconds."""
    first = [each.first for each in streams]
    token = [each.per_token for each in streams if each.per_token is not None]
    gaps = [gap for each in streams for gap in each.gaps]
    return {
        "first_p50_s": harness.quantile(first, 0.5),
        "first_p95_s": harness.quantile(first, 0.95),
        "token_p50_s": harness.quantile(token, 0.5),
        "token_p95_s": harness.quantile(token, 0.95),
        "gap_p95_s": harness.quantile(gaps, 0.95),
    }


# -- the command ------------------------------------------------------------------------------------------------------
def add_options(parser: argparse.ArgumentParser) -> None:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def pair(text: str) -> tuple[str, str]:
        name, _, path = text.partition("=")
        return name, path

    parser.add_argument("--clients", type=numbers, default=CLIENTS, help="default: 1,4,16")
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), default=tuple(ENTRANTS))
    parser.add_argument("--threads", type=int, default=2, help="of every server (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", help="folder of a draft model for the arm that speculates")
    parser.add_argument("--model", type=pair, action="append", default=[], metavar="NAME=PATH", help="q4_0, int4, ...")
    parser.add_argument(
        "--program", type=pair, action="append", default=[], metavar="KIND=PATH",
        help="vllm: an interpreter that has it; llama: llama-server",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=record.RESULTS / "serving.jsonl", help="JSON lines to add to")


def carry_out(arguments: argparse.Namespace) -> int:
    plan = Plan(
        clients=arguments.clients,
        arms=arguments.arms,
        threads=arguments.threads,
        rounds=arguments.rounds,
        draft=arguments.draft,
        models=dict(arguments.model),
        programs=dict(arguments.program),
    )
    for case in run(plan, lambda text: print(text, file=sys.stderr, flush=True)):
        record.append(arguments.out, case)
        print(serving_report.tables(case), flush=True)
    return 0
