"""Ceilings of this machine: bytes it can read and multiply-accumulates it can do per second, measured.

    time of a GEMM >= max(bytes of weight / read bandwidth, M * N * K / peak multiply-accumulates)

machine_ceilings.c holds the loops; it is compiled once per source and compiler and kept in ``cache_folder()``. Without
a C compiler only the read bandwidth is measured, with torch, and ``Ceilings.source`` says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

from m3kernels.int4.types import in_huge_pages

SOURCE = Path(__file__).with_name("machine_ceilings.c")
BUFFER_BYTES = 1 << 30  # far beyond any cache, so that a window is cold when its turn comes again
WINDOW_BYTES = 32 << 20  # read at a time
READ_KINDS = (0, 1, 2)  # of machine_ceilings.c: one stream, with prefetch, four streams
PEAK_ITERATIONS = 1_000_000
REPEATS = 7


def cache_folder() -> Path:
    """Where the compiled probe and the last ceilings live; M3_BENCH_CACHE overrides."""
    folder = Path(os.environ.get("M3_BENCH_CACHE", Path.home() / ".cache" / "m3-bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """machine_ceilings.c, compiled and loaded; None without a C compiler."""
    command = compiler()
    if command is None:
        return None
    digest = hashlib.sha256(SOURCE.read_bytes() + command.encode()).hexdigest()[:16]
    path = cache_folder() / f"machine_ceilings-{digest}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        subprocess.run([command, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(partial), str(SOURCE)], check=True)
        partial.rename(path)
    probe = ctypes.CDLL(str(path))
    probe.m3_read_seconds.restype = ctypes.c_double
    probe.m3_read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    probe.m3_peak.restype = ctypes.c_double
    probe.m3_peak.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    probe.m3_peak_name.restype = probe.m3_peak_computes.restype = ctypes.c_char_p
    return probe


@functools.cache
def buffer() -> torch.Tensor:
    """1 GiB, written once so that every page is real; in huge pages, as packed weights are."""
    return in_huge_pages(torch.ones(BUFFER_BYTES // 8, dtype=torch.int64))


class ReadProbe:
    """Reads the next 32 MiB of the buffer; each call returns the seconds that took.

    ``total_bytes``: only of its first so many bytes, again and again, in windows no larger than that: with less than a
    cache holds, the bandwidth of that cache.
    """

    def __init__(self, threads: int, kind: int = 0, total_bytes: int | None = None) -> None:
        self.threads, self.kind, self.window = threads, kind, 0
        total_bytes = min(total_bytes or BUFFER_BYTES, BUFFER_BYTES)
        self.window_bytes = min(WINDOW_BYTES, total_bytes)
        self.windows = total_bytes // self.window_bytes
        self.bytes = self.window_bytes // (1024 * threads) * (1024 * threads)

    def __call__(self) -> float:
        start = self.window * self.window_bytes
        self.window = (self.window + 1) % self.windows
        probe = library()
        if probe is None:
            view = buffer()[start // 8 : (start + self.bytes) // 8]
            torch.set_num_threads(self.threads)
            begin = time.perf_counter()
            view.sum()
            return time.perf_counter() - begin
        seconds = float(probe.m3_read_seconds(buffer().data_ptr() + start, self.bytes, self.threads, self.kind))
        if seconds <= 0:
            raise RuntimeError(f"machine_ceilings: {self.threads} threads could not be started")
        return seconds

    def bandwidth(self) -> float:
        """Bytes per second of one call."""
        return self.bytes / self()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """For one thread count: bytes read per second, and multiply-accumulates per second by instruction."""

    threads: int
    read_bytes: float
    read_kind: int
    peaks: dict[str, tuple[str, float]]  # instruction -> (fp32, bf16, int16 or int8; multiply-accumulates per second)
    source: str  # "c" or "torch (no C compiler: read bandwidth only)"

    def peak(self, computes: str) -> float | None:
        """Most multiply-accumulates per second with operands of that type (bf16 may be widened to fp32), if known."""
        kinds = ("bf16", "fp32") if computes == "bf16" else (computes,)
        return max((macs for kind, macs in self.peaks.values() if kind in kinds), default=None)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(threads: int) -> Ceilings:
    """Measure now: medians of 7, the best way of reading and every instruction the CPU has. About two seconds."""
    buffer()
    rates = {}
    for kind in READ_KINDS:
        probe = ReadProbe(threads, kind)
        rates[kind] = median([probe.bandwidth() for _ in range(2 * REPEATS)])
    read_kind = max(rates, key=rates.__getitem__)
    probe_library = library()
    if probe_library is None:
        source = "torch (no C compiler: read bandwidth only)"
        return Ceilings(threads=threads, read_bytes=rates[0], read_kind=0, peaks={}, source=source)
    peaks = {}
    kind = 0
    while name := probe_library.m3_peak_name(kind):
        rate = median([probe_library.m3_peak(kind, PEAK_ITERATIONS, threads) for _ in range(REPEATS)])
        if rate > 0:
            peaks[name.decode()] = (probe_library.m3_peak_computes(kind).decode(), rate)
        kind += 1
    return Ceilings(threads=threads, read_bytes=rates[read_kind], read_kind=read_kind, peaks=peaks, source="c")


def measured(threads: int, machine: str, *, again: bool = True) -> Ceilings:
    """Ceilings of ``machine`` (a name, the key of the cache); ``again=False`` takes the last measurement if any."""
    path = cache_folder() / f"ceilings-{hashlib.sha256(machine.encode()).hexdigest()[:12]}-{threads}.json"
    if not again and path.exists():
        values = json.loads(path.read_text())
        values["peaks"] = {name: (kind, macs) for name, (kind, macs) in values["peaks"].items()}
        return Ceilings(**values)
    ceilings = measure(threads)
    path.write_text(json.dumps(dataclasses.asdict(ceilings)))
    return ceilings


def undisturbed(ceilings: Ceilings) -> Ceilings:
    """The same with the best of many short measurements of each instruction: what a bound is made of."""
    probe_library = library()
    if probe_library is None:
        return ceilings
    peaks, kind = dict(ceilings.peaks), 0
    while name := probe_library.m3_peak_name(kind):
        if name.decode() in peaks:
            computes, rate = peaks[name.decode()]
            short = [probe_library.m3_peak(kind, PEAK_ITERATIONS // 5, ceilings.threads) for _ in range(5 * REPEATS)]
            peaks[name.decode()] = (computes, max(rate, *short))
        kind += 1
    return dataclasses.replace(ceilings, peaks=peaks)


def describe(ceilings: Ceilings) -> str:
    """A few lines for people."""
    lines = [f"{ceilings.threads} thread(s): read {ceilings.read_bytes / 1e9:.1f} GB/s ({ceilings.source})"]
    lines += [f"  {kind:5s} {macs / 1e9:7.1f} GMAC/s  {name}" for name, (kind, macs) in ceilings.peaks.items()]
    return "\n".join(lines)
