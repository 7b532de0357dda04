"""Thousands of damaged calls at the native border of the decoder's pass, in a child process that must survive them.

A round builds a program that holds every instruction and runs it, with a few numbers, sizes, addresses or indices of
its calls damaged. A span may be shorter than its memory, or none, never longer: that is what a caller vouches for. The
border may raise ValueError, TypeError (numbers that no integer of C++ holds) and MemoryError. At the end the program
without damage gives the bits that it gave at first.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext

ROOT = Path(__file__).parents[2]
NUMBERS = (0, 1, -1, 2, 3, 4, 5, 7, 12, 16, 63, 64, 100, 2**20, 2**26, 2**30, 2**31 - 1, 2**31, 2**32 + 4, 2**40)
NUMBERS += (2**60 + 4, 2**61, 2**62, 2**63 - 1, 2**63, -(2**31), -(2**62), -(2**63))
FLOATS = (0.0, -1.0, 1e-30, 1e38, float("inf"), float("-inf"), float("nan"))
INDICES = (0, 1, -1, 2, 3, 5, 6, 11, 12, 15, 16, 23, 24, 47, 64, 2**20, 2**31 - 1, -(2**31))
ALLOWED = (ValueError, TypeError, MemoryError)


class Span(NamedTuple):
    """Address and elements of memory that is large enough for them in every dtype."""

    address: int
    elements: int


NONE = Span(0, 0)


class Calls:
    """Calls that build a program of every instruction and run it, and the memory behind them."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.outputs = [self.floats(3 * 10), self.floats(6 * 16)]
        self.widths = ([16, 16, 32, 16, 4, 32, 3, 16, 10], [False] * 7 + [True] * 2, 4)
        self.building = self.instructions()
        self.run = self.batch()

    def floats(self, count: int) -> Span:
        """Memory for `count` elements of at most 8 bytes, small floats."""
        self.memory.append(torch.randn(2 * count) * 0.1)
        return Span(self.memory[-1].data_ptr(), count)

    def whole(self, *values: int, dtype: torch.dtype = torch.int32) -> Span:
        self.indices.append(torch.tensor([*values, *[0] * len(values)], dtype=dtype))
        return Span(self.indices[-1].data_ptr(), len(values))

    def packed(self, experts: int, n: int, k: int) -> tuple[Any, ...]:
        perm = torch.zeros(2 * k, dtype=torch.int32)
        self.memory.append(perm)
        spans = (
            self.floats(experts * 128),
            self.floats(experts * 64),
            NONE,
            NONE if experts > 1 else Span(perm.data_ptr(), k),
        )
        return (*spans, 0, experts, n, k, 16, 0)

    def dense(self, n: int, k: int) -> tuple[Any, ...]:
        return (self.floats(n * k), 0, n, k, self.floats(n), 0)

    def instructions(self) -> list[tuple[str, tuple[Any, ...]]]:
        places = [(index, 0, width) for index, width in enumerate(self.widths[0])]
        x, y, qkv, attended, gate, up, scores, last, logits = places
        queries, none, floats = (2, 0, 16), (-1, 0, 0), self.floats
        return [
            ("add_cache", ((floats(192), floats(192), NONE, NONE, 0, 6, 4, 2, 4),)),
            ("add_cache", ((floats(192), floats(192), floats(48), floats(48), 3, 6, 4, 2, 4),)),
            ("add_dense_experts", (floats(480), floats(240), 0, 3, 16, 5, 2, True)),
            ("add_packed_experts", (self.packed(3, 10, 16), self.packed(3, 16, 5), 2, False)),
            ("embed", (x, floats(12 * 16), 0, 12)),
            ("load", (y, 0)),
            ("add", (x, y)),
            ("norm", (y, x, floats(16), 1e-5)),
            ("dense", (qkv, y, self.dense(32, 16))),
            ("dense", (gate, y, self.dense(4, 16))),
            ("rotate", (qkv, 0, 4, floats(4), floats(4), 1e-5)),
            ("attend", (attended, queries, gate, 0, 4, 0.5)),
            ("int4", (y, attended, self.packed(1, 16, 16), floats(16), 1)),
            ("add", (x, y)),
            ("rotate", (qkv, 1, 4, NONE, NONE, 0.0)),
            ("attend", (attended, queries, none, 1, 4, 0.5)),
            ("dense", (up, attended, self.dense(32, 16))),
            ("silu_mul", (y, up)),
            ("dense", (scores, y, self.dense(3, 16))),
            ("moe", (attended, y, scores, 0, 1)),
            ("moe", (y, attended, scores, 1, 1)),
            ("add", (x, y)),
            ("pick", (last, x)),
            ("dense", (logits, last, self.dense(10, 16))),
            ("copy", (attended, x)),
            ("store", (0, logits)),
            ("store", (1, attended)),
        ]

    def batch(self) -> tuple[Any, ...]:
        long = torch.int64
        tokens, positions = self.whole(0, 5, 11, 3, 7, 8, dtype=long), self.whole(2, 3, 4, 0, 4, 5, dtype=long)
        slots = self.whole(2, 3, 4, 8, 16, 17, dtype=long)
        starts, seqlens, trees = self.whole(0, 3, 4, 6), self.whole(5, 1, 6), self.whole(0, 0, 3)
        table, masks = self.whole(0, 1, 2, 0, 3, 4), self.whole(1, 3)
        picked = self.whole(5, 0, 5, dtype=long)
        angles = (self.floats(16 * 2), self.floats(16 * 2), 2)
        outputs = [(self.outputs[0], 3, 10), (self.outputs[1], 6, 16)]
        rows, sequences = (tokens, positions, slots), (starts, seqlens, trees, table, 2, 2)
        return (rows, sequences, (masks, 1), picked, angles, [(self.floats(6 * 16), 6, 16)], outputs, 2)


def damaged(r: random.Random, value: Any) -> Any:
    """The value with one leaf spoiled."""
    if isinstance(value, Span):
        choices = [NONE, Span(0, value.elements), Span(value.address, -value.elements), Span(value.address, 0)]
        return r.choice([*choices, Span(value.address, r.randint(0, max(0, value.elements)))])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
    if isinstance(value, float):
        return r.choice(FLOATS)
    if isinstance(value, list) and r.random() < 0.3:
        return r.choice((value[:-1], value + value, []))
    if not value:
        return value
    at = r.randrange(len(value))
    spoiled = [*value[:at], damaged(r, value[at]), *value[at + 1 :]]
    return tuple(spoiled) if isinstance(value, tuple) else spoiled


def spoil_indices(r: random.Random, tensors: list[Tensor]) -> None:
    tensor = r.choice(tensors)
    tensor[r.randrange(len(tensor) // 2)] = r.choice(INDICES)


def attempt(call: Any, *arguments: Any) -> Any:
    """What the call returns, or the error that a damaged call may raise."""
    try:
        return call(*arguments)
    except ALLOWED as error:
        return error


def round_of(r: random.Random, calls: Calls) -> str:
    """One program, built and run with some damage; what came of the run."""
    where = r.random()
    widths = damaged(r, calls.widths) if where < 0.05 else calls.widths
    program = attempt(_cpu_ext.DecoderProgram, *widths)
    if isinstance(program, Exception):
        return type(program).__name__
    spoiled = set(r.sample(range(len(calls.building)), r.randint(1, 2))) if where < 0.5 else set()
    for index, (name, arguments) in enumerate(calls.building):
        attempt(getattr(program, name), *(damaged(r, arguments) if index in spoiled else arguments))
    run, kept = calls.run, [tensor.clone() for tensor in calls.indices]
    if where >= 0.75:
        for _ in range(r.randint(1, 2)):
            run = damaged(r, run)
    elif where >= 0.5:
        for _ in range(r.randint(1, 3)):
            spoil_indices(r, calls.indices)
    found = attempt(program.run, *run)
    for tensor, before in zip(calls.indices, kept, strict=True):
        tensor.copy_(before)
    return type(found).__name__


def undamaged(calls: Calls) -> list[float]:
    """Both outputs of the program as it was meant."""
    program = _cpu_ext.DecoderProgram(*calls.widths)
    for name, arguments in calls.building:
        getattr(program, name)(*arguments)
    program.run(*calls.run)
    return [number for tensor in calls.memory[:2] for number in tensor[: len(tensor) // 2].tolist()]


def main(seed: int, rounds: int) -> None:
    torch.manual_seed(seed)
    r, calls = random.Random(seed), Calls()
    before = undamaged(calls)
    kept = [tensor.clone() for tensor in calls.memory]
    outcomes = [round_of(r, calls) for _ in range(rounds)]
    for tensor, was in zip(calls.memory, kept, strict=True):
        tensor.copy_(was)
    assert undamaged(calls) == before, "a damaged call left something behind"
    counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
    sys.stdout.write(f"{counts}\n")


@pytest.mark.parametrize(
    ("seed", "rounds"), [(0, 400), *(pytest.param(seed, 5000, marks=pytest.mark.slow) for seed in range(1, 9))]
)
def test_damaged_calls(seed: int, rounds: int) -> None:
    command, environment = [sys.executable, __file__, str(seed), str(rounds)], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, f"seed {seed}: status {done.returncode}\n{done.stderr[-2000:]}"
    assert "ValueError" in done.stdout and "NoneType" in done.stdout  # some were refused, some ran


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
