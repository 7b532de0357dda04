"""Tree drafting and verification against torch: cases to rows.

``python -m bench spec_decode`` measures the cases of spec_decode_cases.py with the arms of spec_decode_arms.py, one
thread, interleaved. A visit computes several different batches (layers) one after another, so that a time is a mean
over trees and the inputs do not sit in L1. Roofline: what an op has to read (the rows of logits on the accepted path,
the keys and values attended to, ...) at the read bandwidth measured between the arms, or, if that takes longer, the
multiplications of attention at the fp32 peak. Peak memory of verification is measured in processes of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench import harness, record, roofline
from bench.record import SpecRow
from bench.spec_decode_arms import ARMS
from bench.spec_decode_cases import (
    CASES,
    AttentionCase,
    Case,
    CommitCase,
    DraftCase,
    FinalizeCase,
    VerifyCase,
    VerifyProblem,
    find_case,
    make_attention,
    make_commit,
    make_draft,
    make_finalize,
    make_verify,
)

SMALL = VerifyCase(name="small", requests=1, nodes=4, vocabulary=512, mode="greedy")  # on which libraries are loaded
MEMORY_FROM = 100_000  # vocabulary from which peaks are measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which cases, and for how long."""

    cases: tuple[str, ...] = tuple(CASES)
    threads: tuple[int, ...] = (1,)
    seconds: float = 1.5  # per case and thread count
    min_rounds: int = 3
    memory: bool = True  # measure the peaks of verification

    def __post_init__(self) -> None:
        for name in self.cases:
            find_case(name)


def quick() -> tuple[str, ...]:
    """A case of each op."""
    return tuple({case.op: name for name, case in reversed(CASES.items())}.values())


PRESETS = {
    "acceptance": Plan(),
    "verify": Plan(cases=tuple(name for name, case in CASES.items() if isinstance(case, VerifyCase))),
    "attention": Plan(cases=tuple(name for name, case in CASES.items() if isinstance(case, AttentionCase))),
    "quick": Plan(cases=quick(), seconds=0.5, memory=False),
}


# -- inputs -----------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def verify_batches(requests: int, nodes: int, vocabulary: int, span: int) -> tuple[VerifyProblem, ...]:
    """The batches of a size; the last ones are kept, for cases that differ in mode and filters only."""
    sizes = {"requests": requests, "nodes": nodes, "vocabulary": vocabulary, "span": span}
    case = VerifyCase(name="", mode="target_only", **sizes)
    return tuple(make_verify(case, seed) for seed in range(span))


def problems_of(case: Case) -> list[Any]:
    """What a visit computes, one after another."""
    if isinstance(case, VerifyCase):
        found = verify_batches(case.requests, case.nodes, case.vocabulary, case.span)
        return [problem.of(case) for problem in found]
    make: dict[type, Callable[..., Any]] = {
        AttentionCase: make_attention,
        DraftCase: make_draft,
        FinalizeCase: make_finalize,
        CommitCase: make_commit,
    }
    return [make[type(case)](case, seed) for seed in range(case.span)]


def touched_bytes(case: Case, problems: Sequence[Any], size: int = 4) -> int:
    """Bytes that one problem has to read, the mean of the visit; logits, queries and caches of ``size`` bytes each."""
    if isinstance(case, VerifyCase):
        rows = sum(problem.visited_rows for problem in problems) / len(problems)
        return round(size * case.vocabulary * rows)
    if isinstance(case, AttentionCase):
        return size * (case.cache_elements + case.requests * case.queries * case.heads * case.head_dim)
    if isinstance(case, DraftCase):
        return size * case.requests * case.frontier * case.vocabulary
    if isinstance(case, FinalizeCase):
        first = problems[0]
        return 4 * first.scores.numel() + 8 * (first.tokens.numel() + first.parent_list.numel())
    return 2 * size * case.layers * case.requests * case.accepted * case.kv_heads * case.head_dim


def multiplications(case: Case, problems: Sequence[Any]) -> int:
    """Multiply-accumulates of attention: scores, and the weighted sum of the values."""
    if not isinstance(case, AttentionCase):
        return 0
    return 2 * case.kv_heads * case.head_dim * int(problems[0].allowed().sum())


def facts_of(case: Case, problems: Sequence[Any], size: int = 4) -> dict[str, Any]:
    """What every row of a case says of it; ``size`` as in touched_bytes."""
    facts: dict[str, Any] = {
        "op": case.op,
        "shape": case.name,
        "requests": case.requests,
        "span": case.span,
        "touched_bytes": touched_bytes(case, problems, size),
        "macs": multiplications(case, problems),
    }
    if isinstance(case, VerifyCase):
        rows = sum(problem.visited_rows for problem in problems)
        facts |= {"nodes": case.nodes, "vocabulary": case.vocabulary, "mode": case.mode, "filtered": case.filtered}
        facts["visited"] = rows / (len(problems) * case.requests)
    elif isinstance(case, AttentionCase):
        facts |= {"queries": case.queries, "context": case.context, "nodes": case.queries if case.tree else None}
    elif isinstance(case, DraftCase):
        facts["vocabulary"] = case.vocabulary
    else:
        facts["nodes"] = case.nodes
    return facts


# -- memory -----------------------------------------------------------------------------------------------------------
def measures_peak(case: Case) -> bool:
    return isinstance(case, VerifyCase) and case.vocabulary >= MEMORY_FROM


def peaks_here(arm: str, names: Sequence[str]) -> dict[str, int]:
    """case -> most bytes that one batch adds to this process beyond its inputs; for a process that did nothing yet.

    The cases are of one size. Memory that an arm keeps counts for the first case only.
    """
    torch.set_num_threads(1)
    make = ARMS["tree_verify"][arm]
    for mode in ("greedy", "coupled", "target_only"):  # libraries load what they need
        small = dataclasses.replace(SMALL, mode=mode, filtered=mode != "greedy")
        harness.peak_extra_bytes(functools.partial(make([make_verify(small)], 1).run, 0))
    cases = [case for case in map(find_case, names) if isinstance(case, VerifyCase)]
    batch = make_verify(cases[0])
    return {case.name: harness.peak_extra_bytes(functools.partial(make([batch.of(case)], 1).run, 0)) for case in cases}


def peaks_in_fresh_processes(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """case -> arm -> ``peaks_here`` of another process: one a case for ours, one a size for torch, which keeps nothing.

    Raises RuntimeError with what a process said where it fails.
    """
    cases = [case for case in map(find_case, names) if isinstance(case, VerifyCase) and measures_peak(case)]
    sizes: dict[int, list[str]] = {}
    for case in cases:
        sizes.setdefault(case.requests, []).append(case.name)
    jobs = [("m3", [case.name]) for case in cases] + [("torch_all_rows", members) for members in sizes.values()]
    found: dict[str, dict[str, int]] = {}
    for arm, members in jobs:
        path = os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "GLIBC_TUNABLES": ""}  # freed memory must show as free
        command = [sys.executable, "-m", "bench.spec_decode", arm, *members]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{members[0]}: peaks were not measured: {done.stderr.strip()[-400:]}")
        for name, peak in json.loads(done.stdout.splitlines()[-1]).items():
            found.setdefault(name, {})[arm] = peak
    return found


# -- cases to rows ----------------------------------------------------------------------------------------------------
def run(plan: Plan, say: Callable[[str], None]) -> Iterator[list[SpecRow]]:
    """The rows of each case and thread count, all arms side by side."""
    peaks: dict[str, dict[str, int]] = {}
    if plan.memory and any(measures_peak(find_case(name)) for name in plan.cases):
        say("peak memory of verification")
        peaks = peaks_in_fresh_processes(plan.cases)
    for threads in plan.threads:
        ceilings = roofline.measured(threads, record.cpu_model())
        peak = roofline.undisturbed(ceilings).peak("fp32")
        probe = roofline.ReadProbe(threads, ceilings.read_kind)
        for name in plan.cases:
            say(f"{name}, {threads} thread(s)")
            yield run_case(find_case(name), threads, plan, probe, peak, peaks.get(name, {}), say)
            gc.collect()
    verify_batches.cache_clear()


def run_case(
    case: Case,
    threads: int,
    plan: Plan,
    probe: roofline.ReadProbe,
    peak: float | None,
    peaks: Mapping[str, int],
    say: Callable[[str], None],
) -> list[SpecRow]:
    problems = problems_of(case)
    make = ARMS[case.op]
    arms, absent = harness.build(list(make), lambda name: make[name](problems, threads), say)
    timed, gates = harness.pass_gates(arms, lambda arm: arm.gate(), absent, say)
    limits = {"seconds": plan.seconds, "min_rounds": plan.min_rounds}
    times, rates = harness.interleave(timed, probe=probe.bandwidth, **limits)
    read = harness.spread(rates).p80  # undisturbed by other guests of the host
    return list(rows(facts_of(case, problems), threads, arms, absent, gates, times, read, peak, peaks))


def rows(
    facts: Mapping[str, Any],
    threads: int,
    arms: Sequence[harness.Arm],
    absent: Mapping[str, str],
    gates: Mapping[str, harness.Gate],
    times: harness.Times,
    read: float | None,
    peak: float | None,
    peaks: Mapping[str, int],
    device: str = "cpu",
) -> Iterator[SpecRow]:
    """A row per arm: with times where it passed its gate, without where it did not or could not run."""
    commit, dirty = record.commit()
    place: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "case_threads": threads,
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(device),
        "date": record.now(),
        "command": record.command(),
    }
    least = max(facts["touched_bytes"] / read, facts["macs"] / peak if peak else 0.0) if read else None
    for name, why in absent.items():
        yield SpecRow(**facts, **place, arm=name, gate=f"absent: {why}")
    for arm in (arm for arm in arms if arm.name in gates):
        result = gates[arm.name]
        about = {"arm": arm.name, "error": result.error, "tolerance": result.tolerance}
        if not result.passed:
            yield SpecRow(**facts, **place, **about, gate="failed")
            continue
        value = harness.spread(times[arm.name])
        yield SpecRow(
            **facts,
            **place,
            **about,
            gate="passed",
            median_s=value.median,
            p20_s=value.p20,
            p80_s=value.p80,
            rounds=len(times[arm.name]),
            ratios=harness.ratios(times, arm.name),
            launch=getattr(arm, "launch", None),
            read_gbytes_s=None if read is None else read / 1e9,
            peak_gmacs=None if peak is None else peak / 1e9,
            roofline_share=None if least is None else least / value.median,
            peak_bytes=peaks.get(arm.name),
        )


def main() -> None:
    """In a fresh process: print the peaks of an arm in cases, all named as arguments."""
    print(json.dumps(peaks_here(sys.argv[1], sys.argv[2:])))


if __name__ == "__main__":
    main()
