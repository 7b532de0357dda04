"""The Triton tile kernels of policy_loss: run on a GPU, or interpreted where there is none.

Exact values are those of the plain-torch tile kernels in fp64, and those of autograd. Interpreted, bf16 is tested too:
the kernels only load and store it, and round by bits where the interpreter would cut off.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
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
    in_triton,
    statistics_inputs,
    two_parts,
)

from m3kernels.policy_loss import tiles
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.policy_loss.tiles import State, new_state
from m3kernels.testing import bitwise_equal, check_error, relative_error, surrounded_by_nan, uninitialized_is_nan

pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.policy_loss._triton")

# The interpreter computes both sides of a select: an infinite logit meets the branch not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


# -- statistics -------------------------------------------------------------------------------------------------------
STATISTICS: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131, ids=2),
    "no_ids": dict(rows=2, columns=33, ids=0),
    "two_blocks": dict(rows=3, columns=4097, first=70001, entropy=True, sum_sq=True),
    "two_spans": dict(rows=3, columns=32773, ids=9, first=151, entropy=True, sum_sq=True),
    "two_spans_transformed": dict(rows=2, columns=32769, ids=9, bias=True, softcap=20.0, temperature=True),
    "many_ids": dict(rows=2, columns=77, ids=67, first=5),
    "entropy": dict(rows=5, columns=100, entropy=True),
    "sum_sq": dict(rows=5, columns=100, sum_sq=True),
    "bias": dict(rows=3, columns=61, bias=True, entropy=True),
    "logit_scale": dict(rows=3, columns=61, logit_scale=-0.7),
    "softcap": dict(rows=3, columns=61, softcap=3.0),
    "wide_softcap": dict(rows=3, columns=61, softcap=50.0),
    "temperature": dict(rows=3, columns=61, temperature=True),
    "everything": dict(
        rows=7, columns=4099, ids=5, first=1000, bias=True, logit_scale=0.6, softcap=5.0, temperature=True,
        entropy=True, sum_sq=True,
    ),
}  # fmt: skip


def check_statistics(before: list[Any], after: list[Any]) -> None:
    """z' by the error rule, then by the same rule the state against that of the z' left in memory.

    What is left in memory is what the gradient will see: where it was rounded to 16 bits, so must the sums be.
    """
    exact, torchs = list(map(doubled, before)), list(map(cloned, before))
    tiles.statistics(*exact)
    tiles.statistics(*torchs)
    check_error(after[0], exact[0], torchs[0], TOLERANCE)
    _, ids, first, *_, state = before
    exact_state, torchs_state = doubled(state), cloned(state)
    tiles.statistics(after[0].double(), ids, first, None, 1.0, 0.0, None, exact_state)
    tiles.statistics(after[0].float(), ids, first, None, 1.0, 0.0, None, torchs_state)
    assert [x is None for x in after[-1]] == [x is None for x in state]
    for ours, truth, theirs in zip(after[-1], exact_state, torchs_state, strict=True):
        if ours is not None:
            check_error(ours, truth, theirs, TOLERANCE)


@in_triton
@every_dtype
@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(dtype: torch.dtype, case: str) -> None:
    before = statistics_inputs(**STATISTICS[case], dtype=dtype)
    after = list(map(cloned, before))
    with uninitialized_is_nan():
        _triton.statistics(*after)
    check_statistics(before, after)


def measures(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, entropy, sum of p^2) of each row."""
    assert state.weighted is not None and state.squared is not None
    log_total = state.total.log()
    return state.maximum + log_total, log_total - state.weighted / state.total, state.squared / state.total.square()


def definitions(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, entropy, sum of p^2) of each row, from all its logits at once."""
    p = z.softmax(1)
    return z.logsumexp(1), torch.special.entr(p).sum(1), p.square().sum(1)


@in_triton
@pytest.mark.parametrize("cuts", ((0, 300), (0, 1, 300), (0, 7, 128, 129, 299, 300)), ids=str)
def test_tiles_in_sequence_are_one_softmax(cuts: tuple[int, ...]) -> None:
    logits = 4 * torch.randn(5, 300, device=DEVICE)
    ids = torch.tensor([[0, 299, 128, 128, 7]], device=DEVICE).repeat(5, 1)
    state = new_state(5, 5, entropy=True, sum_sq=True, like=logits)
    for start, stop in itertools.pairwise(cuts):
        _triton.statistics(logits[:, start:stop], ids, start, None, 1.0, 0.0, None, state)
    for ours, truth, theirs in zip(measures(state), *map(definitions, (logits.double(), logits)), strict=True):
        check_error(ours, truth, theirs, TOLERANCE)
    assert torch.equal(state.picked, logits.gather(1, ids))


@in_triton
@every_dtype
def test_logits_without_a_transform_are_left_alone(dtype: torch.dtype) -> None:
    arguments = statistics_inputs(3, 100, 2, dtype=dtype)
    before = arguments[0].clone()
    _triton.statistics(*arguments)
    assert bitwise_equal(arguments[0], before)


@in_triton
@every_dtype
def test_minus_infinity_and_the_lowest_finite_logit(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 37, device=DEVICE).to(dtype)
    logits[0] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, ::2] = torch.finfo(dtype).min
    logits[3] = torch.finfo(dtype).min
    ids = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    state = new_state(4, 1, entropy=True, sum_sq=True, like=logits)
    _triton.statistics(logits, ids, 0, None, 1.0, 0.0, None, state)
    z = logits.double()
    maximum = z.amax(1)
    e = (z - maximum[:, None]).nan_to_num(-torch.inf).exp()
    e[0] = 0.0
    assert torch.equal(state.maximum.double(), maximum)
    assert torch.equal(state.picked.double(), z[:, :1])
    assert relative_error(state.total, e.sum(1)).max < 1e-6
    assert relative_error(state.weighted, torch.special.entr(e).neg().sum(1)).max < 1e-6  # type: ignore[arg-type]
    assert relative_error(state.squared, e.square().sum(1)).max < 1e-6  # type: ignore[arg-type]
    _triton.statistics(torch.ones_like(logits), ids, 99, None, 1.0, 0.0, None, state)
    assert state.maximum.tolist() == [1.0, max(1.0, float(z[1, 0])), max(1.0, float(z[2].max())), 1.0]
    assert float(state.total[0]) == float(state.total[3]) == 37.0


@in_triton
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    arguments = statistics_inputs(5, 130, 2, entropy=True, sum_sq=True, dtype=torch.float32)
    clean = list(map(cloned, arguments))
    _triton.statistics(*clean)
    arguments[0][2, 129] = value
    _triton.statistics(*arguments)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert all(bitwise_equal(x[others], y[others]) for x, y in zip(arguments[-1], clean[-1], strict=True))
    assert not arguments[-1].total[2].log().add(arguments[-1].maximum[2]).isfinite()


# -- gradient ---------------------------------------------------------------------------------------------------------
GRADIENT: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "odd": dict(rows=3, columns=131),
    "no_ids": dict(rows=2, columns=33, ids=0),
    "two_blocks": dict(rows=3, columns=4099, first=70001),
    "repeated_and_foreign_ids": dict(rows=3, columns=300, ids=9, first=40),
    "many_ids": dict(rows=2, columns=4100, ids=67, first=5),
    "slope": dict(rows=3, columns=61, slope=True),
    "square": dict(rows=3, columns=61, square=True),
    "logit_scale": dict(rows=3, columns=61, logit_scale=-0.7),
    "softcap": dict(rows=3, columns=61, softcap=15.0),
    "temperature": dict(rows=3, columns=61, temperature=True),
    "softcap_and_temperature": dict(rows=3, columns=61, softcap=15.0, temperature=True),
    "some_rows": dict(rows=6, columns=61, some=[4, 0, 5], ids=2, slope=True),
    "everything": dict(
        rows=6, columns=4105, ids=5, first=1000, some=[5, 1], slope=True, square=True, logit_scale=0.6, softcap=20.0,
        temperature=True,
    ),
}  # fmt: skip


@in_triton
@every_dtype
@pytest.mark.parametrize("case", GRADIENT)
def test_gradient(dtype: torch.dtype, case: str) -> None:
    arguments = gradient_inputs(**GRADIENT[case], dtype=dtype)
    exact, torchs = list(map(doubled, arguments)), list(map(cloned, arguments))
    tiles.gradient(*exact)
    tiles.gradient(*torchs)
    _triton.gradient(*arguments)
    check_error(arguments[-1], exact[-1], torchs[-1], TOLERANCE)


@in_triton
@pytest.mark.parametrize("out", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradient_is_rounded_once(out: torch.dtype) -> None:
    """In another dtype it is the fp32 gradient rounded to nearest even, bit by bit."""
    arguments = gradient_inputs(**GRADIENT["everything"], dtype=torch.float32)
    _triton.gradient(*arguments)
    rounded = torch.full_like(arguments[-1], torch.nan, dtype=out)
    _triton.gradient(*arguments[:-1], rounded)
    assert bitwise_equal(rounded, arguments[-1].to(out))


@in_triton
@every_dtype
@pytest.mark.parametrize("case", ("two_blocks", "repeated_and_foreign_ids", "softcap_and_temperature"))
def test_gradient_in_place(dtype: torch.dtype, case: str) -> None:
    arguments = gradient_inputs(**GRADIENT[case], dtype=dtype)
    _triton.gradient(*arguments)
    logits = arguments[0]
    _triton.gradient(*arguments[:-1], logits)
    assert bitwise_equal(logits, arguments[-1])


@in_triton
def test_gradient_of_a_probability_of_zero_is_the_complement() -> None:
    arguments = gradient_inputs(2, 50, ids=2, slope=True, square=True, dtype=torch.float32)
    logits, ids, complement, out = arguments[0], arguments[2], arguments[10], arguments[-1]
    logits[:, 10:20] = -torch.inf
    logits[:, 20:30] = torch.finfo(torch.float32).min
    ids.copy_(torch.tensor([[10, 3], [40, 25]]))
    _triton.gradient(*arguments)
    expected = torch.zeros(2, 20, device=DEVICE)
    expected[0, 0], expected[1, 15] = complement[0, 0], complement[1, 1]
    assert torch.equal(out[:, 10:30], expected)
    assert out.isfinite().all()


@in_triton
def test_statistics_and_gradient_are_autograd() -> None:
    """Of sum_k a_k log p(id_k) + b H + c sum p^2 of every row, through bias, scale, softcap and temperature."""
    raw, bias = 3 * torch.randn(4, 301, device=DEVICE), torch.randn(301, device=DEVICE)
    scale, softcap, inverse_temperature = 0.8, 6.0, torch.rand(4, device=DEVICE) + 0.5
    ids = torch.tensor([[0, 300, 150], [7, 7, 7], [149, 1, 150], [3, 299, 3]], device=DEVICE)
    a, b, c = torch.randn(4, 3, device=DEVICE), torch.randn(4, device=DEVICE), torch.randn(4, device=DEVICE)

    def by_autograd(*tensors: Tensor) -> Tensor:
        raw, bias, inverse_temperature, a, b, c = tensors
        leaf = raw.clone().requires_grad_()
        z = softcap * torch.tanh(scale * (leaf + bias) / softcap) * inverse_temperature[:, None]
        _, entropy, sum_sq = definitions(z)
        ((a * z.log_softmax(1).gather(1, ids)).sum(1) + b * entropy + c * sum_sq).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    tensors = (raw, bias, inverse_temperature, a, b, c)
    exact, torchs = by_autograd(*map(doubled, tensors)), by_autograd(*tensors)
    state, transform = new_state(4, 3, entropy=True, sum_sq=True, like=raw), (scale, softcap, inverse_temperature)
    for start, stop in ((0, 150), (150, 301)):
        _triton.statistics(raw[:, start:stop], ids, start, bias[start:stop].contiguous(), *transform, state)
    _, entropy, sum_sq = measures(state)
    lse = two_parts(state.maximum.double() + state.total.double().log())
    complement = -a * torch.expm1(state.picked.double() - sum(lse)[:, None]).float()  # type: ignore[index]
    base = -a.sum(1) - b * entropy - 2 * c * sum_sq
    for start, stop in ((0, 150), (150, 301)):
        tile = raw[:, start:stop]
        _triton.gradient(tile, None, ids, start, *lse, base, -b, 2 * c, a, complement, *transform, tile)
    check_error(raw, exact, torchs, TOLERANCE)


@in_triton
@pytest.mark.parametrize("log_p", (-1e-4, -1e-5, -1e-6, -1e-7))
@pytest.mark.parametrize("ids_per_row", (1, 3))
def test_gradient_of_an_id_that_is_all_but_certain(log_p: float, ids_per_row: int) -> None:
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
    _triton.gradient(*arguments[:4], *lse, -picked[:, 0], None, None, picked, complement, *arguments[11:])
    tiles.chain(exact, top, 1.0, 100.0, inverse.double(), exact)
    assert (out.gather(1, column) / exact - 1).abs().max() < 1e-6


@in_triton
@every_dtype
@pytest.mark.parametrize("ids_per_row", (1, 2, 40))
def test_gradient_is_the_complement_where_base_is_minus_what_is_picked(dtype: torch.dtype, ids_per_row: int) -> None:
    """Bit by bit, whatever p: nothing of p * base is left, also where one id comes many times."""
    arguments = gradient_inputs(5, 131, ids_per_row, dtype=dtype, out=torch.float32)
    ids, out = arguments[2], arguments[-1]
    ids.copy_(torch.randint(0, 131, (5, 1), device=DEVICE).expand(5, ids_per_row))
    picked = torch.randint(-8, 9, (5, ids_per_row), device=DEVICE).float()  # so that their sum is exact
    complement = torch.zeros_like(picked)
    complement[:, -1] = torch.randn(5, device=DEVICE)
    _triton.gradient(*arguments[:6], -picked.sum(1), None, None, picked, complement, *arguments[11:])
    assert bitwise_equal(out.gather(1, ids[:, :1])[:, 0], complement[:, -1])


# -- rows, memory, edges ----------------------------------------------------------------------------------------------
def outputs_of_rows(rows: Tensor, arguments: dict[str, list[Any]]) -> list[Tensor]:
    """Everything the four functions write, for these rows of the arguments alone."""

    def select(value: Any) -> Any:
        if isinstance(value, State):
            return State(*map(select, value))
        of_rows = isinstance(value, Tensor) and value.shape[0] == 9
        return value[rows].contiguous() if of_rows else value

    written: list[Tensor] = []
    for name, full in arguments.items():
        part = list(map(select, full))
        getattr(_triton, name)(*part)
        written += {"statistics": [part[0], *part[-1]], "divergence": part[-2:]}.get(name, part[-1:])
    return written


@in_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("columns", (70, 4101))
@pytest.mark.parametrize("rows", ([3], [8, 0, 3, 1]), ids=str)
def test_a_row_depends_on_no_other(dtype: torch.dtype, columns: int, rows: list[int]) -> None:
    everything = dict(logit_scale=0.6, softcap=20.0, temperature=True)
    arguments = {
        "statistics": statistics_inputs(
            9, columns, 3, 64, bias=True, entropy=True, sum_sq=True, dtype=dtype, **everything
        ),
        "gradient": gradient_inputs(9, columns, 3, 64, slope=True, square=True, dtype=dtype, **everything),
        "divergence": divergence_inputs(9, columns, "js", 0.3, dtype),
        "divergence_gradient": divergence_gradient_inputs(9, columns, "js", 0.3, dtype, **everything),
    }
    wanted = torch.tensor(rows, device=DEVICE)
    together = outputs_of_rows(torch.arange(9, device=DEVICE), arguments)
    alone = outputs_of_rows(wanted, arguments)
    assert len(together) == len(alone) == 10
    assert all(bitwise_equal(x[wanted], y) for x, y in zip(together, alone, strict=True))


def within_nan(x: Tensor) -> Tensor:
    """x (R, C) as columns 5 .. C + 4 of a wider tile of nan."""
    wide = torch.full((x.shape[0], x.shape[1] + 17), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 5 : 5 + x.shape[1]] = x
    return wide[:, 5 : 5 + x.shape[1]]


def outside_is_nan(x: Tensor) -> bool:
    base = x._base
    assert base is not None
    return bool(base[:, :5].isnan().all() and base[:, 5 + x.shape[1] :].isnan().all())


@in_triton
@every_dtype
@pytest.mark.parametrize("columns", (131, 4096))
def test_statistics_of_columns_of_a_wider_tile(dtype: torch.dtype, columns: int) -> None:
    arguments = statistics_inputs(
        3, columns, 3, 7, bias=True, softcap=9.0, temperature=True, entropy=True, sum_sq=True, dtype=dtype
    )
    before = list(map(cloned, arguments))
    arguments[0] = within_nan(arguments[0])
    arguments[3], arguments[6] = surrounded_by_nan(arguments[3]), surrounded_by_nan(arguments[6])
    _triton.statistics(*arguments)
    check_statistics(before, arguments)
    assert outside_is_nan(arguments[0])


@in_triton
@every_dtype
@pytest.mark.parametrize("columns", (131, 4096))
def test_gradient_of_columns_of_a_wider_tile(dtype: torch.dtype, columns: int) -> None:
    arguments = gradient_inputs(4, columns, 9, 7, some=[3, 1], softcap=20.0, temperature=True, dtype=dtype)
    _triton.gradient(*arguments)
    wide = within_nan(torch.full_like(arguments[-1], torch.nan))
    for i in (4, 5, 6, 9, 10):
        arguments[i] = surrounded_by_nan(arguments[i])
    _triton.gradient(within_nan(arguments[0]), *arguments[1:-1], wide)
    assert bitwise_equal(wide.contiguous(), arguments[-1])
    assert outside_is_nan(wide)


@in_triton
@every_kind
def test_divergences_of_columns_of_a_wider_tile(kind: str, beta: float) -> None:
    sums = divergence_inputs(3, 131, kind, beta, torch.float32)
    exact, torchs = list(map(doubled, sums)), list(map(cloned, sums))
    tiles.divergence(*exact)
    tiles.divergence(*torchs)
    _triton.divergence(within_nan(sums[0]), within_nan(sums[1]), *map(surrounded_by_nan, sums[2:6]), *sums[6:])
    check_error(torch.stack(sums[-2:]), torch.stack(exact[-2:]), torch.stack(torchs[-2:]), TOLERANCE)
    arguments = divergence_gradient_inputs(4, 131, kind, beta, torch.float32, some=[3, 1])
    _triton.divergence_gradient(*arguments)
    wide = within_nan(torch.full_like(arguments[-1], torch.nan))
    _triton.divergence_gradient(within_nan(arguments[0]), within_nan(arguments[1]), *arguments[2:-1], wide)
    assert bitwise_equal(wide.contiguous(), arguments[-1])
    assert outside_is_nan(wide)


@in_triton
@pytest.mark.parametrize(("rows", "columns"), ((0, 5), (3, 0), (0, 0)))
def test_nothing(rows: int, columns: int) -> None:
    logits, table = torch.zeros(rows, columns, device=DEVICE), torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
    state = new_state(rows, 1, entropy=True, sum_sq=True, like=logits)
    before = cloned(state)
    _triton.statistics(logits, table, 0, None, 0.5, 2.0, None, state)
    assert all(bitwise_equal(x, y) for x, y in zip(state, before, strict=True))
    lse, out = torch.zeros(rows, device=DEVICE), torch.empty(rows, columns, device=DEVICE)
    _triton.gradient(logits, None, table, 0, *[lse] * 5, state.picked, state.picked, 0.5, 2.0, None, out)
    value, center = torch.ones(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    _triton.divergence(logits, logits, *[lse] * 4, "js", 0.5, value, center)
    assert value.tolist() == center.tolist() == [1.0] * rows
    _triton.divergence_gradient(logits, logits, None, *[lse] * 4, "js", 0.5, center, value, 1.0, 0.0, None, out)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    some = torch.zeros(2, 9, device=DEVICE), none, none.view(0, 1), 0, *[lse[:0]] * 5, *[state.picked[:0]] * 2
    _triton.gradient(*some, 1.0, 0.0, None, torch.empty(0, 9, device=DEVICE))


@in_triton
@pytest.mark.parametrize("dtype", (torch.float64, torch.int32), ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    reason = _triton.unsupported("linear_logprobs", torch.zeros(2, 3, dtype=dtype, device=DEVICE), None)
    assert reason == f"computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"


@in_triton
@every_dtype
def test_floats_are_supported(dtype: torch.dtype) -> None:
    assert _triton.unsupported("linear_logprobs", torch.zeros(2, 3, dtype=dtype, device=DEVICE), None) == ""


@pytest.mark.gpu
@needs_gpu
def test_more_than_two_to_the_31_elements() -> None:
    """The last rows of a tile of 2^31 + 3 * 151936 bf16 logits are the same as alone."""
    columns = 151936
    rows = 2**31 // columns + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * columns * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    logits[:-4] = 0.5
    logits[-4:] = 3 * torch.randn(4, columns, device=DEVICE)
    ids = torch.randint(0, columns, (rows, 1), device=DEVICE)
    tail = logits[-4:].clone()
    state, state_tail = (new_state(len(x), 1, entropy=True, sum_sq=True, like=x) for x in (logits, tail))
    for tile, table, accumulated in ((logits, ids, state), (tail, ids[-4:], state_tail)):
        _triton.statistics(tile, table, 0, None, 0.7, 0.0, None, accumulated)
        lse = two_parts(accumulated.maximum.double() + accumulated.total.double().log())
        picked = torch.ones(len(tile), 1, device=DEVICE)
        last = picked, 0.5 * picked, 0.7, 0.0, None, tile
        _triton.gradient(tile, None, table, 0, *lse, -picked[:, 0], None, None, *last)
    assert all(bitwise_equal(x[-4:], y) for x, y in zip(state, state_tail, strict=True))
    assert bitwise_equal(logits[-4:], tail)
    value, center = torch.zeros(2, rows, device=DEVICE)
    lse, low = torch.full((rows,), 12.0, device=DEVICE), torch.full((rows,), 1e-7, device=DEVICE)
    _triton.divergence(logits, logits, lse, low, lse + 1, low, "forward", 0.0, value, center)
    expected = torch.zeros(4, device=DEVICE)
    lses = lse[-4:], low[-4:], lse[-4:] + 1, low[-4:]
    _triton.divergence(tail, tail, *lses, "forward", 0.0, expected, center[-4:])
    assert bitwise_equal(value[-4:], expected)
    weight = torch.ones(rows, device=DEVICE)
    sums = (lse, low, lse + 1, low, "forward", 0.0, center, weight, 1.0, 0.0, None)
    _triton.divergence_gradient(logits, logits, None, *sums, logits)
    last = [x[-4:] if isinstance(x, Tensor) else x for x in sums]
    _triton.divergence_gradient(tail, tail, None, *last, tail)
    assert bitwise_equal(logits[-4:], tail)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_whole_vocabulary_on_a_gpu(dtype: torch.dtype) -> None:
    """A real tile, twice with the same bits."""
    before = statistics_inputs(300, 151936, 3, softcap=20.0, temperature=True, entropy=True, sum_sq=True, dtype=dtype)
    after, again = list(map(cloned, before)), list(map(cloned, before))
    _triton.statistics(*after)
    check_statistics(before, after)
    _triton.statistics(*again)
    assert bitwise_equal(again[0], after[0])
    assert all(bitwise_equal(x, y) for x, y in zip(again[-1], after[-1], strict=True))
