"""Arguments for the GPU tile kernels of policy_loss (Triton, CUDA), on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.policy_loss import tiles
from m3kernels.policy_loss.tiles import State, new_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**40  # an id of no vocabulary
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
every_kind = pytest.mark.parametrize(("kind", "beta"), (("forward", 0.0), ("reverse", 0.0), ("js", 0.3)))


def in_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Marks the test as a GPU test where there is a GPU; elsewhere the interpreter runs it."""
    return pytest.mark.gpu(test) if DEVICE == "cuda" else test


def doubled(value: Any) -> Any:
    """fp64 in place of every floating tensor, a copy in place of every other one."""
    if isinstance(value, State):
        return State(*map(doubled, value))
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.clone()


def cloned(value: Any) -> Any:
    if isinstance(value, State):
        return State(*map(cloned, value))
    return value.clone() if isinstance(value, Tensor) else value


def two_parts(exact: Tensor) -> tuple[Tensor, Tensor]:
    """An fp64 value as two of fp32: rounded, and what rounding took."""
    high = exact.float()
    return high, (exact - high).float()


def random_ids(rows: int, ids: int, first: int, columns: int) -> Tensor:
    """(rows, ids): the first column, the last, one before and one after the tile, repeats, and ids of nothing."""
    table = torch.randint(first - 2, first + columns + 2, (rows, ids), device=DEVICE)
    edges = [first, first + columns - 1, first - 1, first + columns, -1, FAR, -(2**63), first]
    table[:, : len(edges)] = torch.tensor(edges, device=DEVICE)[:ids]
    if ids == 1:
        table[:, 0] = torch.randint(first, first + columns, (rows,), device=DEVICE)
    return table


def statistics_inputs(
    rows: int,
    columns: int,
    ids: int = 1,
    first: int = 0,
    *,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: bool = False,
    entropy: bool = False,
    sum_sq: bool = False,
    dtype: torch.dtype,
) -> list[Any]:
    """Arguments of ``statistics``, with a state that has seen 50 other columns."""
    logits = (4 * torch.randn(rows, columns, device=DEVICE)).to(dtype)
    state = new_state(rows, ids, entropy=entropy, sum_sq=sum_sq, like=logits)
    table = random_ids(rows, ids, first, columns)
    before = 4 * torch.randn(rows, 50, device=DEVICE)
    tiles.statistics(before, table, first + columns, None, 1.0, 0.0, None, state)
    return [
        logits,
        table,
        first,
        torch.randn(columns, device=DEVICE) if bias else None,
        logit_scale,
        softcap,
        torch.rand(rows, device=DEVICE) + 0.5 if temperature else None,
        state,
    ]


def gradient_inputs(
    rows: int,
    columns: int,
    ids: int = 1,
    first: int = 0,
    *,
    some: list[int] | None = None,
    slope: bool = False,
    square: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: bool = False,
    dtype: torch.dtype,
    out: torch.dtype | None = None,
) -> list[Any]:
    """Arguments of ``gradient``, with out full of nan."""
    n = rows if some is None else len(some)
    inverse_temperature = torch.rand(n, device=DEVICE) + 0.5 if temperature else None
    logits = 3 * torch.randn(rows, columns, device=DEVICE)
    if softcap:
        logits = 0.5 * softcap * (logits / softcap).tanh()  # u stays within the cap whatever the temperature
    logits = logits.to(dtype)
    selected = logits if some is None else logits[some]
    return [
        logits,
        None if some is None else torch.tensor(some, device=DEVICE),
        random_ids(n, ids, first, columns),
        first,
        *two_parts(selected.double().logsumexp(1) + 0.5 * torch.rand(n, device=DEVICE)),
        torch.randn(n, device=DEVICE),
        torch.randn(n, device=DEVICE) if slope else None,
        torch.randn(n, device=DEVICE) if square else None,
        torch.randn(n, ids, device=DEVICE),
        torch.randn(n, ids, device=DEVICE),
        logit_scale,
        softcap,
        inverse_temperature,
        torch.full((n, columns), torch.nan, dtype=out or dtype, device=DEVICE),
    ]


def two_models(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(student, teacher, student's lse and its low part, teacher's): a tile of longer rows, so p adds up to under 1."""
    student, teacher = ((3 * torch.randn(rows, columns, device=DEVICE)).to(dtype) for _ in range(2))
    lses = (z.double().logsumexp(1) + 0.5 * torch.rand(rows, device=DEVICE) for z in (student, teacher))
    return student, teacher, *(part for lse in lses for part in two_parts(lse))


def divergence_inputs(rows: int, columns: int, kind: str, beta: float, dtype: torch.dtype) -> list[Any]:
    """Arguments of ``divergence``, with sums that have seen other tiles."""
    value, center = torch.rand(2, rows, device=DEVICE)
    return [*two_models(rows, columns, dtype), kind, beta, value, center]


def divergence_gradient_inputs(
    rows: int,
    columns: int,
    kind: str,
    beta: float,
    dtype: torch.dtype,
    *,
    some: list[int] | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: bool = False,
) -> list[Any]:
    student, teacher, *lses = two_models(rows, columns, dtype)
    selected = torch.arange(rows, device=DEVICE) if some is None else torch.tensor(some, device=DEVICE)
    n = len(selected)
    inverse_temperature = torch.rand(n, device=DEVICE) + 0.5 if temperature else None
    return [
        student,
        teacher,
        None if some is None else selected,
        *(part[selected] for part in lses),
        kind,
        beta,
        torch.rand(n, device=DEVICE),
        torch.randn(n, device=DEVICE),
        logit_scale,
        softcap,
        inverse_temperature,
        torch.full((n, columns), torch.nan, dtype=dtype, device=DEVICE),
    ]
