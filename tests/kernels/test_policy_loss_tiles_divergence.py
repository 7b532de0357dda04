"""The divergences of the native CPU tile kernels of policy_loss, on every instruction set that runs here.

Held against plain torch in fp64; rows that do not see each other, threads that do not matter, models that agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from native_tiles import BUILT, converted, margins, padded, set_threads, two_parts, use
from torch import Tensor

from m3kernels.policy_loss import _cpu, tiles
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, relative_error

KINDS = (("forward", 0.5), ("reverse", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.9))
every_kind = pytest.mark.parametrize(("kind", "beta"), KINDS)


@pytest.fixture(params=BUILT)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    yield from use(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield from set_threads()


DIVERGENCE: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, widths=(1,)),
    "no_rows": dict(rows=0, widths=(5,)),
    "no_columns": dict(rows=3, widths=(0,)),
    "under_a_vector": dict(rows=5, widths=(3,)),
    "vector_and_one": dict(rows=5, widths=(17, 31), pad=3),
    "blocks": dict(rows=3, widths=(2083, 5)),
    "many_tiles": dict(rows=3, widths=(129,) * 20),
    "holes": dict(rows=4, widths=(131, 40), holes=True),
    "huge": dict(rows=4, widths=(131, 40), magnitude=1e4),
    "close": dict(rows=4, widths=(500,), distance=1e-2),
    "equal": dict(rows=4, widths=(500,), distance=0.0),
    "softcap": dict(rows=4, widths=(131,), softcap=20.0),
    "everything": dict(rows=9, widths=(131, 40), pad=3, softcap=20.0, temperature=True, logit_scale=0.5, some=(8, 1)),
}


def make_divergence(
    rows: int,
    widths: tuple[int, ...],
    *,
    pad: int = 0,
    magnitude: float = 2.0,
    distance: float = 1.0,
    holes: bool = False,
    softcap: float = 0.0,
    temperature: bool = False,
    logit_scale: float = 1.0,
    some: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    vocabulary = sum(widths)
    student = torch.randn(rows, vocabulary) * magnitude
    teacher = student + torch.randn(rows, vocabulary) * magnitude * distance
    inverse = torch.rand(rows) + 0.5 if temperature else None
    if softcap:
        student = softcap * torch.tanh(student / softcap) * (1.0 if inverse is None else inverse[:, None])
    if holes:  # the teacher's where the student has one: every kind stays finite
        hole = torch.rand_like(student) < 0.3
        student[hole] = teacher[hole] = -torch.inf
    lses = (z.double().logsumexp(1) if vocabulary else torch.zeros(rows) for z in (student, teacher))
    (student_lse, student_low), (teacher_lse, teacher_low) = map(two_parts, lses)
    return dict(
        student=student,
        teacher=teacher,
        widths=widths,
        pad=pad,
        rows=None if some is None else torch.tensor(some, dtype=torch.int64),
        student_lse=student_lse,
        student_low=student_low,
        teacher_lse=teacher_lse,
        teacher_low=teacher_low,
        weight=torch.randn(rows),
        center=torch.randn(rows),
        logit_scale=logit_scale,
        softcap=softcap,
        inverse_temperature=inverse,
    )


LSES = ("student_lse", "student_low", "teacher_lse", "teacher_low")


def run_divergence(
    room: ModuleType, dtype: torch.dtype, kind: str, beta: float, **case: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, center, gradient) of all tiles."""
    case = {name: converted(value, dtype) for name, value in case.items()}
    value, center = case["student"].new_zeros(2, case["student"].shape[0])
    gradients, first = [], 0
    which = slice(None) if case["rows"] is None else case["rows"]
    for width in case["widths"]:
        student, teacher = (padded(case[z][:, first : first + width], case["pad"]) for z in ("student", "teacher"))
        room.divergence(student, teacher, *(case[name] for name in LSES), kind, beta, value, center)
        out = padded(torch.full_like(student[which], torch.nan), case["pad"] + 2)
        per_row = (*LSES, "center", "weight", "inverse_temperature")
        given = {name: None if case[name] is None else case[name][which].contiguous() for name in per_row}
        room.divergence_gradient(
            student, teacher, case["rows"], *(given[name] for name in LSES), kind, beta, given["center"],
            given["weight"], case["logit_scale"], case["softcap"], given["inverse_temperature"], out,
        )  # fmt: skip
        assert margins(out).isnan().all(), "written beside the tile"
        gradients.append(out.clone())
        first += width
    return value, center, torch.cat(gradients, 1)


@every_kind
@pytest.mark.parametrize("case", DIVERGENCE)
def test_divergence_is_within_tolerance(isa: str, kind: str, beta: float, case: str) -> None:
    made = make_divergence(**DIVERGENCE[case])
    ours, exact, torch32 = (
        run_divergence(room, dtype, kind, beta, **made)
        for room, dtype in ((_cpu, torch.float32), (tiles, torch.float64), (tiles, torch.float32))
    )
    for found, wanted, theirs in zip(ours, exact, torch32, strict=True):
        check_error(found, wanted, theirs, TOLERANCE)


@every_kind
def test_divergence_gradient_of_models_that_all_but_agree(isa: str, kind: str, beta: float) -> None:
    """Probabilities 1e-6 apart, logits 512 apart: what rounding takes from log sum exp is more than the difference."""
    made = make_divergence(4, (2000,))
    base = (made["student"] * 2**14).round() / 2**14  # so that 512 more is exact
    made.update(student=base + 512, teacher=base + torch.randint(-1, 2, base.shape) * 2.0**-20, center=torch.zeros(4))
    student, teacher = (made[z].double().logsumexp(1) for z in ("student", "teacher"))
    parts, nothing = (*two_parts(student), *two_parts(teacher)), torch.zeros(4)
    truth = dict(zip(LSES, (student, nothing, teacher, nothing), strict=True))
    exact = run_divergence(tiles, torch.float64, kind, beta, **{**made, **truth})[2]
    made.update(zip(LSES, parts, strict=True))
    found = run_divergence(_cpu, torch.float32, kind, beta, **made)[2]
    made.update(student_low=nothing, teacher_low=nothing)
    without = run_divergence(_cpu, torch.float32, kind, beta, **made)[2]
    assert relative_error(found, exact).rms < 0.1 * relative_error(without, exact).rms


@every_kind
def test_divergence_of_a_row_does_not_see_the_others(isa: str, kind: str, beta: float) -> None:
    made = make_divergence(5, (77, 300))
    together = run_divergence(_cpu, torch.float32, kind, beta, **made)
    alone = []
    for i in range(5):
        one = {name: v[i : i + 1] if isinstance(v, Tensor) else v for name, v in made.items()}
        alone.append(run_divergence(_cpu, torch.float32, kind, beta, **one))
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert bitwise_equal(found, torch.cat(parts))


@every_kind
@pytest.mark.parametrize("count", (2, 3))
def test_divergence_does_not_depend_on_threads(
    isa: str, threads: Callable[[int], None], kind: str, beta: float, count: int
) -> None:
    made = make_divergence(61, (1500,))
    threads(1)
    one = run_divergence(_cpu, torch.float32, kind, beta, **made)
    threads(count)
    for found, wanted in zip(run_divergence(_cpu, torch.float32, kind, beta, **made), one, strict=True):
        assert bitwise_equal(found, wanted)


@every_kind
def test_divergence_gradient_in_place_is_the_same(isa: str, kind: str, beta: float) -> None:
    made = make_divergence(3, (77,), softcap=20.0)
    apart = run_divergence(_cpu, torch.float32, kind, beta, **made)[2]
    student = made["student"].clone()
    center = run_divergence(_cpu, torch.float32, kind, beta, **made)[1] * 0 + made["center"]
    _cpu.divergence_gradient(
        student, made["teacher"], None, *(made[name] for name in LSES), kind, beta, center, made["weight"], 1.0, 20.0,
        None, student,
    )  # fmt: skip
    assert bitwise_equal(student, apart)


def test_divergence_where_the_student_has_no_mass(isa: str) -> None:
    """-inf of the student beside a finite teacher: forward is inf, reverse and js are what fp64 says."""
    made = make_divergence(2, (40,))
    made["student"][:, 3] = -torch.inf
    made["student_lse"], made["student_low"] = two_parts(made["student"].double().logsumexp(1))
    assert run_divergence(_cpu, torch.float32, "forward", 0.5, **made)[0].tolist() == [torch.inf, torch.inf]
    for_js = run_divergence(_cpu, torch.float32, "js", 0.3, **made)
    exact = run_divergence(tiles, torch.float64, "js", 0.3, **made)
    assert relative_error(for_js[0], exact[0]).max < 1e-6
    assert relative_error(for_js[2], exact[2]).max < 1e-6
