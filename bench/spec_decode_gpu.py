"""Tree drafting and verification on one GPU: the cases, and their rows.

``python -m bench spec_decode --device cuda``. Logits, queries and caches in bf16. Inputs are drawn on the CPU, where
the reference also says what has to come out; one call is timed after a flush of L2, as a replayed CUDA graph. The arms
are those of spec_decode_arms.py, ours once for each room.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import gpu_timing, harness, spec_decode
from bench.gpu_timing import Clock, GpuArm, guarded
from bench.harness import Gate
from bench.record import SpecRow
from bench.spec_decode_arms import (
    AllRows,
    Attention,
    Commit,
    Finalize,
    Sdpa,
    SpecArm,
    TorchCommit,
    TorchFinalize,
    Verify,
    differing,
)
from bench.spec_decode_cases import (
    AttentionCase,
    Case,
    CommitCase,
    CommitProblem,
    FinalizeCase,
    VerifyCase,
    VerifyProblem,
)
from bench.workloads import look_up
from m3kernels.spec_decode import reference

DTYPE = torch.bfloat16
BATCHES = (1, 8, 64)
CALLS = 200
CHECKED = 4  # requests of a batch for which the reference computes what has to come out
ATTENTION_TOLERANCE = 1e-2  # relative RMS, of bf16
AS_FLOATS = ("logits", "q", "k_cache", "v_cache", "gate", "k_caches", "v_caches")  # tensors of a problem in DTYPE


def gpu_cases() -> Iterator[Case]:
    """Verification and trees over the vocabulary of 151936 with 32 nodes; attention and commits of Qwen3-235B-A22B."""
    for requests in BATCHES:
        stem = f"verify.n32.v151936.b{requests}"
        size = {"requests": requests, "nodes": 32, "vocabulary": 151936}
        yield VerifyCase(name=f"{stem}.greedy", mode="greedy", **size)
        for mode, filtered in itertools.product(("target_only", "coupled"), (False, True)):
            name = f"{stem}.{mode}{'.filtered' if filtered else ''}"
            yield VerifyCase(name=name, mode=mode, filtered=filtered, **size)
    for requests in BATCHES:
        yield FinalizeCase(name=f"finalize.n32.b{requests}", requests=requests, nodes=32)
    for requests in (1, 8):
        heads = {"heads": 64, "kv_heads": 4, "head_dim": 128}
        name = f"qwen3-235b-a22b.verify32.c4096.b{requests}"
        yield AttentionCase(name=name, context=4096, queries=32, tree=True, requests=requests, **heads)
    for requests in BATCHES:  # one key-value head each, as of 8 GPUs
        sizes = {"layers": 94, "kv_heads": 1, "head_dim": 128, "accepted": 4}
        yield CommitCase(name=f"commit.qwen3-235b-a22b.tp8.b{requests}", requests=requests, **sizes)


CASES: dict[str, Case] = {case.name: case for case in gpu_cases()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which cases, and for how long."""

    cases: tuple[str, ...] = tuple(CASES)
    seconds: float = 0.5  # per case
    min_rounds: int = 50
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in self.cases:
            look_up(name, CASES)


# -- problems on the device -------------------------------------------------------------------------------------------
def first_requests(problem: VerifyProblem, count: int) -> VerifyProblem:
    """The first requests of a batch alone."""
    cut = {
        field.name: getattr(problem, field.name)[:count]
        for field in dataclasses.fields(problem)
        if isinstance(getattr(problem, field.name), Tensor)
    }
    case = dataclasses.replace(problem.case, requests=min(count, problem.case.requests))
    return dataclasses.replace(problem, case=case, memo={}, **cut)


def emitted(problem: VerifyProblem, mode: str) -> Tensor:
    """The tokens of a mode by the room that serves the CPU; of the first requests the slow reference has to agree.

    Raises RuntimeError where it does not.
    """
    wanted_mode = problem.of(dataclasses.replace(problem.case, mode=mode))
    found = Verify([wanted_mode], 1).call(wanted_mode)
    few = first_requests(wanted_mode, CHECKED).emitted(mode)
    if not torch.equal(found[: len(few)], few):
        raise RuntimeError(f"{problem.case.name}: the room of the CPU does not emit the reference's tokens")
    return found


def moved(problem: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """The same problem with its tensors on a device; those of AS_FLOATS in ``dtype`` if one is given."""

    def move(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [move(name, each) for each in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if dtype is not None and name in AS_FLOATS else value.dtype)

    values = {field.name: move(field.name, getattr(problem, field.name)) for field in dataclasses.fields(problem)}
    return dataclasses.replace(problem, **values)


def prepared(case: Case, device: str) -> tuple[Any, Any]:
    """(problem on the CPU, problem on the device), in bf16; what has to come out is computed on the CPU if cheap."""
    (drawn,) = spec_decode.problems_of(dataclasses.replace(case, span=1))
    here = moved(drawn, "cpu", DTYPE)
    if isinstance(here, VerifyProblem):
        modes = {case.mode, case.mode if case.mode == "greedy" else "target_only"}
        tokens = {(mode, here.case.filtered): emitted(here, mode) for mode in sorted(modes)}
        there = dataclasses.replace(moved(here, device), memo={key: each.to(device) for key, each in tokens.items()})
        return dataclasses.replace(here, memo=tokens), there
    there = moved(here, device)
    if isinstance(case, FinalizeCase):
        there.__dict__["expected"] = tuple(tensor.to(device) for tensor in here.expected)
    return here, there


# -- arms -------------------------------------------------------------------------------------------------------------
class CapturableCommit(TorchCommit):
    """TorchCommit without a size that depends on values: unused steps move the root onto itself."""

    def call(self, problem: CommitProblem) -> Tensor:
        page_size = problem.k_caches[0].shape[1]
        steps = torch.arange(problem.accept_index.shape[1], device=problem.accept_index.device)
        used = steps <= problem.accept_length[:, None]
        table = problem.block_table.long()

        def slots(offset: Tensor) -> Tensor:
            at = problem.cache_seqlens[:, None] + offset.where(used, 0)
            return table.gather(1, (at // page_size).long()) * page_size + at % page_size

        source, target = slots(problem.accept_index.long()), slots(steps.expand_as(used))
        for cache in (*problem.k_caches, *problem.v_caches):
            flat = cache.flatten(0, 1)
            flat[target] = flat[source]
        return problem.cache_seqlens + problem.accept_length + 1


class OnGpu(GpuArm):
    """An arm of spec_decode_arms.py on one problem, in a room."""

    def __init__(self, inner: SpecArm[Any], here: Any, room: str | None) -> None:
        self.inner, self.here, self.tolerance = inner, here, inner.tolerance
        self.room = None if room is None else f"spec_decode={room}"
        self.peak_bytes: int | None = None

    def judge(self, clock: Clock) -> Gate:
        """Make the work, run it, compare it; measure the memory of a call."""
        self.enter()
        (problem,) = self.inner.problems
        if isinstance(self.inner, Commit):
            errors = [self.commit_error(problem)]
            self.work = clock.work([functools.partial(self.inner.call, problem)])
        else:
            self.work = clock.work([functools.partial(self.inner.call, problem)])
            output = self.work.first()
            clock.synchronize()
            errors = [self.inner.error(problem, output)]
        self.peak_bytes = clock.peak_bytes(functools.partial(self.inner.call, problem))
        return Gate(error=harness.worst(errors), tolerance=self.tolerance)

    def commit_error(self, problem: CommitProblem) -> float:
        """Of caches that nothing has moved in yet, against the reference on the CPU."""
        ours, theirs = problem.copied(), self.here.copied()
        seqlens = self.inner.call(ours)
        given = (theirs.accept_index, theirs.accept_length, theirs.k_caches, theirs.v_caches)
        wanted, _ = reference.tree_commit(*given, theirs.block_table, theirs.cache_seqlens, None)
        pairs = zip([*ours.k_caches, *ours.v_caches], [*theirs.k_caches, *theirs.v_caches], strict=True)
        found = [differing(seqlens.cpu(), wanted), *(differing(mine.cpu(), other) for mine, other in pairs)]
        return harness.worst(found)


Factory = Callable[..., SpecArm[Any]]
ROOMS = ("cuda", "triton")
GATED = functools.partial(Attention, gated=True)
OURS: dict[str, dict[str, Factory]] = {  # by op, and what the name of an arm ends in
    "tree_verify": {"": Verify},
    "tree_attention": {"": functools.partial(Attention, gated=False), "_gated": GATED},
    "tree_finalize": {"": Finalize},
    "tree_commit": {"": Commit},
}
PEERS: dict[str, dict[str, Factory]] = {
    "tree_verify": {"torch_all_rows": AllRows},
    "tree_attention": {
        "torch_sdpa": functools.partial(Sdpa, gathering=False),
        "torch_sdpa_gathered": functools.partial(Sdpa, gathering=True),
    },
    "tree_finalize": {"torch": TorchFinalize},
    "tree_commit": {"torch": CapturableCommit},
}


def arms_of(op: str) -> dict[str, tuple[Factory, str | None]]:
    """{name: (builder, room)} of an op: ours in each room, then the others."""
    ours = {f"m3_{room}{end}": (make, room) for room in ROOMS for end, make in OURS[op].items()}
    return ours | {name: (make, None) for name, make in PEERS[op].items()}


# -- cases to rows ----------------------------------------------------------------------------------------------------
def run(plan: Plan, say: Callable[[str], None]) -> Iterator[list[SpecRow]]:
    """The rows of each case, all arms side by side."""
    clock = gpu_timing.clock(plan.device)
    for name in plan.cases:
        say(name)
        harness.use_room(None)  # of the last arm that ran
        yield run_case(CASES[name], plan, clock, say)
        gc.collect()
        clock.release()
    spec_decode.verify_batches.cache_clear()


def run_case(case: Case, plan: Plan, clock: Clock, say: Callable[[str], None]) -> list[SpecRow]:
    here, there = prepared(case, plan.device)
    available = arms_of(case.op)

    def make(name: str) -> OnGpu:
        builder, room = available[name]
        inner = builder([there], 1)
        if isinstance(case, AttentionCase):
            inner.tolerance = ATTENTION_TOLERANCE
        return OnGpu(inner, here, room)

    arms, absent = harness.build(list(available), lambda name: guarded(lambda: make(name), clock), say)
    timed, gates = harness.pass_gates(arms, lambda arm: guarded(lambda: arm.judge(clock), clock), absent, say)
    for arm in timed:
        if arm.work.why_eager:
            say(f"  {arm.name}: not captured, launched by hand: {arm.work.why_eager}")
    limits = {"seconds": plan.seconds, "min_rounds": plan.min_rounds, "max_rounds": CALLS}
    times, _ = harness.interleave(timed, visit=gpu_timing.visit_of("cold", clock), **limits)
    facts = spec_decode.facts_of(dataclasses.replace(case, span=1), [here], DTYPE.itemsize) | {"timing": "cold"}
    bounds = clock.ceilings()
    read = None if bounds is None else bounds.read_bytes
    peak = None if bounds is None else bounds.peak("bf16")
    peaks = {arm.name: arm.peak_bytes for arm in timed if arm.peak_bytes is not None}
    made = spec_decode.rows(facts, 1, arms, absent, gates, times, read, peak, peaks, plan.device)
    return [with_spec_share(row, clock.card.spec_bytes_s) for row in made]


def with_spec_share(row: SpecRow, spec: float | None) -> SpecRow:
    """The row, a timed one with its share of the bandwidth of the data sheet, where that is known."""
    if not (spec and row.median_s):
        return row
    return dataclasses.replace(row, spec_share=row.touched_bytes / row.median_s / spec)
