"""INT4 GEMM and experts on one GPU: cases to rows.

``python -m bench int4 --device cuda``. Every arm computes the same product in bf16 (or fp16), passes its gate against
fp64 first, and is timed in both ways of gpu_timing.py, interleaved. Arms: int4_gpu_arms.py, int4_gpu_peers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from bench import gpu_timing, harness, int4
from bench import int4_gpu_peers as peers
from bench.gpu_timing import TIMINGS, Clock, guarded
from bench.harness import Gate, Rotation
from bench.int4 import make_moe_problem
from bench.int4_gpu_arms import (
    COMMON_DTYPE,
    X_DTYPES,
    Gemm,
    Layers,
    M3Gemm,
    M3Kernel,
    M3Moe,
    Moe,
    MoeLayers,
    Tinygemm,
    TorchDense,
)
from bench.record import GemmRow
from bench.workloads import Experts, Linear, make_problem

MS = (1, 4, 16, 32, 64, 128, 256, 1024)
MOE_MS = (1, 4, 16, 64, 256, 1024)
CALLS = 200  # at most, of an arm in a case


ARMS: dict[str, Callable[[Layers], Gemm]] = {
    "m3_cuda": functools.partial(M3Gemm, room="cuda"),
    "m3_cuda_fast": functools.partial(M3Gemm, room="cuda", fast=True),
    "m3_triton": functools.partial(M3Gemm, room="triton"),
    "torch_dense": TorchDense,
    "tinygemm": Tinygemm,
    "gemlite": peers.Gemlite,
    "humming": peers.Humming,
    "marlin": peers.Marlin,
    "m3_decode": functools.partial(M3Kernel, which="decode"),
    "m3_many": functools.partial(M3Kernel, which="many"),
    "m3_wgmma": functools.partial(M3Kernel, which="wgmma"),
}
MOE_ARMS: dict[str, Callable[[MoeLayers], Moe]] = {
    "m3_cuda": functools.partial(M3Moe, room="cuda"),
    "m3_cuda_fast": functools.partial(M3Moe, room="cuda", fast=True),
    "m3_triton": functools.partial(M3Moe, room="triton"),
    "humming": functools.partial(peers.HummingMoe, kind="indexed"),
    "humming_grouped": functools.partial(peers.HummingMoe, kind="grouped_contiguous"),
}
KERNELS = ("m3_decode", "m3_many", "m3_wgmma")
EVERY = tuple(dict.fromkeys([*(name for name in ARMS if name not in KERNELS), *MOE_ARMS]))


# -- what to measure --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows of x, in which dtypes, by which arms, and for how long."""

    shapes: tuple[str, ...] = ()
    ms: tuple[int, ...] | None = None  # None: MS, of experts MOE_MS
    dtypes: tuple[str, ...] = (COMMON_DTYPE,)
    arms: tuple[str, ...] = EVERY
    seconds: float = 0.25  # per shape, dtype, M and timing
    min_rounds: int = 20
    timings: tuple[str, ...] = TIMINGS
    device: str = "cuda"

    def __post_init__(self) -> None:
        known = {"arms": (*ARMS, *MOE_ARMS), "dtypes": X_DTYPES, "timings": TIMINGS}
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    wanted = ", ".join(dict.fromkeys(names))
                    raise ValueError(f"bench int4: {field}: want names of {wanted} on a GPU; got {name!r}")

    def rows_of(self, shape: Linear | Experts) -> tuple[int, ...]:
        return self.ms or (MS if isinstance(shape, Linear) else MOE_MS)


DENSE = (
    "8192x8192",
    "qwen3-235b-a22b.qkv",
    "qwen3-235b-a22b.o",
    "qwen2.5-32b.gate_up",
    "qwen2.5-32b.down",
    "4096x4096",
)
OWN = ("m3_cuda", "m3_cuda_fast", "m3_triton", "torch_dense", "tinygemm")  # none that compiles or tunes for minutes
PRESETS = {
    "gpu": Plan(shapes=DENSE, arms=OWN),
    "gpu_peers": Plan(shapes=("8192x8192", "qwen3-235b-a22b.qkv", "qwen3-235b-a22b.o")),
    "gpu_fp16": Plan(shapes=("8192x8192",), dtypes=("fp16",)),
    "gpu_moe": Plan(shapes=("qwen3-235b-a22b.moe",)),
    "gpu_crossover": Plan(
        shapes=("8192x8192", "4096x4096", "qwen2.5-32b.gate_up"),
        ms=(8, 16, 32, 48, 64, 96, 128, 256, 512, 1024),
        arms=(*KERNELS, "torch_dense"),
        timings=("cold",),
    ),
    "gpu_quick": Plan(shapes=("4096x4096", "qwen3-235b-a22b.moe_ep8"), ms=(1, 64), seconds=0.1),
}


# -- one case ---------------------------------------------------------------------------------------------------------
def gate(arm: Any, x: Tensor, expected: Callable[[int], Tensor], clock: Clock) -> Gate:
    """Load x, run every layer, then the first alone; the worst error of the first, the last and that one counts."""
    arm.load(x, clock)
    arm.enter()
    results = arm.work.all()
    clock.synchronize()
    last = len(results) - 1
    errors = [harness.relative_rms(results[layer], expected(layer)) for layer in sorted({0, last})]
    alone = arm.work.first()
    clock.synchronize()
    errors.append(harness.relative_rms(alone, expected(0)))
    return Gate(error=harness.worst(errors), tolerance=arm.tolerance)


def rows_of(
    arms: Sequence[Any],
    absent: Mapping[str, str],
    facts: Mapping[str, Any],
    x: Tensor,
    expected: Callable[[int], Tensor],
    macs: int,
    count: int,
    plan: Plan,
    say: Callable[[str], None],
) -> Iterator[list[GemmRow]]:
    """Gate, interleave and tell one case, timing by timing."""
    clock, missing = gpu_timing.clock(plan.device), dict(absent)

    def judged(arm: Any) -> Gate:
        return guarded(lambda: gate(arm, x, expected, clock), clock)

    timed, gates = harness.pass_gates(arms, judged, missing, say)
    for arm in timed:
        if arm.work.why_eager:
            say(f"  {arm.name}: not captured, launched by hand: {arm.work.why_eager}")
    bounds, spec = clock.ceilings(), clock.card.spec_bytes_s
    for timing in plan.timings:
        visit = gpu_timing.visit_of(timing, clock)
        limits = {"seconds": plan.seconds, "min_rounds": plan.min_rounds, "max_rounds": CALLS}
        times, _ = harness.interleave(timed, visit=visit, **limits)
        rotation = Rotation(span=1 if timing == "cold" else count, parts=count if timing == "cold" else 1)
        read, peaks = (bounds.read_bytes, {1: bounds}) if bounds else (None, {})
        told = {**facts, "timing": timing}
        rows = int4.rows(told, arms, missing, gates, times, macs, read, peaks, rotation, 1, plan.device)
        yield [with_spec_share(row, spec) for row in rows]


def with_spec_share(row: GemmRow, spec: float | None) -> GemmRow:
    """The row, a timed one with its share of the bandwidth of the data sheet, where that is known."""
    if not (spec and row.median_s and row.weight_bytes):
        return row
    return dataclasses.replace(row, spec_share=row.weight_bytes / row.median_s / spec)


def run(shape: Linear | Experts, plan: Plan, say: Callable[[str], None]) -> Iterator[list[GemmRow]]:
    """All rows of one shape; x and results in each of the plan's dtypes."""
    clock = gpu_timing.clock(plan.device)
    for x_dtype in plan.dtypes:
        harness.use_room(None)  # of the last arm that ran
        yield from (run_linear if isinstance(shape, Linear) else run_experts)(shape, x_dtype, plan, say)  # type: ignore[arg-type]
        gc.collect()
        clock.release()


def run_linear(linear: Linear, x_dtype: str, plan: Plan, say: Callable[[str], None]) -> Iterator[list[GemmRow]]:
    clock, ms = gpu_timing.clock(plan.device), plan.rows_of(linear)
    problem = make_problem(linear, max(ms), x_dtype=X_DTYPES[x_dtype], device=plan.device)
    names = [name for name in plan.arms if name in ARMS]
    each = problem.weight_bytes * len(names) + 2 * problem.dense.numel()
    count = gpu_timing.layers(problem.weight_bytes, each, clock.card)
    say(f"{linear.name}, {x_dtype}: {count} layers, at most {count * each / 1e9:.1f} GB")
    layers = Layers(problem, count, x_dtype, ms)
    arms, absent = harness.build(names, lambda name: guarded(lambda: ARMS[name](layers), clock), say)
    for m in ms:
        facts = int4.linear_facts(linear, m, True, problem.weight_bytes) | {"x_dtype": x_dtype}
        x, expected = problem.x[:m].to(layers.dtype), functools.partial(problem.result, m)
        yield from rows_of(arms, absent, facts, x, expected, m * linear.n * linear.k, count, plan, say)


def run_experts(shape: Experts, x_dtype: str, plan: Plan, say: Callable[[str], None]) -> Iterator[list[GemmRow]]:
    clock, ms = gpu_timing.clock(plan.device), plan.rows_of(shape)
    problem = make_moe_problem(shape, max(ms), x_dtype=X_DTYPES[x_dtype], device=plan.device)
    names = [name for name in plan.arms if name in MOE_ARMS]
    stack = problem.w13.nbytes + problem.w2.nbytes
    count = gpu_timing.layers(problem.touched_bytes(min(ms)), stack * (1 + len(names) // 2), clock.card)
    say(f"{shape.name}, {x_dtype}: {count} layers")
    layers = MoeLayers(problem, count, x_dtype, ms)
    arms, absent = harness.build(names, lambda name: guarded(lambda: MOE_ARMS[name](layers), clock), say)
    for m in ms:
        facts = int4.moe_facts(shape, m, problem.touched_bytes(m)) | {"x_dtype": x_dtype}
        macs = m * shape.topk * 3 * shape.hidden * shape.intermediate
        x, expected = problem.x[:m].to(layers.dtype), functools.partial(problem.result, m)
        yield from rows_of(arms, absent, facts, x, expected, macs, count, plan, say)
