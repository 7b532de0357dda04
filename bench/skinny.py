"""INT4 products of few rows: what M rows cost over one, C(M) / C(1), beside the least that the machine allows.

``python -m bench skinny`` measures int4_gemm with one thread on the linear layers of two models. A round visits every
(mode, instruction set, M) once; every visit takes the next copies of the weight from one store, so that a copy comes
back only when all others have been read. ``streamed``: the store is as large as the model's INT4 weights (or 1 GiB),
as in decoding, where every layer reads its own; ``cached``: the same few copies again and again, inside L2.

    time of M rows >= max(bytes of weight / read bandwidth, M * N * K / peak multiply-accumulates)

with the read bandwidth of a store of that size, and the peak of the instructions that this mode and instruction set
multiply with. Taking nibbles apart, scales and activations are not in that bound. A row's bits must not depend on M:
the gate compares them.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import harness, record, roofline
from bench.harness import Arm, Gate, UnavailableError
from bench.int4 import COMPUTES, best_isa, tolerance_of, use_isa
from bench.record import SkinnyRow
from bench.workloads import SKINNY_LINEARS, SKINNY_STORES, Linear, Problem, look_up, make_problem
from m3kernels.int4 import Int4Weight, int4_gemm

OP = "int4_skinny"
MODES = tuple(COMPUTES)
VISIT_BYTES = 4 << 20  # of weights in one visit
CACHED_BYTES = 1 << 20  # half of a small L2
CACHED_VISITS = 8  # times that a visit goes through them
# (instruction set, mode) -> the instructions that its inner product is made of, and how many of them a product takes
INSTRUCTIONS = {
    ("avx2", "int8"): ("vpmaddubsw+vpaddw ymm", 1),
    ("avx2", "int16"): ("vpmaddwd+vpaddd ymm", 1),
    ("avx2", "exact"): ("fma ymm", 1),
    ("avxvnni", "int8"): ("vpdpbusd ymm", 1),
    ("avxvnni", "int16"): ("vpdpwssd ymm", 1),
    ("avxvnni", "exact"): ("vpdpbusd ymm", 3),
    ("avx512vnni", "int8"): ("vpdpbusd zmm", 1),
    ("avx512vnni", "int16"): ("vpdpwssd zmm", 1),
    ("avx512vnni", "exact"): ("vpdpbusd zmm", 3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which shapes, modes, instruction sets and M, and for how long."""

    shapes: tuple[str, ...] = tuple(SKINNY_LINEARS)
    modes: tuple[str, ...] = MODES
    isas: tuple[str, ...] = ()  # empty: avx2 and the best
    ms: tuple[int, ...] = (1, 2, 4, 8)
    seconds: float = 8.0  # per shape and store
    min_rounds: int = 9

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"bench skinny: modes: want names of {', '.join(MODES)}; got {mode!r}")
        if 1 not in self.ms:
            raise ValueError(f"bench skinny: ms: want M = 1 among them; got {self.ms}")


PRESETS = {"acceptance": Plan(), "quick": Plan(shapes=("smollm2-135m.o", "qwen3-8b.kv"), seconds=2.0, min_rounds=5)}


class Store:
    """Copies of one weight, handed out one after another to whoever asks."""

    def __init__(self, problem: Problem, total_bytes: int, visit_bytes: int) -> None:
        count = max(total_bytes // problem.weight_bytes, 2)
        self.weights = [problem.packed(copy) for copy in range(count)]
        self.span = max(round(visit_bytes / problem.weight_bytes), 1)  # of a visit, perhaps more than there are
        self.next = 0

    def take(self) -> list[int]:
        taken = [(self.next + i) % len(self.weights) for i in range(self.span)]
        self.next = (self.next + self.span) % len(self.weights)
        return taken


class CachedProbe:
    """Read bandwidth of a few bytes that were read just before: the best of several reads, bytes per second."""

    def __init__(self, kind: int) -> None:
        self.probe = roofline.ReadProbe(1, kind, total_bytes=CACHED_BYTES)

    def bandwidth(self) -> float:
        return max(self.probe.bandwidth() for _ in range(CACHED_VISITS))


class Rows(Arm):
    """int4_gemm of the first M rows of x in one mode and instruction set, on the store's next weights."""

    def __init__(self, problem: Problem, store: Store, *, mode: str, isa: str, m: int) -> None:
        self.isa = use_isa(isa)
        self.mode, self.m, self.store, self.computes = mode, m, store, COMPUTES[mode]
        self.tolerance, self.span = tolerance_of(mode), store.span
        self.name = f"m3_{mode}@{isa} M={m}"
        self.x = problem.x[:m].clone()

    def enter(self) -> None:
        super().enter()
        use_isa(self.isa)
        self.weights: list[Int4Weight] = [self.store.weights[copy] for copy in self.store.take()]

    def run(self, part: int) -> None:
        for weight in self.weights:
            int4_gemm(self.x, weight, activations=self.mode)

    def product(self, copy: int) -> Tensor:
        super().enter()
        use_isa(self.isa)
        return int4_gemm(self.x, self.store.weights[copy], activations=self.mode)

    def alone(self, copy: int) -> Tensor:
        """The same rows, each in a product of its own."""
        weight = self.store.weights[copy]
        return torch.cat([int4_gemm(row, weight, activations=self.mode) for row in self.x.split(1)])


def gate(arm: Rows, problem: Problem) -> Gate:
    """The worse error of the first and the last copy; nan where a row's bits depend on M."""
    errors = []
    for copy in (0, len(arm.store.weights) - 1):
        y = arm.product(copy)
        same = torch.equal(y, arm.alone(copy))
        errors.append(harness.relative_rms(y, problem.result(arm.m, copy)) if same else math.nan)
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return Gate(error=error, tolerance=arm.tolerance)


def peak_of(isa: str, mode: str, peaks: Mapping[str, float]) -> float | None:
    """Multiply-accumulates per second that the instructions of a mode allow; None where they were not measured."""
    name, count = INSTRUCTIONS.get((isa, mode), ("", 1))
    return peaks[name] / count if name in peaks else None


def run(shape: str, plan: Plan, say: Callable[[str], None], peaks: dict[str, float]) -> Iterator[list[SkinnyRow]]:
    """The rows of each store of one shape.

    ``peaks``: multiply-accumulates per second by instruction, the best seen so far; measured again for each store.
    """
    linear = look_up(shape, SKINNY_LINEARS)
    problem = make_problem(linear, max(plan.ms))
    best = best_isa()
    isas = plan.isas or tuple(dict.fromkeys(("avx2", best)))
    for memory, total in SKINNY_STORES[shape].items():
        cached = memory == "cached"
        visit_bytes = CACHED_VISITS * CACHED_BYTES if cached else VISIT_BYTES
        store = Store(problem, CACHED_BYTES if cached else total, visit_bytes)
        say(f"{shape}, {memory}: {len(store.weights)} copies of {problem.weight_bytes / 1e6:.2f} MB")

        def make(name: str, store: Store = store) -> Rows:
            mode, isa, m = name.split()
            return Rows(problem, store, mode=mode, isa=isa, m=int(m))

        names = [f"{mode} {isa} {m}" for isa in isas for mode in plan.modes for m in plan.ms]
        arms, absent = [], {}
        for name in names:
            try:
                arms.append(make(name))
            except UnavailableError as error:
                absent[name] = str(error)
        found = {arm.name: gate(arm, problem) for arm in arms}
        timed = [arm for arm in arms if found[arm.name].passed]
        ceilings = roofline.undisturbed(roofline.measured(1, record.cpu_model()))
        for name, (_, rate) in ceilings.peaks.items():
            peaks[name] = max(rate, peaks.get(name, 0.0))
        kind = ceilings.read_kind
        probe = CachedProbe(kind) if cached else roofline.ReadProbe(1, kind, total_bytes=total)
        times, rates = harness.interleave(
            timed, seconds=plan.seconds, min_rounds=plan.min_rounds, probe=probe.bandwidth
        )
        yield list(rows(linear, problem, memory, store, arms, absent, found, times, rates, peaks))
        use_isa(None)
        del arms, timed, store
        gc.collect()


def rows(
    linear: Linear,
    problem: Problem,
    memory: str,
    store: Store,
    arms: Sequence[Rows],
    absent: dict[str, str],
    gates: dict[str, Gate],
    times: harness.Times,
    rates: Sequence[float],
    peaks: Mapping[str, float],
) -> Iterator[SkinnyRow]:
    """A row per mode, instruction set and M: with times where it passed its gate, without where it did not."""
    commit, dirty = record.commit()
    facts: dict[str, Any] = {
        "op": OP,
        "shape": linear.name,
        "n": linear.n,
        "k": linear.k,
        "group_size": linear.group_size,
        "memory": memory,
        "weight_bytes": problem.weight_bytes,
        "copies": len(store.weights),
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(),
        "date": record.now(),
        "command": record.command(),
    }
    for name, why in absent.items():
        mode, isa, m = name.split()
        yield SkinnyRow(**facts, arm=f"m3_{mode}", isa=isa, m=int(m), gate=f"absent: {why}")
    read = harness.spread(rates).p80 if rates else None  # undisturbed by other guests of the host
    for arm in arms:
        result = gates[arm.name]
        about = {"arm": f"m3_{arm.mode}", "isa": arm.isa, "m": arm.m}
        about |= {"error": result.error, "tolerance": result.tolerance}
        if not result.passed:
            yield SkinnyRow(**facts, **about, gate="failed")
            continue
        value = harness.spread(times[arm.name])
        one = times.get(f"m3_{arm.mode}@{arm.isa} M=1")
        growth = harness.ratio(times[arm.name], one) if one else None
        peak = peak_of(str(arm.isa), arm.mode, peaks)
        least = {m: least_seconds(m, linear, problem, read, peak) for m in (1, arm.m)} if read and peak else None
        yield SkinnyRow(
            **facts,
            **about,
            gate="passed",
            median_s=value.median,
            p20_s=value.p20,
            p80_s=value.p80,
            rounds=len(times[arm.name]),
            growth=None if growth is None else (growth.median, growth.p20, growth.p80),
            read_gbytes_s=None if read is None else read / 1e9,
            peak_gmacs=None if peak is None else peak / 1e9,
            least_s=None if least is None else least[arm.m],
            least_growth=None if least is None else least[arm.m] / least[1],
        )


def least_seconds(m: int, linear: Linear, problem: Problem, read: float, peak: float) -> float:
    """No product of m rows can take less."""
    return max(problem.weight_bytes / read, m * linear.n * linear.k / peak)
