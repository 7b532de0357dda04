"""Triton room of policy_loss: tile kernels around cuBLAS products, for NVIDIA and AMD GPUs; interpreted on CPU tensors.

The four functions have the contract of m3kernels/policy_loss/tiles.py and its formulas. Each is one pass over a tile at
the speed of memory: ``statistics`` and ``divergence`` read it once and keep sums in registers, ``gradient`` and
``divergence_gradient`` read it once and write once, in place if asked. Logits may be float32, bfloat16 or float16; all
arithmetic is fp32, and a result is rounded once. Where ``statistics`` transforms 16-bit logits it sums the rounded
values, those that the gradient will see, so that the probabilities of a row add up to one.

    js, with d = log t - log p,  a = d + log(beta / (1 - beta)),  softplus(a) = log(1 + exp(a)):
    log p - log m = -log(1 - beta) - softplus(a),   log t - log m = -log(beta) - softplus(-a)

Row-invariance. A row is computed by the same operations in the same order whatever its neighbours: the cut of a row
into spans depends on the number of columns alone, spans are added in order, contraction is off, nothing is atomic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.policy_loss.passes import ops
from m3kernels.policy_loss.schedule import Tiles
from m3kernels.policy_loss.tiles import State
from m3kernels.triton_compile import CompileCase

INTERPRET: bool = triton.knobs.runtime.interpret  # read once: @triton.jit below decides by it

BLOCK = 4096  # columns per step: 16 KiB of fp32 in flight; three to eight programs on a processor, by registers
SPAN = 32768  # columns per program of a reduction: 132 processors stay busy on the few rows of a long vocabulary
BLOCK_IDS = 32  # ids looked at together where a row has more than one
MERGE_ROWS = 128
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Stands for the maximum of nothing, and for a difference of logits whose exp is 0: finite, so that 0 * x stays 0.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
ZERO_EXP = tl.constexpr(-10000.0)
ROUND_BFLOAT16 = tl.constexpr(INTERPRET)


def unsupported(op: str, hidden: Tensor, *args: Any) -> str:
    if hidden.dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, not {str(hidden.dtype).removeprefix('torch.')}"
    if hidden.device.type == "cpu":
        return "" if INTERPRET else "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
    if hidden.device.type != "cuda":
        return f"no Triton target for {hidden.device.type} tensors"
    if INTERPRET:
        return "TRITON_INTERPRET=1 interprets kernels: CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return ""


# -- arithmetic -------------------------------------------------------------------------------------------------------
@triton.jit
def _round(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even. The interpreter cuts bfloat16 off instead: there the bits are rounded first."""
    if ROUND_BFLOAT16 and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _tanh(x):
    """Within 2 units of the last place: near 0 the polynomial of Cephes' tanhf, elsewhere 1 - 2 / (exp(2 |x|) + 1)."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_p(z, lse, lse_low):
    """Log p of z'. The parts of log sum exp go one after the other: the first difference is all but exact."""
    return (z - lse) - lse_low


@triton.jit
def _term(p, difference):
    """p * difference, 0 where p is."""
    return tl.where(p == 0.0, 0.0, p * difference)


@triton.jit
def _below(z, maximum):
    """z - maximum, no lower than the smallest whose exp matters; a nan stays one."""
    difference = z - maximum
    return tl.where(difference < ZERO_EXP, ZERO_EXP, difference)


@triton.jit
def _join(maximum, total, weighted, squared, maximum_2, total_2, weighted_2, squared_2):
    """Online softmax of two sets of columns together."""
    joint = tl.maximum(maximum, maximum_2)
    shift, shift_2 = _below(maximum, joint), _below(maximum_2, joint)
    factor, factor_2 = tl.exp(shift), tl.exp(shift_2)
    weighted = factor * (weighted + total * shift) + factor_2 * (weighted_2 + total_2 * shift_2)
    squared = factor * factor * squared + factor_2 * factor_2 * squared_2
    return joint, factor * total + factor_2 * total_2, weighted, squared


@triton.jit
def _add_to_state(at, mask, maximum, total, weighted, squared, new_maximum, new_total, new_weighted, new_squared):
    """Join the online softmax ``new_*`` to that of rows ``at`` in memory."""
    old_maximum, old_total = tl.load(maximum + at, mask=mask, other=0.0), tl.load(total + at, mask=mask, other=0.0)
    old_weighted, old_squared = tl.zeros_like(old_total), tl.zeros_like(old_total)
    if weighted is not None:
        old_weighted = tl.load(weighted + at, mask=mask, other=0.0)
    if squared is not None:
        old_squared = tl.load(squared + at, mask=mask, other=0.0)
    new_maximum, new_total, new_weighted, new_squared = _join(
        old_maximum, old_total, old_weighted, old_squared, new_maximum, new_total, new_weighted, new_squared
    )
    tl.store(maximum + at, tl.where(new_total == 0.0, float("-inf"), new_maximum), mask=mask)
    tl.store(total + at, new_total, mask=mask)
    if weighted is not None:
        tl.store(weighted + at, new_weighted, mask=mask)
    if squared is not None:
        tl.store(squared + at, new_squared, mask=mask)


@triton.jit
def _add_at_id(x, column, start, at, value, BLOCK: tl.constexpr):
    """x + value in the column ``at`` (64 bits, may lie outside) of the block that begins at ``start``."""
    inside = (at >= start) & (at < start + BLOCK)
    return tl.where(column == tl.where(inside, at, -1).to(tl.int32), x + value, x)


@triton.jit
def _add_at_ids(x, column, start, ids, values, row, first, ids_per_row, BLOCK: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """x + values[row, k] in the column of each ids[row, k]; BLOCK_IDS of 1 says that a row has one id."""
    if BLOCK_IDS == 1:
        x = _add_at_id(x, column, start, tl.load(ids + row) - first, tl.load(values + row), BLOCK)
    else:
        ids += row * ids_per_row
        values += row * ids_per_row
        for k in range(0, ids_per_row, BLOCK_IDS):
            index = k + tl.arange(0, BLOCK_IDS)
            at = tl.load(ids + index, mask=index < ids_per_row, other=-1) - first
            if tl.sum(((index < ids_per_row) & (at >= start) & (at < start + BLOCK)).to(tl.int32), 0) > 0:
                for j in range(k, tl.minimum(k + BLOCK_IDS, ids_per_row)):
                    x = _add_at_id(x, column, start, tl.load(ids + j) - first, tl.load(values + j), BLOCK)
    return x


@triton.jit
def _store_gradient(g, z, at, mask, row, inverse_temperature, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Store g * dz'/dz at ``at``, from d loss / dz' and z' of one row."""
    cap = softcap
    if inverse_temperature is not None:
        scale = tl.load(inverse_temperature + row)
        cap = softcap * scale
        g = g * scale
    if SOFTCAP:
        ratio = z / cap
        g = g * (1.0 - ratio * ratio)
    tl.store(at, _round(g * logit_scale, at.dtype.scalar.element_ty), mask=mask)


# -- statistics -------------------------------------------------------------------------------------------------------
# Grid: (rows * spans), spans fastest. A program owns SPAN columns of one row, BLOCK at a time: reads logits (and bias)
# once, writes z' over them if there is a transform, and keeps one online softmax per thread and VECTOR neighbours, so
# that the loop has no reduction across threads and VECTOR + 1 exponentials for VECTOR columns. At the end it joins them
# to the state of its row, or where a row has several spans writes them to ``part`` (rows, spans, 4) for
# ``_merge_statistics_kernel``. z' at the ids of its span is gathered from memory: the barrier makes the stores of the
# program's other threads visible.
@triton.jit(do_not_specialize=["first", "ids_per_row", "spans"])
def _statistics_kernel(
    logits,
    ids,
    bias,
    inverse_temperature,
    maximum,
    total,
    picked,
    weighted,
    squared,
    part,
    stride,
    columns,
    first,
    ids_per_row,
    spans,
    logit_scale,
    softcap,
    TRANSFORM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // VECTOR
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    begin = span * SPAN
    end = tl.minimum(begin + SPAN, columns)
    logits += row * stride
    within = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    m = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    w = tl.zeros((LANES,), tl.float32)
    q = tl.zeros((LANES,), tl.float32)
    for start in range(begin, end, BLOCK):
        column = start + within
        mask = column < end
        z = tl.load(logits + column, mask=mask, other=0.0 if TRANSFORM else float("-inf"))  # (LANES, VECTOR)
        z = z.to(tl.float32)
        if TRANSFORM:
            if bias is not None:
                z += tl.load(bias + column, mask=mask, other=0.0)
            z *= logit_scale
            if SOFTCAP:
                z = softcap * _tanh(z / softcap)
            if inverse_temperature is not None:
                z *= tl.load(inverse_temperature + row)
            stored = _round(z, logits.dtype.element_ty)
            tl.store(logits + column, stored, mask=mask)
            z = tl.where(mask, stored.to(tl.float32), float("-inf"))
        joint = tl.maximum(m, tl.max(z, 1))
        shift = _below(m, joint)
        factor = tl.exp(shift)
        z = _below(z, joint[:, None])
        e = tl.exp(z)
        if weighted is not None:
            w = factor * (w + s * shift) + tl.sum(e * z, 1)
        if squared is not None:
            q = factor * factor * q + tl.sum(e * e, 1)
        s = factor * s + tl.sum(e, 1)
        m = joint

    top = tl.max(m, 0)
    shift = _below(m, top)
    factor = tl.exp(shift)
    w = tl.sum(factor * (w + s * shift), 0)
    q = tl.sum(factor * factor * q, 0)
    s = tl.sum(factor * s, 0)
    if part is None:
        _add_to_state(row, True, maximum, total, weighted, squared, top, s, w, q)
    else:
        part += (row * spans + span) * 4
        tl.store(part, top)
        tl.store(part + 1, s)
        tl.store(part + 2, w)
        tl.store(part + 3, q)

    if TRANSFORM:
        tl.debug_barrier()
    for k in range(0, ids_per_row, BLOCK_IDS):
        index = k + tl.arange(0, BLOCK_IDS)
        at = row * ids_per_row + index
        mask = index < ids_per_row
        column = tl.load(ids + at, mask=mask, other=0) - first
        mask &= (column >= begin) & (column < end)
        tl.store(picked + at, tl.load(logits + column, mask=mask, other=0.0).to(tl.float32), mask=mask)


# Grid: (row blocks). A program joins the spans of ROWS rows to their state, in order.
@triton.jit(do_not_specialize=["rows", "spans"])
def _merge_statistics_kernel(part, maximum, total, weighted, squared, rows, spans, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    part += row * spans * 4
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    w = tl.zeros((ROWS,), tl.float32)
    q = tl.zeros((ROWS,), tl.float32)
    for span in range(spans):
        at = part + span * 4
        m, s, w, q = _join(
            m,
            s,
            w,
            q,
            tl.load(at, mask=mask, other=0.0),
            tl.load(at + 1, mask=mask, other=0.0),
            tl.load(at + 2, mask=mask, other=0.0),
            tl.load(at + 3, mask=mask, other=0.0),
        )
    _add_to_state(row, mask, maximum, total, weighted, squared, m, s, w, q)


def statistics(
    logits: Tensor,
    ids: Tensor,
    first: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    state: State,
) -> None:
    (rows, columns), spans = logits.shape, triton.cdiv(logits.shape[1], SPAN)
    if not logits.numel():
        return
    check_layout(logits, packed=(ids, bias, inverse_temperature, *state))
    part = logits.new_empty(rows, spans, 4, dtype=torch.float32) if spans > 1 else None
    transform = bias is not None or logit_scale != 1.0 or softcap > 0 or inverse_temperature is not None
    launch(
        _statistics_kernel,
        rows * spans,
        logits,
        ids,
        bias,
        inverse_temperature,
        *state,
        part,
        logits.stride(0),
        columns,
        first,
        ids.shape[1],
        spans,
        logit_scale,
        softcap,
        TRANSFORM=transform,
        SOFTCAP=softcap > 0,
        BLOCK=BLOCK,
        SPAN=SPAN,
        VECTOR=16 // logits.element_size(),
        BLOCK_IDS=BLOCK_IDS,
    )
    if part is not None:
        launch(
            _merge_statistics_kernel,
            triton.cdiv(rows, MERGE_ROWS),
            part,
            state.maximum,
            state.total,
            state.weighted,
            state.squared,
            rows,
            spans,
            ROWS=MERGE_ROWS,
        )


# -- gradient ---------------------------------------------------------------------------------------------------------
# Grid: (rows * column blocks), blocks fastest. A program owns BLOCK columns of row i of ``out``: reads row ``rows[i]``
# of the logits, writes the gradient, possibly over it. Ids are compared with the columns, for picked and
# again for complement; where a row has many, BLOCK_IDS at a time are first looked at together, and most blocks have
# none.
@triton.jit(do_not_specialize=["first", "ids_per_row"])
def _gradient_kernel(
    logits,
    rows,
    ids,
    lse,
    lse_low,
    base,
    slope,
    square,
    picked,
    complement,
    inverse_temperature,
    out,
    stride,
    out_stride,
    columns,
    first,
    ids_per_row,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    column = start + tl.arange(0, BLOCK)
    mask = column < columns
    source = row
    if rows is not None:
        source = tl.load(rows + row)
    z = tl.load(logits + source * stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(base + row)
    if BLOCK_IDS != 1:
        g = tl.where(z == z, g, z)  # made from z: a loop over ids would else lay the columns out anew
    g = _add_at_ids(g, column, start, ids, picked, row, first, ids_per_row, BLOCK, BLOCK_IDS)
    q = _log_p(z, tl.load(lse + row), tl.load(lse_low + row))
    p = tl.exp(q)
    if slope is not None:
        g = g + tl.load(slope + row) * tl.where(p == 0.0, 0.0, q)
    if square is not None:
        g = g + tl.load(square + row) * p
    g = _add_at_ids(p * g, column, start, ids, complement, row, first, ids_per_row, BLOCK, BLOCK_IDS)
    at = out + row * out_stride + column
    _store_gradient(g, z, at, mask, row, inverse_temperature, logit_scale, softcap, SOFTCAP)


def gradient(
    logits: Tensor,
    rows: Tensor | None,
    ids: Tensor,
    first: int,
    lse: Tensor,
    lse_low: Tensor,
    base: Tensor,
    slope: Tensor | None,
    square: Tensor | None,
    picked: Tensor,
    complement: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    n, columns = out.shape
    if not out.numel():
        return
    check_layout(
        logits, out, packed=(rows, ids, lse, lse_low, base, slope, square, picked, complement, inverse_temperature)
    )
    launch(
        _gradient_kernel,
        n * triton.cdiv(columns, BLOCK),
        logits,
        rows,
        ids,
        lse,
        lse_low,
        base,
        slope,
        square,
        picked,
        complement,
        inverse_temperature,
        out,
        logits.stride(0),
        out.stride(0),
        columns,
        first,
        ids.shape[1],
        logit_scale,
        softcap,
        SOFTCAP=softcap > 0,
        BLOCK=BLOCK,
        BLOCK_IDS=1 if ids.shape[1] == 1 else BLOCK_IDS,
    )


# -- divergences ------------------------------------------------------------------------------------------------------
# Grid: (rows * spans), spans fastest. A program owns SPAN columns of one row of both models, BLOCK at a time, sums kept
# per thread; it adds to ``value`` and ``center``, or where a row has several spans writes to ``part`` (rows, spans, 2)
# for ``_merge_divergence_kernel``.
@triton.jit(do_not_specialize=["spans"])
def _divergence_kernel(
    student,
    teacher,
    student_lse,
    student_low,
    teacher_lse,
    teacher_low,
    value,
    center,
    part,
    student_stride,
    teacher_stride,
    columns,
    spans,
    beta,
    rest,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    VECTOR: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK // VECTOR
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    begin = span * SPAN
    end = tl.minimum(begin + SPAN, columns)
    student += row * student_stride
    teacher += row * teacher_stride
    within = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    total = tl.zeros((LANES,), tl.float32)
    own = tl.zeros((LANES,), tl.float32)
    for start in range(begin, end, BLOCK):
        column = start + within
        mask = column < end
        log_p = tl.load(student + column, mask=mask, other=0.0 if KIND == "forward" else float("-inf"))
        log_t = tl.load(teacher + column, mask=mask, other=0.0 if KIND == "reverse" else float("-inf"))
        log_p = _log_p(log_p.to(tl.float32), tl.load(student_lse + row), tl.load(student_low + row))
        log_t = _log_p(log_t.to(tl.float32), tl.load(teacher_lse + row), tl.load(teacher_low + row))
        if KIND == "forward":
            total += tl.sum(_term(tl.exp(log_t), log_t - log_p), 1)
        elif KIND == "reverse":
            total += tl.sum(_term(tl.exp(log_p), log_p - log_t), 1)
        else:
            a = log_t - log_p + (log_beta - log_rest)
            total += tl.sum(_term(tl.exp(log_t), -log_beta - _softplus(-a)), 1)
            own += tl.sum(_term(tl.exp(log_p), -log_rest - _softplus(a)), 1)

    if KIND == "reverse":
        own = total
    elif KIND == "js":
        own *= rest
        total = beta * total + own
    if part is None:
        tl.store(value + row, tl.load(value + row) + tl.sum(total, 0))
        if KIND != "forward":
            tl.store(center + row, tl.load(center + row) + tl.sum(own, 0))
    else:
        part += (row * spans + span) * 2
        tl.store(part, tl.sum(total, 0))
        tl.store(part + 1, tl.sum(own, 0))


# Grid: (row blocks). A program adds the spans of ROWS rows, in order.
@triton.jit(do_not_specialize=["rows", "spans"])
def _merge_divergence_kernel(part, value, center, rows, spans, KIND: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    part += row * spans * 2
    total = tl.load(value + row, mask=mask, other=0.0)
    own = tl.load(center + row, mask=mask, other=0.0)
    for span in range(spans):
        total += tl.load(part + span * 2, mask=mask, other=0.0)
        own += tl.load(part + span * 2 + 1, mask=mask, other=0.0)
    tl.store(value + row, total, mask=mask)
    if KIND != "forward":
        tl.store(center + row, own, mask=mask)


def divergence(
    student: Tensor,
    teacher: Tensor,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    value: Tensor,
    center: Tensor,
) -> None:
    (rows, columns), spans = student.shape, triton.cdiv(student.shape[1], SPAN)
    if not student.numel():
        return
    check_layout(student, teacher, packed=(student_lse, student_low, teacher_lse, teacher_low, value, center))
    part = student.new_empty(rows, spans, 2, dtype=torch.float32) if spans > 1 else None
    launch(
        _divergence_kernel,
        rows * spans,
        student,
        teacher,
        student_lse,
        student_low,
        teacher_lse,
        teacher_low,
        value,
        center,
        part,
        student.stride(0),
        teacher.stride(0),
        columns,
        spans,
        *weights(kind, beta),
        KIND=kind,
        BLOCK=BLOCK // 2,
        SPAN=SPAN,
        VECTOR=16 // student.element_size(),
    )
    if part is not None:
        launch(
            _merge_divergence_kernel,
            triton.cdiv(rows, MERGE_ROWS),
            part,
            value,
            center,
            rows,
            spans,
            KIND=kind,
            ROWS=MERGE_ROWS,
        )


# Grid: (rows * column blocks), blocks fastest. A program owns BLOCK columns of row i of ``out``: reads row ``rows[i]``
# of both models' logits, writes the gradient, possibly over the student's.
@triton.jit
def _divergence_gradient_kernel(
    student,
    teacher,
    rows,
    student_lse,
    student_low,
    teacher_lse,
    teacher_low,
    center,
    weight,
    inverse_temperature,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    columns,
    beta,
    rest,
    log_beta,
    log_rest,
    logit_scale,
    softcap,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    source = row
    if rows is not None:
        source = tl.load(rows + row)
    z = tl.load(student + source * student_stride + column, mask=mask, other=0.0).to(tl.float32)
    log_t = tl.load(teacher + source * teacher_stride + column, mask=mask, other=0.0).to(tl.float32)
    log_t = _log_p(log_t, tl.load(teacher_lse + row), tl.load(teacher_low + row))
    log_p = _log_p(z, tl.load(student_lse + row), tl.load(student_low + row))
    p = tl.exp(log_p)
    if KIND == "forward":
        g = p - tl.exp(log_t)
    elif KIND == "reverse":
        g = _term(p, log_p - log_t - tl.load(center + row))
    else:
        a = log_t - log_p + (log_beta - log_rest)
        g = _term(p, rest * (-log_rest - _softplus(a)) - tl.load(center + row))
    at = out + row * out_stride + column
    g *= tl.load(weight + row)
    _store_gradient(g, z, at, mask, row, inverse_temperature, logit_scale, softcap, SOFTCAP)


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    student_lse: Tensor,
    student_low: Tensor,
    teacher_lse: Tensor,
    teacher_low: Tensor,
    kind: str,
    beta: float,
    center: Tensor,
    weight: Tensor,
    logit_scale: float,
    softcap: float,
    inverse_temperature: Tensor | None,
    out: Tensor,
) -> None:
    n, columns = out.shape
    if not out.numel():
        return
    sums = (student_lse, student_low, teacher_lse, teacher_low)
    check_layout(student, teacher, out, packed=(rows, *sums, center, weight, inverse_temperature))
    launch(
        _divergence_gradient_kernel,
        n * triton.cdiv(columns, BLOCK // 2),
        student,
        teacher,
        rows,
        student_lse,
        student_low,
        teacher_lse,
        teacher_low,
        center,
        weight,
        inverse_temperature,
        out,
        student.stride(0),
        teacher.stride(0),
        out.stride(0),
        columns,
        *weights(kind, beta),
        logit_scale,
        softcap,
        KIND=kind,
        SOFTCAP=softcap > 0,
        BLOCK=BLOCK // 2,
    )


def weights(kind: str, beta: float) -> tuple[float, float, float, float]:
    """beta, 1 - beta and their logarithms, for "js"; the other kinds use none of them."""
    return (beta, 1 - beta, math.log(beta), math.log1p(-beta)) if kind == "js" else (0.0, 0.0, 0.0, 0.0)


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Start ``programs`` programs on the device of the first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **constants, **OPTIONS)


def check_layout(*tiles: Tensor, packed: tuple[Tensor | None, ...]) -> None:
    """What the kernels take for granted: rows of a tile without gaps, all else packed."""
    assert all(tile.shape[1] == 1 or tile.stride(1) == 1 for tile in tiles)
    assert all(tensor is None or tensor.is_contiguous() for tensor in packed)


# -- the ops ----------------------------------------------------------------------------------------------------------
def empty(elements: int, like: Tensor) -> Tensor:
    """Fresh fp32 memory on the device of ``like``."""
    return torch.empty(elements, dtype=torch.float32, device=like.device)


def give_back(buffer: Tensor) -> None:
    """torch's allocator keeps what a call frees for the next."""


linear_logprobs, linear_logprobs_backward, linear_policy_loss, linear_distill_loss = ops(
    Tiles(statistics, gradient, divergence, divergence_gradient, empty, empty, give_back)
)


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def compile_cases(target: str) -> list[CompileCase]:
    """The launches that the compile test builds for a target: plain ones, and ones with everything there is."""
    return [
        statistics_case("fp32"),
        statistics_case("bf16"),
        statistics_case("fp32", full=True),
        statistics_case("bf16", full=True),
        statistics_case("bf16", full=True, spans=True),
        unaligned(statistics_case("fp32", full=True, spans=True)),
        unaligned(statistics_case("bf16", full=True)),
        statistics_case("fp16"),
        case(
            "merge_statistics",
            _merge_statistics_kernel,
            "part *fp32, maximum *fp32, total *fp32, weighted *fp32, squared *fp32, rows i32, spans i32",
            ROWS=MERGE_ROWS,
        ),
        gradient_case("fp32", "fp32"),
        gradient_case("bf16", "bf16"),
        gradient_case("fp32", "fp32", full=True),
        gradient_case("bf16", "bf16", full=True),
        gradient_case("fp32", "bf16", full=True),
        gradient_case("fp16", "fp16"),
        unaligned(gradient_case("bf16", "bf16", full=True)),
        divergence_case("fp32", "forward"),
        divergence_case("bf16", "forward"),
        divergence_case("bf16", "reverse"),
        divergence_case("fp32", "js", spans=True),
        divergence_case("bf16", "js", spans=True),
        unaligned(divergence_case("fp32", "js")),
        case(
            "merge_divergence",
            _merge_divergence_kernel,
            "part *fp32, value *fp32, center *fp32, rows i32, spans i32",
            KIND="js",
            ROWS=MERGE_ROWS,
        ),
        divergence_gradient_case("fp32", "forward"),
        divergence_gradient_case("bf16", "forward"),
        divergence_gradient_case("bf16", "reverse", full=True),
        divergence_gradient_case("fp32", "js", full=True),
        divergence_gradient_case("bf16", "js", full=True),
        unaligned(divergence_gradient_case("fp32", "js", full=True)),
    ]


def case(name: str, kernel: Any, signature: str, **constants: Any) -> CompileCase:
    """One launch; ``signature`` is "argument type, ..."; arguments in neither it nor ``constants`` are None."""
    types = dict(entry.split() for entry in signature.split(", "))
    absent = dict.fromkeys(set(kernel.arg_names) - types.keys() - constants.keys())
    return CompileCase(name, kernel, types, absent | constants, OPTIONS)


def unaligned(aligned: CompileCase) -> CompileCase:
    """The same for an odd vocabulary: neither strides nor columns are divisible by 16."""
    signature = {name: kind.removesuffix(":16") for name, kind in aligned.signature.items()}
    return aligned._replace(name=f"{aligned.name}_odd", signature=signature)


def statistics_case(dtype: str, *, full: bool = False, spans: bool = False) -> CompileCase:
    optional = "bias *fp32, inverse_temperature *fp32, weighted *fp32, squared *fp32, " if full else ""
    part = "part *fp32, " if spans else ""
    return case(
        f"statistics_{dtype}{'_full' if full else ''}{'_spans' if spans else ''}",
        _statistics_kernel,
        f"logits *{dtype}, ids *i64, maximum *fp32, total *fp32, picked *fp32, {optional}{part}stride i32:16, "
        "columns i32:16, first i32, ids_per_row i32, spans i32, logit_scale fp32, softcap fp32",
        TRANSFORM=full,
        SOFTCAP=full,
        BLOCK=BLOCK,
        SPAN=SPAN,
        VECTOR=4 if dtype == "fp32" else 8,
        BLOCK_IDS=BLOCK_IDS,
    )


def gradient_case(dtype: str, out: str, *, full: bool = False) -> CompileCase:
    optional = "rows *i64, slope *fp32, square *fp32, inverse_temperature *fp32, " if full else ""
    return case(
        f"gradient_{dtype}_to_{out}{'_full' if full else ''}",
        _gradient_kernel,
        f"logits *{dtype}, ids *i64, lse *fp32, lse_low *fp32, base *fp32, picked *fp32, complement *fp32, {optional}"
        f"out *{out}, stride i32:16, out_stride i32:16, columns i32:16, first i32, ids_per_row i32, "
        "logit_scale fp32, softcap fp32",
        SOFTCAP=full,
        BLOCK=BLOCK,
        BLOCK_IDS=BLOCK_IDS if full else 1,
    )


def divergence_case(dtype: str, kind: str, *, spans: bool = False) -> CompileCase:
    return case(
        f"divergence_{kind}_{dtype}{'_spans' if spans else ''}",
        _divergence_kernel,
        f"student *{dtype}, teacher *{dtype}, student_lse *fp32, student_low *fp32, teacher_lse *fp32, "
        "teacher_low *fp32, value *fp32, center *fp32, "
        f"{'part *fp32, ' if spans else ''}student_stride i32:16, teacher_stride i32:16, columns i32:16, spans i32, "
        "beta fp32, rest fp32, log_beta fp32, log_rest fp32",
        KIND=kind,
        BLOCK=BLOCK // 2,
        SPAN=SPAN,
        VECTOR=4 if dtype == "fp32" else 8,
    )


def divergence_gradient_case(dtype: str, kind: str, *, full: bool = False) -> CompileCase:
    return case(
        f"divergence_gradient_{kind}_{dtype}{'_full' if full else ''}",
        _divergence_gradient_kernel,
        f"student *{dtype}, teacher *{dtype}, {'rows *i64, inverse_temperature *fp32, ' if full else ''}"
        "student_lse *fp32, student_low *fp32, teacher_lse *fp32, teacher_low *fp32, center *fp32, weight *fp32, "
        f"out *{dtype}, student_stride i32:16, teacher_stride i32:16, out_stride i32:16, columns i32:16, "
        "beta fp32, rest fp32, log_beta fp32, log_rest fp32, logit_scale fp32, softcap fp32",
        KIND=kind,
        SOFTCAP=full,
        BLOCK=BLOCK // 2,
    )
