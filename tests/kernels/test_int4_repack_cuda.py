"""Weights on a GPU: tiles from every format, quantised and dequantised, bit for bit as torch does; and the border.

Where there is no GPU, the same kernels run on the emulated device; every order that it leaves open is drawn from SEEDS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from m3kernels import dispatch
from m3kernels.int4 import (
    Int4Weight,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    int4_dequantize,
    quantize_weight,
    to_awq,
    to_compressed_tensors,
    to_gptq,
)
from m3kernels.int4.reference import make_inputs
from m3kernels.testing import bitwise_equal, surrounded_by_nan, uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 1, 2) if DEVICE == "cpu" else (0,)
Result = TypeVar("Result")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)


@pytest.fixture
def in_room(cuda_module: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """in_room(name, call): the call's result with that room of int4 alone."""

    def run(name: str, call: Callable[[], Result]) -> Result:
        monkeypatch.setenv("M3KERNELS_BACKEND", f"int4={name}")
        dispatch.rooms.cache_clear()
        return call()

    yield run
    dispatch.rooms.cache_clear()


def assert_as_in_torch(in_room: Any, make: Callable[[], Int4Weight], seeds: tuple[int, ...] = SEEDS) -> None:
    """The weight that ``make`` returns has the same bits with the CUDA kernels and without."""
    expected = in_room("reference", make)
    for seed in seeds:
        if DEVICE == "cpu":
            import emulated_cuda

            emulated_cuda.configure(seed=seed)
        with uninitialized_is_nan():
            weight = in_room("cuda", make)
        assert same_weight(weight, expected)


def same_weight(a: Int4Weight, b: Int4Weight) -> bool:
    numbers = ("out_features", "in_features", "group_size", "first_k")
    tensors = [(getattr(a, name), getattr(b, name)) for name in ("qweight", "scales", "zeros", "perm")]
    return all(getattr(a, name) == getattr(b, name) for name in numbers) and all(
        (x is None and y is None) or (x is not None and y is not None and bitwise_equal(x, y)) for x, y in tensors
    )


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def test_the_kernels_are_what_is_tested(in_room: Any) -> None:
    q = torch.zeros(4, 4, dtype=torch.uint8, device=DEVICE)
    for function in ("pack_tiles", "quantize_tiles"):
        offer = in_room("cuda", lambda function=function: dispatch.offered("m3kernels.int4", function, q))
        assert offer is not None and offer.__module__ == "m3kernels.int4._cuda"
        assert in_room("reference", lambda function=function: dispatch.offered("m3kernels.int4", function, q)) is None


# -- formats ----------------------------------------------------------------------------------------------------------
SHAPES: dict[str, dict[str, Any]] = {
    "one_tile": dict(n=64, k=16, group_size=16),
    "odd_tiles": dict(n=72, k=200, group_size=48),
    "many_tiles": dict(n=136, k=384, group_size=128, symmetric=True),
    "per_channel": dict(n=8, k=56, group_size=-1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
either_order = pytest.mark.parametrize("act_order", (False, True), ids=("in_order", "act_order"))


@every_shape
@either_order
@pytest.mark.parametrize("version", (1, 2))
def test_gptq(in_room: Any, shape: str, act_order: bool, version: int) -> None:
    _, weight, _ = make_inputs(1, **SHAPES[shape], act_order=act_order)
    if version == 1 and weight.zeros is not None:
        weight = dataclasses.replace(weight, zeros=weight.zeros.clamp(min=1))
    elif weight.zeros is not None:
        weight = dataclasses.replace(weight, zeros=weight.zeros.clamp(max=15))
    tensors = on_device(to_gptq(weight, version=version))
    assert_as_in_torch(in_room, lambda: from_gptq(**tensors, group_size=weight.group_size, version=version))


@every_shape
def test_awq(in_room: Any, shape: str) -> None:
    _, weight, _ = make_inputs(1, **SHAPES[shape])
    if weight.zeros is not None:
        weight = dataclasses.replace(weight, zeros=weight.zeros.clamp(max=15))
    tensors = on_device(to_awq(weight))
    assert_as_in_torch(in_room, lambda: from_awq(**tensors, group_size=weight.group_size))


@pytest.mark.parametrize(("n", "k", "group_size"), ((64, 16, 16), (70, 203, 48), (1, 1, -1), (65, 130, 128)))
@either_order
def test_compressed_tensors(in_room: Any, n: int, k: int, group_size: int, act_order: bool) -> None:
    _, weight, _ = make_inputs(1, n, k, group_size=group_size, act_order=act_order, symmetric=True)
    tensors = on_device(to_compressed_tensors(weight))
    assert_as_in_torch(in_room, lambda: from_compressed_tensors(**tensors, group_size=group_size))


@pytest.mark.parametrize("lead", ((), (3,)), ids=("plain", "experts"))
@pytest.mark.parametrize(("n", "k"), ((64, 128), (70, 203), (1, 1), (129, 17)))
def test_pack(in_room: Any, lead: tuple[int, ...], n: int, k: int) -> None:
    q = torch.randint(0, 16, (*lead, n, k), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(*lead, n, 1, dtype=torch.float16, device=DEVICE)
    assert_as_in_torch(in_room, lambda: Int4Weight.pack(q, scales, group_size=-1))
    transposed = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_as_in_torch(in_room, lambda: Int4Weight.pack(transposed, scales, group_size=-1), seeds=(0,))


# -- quantise ---------------------------------------------------------------------------------------------------------
def spiky(*shape: int) -> Tensor:
    """Rows of different widths, outliers, a group of zeros, a group of one sign."""
    w = torch.randn(*shape) * 0.02 * (1 + torch.rand(*shape[:-1], 1))
    w[torch.rand(shape) < 0.02] *= 8
    w[..., 0, :] = 0
    w[..., -1, :] = w[..., -1, :].abs() + 0.01
    return w


QUANTIZED: dict[str, tuple[tuple[int, ...], int]] = {
    "odd": ((70, 200), 48),
    "experts": ((2, 65, 130), 32),
    "one_row": ((1, 17), 16),
    "odd_columns": ((5, 33), 32),
    "one_group": ((64, 128), 128),
    "per_channel": ((66, 300), -1),
    "group_longer_than_row": ((3, 20), 64),
}


@every_dtype
@every_scale_dtype
@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantize(in_room: Any, dtype: torch.dtype, scale_dtype: torch.dtype, symmetric: bool, case: str) -> None:
    shape, group_size = QUANTIZED[case]
    w = surrounded_by_nan(spiky(*shape).to(dtype).to(DEVICE))
    options: dict[str, Any] = dict(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    assert_as_in_torch(in_room, lambda: quantize_weight(w, **options), seeds=SEEDS[:1])
    quantize_tiles = in_room("cuda", lambda: dispatch.offered("m3kernels.int4", "quantize_tiles", w))
    assert quantize_tiles(w, **options) is not None  # else torch did it


@pytest.mark.parametrize("size", (1e-42, 1e-9, 3e4, 4e5), ids=str)
@every_scale_dtype
@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))
def test_quantize_magnitudes(in_room: Any, size: float, scale_dtype: torch.dtype, symmetric: bool) -> None:
    """Scales that are subnormal, raised to the least there is, and close to the largest."""
    w = ((torch.rand(65, 40) * 2 - 1) * size).to(DEVICE)
    options: dict[str, Any] = dict(group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)
    assert_as_in_torch(in_room, lambda: quantize_weight(w, **options), seeds=SEEDS[:1])


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -6e5))
def test_quantize_names_the_weight_that_is_out_of_contract(in_room: Any, value: float) -> None:
    w = torch.randn(70, 100, device=DEVICE)
    w[69, 99] = value
    with pytest.raises(ValueError, match=r"quantize_weight: weight: want .*; got .* at \[69, 99\]"):
        in_room("cuda", lambda: quantize_weight(w, group_size=32))


# -- dequantise -------------------------------------------------------------------------------------------------------
DENSE: dict[str, dict[str, Any]] = {
    "odd": dict(n=70, k=203, group_size=48),
    "whole_tiles": dict(n=128, k=256, group_size=128, symmetric=True),
    "act_order": dict(n=65, k=140, group_size=64, act_order=True),
    "experts": dict(n=33, k=100, group_size=-1, experts=3, act_order=True),
    "one": dict(n=1, k=1, group_size=16),
}


@every_dtype
@every_scale_dtype
@pytest.mark.parametrize("case", DENSE)
def test_dequantize(in_room: Any, dtype: torch.dtype, scale_dtype: torch.dtype, case: str) -> None:
    weight = make_inputs(1, **DENSE[case], scale_dtype=scale_dtype)[1].to(DEVICE)
    expected = in_room("reference", lambda: int4_dequantize(weight, dtype))
    with uninitialized_is_nan():
        assert bitwise_equal(in_room("cuda", lambda: int4_dequantize(weight, dtype)), expected)


@every_dtype
def test_dequantize_a_slice_that_starts_inside_a_group(in_room: Any, dtype: torch.dtype) -> None:
    weight = make_inputs(1, 130, 300, group_size=96)[1].to(DEVICE).slice_in(48, 299).slice_out(64, 130)
    expected = in_room("reference", lambda: int4_dequantize(weight, dtype))
    assert bitwise_equal(in_room("cuda", lambda: int4_dequantize(weight, dtype)), expected)


# -- the border -------------------------------------------------------------------------------------------------------
def test_the_border_refuses_what_would_be_unsafe(cuda_module: None) -> None:
    from m3kernels import _cuda_ext

    none = (0, 0)
    with pytest.raises(ValueError, match="int4_pack: source: want 4 elements; got 3"):
        _cuda_ext.int4_pack((64, 3), 1, 1, 2, 16, none, (64, 128), 0)
    with pytest.raises(ValueError, match="int4_pack: tiles: want an address that 16 divides"):
        _cuda_ext.int4_pack((64, 4), 1, 1, 2, 16, none, (72, 128), 0)
    with pytest.raises(ValueError, match="int4_pack: experts: want 1 for words; got 2"):
        _cuda_ext.int4_pack((64, 4), 1, 2, 2, 16, none, (64, 256), 0)
    with pytest.raises(ValueError, match="int4_quantize: zeros: want 64 elements; got 63"):
        _cuda_ext.int4_quantize((64, 32), 0, 1, 2, 16, -1, (64, 128), (64, 64), 0, (64, 63), (64, 1), 0)
    with pytest.raises(ValueError, match="int4_quantize: group_size: want -1 or a positive multiple of 16; got 8"):
        _cuda_ext.int4_quantize((64, 32), 0, 1, 2, 16, 8, (64, 128), (64, 64), 0, none, (64, 1), 0)
    with pytest.raises(ValueError, match="int4_dequantize: y: want 32 elements; got 31"):
        _cuda_ext.int4_dequantize((64, 128), (64, 64), 0, none, none, 1, 2, 16, -1, 0, (64, 31), 0, 0)
    with pytest.raises(ValueError, match=r"int4_dequantize: weight: want sizes in 1 .. 2\*\*31 - 2; got 0"):
        _cuda_ext.int4_dequantize((64, 128), (64, 64), 0, none, none, 1, 0, 16, -1, 0, (64, 0), 0, 0)
