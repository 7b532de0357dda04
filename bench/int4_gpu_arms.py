"""INT4 products and experts on a GPU: what an arm is, and the arms of this project and of torch.

An arm holds the weights of the layers of a rotation and computes one product for each. Arms of other projects:
int4_gpu_peers.py; the cases and their rows: int4_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.gpu_timing import Clock, GpuArm
from bench.harness import UnavailableError
from bench.int4 import MoeProblem
from bench.peers import TOLERANCE
from bench.workloads import Problem
from m3kernels.int4 import Int4Weight, int4_gemm, int4_moe

X_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMMON_DTYPE = "bf16"  # of the arms that know one alone
Made = TypeVar("Made")


# -- arms of dense products -------------------------------------------------------------------------------------------
class Shared:
    """The weights of the layers of a rotation in each form that arms want them, made once.

    ``ms``: the numbers of rows that are going to be multiplied, ascending.
    """

    def __init__(self, count: int, x_dtype: str, ms: Sequence[int] = (1,)) -> None:
        self.count, self.x_dtype, self.dtype, self.ms = count, x_dtype, X_DTYPES[x_dtype], sorted(ms)
        self.made: dict[str, Any] = {}

    def each(self, form: str, make: Callable[[int], Made]) -> list[Made]:
        """``make(layer)`` of every layer, kept under the name of the form."""
        if form not in self.made:
            self.made[form] = [make(layer) for layer in range(self.count)]
        return self.made[form]


class Layers(Shared):
    """Copies of one problem, each another weight."""

    def __init__(self, problem: Problem, count: int, x_dtype: str, ms: Sequence[int] = (1,)) -> None:
        super().__init__(count, x_dtype, ms)
        self.problem = problem

    @property
    def packed(self) -> list[Int4Weight]:
        return self.each("packed", self.problem.packed)


class Gemm(GpuArm):
    """y = x @ W.T, once for each layer. Subclasses prepare their weights in ``__init__`` and compute ``product``."""

    lossy = True
    stored_bytes = 0
    tolerance = TOLERANCE["bf16"]

    def __init__(self, layers: Layers) -> None:
        self.layers, self.computes = layers, layers.x_dtype

    def product(self, x: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def load(self, x: Tensor, clock: Clock) -> None:
        """Take x (M, K) and make the work of it; not timed."""
        self.enter()
        self.work = clock.work([functools.partial(self.product, x, layer) for layer in range(self.layers.count)])


class M3Gemm(Gemm):
    """int4_gemm in one room; ``fast``: without the promise that a row's bits do not depend on the number of rows."""

    def __init__(self, layers: Layers, *, room: str, fast: bool = False) -> None:
        super().__init__(layers)
        self.room, self.weights = f"int4={room}", layers.packed
        self.stored_bytes = layers.problem.weight_bytes
        self.options: dict[str, Any] = {"row_invariant": False} if fast else {}

    def product(self, x: Tensor, layer: int) -> Tensor:
        return int4_gemm(x, self.weights[layer], activations="exact", **self.options)


class M3Kernel(Gemm):
    """One CUDA kernel by name, past the room: what tells from how many rows on which of them is the fastest."""

    def __init__(self, layers: Layers, *, which: str) -> None:
        super().__init__(layers)
        try:
            from m3kernels import _cuda_ext, cuda
        except ImportError as error:
            raise UnavailableError(str(error)) from error
        self.module, self.rules, self.which = _cuda_ext, cuda, which
        self.weights, self.stored_bytes = layers.packed, layers.problem.weight_bytes

    def product(self, x: Tensor, layer: int) -> Tensor:
        weight, (rows, k) = self.weights[layer], x.shape
        n = weight.out_features
        y = x.new_empty(rows, n)
        plan = self.module.int4_plan(n, k, False)
        floats, ints = 0, 0
        if self.which == "decode":
            floats, ints = self.module.int4_decode_sizes(rows, 1, n, k, False, plan, 0)
        workspace = x.new_empty(floats, dtype=torch.float32)
        counters = self.rules.counters(x, ints)
        scale_type = (torch.float32, torch.bfloat16, torch.float16).index(weight.scales.dtype)
        packed = (span(weight.qweight), span(weight.scales), span(weight.zeros))
        numbers = (scale_type, 1, n, k, weight.group_size, weight.first_k)
        x_type = (torch.bfloat16, torch.float16).index(x.dtype) + 1
        nothing = span(None)
        self.module.int4_product(
            *(self.which, span(x), x_type, rows, rows, nothing, (*packed, *numbers), nothing, nothing),
            *(0, span(y), span(workspace), span(counters), plan, self.rules.stream(x)),
        )
        return y


def span(tensor: Tensor | None) -> tuple[int, int]:
    """(address, elements), as the native border takes a tensor."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


class TorchDense(Gemm):
    """cuBLAS: torch.nn.functional.linear on weights dequantised to x's dtype."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self.weights = [
            layers.problem.rows(layers.problem.dense, copy).to(layers.dtype) for copy in range(layers.count)
        ]
        self.stored_bytes = self.weights[0].numel() * self.weights[0].element_size()

    def product(self, x: Tensor, layer: int) -> Tensor:
        return torch.nn.functional.linear(x, self.weights[layer])


class Tinygemm(Gemm):
    """torch.ops.aten._weight_int4pack_mm: w = (q - 8) * scale + zero, scale and zero in bf16."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        problem, self.group_size = layers.problem, layers.problem.linear.group_size
        k = problem.linear.k
        if layers.x_dtype != COMMON_DTYPE:
            raise UnavailableError("_weight_int4pack_mm takes bf16 alone")
        if self.group_size not in (32, 64, 128, 256) or k % self.group_size or k % 128:
            raise UnavailableError("_weight_int4pack_mm: K is not a multiple of the group or of 128")
        self.weights, self.scales = [], []
        for copy in range(layers.count):
            scales = problem.rows(problem.scales, copy).float()
            shift = (8 - problem.rows(problem.zeros, copy).float()) * scales
            self.scales.append(torch.stack((scales, shift), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous())
            q = problem.rows(problem.q, copy)
            nibbles = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
            self.weights.append(torch.ops.aten._convert_weight_to_int4pack(nibbles, 8))
        self.stored_bytes = self.weights[0].numel() * 4 + self.scales[0].numel() * 2

    def product(self, x: Tensor, layer: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, self.weights[layer], self.group_size, self.scales[layer])


# -- arms of experts --------------------------------------------------------------------------------------------------
class MoeLayers(Shared):
    """Stacks of experts; copy i has its experts rotated by i and the routing with them."""

    def __init__(self, problem: MoeProblem, count: int, x_dtype: str, ms: Sequence[int] = (1,)) -> None:
        super().__init__(count, x_dtype, ms)
        self.problem = problem

    @property
    def packed(self) -> list[tuple[Int4Weight, Int4Weight]]:
        return self.each("packed", self.problem.stacks)


class Moe(GpuArm):
    """A layer of experts: w13, gated activation, w2, weighted sum; once for each stack."""

    lossy = True
    stored_bytes = 0
    tolerance = 2 * TOLERANCE["bf16"]  # two products, one after the other

    def __init__(self, layers: MoeLayers) -> None:
        self.layers, self.computes = layers, layers.x_dtype

    def route(self, ids: list[Tensor], weights: Tensor) -> None:
        """Take the experts (T, k) of every layer and their weights (T, k)."""
        self.ids, self.topk_weights = ids, weights

    def product(self, x: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def load(self, x: Tensor, clock: Clock) -> None:
        self.enter()
        problem, count = self.layers.problem, self.layers.count
        ids = [problem.ids(len(x), copy).contiguous() for copy in range(count)]
        self.route(ids, problem.topk_weights[: len(x)].contiguous())
        self.work = clock.work([functools.partial(self.product, x, layer) for layer in range(count)])


class M3Moe(Moe):
    """int4_moe in one room, its routing included."""

    def __init__(self, layers: MoeLayers, *, room: str, fast: bool = False) -> None:
        super().__init__(layers)
        self.room, self.stacks = f"int4={room}", layers.packed
        self.stored_bytes = layers.problem.w13.nbytes + layers.problem.w2.nbytes
        self.options: dict[str, Any] = {"row_invariant": False} if fast else {}

    def product(self, x: Tensor, layer: int) -> Tensor:
        w13, w2 = self.stacks[layer]
        return int4_moe(x, w13, w2, self.ids[layer], self.topk_weights, activations="exact", **self.options)
