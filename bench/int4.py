"""INT4 GEMM and mixture of experts against other projects: the cases, our own arms, and the rows they give.

``python -m bench int4`` measures named shapes; docs/benchmarks.md says how to read the result. Arms of other projects:
peers.py; arms on a GPU: cuda.py; the fairness of the clock: harness.py.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import harness, record, roofline
from bench.harness import Gate, GemmArm, Rotation, UnavailableError
from bench.peers import TOLERANCE, Ark, Ggml, OnnxRuntime, OpenVino, PeerArm, TorchDense, TorchInt4
from bench.record import GemmRow
from bench.workloads import Experts, Linear, Problem, draw, draw_weight, make_problem
from m3kernels.int4 import Int4Weight, int4_dequantize, int4_gemm, int4_moe, reference
from m3kernels.int4.reference import ACTIVATION_ERROR, make_inputs
from m3kernels.int4.types import in_huge_pages

COMPUTES = {"exact": "fp32", "int16": "int16", "int8": "int8"}  # activations -> operands of the inner product
OURS = tuple(f"m3_{mode}" for mode in COMPUTES)


def tolerance_of(mode: str) -> float:
    return ACTIVATION_ERROR.get(mode, TOLERANCE["fp32"])


def use_isa(name: str | None) -> str | None:
    """Choose the instruction set of our CPU kernels (None: the best); the name now in use, None without extension."""
    try:
        from m3kernels import _cpu_ext
    except ImportError:
        if name is not None:
            raise UnavailableError(f"m3kernels._cpu_ext is not built: no instruction set {name}") from None
        return None
    if name is not None and name not in _cpu_ext.isas():
        raise UnavailableError(f"this CPU or build has no {name}; it has {', '.join(_cpu_ext.isas())}")
    _cpu_ext.set_isa(name or best_isa())
    return _cpu_ext.get_isa()


@functools.cache
def best_isa() -> str:
    """What the extension chose when it was loaded."""
    from m3kernels import _cpu_ext

    return _cpu_ext.get_isa()


class M3(PeerArm):
    """int4_gemm in one activation mode; ``isa`` forces an instruction set."""

    def __init__(
        self, problem: Problem, rotation: Rotation, threads: int, *, mode: str, isa: str | None = None
    ) -> None:
        self.computes = COMPUTES[mode]
        self.lossy = mode == "int8"
        self.tolerance = tolerance_of(mode)
        self.mode, self.wanted_isa, self.isa = mode, isa, use_isa(isa)
        self.threads, self.span, self.parts = threads, rotation.span, rotation.parts
        self.weights = [problem.packed(copy) for copy in range(rotation.copies)]
        self.stored_bytes = problem.weight_bytes
        self.outputs: dict[int, Tensor] = {}

    def enter(self) -> None:
        torch.set_num_threads(self.threads)
        use_isa(self.wanted_isa)

    def load(self, x: Tensor) -> None:
        self.x = x

    def run(self, part: int) -> None:
        for copy in self.part(part):
            self.outputs[copy] = int4_gemm(self.x, self.weights[copy], activations=self.mode)

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


Factory = Callable[[Problem, Rotation, int], GemmArm]
ARMS: dict[str, Factory] = {
    "m3_int8": functools.partial(M3, mode="int8"),
    "m3_int16": functools.partial(M3, mode="int16"),
    "m3_exact": functools.partial(M3, mode="exact"),
    "ort_a4": functools.partial(OnnxRuntime, level=4),
    "ort_a4_b32": functools.partial(OnnxRuntime, level=4, block=32),
    "ort_a0": functools.partial(OnnxRuntime, level=0),
    "ort_a1": functools.partial(OnnxRuntime, level=1),
    "ov": functools.partial(OpenVino, dynamic=False),
    "ov_int8": functools.partial(OpenVino, dynamic=True),
    "ark_fp32": functools.partial(Ark, compute="fp32"),
    "ark_int8": functools.partial(Ark, compute="int8"),
    "ggml_q4_0": functools.partial(Ggml, repack=False),
    "ggml_q4_0_repack": functools.partial(Ggml, repack=True),
    "torch_int4_bf16": TorchInt4,
    "torch_fp32": functools.partial(TorchDense, dtype=torch.float32),
    "torch_bf16": functools.partial(TorchDense, dtype=torch.bfloat16),
}
DEFAULT_ARMS = tuple(name for name in ARMS if name != "ort_a1")


def factory(name: str) -> Factory:
    """The builder of an arm: a name of ARMS; one of ours followed by "@avx2" runs with that instruction set."""
    base, _, isa = name.partition("@")
    if base not in ARMS or (isa and base not in OURS):
        raise ValueError(f"bench int4: arms: want names of {', '.join(ARMS)}, ours also as name@isa; got {name!r}")
    return functools.partial(ARMS[base], isa=isa) if isa else ARMS[base]


def bytes_of(name: str, problem: Problem) -> int:
    """One copy of the weight as the arm holds it, near enough to plan memory before building it."""
    dense = problem.dense.numel()
    return {"torch_fp32": 4 * dense, "torch_bf16": 2 * dense}.get(name, problem.weight_bytes)


# -- one case ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure and for how long."""

    ms: tuple[int, ...] = (1, 4, 16, 128)
    threads: tuple[int, ...] = (1, 2)
    arms: tuple[str, ...] = DEFAULT_ARMS
    symmetric: bool = True
    seconds: float = 6.0  # per shape, M and thread count
    scaling: bool = False  # with several threads, our arms on one thread in the same rounds
    limit_bytes: int = 6 << 30
    min_rounds: int = 5


def linear_facts(linear: Linear, m: int, symmetric: bool, weight_bytes: int) -> dict[str, Any]:
    """What every row of one linear shape and M says, on the CPU and on a GPU."""
    return {
        "op": "int4_gemm",
        "shape": linear.name,
        "m": m,
        "n": linear.n,
        "k": linear.k,
        "group_size": linear.group_size,
        "symmetric": symmetric,
        "weight_bytes": weight_bytes,
    }


def run_linear(linear: Linear, plan: Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    """All rows of one shape on the CPU, thread count by thread count."""
    problem = make_problem(linear, max(plan.ms), symmetric=plan.symmetric)
    for threads in plan.threads:
        names = list(plan.arms)
        single = {f"{name}@1t": name for name in names if name in OURS and plan.scaling and threads > 1}
        total = sum(bytes_of(single.get(name, name), problem) for name in [*names, *single])
        rotation = harness.rotation(problem.weight_bytes, total, limit_bytes=plan.limit_bytes)
        say(f"{linear.name}, {threads} thread(s): {rotation.copies} copies, {rotation.copies * total / 1e9:.1f} GB")

        def make(name: str, rotation: Rotation = rotation, threads: int = threads) -> GemmArm:
            base, _, suffix = name.rpartition("@")
            if suffix == "1t":
                return factory(base)(problem, rotation, 1)
            return factory(name)(problem, rotation, threads)

        ceilings = {t: roofline.measured(t, record.cpu_model()) for t in {threads, 1}}
        arms, absent = harness.build([*names, *single], make, say)
        for m in plan.ms:
            x = problem.x[:m].clone()
            for arm in arms:
                arm.load(x)
            gate = functools.partial(harness.gate, expected=functools.partial(problem.result, m))
            timed, gates = harness.pass_gates(arms, gate, absent, say)
            probe = roofline.ReadProbe(threads, ceilings[threads].read_kind)
            times, rates = harness.interleave(
                timed, seconds=plan.seconds, min_rounds=plan.min_rounds, probe=probe.bandwidth
            )
            facts = linear_facts(linear, m, plan.symmetric, problem.weight_bytes)
            macs = m * linear.n * linear.k
            read = harness.spread(rates).p80  # undisturbed by other guests of the host
            yield from rows(facts, arms, absent, gates, times, macs, read, ceilings, rotation, threads)
        for arm in arms:
            arm.close()
        del arms
        gc.collect()


def rows(
    facts: dict[str, Any],
    arms: Sequence[GemmArm],
    absent: dict[str, str],
    gates: dict[str, Gate],
    times: harness.Times,
    macs: int,
    read: float | None,
    ceilings: dict[int, roofline.Ceilings],
    rotation: Rotation,
    threads: int,
    device: str = "cpu",
) -> Iterator[GemmRow]:
    """A row per arm: with times where it passed its gate, without where it did not or could not be built."""
    commit, dirty = record.commit()
    place = {
        "device": device,
        "case_threads": threads,
        "malloc_huge_pages": record.malloc_huge_pages(),
        "commit": commit,
        "dirty": dirty,
        "machine": record.machine(device),
        "date": record.now(),
        "command": record.command(),
    }
    for name, why in absent.items():
        yield GemmRow(**facts, **place, arm=name, computes="", lossy=False, threads=threads, gate=f"absent: {why}")
    for arm in (arm for arm in arms if arm.name in gates):
        gate = gates[arm.name]
        about = {
            "arm": arm.name,
            "computes": arm.computes,
            "lossy": arm.lossy,
            "isa": getattr(arm, "isa", None),
            "threads": arm.threads,
            "error": gate.error,
            "tolerance": gate.tolerance,
            "stored_bytes": arm.stored_bytes,
        }
        if not gate.passed:
            yield GemmRow(**facts, **place, **about, gate="failed")
            continue
        value = harness.spread(times[arm.name])
        peak = ceilings[arm.threads].peak(arm.computes) if arm.threads in ceilings else None
        yield GemmRow(
            **facts,
            **place,
            **about,
            gate="passed",
            median_s=value.median,
            p20_s=value.p20,
            p80_s=value.p80,
            rounds=len(times[arm.name]),
            launch=getattr(arm, "launch", None),
            span=rotation.span,
            copies=rotation.copies,
            gmacs=macs / value.median / 1e9,
            gbytes_s=facts["weight_bytes"] / value.median / 1e9,
            read_gbytes_s=None if read is None else read / 1e9,
            read_share=None if read is None else facts["weight_bytes"] / value.median / read,
            peak_gmacs=None if peak is None else peak / 1e9,
            peak_share=None if peak is None else macs / value.median / peak,
            ratios=harness.ratios(times, arm.name),
        )


# -- mixture of experts -----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeProblem:
    """x (T, D), routing, and the two stacks; copy i has its experts rotated by i, and the routing with them."""

    shape: Experts
    x: Tensor
    w13: Int4Weight
    w2: Int4Weight
    topk_ids: Tensor
    topk_weights: Tensor
    expected: Tensor  # (T, D) fp64

    def stacks(self, copy: int) -> tuple[Int4Weight, Int4Weight]:
        def rolled(weight: Int4Weight) -> Int4Weight:
            names = ("qweight", "scales")
            tensors = {name: in_huge_pages(getattr(weight, name).roll(copy, 0)) for name in names}
            return dataclasses.replace(weight, **tensors)

        return rolled(self.w13), rolled(self.w2)

    def ids(self, tokens: int, copy: int) -> Tensor:
        return (self.topk_ids[:tokens] + copy) % self.shape.experts

    def touched_bytes(self, tokens: int) -> int:
        """Of the experts that the first tokens go to."""
        return len(self.topk_ids[:tokens].unique()) * (self.w13.nbytes + self.w2.nbytes) // self.shape.experts

    def result(self, tokens: int, copy: int) -> Tensor:
        """(tokens, D) fp64; the same for every copy."""
        return self.expected[:tokens]


def make_moe_problem(
    shape: Experts, tokens: int, seed: int = 0, x_dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> MoeProblem:
    """Gaussian x; every token goes to topk different experts, each set equally likely, with softmax weights."""
    sizes = {"group_size": shape.group_size, "symmetric": True, "experts": shape.experts}
    w13_shape, w2_shape = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    if device == "cpu":
        x, w13, _ = make_inputs(tokens, *w13_shape, seed=seed, **sizes)
        _, w2, _ = make_inputs(1, *w2_shape, seed=seed + 1, **sizes)
    else:  # there it takes milliseconds, here minutes for many experts
        x = draw(tokens, shape.hidden, seed, device)
        w13 = draw_weight(*w13_shape, seed=seed, device=device, **sizes)
        w2 = draw_weight(*w2_shape, seed=seed + 1, device=device, **sizes)
    generator = torch.Generator().manual_seed(seed)
    top = torch.rand(tokens, shape.experts, generator=generator).topk(shape.topk, dim=-1)
    ids, weights = top.indices.to(device), top.values.softmax(-1).contiguous().to(device)
    x = x.to(x_dtype).float()
    tensors = (w13.qweight, w13.scales, w13.zeros, w13.perm, w2.qweight, w2.scales, w2.zeros, w2.perm)
    numbers = (shape.hidden, shape.intermediate, shape.group_size, 0, 0)
    expected = reference.int4_moe(x.double(), ids, weights, *tensors, *numbers, True, "exact")
    return MoeProblem(shape=shape, x=x, w13=w13, w2=w2, topk_ids=ids, topk_weights=weights, expected=expected)


class M3Moe(GemmArm):
    """int4_moe in one activation mode."""

    def __init__(self, problem: MoeProblem, threads: int, parts: int, *, mode: str) -> None:
        self.computes, self.lossy, self.mode = COMPUTES[mode], mode == "int8", mode
        self.tolerance = 2 * tolerance_of(mode)  # two products, one after the other
        self.threads, self.parts, self.problem = threads, parts, problem
        self.isa = use_isa(None)
        self.stacks = [problem.stacks(copy) for copy in range(parts)]
        self.stored_bytes = problem.w13.nbytes + problem.w2.nbytes
        self.outputs: dict[int, Tensor] = {}

    def load(self, x: Tensor) -> None:
        self.x, self.weights = x, self.problem.topk_weights[: len(x)].contiguous()
        self.ids = [self.problem.ids(len(x), copy).contiguous() for copy in range(self.parts)]

    def run(self, part: int) -> None:
        w13, w2 = self.stacks[part]
        self.outputs[part] = int4_moe(self.x, w13, w2, self.ids[part], self.weights, activations=self.mode)

    def output(self, copy: int) -> Tensor:
        return self.outputs[copy]


class TorchMoe(GemmArm):
    """A loop over the experts that were chosen: matmul, silu, matmul, weighted sum, on dequantised weights."""

    def __init__(self, problem: MoeProblem, threads: int, parts: int, *, dtype: torch.dtype) -> None:
        self.computes = "fp32" if dtype == torch.float32 else "bf16"
        self.lossy = dtype != torch.float32
        self.tolerance = 2 * TOLERANCE[self.computes]
        self.threads, self.dtype, self.problem = threads, dtype, problem
        self.parts = 1  # one copy is several times the size of all of ours together
        self.w13, self.w2 = (int4_dequantize(weight, dtype) for weight in (problem.w13, problem.w2))
        self.stored_bytes = sum(weight.numel() * weight.element_size() for weight in (self.w13, self.w2))

    def load(self, x: Tensor) -> None:
        self.x, self.ids = x.to(self.dtype), self.problem.topk_ids[: len(x)]
        self.weights = self.problem.topk_weights[: len(x)].to(self.dtype)

    def run(self, part: int) -> None:
        self.y = torch.zeros_like(self.x)
        for expert in self.ids.unique().tolist():
            tokens, slots = (self.ids == expert).nonzero(as_tuple=True)
            gate, up = torch.nn.functional.linear(self.x[tokens], self.w13[expert]).chunk(2, dim=-1)
            out = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.w2[expert])
            self.y.index_add_(0, tokens, out * self.weights[tokens, slots, None])

    def output(self, copy: int) -> Tensor:
        return self.y.float()


MOE_ARMS: dict[str, Callable[[MoeProblem, int, int], GemmArm]] = {
    **{f"m3_{mode}": functools.partial(M3Moe, mode=mode) for mode in ("int8", "int16", "exact")},
    "torch_fp32": functools.partial(TorchMoe, dtype=torch.float32),
    "torch_bf16": functools.partial(TorchMoe, dtype=torch.bfloat16),
}


def moe_facts(shape: Experts, m: int, weight_bytes: int) -> dict[str, Any]:
    """What a row says of a layer of experts; weight_bytes of the experts that were chosen."""
    return {
        "op": "int4_moe",
        "shape": shape.name,
        "m": m,
        "n": 2 * shape.intermediate,
        "k": shape.hidden,
        "experts": shape.experts,
        "topk": shape.topk,
        "group_size": shape.group_size,
        "symmetric": True,
        "weight_bytes": weight_bytes,
    }


def run_experts(shape: Experts, plan: Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    """All rows of one mixture-of-experts layer on the CPU; dense arms only where they fit plan.limit_bytes."""
    problem = make_moe_problem(shape, max(plan.ms))
    dense = 3 * shape.experts * shape.hidden * shape.intermediate
    costs = {"torch_fp32": 4 * dense, "torch_bf16": 2 * dense}
    names = [name for name in plan.arms if name in MOE_ARMS]
    parts = 2

    def make(name: str, threads: int) -> GemmArm:
        if costs.get(name, 0) > plan.limit_bytes:
            raise UnavailableError(f"its weights take {costs[name] / 1e9:.0f} GB, more than the limit")
        return MOE_ARMS[name](problem, threads, parts)

    for threads in plan.threads:
        say(f"{shape.name}, {threads} thread(s)")
        ceilings = {threads: roofline.measured(threads, record.cpu_model())}
        arms, absent = harness.build(names, functools.partial(make, threads=threads), say)
        for m in plan.ms:
            for arm in arms:
                arm.load(problem.x[:m].clone())
            gate = functools.partial(harness.gate, expected=functools.partial(problem.result, m))
            timed, gates = harness.pass_gates(arms, gate, absent, say)
            probe = roofline.ReadProbe(threads, ceilings[threads].read_kind)
            times, rates = harness.interleave(
                timed, seconds=plan.seconds, min_rounds=plan.min_rounds, probe=probe.bandwidth
            )
            facts = moe_facts(shape, m, problem.touched_bytes(m))
            macs = m * shape.topk * 3 * shape.hidden * shape.intermediate
            read = harness.spread(rates).p80  # undisturbed by other guests of the host
            rotation = Rotation(span=1, parts=parts)
            yield from rows(facts, arms, absent, gates, times, macs, read, ceilings, rotation, threads)
        del arms
        gc.collect()


def run(shape: Linear | Experts, plan: Plan, say: Callable[[str], None]) -> Iterator[GemmRow]:
    """All rows of one shape on the CPU."""
    return run_linear(shape, plan, say) if isinstance(shape, Linear) else run_experts(shape, plan, say)
