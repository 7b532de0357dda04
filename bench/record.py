"""One result, one JSON line: what ran, how exact it was, how long it took, on which machine, at which commit.

A row cannot carry a time unless its error gate passed; ``Row`` refuses to be made otherwise.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
Triple = tuple[float, float, float]  # median, 20th and 80th percentile
PEERS = (
    "torch", "triton", "onnxruntime", "openvino", "llama-cpp-python", "auto-round-lib", "gemlite",
    "humming-kernels", "vllm", "liger-kernel", "trl", "verl",
)  # fmt: skip
HUGE_MALLOC = "glibc.malloc.hugetlb=1"
KEEPING_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What every line of results/*.jsonl says. Times in seconds, errors relative RMS against fp64."""

    TIMED: ClassVar[tuple[str, ...]] = ("median_s", "p20_s", "p80_s", "ratios")  # fields that need a passed gate

    op: str
    shape: str
    arm: str
    device: str
    threads: int
    case_threads: int  # of the arms around this one; only "name@1t" runs on fewer
    gate: str  # "passed", "failed", or "absent: why"
    error: float | None = None
    tolerance: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    rounds: int | None = None
    ratios: dict[str, Triple] | None = None  # peer -> how many times faster: median, p20, p80
    commit: str
    dirty: bool
    machine: dict[str, object]
    date: str
    command: str

    def __post_init__(self) -> None:
        timed = [name for name in self.TIMED if getattr(self, name) is not None]
        if timed and self.gate != "passed":
            raise ValueError(f"Row: gate: want 'passed' for a row with {', '.join(timed)}; got {self.gate!r}")
        if self.gate == "passed":
            good = self.error is not None and self.tolerance is not None and self.error <= self.tolerance
            if not good:
                raise ValueError(f"Row: error: want at most {self.tolerance} for gate 'passed'; got {self.error}")
        elif self.gate != "failed" and not self.gate.startswith("absent: "):
            raise ValueError(f"Row: gate: want 'passed', 'failed' or 'absent: why'; got {self.gate!r}")
        if self.error is not None and math.isnan(self.error):
            object.__setattr__(self, "error", None)  # JSON has no nan

    @property
    def place(self) -> object:
        return self.machine.get("gpu") if self.device == "cuda" else self.machine.get("cpu")

    @property
    def key(self) -> tuple[object, ...]:
        """Rows of one key measure the same thing; the last one counts."""
        raise NotImplementedError

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmRow(Row):
    """An INT4 product or layer of experts; times per product, rates per second."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "gmacs", "gbytes_s", "spec_share")

    m: int
    n: int
    k: int
    group_size: int
    symmetric: bool
    experts: int | None = None  # of a mixture-of-experts layer, where n = 2 * intermediate size and k = hidden size
    topk: int | None = None
    computes: str  # operands of the inner product: fp32, bf16, int16, int8
    lossy: bool  # rounds the activations to int8 or everything to bf16
    isa: str | None = None  # of our own CPU kernels
    malloc_huge_pages: bool = False  # glibc.malloc.hugetlb: every library's weights in huge pages, not only ours
    x_dtype: str | None = None  # on a GPU, of x and the result
    timing: str | None = None  # on a GPU: "cold" (L2 flushed before a product) or "rotation" (see gpu_timing.py)
    launch: str | None = None  # on a GPU: "graph" (CUDA graph of a visit) or "eager"
    span: int | None = None  # products per visit
    copies: int | None = None
    gmacs: float | None = None  # 1e9 multiply-accumulates per second
    weight_bytes: int | None = None  # of the INT4 weight with its scales and zeros: the same for every arm
    stored_bytes: int | None = None  # of the weight as this arm holds it
    gbytes_s: float | None = None  # 1e9 weight_bytes per second
    read_gbytes_s: float | None = None  # read bandwidth of the machine, measured between the arms
    read_share: float | None = None  # gbytes_s / read_gbytes_s
    spec_share: float | None = None  # on a GPU: gbytes_s over the memory bandwidth of its data sheet
    peak_gmacs: float | None = None  # ceiling for these operands
    peak_share: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        case = (self.op, self.shape, self.group_size, self.symmetric, self.device, self.case_threads, self.m)
        return (self.place, self.malloc_huge_pages, *case, self.x_dtype, self.timing, self.arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkinnyRow(Row):
    """An INT4 product of M rows beside the same of one row; times per product."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "growth")

    m: int
    n: int
    k: int
    group_size: int
    isa: str | None
    memory: str  # "streamed": weights come from where the whole model lies; "cached": from L2
    weight_bytes: int
    copies: int
    growth: Triple | None = None  # C(M) / C(1) within a round
    read_gbytes_s: float | None = None  # of a store of that size
    peak_gmacs: float | None = None  # of the instructions of this mode
    least_s: float | None = None  # the longer of reading the weight and multiplying at the peak
    least_growth: float | None = None  # the same over that of M = 1

    @property
    def key(self) -> tuple[object, ...]:
        return (self.place, self.op, self.shape, self.memory, self.isa, self.m, self.arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRow(Row):
    """A policy loss with the gradients of hidden (T, D) and weight (V, D), or a product that is a unit of its time."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "units", "units_bf16", "peak_bytes")

    tokens: int
    hidden: int
    vocabulary: int
    sequences: int
    dtype: str  # of hidden and weight: fp32 or bf16
    density: float  # share of the tokens whose mask is 1
    errors: dict[str, float | None] | None = None  # of loss, d_hidden and d_weight; ``error`` is the worst
    units: Triple | None = None  # time over that of one fp32 product (T, D) x (D, V) of the same round
    units_bf16: Triple | None = None  # the same in bf16 products
    peak_bytes: int | None = None  # most memory beyond the inputs, the gradients among it
    peak_threads: int | None = None
    gradient_bytes: int  # of d_hidden and d_weight as returned, the same for every arm
    malloc_keeps: bool = False  # glibc gave no freed memory back to the system: nobody pays for page faults

    @property
    def workspace_bytes(self) -> int | None:
        """Of the peak, what is not the gradients that are returned."""
        return None if self.peak_bytes is None else self.peak_bytes - self.gradient_bytes

    @property
    def key(self) -> tuple[object, ...]:
        case = (self.op, self.shape, self.dtype, self.density, self.device, self.case_threads)
        return (self.place, *case, self.arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecRow(Row):
    """An op of tree drafting and verification on one batch (one layer, for attention)."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "roofline_share", "spec_share", "peak_bytes")

    requests: int
    nodes: int | None = None  # of a tree
    vocabulary: int | None = None
    mode: str | None = None
    filtered: bool | None = None  # by top-k and top-p
    queries: int | None = None  # of attention: this many, over ``context`` keys and themselves
    context: int | None = None
    span: int  # batches (layers) in a visit
    visited: float | None = None  # rows of logits that a request's walk reads, mean
    touched_bytes: int  # that the op has to read, whoever computes it
    macs: int = 0  # multiply-accumulates of attention
    read_gbytes_s: float | None = None  # read bandwidth of the machine, measured between the arms
    peak_gmacs: float | None = None  # in fp32
    roofline_share: float | None = None  # the longer of reading and multiplying, over the time
    timing: str | None = None  # on a GPU: "cold" (L2 flushed before a call)
    launch: str | None = None  # on a GPU: "graph" or "eager"
    spec_share: float | None = None  # on a GPU: reading at the bandwidth of its data sheet, over the time
    peak_bytes: int | None = None  # most memory beyond the inputs

    @property
    def key(self) -> tuple[object, ...]:
        return (self.place, self.op, self.shape, self.device, self.case_threads, self.arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRow(Row):
    """A whole model in an engine: times per token, of all sequences together."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "tokens_s", "roofline_share", "tokens_per_step")

    batch: int
    depth: int  # tokens of every prompt
    weights: str  # int4, fp32 or bf16
    draft: bool  # speculates
    versions: dict[str, str]  # of the engine's packages, in its own environment
    new_tokens: int | None = None  # of a sequence in a visit, the first not timed
    tokens_s: float | None = None
    tokens_per_step: float | None = None  # of a sequence: more than 1 where drafts were accepted
    weight_bytes: int | None = None  # that a step reads
    step_bytes: int | None = None  # the same with the cache of all sequences
    read_gbytes_s: float | None = None  # read bandwidth of the machine, measured between the arms
    roofline_share: float | None = None  # reading step_bytes, over the time of a step
    rounding: float | None = None  # regret under the unquantised model, nats a token; ``error`` is that under its own
    others_cpu: float | None = None  # CPU seconds per second that other processes took during the visits, median

    @property
    def key(self) -> tuple[object, ...]:
        return (self.place, self.op, self.shape, self.device, self.case_threads, self.arm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingRow(Row):
    """A server under clients that each send a request, read its stream and send the next; times per request, over all
    clients together. Latencies in seconds, of all requests of the timed visits."""

    TIMED: ClassVar[tuple[str, ...]] = (*Row.TIMED, "requests_s", "tokens_s", "first_p50_s", "token_p50_s")

    clients: int
    prompt_tokens: int
    new_tokens: int
    weights: str  # int4 or bf16
    draft: bool  # speculates
    software: str  # the server and its version
    requests_s: float | None = None
    tokens_s: float | None = None
    first_p50_s: float | None = None  # to the first piece of text
    first_p95_s: float | None = None
    token_p50_s: float | None = None  # of a token after the first: mean of a request
    token_p95_s: float | None = None
    gap_p95_s: float | None = None  # between two pieces of a stream
    resident_bytes: int | None = None  # of the server's processes, after the visits
    rounding: float | None = None  # regret under the unquantised model, nats a token; ``error`` is that under its own

    @property
    def key(self) -> tuple[object, ...]:
        return (self.place, self.op, self.shape, self.device, self.case_threads, self.arm)


KINDS: dict[str, type[Row]] = {  # by op
    "int4_gemm": GemmRow,
    "int4_moe": GemmRow,
    "int4_skinny": SkinnyRow,
    "linear_policy_loss": LossRow,
    **dict.fromkeys(("tree_verify", "tree_attention", "draft_topk", "tree_finalize", "tree_commit"), SpecRow),
    **dict.fromkeys(("engine_decode", "engine_prefill"), EngineRow),
    "serving": ServingRow,
}
TRIPLES = ("units", "units_bf16", "growth")  # fields that JSON holds as lists


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a JSON lines file, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file. Raises ValueError naming the line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            if values["ratios"] is not None:
                values["ratios"] = {peer: tuple(value) for peer, value in values["ratios"].items()}
            for name in TRIPLES:
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            rows.append(KINDS[values["op"]](**values))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"record.read: {path.name}: want a row in line {number}; got {line[:80]!r} ({error})"
            ) from error
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        found[row.key] = row
    return list(found.values())


# -- where and when ---------------------------------------------------------------------------------------------------
def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def commit() -> tuple[str, bool]:
    """(hash, whether files other than results and documents differ from it).

    Where git cannot tell (a copy without .git), the hash is M3_COMMIT or "unknown", and the files count as changed.
    """
    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD"), bool(changed)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("M3_COMMIT", "unknown"), True


def cpu_model() -> str:
    """Model name with family, model and stepping, which tell virtual machines of one name apart."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = ", ".join(f"{key} {facts.get(key, '?')}" for key in ("cpu family", "model", "stepping"))
    return f"{name} ({numbers})"


def versions() -> dict[str, str]:
    found = {}
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def machine(device: str = "cpu") -> dict[str, object]:
    """The machine, as a row tells it."""
    facts: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def malloc_keeps() -> bool:
    """Whether this process runs with glibc keeping what is freed for what is allocated next."""
    return KEEPING_MALLOC in os.environ.get("GLIBC_TUNABLES", "")


def malloc_huge_pages() -> bool:
    """Whether this process runs with glibc asking for huge pages in malloc."""
    return HUGE_MALLOC in os.environ.get("GLIBC_TUNABLES", "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line; of a path of this machine only its last part."""
    return " ".join(["python -m bench", *(re.sub(r"(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:])])
