"""Time several ways of computing one thing, fairly: gated on error, interleaved, on weights the cache has forgotten.

An arm may hold several copies of its weight, ``parts`` lists of ``span`` of them. A visit runs one part, ``span``
products one after another as the layers of a model would; a round visits each arm once, in an order shuffled by a fixed
seed, each visit on the arm's next part. So between two uses of a copy the other parts and the other arms have gone
through the cache. Before a visit the harness waits until no thread pool of the arm before spins any more. The figures
of a round belong together: ratios are taken within a round and their median reported.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from m3kernels import dispatch

QUIET_SLICE = 0.001  # seconds slept at a time while the pools of the previous arm come to rest
QUIET_LIMIT = 0.1  # at most
QUIET_SHARE = 0.2  # CPU seconds per second under which the process counts as quiet
BLOCK_ELEMENTS = 1 << 24  # compared at a time, in fp64


class UnavailableError(Exception):
    """An arm cannot be built or run here; the message says why."""


CHOICE = "M3KERNELS_BACKEND"  # the variable by which m3kernels lets a room be forced
GIVEN_CHOICE = os.environ.get(CHOICE)  # of this process, before any arm


def use_room(choice: str | None) -> None:
    """Force a room of our kernels ("int4=cuda") from the next call on; None: as this process was started."""
    wanted = GIVEN_CHOICE if choice is None else choice
    if os.environ.get(CHOICE) == wanted:
        return
    if wanted is None:
        del os.environ[CHOICE]
    else:
        os.environ[CHOICE] = wanted
    dispatch.rooms.cache_clear()


class Arm:
    """One way of computing the thing. Subclasses build what they need in ``__init__`` and fill in the fields."""

    name: str
    threads: int = 1
    computes: str = "fp32"  # operands of its inner product: the ceiling that bounds it
    tolerance: float = 1e-5  # relative RMS error, against fp64, beyond which there is no time
    span: int = 1
    parts: int = 1
    room: str | None = None  # that our kernels are forced to, as use_room takes it

    def enter(self) -> None:
        """Process-wide settings of this arm (thread count, room) and a clean table, outside the timed region."""
        torch.set_num_threads(self.threads)
        use_room(self.room)

    def run(self, part: int) -> None:
        """The timed work of a part."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what Python does not."""


class GemmArm(Arm):
    """One way of computing y = x @ W.T for ``span`` weights in a visit."""

    lossy: bool = False  # rounds the activations to int8, or everything to bf16
    stored_bytes: int = 0  # of one copy of the weight, as this arm reads it

    def load(self, x: Tensor) -> None:
        """Take x (M, K) fp32, converted to what the arm wants; not timed."""
        raise NotImplementedError

    def output(self, copy: int) -> Tensor:
        """(M, N) fp32: result of the last run for this copy."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """The error of an arm, and whether it may have a time."""

    error: float  # RMS of y - y64 over RMS of y64; nan if an arm gave something that is not finite or of another shape
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def relative_rms(y: Tensor, expected: Tensor) -> float:
    """RMS of y - expected over RMS of expected, in fp64; nan where y has another shape or is not finite."""
    if y.shape != expected.shape:
        return math.nan
    error = scale = 0.0
    pairs = (tensor.reshape(-1).split(BLOCK_ELEMENTS) for tensor in (y, expected))
    for part, wanted in zip(*pairs, strict=True):
        error += float((part.double() - wanted.double()).square().sum())
        scale += float(wanted.double().square().sum())
    return math.sqrt(error / scale) if math.isfinite(error) and scale > 0 else math.nan


def worst(errors: Sequence[float]) -> float:
    """The largest; nan where one of them is."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def gate(arm: GemmArm, expected: Callable[[int], Tensor]) -> Gate:
    """Run every part once and compare its first and last copy with ``expected(copy)``; the worse error counts."""
    errors = []
    arm.enter()
    for part in range(arm.parts):
        arm.run(part)
        for copy in sorted({part * arm.span, (part + 1) * arm.span - 1}):
            errors.append(relative_rms(arm.output(copy), expected(copy)))
    return Gate(error=worst(errors), tolerance=arm.tolerance)


# -- which arms may be timed ------------------------------------------------------------------------------------------
AnyArm = TypeVar("AnyArm", bound=Arm)


def build(
    names: Sequence[str], make: Callable[[str], AnyArm], say: Callable[[str], None]
) -> tuple[list[AnyArm], dict[str, str]]:
    """The arms that can be built here, and why the others cannot."""
    arms, absent = [], {}
    for name in names:
        try:
            arm = make(name)
        except UnavailableError as error:
            absent[name] = str(error)
            say(f"  {name}: absent: {error}")
            continue
        arm.name = name
        arms.append(arm)
    return arms, absent


def pass_gates(
    arms: Sequence[AnyArm], gate: Callable[[AnyArm], Gate], absent: dict[str, str], say: Callable[[str], None]
) -> tuple[list[AnyArm], dict[str, Gate]]:
    """Run each arm once; those that are exact enough may be timed. One that turns out not to run joins ``absent``."""
    gates = {}
    for arm in arms:
        try:
            result = gates[arm.name] = gate(arm)
        except UnavailableError as error:
            absent[arm.name] = str(error)
            say(f"  {arm.name}: absent: {error}")
            continue
        if not result.passed:
            say(f"  {arm.name}: gate failed: error {result.error:.2e}, tolerance {result.tolerance:.0e}: no time")
    return [arm for arm in arms if arm.name in gates and gates[arm.name].passed], gates


# -- the clock --------------------------------------------------------------------------------------------------------
def settle() -> None:
    """Wait until this process burns no CPU: pools of the arm before have stopped spinning."""
    deadline = time.perf_counter() + QUIET_LIMIT
    while time.perf_counter() < deadline:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(QUIET_SLICE)
        if time.process_time() - cpu < QUIET_SHARE * (time.perf_counter() - wall):
            return


def visit(arm: Arm, part: int) -> float:
    """Seconds per product of one part, on the CPU."""
    arm.enter()
    settle()
    start = time.perf_counter()
    arm.run(part)
    return (time.perf_counter() - start) / arm.span


Times = dict[str, list[float]]


def interleave(
    arms: Sequence[Arm],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    visit: Callable[[Arm, int], float] = visit,
    probe: Callable[[], float] | None = None,
    first_untimed: bool = True,
) -> tuple[Times, list[float]]:
    """Rounds of one visit per arm until ``seconds`` are over; at least min_rounds, at most max_rounds.

    ``first_untimed``: a round before them does not count (first touches, lazy initialisation).

    Returns: seconds per product by arm name, one entry a round, and one result of ``probe`` a round.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"interleave: arms: want distinct names; got {names}")
    order, shuffle = list(arms), random.Random(0)
    for arm in arms if first_untimed else ():
        visit(arm, 0)
    times: Times = {name: [] for name in names}
    probes: list[float] = []
    start, done = time.perf_counter(), 0
    while done < max_rounds and (done < min_rounds or time.perf_counter() - start < seconds):
        shuffle.shuffle(order)
        for arm in order:
            times[arm.name].append(visit(arm, (done + 1) % arm.parts))
        if probe is not None:
            settle()
            probes.append(probe())
        done += 1
    return times, probes


# -- statistics -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    if not values:
        raise ValueError("spread: values: want at least one; got none")
    return Spread(median=quantile(values, 0.5), p20=quantile(values, 0.2), p80=quantile(values, 0.8))


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times faster ``ours`` is than ``peer``: of the ratios of each round."""
    if len(peer) != len(ours):
        raise ValueError(f"ratio: ours: want {len(peer)} rounds, like peer; got {len(ours)}")
    return spread([a / b for a, b in zip(peer, ours, strict=True)])


def ratios(times: Mapping[str, Sequence[float]], name: str) -> dict[str, tuple[float, float, float]]:
    """Of one arm against each other one: {peer: (median, p20, p80)}."""
    found = {peer: ratio(values, times[name]) for peer, values in times.items() if peer != name}
    return {peer: (value.median, value.p20, value.p80) for peer, value in found.items()}


# -- memory -----------------------------------------------------------------------------------------------------------
def resident(field: str) -> int:
    """Bytes of this process that are in memory, now ("VmRSS") or at most since the last reset ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UnavailableError(f"/proc/self/status has no {field}")


def peak_extra_bytes(work: Callable[[], object]) -> int:
    """How far the memory of this process grows, at its highest, while ``work`` runs, over what it holds before.

    What libraries load when first used counts too: run the work on a small input first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps back would hide as much growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    work()
    return max(resident("VmHWM") - before, 0)


# -- copies -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """How many copies of a weight each arm holds: parts lists of span."""

    span: int
    parts: int

    @property
    def copies(self) -> int:
        return self.span * self.parts


def rotation(
    weight_bytes: int,
    all_arms_bytes: int,
    *,
    visit_bytes: int = 32 << 20,
    target_bytes: int = 1 << 30,
    limit_bytes: int = 6 << 30,
) -> Rotation:
    """Copies such that a visit reads about visit_bytes of INT4 weight and that all arms together hold target_bytes.

    Args:
        weight_bytes: one INT4 copy. all_arms_bytes: one copy of every arm together.
        limit_bytes: never more than this in all, unless two copies alone need more.
    """
    span = min(max(visit_bytes // weight_bytes, 2), 32)
    parts = max(math.ceil(target_bytes / (span * all_arms_bytes)), 2)
    parts = min(parts, max(limit_bytes // (span * all_arms_bytes), 1), max(64 // span, 2))
    if span * all_arms_bytes > limit_bytes:
        span = max(limit_bytes // all_arms_bytes, 2)
    return Rotation(span=span, parts=parts)
