"""Idle OpenMP threads end when they are told to, and come back with the next parallel region."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from m3kernels.int4 import int4_gemm
from m3kernels.int4.reference import make_inputs
from m3kernels.threads import release_threads

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="threads of a process are counted in /proc")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    release_threads()


def tasks() -> int:
    """Threads of the process, once those that are ending have ended."""
    counts = [-1]
    while len(counts) < 5 or len(set(counts[-5:])) > 1:
        counts.append(len(list(TASKS.iterdir())))
        time.sleep(0.01)
    return counts[-1]


def test_idle_threads_end_and_come_back(two_threads):
    x, weight, _ = make_inputs(4, 512, 512)
    release_threads()
    alone = tasks()
    y = int4_gemm(x, weight)
    assert tasks() == alone + 1
    release_threads()
    assert tasks() == alone
    assert torch.equal(int4_gemm(x, weight), y)
    assert tasks() == alone + 1


def test_only_those_of_the_caller_end(two_threads):
    x, weight, _ = make_inputs(4, 512, 512)
    release_threads()
    alone, seen, go_on = tasks(), [], threading.Event()
    ready = threading.Event()

    def other() -> None:
        int4_gemm(x, weight)
        ready.set()
        go_on.wait(30)
        release_threads()
        seen.append(tasks())

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(30)
    int4_gemm(x, weight)
    assert tasks() == alone + 3  # the other, its worker, ours
    release_threads()
    assert tasks() == alone + 2
    go_on.set()
    thread.join()
    assert seen == [alone + 1]


def test_nothing_to_release_is_no_error():
    threading.Thread(target=release_threads).start()
    release_threads()
    release_threads()
