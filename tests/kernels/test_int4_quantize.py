"""quantize_weight: by hand, bounds on the error, the searches against minmax, hard magnitudes, every error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_dequantize, quantize_weight, to_awq, to_compressed_tensors, to_gptq
from m3kernels.int4.reference import make_inputs
from m3kernels.testing import relative_error

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
METHODS = ("minmax", "mse", "weighted")
quick = settings(max_examples=40, deadline=None)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
every_method = pytest.mark.parametrize("method", METHODS)
either_symmetry = pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))


def group_errors(weight: Tensor, quantized: Int4Weight, weighted: bool = False) -> Tensor:
    """(N, G) fp64: sum of squares over each group, weighted by w^2 + mean w^2 if asked."""
    size = weight.shape[1] if quantized.group_size == -1 else quantized.group_size
    dense = int4_dequantize(quantized, torch.float32).double().split(size, dim=1)
    sums = []
    for w, other in zip(weight.double().split(size, dim=1), dense, strict=True):
        importance = w.square() + w.square().mean(1, keepdim=True) if weighted else torch.ones_like(w)
        sums.append((importance * (w - other).square()).sum(1))
    return torch.stack(sums, dim=1)


def spiky(n: int, k: int, seed: int = 0) -> Tensor:
    """Weights as they are: Gaussian rows of different width, a few outliers, a shifted column."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.02 * (1 + torch.rand(n, 1, generator=generator))
    w[torch.rand(n, k, generator=generator) < 0.01] *= 6
    w[:, k // 2] += 0.05
    return w


# -- values -----------------------------------------------------------------------------------------------------------
def test_symmetric_minmax_by_hand() -> None:
    w = torch.tensor([[7.5, -7.5, 1.0, -1.4, 0.4, 0.0, 3.6, -3.6]])
    quantized = quantize_weight(w, group_size=16)
    q, scales, zeros = quantized.unpack()
    assert scales.tolist() == [[1.0]] and zeros.tolist() == [[8]] and quantized.symmetric
    assert q.tolist() == [[15, 0, 9, 7, 8, 8, 12, 4]]


def test_asymmetric_minmax_by_hand() -> None:
    w = torch.tensor([[-3.0, 12.0, 0.0, 4.4, 5.6, -1.0]])
    quantized = quantize_weight(w, group_size=16, symmetric=False)
    q, scales, zeros = quantized.unpack()
    assert scales.tolist() == [[1.0]] and zeros.tolist() == [[3]]
    assert q.tolist() == [[0, 15, 3, 7, 9, 2]]


def test_asymmetric_zero_points_stay_in_1_to_15() -> None:
    w = torch.tensor([[0.0, 14.0, 3.2], [0.0, -15.0, -3.2]])
    q, scales, zeros = quantize_weight(w, group_size=16, symmetric=False).unpack()
    assert scales.tolist() == [[1.0], [1.0]] and zeros.tolist() == [[1], [15]]
    assert q.tolist() == [[1, 15, 4], [15, 0, 12]]


def test_mse_by_hand_uses_the_sixteenth_value() -> None:
    w = torch.tensor([[8.0, -7.0, -6.0, -5.0, 4.0, 3.0, 2.0, 1.0]])
    quantized = quantize_weight(w, group_size=16, method="mse")
    assert quantized.unpack()[1].tolist() == [[-1.0]]
    assert torch.equal(int4_dequantize(quantized, torch.float32), w)


@every_scale_dtype
@pytest.mark.parametrize(
    ("method", "symmetric"),
    (("minmax", False), ("mse", False), ("weighted", False), ("mse", True), ("weighted", True)),
)
def test_a_weight_on_the_grid_is_kept(scale_dtype: torch.dtype, method: str, symmetric: bool) -> None:
    q, scales, zeros = make_inputs(1, 40, 200, group_size=64, symmetric=symmetric, scale_dtype=scale_dtype)[1].unpack()
    q[:, ::64], q[:, 1::64] = 0, 15  # both ends of every group
    dense = int4_dequantize(Int4Weight.pack(q, scales, zeros.clamp(1, 15), group_size=64), torch.float32)
    again = quantize_weight(dense, group_size=64, symmetric=symmetric, method=method, scale_dtype=scale_dtype)
    assert relative_error(int4_dequantize(again, torch.float32), dense).max < 1e-6


@quick
@given(
    n=st.integers(1, 20),
    k=st.integers(1, 200),
    group_size=st.sampled_from((-1, 16, 32, 48, 128)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    exponent=st.integers(-3, 4),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 10**6),
)
def test_minmax_rounds_to_the_nearest_point(
    n: int, k: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, exponent: int, shift: float, seed: int
) -> None:
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) + shift) * 10.0**exponent
    quantized = quantize_weight(w, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    _, scales, zeros = quantized.unpack()
    group = quantized.group_index()
    s = scales.double()[:, group]
    unit = torch.finfo(scale_dtype).eps / 2
    assert ((w.double() - int4_dequantize(quantized, torch.float32).double()).abs() <= s * (0.5 + 16 * unit)).all()
    assert zeros.min() >= 1 and zeros.max() <= 15
    grid = (torch.arange(16)[None, None] - zeros[:, group][..., None].double()) * s[..., None]
    nearest = (w.double()[..., None] - grid).abs().amin(-1)
    ours = (w.double() - int4_dequantize(quantized, torch.float32).double()).abs()
    assert (ours <= nearest + 1e-6 * s).all()


@quick
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 200),
    group_size=st.sampled_from((-1, 16, 48, 128)),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    exponent=st.integers(-6, 4),
    seed=st.integers(0, 10**6),
)
def test_a_search_is_never_worse_than_minmax(
    n: int, k: int, group_size: int, symmetric: bool, weighted: bool, scale_dtype: torch.dtype, exponent: int, seed: int
) -> None:
    w = spiky(n, k, seed) * 10.0**exponent
    kwargs: dict[str, Any] = dict(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    methods = ("minmax", "weighted" if weighted else "mse")
    minmax, found = (group_errors(w, quantize_weight(w, method=method, **kwargs), weighted) for method in methods)
    assert (found <= minmax * (1 + 1e-12)).all()


@either_symmetry
@pytest.mark.parametrize("method", ("mse", "weighted"))
def test_a_search_comes_close_to_the_best_of_a_fine_grid(method: str, symmetric: bool) -> None:
    w, weighted = spiky(24, 64), method == "weighted"
    quantized = quantize_weight(w, group_size=64, symmetric=symmetric, method=method, scale_dtype=torch.float32)
    best = torch.full((24, 1), torch.inf, dtype=torch.float64)
    importance = w.double().square() + w.double().square().mean(1, keepdim=True) if weighted else 1.0
    for zero in (8,) if symmetric else range(1, 16):
        for size in torch.linspace(0.4, 1.4, 301).tolist():
            for sign in (1, -1):
                s = sign * size * w.abs().amax(1, keepdim=True).double() / 7.5 * (1 if symmetric else 0.7)
                points = torch.clamp(torch.round(w.double() / s), -zero, 15 - zero) * s
                best = torch.minimum(best, (importance * (w.double() - points).square()).sum(1, keepdim=True))
    assert group_errors(w, quantized, weighted).sum() <= 1.02 * best.sum()


@pytest.mark.parametrize(
    ("method", "symmetric", "ratio"),
    (("mse", True, 0.85), ("mse", False, 0.95), ("weighted", True, 0.75), ("weighted", False, 0.95)),
)
def test_a_search_lowers_the_error_of_real_looking_weights(method: str, symmetric: bool, ratio: float) -> None:
    w, weighted = spiky(64, 576), method == "weighted"
    minmax, found = (
        group_errors(w, quantize_weight(w, group_size=64, symmetric=symmetric, method=m), weighted).sum()
        for m in ("minmax", method)
    )
    assert found < ratio * minmax


@every_method
@either_symmetry
def test_rows_do_not_depend_on_their_neighbours_or_chunks(
    method: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = spiky(37, 200)
    whole = quantize_weight(w, group_size=64, symmetric=symmetric, method=method)
    monkeypatch.setattr("m3kernels.int4.quantize.CHUNK", 600)
    chunked = quantize_weight(w, group_size=64, symmetric=symmetric, method=method)
    assert torch.equal(whole.qweight, chunked.qweight) and torch.equal(whole.scales, chunked.scales)


@every_method
def test_experts_are_quantized_one_by_one(method: str) -> None:
    w = torch.stack([spiky(20, 72, seed) for seed in range(3)])
    stack = quantize_weight(w, group_size=32, symmetric=False, method=method)
    plain = [quantize_weight(part, group_size=32, symmetric=False, method=method) for part in w]
    assert stack.num_experts == 3 and stack.zeros is not None
    assert torch.equal(stack.qweight, torch.stack([part.qweight for part in plain]))
    assert torch.equal(stack.scales, torch.stack([part.scales for part in plain]))
    assert torch.equal(stack.zeros, torch.stack([part.zeros for part in plain if part.zeros is not None]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_and_strided_weights(dtype: torch.dtype) -> None:
    w = spiky(30, 100).to(dtype)
    expected = quantize_weight(w.float(), group_size=32)
    for same in (w, w.T.contiguous().T, w.clone().requires_grad_()):
        quantized = quantize_weight(same, group_size=32)
        assert torch.equal(quantized.qweight, expected.qweight) and not quantized.scales.requires_grad


@either_symmetry
@every_method
def test_the_result_exports_to_every_format(symmetric: bool, method: str) -> None:
    w = spiky(16, 96)
    w[3], w[4] = w[3].abs(), -w[4].abs()
    quantized = quantize_weight(w, group_size=32, symmetric=symmetric, method=method)
    assert to_gptq(quantized, version=1) and to_gptq(quantized, version=2)
    assert to_awq(quantized) and to_compressed_tensors(quantized)


# -- hard magnitudes --------------------------------------------------------------------------------------------------
@every_method
@either_symmetry
@every_scale_dtype
def test_groups_of_zeros(method: str, symmetric: bool, scale_dtype: torch.dtype) -> None:
    w = spiky(3, 96)
    w[1], w[:, 32:64] = 0, 0
    quantized = quantize_weight(w, group_size=32, symmetric=symmetric, method=method, scale_dtype=scale_dtype)
    dense = int4_dequantize(quantized, torch.float32)
    assert not dense[1].any() and not dense[:, 32:64].any() and dense[0].any()
    assert (quantized.unpack()[1][1] == 1).all()


@every_method
@either_symmetry
@pytest.mark.parametrize(
    ("scale_dtype", "size"),
    (
        (torch.float16, 4.5e5),
        (torch.float16, 1e-3),
        (torch.bfloat16, 3e38),
        (torch.float32, 3e38),
        (torch.float32, 1e-30),
    ),
    ids=str,
)
def test_large_and_small_weights(method: str, symmetric: bool, scale_dtype: torch.dtype, size: float) -> None:
    w = torch.cat((torch.linspace(-1, 1, 40), torch.linspace(-0.3, 1, 40))).view(2, 40) * size
    quantized = quantize_weight(w, group_size=16, symmetric=symmetric, method=method, scale_dtype=scale_dtype)
    assert relative_error(int4_dequantize(quantized, torch.float32), w).max < 0.08


@every_method
@either_symmetry
def test_scales_below_the_range_of_fp16_become_its_smallest_number(method: str, symmetric: bool) -> None:
    w = torch.randn(4, 32) * 1e-12
    quantized = quantize_weight(w, group_size=32, symmetric=symmetric, method=method)
    assert (quantized.unpack()[1].abs() == 2.0**-24).all()
    assert not int4_dequantize(quantized, torch.float32).any()


# -- errors -----------------------------------------------------------------------------------------------------------
def with_value(value: float, *shape: int) -> Tensor:
    w = torch.zeros(shape)
    w.view(-1)[-2] = value
    return w


GOOD: dict[str, Any] = dict(weight=torch.ones(4, 40), group_size=32)
WEIGHT = "weight: want (N, K) or (E, N, K) float32, bfloat16 or float16, strided, not empty; got "
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": (dict(weight=torch.ones(4)), WEIGHT + "(4,) float32"),
    "dtype": (dict(weight=torch.ones(4, 4).double()), WEIGHT + "(4, 4) float64"),
    "empty": (dict(weight=torch.ones(0, 4)), WEIGHT + "(0, 4) float32"),
    "meta": (dict(weight=torch.ones(4, 4, device="meta")), WEIGHT + "(4, 4) float32 on meta"),
    "type": (dict(weight=None), WEIGHT + "None"),
    "nan": (dict(weight=with_value(torch.nan, 5, 40)), "weight: want finite values; got nan at [4, 38]"),
    "inf": (dict(weight=with_value(-torch.inf, 2, 3, 40)), "weight: want finite values; got -inf at [1, 2, 38]"),
    "overflow": (
        dict(weight=with_value(5e5, 5, 40)),
        "weight: want |w| <= 458528, so that scales fit torch.float16; got 500000.0 at [4, 38]",
    ),
    "group_size": (dict(group_size=33), "group_size: want -1 or a positive multiple of 16 (32, 64, 128); got 33"),
    "symmetric": (dict(symmetric=None), "symmetric: want True or False; got None"),
    "method": (dict(method="gptq"), "method: want 'minmax' or 'mse' or 'weighted'; got gptq"),
    "scale_dtype": (
        dict(scale_dtype=torch.float64),
        "scale_dtype: want torch.float16, torch.bfloat16 or torch.float32; got torch.float64",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_quantize_weight_refuses(name: str) -> None:
    change, message = ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"quantize_weight: {message}")):
        quantize_weight(**{**GOOD, **change})
