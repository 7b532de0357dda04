"""A whole model, served: tokens per second of our engine and of others, plain and with a draft.

Every arm is an engine in a process of its own (engine_peers.py), all of them open at once; a round visits each arm
once, in shuffled order, with the same prompts, after waiting until none of the processes burns CPU. A visit prefills
prompts of one length and decodes greedily; its process says how long either took. Prompts differ from round to round,
and no arm reuses prefixes.

Gate: what an arm wrote is read by a plain model in fp32 that holds the arm's own weights, unpacked. The error is the
arm's regret: the mean over its tokens of the best log-probability minus that of the token taken, in nats; 0 for the
model itself. An arm with a draft must also write, in every round, what its plain twin writes. Beside it stands the
regret under the unquantised model: what rounding the weights cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness, record, roofline
from bench.engine_inputs import CASES, Case, Models, Prompts
from bench.record import EngineRow
from m3.models.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("engine_peers.py")
OPEN_LIMIT, RUN_LIMIT = 600.0, 600.0  # seconds
QUIET_SLICE, QUIET_LIMIT = 0.02, 1.0  # seconds; the kernel counts a process's CPU in ticks of 10 ms
TICK = os.sysconf("SC_CLK_TCK")
# Nats a token, by how the weights are held. fp32 and bf16 differ from their reference in near ties only, INT4 engines
# by rounding activations too. The answer to a prompt whose last 8 tokens are lost costs 0.8, random tokens cost 11.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2, "int4": 5e-2}
UNKNOWN = 1.0  # where nobody else can unpack the weights, and the unquantised model is the judge
GATE_TOKENS = 128  # or more are judged
PROMPT_SETS = 64  # after so many rounds prompts come again


# -- what is measured -------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrant:
    """An arm as it is asked for. ``twin``: the arm that must write the same."""

    kind: str  # of engine_peers.KINDS
    model: str  # of Models
    weights: str
    dtype: str = "float32"  # that the engine computes in, where it can be told
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draft: bool = False
    twin: str | None = None


ENTRANTS = {
    "m3_int4": Entrant(kind="m3", model="int4", weights="int4", dtype="bfloat16"),
    "m3_int4_draft": Entrant(kind="m3", model="int4", weights="int4", dtype="bfloat16", draft=True, twin="m3_int4"),
    "m3_int4_dense_head": Entrant(kind="m3", model="int4_dense_head", weights="int4", dtype="bfloat16"),
    "m3_fp32": Entrant(kind="m3", model="checkpoint", weights="fp32"),
    "m3_fp32_draft": Entrant(kind="m3", model="checkpoint", weights="fp32", draft=True, twin="m3_fp32"),
    "m3_bf16": Entrant(kind="m3", model="checkpoint", weights="bf16", dtype="bfloat16"),
    "m3_bf16_draft": Entrant(
        kind="m3", model="checkpoint", weights="bf16", dtype="bfloat16", draft=True, twin="m3_bf16"
    ),
    "m3_torch_int4": Entrant(kind="torch_decoder", model="int4", weights="int4"),
    "transformers_fp32": Entrant(kind="transformers", model="checkpoint", weights="fp32"),
    "transformers_bf16": Entrant(kind="transformers", model="checkpoint", weights="bf16", dtype="bfloat16"),
    "vllm_fp32": Entrant(kind="vllm", model="checkpoint", weights="fp32"),
    "vllm_bf16": Entrant(kind="vllm", model="checkpoint", weights="bf16", dtype="bfloat16"),
    "vllm_int4": Entrant(kind="vllm", model="int4_dense_head", weights="int4", dtype="bfloat16"),
    "llama_q4_0": Entrant(kind="llama_cpp", model="q4_0", weights="int4"),
    "llama_q4_0_flash": Entrant(kind="llama_cpp", model="q4_0", weights="int4", settings={"flash_attention": True}),
    "llama_q4_1": Entrant(kind="llama_cpp", model="q4_1", weights="int4"),
    "onnx_genai_int4": Entrant(kind="onnx_genai", model="onnx_int4", weights="int4"),
    "openvino_q4_0": Entrant(kind="openvino_genai", model="q4_0", weights="int4"),
}
REFERENCES = {  # model: (kind, model) that judges what is written with it
    "checkpoint": ("transformers", "checkpoint"),
    "q4_1": ("transformers", "checkpoint"),  # the checkpoint is made from it
    "q4_0": ("transformers", "q4_0_unpacked"),
    "int4": ("torch_decoder", "int4"),
    "int4_dense_head": ("torch_decoder", "int4_dense_head"),
}
UNQUANTISED = REFERENCES["checkpoint"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    cases: tuple[str, ...] = ("b1.d64", "b1.d512", "b4.d64", "b16.d64")
    arms: tuple[str, ...] = tuple(ENTRANTS)
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 0.0  # for each case and thread count, beyond min_rounds
    min_rounds: int = 5
    draft: str | None = None  # folder
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)  # in place of what Models would make
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)  # kind -> interpreter

    def __post_init__(self) -> None:
        for what, names, known in (("cases", self.cases, CASES), ("arms", self.arms, ENTRANTS)):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"engine: {what}: want some of {', '.join(known)}; got {', '.join(unknown)}")


PRESETS = {
    "acceptance": Plan(),
    "quick": Plan(cases=("b1.d64",), arms=("m3_int4", "transformers_fp32", "llama_q4_0"), threads=(1,), min_rounds=2),
}


# -- processes --------------------------------------------------------------------------------------------------------
class Worker:
    """An engine in a process of its own. Its answers are lines of JSON; what it prints goes to ``log``."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, Any], log: Path, environment: dict[str, str]):
        self.log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, env=environment
            )
        self.pending = b""
        self.facts: dict[str, Any] = {}
        try:
            self.facts = self.ask(settings, OPEN_LIMIT)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any], limit: float = RUN_LIMIT) -> Any:
        """Its answer. Raises harness.UnavailableError if it dies or is silent for ``limit`` seconds."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise harness.UnavailableError(self.last_words()) from error
        return json.loads(self.line(limit))

    def line(self, limit: float) -> bytes:
        assert self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self.pending:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise harness.UnavailableError(f"no answer in {limit:.0f} s")
            fresh = os.read(descriptor, 1 << 16)
            if not fresh:
                raise harness.UnavailableError(self.last_words())
            self.pending += fresh
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def last_words(self) -> str:
        """The end of its log: what went wrong."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it ended without a word"])[-1][:200]

    def cpu_seconds(self) -> float:
        """CPU that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def close(self) -> None:
        """End it; kill it if it does not."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def busy_seconds() -> float:
    """CPU that the whole machine has used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / TICK


class EngineArm(harness.Arm):
    """An engine on the prompts of a case; ``visits`` says what each of its visits took."""

    def __init__(self, name: str, entrant: Entrant, worker: Worker, threads: int) -> None:
        self.name, self.entrant, self.worker, self.threads = name, entrant, worker, threads
        self.computes, self.parts = entrant.weights, PROMPT_SETS
        self.tolerance = TOLERANCE[entrant.weights] if entrant.model in REFERENCES else UNKNOWN
        self.rounding: float | None = None
        self.visits: list[Visit] = []

    def load(self, case: Case, prompts: Prompts) -> None:
        """Take a case; forget the one before."""
        self.case, self.prompts, self.visits = case, prompts, []

    def run(self, part: int) -> None:
        others, mine, start = busy_seconds(), self.worker.cpu_seconds(), time.perf_counter()
        answer = self.worker.ask({"prompts": self.prompts.batch(self.case, part), "count": self.case.count})
        mine, wall = self.worker.cpu_seconds() - mine, time.perf_counter() - start
        others_cpu = max(busy_seconds() - others - mine, 0.0) / wall
        self.visits.append(Visit(part=part, others_cpu=others_cpu, **answer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """An answer of engine_peers.py, and how busy the rest of the machine was."""

    part: int
    prefill_s: float
    decode_s: float
    decoded: int
    steps: int
    tokens: list[list[int]]
    others_cpu: float


# -- gate and clock ---------------------------------------------------------------------------------------------------
class Judges:
    """The references of all arms, each opened when first wanted."""

    def __init__(self, models: Models, threads: int) -> None:
        self.models, self.threads = models, threads
        self.workers: dict[tuple[str, str], Worker] = {}

    def regrets(self, reference: tuple[str, str], prompts: list[list[int]], taken: list[list[int]]) -> list[float]:
        """Of each sequence, the mean over its tokens."""
        if reference not in self.workers:
            kind, model = reference
            settings = {"model": str(self.models.path(model)), "threads": self.threads, "dtype": "float32"}
            log = self.models.folder / f"judge_{model}.log"
            self.workers[reference] = open_worker(sys.executable, kind, settings, log)
        answer: list[float] = self.workers[reference].ask({"prompts": prompts, "taken": taken})
        return answer


def gate(arm: EngineArm, judges: Judges) -> harness.Gate:
    """The regret of what the arm writes after the prompts of the first parts; nan where it writes too few tokens."""
    reference = REFERENCES.get(arm.entrant.model, UNQUANTISED)
    own: list[float] = []
    unquantised: list[float] = []
    for part in range(math.ceil(GATE_TOKENS / (arm.case.batch * arm.case.count))):
        arm.run(part)
        tokens, prompts = arm.visits.pop().tokens, arm.prompts.batch(arm.case, part)
        if not all(len(row) == arm.case.count + 1 for row in tokens):
            return harness.Gate(error=math.nan, tolerance=arm.tolerance)
        own += judges.regrets(reference, prompts, tokens)
        unquantised += own[-len(tokens) :] if reference == UNQUANTISED else judges.regrets(UNQUANTISED, prompts, tokens)
    arm.rounding = sum(unquantised) / len(unquantised)
    return harness.Gate(error=sum(own) / len(own), tolerance=arm.tolerance)


def differs(arm: EngineArm, arms: Sequence[EngineArm]) -> bool:
    """Whether the arm wrote in any round what its twin, if that was timed, did not."""
    twin = next((other for other in arms if other.name == arm.entrant.twin), None)
    return twin is not None and [visit.tokens for visit in arm.visits] != [visit.tokens for visit in twin.visits]


def settle(workers: Sequence[Worker]) -> None:
    """Wait until no engine burns CPU."""
    deadline = time.perf_counter() + QUIET_LIMIT
    while time.perf_counter() < deadline:
        before = sum(worker.cpu_seconds() for worker in workers)
        time.sleep(QUIET_SLICE)
        if sum(worker.cpu_seconds() for worker in workers) - before < 1 / TICK:
            return


class ReadProbes:
    """Read bandwidth of a store as large as the weights of each kind: where a model lies that is read every step."""

    def __init__(self, threads: int, sizes: Mapping[str, int]) -> None:
        window = roofline.WINDOW_BYTES
        self.probes = {
            kind: roofline.ReadProbe(threads, total_bytes=max(size // window, 1) * window)
            for kind, size in sizes.items()
        }
        self.rates: dict[str, list[float]] = {kind: [] for kind in sizes}

    def __call__(self) -> float:
        """Measure each once more: the store is read, then read again for the clock."""
        for kind, probe in self.probes.items():
            for _ in range(probe.windows):
                probe()
            rates = [probe.bandwidth() for _ in range(probe.windows)]
            self.rates[kind].append(harness.spread(rates).median)
        return 0.0

    def best(self, kind: str) -> float | None:
        """Bytes per second, undisturbed by others on the machine; None if never measured."""
        return harness.spread(self.rates[kind]).p80 if self.rates.get(kind) else None


def open_arms(
    plan: Plan, threads: int, models: Models, say: Callable[[str], None]
) -> tuple[list[EngineArm], dict[str, str]]:
    """Every arm's process, and why the others cannot be had."""
    room = max(CASES[name].depth + CASES[name].count for name in plan.cases) + 8
    largest = max(CASES[name].batch for name in plan.cases)

    def make(name: str) -> EngineArm:
        say(f"  opening {name}")
        return open_arm(name, plan, threads, models, {"max_context": room, "max_batch": largest})

    return harness.build(plan.arms, make, say)


def open_arm(name: str, plan: Plan, threads: int, models: Models, sizes: Mapping[str, int]) -> EngineArm:
    entrant = ENTRANTS[name]
    if entrant.draft and plan.draft is None:
        raise harness.UnavailableError("needs --draft FOLDER")
    settings = {
        "model": str(models.path(entrant.model)),
        "threads": threads,
        "dtype": entrant.dtype,
        "draft": plan.draft if entrant.draft else None,
        **sizes,
        **entrant.settings,
    }
    python = plan.pythons.get(entrant.kind, sys.executable)
    worker = open_worker(python, entrant.kind, settings, models.folder / f"{name}.log")
    return EngineArm(name, entrant, worker, threads)


def open_worker(python: str, kind: str, settings: Mapping[str, Any], log: Path) -> Worker:
    """An engine of that kind. Only ours sees this project on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if kind in ("m3", "torch_decoder"):
        environment["PYTHONPATH"] = str(record.ROOT)
    return Worker([python, "-P", str(WORKER), kind], settings, log, environment)


# -- rows -------------------------------------------------------------------------------------------------------------
def run(plan: Plan, say: Callable[[str], None]) -> Iterator[list[EngineRow]]:
    """The rows of each case and thread count."""
    models = Models(plan.models)
    prompts = Prompts(Tokenizer(models.path("checkpoint")))
    for threads in plan.threads:
        say(f"{threads} thread(s): opening engines")
        judges = Judges(models, threads)
        arms: list[EngineArm] = []
        try:
            arms, absent = open_arms(plan, threads, models, say)
            for name in plan.cases:
                say(f"{name}, {threads} thread(s)")
                yield run_case(CASES[name], plan, threads, prompts, judges, arms, dict(absent), say)
        finally:
            for worker in [*judges.workers.values(), *(arm.worker for arm in arms)]:
                worker.close()


def run_case(
    case: Case,
    plan: Plan,
    threads: int,
    prompts: Prompts,
    judges: Judges,
    arms: Sequence[EngineArm],
    absent: dict[str, str],
    say: Callable[[str], None],
) -> list[EngineRow]:
    for arm in arms:
        arm.load(case, prompts)

    def visit(arm: harness.Arm, part: int) -> float:
        assert isinstance(arm, EngineArm)
        settle(workers)
        arm.run(part)
        return arm.visits[-1].decode_s

    timed, gates = harness.pass_gates(arms, lambda arm: gate(arm, judges), absent, say)
    workers = [*judges.workers.values(), *(arm.worker for arm in arms)]
    sizes: dict[str, int] = {}
    for arm in timed:
        size = arm.worker.facts.get("weight_bytes")
        if size:
            sizes[arm.entrant.weights] = min(size, sizes.get(arm.entrant.weights, size))
    probes = ReadProbes(threads, sizes)
    limits = {"seconds": plan.seconds, "min_rounds": plan.min_rounds}
    harness.interleave(timed, **limits, visit=visit, probe=probes, first_untimed=False)
    for arm in [arm for arm in timed if differs(arm, timed)]:
        say(f"  {arm.name}: wrote other tokens than {arm.entrant.twin}: no time")
        gates[arm.name] = harness.Gate(error=math.nan, tolerance=arm.tolerance)
    measured = [arm for arm in timed if gates[arm.name].passed]
    found = rows("engine_decode", case, threads, measured, gates, absent, probes)
    if case.times_prefill:
        found += rows("engine_prefill", case, threads, measured, gates, absent, probes)
    return found


def per_token(op: str, case: Case, visit: Visit) -> float:
    """Seconds per token of a visit, prefilled or decoded."""
    if op == "engine_prefill":
        return visit.prefill_s / (case.batch * case.depth)
    return visit.decode_s / visit.decoded


def rows(
    op: str,
    case: Case,
    threads: int,
    arms: Sequence[EngineArm],
    gates: Mapping[str, harness.Gate],
    absent: Mapping[str, str],
    probes: ReadProbes,
) -> list[EngineRow]:
    """A row per arm: with times for those in ``arms``, without for those that failed their gate or are absent."""
    commit, dirty = record.commit()
    prefill = op == "engine_prefill"
    place: dict[str, Any] = {
        "op": op,
        "shape": f"p{case.depth}" if prefill else case.name,
        "batch": case.batch,
        "depth": case.depth,
        "device": "cpu",
        "threads": threads,
        "case_threads": threads,
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(),
        "date": record.now(),
        "command": record.command(),
    }
    rounding = {arm.name: arm.rounding for arm in arms}
    times = {arm.name: [per_token(op, case, visit) for visit in arm.visits] for arm in arms}
    names = {arm.name: arm for arm in arms}
    found = []
    for name in [*absent, *gates]:
        entrant, result = ENTRANTS[name], gates.get(name)
        about: dict[str, Any] = {"arm": name, "weights": entrant.weights, "draft": entrant.draft, "versions": {}}
        if result is None or name in absent:
            found.append(EngineRow(**place, **about, gate=f"absent: {absent[name]}"))
            continue
        about |= {"error": result.error, "tolerance": result.tolerance, "rounding": rounding.get(name)}
        if name not in names:
            found.append(EngineRow(**place, **about, gate="failed"))
            continue
        arm, value = names[name], harness.spread(times[name])
        about["versions"] = arm.worker.facts.get("versions", {})
        roof = {} if prefill or entrant.draft else roof_of(arm, value.median, probes)
        tokens = [visit.decoded / (visit.steps * case.batch) for visit in arm.visits]
        found.append(
            EngineRow(
                **place,
                **about,
                **roof,
                gate="passed",
                median_s=value.median,
                p20_s=value.p20,
                p80_s=value.p80,
                rounds=len(times[name]),
                ratios=harness.ratios(times, name),
                new_tokens=None if prefill else case.count,
                tokens_s=1 / value.median,
                tokens_per_step=harness.spread(tokens).median if entrant.draft and not prefill else None,
                others_cpu=harness.spread([visit.others_cpu for visit in arm.visits]).median,
            )
        )
    return found


def roof_of(arm: EngineArm, seconds_per_token: float, probes: ReadProbes) -> dict[str, Any]:
    """What a step reads, and the share of its time that reading it would take at least."""
    facts, case = arm.worker.facts, arm.case
    weights, rate = facts.get("weight_bytes"), probes.best(arm.entrant.weights)
    if not weights or rate is None:
        return {}
    step = weights + case.batch * (case.depth + case.count // 2) * facts.get("kv_bytes", 0)
    share = step / rate / (seconds_per_token * case.batch)
    return {"weight_bytes": weights, "step_bytes": step, "read_gbytes_s": rate / 1e9, "roofline_share": share}
