"""The CUDA tile kernels of policy_loss: on a GPU where there is one, else on the emulated device.

Exact values are those of the plain-torch tile kernels in fp64. The emulated device is played in several ways: what it
leaves open (order, asynchronous copies) is drawn from a seed, and the number of processors decides how rows are shared.
"""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import emulated_cuda
import pytest
import torch
from policy_loss_cases import check_run, head_of, inputs, run
from torch import Tensor
from triton_tiles import (
    DEVICE,
    cloned,
    divergence_gradient_inputs,
    divergence_inputs,
    doubled,
    every_dtype,
    every_kind,
    gradient_inputs,
    statistics_inputs,
    two_parts,
)

from m3kernels.policy_loss import DistillSpec, LossSpec, linear_distill_loss, linear_logprobs, tiles
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.policy_loss.tiles import State, new_state
from m3kernels.testing import bitwise_equal, check_error, relative_error, surrounded_by_nan, uninitialized_is_nan

ON_GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICES = {  # shares of a few rows: none, two, all there are
    "one_processor": dict(capability=80, multiprocessors=1, seed=1),
    "two": dict(capability=90, multiprocessors=2, seed=2),
    "many": dict(capability=90, multiprocessors=132, seed=3),
}


def play(name: str) -> None:
    if not ON_GPU:
        emulated_cuda.configure(**DEVICES[name])


@pytest.fixture
def room(cuda_module: None) -> Any:
    return importlib.import_module("m3kernels.policy_loss._cuda")


@pytest.fixture(params=("one_processor", "many"))
def played(request: pytest.FixtureRequest, room: Any) -> Any:
    """The room, on devices that share rows among blocks differently."""
    if ON_GPU and request.param != "many":
        pytest.skip("the device is what it is")
    play(request.param)
    return room


# -- statistics -------------------------------------------------------------------------------------------------------
STATISTICS: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131, ids=2),
    "no_ids": dict(rows=2, columns=33, ids=0),
    "a_unit": dict(rows=3, columns=1024, entropy=True),
    "five_units": dict(rows=3, columns=4097, ids=9, first=70001, entropy=True, sum_sq=True),
    "more_units_than_lanes": dict(rows=2, columns=33801, ids=9, first=151, entropy=True, sum_sq=True),
    "many_ids": dict(rows=2, columns=2077, ids=133, first=5),
    "bias": dict(rows=3, columns=1100, bias=True, entropy=True),
    "logit_scale": dict(rows=3, columns=61, logit_scale=-0.7),
    "softcap": dict(rows=3, columns=61, softcap=3.0),
    "wide_softcap": dict(rows=3, columns=61, softcap=50.0),
    "temperature": dict(rows=3, columns=61, temperature=True),
    "everything": dict(
        rows=7, columns=5131, ids=5, first=1000, bias=True, logit_scale=0.6, softcap=5.0, temperature=True,
        entropy=True, sum_sq=True,
    ),
}  # fmt: skip


def check_statistics(before: list[Any], after: list[Any]) -> None:
    """z' by the error rule, then by the same rule the state against that of the z' left in memory."""
    exact, torchs = list(map(doubled, before)), list(map(cloned, before))
    tiles.statistics(*exact)
    tiles.statistics(*torchs)
    check_error(after[0], exact[0], torchs[0], TOLERANCE)
    _, ids, first, *_, state = before
    exact_state, torchs_state = doubled(state), cloned(state)
    tiles.statistics(after[0].double(), ids, first, None, 1.0, 0.0, None, exact_state)
    tiles.statistics(after[0].float(), ids, first, None, 1.0, 0.0, None, torchs_state)
    for ours, truth, theirs in zip(after[-1], exact_state, torchs_state, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            check_error(ours, truth, theirs, TOLERANCE)


@every_dtype
@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(played: Any, dtype: torch.dtype, case: str) -> None:
    before = statistics_inputs(**STATISTICS[case], dtype=dtype)
    after = list(map(cloned, before))
    with uninitialized_is_nan():
        played.statistics(*after)
    check_statistics(before, after)


@pytest.mark.skipif(ON_GPU, reason="the device is what it is")
@pytest.mark.parametrize("rows", (1, 3))
def test_how_a_row_is_shared_changes_no_bit(room: Any, rows: int) -> None:
    arguments = {
        "statistics": statistics_inputs(
            rows, 33801, 3, 64, bias=True, softcap=9.0, entropy=True, sum_sq=True, dtype=torch.float32
        ),
        "divergence": divergence_inputs(rows, 17000, "js", 0.3, torch.float32),
    }
    found = []
    for name in DEVICES:
        play(name)
        copies = {op: list(map(cloned, full)) for op, full in arguments.items()}
        with uninitialized_is_nan():
            room.statistics(*copies["statistics"])
            room.divergence(*copies["divergence"])
        found.append([copies["statistics"][0], *copies["statistics"][-1], *copies["divergence"][-2:]])
        assert not room.counters(found[-1][0], room.SHARED_ROWS).any()
    assert all(bitwise_equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@every_dtype
def test_minus_infinity_and_the_lowest_finite_logit(room: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 1037, device=DEVICE).to(dtype)
    logits[0] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, ::2] = torch.finfo(dtype).min
    logits[3] = torch.finfo(dtype).min
    ids = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    state = new_state(4, 1, entropy=True, sum_sq=True, like=logits)
    room.statistics(logits, ids, 0, None, 1.0, 0.0, None, state)
    z = logits.double()
    maximum = z.amax(1)
    e = (z - maximum[:, None]).nan_to_num(-torch.inf).exp()
    e[0] = 0.0
    assert torch.equal(state.maximum.double(), maximum)
    assert torch.equal(state.picked.double(), z[:, :1])
    assert relative_error(state.total, e.sum(1)).max < 1e-6
    assert relative_error(state.weighted, torch.special.entr(e).neg().sum(1)).max < 1e-6
    assert relative_error(state.squared, e.square().sum(1)).max < 1e-6
    room.statistics(torch.ones_like(logits), ids, 9999, None, 1.0, 0.0, None, state)
    assert state.maximum.tolist() == [1.0, max(1.0, float(z[1, 0])), max(1.0, float(z[2].max())), 1.0]
    assert float(state.total[0]) == float(state.total[3]) == 1037.0


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("options", ({}, dict(softcap=3.0)), ids=str)
def test_what_is_not_finite_stays_in_its_row(room: Any, value: float, options: dict[str, Any]) -> None:
    arguments = statistics_inputs(5, 130, 2, entropy=True, sum_sq=True, dtype=torch.float32, **options)
    clean = list(map(cloned, arguments))
    room.statistics(*clean)
    arguments[0][2, 129] = value
    room.statistics(*arguments)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert all(bitwise_equal(x[others], y[others]) for x, y in zip(arguments[-1], clean[-1], strict=True))
    capped = bool(options) and value == torch.inf  # to a finite number
    assert bool(arguments[-1].total[2].log().add(arguments[-1].maximum[2]).isfinite()) == capped


# -- gradient ---------------------------------------------------------------------------------------------------------
GRADIENT: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131),
    "no_ids": dict(rows=2, columns=33, ids=0),
    "five_units": dict(rows=3, columns=4099, first=70001),
    "repeated_and_foreign_ids": dict(rows=3, columns=1300, ids=9, first=40),
    "many_ids": dict(rows=2, columns=4100, ids=67, first=5),
    "slope": dict(rows=3, columns=61, slope=True),
    "square": dict(rows=3, columns=61, square=True),
    "logit_scale": dict(rows=3, columns=61, logit_scale=-0.7),
    "softcap": dict(rows=3, columns=61, softcap=15.0),
    "softcap_and_temperature": dict(rows=3, columns=61, softcap=15.0, temperature=True),
    "some_rows": dict(rows=6, columns=61, some=[4, 0, 5], ids=2, slope=True),
    "everything": dict(
        rows=6, columns=4105, ids=5, first=1000, some=[5, 1], slope=True, square=True, logit_scale=0.6, softcap=20.0,
        temperature=True,
    ),
}  # fmt: skip


@every_dtype
@pytest.mark.parametrize("case", GRADIENT)
def test_gradient(room: Any, dtype: torch.dtype, case: str) -> None:
    arguments = gradient_inputs(**GRADIENT[case], dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.gradient(*exact)
    tiles.gradient(*torchs)
    room.gradient(*arguments)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


@pytest.mark.parametrize("out", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", ("everything", "many_ids"))
def test_gradient_is_rounded_once(room: Any, out: torch.dtype, case: str) -> None:
    """In another dtype it is the fp32 gradient rounded to nearest even, bit by bit."""
    arguments = gradient_inputs(**GRADIENT[case], dtype=torch.float32)
    room.gradient(*arguments)
    rounded = torch.full_like(arguments[-1], torch.nan, dtype=out)
    room.gradient(*arguments[:-1], rounded)
    assert bitwise_equal(rounded, arguments[-1].to(out))


@every_dtype
@pytest.mark.parametrize("case", ("five_units", "repeated_and_foreign_ids", "softcap_and_temperature"))
def test_gradient_in_place(room: Any, dtype: torch.dtype, case: str) -> None:
    arguments = gradient_inputs(**GRADIENT[case], dtype=dtype)
    room.gradient(*arguments)
    logits = arguments[0]
    room.gradient(*arguments[:-1], logits)
    assert bitwise_equal(logits, arguments[-1])


def test_rows_that_do_not_exist_have_a_gradient_of_nan(room: Any) -> None:
    arguments = gradient_inputs(6, 1300, ids=2, some=[4, 0, 5, 1], dtype=torch.float32)
    room.gradient(*arguments)
    expected = arguments[-1].clone()
    arguments[1].copy_(torch.tensor([4, -1, 2**40, 6]))
    room.gradient(*arguments)
    assert bitwise_equal(arguments[-1][:1], expected[:1])
    assert arguments[-1][1:].isnan().all()
    arguments = divergence_gradient_inputs(6, 130, "js", 0.3, torch.float32, some=[4, 0])
    arguments[2].copy_(torch.tensor([-(2**63), 6]))
    room.divergence_gradient(*arguments)
    assert arguments[-1].isnan().all()


def test_gradient_of_a_probability_of_zero_is_the_complement(room: Any) -> None:
    arguments = gradient_inputs(2, 50, ids=2, slope=True, square=True, dtype=torch.float32)
    logits, ids, complement, out = arguments[0], arguments[2], arguments[10], arguments[-1]
    logits[:, 10:20] = -torch.inf
    logits[:, 20:30] = torch.finfo(torch.float32).min
    ids.copy_(torch.tensor([[10, 3], [40, 25]]))
    room.gradient(*arguments)
    expected = torch.zeros(2, 20, device=DEVICE)
    expected[0, 0], expected[1, 15] = complement[0, 0], complement[1, 1]
    assert torch.equal(out[:, 10:30], expected)
    assert out.isfinite().all()


@pytest.mark.parametrize("log_p", (-1e-4, -1e-7))
@pytest.mark.parametrize("ids_per_row", (1, 3))
def test_gradient_of_an_id_that_is_all_but_certain(room: Any, log_p: float, ids_per_row: int) -> None:
    """d log p / d z' is 1 - p there, to the last digits, though fp32 has few numbers between such a p and 1."""
    arguments = gradient_inputs(5, 131, ids_per_row, softcap=100.0, temperature=True, dtype=torch.float32)
    logits, ids, inverse, out = arguments[0], arguments[2], arguments[13], arguments[14]
    ids.fill_(-1)[:, 0] = torch.randint(0, 131, (5,), device=DEVICE)
    column, picked = ids[:, :1], torch.randn(5, ids_per_row, device=DEVICE)
    others = logits.double().scatter(1, column, -torch.inf).logsumexp(1, keepdim=True)
    logits.scatter_(1, column, (others - math.log(math.expm1(-log_p))).float())
    top = logits.gather(1, column).double()
    exact_log_p = -(others - top).exp().log1p()  # log_p, but for the rounding of top
    exact = -picked[:, :1].double() * exact_log_p.expm1()
    lse = two_parts((top - exact_log_p)[:, 0])
    complement = exact.float().expand(5, ids_per_row).contiguous()
    room.gradient(*arguments[:4], *lse, -picked[:, 0], None, None, picked, complement, *arguments[11:])
    tiles.chain(exact, top, 1.0, 100.0, inverse.double(), exact)
    assert (out.gather(1, column) / exact - 1).abs().max() < 1e-6


# -- divergences ------------------------------------------------------------------------------------------------------
@every_dtype
@every_kind
@pytest.mark.parametrize("shape", ((1, 1), (3, 131), (2, 4099)), ids=str)
def test_divergence(played: Any, kind: str, beta: float, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    arguments = divergence_inputs(*shape, kind=kind, beta=beta, dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence(*exact)
    tiles.divergence(*torchs)
    with uninitialized_is_nan():
        played.divergence(*arguments)
    check_error(arguments[-2], exact[-2], torchs[-2], TOLERANCE)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


@every_kind
def test_divergence_where_probabilities_vanish(room: Any, kind: str, beta: float) -> None:
    """Both models, the student alone, the teacher alone: infinite where the definition is, and no nan."""
    arguments = divergence_inputs(3, 20, kind, beta, torch.float32)
    student, teacher, *_, value, center = arguments
    student[0, :5] = teacher[0, :5] = -torch.inf
    student[1, :5] = -torch.inf
    teacher[2, :5] = -torch.inf
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence(*exact)
    tiles.divergence(*torchs)
    room.divergence(*arguments)
    infinite = {"forward": [False, True, False], "reverse": [False, False, True], "js": [False] * 3}[kind]
    assert value.isinf().tolist() == infinite
    check_error(value, exact[-2], torchs[-2], TOLERANCE)
    check_error(center, exact[-1], torchs[-1], TOLERANCE)


DIVERGENCE_GRADIENT: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131),
    "three_units": dict(rows=2, columns=2051),
    "temperature": dict(rows=3, columns=61, temperature=True, logit_scale=-0.7),
    "everything": dict(rows=6, columns=2055, some=[5, 1], softcap=30.0, temperature=True, logit_scale=0.6),
}


@every_dtype
@every_kind
@pytest.mark.parametrize("case", DIVERGENCE_GRADIENT)
def test_divergence_gradient(room: Any, kind: str, beta: float, dtype: torch.dtype, case: str) -> None:
    arguments = divergence_gradient_inputs(**DIVERGENCE_GRADIENT[case], kind=kind, beta=beta, dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.divergence_gradient(*exact)
    tiles.divergence_gradient(*torchs)
    room.divergence_gradient(*arguments)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


@every_kind
def test_divergence_gradient_in_place_and_rounded_once(room: Any, kind: str, beta: float) -> None:
    arguments = divergence_gradient_inputs(3, 2051, kind, beta, torch.float32, softcap=30.0)
    room.divergence_gradient(*arguments)
    rounded = torch.empty_like(arguments[-1], dtype=torch.bfloat16)
    room.divergence_gradient(*arguments[:-1], rounded)
    student = arguments[0]
    room.divergence_gradient(*arguments[:-1], student)
    assert bitwise_equal(student, arguments[-1])
    assert bitwise_equal(rounded, student.bfloat16())


@pytest.mark.parametrize("beta", (0.5, 0.01, 0.99))
def test_js_of_nearly_equal_models_keeps_its_digits(room: Any, beta: float) -> None:
    """Logits of 60 and a difference of 1e-3: formed from logarithms of p and m apart, the terms would be noise."""
    student = 60 * torch.rand(2, 500, device=DEVICE)
    teacher = student + 1e-3 * torch.randn(2, 500, device=DEVICE)
    exact_lses = [z.double().logsumexp(1) for z in (student, teacher)]
    lses = [part for lse in exact_lses for part in two_parts(lse)]
    center, weight = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    out = torch.empty_like(student)
    room.divergence_gradient(student, teacher, None, *lses, "js", beta, center, weight, 1.0, 0.0, None, out)
    log_p, log_t = (z.double() - lse[:, None] for z, lse in zip((student, teacher), exact_lses, strict=True))
    exact = log_p.exp() * (1 - beta) * -torch.log1p(beta * torch.expm1(log_t - log_p))
    assert relative_error(out, exact).rms < 5e-3


# -- rows and memory --------------------------------------------------------------------------------------------------
def outputs_of_rows(room: Any, rows: Tensor, arguments: dict[str, list[Any]]) -> list[Tensor]:
    """Everything that the four kernels write for some of 9 rows."""

    def select(value: Any) -> Any:
        if isinstance(value, State):
            return State(*map(select, value))
        return value[rows].contiguous() if isinstance(value, Tensor) and value.shape[0] == 9 else value

    written: list[Tensor] = []
    for name, full in arguments.items():
        part = list(map(select, full))
        getattr(room, name)(*part)
        written += {"statistics": [part[0], *part[-1]], "divergence": part[-2:]}.get(name, part[-1:])
    return written


@every_dtype
@pytest.mark.parametrize("columns", (70, 4101))
def test_a_row_depends_on_no_other(room: Any, dtype: torch.dtype, columns: int) -> None:
    """Nor on where it lies: an odd row of 4101 columns begins at no multiple of 16 bytes, alone it does."""
    everything = dict(logit_scale=0.6, softcap=20.0, temperature=True)
    arguments = {
        "statistics": statistics_inputs(
            9, columns, 3, 64, bias=True, entropy=True, sum_sq=True, dtype=dtype, **everything
        ),
        "gradient": gradient_inputs(9, columns, 3, 64, slope=True, square=True, dtype=dtype, **everything),
        "divergence": divergence_inputs(9, columns, "js", 0.3, dtype),
        "divergence_gradient": divergence_gradient_inputs(9, columns, "js", 0.3, dtype, **everything),
    }
    together = outputs_of_rows(room, torch.arange(9, device=DEVICE), arguments)
    for rows in ([3], [8, 0, 3, 1]):
        wanted = torch.tensor(rows, device=DEVICE)
        alone = outputs_of_rows(room, wanted, arguments)
        assert len(together) == len(alone) == 10
        assert all(bitwise_equal(x[wanted], y) for x, y in zip(together, alone, strict=True))


def within_nan(x: Tensor, before: int) -> Tensor:
    """x (R, C) as columns of a wider tile of nan, whose rows are a multiple of 16 bytes."""
    wide = torch.full((x.shape[0], (x.shape[1] + 2 * before + 7) // 8 * 8), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, before : before + x.shape[1]] = x
    return wide[:, before : before + x.shape[1]]


def outside_is_nan(x: Tensor, before: int) -> bool:
    assert x._base is not None
    return bool(x._base[:, :before].isnan().all() and x._base[:, before + x.shape[1] :].isnan().all())


@every_dtype
@pytest.mark.parametrize("before", (5, 8))
@pytest.mark.parametrize("columns", (131, 4096))
def test_columns_of_a_wider_tile(room: Any, dtype: torch.dtype, columns: int, before: int) -> None:
    """Nothing beside them is read or written, and how they are aligned changes no bit."""
    arguments = statistics_inputs(
        3, columns, 3, 7, bias=True, softcap=9.0, temperature=True, entropy=True, sum_sq=True, dtype=dtype
    )
    wide, state = within_nan(arguments[0], before), cloned(arguments[-1])
    room.statistics(wide, *arguments[1:3], surrounded_by_nan(arguments[3]), *arguments[4:-1], state)
    room.statistics(*arguments)
    assert bitwise_equal(wide.contiguous(), arguments[0])
    assert all(bitwise_equal(x, y) for x, y in zip(state, arguments[-1], strict=True))
    assert outside_is_nan(wide, before)

    arguments = gradient_inputs(4, columns, 9, 7, some=[3, 1], softcap=20.0, temperature=True, dtype=dtype)
    room.gradient(*arguments)
    wide = within_nan(torch.full_like(arguments[-1], torch.nan), before)
    for i in (4, 5, 6, 9, 10):
        arguments[i] = surrounded_by_nan(arguments[i])
    room.gradient(within_nan(arguments[0], before), *arguments[1:-1], wide)
    assert bitwise_equal(wide.contiguous(), arguments[-1])
    assert outside_is_nan(wide, before)

    arguments = divergence_gradient_inputs(4, columns, "js", 0.3, dtype, some=[3, 1])
    room.divergence_gradient(*arguments)
    wide = within_nan(torch.full_like(arguments[-1], torch.nan), before)
    room.divergence_gradient(within_nan(arguments[0], before), within_nan(arguments[1], before), *arguments[2:-1], wide)
    assert bitwise_equal(wide.contiguous(), arguments[-1])
    assert outside_is_nan(wide, before)


@pytest.mark.parametrize(("rows", "columns"), ((0, 5), (3, 0), (0, 0)))
def test_nothing(room: Any, rows: int, columns: int) -> None:
    logits, table = torch.zeros(rows, columns, device=DEVICE), torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
    state = new_state(rows, 1, entropy=True, sum_sq=True, like=logits)
    before = cloned(state)
    room.statistics(logits, table, 0, None, 0.5, 2.0, None, state)
    assert all(bitwise_equal(x, y) for x, y in zip(state, before, strict=True))
    lse, out = torch.zeros(rows, device=DEVICE), torch.empty(rows, columns, device=DEVICE)
    room.gradient(logits, None, table, 0, *[lse] * 5, state.picked, state.picked, 0.5, 2.0, None, out)
    value, center = torch.ones(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    room.divergence(logits, logits, *[lse] * 4, "js", 0.5, value, center)
    assert value.tolist() == center.tolist() == [1.0] * rows
    room.divergence_gradient(logits, logits, None, *[lse] * 4, "js", 0.5, center, value, 1.0, 0.0, None, out)


# -- the border -------------------------------------------------------------------------------------------------------
def good(op: str) -> list[Any]:
    if op == "statistics":
        return statistics_inputs(3, 8, 2, bias=True, temperature=True, entropy=True, dtype=torch.float32)
    if op == "gradient":
        return gradient_inputs(3, 8, 2, slope=True, some=[0, 1, 2], dtype=torch.float32)
    make = divergence_inputs if op == "divergence" else divergence_gradient_inputs
    return make(3, 8, "js", 0.5, torch.float32)


ERRORS: dict[str, tuple[str, int, Any, str]] = {  # op, argument's place, what comes there, message
    "dtype": ("statistics", 0, torch.zeros(3, 8).double(), "logits: want a matrix of float32, bfloat16 or float16"),
    "strided": ("statistics", 0, torch.zeros(8, 3).t(), "logits: want contiguous rows; got a column stride of 3"),
    "expanded": ("statistics", 0, torch.zeros(1, 8).expand(3, 8), "logits: want rows that lie one after another"),
    "ids": ("statistics", 1, torch.zeros(3, 1, dtype=torch.int64), "picked: want 3 elements; got 6"),
    "ids-dtype": ("statistics", 1, torch.zeros(3, 2, dtype=torch.int32), "ids: want contiguous int64"),
    "first": ("statistics", 2, -1, "first: want at least 0; got -1"),
    "bias": ("statistics", 3, torch.zeros(7), "bias: want 8 elements; got 7"),
    "temperature": ("statistics", 6, torch.zeros(4), "inverse_temperature: want 3 elements; got 4"),
    "rows": ("gradient", 1, torch.zeros(2, dtype=torch.int64), "rows: want 3 elements; got 2"),
    "all-rows": ("gradient", 0, torch.zeros(3, 9), "out: want (3, 9); got (3, 8)"),
    "lse": ("gradient", 4, torch.zeros(2), "lse: want 3 elements; got 2"),
    "complement": ("gradient", 10, torch.zeros(3, 1), "complement: want 6 elements; got 3"),
    "out-type": ("gradient", 0, torch.zeros(3, 8).bfloat16(), "out: want the type of the logits, unless they are"),
    "teacher": ("divergence", 1, torch.zeros(3, 7), "teacher: want (3, 8); got (3, 7)"),
    "teacher-type": ("divergence", 1, torch.zeros(3, 8).half(), "teacher: want the type of the student; got 2"),
    "kind": ("divergence", 6, "sideways", "kind: want forward, reverse or js; got sideways"),
    "beta": ("divergence", 7, 1.0, "beta: want 0 < beta < 1; got 1"),
    "value": ("divergence", 8, torch.zeros(2), "value: want 3 elements; got 2"),
    "weight": ("divergence_gradient", 10, torch.zeros(2), "weight: want 3 elements; got 2"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(room: Any, case: str) -> None:
    op, place, value, message = ERRORS[case]
    arguments = good(op)
    getattr(room, op)(*arguments)
    arguments[place] = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=re.escape(f"{op}: {message}")):
        getattr(room, op)(*arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_overlaps_are_refused(room: Any, dtype: torch.dtype) -> None:
    """Out may be the logits where it has their dtype; half a row further it may not."""
    arguments, memory = gradient_inputs(3, 8, dtype=torch.float32), torch.zeros(64, device=DEVICE)
    arguments[0] = memory[:24].view(3, 8)
    arguments[-1] = memory[4:28].view(3, 8) if dtype == torch.float32 else memory.view(dtype)[:24].view(3, 8)
    with pytest.raises(ValueError, match="gradient: out: want memory apart from logits, or the same; got an overlap"):
        room.gradient(*arguments)


# -- the ops ----------------------------------------------------------------------------------------------------------
in_this_room = pytest.mark.parametrize("backend", ("policy_loss=cuda",), indirect=True)


def on_device(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}


@in_this_room
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("spec", "head"),
    (
        (dict(), dict()),
        (dict(entropy_coef=0.05, kl_coef=0.3), dict(temperature="each", softcap=3.0, logit_scale=1.7)),
        (dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4), dict(temperature=0.7)),
    ),
    ids=str,
)
def test_linear_policy_loss(backend: str, dtype: torch.dtype, spec: dict[str, Any], head: dict[str, Any]) -> None:
    case = on_device(inputs(vocabulary=1301, dtype=dtype, bias=bool(head)))
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in head_of(head, 53).items()}
    check_run(run(case, spec=LossSpec(**spec), **options), case, LossSpec(**spec), dtype, **options)


@in_this_room
def test_linear_policy_loss_of_more_rows_than_the_workspace_holds(backend: str) -> None:
    case = on_device(inputs(vocabulary=1301))
    spec = LossSpec(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4)
    check_run(run(case, spec=spec, workspace_bytes=4 * 1301 * 16), case, spec, torch.float32)


def logprobs_and_gradients(case: dict[str, Any], ids: Tensor, backend: str, patch: pytest.MonkeyPatch) -> list[Tensor]:
    from m3kernels import dispatch

    patch.setenv("M3KERNELS_BACKEND", backend)
    dispatch.rooms.cache_clear()
    hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
    found = linear_logprobs(hidden, weight, ids, entropy=True, sum_sq=True, softcap=4.0)
    assert found.entropy is not None and found.sum_sq is not None
    (found.logprobs.sum() + found.entropy.sum() - found.sum_sq.sum()).backward()
    return [found.logprobs.detach(), found.entropy.detach(), found.sum_sq.detach(), hidden.grad, weight.grad]


@in_this_room
def test_linear_logprobs_of_several_ids(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_device(inputs(rows=21, vocabulary=1301))
    ids = torch.randint(0, 1301, (21, 5), device=DEVICE)
    ours = logprobs_and_gradients(case, ids, backend, monkeypatch)
    exact = logprobs_and_gradients(case, ids, "reference", monkeypatch)
    for x, y in zip(ours, exact, strict=True):
        assert max(relative_error(x, y)) < 2e-6


@in_this_room
@every_kind
def test_linear_distill_loss(backend: str, kind: str, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3kernels import dispatch

    case, teacher = on_device(inputs(rows=21, vocabulary=1301)), on_device(inputs(21, 16, 1301, seed=1))
    spec, found = DistillSpec(divergence=kind, **({"beta": beta} if kind == "js" else {})), []
    for name in (backend, "reference"):
        monkeypatch.setenv("M3KERNELS_BACKEND", name)
        dispatch.rooms.cache_clear()
        hidden, weight = (case[leaf].clone().requires_grad_() for leaf in ("hidden", "weight"))
        loss, _ = linear_distill_loss(
            hidden, weight, mask=case["mask"], spec=spec, teacher_hidden=teacher["hidden"],
            teacher_weight=teacher["weight"],
        )  # fmt: skip
        loss.backward()
        found.append([loss.detach(), hidden.grad, weight.grad])
    for x, y in zip(*found, strict=True):
        assert max(relative_error(x, y)) < 2e-6


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32), ids=str)
def test_other_dtypes_are_refused(room: Any, dtype: torch.dtype) -> None:
    reason = room.unsupported("linear_logprobs", torch.zeros(2, 3, dtype=dtype, device=DEVICE), None)
    assert reason == f"computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
