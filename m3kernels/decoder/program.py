"""A pass through the layers of a decoder as a list of instructions, and the rows that go through it.

A Program is built once from a model's tensors and run for every step of a server. Its instructions read and write
buffers of rows in fp32; weights may be fp32, bf16, fp16 or INT4, caches are paged. On a CPU all instructions run in one
native call; elsewhere, and with M3KERNELS_BACKEND=decoder=reference, torch runs them one by one (run_torch.py), which
is also what the native pass is tested against.

    program = Program(rotated=64)
    x = program.buffer(576)
    program.embed(x, embedding)
    ...
    logits, = program.run(batch)

A row's results are bitwise the same whatever rows share the pass: linear, int4_gemm and tree_attention are
row-invariant on a CPU, and every other instruction looks at one row. The tensors of a program may be changed in place between passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import refuse
from m3kernels.dispatch import BackendError, forced
from m3kernels.int4 import Int4Weight

OP = "Program"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_MASK_WORDS = 32


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns ``first`` .. ``first + width - 1`` of a buffer; ``picked``: it has a row for each picked row only."""

    buffer: int
    first: int
    width: int
    picked: bool

    def part(self, first: int, width: int) -> Columns:
        if first < 0 or width < 1 or first + width > self.width:
            raise refuse(OP, "columns", f"columns of 0..{self.width - 1}", f"{width} from {first}")
        return Columns(self.buffer, self.first + first, width, self.picked)


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Paged keys and values of one layer: (P, page_size, G, D); int8 with scales (P, page_size, G) fp32."""

    keys: Tensor
    values: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One instruction: its name, operands, and what else it needs."""

    op: str
    to: Columns | None = None
    source: Columns | None = None
    extra: Columns | None = None  # attend: gate; moe: scores
    tensors: tuple[Tensor | None, ...] = ()
    weight: Int4Weight | None = None
    weight2: Int4Weight | None = None
    index: int = 0
    heads: int = 0
    number: float = 0.0  # eps, or softmax scale
    activations: str = "auto"
    top_k: int = 0
    rescale: bool = False


@dataclasses.dataclass(kw_only=True)
class Batch:
    """Rows of a pass, sorted by request; the first ``causal`` requests attend causally, the others by mask_bits.

    tokens, positions, slots: (T,) int64; a slot is page * page_size + offset in the page. cu_seqlens: (B + 1,) int32.
    cache_seqlens: (B,) int32, keys with those of this pass. block_table: (B, max_pages) int32. tree_lens: (B,) int32,
    keys that mask_bits speak of; mask_bits: (rows of the other requests, W) int32, W at most 32; None where
    causal = B. picked: (R,) int64, rows that instructions after ``pick`` see.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    cache_seqlens: Tensor
    block_table: Tensor
    picked: Tensor
    causal: int
    tree_lens: Tensor | None = None
    mask_bits: Tensor | None = None


class Program:
    """Instructions in the order in which they were added.

    Args:
        rotated: columns of a head that rotary positions turn, the first ones; even.
        device: where the model lies.
    """

    def __init__(self, *, rotated: int, device: torch.device | str = "cpu") -> None:
        if rotated < 2 or rotated % 2:
            raise refuse(OP, "rotated", "an even number of at least 2", rotated)
        self.rotated = rotated
        self.device = torch.device(device)
        self.widths: list[int] = []
        self.picked: list[bool] = []
        self.steps: list[Step] = []
        self.caches: list[Cache] = []
        self.cos = self.sin = torch.empty(0, rotated // 2)
        self.outputs: list[Columns] = []
        self.inputs: list[Columns] = []
        self._runner: Any = None

    # -- building -----------------------------------------------------------------------------------------------------
    def buffer(self, width: int, *, picked: bool = False) -> Columns:
        """A new buffer."""
        self.widths.append(width)
        self.picked.append(picked)
        return Columns(len(self.widths) - 1, 0, width, picked)

    def cache(self, cache: Cache) -> int:
        """Add the cache of a layer; its index."""
        pages, page_size, heads, _ = cache.keys.shape
        if cache.values.shape != cache.keys.shape or cache.values.dtype != cache.keys.dtype:
            raise refuse(OP, "values", f"{tuple(cache.keys.shape)} {cache.keys.dtype}, as keys", cache.values)
        for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if (scale is None) == (cache.keys.dtype == torch.int8):
                raise refuse(OP, name, "a tensor for int8, None otherwise", scale)
            if scale is not None and (scale.shape != (pages, page_size, heads) or scale.dtype != torch.float32):
                raise refuse(OP, name, f"{(pages, page_size, heads)} float32", scale)
        self.caches.append(cache)
        return len(self.caches) - 1

    def angles(self, cos: Tensor, sin: Tensor) -> None:
        """Tables (positions, rotated / 2) fp32: x[i], x[i + half] -> a cos - b sin, b cos + a sin."""
        for name, table in (("cos", cos), ("sin", sin)):
            if table.ndim != 2 or table.shape[1] * 2 != self.rotated or table.dtype != torch.float32:
                raise refuse(OP, name, f"(positions, {self.rotated // 2}) float32", table)
        self.cos, self.sin = cos.contiguous(), sin.contiguous()

    def embed(self, to: Columns, table: Tensor) -> None:
        """to = table[token]; table (V, to.width)."""
        if table.ndim != 2 or table.shape[1] != to.width or table.dtype not in DTYPES:
            raise refuse(OP, "table", f"(V, {to.width}) float32, bfloat16 or float16", table)
        self._add(Step("embed", to=to, tensors=(table,)))

    def load(self, to: Columns) -> int:
        """to = an input of run(); its index."""
        self.inputs.append(to)
        self._add(Step("load", to=to, index=len(self.inputs) - 1))
        return len(self.inputs) - 1

    def store(self, source: Columns) -> int:
        """An output of run(), (rows, source.width) fp32; its index."""
        self.outputs.append(source)
        self._add(Step("store", source=source, index=len(self.outputs) - 1))
        return len(self.outputs) - 1

    def pick(self, to: Columns, source: Columns) -> None:
        """to = the picked rows of source."""
        self._add(Step("pick", to=to, source=source))

    def copy(self, to: Columns, source: Columns) -> None:
        self._add(Step("copy", to=to, source=source))

    def add(self, to: Columns, source: Columns) -> None:
        """to += source."""
        self._add(Step("add", to=to, source=source))

    def norm(self, to: Columns, source: Columns, weight: Tensor, eps: float) -> None:
        """to = source / sqrt(mean(source^2) + eps) * weight; weight (width,) fp32."""
        if weight.shape != (source.width,) or weight.dtype != torch.float32:
            raise refuse(OP, "weight", f"({source.width},) float32", weight)
        self._add(Step("norm", to=to, source=source, tensors=(weight,), number=eps))

    def linear(
        self,
        to: Columns,
        source: Columns,
        weight: Tensor | Int4Weight,
        bias: Tensor | None = None,
        *,
        activations: str = "auto",
    ) -> None:
        """to = W source + bias; bias (N,) fp32."""
        if bias is not None and (bias.shape != (to.width,) or bias.dtype != torch.float32):
            raise refuse(OP, "bias", f"({to.width},) float32", bias)
        if isinstance(weight, Int4Weight):
            got, want = (weight.out_features, weight.in_features), (to.width, source.width)
            if got != want or weight.num_experts is not None:
                raise refuse(OP, "weight", f"an Int4Weight {want}", f"{weight!r}")
            self._add(Step("int4", to=to, source=source, weight=weight, tensors=(bias,), activations=activations))
            return
        if weight.shape != (to.width, source.width) or weight.dtype not in DTYPES or not weight.is_contiguous():
            raise refuse(OP, "weight", f"contiguous {(to.width, source.width)} float32, bfloat16 or float16", weight)
        self._add(Step("dense", to=to, source=source, tensors=(weight, bias)))

    def silu_mul(self, to: Columns, source: Columns) -> None:
        """to = silu(first half of source) * second half."""
        self._add(Step("silu_mul", to=to, source=source))

    def rotate(
        self,
        source: Columns,
        cache: int,
        heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Queries, keys, values of source: norms and rotary positions in place; keys and values go to the cache."""
        self._add(Step("rotate", source=source, index=cache, heads=heads, tensors=(q_norm, k_norm), number=eps))

    def attend(
        self, to: Columns, queries: Columns, cache: int, heads: int, scale: float, gate: Columns | None = None
    ) -> None:
        """to = attention of queries over the cache, times sigmoid(gate), one a head or one an element."""
        self._add(Step("attend", to=to, source=queries, extra=gate, index=cache, heads=heads, number=scale))

    def moe(
        self,
        to: Columns,
        source: Columns,
        scores: Columns,
        w13: Tensor | Int4Weight,
        w2: Tensor | Int4Weight,
        *,
        top_k: int,
        rescale: bool,
        activations: str = "auto",
    ) -> None:
        """to = weighted sum over the top_k experts with the largest softmax(scores); ties go to the lower expert."""
        facts: dict[str, Any] = {"top_k": top_k, "rescale": rescale, "activations": activations}
        if isinstance(w13, Int4Weight) and isinstance(w2, Int4Weight):
            step = Step("moe", to=to, source=source, extra=scores, weight=w13, weight2=w2, **facts)
        elif isinstance(w13, Tensor) and isinstance(w2, Tensor):
            step = Step("moe", to=to, source=source, extra=scores, tensors=(w13, w2), **facts)
        else:
            raise refuse(OP, "w2", "of w13's kind: both INT4 or both dense", type(w2).__name__)
        self._add(step)

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self._runner = None

    # -- running ------------------------------------------------------------------------------------------------------
    @property
    def runner(self) -> Any:
        """What runs the instructions here; made at the first pass."""
        if self._runner is None:
            room = forced("decoder") or ("cpu" if self.device.type == "cpu" else "triton")
            if room == "cpu":
                if self.device.type != "cpu":
                    raise BackendError(f"decoder_pass: cpu: needs CPU tensors, not {self.device.type}")
                from m3kernels.decoder.run_cpu import NativePass

                self._runner = NativePass(self)
            else:
                from m3kernels.decoder.run_torch import TorchPass

                self._runner = TorchPass(self)
        return self._runner

    def run(self, batch: Batch, inputs: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """One pass; the stored outputs, (rows, width) fp32 each.

        Args:
            batch: the rows. inputs: (T, width) fp32 contiguous, one for each load().
        Raises:
            ValueError: a token, position, slot or page outside its range, or sizes that do not fit.
        """
        return self.runner.run(batch, inputs)

    def profile(self, on: bool) -> dict[str, float]:
        """Seconds in each instruction since the last call, where the native pass runs; then switches it on or off."""
        return self.runner.profile(on)

    def experts_touched(self) -> tuple[int, int]:
        """(distinct experts that the last pass read, summed over its layers; such layers)."""
        return self.runner.experts_touched()
