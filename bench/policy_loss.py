"""The policy loss against other projects: cases, our own arms, the unit of time, peak memory, and the rows they give.

``python -m bench policy_loss`` measures named heads. One arm is one way to the loss and the gradients of hidden (T, D)
and weight (V, D). The unit of time is one product (T, D) x (D, V), measured in the same rounds; of the tokens that
count a schedule cannot take less than three. On a CPU every arm is timed with a malloc that keeps what is freed: what
fresh pages cost is the system's doing, and on a virtual machine its host's. Arms of other projects:
policy_loss_peers.py; the clock: harness.py.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import gpu_timing, harness, record
from bench.harness import Arm, Gate, UnavailableError
from bench.policy_loss_peers import TOLERANCE, LigerCrossEntropy, LigerLoss, LossArm, Torch, Trl, Verl, VerlTriton
from bench.record import LossRow
from bench.workloads import CLIP, DTYPES, LossHead, LossProblem, LossResult, expected_loss, make_loss_problem
from m3kernels import dispatch
from m3kernels.policy_loss import LossSpec, linear_logprobs, linear_policy_loss, policy_loss_from_logprobs

OP = "linear_policy_loss"
PRODUCT_BYTES = 3 << 30  # of logits that the unit of time holds at once
CHECKED = 8  # rows of its results that are compared


# -- our own arms -----------------------------------------------------------------------------------------------------
class OnePass(LossArm):
    """linear_policy_loss; ``whole``: with room for all logits, else with its own workspace."""

    def __init__(self, problem: LossProblem, threads: int, *, whole: bool) -> None:
        super().__init__(problem, threads)
        self.workspace = 4 * problem.head.tokens * problem.head.vocabulary if whole else None
        self.spec = LossSpec(clip_low=CLIP, clip_high=CLIP)

    def forward(self) -> Tensor:
        problem = self.problem
        streams = {"old_logprobs": problem.old_logprobs, "mask": problem.mask}
        options = {"spec": self.spec, "workspace_bytes": self.workspace}
        given = (problem.hidden, problem.weight, problem.ids, problem.advantages)
        loss, _ = linear_policy_loss(*given, **streams, **options)
        return loss


class TwoPhase(LossArm):
    """linear_logprobs of the tokens that count, logits kept for the backward pass or formed again, then the loss."""

    def __init__(self, problem: LossProblem, threads: int, *, save: bool) -> None:
        super().__init__(problem, threads)
        self.save = save
        self.spec = LossSpec(clip_low=CLIP, clip_high=CLIP)

    def forward(self) -> Tensor:
        problem, rows = self.problem, self.problem.rows
        hidden, ids = problem.hidden.flatten(0, 1)[rows], problem.ids.flatten()[rows]
        logprobs = linear_logprobs(hidden, problem.weight, ids, save_logits=self.save).logprobs
        advantages = problem.advantages.repeat_interleave(problem.head.length)[rows]
        old, mask = problem.old_logprobs.flatten()[rows], torch.ones_like(logprobs)
        loss, _ = policy_loss_from_logprobs(logprobs, advantages, old, mask=mask, spec=self.spec)
        return loss


# -- products alone ---------------------------------------------------------------------------------------------------
class Products(Arm):
    """The bare matrix products: the logits of all tokens, or (``count`` 3) logits, dX and dW of those that count.

    Results go to memory that exists. The logits stand for their own gradient.
    """

    def __init__(self, problem: LossProblem, threads: int, *, count: int, dtype: str | None = None) -> None:
        self.threads, self.count, self.computes = threads, count, dtype or problem.dtype
        self.tolerance = TOLERANCE[self.computes]
        x = problem.hidden.detach().flatten(0, 1)
        self.x = (x if count == 1 else x[problem.rows]).to(DTYPES[self.computes])
        self.weight = problem.weight.detach().to(self.x.dtype)
        room = PRODUCT_BYTES // (problem.head.vocabulary * self.x.element_size())
        self.z = self.x.new_empty(min(len(self.x), room), problem.head.vocabulary)
        if count == 3:
            self.d_x, self.d_weight = torch.empty_like(self.x), torch.empty_like(self.weight)

    def run(self, part: int) -> None:
        for first in range(0, len(self.x), len(self.z)):
            x = self.x[first : first + len(self.z)]
            z = self.z[: len(x)]
            torch.mm(x, self.weight.t(), out=z)
            if self.count == 3:
                torch.mm(z, self.weight, out=self.d_x[first : first + len(x)])
                torch.addmm(self.d_weight, z.t(), x, beta=float(first > 0), out=self.d_weight)

    def gate(self) -> Gate:
        """Of a few rows of each result; of dW only where one block of logits is all."""
        self.enter()
        self.run(0)
        last = len(self.x) - (len(self.x) - 1) % len(self.z) - 1  # first row of the block that z holds
        z = self.z[:CHECKED].double()
        x = self.x[last : last + CHECKED].double()
        pairs = [(self.z[: len(x)], x @ self.weight.double().t())]
        if self.count == 3:
            pairs.append((self.d_x[last : last + len(x)], z[: len(x)] @ self.weight.double()))
            if len(self.z) == len(self.x):
                pairs.append((self.d_weight[:CHECKED], self.z[:, :CHECKED].double().t() @ self.x.double()))
        errors = [harness.relative_rms(got, wanted) for got, wanted in pairs]
        return Gate(error=math.nan if any(map(math.isnan, errors)) else max(errors), tolerance=self.tolerance)


Factory = Callable[[LossProblem, int], Arm]
OURS: dict[str, Factory] = {
    "m3_one_pass": functools.partial(OnePass, whole=False),
    "m3_one_pass_whole": functools.partial(OnePass, whole=True),
    "m3_two_phase": functools.partial(TwoPhase, save=False),
    "m3_two_phase_saved": functools.partial(TwoPhase, save=True),
}
ARMS: dict[str, Factory] = {
    **OURS,
    "torch": functools.partial(Torch, compact=False),
    "torch_rows": functools.partial(Torch, compact=True),
    "trl": Trl,
    "liger_loss": LigerLoss,
    "liger_ce": LigerCrossEntropy,
    "verl": Verl,
    "verl_triton": VerlTriton,
    "gemms": functools.partial(Products, count=3),
}


def factory(name: str) -> Factory:
    """The builder of an arm: a name of ARMS; one of ours followed by "@triton" is forced to that room."""
    base, _, room = name.partition("@")
    if base not in ARMS or (room and (base not in OURS or room not in dispatch.NAMES)):
        wanted = f"names of {', '.join(ARMS)}, ours also as name@room"
        raise ValueError(f"bench policy_loss: arms: want {wanted}; got {name!r}")

    def make(problem: LossProblem, threads: int) -> Arm:
        arm = ARMS[base](problem, threads)
        arm.room = f"policy_loss={room}" if room else None
        return arm

    return make


UNITS: dict[str, Factory] = {
    "gemm_fp32": functools.partial(Products, count=1, dtype="fp32"),
    "gemm_bf16": functools.partial(Products, count=1, dtype="bf16"),
}


# -- what to measure --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which heads, how, and for how long."""

    heads: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    densities: tuple[float, ...] = (1.0, 0.4)
    threads: tuple[int, ...] = (1, 2)
    arms: tuple[str, ...] = tuple(name for name in ARMS if name != "verl_triton")
    seconds: float = 10.0  # per head, dtype, density and thread count
    min_rounds: int = 5
    device: str = "cpu"
    memory: bool = True  # measure the peak of every arm

    def __post_init__(self) -> None:
        for name in self.arms:
            factory(name)
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"bench policy_loss: dtypes: want names of {', '.join(DTYPES)}; got {dtype!r}")


ON_GPU = (*(f"{name}@cuda" for name in OURS if name != "m3_one_pass"), *(name for name in ARMS if name not in OURS))
PRESETS = {
    "acceptance": Plan(heads=("smollm2-135m.t1024", "qwen3-0.6b.t256")),
    "long": Plan(
        heads=("narrow.t8192", "narrow.t65536"),
        dtypes=("fp32",),
        densities=(1.0,),
        threads=(2,),
        arms=("m3_one_pass",),
        seconds=0.0,
        min_rounds=1,
    ),
    "gpu": Plan(
        heads=("qwen3-8b.t8192",),
        dtypes=("bf16",),
        threads=(1,),
        arms=("m3_one_pass@cuda", "m3_one_pass@triton", *ON_GPU),
        seconds=2.0,
        device="cuda",
    ),
    "gpu_long": Plan(
        heads=("qwen3-8b.t16384", "qwen3-8b.t65536"),
        dtypes=("bf16",),
        densities=(1.0,),
        threads=(1,),
        arms=("m3_one_pass@cuda", "m3_one_pass@triton", "liger_ce", "gemms"),
        seconds=0.0,
        min_rounds=2,
        device="cuda",
    ),
}


def units(dtype: str, device: str) -> list[str]:
    """The products that are units of time: fp32 on a CPU, for bf16 also in bf16; on a GPU the dtype's own."""
    names = [f"gemm_{dtype}"] if device == "cuda" else ["gemm_fp32", f"gemm_{dtype}"]
    return list(dict.fromkeys(names))


# -- errors and memory ------------------------------------------------------------------------------------------------
def errors(arm: LossArm, expected: LossResult) -> dict[str, float]:
    """Of the loss, relative to the mean absolute loss of a token; of the gradients, relative RMS."""
    found = {"loss": abs(float(arm.loss) - expected.loss) / expected.scale}
    leaves = {"d_hidden": arm.problem.hidden, "d_weight": arm.problem.weight}
    for name, leaf in leaves.items():
        wanted = getattr(expected, name)
        found[name] = math.nan if leaf.grad is None else harness.relative_rms(leaf.grad, wanted)
    return found


def gate(arm: Arm, expected: LossResult, found: dict[str, dict[str, float]]) -> Gate:
    """Run an arm once; its worst error counts. The errors of a loss go to ``found``."""
    if isinstance(arm, Products):
        return arm.gate()
    assert isinstance(arm, LossArm)
    arm.enter()
    arm.run(0)
    values = found[arm.name] = errors(arm, expected)
    worst = math.nan if any(map(math.isnan, values.values())) else max(values.values())
    return Gate(error=worst, tolerance=arm.tolerance)


def peak_on_gpu(arm: Arm) -> int:
    """Most bytes that torch allocates beyond those it holds, in one run."""
    arm.enter()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_here(head: LossHead, dtype: str, density: float, name: str, threads: int) -> int:
    """Most bytes that one run of an arm adds to this process beyond its inputs; for a process that did nothing yet."""
    small = dataclasses.replace(head, name="small", tokens=4 * head.sequences, vocabulary=256)
    for wanted in (small, head):  # on the small one libraries load what they need
        arm = ARMS[name](make_loss_problem(wanted, dtype, density), threads)
        arm.enter()
        peak = harness.peak_extra_bytes(functools.partial(arm.run, 0))
    return peak


def peak_in_fresh_process(head: LossHead, dtype: str, density: float, name: str, threads: int) -> int:
    """``peak_here`` of another process. Raises RuntimeError with what it said where that fails."""
    facts = {"head": dataclasses.asdict(head), "dtype": dtype, "density": density, "name": name, "threads": threads}
    path = os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLIBC_TUNABLES": ""}  # freed memory must show as free
    command = [sys.executable, "-m", "bench.policy_loss", json.dumps(facts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: its peak was not measured: {done.stderr.strip()[-400:]}")
    return int(done.stdout.splitlines()[-1])


# -- one case ---------------------------------------------------------------------------------------------------------
def run(head: LossHead, plan: Plan, say: Callable[[str], None]) -> Iterator[list[LossRow]]:
    """The rows of each case of one head: a dtype, density and thread count, all arms side by side."""
    for dtype in plan.dtypes:
        for density in plan.densities:
            problem = make_loss_problem(head, dtype, density, device=plan.device)
            yield from run_problem(problem, plan, say)
            del problem
            gc.collect()
            if plan.device == "cuda":
                torch.cuda.empty_cache()


def run_problem(problem: LossProblem, plan: Plan, say: Callable[[str], None]) -> Iterator[list[LossRow]]:
    head, dtype, density = problem.head, problem.dtype, problem.density
    harness.use_room(None)  # of the last arm that ran
    say(f"{head.name}, {dtype}, density {density}: the fp64 result")
    expected = expected_loss(problem)
    peaks: dict[str, int] = {}

    def guard(work: Callable[[], Any]) -> Any:
        """On a GPU an arm that does not run, or runs out of memory, is absent; the others go on."""
        return gpu_timing.guarded(work, gpu_timing.clock()) if plan.device == "cuda" else work()

    for threads in plan.threads:
        say(f"{head.name}, {dtype}, density {density}, {threads} thread(s)")

        def make(name: str, threads: int = threads) -> Arm:
            return guard(functools.partial(UNITS.get(name) or factory(name), problem, threads))

        found: dict[str, dict[str, float]] = {}

        def judge(arm: Arm, found: dict[str, dict[str, float]] = found) -> Gate:
            return guard(functools.partial(gate, arm, expected, found))

        arms, absent = harness.build([*plan.arms, *units(dtype, plan.device)], make, say)
        timed, gates = harness.pass_gates(arms, judge, absent, say)
        if plan.memory and threads == plan.threads[0]:
            for arm in timed:
                if isinstance(arm, LossArm) and plan.device == "cuda":
                    peaks[arm.name] = peak_on_gpu(arm)
                elif isinstance(arm, LossArm):
                    peaks[arm.name] = peak_in_fresh_process(head, dtype, density, arm.name, max(plan.threads))
        clock = gpu_timing.visit if plan.device == "cuda" else harness.visit
        limits = {"seconds": plan.seconds, "min_rounds": plan.min_rounds}
        times, _ = harness.interleave(timed, visit=clock, first_untimed=False, **limits)
        yield list(rows(problem, plan, threads, arms, absent, gates, found, times, peaks))


def rows(
    problem: LossProblem,
    plan: Plan,
    threads: int,
    arms: Sequence[Arm],
    absent: Mapping[str, str],
    gates: Mapping[str, Gate],
    found: Mapping[str, Mapping[str, float]],
    times: harness.Times,
    peaks: Mapping[str, int],
) -> Iterator[LossRow]:
    """A row per arm: with times where it passed its gate, without where it did not or could not run."""
    commit, dirty = record.commit()
    facts: dict[str, Any] = {
        "op": OP,
        "shape": problem.head.name,
        "tokens": problem.head.tokens,
        "hidden": problem.head.hidden,
        "vocabulary": problem.head.vocabulary,
        "sequences": problem.head.sequences,
        "dtype": problem.dtype,
        "density": problem.density,
        "gradient_bytes": problem.gradient_bytes,
        "malloc_keeps": record.malloc_keeps(),
        "device": plan.device,
        "threads": threads,
        "case_threads": threads,
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(plan.device),
        "date": record.now(),
        "command": record.command(),
    }
    for name, why in absent.items():
        yield LossRow(**facts, arm=name, gate=f"absent: {why}")
    for arm in (arm for arm in arms if arm.name in gates):
        name, result = arm.name, gates[arm.name]
        values = {output: None if math.isnan(error) else error for output, error in found.get(name, {}).items()}
        about = {"arm": name, "error": result.error, "tolerance": result.tolerance, "errors": values or None}
        if not result.passed:
            yield LossRow(**facts, **about, gate="failed")
            continue
        value = harness.spread(times[name])
        yield LossRow(
            **facts,
            **about,
            gate="passed",
            median_s=value.median,
            p20_s=value.p20,
            p80_s=value.p80,
            rounds=len(times[name]),
            ratios=harness.ratios(times, name),
            units=in_units(times, name, "gemm_fp32"),
            units_bf16=in_units(times, name, "gemm_bf16"),
            peak_bytes=peaks.get(name),
            peak_threads=max(plan.threads) if name in peaks else None,
        )


def in_units(times: harness.Times, name: str, unit: str) -> record.Triple | None:
    """Time of an arm over that of the unit in the same round; None where that unit was not measured."""
    if unit not in times:
        return None
    value = harness.ratio(times[name], times[unit])
    return value.median, value.p20, value.p80


def main() -> None:
    """In a fresh process: print the peak of the case that the argument describes."""
    facts = json.loads(sys.argv[1])
    try:
        print(peak_here(**{**facts, "head": LossHead(**facts["head"])}))
    except UnavailableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
