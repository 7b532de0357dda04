"""A run that is killed (SIGKILL) again and again, and goes on each time: every segment once, with the same bytes."""

from __future__ import annotations

import collections
import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

from tests.m3.clinic_runs import run_to_be_killed

KILLS = 10


def lines(path: Path, kind: str) -> list[dict]:
    rows = [json.loads(line)["record"] for line in path.read_bytes().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def segments(path: Path) -> dict[str, bytes]:
    """The line of each segment by id; an id that stands there twice fails."""
    found = {}
    for line in path.read_bytes().splitlines():
        record = json.loads(line)["record"]
        if record["kind"] == "segment":
            assert record["id"] not in found
            found[record["id"]] = line
    return found


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported: they fork from a server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.m3.clinic_runs"])
    return context


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, processes) -> Path:
    path = tmp_path_factory.mktemp("unbroken") / "run.jsonl"
    process = processes.Process(target=run_to_be_killed, args=(str(path), 0.0))
    process.start()
    process.join()
    assert process.exitcode == 0
    return path


def killed_at(processes, path: Path, size: int, pause: float) -> int | None:
    """Start a run and kill it once its journal has ``size`` bytes; how it ended."""
    process = processes.Process(target=run_to_be_killed, args=(str(path), pause))
    process.start()
    while process.is_alive() and (path.stat().st_size if path.exists() else 0) < size:
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode


def check(processes, unbroken: Path, path: Path, seed: int, pause: float) -> None:
    whole = unbroken.stat().st_size
    moments = sorted(random.Random(seed).uniform(0.02, 0.95) * whole for _ in range(KILLS))
    ended = [killed_at(processes, path, int(size), pause) for size in moments]
    assert ended == [-9] * KILLS
    last = processes.Process(target=run_to_be_killed, args=(str(path), 0.0))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert segments(path) == segments(unbroken)
    once = collections.Counter(name for batch in lines(path, "batch") for name in batch["segments"])
    assert once == dict.fromkeys(segments(unbroken), 1)
    key = "id"
    assert sorted(lines(path, "group"), key=lambda row: row[key]) == sorted(
        lines(unbroken, "group"), key=lambda row: row[key]
    )


def test_an_unbroken_run_has_segments_of_all_stages(unbroken):
    stages = collections.Counter(row["segment"]["phase"] for row in lines(unbroken, "segment"))
    assert stages["inquiry"] == 36 and min(stages.values()) >= 6 and len(stages) == 4


def test_killed_at_ten_moments_every_segment_is_there_once(processes, unbroken, tmp_path):
    check(processes, unbroken, tmp_path / "run.jsonl", seed=1, pause=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_killed_at_ten_other_moments(processes, unbroken, tmp_path, seed):
    check(processes, unbroken, tmp_path / "run.jsonl", seed=seed, pause=0.002)
