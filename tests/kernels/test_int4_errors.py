"""Every documented error of the INT4 ops, with its message; eager, compiled, and of a room that cannot serve."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import BackendError
from m3kernels.int4 import int4_dequantize, int4_gemm, int4_grouped_gemm, int4_moe
from m3kernels.int4.reference import make_inputs

X, W, B = make_inputs(3, 70, 130, group_size=64, bias=True)
_, STACK, _ = make_inputs(3, 70, 130, group_size=64, experts=2)
T, W13, _ = make_inputs(3, 160, 48, group_size=32, experts=4)
_, W2, _ = make_inputs(1, 48, 80, group_size=32, experts=4)
IDS, SCORES = torch.tensor([[0, 1], [3, 2], [1, 1]]), torch.rand(3, 2)
OFFSETS = torch.tensor([0, 1, 3])
MOE_CALL = dict(x=T, w13=W13, w2=W2, topk_ids=IDS, topk_weights=SCORES)
NAMES = "float32, bfloat16 or float16"

ERRORS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any], str]] = {}


def error(name: str, op: Callable[..., Tensor], good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    ERRORS[name] = (op, good, change, f"{op.__name__}: {message}")


GEMM_CALL = dict(x=X, weight=W, bias=B)
MODES = "activations: want 'auto', 'exact', 'int16', 'int8'; got "
NO_GRAD = "x: want no gradient (call under torch.no_grad(); only int4_gemm is differentiable); got requires_grad"
error(
    "gemm_x_columns", int4_gemm, GEMM_CALL, dict(x=X[:, 1:]), f"x: want (..., 130) {NAMES} on cpu; got (3, 129) float32"
)
error(
    "gemm_x_dtype", int4_gemm, GEMM_CALL, dict(x=X.double()), f"x: want (..., 130) {NAMES} on cpu; got (3, 130) float64"
)
error("gemm_x_type", int4_gemm, GEMM_CALL, dict(x=[1.0]), f"x: want (..., 130) {NAMES} on cpu; got list")
error("gemm_x_scalar", int4_gemm, GEMM_CALL, dict(x=X[0, 0]), f"x: want (..., 130) {NAMES} on cpu; got () float32")
error(
    "gemm_x_device",
    int4_gemm,
    GEMM_CALL,
    dict(x=X.to("meta")),
    f"x: want (..., 130) {NAMES} on cpu; got (3, 130) float32 on meta",
)
error(
    "gemm_stack",
    int4_gemm,
    GEMM_CALL,
    dict(weight=STACK),
    "weight: want an Int4Weight without experts; got Int4Weight(2 x 70 x 130",
)
error(
    "gemm_dense",
    int4_gemm,
    GEMM_CALL,
    dict(weight=X),
    "weight: want an Int4Weight without experts; got (3, 130) float32",
)
error(
    "gemm_bias_size",
    int4_gemm,
    GEMM_CALL,
    dict(bias=B[:5]),
    "bias: want (70,) torch.float32 on cpu, like x; got (5,) float32",
)  # type: ignore[index]
error(
    "gemm_bias_dtype",
    int4_gemm,
    GEMM_CALL,
    dict(bias=B.half()),
    "bias: want (70,) torch.float32 on cpu, like x; got (70,) float16",
)  # type: ignore[union-attr]
error("gemm_mode", int4_gemm, GEMM_CALL, dict(activations="int4"), MODES + "int4")
GROUPED_CALL = dict(x=X, weight=STACK, offsets=OFFSETS)
error(
    "grouped_plain",
    int4_grouped_gemm,
    GROUPED_CALL,
    dict(weight=W),
    "weight: want an Int4Weight with experts (Int4Weight.stack); got",
)
error("grouped_rank", int4_grouped_gemm, GROUPED_CALL, dict(x=X[None]), "x: want (M, 130); got (1, 3, 130) float32")
error("grouped_gradient", int4_grouped_gemm, GROUPED_CALL, dict(x=X.clone().requires_grad_()), NO_GRAD)
error("grouped_mode", int4_grouped_gemm, GROUPED_CALL, dict(activations=None), MODES + "None")
error(
    "grouped_size",
    int4_grouped_gemm,
    GROUPED_CALL,
    dict(offsets=OFFSETS[1:]),
    "offsets: want (3,) int32 or int64 on cpu; got (2,) int64",
)
error(
    "grouped_dtype",
    int4_grouped_gemm,
    GROUPED_CALL,
    dict(offsets=OFFSETS.float()),
    "offsets: want (3,) int32 or int64 on cpu; got (3,) float32",
)
ASCENDING = "offsets: want 0 = offsets[0] <= ... <= offsets[-1] = 3; got "
error("grouped_first", int4_grouped_gemm, GROUPED_CALL, dict(offsets=OFFSETS + 1), ASCENDING + "[1, 2, 4]")
error("grouped_order", int4_grouped_gemm, GROUPED_CALL, dict(offsets=torch.tensor([0, 4, 3])), ASCENDING + "[0, 4, 3]")
error("grouped_last", int4_grouped_gemm, GROUPED_CALL, dict(offsets=torch.tensor([0, 1, 2])), ASCENDING + "[0, 1, 2]")
error(
    "moe_plain_w13",
    int4_moe,
    MOE_CALL,
    dict(w13=W),
    "w13: want an Int4Weight with experts (Int4Weight.stack); got Int4Weight(70 x 130",
)
error(
    "moe_plain_w2",
    int4_moe,
    MOE_CALL,
    dict(w2=None),
    "w2: want an Int4Weight with experts (Int4Weight.stack); got None",
)
error("moe_rank", int4_moe, MOE_CALL, dict(x=T[0]), "x: want (T, 48); got (48,) float32")
error("moe_columns", int4_moe, MOE_CALL, dict(x=T[:, :8]), f"x: want (..., 48) {NAMES} on cpu; got (3, 8) float32")
error("moe_gradient", int4_moe, MOE_CALL, dict(x=T.clone().requires_grad_()), NO_GRAD)
error("moe_mode", int4_moe, MOE_CALL, dict(activations="fp8"), MODES + "fp8")
error(
    "moe_w2",
    int4_moe,
    MOE_CALL,
    dict(w2=STACK),
    "w2: want 4 x (48, 80), group 32, on cpu, to match w13; got Int4Weight(2 x 70 x 130",
)
error(
    "moe_experts",
    int4_moe,
    MOE_CALL,
    dict(w2=W2.slice_experts(0, 3)),
    "w2: want 4 x (48, 80), group 32, on cpu, to match w13; got Int4Weight(3",
)
error(
    "moe_ids_dtype",
    int4_moe,
    MOE_CALL,
    dict(topk_ids=IDS.float()),
    "topk_ids: want (3, k) int32 or int64 on cpu; got (3, 2) float32",
)
error(
    "moe_ids_rows",
    int4_moe,
    MOE_CALL,
    dict(topk_ids=IDS[:2]),
    "topk_ids: want (3, k) int32 or int64 on cpu; got (2, 2) int64",
)
error(
    "moe_ids_high", int4_moe, MOE_CALL, dict(topk_ids=torch.full((3, 2), 4)), "topk_ids: want values in 0..3; got 4..4"
)
error(
    "moe_ids_low",
    int4_moe,
    MOE_CALL,
    dict(topk_ids=torch.tensor([[0, -1]] * 3)),
    "topk_ids: want values in 0..3; got -1..0",
)
error(
    "moe_weights_shape",
    int4_moe,
    MOE_CALL,
    dict(topk_weights=SCORES[:, :1]),
    "topk_weights: want (3, 2) float32 or torch.float32 on cpu; got (3, 1)",
)
error(
    "moe_weights_dtype",
    int4_moe,
    MOE_CALL,
    dict(topk_weights=SCORES.double()),
    "topk_weights: want (3, 2) float32 or torch.float32 on cpu; got (3, 2)",
)
error(
    "dequantize_weight",
    int4_dequantize,
    dict(weight=W),
    dict(weight=X),
    "weight: want an Int4Weight; got (3, 130) float32",
)
error(
    "dequantize_dtype", int4_dequantize, dict(weight=W), dict(dtype=torch.int8), f"dtype: want {NAMES}; got torch.int8"
)


@pytest.mark.parametrize("name", ERRORS)
def test_ops_refuse(name: str) -> None:
    op, good, change, message = ERRORS[name]
    op(**good)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        op(**{**good, **change})


@pytest.mark.parametrize(
    ("backend", "message"),
    (
        ("cuda", "m3kernels.int4.int4_gemm: cuda: "),
        ("m3", "M3KERNELS_BACKEND: want one of cpu, cuda, triton, reference, or family=room; got 'm3'"),
    ),
    indirect=["backend"],
)
def test_a_room_that_cannot_serve_says_why(backend: str, message: str) -> None:
    with pytest.raises(BackendError, match="^" + re.escape(message)):
        int4_gemm(X, W)


@pytest.mark.parametrize("backend", ("triton",), indirect=True)
@pytest.mark.parametrize("activations", ("int16", "int8"))
def test_triton_refuses_rounded_activations(backend: str, activations: str) -> None:
    with pytest.raises(BackendError, match=f"triton: .*{activations}"):
        int4_gemm(X, W, activations=activations)


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
def test_compiled_calls_refuse_values_out_of_range(backend: str) -> None:
    moe = torch.compile(int4_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape("int4_moe: topk_ids: want values in 0..3; got 4")):
        moe(T, W13, W2, torch.full((3, 2), 4), SCORES)
    grouped = torch.compile(int4_grouped_gemm, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape("int4_grouped_gemm: offsets: want ascending values; got")):
        grouped(X, STACK, torch.tensor([0, 9, 3]))
