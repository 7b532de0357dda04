"""What linear refuses, in public and at the native border: the argument, what was wanted, what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m3kernels import _cpu_ext
from m3kernels.decoder import linear

X, WEIGHT, BIAS = torch.randn(3, 7), torch.randn(5, 7), torch.randn(5)

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "weight_none": ((X, None), r"linear: weight: want \(N, K\) float32, bfloat16 or float16, contiguous; got None"),
    "weight_fp64": ((X, WEIGHT.double()), r"linear: weight: want .*; got \(5, 7\) float64"),
    "weight_vector": ((X, BIAS), r"linear: weight: want .*; got \(5,\) float32"),
    "weight_strided": ((X, torch.randn(7, 5).T), r"linear: weight: want .*contiguous; got \(5, 7\) float32"),
    "weight_sparse": ((X, WEIGHT.to_sparse()), r"linear: weight: want .*; got \(5, 7\) float32 sparse_coo"),
    "x_list": (([1.0], WEIGHT), r"linear: x: want \(\.\.\., 7\) float32, bfloat16 or float16 on cpu; got list"),
    "x_width": ((torch.randn(3, 8), WEIGHT), r"linear: x: want \(\.\.\., 7\) .*; got \(3, 8\) float32"),
    "x_scalar": ((torch.tensor(1.0), WEIGHT), r"linear: x: want \(\.\.\., 7\) .*; got \(\) float32"),
    "x_int": ((X.int(), WEIGHT), r"linear: x: want .*; got \(3, 7\) int32"),
    "x_elsewhere": ((X.to("meta"), WEIGHT), r"linear: x: want .* on cpu; got \(3, 7\) float32 on meta"),
    "bias_size": ((X, WEIGHT, torch.randn(6)), r"linear: bias: want \(5,\) float32 on cpu; got \(6,\) float32"),
    "bias_dtype": (
        (X.half(), WEIGHT.half(), BIAS.bfloat16()),
        r"linear: bias: want \(5,\) float32 or float16 on cpu; got \(5,\) bfloat16",
    ),
    "bias_elsewhere": ((X, WEIGHT, BIAS.to("meta")), r"linear: bias: want .*; got \(5,\) float32 on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        linear(*arguments)


@pytest.mark.parametrize("which", (0, 1, 2), ids=("x", "weight", "bias"))
def test_gradients_are_refused_unless_off(which: int) -> None:
    arguments = [X, WEIGHT, BIAS]
    arguments[which] = arguments[which].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"linear: \w+: want no gradient .*; got requires_grad"):
        linear(*arguments)
    with torch.no_grad():
        assert torch.equal(linear(*arguments), linear(X, WEIGHT, BIAS))


def described(**changes: Any) -> list[Any]:
    """Arguments of the native border for X, WEIGHT, BIAS, with some replaced."""
    y = torch.empty(3, 5)
    arguments = {
        "x": (X.data_ptr(), 3, 7, 7),
        "weight": ((WEIGHT.data_ptr(), 35), 0, 5, 7),
        "bias": ((BIAS.data_ptr(), 5), 0),
        "y": (y.data_ptr(), 3, 5, 5),
        "threads": 1,
    }
    return list((arguments | changes).values())


BORDER: dict[str, tuple[dict[str, Any], str]] = {
    "x_rows": ({"x": (X.data_ptr(), 4, 7, 7)}, "linear: y: want 4 rows; got 3"),
    "x_negative": ({"x": (X.data_ptr(), -1, 7, 7)}, r"linear: x: want under 2\*\*40 rows; got -1"),
    "x_columns": ({"x": (X.data_ptr(), 3, 6, 7)}, "linear: x: want 7 columns; got 6"),
    "x_stride": ({"x": (X.data_ptr(), 3, 7, -7)}, "linear: x: want rows that lie one after another, .*; got -7"),
    "x_far": ({"x": (X.data_ptr(), 3, 7, 2**50)}, r"linear: x: want .* under 2\*\*40 elements; got"),
    "x_null": ({"x": (0, 3, 7, 7)}, "linear: x: want memory; got none"),
    "weight_size": ({"weight": ((WEIGHT.data_ptr(), 34), 0, 5, 7)}, "linear: weight: want 35 elements; got 34"),
    "weight_huge": ({"weight": ((WEIGHT.data_ptr(), 35), 0, 2**39, 7)}, r"linear: weight: want under 2\*\*40 elements"),
    "weight_type": ({"weight": ((WEIGHT.data_ptr(), 35), 3, 5, 7)}, "linear: weight: want type 0, 1 or 2; got 3"),
    "bias_size": ({"bias": ((BIAS.data_ptr(), 4), 0)}, "linear: bias: want 5 elements; got 4"),
    "bias_type": ({"bias": ((BIAS.data_ptr(), 5), -1)}, "linear: bias: want type 0, 1 or 2; got -1"),
    "y_overlaps": ({"y": (X.data_ptr(), 3, 5, 4)}, "linear: y: want rows that lie one after another, .*; got 4"),
    "threads": ({"threads": 0}, r"linear: threads: want 1\.\.4096; got 0"),
}


@pytest.mark.parametrize("case", BORDER)
def test_the_border_refuses(case: str) -> None:
    changes, message = BORDER[case]
    with pytest.raises(ValueError, match=message):
        _cpu_ext.decoder_linear(*described(**changes))
