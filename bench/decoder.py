"""Dense products of few and many rows against torch, beside the roofline: a table, on the screen.

Every arm multiplies the same fp32 rows by the same weights: torch's F.linear with the weight's dtype for both (bf16
rows are rounded for it, which costs precision, so its gate is wider), ours with fp32 rows. Weights are more copies than
the cache holds. The bound is the longer of reading the weight once and multiplying at the machine's fp32 peak.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import harness, record, roofline, tables
from m3kernels.decoder import linear

SHAPES = {  # n, k
    "smollm2-135m.gate": (1536, 576),
    "smollm2-135m.down": (576, 1536),
    "smollm2-135m.lm_head": (49152, 576),
    "qwen3-8b.kv": (1024, 4096),
    "qwen3-8b.o": (4096, 4096),
    "qwen3-8b.down": (4096, 12288),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {("m3", "fp32"): 1e-6, ("m3", "bf16"): 1e-6, ("torch", "fp32"): 1e-5, ("torch", "bf16"): 1e-2}
FORGOTTEN = 600_000_000  # bytes of weights of an arm: more than a cache keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    shapes: tuple[str, ...] = tuple(SHAPES)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    ms: tuple[int, ...] = (1, 2, 4, 8, 32, 512)
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 2.0
    min_rounds: int = 5


class Product(harness.GemmArm):
    """y = x W^T by ``function``, for every copy of the weight in turn."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], x: Tensor, threads: int):
        self.function, self.weights, self.threads, self.x = function, weights, threads, x
        self.parts = len(weights)
        self.results: dict[int, Tensor] = {}

    def run(self, part: int) -> None:
        self.results = {part: self.function(self.x, self.weights[part])}

    def output(self, copy: int) -> Tensor:
        return self.results[copy].float()


def copies(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Weights of one shape, as many as the cache forgets; at most 64."""
    n, k = shape
    size = n * k * dtype.itemsize
    return [torch.randn(n, k).to(dtype) for _ in range(max(2, min(64, FORGOTTEN // size)))]


def bound(ceilings: roofline.Ceilings, m: int, n: int, k: int, itemsize: int) -> float:
    """Seconds that a product takes at least."""
    peak = ceilings.peak("fp32")
    return max(n * k * itemsize / ceilings.read_bytes, m * n * k / peak if peak else 0.0)


def lines(plan: Plan, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Cells of the table, one line for each shape, dtype, thread count and M."""
    for threads in plan.threads:
        ceilings = roofline.measured(threads, record.cpu_model())
        say(roofline.describe(ceilings))
        for shape in plan.shapes:
            n, k = SHAPES[shape]
            for kind in plan.dtypes:
                dtype = DTYPES[kind]
                weights, first = copies(SHAPES[shape], dtype), None
                for m in plan.ms:
                    say(f"{shape} {kind} {threads} thread(s) M={m}")
                    x = torch.randn(m, k)
                    arms = [
                        Product(linear, weights, x, threads),
                        Product(torch.nn.functional.linear, weights, x.to(dtype), threads),
                    ]
                    for arm, name in zip(arms, ("m3", "torch"), strict=True):
                        arm.name, arm.tolerance = name, TOLERANCE[name, kind]
                    wanted = [x.double() @ weights[0].double().T]
                    gates = functools.partial(gate, expected=wanted[0])
                    timed, _ = harness.pass_gates(arms, gates, {}, say)
                    times, _ = harness.interleave(timed, seconds=plan.seconds, min_rounds=plan.min_rounds)
                    ours = harness.spread(times["m3"]) if "m3" in times else None
                    peer = harness.spread(times["torch"]) if "torch" in times else None
                    first = ours.median if ours and m == 1 else first
                    least = bound(ceilings, m, n, k, dtype.itemsize)
                    yield [
                        *(shape, kind, str(threads), str(m)),
                        tables.time_text(ours.median) if ours else "gate failed",
                        f"{ours.p20 * 1e6:.0f}..{ours.p80 * 1e6:.0f} us" if ours else "",
                        tables.time_text(peer.median) if peer else "gate failed",
                        f"{harness.ratio(times['torch'], times['m3']).median:.2f}" if ours and peer else "",
                        f"{ours.median / first:.2f}" if ours and first else "",
                        f"{least / ours.median:.0%}" if ours else "",
                    ]


def gate(arm: Product, expected: Tensor) -> harness.Gate:
    """The error of the product with the first copy of the weight."""
    arm.enter()
    arm.run(0)
    return harness.Gate(error=harness.relative_rms(arm.output(0), expected), tolerance=arm.tolerance)


HEADER = ("shape", "weight", "threads", "M", "m3", "p20..p80", "torch", "torch / m3", "C(M) / C(1)", "of roofline")


def run(plan: Plan, say: Callable[[str], None]) -> str:
    """The table, headed by what it was measured on."""
    commit, changed = record.commit()
    head = f"{record.cpu_model()}, commit {commit}{' and changes' if changed else ''}, {record.now()}"
    return f"{head}\n\n{tables.table(HEADER, lines(plan, say))}"
