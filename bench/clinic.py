"""``python -m bench.clinic``: turns a second of the scripted clinic on one core; rows to a document.

Work: whole consultations of every own case with a scripted physician and the scripted patient, in both modes, from the
making of the physician to the last stage. A turn is one exchange, the three later stages included; seconds are those of
the processor, for it is one thread. Gate: a second run of the same seeds gives the same bytes, and no patient's message
tells a fact that its reasons do not name.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import record
from m3.environment.case import Case, own_cases
from m3.environment.episode import run_consultation
from m3.environment.modes import draw
from m3.environment.patient import ScriptedPatient
from m3.environment.physicians import POLICIES
from m3.environment.trajectory import Trajectory, to_line
from m3.rewards.checklist import coverage

RESULTS = record.RESULTS / "clinic" / "turns.jsonl"  # not a row of kernels: the report of those reads the folder above
ARMS = ("good", "random_questions", "ask_everything")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClinicRow:
    """Turns a second of processor time: median, 20th and 80th percentile of the rounds; ``scored``: with coverage."""

    policy: str
    cases: int
    seeds: int
    turns: int
    rounds: int
    turns_per_s: tuple[float, float, float]
    scored_turns_per_s: tuple[float, float, float]
    gate: str
    commit: str
    dirty: bool
    machine: dict[str, object]
    date: str
    command: str


def consult(cases: Sequence[Case], policy: str, seeds: Sequence[int]) -> list[Trajectory]:
    """All consultations, one after the other."""

    async def run() -> list[Trajectory]:
        return [
            await run_consultation(
                case, POLICIES[policy](case), ScriptedPatient(case, seed=seed), seed=seed, mode=draw(case, seed=seed)
            )
            for case in cases
            for seed in seeds
        ]

    return asyncio.run(run())


def gate(trajectories: Sequence[Trajectory], again: Sequence[Trajectory]) -> str:
    """Either "passed", or what failed."""
    if [to_line(one.to_json()) for one in trajectories] != [to_line(one.to_json()) for one in again]:
        return "failed: another run of the same seeds has other bytes"
    for one in trajectories:
        for message in one.of("user"):
            named = [why.split(" ")[1].rstrip(":") for why in message.why if why.startswith(("fact ", "again "))]
            if message.why and message.why != ("opening line",) and tuple(named) != message.facts:
                return f"failed: {one.case} tells {message.facts}, its reasons name {named}"
    return "passed"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return round(statistics.median(values), 1), round(fifths[0], 1), round(fifths[-1], 1)


def measure(policy: str, cases: Sequence[Case], seeds: Sequence[int], rounds: int) -> ClinicRow:
    """One arm."""
    by_id = {case.id: case for case in cases}
    warm = consult(cases, policy, seeds)
    turns = sum(one.turns for one in warm)
    passed = gate(warm, consult(cases, policy, seeds))
    plain, scored = [], []
    for _ in range(rounds):
        began = time.process_time()
        trajectories = consult(cases, policy, seeds)
        plain.append(turns / (time.process_time() - began))
        for one in trajectories:
            coverage(by_id[one.case], one)
        scored.append(turns / (time.process_time() - began))
    commit, dirty = record.commit()
    return ClinicRow(
        policy=policy,
        cases=len(cases),
        seeds=len(seeds),
        turns=turns,
        rounds=rounds,
        turns_per_s=spread(plain),
        scored_turns_per_s=spread(scored),
        gate=passed,
        commit=commit,
        dirty=dirty,
        machine=record.machine(),
        date=record.now(),
        command=record.command(),
    )


def main() -> int:
    """Measure, print, append the rows; 1 where a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", nargs="+", default=list(ARMS), choices=list(POLICIES))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [measure(policy, own_cases(), range(arguments.seeds), arguments.rounds) for policy in arguments.policies]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    for row in rows:
        print(f"{row.policy:18s} {row.turns:6d} turns  {row.turns_per_s}  scored {row.scored_turns_per_s}  {row.gate}")
    return int(any(row.gate != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
