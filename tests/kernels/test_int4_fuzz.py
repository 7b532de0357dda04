"""10,000 malformed calls of everything public in the int4 family: a documented error or a usable result, never a crash.

A case takes a valid call and spoils one or two of its arguments: type, dtype, rank, size, strides, device, values.
Only ValueError and BackendError may come out. A spoiling that changes nothing (strides, storage) must change no bit.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import BackendError
from m3kernels.checks import describe
from m3kernels.int4 import (
    Int4Weight,
    from_autoround,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    int4_dequantize,
    int4_gemm,
    int4_grouped_gemm,
    int4_moe,
    quantize_weight,
    to_awq,
    to_compressed_tensors,
    to_gptq,
)
from m3kernels.int4.reference import make_inputs
from m3kernels.testing import bitwise_equal

CASES = 1000
ROUNDS = [("cpu", seed) for seed in range(10)] + [("reference", seed) for seed in range(2)]
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
NUMBERS = (0, 1, -1, 2, 7, 8, 15, 16, 31, 32, 48, 64, 127, 128, 4096, 2**31 - 1, 2**31, 2**62, 2**63, 10**30, -(2**63))
OBJECTS = (
    None,
    True,
    False,
    "",
    "exact",
    "int8",
    "auto_round",
    0.5,
    float("nan"),
    (),
    [],
    {},
    (3, 4),
    object(),
    torch.float16,
)


# -- valid calls ------------------------------------------------------------------------------------------------------
X, PLAIN, BIAS = make_inputs(5, 70, 130, group_size=64, bias=True)
ORDERED = make_inputs(1, 70, 130, group_size=64, act_order=True, symmetric=True)[1]
STACK = make_inputs(1, 70, 130, group_size=64, experts=3)[1]
TOKENS, W13, _ = make_inputs(4, 96, 40, group_size=32, experts=4)
W2 = make_inputs(1, 40, 48, group_size=32, experts=4, act_order=True)[1]
IDS, SCORES = torch.tensor([[0, 1], [3, 2], [1, 1], [0, 3]]), torch.rand(4, 2)
_q, _s, _z = make_inputs(1, 16, 96, group_size=32)[1].unpack()
PERM = torch.arange(95, -1, -1, dtype=torch.int32)
EXPORTABLE = Int4Weight.pack(_q, _s, _z.clamp(1, 15), group_size=32, perm=PERM)
IN_ORDER = EXPORTABLE.without_perm()
CONFIG = dict(
    bits=4, group_size=32, sym=False, data_type="int", quant_method="auto-round", packing_format="auto_round:auto_gptq"
)


def fields(weight: Int4Weight) -> dict[str, Any]:
    return {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}


def use(weight: Int4Weight) -> Tensor:
    """A weight that was accepted must also be usable: its product with ones."""
    if weight.num_experts is not None:
        weight = weight.expert(0)
    return int4_gemm(torch.ones(3, weight.in_features, device=weight.device), weight)


def rebuild(**state: Any) -> Tensor:
    return use(Int4Weight.from_state_dict(state))


def autoround(config: Any, **tensors: Any) -> Tensor:
    return use(from_autoround(tensors, config))


def autoround_config(**config: Any) -> Tensor:
    return use(from_autoround(to_gptq(EXPORTABLE), config))


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gemm": (int4_gemm, dict(x=X, weight=PLAIN, bias=BIAS, activations="exact")),
    "gemm_act_order": (int4_gemm, dict(x=X, weight=ORDERED, bias=None, activations="int8")),
    "grouped_gemm": (
        int4_grouped_gemm,
        dict(x=X, weight=STACK, offsets=torch.tensor([0, 2, 2, 5]), activations="int16"),
    ),
    "moe": (int4_moe, dict(x=TOKENS, w13=W13, w2=W2, topk_ids=IDS, topk_weights=SCORES, activations="auto")),
    "dequantize": (int4_dequantize, dict(weight=STACK, dtype=torch.float32)),
    "fields": (lambda **kwargs: use(Int4Weight(**kwargs)), fields(ORDERED)),
    "fields_of_experts": (lambda **kwargs: use(Int4Weight(**kwargs)), fields(STACK)),
    "pack": (
        lambda **kwargs: use(Int4Weight.pack(**kwargs)),
        dict(q=_q, scales=_s, zeros=_z, group_size=32, perm=PERM),
    ),
    "state_dict": (rebuild, EXPORTABLE.state_dict()),
    "slice_out": (lambda start, stop: use(PLAIN.slice_out(start, stop)), dict(start=3, stop=66)),
    "slice_in": (lambda start, stop: use(PLAIN.slice_in(start, stop)), dict(start=16, stop=99)),
    "slice_experts": (lambda start, stop: use(STACK.slice_experts(start, stop)), dict(start=1, stop=3)),
    "select_out": (lambda rows: use(PLAIN.select_out(rows)), dict(rows=torch.tensor([3, 3, 69, 0]))),
    "expert": (lambda index: use(STACK.expert(index)), dict(index=2)),
    "stack": (lambda weights: use(Int4Weight.stack(weights)), dict(weights=[PLAIN, PLAIN])),
    "gptq": (
        lambda **kwargs: use(from_gptq(**kwargs)),
        dict(**to_gptq(EXPORTABLE), group_size=32, version=1, symmetric=None),
    ),
    "awq": (lambda **kwargs: use(from_awq(**kwargs)), dict(**to_awq(IN_ORDER), group_size=32, symmetric=False)),
    "compressed": (
        lambda **kwargs: use(from_compressed_tensors(**kwargs)),
        dict(**to_compressed_tensors(EXPORTABLE), group_size=32),
    ),
    "autoround": (autoround, dict(config=CONFIG, **to_gptq(EXPORTABLE))),
    "autoround_config": (autoround_config, CONFIG),
    "to_gptq": (lambda **kwargs: to_gptq(**kwargs)["qweight"], dict(weight=EXPORTABLE, version=2)),
    "to_awq": (lambda **kwargs: to_awq(**kwargs)["qzeros"], dict(weight=IN_ORDER)),
    "to_compressed": (lambda **kwargs: to_compressed_tensors(**kwargs)["weight_packed"], dict(weight=EXPORTABLE)),
    "quantize": (
        lambda **kwargs: use(quantize_weight(**kwargs)),
        dict(weight=X, group_size=32, symmetric=True, method="mse", scale_dtype=torch.float16),
    ),
}


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
        return torch.nn.functional.pad(value, (3, 2))[..., 3:-2]
    return torch.cat((value, value))[: len(value)]


def spoil_values(r: random.Random, value: Tensor) -> Tensor:
    """A few elements become extreme."""
    value = value.detach().clone()
    if (
        not value.numel()
        or value.dtype in (torch.bool, torch.complex64)
        or value.is_meta
        or value.layout != torch.strided
    ):
        return value
    if value.is_floating_point():
        extreme: float = r.choice(
            (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-30, torch.finfo(value.dtype).max)
        )
    else:
        info = torch.iinfo(value.dtype)
        extreme = r.choice((info.min, info.max, 0, -1 if info.min < 0 else 17, 1, 3, 64, 99))
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


def spoil_weight(r: random.Random, weight: Int4Weight) -> Any:
    """Another valid weight, or one with fields that its own checks let through."""
    choice = r.randrange(4)
    if choice == 0:
        return r.choice((PLAIN, ORDERED, STACK, W13, W2, EXPORTABLE, PLAIN.slice_in(16, 130), PLAIN.slice_out(1, 9)))
    name = r.choice(("qweight", "scales", "zeros", "perm"))
    value = getattr(weight, name)
    if choice == 1 and value is not None:
        return dataclasses.replace(weight, **{name: spoil_values(r, value)})
    if choice == 2:
        return weight.to("meta")
    return spoil(r, None)


def spoil(r: random.Random, value: Any) -> Any:
    if r.random() < 0.12:
        return r.choice(OBJECTS)
    if r.random() < 0.08:
        return r.choice(NUMBERS)
    if isinstance(value, Tensor):
        return spoil_tensor(r, value)
    if isinstance(value, Int4Weight):
        return spoil_weight(r, value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, torch.dtype)):
        return r.choice((*OBJECTS, *DTYPES, "int16", "minmax", "slice_in", "gptq", torch.ones(3)))
    if isinstance(value, int):
        return r.choice((*NUMBERS, value + 1, value - 1, float(value), str(value), None, torch.tensor(value)))
    if isinstance(value, Mapping):
        key = r.choice(list(value))
        return {**value, key: spoil(r, value[key])}
    if isinstance(value, list):
        return r.choice(([], [spoil(r, value[0]), *value[1:]], value * 3, None, value[0]))
    return r.choice(OBJECTS)


# -- the test ---------------------------------------------------------------------------------------------------------
def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Tensor | None:
    """The result, None for a documented error; anything else propagates."""
    try:
        return function(**arguments)
    except (ValueError, BackendError):
        return None


@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_is_valid(backend: str, name: str) -> None:
    function, arguments = CALLS[name]
    assert isinstance(function(**arguments), Tensor)


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
            result = outcome(function, changed)
        except Exception as error:
            what = {key: describe(value) for key, value in changed.items() if value is not arguments[key]}
            message = f"seed {seed}, case {case}: {name} with {what} raised {type(error).__name__}: {error}"
            raise AssertionError(message) from error
        refused += result is None
        if harmless:
            assert result is not None and bitwise_equal(result, expected[name]), f"seed {seed}, case {case}: {name}"
    assert CASES * 0.4 < refused < CASES * 0.9
