"""Thousands of calls of the policy_loss family: valid ones that two rooms must agree on, malformed ones, far memory.

A malformed call spoils one or two arguments of a valid one: type, dtype, rank, size, strides, device, values. The
public functions may raise ValueError and BackendError only; the registered ops, which check little, any of Python's.
Neither may crash. A spoiling that changes nothing (strides, storage) must change no bit.
"""

from __future__ import annotations

import mmap
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import BackendError, dispatch
from m3kernels.checks import describe
from m3kernels.policy_loss import (
    DistillSpec,
    LossSpec,
    linear_distill_loss,
    linear_logprobs,
    linear_logprobs_backward,
    linear_policy_loss,
    policy_loss_from_logprobs,
)
from m3kernels.policy_loss.reference import make_inputs
from m3kernels.policy_loss.tiles import new_state
from m3kernels.testing import bitwise_equal

CASES = 1000
ROUNDS = [("cpu", 0), ("cpu", 1), ("reference", 0)]
ROUNDS += [pytest.param(room, seed, marks=pytest.mark.slow) for seed in range(2, 6) for room in ("cpu", "reference")]
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64),
)
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 2**31, 2**62, 2**63 - 1, 2**63, 10**30, 10**400, -(2**63), 0.5, 1e-320, 1e-40, 1e300)
OBJECTS = (
    *(None, True, False, "", "auto", "token", "js", "a b", float("nan"), float("inf"), -0.5, (), [], {}, (3, 4), 1j),
    *(object(), torch.float16, LossSpec, LossSpec(), DistillSpec(divergence="js"), LossSpec(entropy_coef=0.1)),
)


# -- valid calls ------------------------------------------------------------------------------------------------------
CASE = make_inputs(9, 5, 13, sequences=3, density=0.8, bias=True)
STREAMS = {
    key: CASE[key]
    for key in ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs", "mask", "segment_ids", "cu_seqlens")
}
HEAD = {key: CASE[key] for key in ("hidden", "weight", "bias")}
NUMBERS_OF_HEAD = dict(softcap=4.0, logit_scale=1.5, temperature=torch.linspace(0.5, 1.5, 9))
STEPS = LossSpec(ratio_level="step", kl_coef=0.1, sampler_level="sequence", aggregation="sequence_mean")
IDS = torch.randint(0, 13, (9, 3), generator=torch.Generator().manual_seed(1))
TEACHER = make_inputs(9, 4, 13, seed=1, bias=True)


def trained(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A call and its backward pass: loss and gradients of the head, one after another."""

    def call(**arguments: Any) -> Tensor:
        leaves = []
        for key in ("hidden", "weight", "bias", "logprobs"):
            x = arguments.get(key)
            if isinstance(x, Tensor) and x.is_floating_point():
                arguments[key] = x.detach().requires_grad_()
                leaves.append(arguments[key])
        found = [x for x in function(**arguments) if isinstance(x, Tensor)]
        total = sum(x.sum() for x in found)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
        grads = [x.grad for x in leaves if x.grad is not None]
        return torch.cat([x.detach().flatten().to(torch.float64) for x in (*found, *grads) if not x.is_meta])

    return call


def of_spec(function: Callable[..., Any], kind: type, good: dict[str, Any]) -> Callable[..., Tensor]:
    """A call by the fields of its spec."""
    return lambda **fields: trained(function)(**{**good, "spec": kind(**fields)})


POLICY = dict(**HEAD, ids=CASE["ids"], **STREAMS, **NUMBERS_OF_HEAD, spec=STEPS, normaliser=7.0, workspace_bytes=4096)
PADDED = {key: CASE[key].view(3, 3) for key in ("ids", "old_logprobs", "mask", "segment_ids")}
SPEC_FIELDS = dict(
    ratio_level="token", clip="two_sided", clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_estimator="k3", kl_coef=0.1,
    kl_in="loss", kl_ratio_weighted=True, entropy_coef=0.1, sampler_level="token", sampler_mode="mask",
    sampler_low=0.5, sampler_high=2.0, aggregation="constant", constant_length=5,
)  # fmt: skip
DISTILL = dict(**HEAD, ids=CASE["ids"], teacher_logprobs=CASE["ref_logprobs"], mask=CASE["mask"])
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "logprobs": (
        trained(linear_logprobs),
        dict(**HEAD, ids=CASE["ids"], **NUMBERS_OF_HEAD, entropy=True, sum_sq=True, save_logits="auto",
             workspace_bytes=2048, vocab_start=None),
    ),
    "logprobs_of_ids": (trained(linear_logprobs), dict(**HEAD, ids=IDS, temperature=0.7, save_logits=False)),
    "backward": (
        lambda **arguments: torch.cat([x.flatten() for x in linear_logprobs_backward(**arguments) if x is not None]),
        dict(**HEAD, ids=IDS, lse=torch.linspace(1, 3, 9), grad_logprobs=IDS.float(), vocab_start=0, softcap=2.0),
    ),
    "policy": (trained(linear_policy_loss), POLICY),
    "policy_padded": (
        trained(linear_policy_loss),
        dict(hidden=CASE["hidden"].view(3, 3, 5), weight=CASE["weight"], **PADDED, advantages=torch.randn(3),
             temperature=0.9, spec=LossSpec(ratio_level="sequence", entropy_coef=0.1)),
    ),
    "policy_fields": (of_spec(linear_policy_loss, LossSpec, POLICY), SPEC_FIELDS),
    "from_logprobs": (
        trained(policy_loss_from_logprobs),
        dict(logprobs=CASE["ref_logprobs"], **STREAMS, entropy=torch.rand(9), spec=STEPS, normaliser=torch.tensor(3.0)),
    ),
    "from_logprobs_fields": (
        of_spec(policy_loss_from_logprobs, LossSpec,
                dict(logprobs=CASE["ref_logprobs"], **STREAMS, entropy=torch.rand(9))),
        SPEC_FIELDS,
    ),
    "distill": (
        trained(linear_distill_loss),
        dict(**DISTILL, spec=DistillSpec(), cu_seqlens=CASE["cu_seqlens"], aggregation="constant", constant_length=4,
             softcap=3.0),
    ),
    "distill_ids": (
        trained(linear_distill_loss),
        dict(**HEAD, mask=CASE["mask"], ids=(IDS[:, :1] + torch.arange(3)) % 13, teacher_logprobs=-3 - torch.rand(9, 3),
             spec=DistillSpec(divergence="js", beta=0.3), aggregation="sequence_mean", normaliser=2),
    ),
    "distill_fields": (of_spec(linear_distill_loss, DistillSpec, DISTILL), dict(divergence="reverse", beta=0.5)),
    "distill_teacher": (
        trained(linear_distill_loss),
        dict(**HEAD, mask=CASE["mask"], teacher_hidden=TEACHER["hidden"], teacher_weight=TEACHER["weight"],
             teacher_bias=TEACHER["bias"], teacher_softcap=5.0, teacher_logit_scale=0.8, temperature=1.3,
             spec=DistillSpec(divergence="reverse"), workspace_bytes=700),
    ),
}  # fmt: skip


# -- spoilings --------------------------------------------------------------------------------------------------------
def same_values(r: random.Random, value: Any) -> Any:
    """The same tensor in other storage or with other strides."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    choice = r.randrange(4)
    if choice == 0:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    if choice == 1:
        return value.mT.contiguous().mT if value.ndim > 1 else value.clone()
    if choice == 2:
        return torch.cat((value[..., :1], value, value[..., :1]), -1)[..., 1:-1]
    return torch.cat((value, value))[: len(value)]


def spoil_values(r: random.Random, value: Tensor) -> Tensor:
    """A few elements become extreme."""
    value = value.detach().clone()
    plain = value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)
    if not value.numel() or not plain or value.is_meta or value.layout != torch.strided:
        return value
    if value.is_floating_point():
        tiny, most = torch.finfo(value.dtype).tiny, torch.finfo(value.dtype).max
        extreme: float = r.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1.0, tiny, most, -most))
    else:
        info = torch.iinfo(value.dtype)
        extreme = r.choice((info.min, info.max, 0, -1, 1, 3, 12, 13, 99))
    flat = value.view(-1)
    if r.random() < 0.2:
        return value.fill_(extreme)
    for _ in range(r.randint(1, 3)):
        flat[r.randrange(len(flat))] = extreme
    return value


def spoil_tensor(r: random.Random, value: Tensor) -> Any:
    choice = r.randrange(11)
    dim = r.randrange(value.ndim) if value.ndim else 0
    if choice == 0:
        return value.detach().to(r.choice(DTYPES))
    if choice == 1 and value.ndim:
        return value.narrow(dim, 0, r.choice((0, 1, max(0, value.shape[dim] - 1))))
    if choice == 2 and value.ndim:
        return torch.cat((value, value), dim)
    if choice == 3:
        return value[None]
    if choice == 4 and value.ndim:
        return value.select(dim, 0) if value.shape[dim] else value
    if choice == 5:
        return value.mT if value.ndim > 1 else value.view(-1, 1)
    if choice == 6:
        return value.to("meta")
    if choice == 7 and value.layout == torch.strided and not value.is_meta:
        return value.detach().to_sparse()
    if choice == 8 and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    if choice == 9 and value.ndim:
        return value[..., :1].expand(value.shape)
    return spoil_values(r, value)


def spoil(r: random.Random, value: Any) -> Any:
    if r.random() < 0.12:
        return r.choice(OBJECTS)
    if r.random() < 0.08:
        return r.choice(NUMBERS)
    if isinstance(value, Tensor):
        return spoil_tensor(r, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return r.choice((*NUMBERS, value + 1, value - 1, float(value), str(value), torch.tensor(value)))
    return r.choice(
        (*OBJECTS, "sequence", "one_sided", "k1", "reward", "mask", "sequence_mean", "forward", torch.ones(3))
    )


# -- malformed calls --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_is_valid(backend: str, name: str) -> None:
    function, arguments = CALLS[name]
    assert function(**arguments).isfinite().all()


@pytest.mark.parametrize(("backend", "seed"), ROUNDS, indirect=["backend"])
def test_malformed_calls(backend: str, seed: int) -> None:
    r = random.Random(seed)
    names = list(CALLS)
    expected = {name: function(**arguments) for name, (function, arguments) in CALLS.items()}
    refused = 0
    for case in range(CASES):
        name = names[case % len(names)]
        function, arguments = CALLS[name]
        harmless = r.random() < 0.1
        changed = dict(arguments)
        for key in r.sample(list(arguments), min(len(arguments), r.choice((1, 1, 1, 2)))):
            changed[key] = same_values(r, changed[key]) if harmless else spoil(r, changed[key])
        try:
            result = function(**changed)
        except (ValueError, BackendError):
            result = None
        except Exception as error:
            what = {key: describe(value) for key, value in changed.items() if value is not arguments[key]}
            message = f"seed {seed}, case {case}: {name} with {what} raised {type(error).__name__}: {error}"
            raise AssertionError(message) from error
        refused += result is None
        if harmless:
            assert result is not None and bitwise_equal(result, expected[name]), f"seed {seed}, case {case}: {name}"
    assert CASES * 0.4 < refused < CASES * 0.9


# -- registered ops ---------------------------------------------------------------------------------------------------
ROWS = torch.zeros(9)
TEMPERATURE = torch.linspace(0.5, 1.5, 9)
SEQUENCE = torch.arange(3).repeat_interleave(3)
WANTED = dict(wants_hidden=True, wants_weight=True, wants_bias=True)
TRANSFORM = dict(logit_scale=1.5, softcap=4.0)
OPS: dict[str, dict[str, Any]] = {
    "linear_logprobs": dict(
        **HEAD, ids=IDS, temperature=TEMPERATURE, **TRANSFORM, first_id=0, entropy=True, sum_sq=True, save_logits=True,
        workspace=4096,
    ),
    "linear_logprobs_backward": dict(
        **HEAD, ids=IDS, temperature=TEMPERATURE, lse=torch.ones(9), lse_low=ROWS, logits=torch.randn(16 * 13),
        base=torch.randn(9), slope=torch.randn(9), square=torch.randn(9), picked=torch.randn(9, 3),
        complement=torch.randn(9, 3), **TRANSFORM, first_id=0, **WANTED,
    ),
    "linear_policy_loss": dict(
        **HEAD, ids=CASE["ids"][:, None], temperature=TEMPERATURE, token_weight=CASE["mask"].float(),
        advantages=CASE["advantages"], old_logprobs=CASE["old_logprobs"], ref_logprobs=CASE["ref_logprobs"],
        sampler_logprobs=CASE["sampler_logprobs"], teacher_logprobs=None, sequence=SEQUENCE, step=SEQUENCE,
        **TRANSFORM, loss=STEPS.to_text(), **WANTED, wide_weight_grad=False, workspace=400,
    ),
    "linear_distill_loss": dict(
        **HEAD, temperature=None, token_weight=CASE["mask"].float(), teacher_hidden=TEACHER["hidden"],
        teacher_weight=TEACHER["weight"], teacher_bias=TEACHER["bias"], **TRANSFORM, teacher_logit_scale=1.0,
        teacher_softcap=0.0, kind="js", beta=0.5, **WANTED, wide_weight_grad=True, workspace=800,
    ),
}  # fmt: skip


# What torch, the schema of an op and the border raise; whatever else comes is no answer to a malformed call.
PYTHONIC = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, AssertionError, ArithmeticError),
)


@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
@pytest.mark.parametrize("name", OPS)
def test_malformed_calls_of_registered_ops(backend: str, name: str) -> None:
    op, arguments = getattr(torch.ops.m3kernels, name).default, OPS[name]
    assert all(isinstance(x, Tensor) for x in op(**arguments))
    r = random.Random(name)
    raised = 0
    for _ in range(CASES):
        changed = {**arguments}
        for key in r.sample(list(arguments), r.choice((1, 1, 2))):
            changed[key] = spoil(r, changed[key])
        try:
            op(**changed)
        except PYTHONIC:
            raised += 1
    assert CASES * 0.3 < raised < CASES * 0.95


# -- valid calls in two rooms -----------------------------------------------------------------------------------------
def random_spec(r: random.Random) -> LossSpec:
    """Any combination of fields that a LossSpec accepts."""
    clip, kl_in = r.choice(("two_sided", "two_sided", "one_sided", "none")), r.choice(("loss", "reward"))
    return LossSpec(
        ratio_level=r.choice(("token", "step", "sequence")),
        clip=clip,
        clip_low=r.choice((0.01, 0.2, 1.0)),
        clip_high=r.choice((0.02, 0.3)),
        dual_clip=r.choice((None, 1.5)) if clip == "two_sided" else None,
        kl_estimator=r.choice(("k1", "k2", "k3")),
        kl_coef=r.choice((0.0, 0.3)),
        kl_in=kl_in,
        kl_ratio_weighted=kl_in == "loss" and r.random() < 0.5,
        entropy_coef=r.choice((0.0, 0.0, 0.2)),
        sampler_level=r.choice((None, "token", "sequence")),
        sampler_mode=r.choice(("truncate", "mask")),
        sampler_low=r.choice((0.0, 0.7)),
        sampler_high=1.5,
        aggregation=r.choice(("token_mean", "sequence_mean", "constant")),
        constant_length=r.choice((3, 50)),
    )


def random_head(r: random.Random, rows: int) -> dict[str, Any]:
    return dict(
        temperature=r.choice((1.0, 0.6, torch.rand(rows) + 0.5)),
        softcap=r.choice((0.0, 0.0, 2.0)),
        logit_scale=r.choice((1.0, 1.0, -1.4, 0.3)),
        workspace_bytes=r.choice((None, 1, 500, 20_000)),
    )


def random_call(r: random.Random) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """A valid call of any of the functions, of random sizes, layout, dtype and options."""
    sequences, length = r.randint(1, 4), r.randint(1, 9)
    rows, vocabulary = sequences * length, r.choice((1, 2, 17, 130, 333))
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    options = dict(density=r.choice((0.0, 0.3, 1.0)), dtype=dtype, bias=r.random() < 0.5, seed=r.randrange(2**31))
    case = make_inputs(rows, r.choice((1, 5, 16)), vocabulary, sequences=sequences, **options)
    head = random_head(r, rows)
    kind = r.choice(("logprobs", "policy", "policy", "distill", "teacher"))
    base = {key: case[key] for key in ("hidden", "weight", "bias")}
    if kind == "logprobs":
        ids = r.choice((case["ids"], case["ids"].int()[:, None].expand(rows, 3)))
        flags = dict(entropy=r.random() < 0.5, sum_sq=r.random() < 0.5, save_logits=r.choice((True, False, "auto")))
        return linear_logprobs, dict(**base, ids=ids, **head, **flags)
    mask = r.choice((case["mask"], case["mask"] * torch.rand(rows), case["mask"].int()))
    normaliser = r.choice((None, 3, torch.tensor(17.0)))
    if kind == "distill":
        spec = DistillSpec(divergence=r.choice(("clip_forward", "forward", "reverse", "js")), beta=r.choice((0.5, 0.1)))
        streams = dict(ids=case["ids"], teacher_logprobs=case["ref_logprobs"].clamp(max=-0.1), mask=mask)
        return linear_distill_loss, dict(**base, **streams, spec=spec, normaliser=normaliser, **head)
    if kind == "teacher":
        other = make_inputs(rows, 3, vocabulary, **{**options, "seed": 5})
        teacher = {f"teacher_{key}": other[key] for key in base}
        spec = DistillSpec(divergence=r.choice(("forward", "reverse", "js")), beta=0.3)
        return linear_distill_loss, dict(**base, mask=mask, **teacher, spec=spec, teacher_softcap=3.0, **head)
    streams = {**{key: case[key] for key in STREAMS}, "ids": case["ids"], "mask": mask}
    if r.random() < 0.4:  # padded
        streams = {key: x.view(sequences, length) for key, x in streams.items() if key != "cu_seqlens"}
        base["hidden"] = base["hidden"].view(sequences, length, -1)
        if isinstance(head["temperature"], Tensor):
            head["temperature"] = head["temperature"].view(sequences, length)
    if r.random() < 0.3:
        streams["advantages"] = torch.randn(sequences)
    for key in r.sample(("old_logprobs", "segment_ids"), r.choice((0, 0, 1, 2))):
        streams[key] = None
    return linear_policy_loss, dict(**base, **streams, spec=random_spec(r), normaliser=normaliser, **head)


@pytest.mark.parametrize("seed", range(6))
def test_rooms_agree_on_valid_calls(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(150):
        function, arguments = random_call(r)
        found = {}
        for room in ("cpu", "reference"):
            monkeypatch.setenv("M3KERNELS_BACKEND", room)
            dispatch.rooms.cache_clear()
            found[room] = trained(function)(**arguments)
        narrow = arguments["hidden"].dtype in (torch.bfloat16, torch.float16)
        tolerance = dict(rtol=1e-2, atol=1e-2) if narrow else dict(rtol=1e-4, atol=1e-4)
        what = {key: describe(value) for key, value in arguments.items()}
        torch.testing.assert_close(
            found["cpu"], found["reference"], equal_nan=False, **tolerance,
            msg=lambda text, case=case, what=what: f"seed {seed}, case {case}: {what}\n{text}",
        )  # fmt: skip
    dispatch.rooms.cache_clear()


# -- rows beyond 2**32 elements ---------------------------------------------------------------------------------------
FAR = 2**32 + 64  # elements from row to row; cut to 32 bits it is 64, which lies behind the first row


def far_apart(rows: Tensor) -> Tensor:
    """The same matrix in 16 GiB of memory of which only its rows are ever touched."""
    if sys.platform != "linux":
        pytest.skip("memory that is reserved but not there: Linux only")
    unreserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, unnamed before Python 3.13
    try:
        memory = mmap.mmap(-1, 4 * (FAR * (len(rows) - 1) + 4096), flags=unreserved)
    except OSError as error:
        pytest.skip(f"16 GiB of addresses: {error}")
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(rows.shape, (FAR, 1)).copy_(rows)


def near(rows: Tensor) -> Tensor:
    return rows.clone()


def tile_arguments() -> dict[str, Any]:
    n = 2
    return dict(
        ids=torch.tensor([[3, 70], [49, 0]]), first=0, logit_scale=1.3, softcap=3.0,
        inverse_temperature=torch.tensor([0.7, 1.4]), lse=torch.tensor([4.0, 5.0]), low=torch.full((n,), 1e-8),
        column=torch.linspace(-1, 1, n), columns=torch.linspace(-1, 1, 2 * n).view(n, 2), logits=torch.randn(n, 50),
        other=torch.randn(n, 50),
    )  # fmt: skip


def statistics(cpu: Any, a: dict[str, Any], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    z, state = place(a["logits"]), new_state(2, 2, entropy=True, sum_sq=True, like=a["logits"])
    cpu.statistics(z, a["ids"], 0, None, a["logit_scale"], a["softcap"], a["inverse_temperature"], state)
    return [z, *state]  # type: ignore[list-item]


def gradient(cpu: Any, a: dict[str, Any], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    z, outs = place(a["logits"]), [place(torch.zeros(2, 50)) for _ in range(2)]
    for rows, out in zip((None, torch.tensor([1, 0])), outs, strict=True):
        cpu.gradient(
            z, rows, a["ids"], 0, a["lse"], a["low"], a["column"], a["column"], a["column"], a["columns"], a["columns"],
            a["logit_scale"], a["softcap"], a["inverse_temperature"], out,
        )  # fmt: skip
    return outs


def divergence(cpu: Any, a: dict[str, Any], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    student, teacher, value, center = place(a["logits"]), place(a["other"]), torch.zeros(2), torch.zeros(2)
    cpu.divergence(student, teacher, a["lse"], a["low"], a["lse"], a["low"], "js", 0.5, value, center)
    return [value, center]


def divergence_gradient(cpu: Any, a: dict[str, Any], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    student, teacher, outs = place(a["logits"]), place(a["other"]), [place(torch.zeros(2, 50)) for _ in range(2)]
    for rows, out in zip((None, torch.tensor([1, 0])), outs, strict=True):
        cpu.divergence_gradient(
            student, teacher, rows, a["lse"], a["low"], a["lse"], a["low"], "js", 0.5, a["column"], a["column"],
            a["logit_scale"], a["softcap"], a["inverse_temperature"], out,
        )  # fmt: skip
    return outs


@pytest.mark.parametrize("kernel", (statistics, gradient, divergence, divergence_gradient))
def test_offsets_need_more_than_32_bits(kernel: Callable[..., list[Tensor]]) -> None:
    cpu = pytest.importorskip("m3kernels.policy_loss._cpu", exc_type=ImportError)
    a = tile_arguments()
    expected, found = kernel(cpu, a, near), kernel(cpu, a, far_apart)
    assert all(bitwise_equal(x, y.contiguous()) for x, y in zip(expected, found, strict=True))
    assert all(row.abs().max() > 0 for x in expected for row in x)
