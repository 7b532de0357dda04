"""INT4 GEMM and experts on one GPU: the arms of int4.py on CUDA tensors in bf16, timed by events in CUDA graphs.

A visit replays one graph of ``span`` products over copies of the weight that together are far larger than the L2 cache.
The graph is launched behind a kernel that keeps the GPU busy, so that launch latency is not in the time. An arm that
cannot be captured runs eagerly and its rows say so (``launch``).
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness, int4
from bench.harness import Arm, GemmArm, Rotation, UnavailableError
from bench.peers import TOLERANCE, PeerArm, TorchDense
from bench.record import GemmRow
from bench.roofline import Ceilings
from bench.workloads import Experts, Linear, Problem, make_problem

MS = (1, 4, 16, 64, 128, 256, 1024)
BUSY_CYCLES = 1_000_000  # of the kernel in front of a visit: about half a millisecond
VISIT_BYTES = 64 << 20
REPEATS = 15


class OnGpu(GemmArm):
    """An arm whose tensors are on the GPU, captured: one CUDA graph per part."""

    computes = "bf16"

    def __init__(self, inner: GemmArm) -> None:
        self.inner, self.span, self.parts = inner, inner.span, inner.parts
        self.stored_bytes = inner.stored_bytes
        self.tolerance = max(inner.tolerance, TOLERANCE["bf16"])
        self.launch = "eager"
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def enter(self) -> None:
        """Nothing: thread counts do not matter here."""

    def load(self, x: Tensor) -> None:
        self.graphs.clear()
        self.inner.load(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for part in range(self.parts):
                self.inner.run(part)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            for part in range(self.parts):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.inner.run(part)
                self.graphs.append(graph)
            self.launch = "graph"
        except (
            RuntimeError
        ) as error:  # the arm synchronises or allocates outside the pool: it has to be launched by hand
            print(f"  {self.name}: not captured, launched eagerly: {str(error).splitlines()[0]}", file=sys.stderr)
            self.graphs.clear()
            self.launch = "eager"

    def run(self, part: int) -> None:
        if self.graphs:
            self.graphs[part].replay()
        else:
            self.inner.run(part)

    def output(self, copy: int) -> Tensor:
        torch.cuda.synchronize()
        return self.inner.output(copy).float()


class TorchInt4Cuda(PeerArm):
    """torch.ops.aten._weight_int4pack_mm: w = (q - 8) * scale + zero, scale and zero in bf16."""

    computes, lossy = "bf16", True

    def __init__(self, problem: Problem, rotation: Rotation, threads: int) -> None:
        super().__init__(problem, rotation, threads)
        self.group_size = problem.linear.group_size
        if self.group_size not in (32, 64, 128, 256) or self.k % self.group_size or self.k % 128:
            raise UnavailableError("_weight_int4pack_mm: K is not a multiple of the group or of 128")
        self.weights, self.scales = [], []
        for copy in self.copies:
            scales = problem.rows(problem.scales, copy).float()
            shift = (8 - problem.rows(problem.zeros, copy).float()) * scales
            self.scales.append(torch.stack((scales, shift), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous())
            q = problem.rows(problem.q, copy)
            nibbles = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
            self.weights.append(torch.ops.aten._convert_weight_to_int4pack(nibbles, 8))
        self.stored_bytes = self.weights[0].numel() * 4 + self.scales[0].numel() * 2
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x = x

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = torch.ops.aten._weight_int4pack_mm(
                self.x, self.weights[copy], self.group_size, self.scales[copy]
            )

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


class Gemlite(PeerArm):
    """gemlite's A16Wn layer, packed from the same nibbles; scales and zeros rounded to bf16."""

    computes, lossy = "bf16", True

    def __init__(self, problem: Problem, rotation: Rotation, threads: int) -> None:
        if importlib.util.find_spec("gemlite") is None:
            raise UnavailableError("gemlite is not installed")
        from gemlite.helper import A16Wn

        super().__init__(problem, rotation, threads)
        self.layers = []
        for copy in self.copies:
            scales = problem.rows(problem.scales, copy).to(torch.bfloat16).reshape(-1, 1)
            zeros = problem.rows(problem.zeros, copy).to(torch.bfloat16).reshape(-1, 1)
            q = problem.rows(problem.q, copy)
            make = A16Wn(device="cuda").from_weights
            self.layers.append(make(q, scales, zeros, 4, problem.linear.group_size, None))
        self.stored_bytes = problem.weight_bytes
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x = x

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = self.layers[copy](self.x)

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


ARMS: dict[str, int4.Factory] = {
    "m3_exact": functools.partial(int4.M3, mode="exact"),
    "torch_int4_bf16": TorchInt4Cuda,
    "gemlite": Gemlite,
    "torch_bf16": functools.partial(TorchDense, dtype=torch.bfloat16),
}
MOE_ARMS = {name: int4.MOE_ARMS[name] for name in ("m3_exact", "torch_bf16")}


def plan(*, ms: tuple[int, ...] | None, arms: tuple[str, ...] | None, seconds: float, min_rounds: int) -> int4.Plan:
    """Raises ValueError for an arm that is none, RuntimeError on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench int4 --device cuda: torch sees no GPU")
    names = tuple(ARMS) if arms is None else arms
    for name in names:
        if name not in ARMS:
            raise ValueError(f"bench int4: arms: want names of {', '.join(ARMS)} on a GPU; got {name!r}")
    return int4.Plan(ms=ms or MS, threads=(1,), arms=names, seconds=seconds, min_rounds=max(min_rounds, REPEATS))


def visit(arm: Arm, part: int) -> float:
    """Seconds per product of one part, on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    arm.enter()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    arm.run(part)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / arm.span


def seconds_of(work: Callable[[], Any]) -> float:
    """Median GPU time of a piece of work."""
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return harness.spread(times).median


@functools.cache
def ceilings() -> Ceilings:
    """Bytes per second of a copy of 1 GiB (read and written), and what torch's bf16 matmul of 8192^3 reaches."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    macs = 8192**3 / seconds_of(lambda: a @ b)
    peaks = {"bf16 matmul of 8192^3": ("bf16", macs)}
    return Ceilings(threads=1, read_bytes=bandwidth, read_kind=0, peaks=peaks, source="torch.cuda copy")


def rows_of(
    arms: list[GemmArm],
    absent: dict[str, str],
    facts: dict[str, Any],
    x: Tensor,
    expected: Callable[[int], Tensor],
    macs: int,
    rotation: Rotation,
    plan: int4.Plan,
    say: Callable[[str], None],
) -> Iterator[GemmRow]:
    """Load, gate, interleave and tell one case."""
    for arm in arms:
        arm.load(x)
    gate = functools.partial(harness.gate, expected=expected)
    timed, gates = harness.pass_gates(arms, gate, absent, say)
    times, _ = harness.interleave(timed, seconds=plan.seconds, min_rounds=plan.min_rounds, visit=visit)
    bounds = ceilings()
    measured = {1: bounds}
    yield from int4.rows(facts, arms, absent, gates, times, macs, bounds.read_bytes, measured, rotation, 1, "cuda")


def run(shape: Linear | Experts, plan: int4.Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    """All rows of one shape on the GPU; x and results in bf16."""
    yield from run_linear(shape, plan, say) if isinstance(shape, Linear) else run_experts(shape, plan, say)
    gc.collect()
    torch.cuda.empty_cache()


def run_linear(linear: Linear, plan: int4.Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    problem = make_problem(linear, max(plan.ms), symmetric=plan.symmetric, x_dtype=torch.bfloat16, device="cuda")
    total = sum(int4.bytes_of(name, problem) for name in plan.arms)
    rotation = harness.rotation(problem.weight_bytes, total, visit_bytes=VISIT_BYTES, target_bytes=2 << 30)
    say(f"{linear.name}: {rotation.copies} copies, {rotation.copies * total / 1e9:.1f} GB")
    arms, absent = harness.build(plan.arms, lambda name: OnGpu(ARMS[name](problem, rotation, 1)), say)
    for m in plan.ms:
        facts = int4.linear_facts(linear, m, plan.symmetric, problem.weight_bytes)
        x, expected = problem.x[:m].to(torch.bfloat16), functools.partial(problem.result, m)
        yield from rows_of(arms, absent, facts, x, expected, m * linear.n * linear.k, rotation, plan, say)


def run_experts(shape: Experts, plan: int4.Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    made = int4.make_moe_problem(shape, max(plan.ms), x_dtype=torch.bfloat16, device="cuda")
    say(shape.name)
    parts = 2
    names = [name for name in plan.arms if name in MOE_ARMS]
    arms, absent = harness.build(names, lambda name: OnGpu(MOE_ARMS[name](made, 1, parts)), say)
    for m in plan.ms:
        facts = int4.moe_facts(shape, m, made.touched_bytes(m))
        macs = m * shape.topk * 3 * shape.hidden * shape.intermediate
        x, expected = made.x[:m].to(torch.bfloat16), functools.partial(made.result, m)
        rotation = Rotation(span=1, parts=parts)
        yield from rows_of(arms, absent, facts, x, expected, macs, rotation, plan, say)
