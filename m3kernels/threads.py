"""The threads that parallel CPU kernels leave behind.

OpenMP keeps a pool of idle threads for every thread that has run a parallel region, torch's or ours. GNU's runtime
counts them all: where they outnumber the cores, idle ones fall asleep at once instead of waiting for the next region,
and a small model, with 150 short regions a token, spends as much time waking threads as computing.
"""

from __future__ import annotations

from m3kernels import _cpu_ext


def release_threads() -> None:
    """End the idle threads of the calling thread's pool; its next parallel region starts them anew (some 0.1 ms).

    For a thread that has loaded or trained a model and is about to leave the processor to another. Inside a parallel
    region, or with an OpenMP runtime that cannot, nothing happens.
    """
    _cpu_ext.release_threads()
