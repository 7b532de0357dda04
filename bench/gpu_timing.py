"""Time work on a GPU: call by call with a cold L2 cache, and as a rotation over weights that L2 cannot hold.

cold      L2 is flushed (a buffer larger than it is written), then one call is timed between two events. This is how
          figures of other projects are usually taken, and what promises are judged by.
rotation  the calls of many layers, each with a weight of its own, in one CUDA graph: the time of a replay by the
          number of calls. This is how a model runs: weights from memory, code and activations from cache.

In both the work is a replayed CUDA graph where it can be captured, behind a kernel that keeps the GPU busy meanwhile,
so that the host's launch latency is not in the time; where it cannot, rows say "eager". ``HostClock`` does the same on
a CPU, without graphs and caches, so that everything around the clock runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bench import harness
from bench.harness import Arm, UnavailableError
from bench.record import Row
from bench.roofline import Ceilings
from m3kernels.dispatch import BackendError

TIMINGS = ("cold", "rotation")
BUSY_CYCLES = 1_000_000  # of the kernel in front of timed work: about half a millisecond
FLUSH_BYTES = 256 << 20  # written to flush L2, or twice L2 if that is more
COLD_FACTOR = 4  # a rotation holds at least so many times L2
LEAST_LAYERS, MOST_LAYERS = 4, 94  # calls of a rotation; 94 is the depth of the largest model that is measured
REPEATS = 15  # of a measurement of a ceiling
BROKE = "broke: "  # opens the reason of an arm that raised something else than "not here"

# Memory bandwidth by the maker's data sheet, bytes per second; the first pattern found in the name counts.
SPEC_BYTES_S = (
    (r"\bH200\b", 4.8e12),
    (r"\bH100 NVL\b", 3.9e12),
    (r"\bH100 PCIe\b", 2.0e12),
    (r"\bH100\b", 3.35e12),
    (r"\bA100-SXM4-80GB\b", 2.039e12),
    (r"\bA100-SXM4-40GB\b", 1.555e12),
    (r"\bA100 80GB PCIe\b", 1.935e12),
    (r"\bB200\b", 8.0e12),
)


def spec_bandwidth(name: str) -> float | None:
    """Bytes per second of the memory of a GPU of that name; None for one that is not listed."""
    return next((rate for pattern, rate in SPEC_BYTES_S if re.search(pattern, name)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What of a device a plan depends on."""

    name: str
    l2_bytes: int
    memory_bytes: int
    spec_bytes_s: float | None


def layers(weight_bytes: int, all_arms_bytes: int, card: Card, share: float = 0.6) -> int:
    """Calls of a rotation: weights of ``COLD_FACTOR`` times L2, at most 94, and ``share`` of the memory for all arms.

    Args:
        weight_bytes: that one call reads, of the arm that reads least. all_arms_bytes: one copy of every arm together.
    """
    wanted = max(math.ceil(COLD_FACTOR * card.l2_bytes / max(weight_bytes, 1)), LEAST_LAYERS)
    room = int(share * card.memory_bytes / max(all_arms_bytes, 1))
    return max(min(wanted, MOST_LAYERS, room), 1)


# -- work that is timed -----------------------------------------------------------------------------------------------
class Work:
    """Calls in order. ``first`` runs the first alone, ``all`` every one; both return their results."""

    launch = "eager"
    why_eager = ""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = list(calls)

    def first(self) -> Any:
        return self.calls[0]()

    def all(self) -> list[Any]:
        return [call() for call in self.calls]


class Captured(Work):
    """Calls in two CUDA graphs, of the first alone and of all; launched one by one where they cannot be captured."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        super().__init__(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever compiles, tunes or allocates for good does so now
            for _ in range(2):
                self.calls[0]()
            for call in self.calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            self.graph_of_first, (self.first_result,) = self.capture(self.calls[:1])
            self.graph_of_all, self.all_results = self.capture(self.calls)
        except RuntimeError as error:  # it synchronises, or allocates outside of torch
            torch.cuda.synchronize()
            self.why_eager = str(error).splitlines()[0]
            return
        self.launch = "graph"

    @staticmethod
    def capture(calls: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
        return graph, results

    def first(self) -> Any:
        if self.launch == "eager":
            return super().first()
        self.graph_of_first.replay()
        return self.first_result

    def all(self) -> list[Any]:
        if self.launch == "eager":
            return super().all()
        self.graph_of_all.replay()
        return self.all_results


class GpuArm(Arm):
    """An arm whose work is a list of calls; ``load`` of a subclass hands them to the clock as ``work``."""

    work: Work

    @property
    def launch(self) -> str:
        return self.work.launch

    def enter(self) -> None:
        """The room; thread counts do not matter here."""
        harness.use_room(self.room)

    def run(self, part: int) -> None:
        self.work.all()


Result = TypeVar("Result")


def guarded(work: Callable[[], Result], clock: Clock) -> Result:
    """The result of ``work``, or UnavailableError with what it raised. An error that broke the device raises on."""
    try:
        return work()
    except UnavailableError:
        raise
    except BackendError as error:
        raise UnavailableError(str(error)) from error
    except Exception as error:
        clock.synchronize()  # raises again if the device is lost: there is nothing more to measure then
        clock.release()
        lines = str(error).splitlines() or [""]
        raise UnavailableError(f"{BROKE}{type(error).__name__}: {lines[0][:200]}") from error


def broken(rows: Sequence[Row]) -> list[str]:
    """What of ours went wrong, a line each: a gate that failed, or an error that is no "not here"."""
    return [
        f"{row.op} {row.shape}: {row.arm}: {row.gate}"
        for row in rows
        if row.arm.startswith("m3_") and (row.gate == "failed" or row.gate.startswith(f"absent: {BROKE}"))
    ]


# -- clocks -----------------------------------------------------------------------------------------------------------
class HostClock:
    """A CPU: no graphs, no flush, no ceilings."""

    device = "cpu"
    card = Card(name="host", l2_bytes=0, memory_bytes=1 << 32, spec_bytes_s=None)

    def work(self, calls: Sequence[Callable[[], Any]]) -> Work:
        return Work(calls)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def release(self) -> None:
        """Nothing is kept."""

    def seconds(self, timed: Callable[[], Any], *, cold: bool = False) -> float:
        start = time.perf_counter()
        timed()
        return time.perf_counter() - start

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """Most bytes that torch allocates beyond those it holds while ``work`` runs, its result among them."""
        return None

    def ceilings(self) -> Ceilings | None:
        return None


class CudaClock(HostClock):
    """The current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        facts = torch.cuda.get_device_properties()
        self.card = Card(
            name=facts.name,
            l2_bytes=facts.L2_cache_size,
            memory_bytes=facts.total_memory,
            spec_bytes_s=spec_bandwidth(facts.name),
        )
        self.flushed = torch.empty(max(FLUSH_BYTES, 2 * self.card.l2_bytes), dtype=torch.uint8, device="cuda")

    def work(self, calls: Sequence[Callable[[], Any]]) -> Work:
        return Captured(calls)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def seconds(self, timed: Callable[[], Any], *, cold: bool = False) -> float:
        """Between two events of the stream; ``cold``: after a flush of L2."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        if cold:
            self.flushed.zero_()
        start.record()
        timed()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def median(self, timed: Callable[[], Any]) -> float:
        return harness.spread([self.seconds(timed) for _ in range(REPEATS)]).median

    @functools.cache  # noqa: B019 one clock a process
    def ceilings(self) -> Ceilings | None:
        """Bytes per second of a copy of 1 GiB (read and written), and what torch's bf16 matmul of 8192^3 reaches."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() / self.median(lambda: target.copy_(source))
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        macs = 8192**3 / self.median(lambda: a @ b)
        peaks = {"bf16 matmul of 8192^3": ("bf16", macs)}
        return Ceilings(threads=1, read_bytes=bandwidth, read_kind=0, peaks=peaks, source="torch.cuda copy")


Clock = HostClock


@functools.cache
def clock(device: str = "cuda") -> Clock:
    """The clock of a device type. Raises RuntimeError where torch sees no GPU."""
    if device == "cpu":
        return HostClock()
    if not torch.cuda.is_available():
        raise RuntimeError("bench --device cuda: torch sees no GPU")
    return CudaClock()


# -- visits, as harness.interleave takes them --------------------------------------------------------------------------
def visit_of(timing: str, clock: Clock) -> Callable[[Any, int], float]:
    """Seconds per call of a GpuArm, by one of TIMINGS."""

    def cold(arm: GpuArm, part: int) -> float:
        arm.enter()
        return clock.seconds(arm.work.first, cold=True)

    def rotation(arm: GpuArm, part: int) -> float:
        arm.enter()
        return clock.seconds(arm.work.all) / len(arm.work.calls)

    return {"cold": cold, "rotation": rotation}[timing]


def visit(arm: Arm, part: int) -> float:
    """Seconds per product of one part of an arm that is no GpuArm, on the GPU, launched by hand."""
    arm.enter()
    return clock().seconds(functools.partial(arm.run, part)) / arm.span
